"""The report on which knob matters, from the records of `experiments.studies.knobs`: tables and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reports.figures import pyplot
from experiments.reports.markdown import table
from experiments.reports.statistics import paired_difference
from experiments.runs.measures import spread

__all__ = ["draw", "ranges_table", "values_table"]


def values_table(report: Mapping[str, Any]) -> str:
  """Accuracy and sparsity at every setting, and the accuracy's difference to the tuned one, paired over seeds."""
  rows = []
  for knob in report["knobs"].values():
    tuned = _tuned(knob)
    for row in knob["rows"]:
      factor = "" if row["factor"] is None else f"{row['factor']:g} ×"
      value = "none" if row["value"] is None else f"{row['value']:.3g}"
      known = {what: _known(row[what]) for what in ("accuracy", "sparsity")}
      diverged = len(row["accuracy"]) - len(known["accuracy"])
      cells = [_mean(known["accuracy"]), _difference(row, tuned), _mean(known["sparsity"])] if known["accuracy"] else ["", "", ""]
      rows.append([knob["label"], factor, value, *cells, diverged or ""])
  return table(["knob", "of the tuned", "value", "accuracy (%)", "minus tuned (points)", "gated channels off (%)", "seeds that diverged"], rows)


def ranges_table(report: Mapping[str, Any], near: float = 2.0) -> str:
  """By knob, what mean accuracy and sparsity do within a factor `near` of the tuned value, and at all settings, the most telling knob first."""
  rows = []
  for knob in report["knobs"].values():
    own = [row for row in knob["rows"] if row["factor"] is not None]
    if not own:
      continue
    close = [row for row in own if 1 / near <= row["factor"] <= near]
    lost = [row["factor"] for row in own if len(_known(row["accuracy"])) < len(row["accuracy"])]
    rows.append(
      [
        _range(close, "accuracy")[0],
        knob["label"],
        *(_text(part, what) for what in ("accuracy", "sparsity") for part in (close, own)),
        _factors(lost),
      ]
    )
  rows.sort(key=lambda row: -row[0])
  within = [f"within {near:g} ×", "in all"]
  header = ["knob", *(f"{what}, {each}" for what in ("accuracy (%)", "channels off (%)") for each in within), "diverged at"]
  return table(header, [row[1:] for row in rows])


def draw(report: Mapping[str, Any], path: Path) -> None:
  """Accuracy (above) and sparsity (below) against each knob, mean over seeds with a band of ± one standard deviation."""
  plt = pyplot()
  knobs = list(report["knobs"].values())
  columns = min(3, len(knobs))
  bands = -(-len(knobs) // columns)
  figure, axes = plt.subplots(
    2 * bands, columns, figsize=(3.4 * columns, 4.6 * bands), layout="constrained", squeeze=False, height_ratios=(1.4, 1) * bands
  )
  for place, knob in enumerate(knobs):
    band, column = divmod(place, columns)
    for what, axis, color in (("accuracy", axes[2 * band, column], "tab:blue"), ("sparsity", axes[2 * band + 1, column], "tab:orange")):
      rows = [row for row in knob["rows"] if _known(row[what]) and row["value"] is not None]
      means = 100 * np.array([np.mean(list(_known(row[what]).values())) for row in rows])
      stds = 100 * np.array([spread(list(_known(row[what]).values())) or 0.0 for row in rows])
      by_factor = rows[0]["factor"] is not None
      xs = [row["factor"] if by_factor else row["value"] for row in rows]
      axis.fill_between(xs, means - stds, means + stds, color=color, alpha=0.15)
      axis.plot(xs, means, "o-", color=color, markersize=4)
      if by_factor:
        axis.set_xscale("log", base=2)
        axis.set_xticks(xs, [f"{x:g}" if x >= 1 else f"1/{1 / x:g}" for x in xs], fontsize=8)
        axis.axvline(1, color="0.6", linewidth=1, linestyle=":")
      axis.grid(alpha=0.3)
      axis.set_ylim((0, 100) if what == "sparsity" else _limits(report))
      if column == 0:
        axis.set_ylabel("accuracy after\nadaptation (%)" if what == "accuracy" else "gated channels\noff (%)")
    axes[2 * band, column].set_title(knob["label"], fontsize=9)
    axes[2 * band + 1, column].set_xlabel("of the tuned value" if knob["rows"][0]["factor"] is not None else "value", fontsize=8)
  for place in range(len(knobs), bands * columns):
    band, column = divmod(place, columns)
    for axis in axes[2 * band : 2 * band + 2, column]:
      axis.set_axis_off()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _known(by_seed: Mapping[str, float | None]) -> dict[str, float]:
  return {seed: value for seed, value in by_seed.items() if value is not None}


def _tuned(knob):
  """What a knob's settings are compared with: the tuned value, or nothing asked for."""
  return next((row for row in knob["rows"] if row["tuned"]), None)


def _mean(values: Mapping[str, float]) -> str:
  std = spread(list(values.values()))
  return f"{100 * np.mean(list(values.values())):.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def _difference(row, tuned) -> str:
  if tuned is None or row is tuned:
    return ""
  found = paired_difference(_known(row["accuracy"]), _known(tuned["accuracy"]))
  return "" if found is None else found.points


def _range(rows: Sequence[Mapping[str, Any]], what: str) -> tuple[float, float, float]:
  """Highest minus lowest mean, and both, over the settings at which a seed is left."""
  means = [100 * np.mean(list(_known(row[what]).values())) for row in rows if _known(row[what])]
  return max(means) - min(means), min(means), max(means)


def _text(rows, what):
  _, low, high = _range(rows, what)
  return f"{low:.1f} … {high:.1f}"


def _factors(factors: Sequence[float]) -> str:
  return ", ".join(f"{factor:g} ×" for factor in factors)


def _limits(report):
  values = [100 * value for knob in report["knobs"].values() for row in knob["rows"] for value in _known(row["accuracy"]).values()]
  return min(values) - 2, min(max(values) + 2, 100)

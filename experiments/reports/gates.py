"""What a gate is worth, from recorded runs: a table of the variants, what each step adds, what the gates do, and a figure."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import registry
from experiments.reports.figures import pyplot
from experiments.reports.markdown import table
from experiments.reports.statistics import holm, paired_difference
from experiments.runs.measures import spread
from experiments.runs.records import read_result, write_json
from experiments.studies.gate_variants import LABELS, MODELS, SPARSITIES, VARIANTS, variant_folder
from experiments.studies.protocols import PROTOCOL_LABELS

__all__ = ["accuracies", "behaviour", "differences", "differences_table", "markdown", "merge", "plot", "read", "summary", "write"]

# What is compared: name, (variant, whether at a given sparsity) of both sides.
COMPARISONS = (
  ("dropout: (b) over (a)", "b", "a"),
  ("static selection: (c) over (b)", "c", "b"),
  ("chosen by gradient: (c) over (d)", "c", "d"),
  ("looking at the input: (f) over (e)", "f", "e"),
  ("learned gate over static selection: (f) over (c)", "f", "c"),
  ("learned gate over random channels: (f) over (d)", "f", "d"),
  ("gating in all: (f) over (a)", "f", "a"),
  ("gating beyond dropout: (f) over (b)", "f", "b"),
)
_OWN = "own"  # the sparsity that gate and penalty lead to


def write(workdir: Path, protocols: Sequence[str], seeds: Sequence[int], configs: Mapping[Any, Any]) -> dict[str, Any]:
  """Reads the records of a workdir and writes gates.json, gates.md and gates.png beside them."""
  content = {
    "protocols": {
      protocol: {
        "rounds": {row.method: config.rounds for row, config in configs.items() if row.protocol == protocol},
        "settings": {row.method: _settings(row.method, config) for row, config in configs.items() if row.protocol == protocol},
        "layers": next(list(config.gated_layers) for row, config in configs.items() if row.protocol == protocol),
        "runs": _runs(workdir, protocol, seeds),
      }
      for protocol in protocols
    }
  }
  write_json(workdir / "gates.json", content)
  (workdir / "gates.md").write_text(markdown(content), encoding="utf-8")
  plot(workdir / "gates.png", content)
  return content


def merge(held: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
  """Two contents as one: protocols and seeds of both; where both have a protocol with other rounds or settings, the new
  one's alone."""
  protocols = dict(held["protocols"])
  for protocol, own in new["protocols"].items():
    old = protocols.get(protocol)
    if old and all(old.get(name) == own[name] for name in ("rounds", "settings", "layers")):
      own = own | {"runs": {name: old["runs"].get(name, {}) | runs for name, runs in own["runs"].items()}}
    protocols[protocol] = own
  return {"protocols": protocols}


def _settings(method, config):
  """What was tuned for a method, by which runs of one kind are told from those of another."""
  known = registry.methods()[method]
  names = {*known.space, "adapt_lr"} | ({"gate_adapt_lr"} if known.gated else set())
  return {name: getattr(config, name) for name in sorted(names)}


def _runs(workdir, protocol, seeds):
  """By "variant sparsity", by seed: what is compared."""
  folders = {
    f"{variant} {_OWN if variant == 'f' else 0}": lambda seed, method=method: workdir / f"{protocol}-{method}-k1" / f"seed-{seed}"
    for variant, method in MODELS.items()
  }
  for variant in VARIANTS:
    for sparsity in (None, *SPARSITIES):
      folders.setdefault(
        f"{variant} {_OWN if sparsity is None else sparsity}",
        lambda seed, variant=variant, sparsity=sparsity: variant_folder(workdir, protocol, variant, sparsity, seed),
      )
  found = {}
  for name, folder in folders.items():
    runs = {str(seed): _numbers(read_result(folder(seed))) for seed in seeds if (folder(seed) / "result.json").is_file()}
    if runs:
      found[name] = runs
  return found


def _numbers(result):
  numbers = {"accuracy": result["accuracy"]["mean"], "macs": (result["macs"]["gated"] or result["macs"]["dense"]) / result["macs"]["dense"]}
  if result["sparsity"]:
    numbers |= {"sparsity": result["sparsity"]["mean"], "over_tasks": result["sparsity"]["std"]}
  if result.get("gates"):
    after, before = result["gates"]["after"], result["gates"]["before"]
    numbers |= {
      "conditional": result["conditional"]["mean"],
      "over_images": after["sparsity_over_images"],
      "correlation": after["confidence_correlation"]["mean"],
      "task_difference": after["task_difference"],
      "explained": _mean_explained(after),
      "before": {
        "conditional": float(np.mean([layer["conditional"] for layer in before["layers"].values()])),
        "sparsity": result["sparsity_before_adaptation"]["mean"],
        "explained": _mean_explained(before),
      },
    }
  return numbers


def _mean_explained(gates):
  values = [layer["explained_by_class"] for layer in gates["layers"].values() if layer["explained_by_class"] is not None]
  return float(np.mean(values)) if values else 0.0


def _at(variant, sparsity):
  """The name of a variant's runs: what has no sparsity has one set of them."""
  return f"{variant} 0" if variant in ("a", "b") else f"{variant} {sparsity}"


def _statistic(runs, key, scale=100):
  values = [scale * run[key] for run in runs.values() if key in run]
  if not values:
    return ""
  return f"{np.mean(values):.1f}" + (f" ± {spread(values):.1f}" if len(values) > 1 else "")


def accuracies(content: Mapping[str, Any]) -> str:
  """Accuracy of each variant by protocol and sparsity."""
  rows = []
  for protocol, own in content["protocols"].items():
    for sparsity in (_OWN, *SPARSITIES):
      runs = own["runs"]
      cells = [_statistic(runs.get(_at(variant, sparsity), {}), "accuracy") for variant in LABELS]
      shown = f"{100 * sparsity:.0f} %" if sparsity != _OWN else f"its own: {_statistic(runs.get(f'f {_OWN}', {}), 'sparsity')} %"
      rows.append([PROTOCOL_LABELS[protocol], shown, *cells])
  return table(["Accuracy (%)", "sparsity", *(f"({variant})" for variant in LABELS)], rows)


def differences(content: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Every comparison, paired over seeds, with Holm's correction over all protocols and sparsities of one question."""
  found = []
  for what, better, worse in COMPARISONS:
    group = []
    for protocol, own in content["protocols"].items():
      for sparsity in (_OWN, *SPARSITIES):
        if better == "b" and sparsity != _OWN:
          continue  # neither side has a sparsity
        sides = [{int(seed): run["accuracy"] for seed, run in own["runs"].get(_at(side, sparsity), {}).items()} for side in (better, worse)]
        difference = paired_difference(*sides)
        if difference is not None:
          group.append(
            {
              "what": what,
              "protocol": protocol,
              "sparsity": None if better == "b" else sparsity,
              **difference._asdict(),
              "verdict": difference.verdict(),
            }
          )
    for entry, p in zip(group, holm([entry["p"] for entry in group])):
      entry["p_holm"] = p
    found += group
  return found


def differences_table(content: Mapping[str, Any]) -> str:
  """What each step adds, in points, with 95 % intervals over seeds; bold where the interval excludes zero after Holm's correction."""
  entries = differences(content)
  rows = []
  for what, *_ in COMPARISONS:
    for protocol in content["protocols"]:
      own = {entry["sparsity"]: entry for entry in entries if (entry["what"], entry["protocol"]) == (what, protocol)}
      if own:
        first = own.get(None) or own.get(_OWN)
        rows.append([what, PROTOCOL_LABELS[protocol], _interval(first), *(_interval(own.get(sparsity)) for sparsity in SPARSITIES)])
  return table(["Difference (points)", "Dataset", "its own sparsity", *(f"{100 * sparsity:.0f} %" for sparsity in SPARSITIES)], rows)


def _interval(entry):
  if entry is None:
    return ""
  text = f"{100 * entry['mean']:+.1f}" + ("" if entry["low"] is None else f" ({100 * entry['low']:+.1f} … {100 * entry['high']:+.1f})")
  return f"**{text}**" if entry["p_holm"] is not None and entry["p_holm"] < 0.05 else text


def summary(content: Mapping[str, Any]) -> str:
  """A line for each question: where the answer differs from zero after Holm's correction."""
  lines, entries = [], differences(content)
  for what, *_ in COMPARISONS:
    found = {"better": [], "worse": []}
    for protocol in content["protocols"]:
      for word, sign in (("better", 1), ("worse", -1)):
        at = [
          entry["sparsity"]
          for entry in entries
          if (entry["what"], entry["protocol"]) == (what, protocol)
          and sign * entry["mean"] > 0
          and entry["p_holm"] is not None
          and entry["p_holm"] < 0.05
        ]
        if at:
          where = [f"{100 * s:.0f} %" if isinstance(s, float) else "its own sparsity" for s in at if s is not None]
          found[word].append(PROTOCOL_LABELS[protocol] + (f" ({', '.join(where)})" if where else ""))
    said = "; ".join(f"{word} on {', '.join(places)}" for word, places in found.items() if places)
    lines.append(f"* {what[0].upper()}{what[1:]}: {said or 'no difference shown'}.")
  return "\n".join(lines)


def behaviour(content: Mapping[str, Any]) -> str:
  """What the learned gates do at the sparsity that they lead to, and at the others."""
  rows = []
  for protocol, own in content["protocols"].items():
    for sparsity in (_OWN, *SPARSITIES):
      runs = own["runs"].get(f"f {sparsity}", {})
      if runs:
        before = {seed: run["before"] for seed, run in runs.items() if "before" in run}
        over = [f"{_statistic(runs, 'sparsity')}", f"{_mean(runs, 'over_tasks')}, {_mean(runs, 'over_images')}"]
        rows.append(
          [
            PROTOCOL_LABELS[protocol],
            "its own" if sparsity == _OWN else f"{100 * sparsity:.0f} %",
            *over,
            f"{_mean(before, 'conditional')} → {_statistic(runs, 'conditional')}",
            f"{_mean(before, 'explained')} → {_mean(runs, 'explained')}",
            _mean(runs, "correlation", 1, "+.2f"),
            _mean(runs, "macs"),
          ]
        )
  return table(
    [
      "Dataset",
      "wanted",
      "sparsity (%)",
      "± over tasks, over images",
      "channels that vary (%), before → after stage I",
      "explained by class (%)",
      "correlation with confidence",
      "MACs (%)",
    ],
    rows,
  )


def _mean(runs, key, scale=100, form=".1f"):
  values = [scale * run[key] for run in runs.values() if run.get(key) is not None]
  return format(np.mean(values), form) if values else ""


def markdown(content: Mapping[str, Any]) -> str:
  """The page that all of this is on."""
  seeds = sorted({int(seed) for own in content["protocols"].values() for runs in own["runs"].values() for seed in runs})
  legend = "; ".join(f"({variant}) {label}" for variant, label in LABELS.items())
  return (
    "\n\n".join(
      [
        "# What a gate is worth",
        f"Target tasks after one gradient step per stage, mean ± standard deviation over seeds ({', '.join(map(str, seeds))}). "
        f"Variants: {legend}. (c) and (d) choose channels of the model of (b). Sparsity is that of the gated layers.",
        "## What it says",
        summary(content),
        "## Accuracy",
        accuracies(content),
        "## What each step adds",
        "Paired over seeds, with 95 % intervals; bold where it differs from zero after Holm's correction over the rows and columns of a question.",
        differences_table(content),
        "## What the gates do",
        behaviour(content),
        "![accuracy of the variants against sparsity](gates.png)",
      ]
    )
    + "\n"
  )


def plot(path: Path, content: Mapping[str, Any]) -> None:
  """Accuracy against sparsity, a panel for each protocol: lines of (c) to (f), levels of (a) and (b), and the gate's own sparsity as a star."""
  plt = pyplot()
  panels = content["protocols"]
  figure, axes = plt.subplots(1, len(panels), figsize=(max(4.2 * len(panels), 6.5), 4.4), layout="constrained", squeeze=False)
  mean = lambda runs, key: 100 * np.mean([run[key] for run in runs.values()])
  for axis, (protocol, own) in zip(axes[0], panels.items()):
    runs = own["runs"]
    for variant, style in (("a", "k--"), ("b", "k:")):
      if f"{variant} 0" in runs:
        axis.axhline(mean(runs[f"{variant} 0"], "accuracy"), color=style[0], linestyle=style[1:], label=f"({variant}) {LABELS[variant]}")
    for variant, style in (("c", "s-"), ("d", "x-"), ("e", "v-"), ("f", "o-")):
      there = [sparsity for sparsity in SPARSITIES if f"{variant} {sparsity}" in runs]
      if there:
        (line,) = axis.plot(
          [mean(runs[f"{variant} {s}"], "sparsity") for s in there],
          [mean(runs[f"{variant} {s}"], "accuracy") for s in there],
          style,
          markersize=4,
          label=f"({variant}) {LABELS[variant]}",
        )
        if f"{variant} {_OWN}" in runs:
          own_point = runs[f"{variant} {_OWN}"]
          axis.plot(mean(own_point, "sparsity"), mean(own_point, "accuracy"), "*", markersize=11, color=line.get_color())
    axis.set(title=PROTOCOL_LABELS[protocol], xlabel="sparsity of gated layers (%)", ylabel="accuracy after adaptation (%)")
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)
  figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def read(path: Path) -> dict[str, Any]:
  """The content of a gates.json."""
  return json.loads(path.read_text(encoding="utf-8"))

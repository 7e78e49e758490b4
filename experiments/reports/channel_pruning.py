"""The report on whole filters, from the records of `experiments.studies.channel_pruning`: numbers, tables and a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reports.figures import pyplot
from experiments.reports.markdown import table
from experiments.runs.measures import interval
from experiments.studies.channel_pruning import WAYS

__all__ = ["accuracy_table", "device_table", "draw", "summarized"]


def summarized(found: Mapping[str, Any]) -> dict[str, Any]:
  """What is kept of the records: means over seeds, by seed, and differences to the network that is not pruned, paired by episode.

  Args:
    found: what `experiments.studies.channel_pruning.reproduce` returns.
  """
  cases = {}
  for name, case in found["cases"].items():
    ways = {way: records for way, records in case["ways"].items() if way != "base"}
    seeds = list(case["ways"]["base"])
    episodes = lambda way, place: np.concatenate([ways[way][seed]["levels"][place]["accuracy"] for seed in seeds])
    rows: dict[str, list[dict[str, Any]]] = {}
    for way, records in ways.items():
      rows[way] = []
      for place in range(len(found["levels"])):
        levels = [records[seed]["levels"][place] for seed in seeds]
        own = {
          "accuracy": float(episodes(way, place).mean()),
          "by_seed": [float(np.mean(level["accuracy"])) for level in levels],
          "macs": float(np.mean([level["macs"] / records[seed]["dense_macs"] for seed, level in zip(seeds, levels)])),
          "parameters": float(np.mean([level["parameters"] for level in levels])),
          "kept": levels[0]["kept"],
        }
        first = np.concatenate([case["ways"]["base"][seed]["levels"][0]["accuracy"] for seed in seeds])
        own["minus_before"] = interval(100 * (episodes(way, place) - first))
        if "none" in ways and way != "none":
          own["minus_none"] = interval(100 * (episodes(way, place) - episodes("none", place)))
          own["minus_none_by_seed"] = [
            100 * float(np.mean(level["accuracy"]) - np.mean(ways["none"][seed]["levels"][place]["accuracy"])) for seed, level in zip(seeds, levels)
          ]
        if "latency_us" in levels[0]:
          mean = lambda part, levels=levels: {
            key: {which: float(np.median([level[part][key][which] for level in levels])) for which in value} for key, value in levels[0][part].items()
          }
          own |= {"latency_us": mean("latency_us"), "bytes": mean("bytes"), "difference": max(max(level["difference"].values()) for level in levels)}
        rows[way].append(own)
    base = [float(np.mean(record["levels"][0]["accuracy"])) for record in case["ways"]["base"].values()]
    cases[name] = {
      "title": case["title"],
      "seeds": [int(seed) for seed in seeds],
      "steps": case["steps"],
      "level_steps": case["level_steps"],
      "before": base,
      "ways": rows,
    }
  return {"levels": list(found["levels"]), "cases": cases}


def accuracy_table(report: Mapping[str, Any]) -> str:
  """Accuracy by way and level, its difference to before pruning and, in brackets, to training on as long, and what of the work is left."""
  rows = []
  for case in report["cases"].values():
    trained = f"before pruning, {case['steps']:,} steps; then {case['level_steps']:,} steps at each level"
    rows.append(
      [case["title"], trained, ", ".join(map(str, case["seeds"])), f"{100 * np.mean(case['before']):.1f}", *[""] * (len(report["levels"]) - 1)]
    )
    for way, levels in case["ways"].items():
      rows.append([case["title"], WAYS[way].label, ", ".join(map(str, case["seeds"])), *map(_cell, levels)])
  return table(["network and task", "filters", "seeds", *(f"{100 * level:.0f} % of the MACs asked to go" for level in report["levels"])], rows)


def _cell(level):
  before = level["minus_before"]
  text = f"{100 * level['accuracy']:.1f}: {before['mean']:+.1f} ± {before['ci95']:.1f}"
  if "minus_none" not in level:
    return text
  difference, seeds = level["minus_none"], level["minus_none_by_seed"]
  more = f"; {', '.join(f'{one:+.1f}' for one in seeds)}" if len(seeds) > 1 else ""
  return f"{text} ({difference['mean']:+.1f} ± {difference['ci95']:.1f}{more}) at {level['macs']:.2f}"


def device_table(report: Mapping[str, Any], way: str = "anp") -> str:
  """What the files of one way cost on a device, beside the whole network's."""
  rows = []
  for case in report["cases"].values():
    for level in case["ways"].get(way, []):
      cost = []
      for runtime in ("litert", "onnxruntime"):
        own = level["latency_us"][runtime]
        cost.append(f"{own['dense']:.0f} → {own['compact']:.0f} ({own['dense'] / own['compact']:.2f} ×)")
      size = level["bytes"]["tflite"]
      rows.append(
        [case["title"], f"{level['macs']:.2f}", f"{1 / level['macs']:.2f} ×", *cost, f"{size['dense'] / 1e3:.0f} → {size['compact'] / 1e3:.0f}"]
      )
  return table(["network and task", "MACs left", "ideal", "LiteRT, batch 1 (µs)", "ONNX Runtime, batch 1 (µs)", ".tflite (KB)"], rows)


def draw(report: Mapping[str, Any], path: Path) -> None:
  """Accuracy against the share of the work that is left, one panel per network."""
  plt = pyplot()
  cases = report["cases"].values()
  figure, axes = plt.subplots(1, len(cases), figsize=(5.6 * len(cases), 4.2), layout="constrained", squeeze=False)
  for axis, case in zip(axes[0], cases):
    for way, levels in case["ways"].items():
      if way == "none":
        axis.axhline(100 * levels[-1]["accuracy"], color="0.5", linestyle="--", linewidth=1, label=WAYS[way].label)
      else:
        axis.plot(
          [100 * level["macs"] for level in levels],
          [100 * level["accuracy"] for level in levels],
          "s--" if way == "narrow" else "o-",
          markersize=4,
          label=WAYS[way].label,
        )
    axis.set(title=case["title"], xlabel="multiply-accumulates left (%)", ylabel="accuracy on test episodes (%)")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)

"""What a reader sees of deployed networks: a table and a figure, from their records."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reports.figures import pyplot
from experiments.reports.markdown import table
from experiments.reports.statistics import paired_difference
from experiments.runs.measures import spread

__all__ = ["adaptation_table", "deploy_table", "files_table", "merge", "plot_deploy", "report_deploy"]


def report_deploy(workdir: str | Path) -> str:
  """Draws `deploy.png` beside the records of a run; the text for a terminal."""
  workdir = Path(workdir)
  content = json.loads((workdir / "deploy.json").read_text(encoding="utf-8"))
  drawn = f"figure: {workdir / 'deploy.png'}; " if content["mean"]["latency_us"] else ""  # StableHLO alone is not timed
  if drawn:
    plot_deploy(workdir / "deploy.png", content)
  return f"{deploy_table(content)}\n{drawn}files and their cards are in {workdir / 'deploy'}"


def deploy_table(content: Mapping[str, Any]) -> str:
  """The means over tasks, as lines for a terminal."""
  mean, tasks = content["mean"], content["tasks"]
  ratio = lambda pair: f"{pair['dense']:,.0f} dense, {pair['compact']:,.0f} compact ({pair['compact'] / pair['dense']:.2f})"
  rows = [
    ("accuracy", ", ".join(f"{name} {100 * value:.1f} %" for name, value in mean["accuracy"].items())),
    ("multiply-accumulates per image", ratio(mean["macs"])),
    ("parameters", ratio(mean["parameters"])),
    *((f"bytes, .{form}", ", ".join(f"{name} {value:,.0f}" for name, value in sizes.items())) for form, sizes in mean["bytes_by_format"].items()),
  ]
  for key, times in mean.items():
    if key.startswith("latency_us"):
      batch = key.rpartition("_")[2] if "batch" in key else content["options"]["batches"][0]
      for runtime, values in times.items():
        speedup = f"; compact is {values['dense'] / values['compact']:.2f} × faster" if values.keys() >= {"dense", "compact"} else ""
        rows.append((f"µs, {runtime}, batch {batch}", ", ".join(f"{name} {value:,.0f}" for name, value in values.items()) + speedup))
  for way, own in (mean.get("adapt") or {}).items():
    if isinstance(own, Mapping) and own.get("ms"):
      rows.append(
        (
          f"adapting on the device, {way}",
          f"{own['ms']:.1f} ms for {own['samples']:.0f} samples, {own['peak_mb']:.0f} MB at the peak, {own['max_difference']:.0e} from JAX",
        )
      )
  failed = {name: why for own in tasks.values() for name, why in own["failed"].items()}
  refused = next(
    (own["adapt"][way]["failed"] for own in tasks.values() for way in ("dense", "restricted") if "failed" in own.get("adapt", {}).get(way, {})), None
  )
  width = max(len(name) for name, _ in rows)
  lines = [
    f"{content['run']}: {content['personalizer']}, seed {content['seed']}; mean over {len(tasks)} target tasks",
    *(f"  {name:<{width}}  {value}" for name, value in rows),
  ]
  lines += [f"  not written: {name}: {why}" for name, why in failed.items()]
  return "\n".join(lines + ([f"  no file that adapts: {refused}"] if refused else []))


def plot_deploy(path: Path, content: Mapping[str, Any]) -> None:
  """Accuracy against latency at the first batch size, a point per task and a large one for their mean."""
  plt = pyplot()
  runtimes = list(content["mean"]["latency_us"])
  figure, axes = plt.subplots(1, max(1, len(runtimes)), figsize=(5 * max(1, len(runtimes)), 3.8), layout="constrained", squeeze=False)
  for axis, runtime in zip(axes[0], runtimes):
    for color, name in zip(("C0", "C1", "C2"), content["mean"]["latency_us"][runtime]):
      points = np.array(
        [
          (own["latency_us"][runtime][name], 100 * own["accuracy"][name])
          for own in content["tasks"].values()
          if name in own["latency_us"].get(runtime, {}) and name in own["accuracy"]
        ]
      )
      if len(points):
        axis.plot(*points.T, ".", color=color, alpha=0.35)
        axis.plot(*points.mean(0), "o", color=color, markersize=10, label={"int8": "compact, int8"}.get(name, name))
    low, high = axis.get_ylim()
    axis.set(
      title=f"{runtime}, one thread",
      xlabel=f"µs per batch of {content['options']['batches'][0]}",
      ylabel="accuracy of the task (%)",
      xlim=(0, 1.1 * axis.get_xlim()[1]),
      ylim=(low - 2, high + 2),
    )
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
  figure.suptitle(f"{content['run']}, {content['personalizer']}: a point per target task, large: their mean ({len(content['tasks'])} tasks)")
  figure.savefig(path, dpi=110)
  plt.close(figure)


# Fields by which recorded runs are told apart.
_KEY = ("run", "trained_by", "personalizer", "keep", "adapt_steps", "dense", "seed")


def merge(held: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Recorded means over tasks with those of one more run, in the place of older ones of the same kind and seed."""
  entry = {name: content.get(name) for name in _KEY} | {
    "tasks": len(content["tasks"]),
    "options": content["options"],
    "mean": content["mean"],
    "versions": content["versions"],
  }
  key = lambda one: [str(one.get(name)) for name in _KEY]
  return sorted([*(dict(other) for other in held if key(other) != key(entry)), entry], key=key)


def _kinds(entries):
  """Entries by what they are of, over seeds."""
  kinds: dict[tuple, list] = {}
  for entry in entries:
    kinds.setdefault(tuple(str(entry.get(name)) for name in _KEY[:-1]), []).append(entry)
  return sorted(kinds.values(), key=lambda own: (own[0]["run"], own[0]["personalizer"], -own[0]["mean"]["macs"]["compact"]))


def _over(own, get, scale=1.0, digits=1):
  values = [scale * get(entry["mean"]) for entry in own]
  return f"{np.mean(values):.{digits}f}" + ("" if len(values) < 2 else f" ± {spread(values):.{digits}f}")


def _what(own):
  first = own[0]
  steps = "" if first.get("adapt_steps") in (None, 1) else f", {first['adapt_steps']} steps"
  by = "" if first["trained_by"].startswith("metagater") and "dropout" not in first["trained_by"] else f" of {first['trained_by']}"
  dense = f"; dense: {first['dense']}" if first.get("dense") else ""
  return f"{first['run']}: {first['personalizer']}{by}, {first['keep'] or 'its own sparsity'}{steps}{dense}"


def files_table(entries: Sequence[Mapping[str, Any]]) -> str:
  """Accuracy, cost and latency of recorded runs, over seeds."""
  rows = []
  for own in _kinds(entries):
    ratio = lambda mean, runtime, name: mean["latency_us"][runtime]["dense"] / mean["latency_us"][runtime][name]
    times = lambda mean, runtime: mean["latency_us"][runtime]
    fewer = paired_difference(*({entry["seed"]: 100 * entry["mean"]["accuracy"][name] for entry in own} for name in ("compact", "dense")))
    rows.append(
      [
        f"{_what(own)} ({len(own)} seed{'s' if len(own) > 1 else ''} × {own[0]['tasks']} tasks)",
        " / ".join(_over(own, lambda mean, name=name: mean["accuracy"][name], 100) for name in ("dense", "compact", "int8")),
        f"{fewer.mean:+.1f}" + ("" if fewer.low is None else f" ({fewer.low:+.1f} to {fewer.high:+.1f})"),
        _over(own, lambda mean: mean["macs"]["compact"] / mean["macs"]["dense"], digits=2),
        " / ".join(f"{np.mean([times(entry['mean'], 'litert')[name] for entry in own]):.0f}" for name in ("dense", "compact", "int8")),
        _over(own, lambda mean: ratio(mean, "litert", "compact"), digits=2) + " ×",
        _over(own, lambda mean: ratio(mean, "onnxruntime", "compact"), digits=2) + " ×"
        if all("onnxruntime" in entry["mean"]["latency_us"] for entry in own)
        else "",
        " / ".join(
          f"{np.mean([entry['mean']['bytes_by_format']['tflite'][name] for entry in own]) / 1000:.0f}" for name in ("dense", "compact", "int8")
        ),
      ]
    )
  return table(
    [
      "run, channels that a task keeps",
      "accuracy (%): dense / compact / int8",
      "compact − dense (points; 95 % interval over seeds)",
      "MACs",
      "LiteRT, µs: dense / compact / int8",
      "compact is faster",
      "in ONNX Runtime",
      "KB, .tflite",
    ],
    rows,
  )


def adaptation_table(entries: Sequence[Mapping[str, Any]]) -> str:
  """What adapting in LiteRT costs, over seeds."""
  rows = []
  for own in _kinds(entries):
    for way, label in (("dense", "whole network"), ("restricted", "what the gate kept")):
      found = [entry["mean"]["adapt"][way] for entry in own if "ms" in ((entry["mean"].get("adapt") or {}).get(way) or {})]
      if found:
        mean = lambda name, found=found: float(np.mean([one[name] for one in found]))
        rows.append(
          [
            _what(own),
            label,
            f"{mean('samples'):.0f}",
            f"{mean('ms'):.1f}",
            f"{mean('peak_mb'):.0f}",
            f"{100 * mean('accuracy'):.1f}",
            f"{max(one['max_difference'] for one in found):.0e}",
            f"{mean('bytes') / 1000:.0f}",
          ]
        )
  return table(["run", "stage two on", "samples", "ms", "MB at the peak", "accuracy after (%)", "from JAX", "KB"], rows)

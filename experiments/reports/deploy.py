"""What a reader sees of deployed networks: a table and a figure, from their records."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reports.figures import pyplot

__all__ = ["deploy_table", "plot_deploy", "report_deploy"]


def report_deploy(workdir: str | Path) -> str:
  """Draws `deploy.png` beside the records of a run; the text for a terminal."""
  workdir = Path(workdir)
  content = json.loads((workdir / "deploy.json").read_text(encoding="utf-8"))
  plot_deploy(workdir / "deploy.png", content)
  return f"{deploy_table(content)}\nfigure: {workdir / 'deploy.png'}; files and their cards are in {workdir / 'deploy'}"


def deploy_table(content: Mapping[str, Any]) -> str:
  """The means over tasks, as lines for a terminal."""
  mean, tasks = content["mean"], content["tasks"]
  ratio = lambda pair: f"{pair['dense']:,.0f} dense, {pair['compact']:,.0f} compact ({pair['compact'] / pair['dense']:.2f})"
  rows = [("accuracy", ", ".join(f"{name} {100 * value:.1f} %" for name, value in mean["accuracy"].items())),
          ("multiply-accumulates per image", ratio(mean["macs"])), ("parameters", ratio(mean["parameters"])),
          *((f"bytes, .{form}", ", ".join(f"{name} {value:,.0f}" for name, value in sizes.items())) for form, sizes in mean["bytes"].items())]
  for key, times in mean.items():
    if key.startswith("latency_us"):
      batch = key.rpartition("_")[2] if "batch" in key else content["options"]["batches"][0]
      for runtime, values in times.items():
        speedup = f"; compact is {values['dense'] / values['compact']:.2f} × faster" if values.keys() >= {"dense", "compact"} else ""
        rows.append((f"µs, {runtime}, batch {batch}", ", ".join(f"{name} {value:,.0f}" for name, value in values.items()) + speedup))
  for way, own in (mean.get("adapt") or {}).items():
    if isinstance(own, Mapping) and own.get("ms"):
      rows.append((f"adapting on the device, {way}", f"{own['ms']:.1f} ms for {own['samples']:.0f} samples, {own['peak_mb']:.0f} MB at the peak, "
                   f"{own['max_difference']:.0e} from JAX"))
  failed = {name: why for own in tasks.values() for name, why in own["failed"].items()}
  refused = next((own["adapt"][way]["failed"] for own in tasks.values() for way in ("dense", "restricted")
                  if "failed" in own.get("adapt", {}).get(way, {})), None)
  width = max(len(name) for name, _ in rows)
  lines = [f"{content['run']}: {content['personalizer']}, seed {content['seed']}; mean over {len(tasks)} target tasks",
           *(f"  {name:<{width}}  {value}" for name, value in rows)]
  lines += [f"  not written: {name}: {why}" for name, why in failed.items()]
  return "\n".join(lines + ([f"  no file that adapts: {refused}"] if refused else []))


def plot_deploy(path: Path, content: Mapping[str, Any]) -> None:
  """Accuracy against latency at the first batch size, a point per task and a large one for their mean."""
  plt = pyplot()
  runtimes = list(content["mean"]["latency_us"])
  figure, axes = plt.subplots(1, max(1, len(runtimes)), figsize=(5 * max(1, len(runtimes)), 3.8), layout="constrained", squeeze=False)
  for axis, runtime in zip(axes[0], runtimes):
    for color, name in zip(("C0", "C1", "C2"), content["mean"]["latency_us"][runtime]):
      points = np.array([(own["latency_us"][runtime][name], 100 * own["accuracy"][name]) for own in content["tasks"].values()
                         if name in own["latency_us"].get(runtime, {}) and name in own["accuracy"]])
      if len(points):
        axis.plot(*points.T, ".", color=color, alpha=0.35)
        axis.plot(*points.mean(0), "o", color=color, markersize=10, label={"int8": "compact, int8"}.get(name, name))
    axis.set(title=f"{runtime}, one thread", xlabel=f"µs per batch of {content['options']['batches'][0]}", ylabel="accuracy of the task (%)", xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
  figure.suptitle(f"{content['run']}, {content['personalizer']}: large: mean over {len(content['tasks'])} target tasks")
  figure.savefig(path, dpi=110)
  plt.close(figure)

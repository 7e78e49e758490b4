"""`python -m experiments.summarize --runs=DIR`: the tables in README, from recorded runs.

Every folder below DIR that holds a result.json is a run; runs with the same name are seeds of one experiment. Their figures
go to results/runs.json, and README's tables between the `<!-- table: … -->` marks are written anew from results/. Without
--runs only README is written, from what is recorded.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments import reporting

__all__ = ["collect", "main", "write_readme"]

_ROOT = Path(__file__).resolve().parent.parent
_RUNS = flags.DEFINE_string("runs", None, "Folder of finished runs to record in results/runs.json.")

_FIELDS = ("accuracy", "accuracy_before_adaptation", "sparsity")


def collect(folder: Path) -> list[dict[str, Any]]:
  """The results of all runs below a folder, without figures per task, sorted by name and seed."""
  results = []
  for path in sorted(folder.rglob("result.json")):
    result = json.loads(path.read_text())
    for field in _FIELDS:
      if result.get(field):
        result[field].pop("per_task")
    results.append(result)
  if not results:
    raise SystemExit(f"experiments.summarize: there is no result.json below {folder}.")
  return sorted(results, key=lambda result: (result["name"], result["seed"]))


def write_readme(text: str, results: Path) -> str:
  """README with every table anew; a mark whose record is missing keeps its table."""
  tables = {"runs": (results / "runs.json", _runs_table), "sparsity": (results / "sparsity_curve.json", _sparsity_table),
            "benchmark": (results / "benchmark.json", _benchmark_table)}
  for name, (path, table) in tables.items():
    if path.is_file():
      new = f"<!-- table: {name} -->\n{table(json.loads(path.read_text()))}\n<!-- end -->"
      text = re.sub(rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, new=new: new, text, flags=re.DOTALL)
  return text


def _runs_table(runs):
  """One row per experiment: means over seeds, and the spread over seeds (accuracy) or over tasks (sparsity)."""
  lines = ["| experiment | seeds | before adaptation | after one step | sparsity of gated layers, ± over tasks | MACs | parameters "
           "| round | train + evaluate |", "|---|---|---|---|---|---|---|---|---|"]
  for name in dict.fromkeys(run["name"] for run in runs):
    group = [run for run in runs if run["name"] == name]
    mean = lambda get: float(np.mean([get(run) for run in group]))
    def percent(field):
      means = [100 * run[field]["mean"] for run in group]
      return f"{np.mean(means):.1f} % ± {np.std(means):.1f}"
    gated = group[0]["gated"]
    share = lambda key: f"{100 * mean(lambda r: r[key]['gated'] / r[key]['dense']):.0f} %" if gated else "100 %"
    sparsity = (f"{100 * mean(lambda r: r['sparsity']['mean']):.1f} % ± {100 * mean(lambda r: r['sparsity']['std']):.1f}"
                if gated else "no gates")
    lines.append(f"| {name} | {', '.join(str(run['seed']) for run in group)} | {percent('accuracy_before_adaptation')} | "
                 f"{percent('accuracy')} | {sparsity} | {share('macs')} | {share('parameters')} | "
                 f"{mean(lambda r: r['round_ms']):.1f} ms | {mean(lambda r: r['seconds']['train'] + r['seconds']['evaluate']):.0f} s |")
  return "\n".join(lines)


def _sparsity_table(curves):
  lines = ["| `target_sparsity` | sparsity reached, ± over tasks | accuracy, ± over seeds | MACs per image | parameters |",
           "|---|---|---|---|---|"]
  for points in zip(*curves):
    mean = lambda get: float(np.mean([get(point) for point in points]))
    accuracies = [100 * point["accuracy"]["mean"] for point in points]
    lines.append(f"| {points[0]['wanted']:.1f} | {100 * mean(lambda p: p['sparsity']['mean']):.1f} % ± "
                 f"{100 * mean(lambda p: p['sparsity']['std']):.1f} | {np.mean(accuracies):.1f} % ± {np.std(accuracies):.1f} | "
                 f"{mean(lambda p: p['macs']):,.0f} | {mean(lambda p: p['parameters']):,.0f} |")
  return "\n".join(lines)


def _benchmark_table(figures):
  machine = figures.pop("machine")
  rows = [f"| {name} | {value:.3g} |" if isinstance(value, float) else f"| {name} | {value} |"
          for name, value in figures.items()]
  return "\n".join([f"| {machine['backend']}, {machine['cores']} cores, jax {machine['jax']} | |", "|---|---|", *rows])


def main(_) -> None:
  """The command."""
  results = _ROOT / "results"
  if _RUNS.value:
    results.mkdir(exist_ok=True)
    reporting.write_json(results / "runs.json", collect(Path(_RUNS.value)))
  readme = _ROOT / "README.md"
  readme.write_text(write_readme(readme.read_text(), results))


if __name__ == "__main__":
  app.run(main)

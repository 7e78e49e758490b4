"""What is recorded in results/, and the pages that are made from it: README's table and those of docs/.

A page has tables between marks `<!-- table: NAME -->` and `<!-- end -->`; they are written anew from the records, and nothing else of a page is
touched.
"""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import ConfigError
from experiments.reports import anp, benchmarks, channel_pruning, deploy, fewshot, gates, knobs, paper, pruned_rounds, quickstart
from experiments.reports.markdown import table
from experiments.reports.run import curves_by
from experiments.runs.fewshot import SETTINGS
from experiments.runs.measures import spread
from experiments.runs.records import write_json

__all__ = ["TABLES", "record", "record_anp", "record_deploy", "record_fewshot", "record_gates", "write_page", "write_pages"]


def record(workdir: Path, results: Path) -> None:
  """Adds the report of a workdir to that in results/tables/, see `paper.merge`, and draws its figures there anew."""
  source = workdir / "report.json"
  if not source.is_file():
    raise ConfigError(f"there is no report.json in {workdir}; run experiments.tables first.")
  content = json.loads(source.read_text(encoding="utf-8"))
  folder = results / "tables"
  folder.mkdir(parents=True, exist_ok=True)
  if (folder / "report.json").is_file():
    content = paper.merge(json.loads((folder / "report.json").read_text(encoding="utf-8")), content)
  write_json(folder / "report.json", content)
  paper.render(content, folder)
  (folder / "report.html").unlink()  # its images are in it once more; it is written beside the runs
  with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["protocol", "method", "local_steps", "seed", *_FIELDS])
    writer.writerows(_runs(content))


_FIELDS = ("accuracy", "before_adaptation", "sparsity", "sparsity_std_over_tasks", "train_seconds", "learning_seconds")


def _runs(content):
  rows = {}
  for part in content["tables"].values():
    for row in part["rows"]:
      for seed in (row["accuracy"] or {"by_seed": {}})["by_seed"]:
        rows[row["protocol"], row["method"], row["local_steps"], int(seed)] = [
          row[field]["by_seed"].get(seed) if row[field] else None for field in _FIELDS
        ]
  return [[*key, *values] for key, values in sorted(rows.items())]


def record_anp(workdir: Path, results: Path) -> None:
  """Adds the report of the ANP tables of a workdir, as far as they are finished, to that in results/anp/; see `merge_reports`."""
  content = anp.make_report(workdir)
  if not content["cases"]:
    raise ConfigError(f"there are no records in {workdir}; run experiments.anp first.")
  held = results / "anp" / "anp.json"
  if held.is_file():
    content = anp.merge_reports(json.loads(held.read_text(encoding="utf-8")), content)
  anp.write_report(content, results / "anp")


def record_gates(workdir: Path, results: Path) -> None:
  """Adds what `experiments.tables --tables=gates` found in a workdir to results/gates/, by protocol and seed; see `gates.merge`."""
  if not (workdir / "gates.json").is_file():
    raise ConfigError(f"there is no gates.json in {workdir}; run experiments.tables --tables=gates first.")
  content, held = gates.read(workdir / "gates.json"), results / "gates" / "gates.json"
  if held.is_file():
    content = gates.merge(gates.read(held), content)
  held.parent.mkdir(parents=True, exist_ok=True)
  write_json(held, content)
  gates.plot(held.with_name("gates.png"), content)


def record_deploy(workdir: Path, results: Path) -> None:
  """Adds what `experiments.deploy` found in a run's folder to results/deploy.json; see `deploy.merge`."""
  source = workdir / "deploy.json"
  if not source.is_file():
    raise ConfigError(f"there is no deploy.json in {workdir}; run experiments.deploy first.")
  path = results / "deploy.json"
  held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
  write_json(path, deploy.merge(held, json.loads(source.read_text(encoding="utf-8"))))


def record_fewshot(workdir: Path, results: Path) -> None:
  """Adds the result of a run of experiments.fewshot to results/fewshot.json, with the accuracy of each test episode; a second one
  of the same settings takes the place of the first."""
  source = workdir / "result.json"
  if not source.is_file():
    raise ConfigError(f"there is no result.json in {workdir}; run experiments.fewshot first.")
  result = json.loads(source.read_text(encoding="utf-8"))
  fields = (*SETTINGS, "accuracy", "accuracy_before_adaptation", "sparsity", "parameters", "episodes_per_second", "seconds", "versions", "devices")
  if missing := [name for name in fields if name not in result]:
    raise ConfigError(f"{source} has no {', '.join(missing)}: it is of an earlier version. Run it again, or add what config.json beside it says.")
  entry = {name: result[name] for name in fields}
  entry["prune"] = result["prune"] if result["prune"]["sparsity"] else None
  entry["accuracies"] = np.loadtxt(workdir / "test_episodes.csv", delimiter=",", skiprows=1)[:, 1].round(4).tolist()
  entry = fewshot.complete([entry])[0]
  path = results / "fewshot.json"
  held = fewshot.complete(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []
  key = lambda entry: [str(entry[name]) for name in SETTINGS]
  entries = [other for other in held if key(other) != key(entry)] + [entry]
  text = json.dumps(sorted(entries, key=key), indent=1)
  path.write_text(re.sub(r"\[([^][{}]*)\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n", encoding="utf-8")  # a list of numbers in one line


# Name of a table in a page to the record that it is made from, below results/, and the function that makes it.
TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
  "protocols": ("tables/report.json", paper.protocol_table),
  **{
    f"table{number}": (
      "tables/report.json",
      lambda content, number=number: paper.table_markdown(content["tables"].get(number, {"rows": [], "kind": "training"})),
    )
    for number in (*"123456", "har", "har_adaptation")
  },
  "overview": ("tables/report.json", paper.overview),
  "claims": ("tables/report.json", paper.claims_table),
  "sparsity": ("sparsity_curve.json", lambda curves: _sparsity_table(curves)),
  "anchor": ("pfedme_anchor.json", lambda figures: _anchor_table(figures)),
  "bfloat16": ("bfloat16.json", lambda figures: _bfloat16_table(figures)),
  **{
    f"benchmark_{name}": (
      "devices.json" if name == "devices" else "benchmark.json",
      lambda figures, name=name: benchmarks.section_table(figures, name),
    )
    for name in benchmarks.SECTIONS
  },
  "machine": ("benchmark.json", benchmarks.machine),
  "machine_devices": ("devices.json", benchmarks.machine),
  "fewshot": ("fewshot.json", fewshot.runs_table),
  "fewshot_pairs": ("fewshot.json", fewshot.pairs_table),
  "gates": ("gates/gates.json", gates.accuracies),
  "gates_differences": ("gates/gates.json", gates.differences_table),
  "gates_behaviour": ("gates/gates.json", gates.behaviour),
  "gates_summary": ("gates/gates.json", gates.summary),
  "deploy": ("deploy.json", deploy.files_table),
  "deploy_adaptation": ("deploy.json", deploy.adaptation_table),
  "channel_pruning": ("channel_pruning/channel_pruning.json", channel_pruning.accuracy_table),
  "channel_pruning_device": ("channel_pruning/channel_pruning.json", channel_pruning.device_table),
  "knobs": ("knobs/knobs.json", knobs.ranges_table),
  "knob_values": ("knobs/knobs.json", knobs.values_table),
  "quickstart": ("quickstart.json", quickstart.seeds_table),
  "pruned_rounds": ("pruned_rounds.json", pruned_rounds.markdown),
  "anp": ("anp/anp.json", anp.overview),
  "anp_differences": ("anp/anp.json", anp.differences),
  "anp_claims": ("anp/anp.json", anp.claims),
}


def write_page(text: str, results: Path) -> str:
  """A page with every table anew; a mark whose record is missing keeps its table.

  Raises:
    ConfigError: a mark that no table has.
  """
  for name in re.findall(r"<!-- table: (\w+) -->", text):
    if name not in TABLES:
      raise ConfigError(f"a page has the mark 'table: {name}', which is none of {', '.join(TABLES)}.")
    file, make = TABLES[name]
    if (results / file).is_file():
      made = make(json.loads((results / file).read_text(encoding="utf-8")))
      new = f"<!-- table: {name} -->\n{made}\n<!-- end -->"
      text = re.sub(rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, new=new: new, text, flags=re.DOTALL)
  return text


def write_pages(root: Path) -> None:
  """README.md, all pages of docs/ and the reports beside the records, below a checkout's root, from its results/."""
  tables, scores = root / "results" / "tables", root / "results" / "anp"
  drawn = [figure.stem for figure in (tables / "figures").glob("*.png")]
  (tables / "report.md").write_text(paper.text(json.loads((tables / "report.json").read_text(encoding="utf-8")), drawn), encoding="utf-8")
  (scores / "anp.md").write_text(anp.markdown(json.loads((scores / "anp.json").read_text(encoding="utf-8"))), encoding="utf-8")
  for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
    page.write_text(write_page(page.read_text(encoding="utf-8"), root / "results"), encoding="utf-8")


def _anchor_table(figures):
  rows = []
  for name, label in (("fedavg", "FedAvg"), ("per_fedavg", "Per-FedAvg")):
    ours, theirs = 100 * np.array(figures[name]["ours"]), 100 * np.array(figures[name]["pytorch"])
    rows.append(
      [label, f"{ours.mean():.1f} ± {ours.std(ddof=1):.1f}", f"{theirs.mean():.1f} ± {theirs.std(ddof=1):.1f}", f"{ours.mean() - theirs.mean():+.2f}"]
    )
  return table(["MNIST, one step after meta-training", "ours (%)", "PyTorch loop (%)", "difference (points)"], rows)


def _sparsity_table(curves):
  rows = []
  for by, own in curves_by(curves).items():
    for points in zip(*own):
      mean = lambda get, points=points: float(np.mean([get(point) for point in points]))
      accuracies = [100 * point["accuracy"]["mean"] for point in points]
      rows.append(
        [
          f"{points[0]['wanted']:.1f}",
          f"`{by}`",
          f"{100 * mean(lambda p: p['sparsity']['mean']):.1f} % ± {100 * mean(lambda p: p['sparsity']['std'] or 0):.1f}",
          f"{np.mean(accuracies):.1f} % ± {spread(accuracies) or 0:.1f}",
          f"{100 * mean(lambda p: p['conditional']):.1f} %" if "conditional" in points[0] else "",
          f"{mean(lambda p: p['macs']):,.0f}",
          f"{mean(lambda p: p['parameters']):,.0f}",
        ]
      )
  return table(
    [
      "`target_sparsity`",
      "`sparsity_by`",
      "sparsity reached, ± over tasks",
      "accuracy, ± over seeds",
      "channels that vary",
      "MACs per image",
      "parameters",
    ],
    rows,
  )


def _bfloat16_table(figures):
  return table(
    ["compute", "accuracy of target tasks, by seed (%)", "mean (%)"],
    [[dtype, ", ".join(f"{100 * value:.1f}" for value in values), f"{100 * np.mean(values):.1f}"] for dtype, values in figures["accuracy"].items()],
  )

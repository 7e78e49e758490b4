"""`python -m experiments.summarize --tables=WORKDIR`: what is recorded in results/, and README's tables from it.

With --tables the report of `experiments.tables` in that workdir is recorded in results/tables/: its numbers (report.json, and
runs.csv with a row per run), its text and its figures. With --anp that of `experiments.tables --tables=anp` is, in results/anp/;
with --fewshot the result of a run of `experiments.fewshot`. README's tables between the `<!-- table: … -->` marks are then written
anew from results/; without these options only that is done.
"""

import argparse
import csv
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import anp_tables, fewshot, pruned_rounds, report
from experiments.config import ConfigError

__all__ = ["main", "record", "record_anp", "record_fewshot", "write_readme"]

_ROOT = Path(__file__).resolve().parent.parent


def record(workdir: Path, results: Path) -> None:
  """Copies the report of a workdir into results/tables/, and draws its figures there anew."""
  source = workdir / "report.json"
  if not source.is_file():
    raise SystemExit(f"experiments.summarize: there is no report.json in {workdir}; run experiments.tables first.")
  content = json.loads(source.read_text())
  folder = results / "tables"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "report.json").write_text(source.read_text())
  report.render(content, folder)
  (folder / "report.html").unlink()  # its images are in it once more; it is written beside the runs
  with (folder / "runs.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["protocol", "method", "local_steps", "seed", *_FIELDS])
    writer.writerows(_runs(content))


_FIELDS = ("accuracy", "before_adaptation", "sparsity", "sparsity_std_over_tasks", "train_seconds", "learning_seconds")


def _runs(content):
  rows = {}
  for table in content["tables"].values():
    for row in table["rows"]:
      for seed in (row["accuracy"] or {"by_seed": {}})["by_seed"]:
        rows[row["protocol"], row["method"], row["local_steps"], int(seed)] = [
            row[field]["by_seed"].get(seed) if row[field] else None for field in _FIELDS]
  return [[*key, *values] for key, values in sorted(rows.items())]


def record_anp(workdir: Path, results: Path) -> None:
  """Adds the report of the ANP tables of a workdir, as far as they are finished, to that in results/anp/; see `merge_reports`."""
  content = anp_tables.make_report(workdir)
  if not content["cases"]:
    raise SystemExit(f"experiments.summarize: there are no records in {workdir}; run experiments.tables --tables=anp first.")
  held = results / "anp" / "anp.json"
  if held.is_file():
    try:
      content = anp_tables.merge_reports(json.loads(held.read_text()), content)
    except ConfigError as error:
      raise SystemExit(f"experiments.summarize: {error}") from error
  anp_tables.write_report(content, results / "anp")


def record_fewshot(workdir: Path, results: Path) -> None:
  """Adds the result of a run of experiments.fewshot to results/fewshot.json, with the accuracy of each test episode; a second one
  of the same settings takes the place of the first."""
  source = workdir / "result.json"
  if not source.is_file():
    raise SystemExit(f"experiments.summarize: there is no result.json in {workdir}; run experiments.fewshot first.")
  result = json.loads(source.read_text())
  fields = (*fewshot.SETTINGS, "accuracy", "accuracy_before_adaptation", "sparsity", "parameters", "episodes_per_second", "seconds",
            "versions", "devices")
  if missing := [name for name in fields if name not in result]:
    raise SystemExit(f"experiments.summarize: {source} has no {', '.join(missing)}: it is of an earlier version. Run it again, or "
                     f"add what config.json beside it says.")
  entry = {name: result[name] for name in fields}
  entry["prune"] = result["prune"] if result["prune"]["sparsity"] else None
  entry["accuracies"] = np.loadtxt(workdir / "test_episodes.csv", delimiter=",", skiprows=1)[:, 1].round(4).tolist()
  path = results / "fewshot.json"
  held = json.loads(path.read_text()) if path.is_file() else []
  key = lambda entry: [str(entry[name]) for name in fewshot.SETTINGS]
  entries = [other for other in held if key(other) != key(entry)] + [entry]
  text = json.dumps(sorted(entries, key=key), indent=1)
  path.write_text(re.sub(r"\[([^][{}]*)\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n")  # a list of numbers in one line


def _fewshot_table(entries: list[dict[str, Any]]) -> str:
  lines = ["| benchmark | network, learner | inner steps, rate (in test) | training queries per class | steps | augmented | seed | pruned "
           "| before adaptation (%) | accuracy (%), ± 95 % interval over test episodes | meta-training |",
           "|---|" + "---|" * 10]
  share = lambda a: f"{100 * a['mean']:.1f} ± {100 * a['ci95']:.1f}"
  for e in entries:
    pruned = "no" if e["prune"] is None else _pruned(e)
    rate = f"{e['inner_lr']:g}{' at first, learned' if e['learn_rates'] else ''}"
    lines.append(f"| {e['name']}, {e['ways']}-way {e['shots']}-shot | {e['model']} ({'-'.join(map(str, e['widths']))}; "
                 f"{e['parameters']['all']:,} parameters), {e['learner']} | {e['inner_steps']}, {rate} ({e['test_inner_steps']}) | "
                 f"{e['train_queries']} | {e['steps']:,} | {'yes' if e['augment'] else 'no'} | {e['seed']} | {pruned} | "
                 f"{share(e['accuracy_before_adaptation'])} | "
                 f"{share(e['accuracy'])} ({e['accuracy']['episodes']:,}) | {e['seconds']['train'] / 60:.0f} min |")
  return "\n".join(lines)


def _fewshot_pairs_table(entries: list[dict[str, Any]]) -> str:
  """Runs that differ in settings of training only, episode by episode; those of different seeds are not compared."""
  lines = ["| benchmark, seed | run | compared with | difference (points), ± 95 % interval over test episodes |", "|---|---|---|---|"]
  tested = ("dataset", "alphabets", "ways", "shots", "queries", "seed")
  for a, b in itertools.combinations([e for e in entries if "accuracies" in e], 2):  # the oldest lack them
    if any(a[name] != b[name] for name in tested) or len(a["accuracies"]) != len(b["accuracies"]):
      continue
    differing = [name for name in fewshot.SETTINGS if a[name] != b[name]]
    a, b = sorted((a, b), key=lambda e: -e["accuracy"]["mean"])
    difference = fewshot.interval(100 * (np.array(a["accuracies"]) - np.array(b["accuracies"])))
    lines.append(f"| {a['name']}, {a['ways']}-way {a['shots']}-shot, {a['seed']} | {_told_apart(a, differing)} | "
                 f"{_told_apart(b, differing)} | {difference['mean']:+.1f} ± {difference['ci95']:.1f} ({difference['episodes']:,}) |")
  return "\n".join(lines)


def _told_apart(entry, differing):
  """A run's network and pruning, what else of it is not as in another, and how many of its parameters are left."""
  others = [f"{name} {entry[name]}" for name in differing if name not in ("model", "widths", "prune")]
  return ", ".join([f"{entry['model']} ({'-'.join(map(str, entry['widths']))})", _pruned(entry), *others,
                    f"{entry['parameters']['kept']:,} parameters kept"])


def _pruned(e):
  return "not pruned" if e["prune"] is None else (
      f"{100 * e['sparsity']:.0f} % by {e['prune']['score']}, steps {e['prune']['begin'] * e['steps']:,.0f} to "
      f"{e['prune']['end'] * e['steps']:,.0f}")


def write_readme(text: str, results: Path) -> str:
  """README with every table anew; a mark whose record is missing keeps its table."""
  tables = {"protocols": ("tables/report.json", report.protocol_table),
            "table1": ("tables/report.json", lambda content: report.table_markdown(content["tables"]["1"])),
            "table2": ("tables/report.json", lambda content: report.table_markdown(content["tables"]["2"])),
            "claims": ("tables/report.json", _claims_table), "sparsity": ("sparsity_curve.json", _sparsity_table),
            "anchor": ("pfedme_anchor.json", _anchor_table), "benchmark": ("benchmark.json", _benchmark_table),
            "bfloat16": ("bfloat16.json", _bfloat16_table), "fewshot": ("fewshot.json", _fewshot_table),
            "fewshot_pairs": ("fewshot.json", _fewshot_pairs_table),
            "pruned_rounds": ("pruned_rounds.json", pruned_rounds.markdown), "anp": ("anp/anp.json", anp_tables.overview),
            "anp_claims": ("anp/anp.json", anp_tables.claims)}
  for name, (file, table) in tables.items():
    path = results / file
    if f"<!-- table: {name} -->" in text and path.is_file():
      new = f"<!-- table: {name} -->\n{table(json.loads(path.read_text()))}\n<!-- end -->"
      text = re.sub(rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, new=new: new, text, flags=re.DOTALL)
  return text


def _claims_table(content: dict[str, Any]) -> str:
  lines = ["| Claim of the paper | in these runs | |", "|---|---|---|"]
  for claim in content["claims"]:
    lines.append(f"| {claim['claim']}: {claim['statement']} | {claim['verdict']} | {report.claim_summary(claim)} |")
  return "\n".join(lines)


def _anchor_table(figures: dict[str, Any]) -> str:
  lines = ["| MNIST, one step after meta-training | ours (%) | PyTorch loop (%) | difference (points) |", "|---|---|---|---|"]
  for name, label in (("fedavg", "FedAvg"), ("per_fedavg", "Per-FedAvg")):
    ours, theirs = 100 * np.array(figures[name]["ours"]), 100 * np.array(figures[name]["pytorch"])
    lines.append(f"| {label} | {ours.mean():.1f} ± {ours.std(ddof=1):.1f} | {theirs.mean():.1f} ± {theirs.std(ddof=1):.1f} | "
                 f"{ours.mean() - theirs.mean():+.2f} |")
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


# Sections of `python -m benchmarks` whose rows with a key README shows; all rows are in the record.
_SHOWN = ("rounds", "others", "bfloat16", "loading", "command", "populations", "cohorts", "memory", "table1", "lasso", "maml",
          "anp")


def _benchmark_table(figures: dict[str, Any]) -> str:
  facts, rows = figures["machine"], [row for row in figures["rows"] if row["section"] in _SHOWN and "key" in row]
  dates = sorted({row.get("date", facts["date"]) for row in rows} or {facts["date"]})  # sections may have been measured on different days
  lines = [f"| {facts['backend']}, {facts['cores']} cores, {facts['processor']}, jax {facts['jax']}, "
           f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))} | | compilation | |", "|---|---|---|---|"]
  for row in rows:
    note = (f"{row['gflop_per_second']:.0f} GFLOP/s, {100 * row['of_matrix_rate']:.0f} % of a matrix product's"
            if "of_matrix_rate" in row else "")
    compiled = f"{row['compile_seconds']:.1f} s" if "compile_seconds" in row else ""
    lines.append(f"| {row['what']} | {_figure(row['value'])} {row['unit']} | {compiled} | {note} |")
  return "\n".join(lines)


def _bfloat16_table(figures: dict[str, Any]) -> str:
  lines = ["| compute | accuracy of target tasks, by seed (%) | mean (%) |", "|---|---|---|"]
  for dtype, values in figures["accuracy"].items():
    lines.append(f"| {dtype} | {', '.join(f'{100 * value:.1f}' for value in values)} | {100 * np.mean(values):.1f} |")
  return "\n".join(lines)


def _figure(value):
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(prog="python -m experiments.summarize", description=__doc__.split("\n")[0])
  parser.add_argument("--tables", type=Path, help="workdir of experiments.tables whose report is to be recorded")
  parser.add_argument("--anp", type=Path, help="workdir of experiments.tables --tables=anp whose report is to be recorded")
  parser.add_argument("--fewshot", type=Path, help="workdir of experiments.fewshot whose result is to be recorded")
  options = parser.parse_args(arguments)
  results = _ROOT / "results"
  if options.tables:
    record(options.tables, results)
  if options.anp:
    record_anp(options.anp, results)
  if options.fewshot:
    record_fewshot(options.fewshot, results)
  readme = _ROOT / "README.md"
  readme.write_text(write_readme(readme.read_text(), results))


if __name__ == "__main__":
  main()

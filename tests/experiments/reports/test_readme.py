"""README's tables follow from the records, and from nothing else."""

import csv
import json

import numpy as np
import pytest

from experiments import fewshot, report, summarize
from experiments.studies.protocols import Row
from experiments.tables import config_of
from records import record


def test_a_report_is_recorded_and_readme_written_from_it(tmp_path):
  workdir, results = tmp_path / "work", tmp_path / "results"
  rows = [Row("cifar10", "fedavg"), Row("cifar10", "metagater")]
  for seed in (1, 2):
    record(workdir, rows[0], seed, 0.7 + 0.1 * seed)
    record(workdir, rows[1], seed, 0.75 + 0.1 * seed, [0.2, 0.4], {"conv3": [[1, 0], [0, 1]]})
  report.write(workdir, ["1"], (1, 2), {row: config_of(row) for row in rows})
  summarize.record(workdir, results)
  assert {path.name for path in (results / "tables").iterdir()} == {"report.json", "report.md", "runs.csv", "figures"}
  with (results / "tables" / "runs.csv").open() as file:
    table = list(csv.DictReader(file))
  assert [(r["method"], r["seed"]) for r in table] == [("fedavg", "1"), ("fedavg", "2"), ("metagater", "1"), ("metagater", "2")]
  assert float(table[1]["accuracy"]) == pytest.approx(0.9) and table[1]["sparsity"] == ""
  assert float(table[3]["sparsity"]) == pytest.approx(0.3)

  readme = "before\n<!-- table: table1 -->\nold\n<!-- end -->\nbetween\n<!-- table: anchor -->\nkept\n<!-- end -->\nafter\n"
  text = summarize.write_readme(readme, results)
  assert "| CIFAR-10 | FedAvg | 1 | 85.0 ± 7.1 |" in text
  assert "old" not in text and "kept" in text and text.startswith("before\n") and text.endswith("after\n")
  assert summarize.write_readme(text, results) == text


def test_the_table_of_a_benchmark(tmp_path):
  (tmp_path / "benchmark.json").write_text(json.dumps({
      "machine": {"backend": "cpu", "cores": 2, "processor": "X", "jax": "0.10", "date": "2026-01-02"}, "rows": [
          {"section": "rounds", "what": "a round", "value": 153.21, "unit": "ms", "key": "a", "compile_seconds": 4.44,
           "gflop_per_second": 158.0, "of_matrix_rate": 0.567},
          {"section": "rounds", "what": "without a key", "value": 1.0, "unit": "ms"},
          {"section": "cores", "what": "a detail", "value": 1.0, "unit": "ms", "key": "b"}]}))
  text = summarize.write_readme("<!-- table: benchmark -->\n<!-- end -->", tmp_path)
  assert "| cpu, 2 cores, X, jax 0.10, 2026-01-02 |" in text
  assert "| a round | 153 ms | 4.4 s | 158 GFLOP/s, 57 % of a matrix product's |" in text
  assert "without a key" not in text and "a detail" not in text


def test_few_shot_runs_are_recorded_once(tmp_path):
  result = dict.fromkeys(fewshot.SETTINGS) | {
            "name": "cifarfs_maml", "learner": "maml", "model": "conv4", "ways": 5, "shots": 1, "steps": 100,
            "train_queries": 5, "augment": False, "widths": [32] * 4, "inner_lr": 0.1, "inner_steps": 5, "learn_rates": False,
            "test_inner_steps": 10, "seed": 1, "accuracy": {"mean": 0.5, "ci95": 0.006, "episodes": 1000}, "sparsity": 0.85,
            "accuracy_before_adaptation": {"mean": 0.2, "ci95": 0.001, "episodes": 1000},
            "prune": {"score": "anp", "sparsity": 0.85, "begin": 0.5, "end": 0.75},
            "parameters": {"all": 29413, "kept": 4500}, "seconds": {"train": 600.0}, "episodes_per_second": 2.0, "versions": {},
            "devices": []}
  np.savetxt(tmp_path / "test_episodes.csv", np.full((3, 2), 0.5), delimiter=",", header="a,b", comments="")
  for seed, inner_steps, mean in ((1, 5, 0.4), (2, 5, 0.6), (1, 5, 0.5), (1, 2, 0.3)):  # the first is run again; the last is another
    result |= {"seed": seed, "inner_steps": inner_steps, "accuracy": result["accuracy"] | {"mean": mean}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    summarize.record_fewshot(tmp_path, tmp_path)
  text = summarize.write_readme("<!-- table: fewshot -->\n<!-- end -->", tmp_path)
  rows = [line for line in text.splitlines()
          if line.startswith("| cifarfs_maml, 5-way 1-shot | conv4 (32-32-32-32; 29,413 parameters), maml | 5, 0.1 (10) | 5 |")]
  assert len(rows) == 2 and "maml | 2, 0.1 (10) |" in text and "60.0" in rows[1]
  assert "| 85 % by anp, steps 50 to 75 | 20.0 ± 0.1 | 50.0 ± 0.6 (1,000) | 10 min |" in rows[0]


def test_few_shot_runs_are_compared_episode_by_episode(tmp_path):
  rng = np.random.default_rng(0)
  hard = rng.uniform(-0.3, 0.3, 400)  # what is hard about an episode is hard for every run, so pairs say more than means do
  runs = {"dense": (0.6 + hard, (64, 64), None, 1), "pruned": (0.58 + hard + rng.normal(0, 0.02, 400), (64, 64), "anp", 1),
          "other": (0.5 + hard, (64, 64), None, 2)}
  for name, (accuracy, widths, score, seed) in runs.items():
    folder = tmp_path / name
    folder.mkdir()
    result = dict.fromkeys(fewshot.SETTINGS) | {
        "name": "cifarfs_maml", "dataset": "cifarfs", "ways": 5, "shots": 1, "steps": 100, "seed": seed, "model": "conv4", "widths": widths,
        "accuracy": fewshot.interval(accuracy), "accuracy_before_adaptation": {}, "sparsity": 0.85, "versions": {}, "devices": [],
        "episodes_per_second": 2.0, "seconds": {}, "parameters": {"all": 9000, "kept": 1000 if score else 9000},
        "prune": {"score": score, "sparsity": 0.85 if score else 0.0, "begin": 0.25, "end": 0.5}}
    (folder / "result.json").write_text(json.dumps(result))
    np.savetxt(folder / "test_episodes.csv", np.stack([accuracy, accuracy], 1), delimiter=",", header="a,b", comments="")
    summarize.record_fewshot(folder, tmp_path)
  d = 100 * (runs["dense"][0] - runs["pruned"][0])
  text = summarize.write_readme("<!-- table: fewshot_pairs -->\n<!-- end -->", tmp_path)
  assert text.splitlines()[3:-1] == [
      "| cifarfs_maml, 5-way 1-shot, 1 | conv4 (64-64), not pruned, 9,000 parameters kept | conv4 (64-64), 85 % by anp, steps 25 to "
      f"50, 1,000 parameters kept | {d.mean():+.1f} ± {1.96 * d.std(ddof=1) / 20:.1f} (400) |"]


def test_a_folder_without_a_report(tmp_path):
  with pytest.raises(SystemExit, match="there is no result.json"):
    summarize.record_fewshot(tmp_path, tmp_path)
  (tmp_path / "result.json").write_text(json.dumps(dict.fromkeys(set(fewshot.SETTINGS) - {"outer_lr"})))
  with pytest.raises(SystemExit, match="has no outer_lr, accuracy"):
    summarize.record_fewshot(tmp_path, tmp_path)
  with pytest.raises(SystemExit, match="there is no report.json"):
    summarize.record(tmp_path, tmp_path)


def test_readme_is_what_the_records_say():
  root = summarize._ROOT
  text = (root / "README.md").read_text()
  assert summarize.write_readme(text, root / "results") == text

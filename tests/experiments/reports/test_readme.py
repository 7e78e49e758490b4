"""The tables of README and docs/ follow from the records, and from nothing else."""

import csv
import json

import numpy as np
import pytest
from records import record

from experiments import summarize
from experiments.config import ConfigError
from experiments.reports import paper, readme
from experiments.runs.fewshot import SETTINGS
from experiments.runs.measures import interval
from experiments.studies.paper import config_of
from experiments.studies.protocols import Row


def test_a_report_is_recorded_and_readme_written_from_it(tmp_path):
  workdir, results = tmp_path / "work", tmp_path / "results"
  rows = [Row("cifar10", "fedavg"), Row("cifar10", "metagater")]
  for seed in (1, 2):
    record(workdir, rows[0], seed, 0.7 + 0.1 * seed)
    record(workdir, rows[1], seed, 0.75 + 0.1 * seed, [0.2, 0.4], {"conv3": [[1, 0], [0, 1]]})
  paper.write(workdir, ["1"], (1, 2), {row: config_of(row) for row in rows})
  readme.record(workdir, results)
  assert {path.name for path in (results / "tables").iterdir()} == {"report.json", "report.md", "runs.csv", "figures"}
  with (results / "tables" / "runs.csv").open() as file:
    table = list(csv.DictReader(file))
  assert [(r["method"], r["seed"]) for r in table] == [("fedavg", "1"), ("fedavg", "2"), ("metagater", "1"), ("metagater", "2")]
  assert float(table[1]["accuracy"]) == pytest.approx(0.9) and table[1]["sparsity"] == ""
  assert float(table[3]["sparsity"]) == pytest.approx(0.3)

  page = "before\n<!-- table: table1 -->\nold\n<!-- end -->\nbetween\n<!-- table: anchor -->\nkept\n<!-- end -->\nafter\n"
  text = readme.write_page(page, results)
  assert "| CIFAR-10 | FedAvg | 1 | 85.0 ± 7.1 |" in text
  assert "old" not in text and "kept" in text and text.startswith("before\n") and text.endswith("after\n")
  assert readme.write_page(text, results) == text


def test_the_table_of_a_benchmark(tmp_path):
  (tmp_path / "benchmark.json").write_text(
    json.dumps(
      {
        "machine": {"backend": "cpu", "cores": 2, "processor": "X", "jax": "0.10", "date": "2026-01-02"},
        "rows": [
          {
            "section": "rounds",
            "what": "a round",
            "value": 153.21,
            "unit": "ms",
            "key": "a",
            "compile_seconds": 4.44,
            "gflop_per_second": 158.0,
            "of_matrix_rate": 0.567,
          },
          {"section": "rounds", "what": "without a key", "value": 1.0, "unit": "ms"},
          {"section": "cores", "what": "a detail", "value": 1.0, "unit": "ms", "key": "b"},
        ],
      }
    )
  )
  text = readme.write_page("<!-- table: machine -->\n<!-- end -->\n<!-- table: benchmark_rounds -->\n<!-- end -->", tmp_path)
  assert "\ncpu, 2 cores, X, jax 0.10, 2026-01-02\n" in text
  assert "| a round | 153 ms | 4.4 s | 158 GFLOP/s, 57 % of a matrix product's |" in text
  assert "without a key" not in text and "a detail" not in text


def test_few_shot_runs_are_recorded_once(tmp_path):
  result = dict.fromkeys(SETTINGS) | {
    "name": "cifarfs_maml",
    "learner": "maml",
    "model": "conv4",
    "ways": 5,
    "shots": 1,
    "steps": 100,
    "train_queries": 5,
    "augment": False,
    "widths": [32] * 4,
    "inner_lr": 0.1,
    "inner_steps": 5,
    "learn_rates": False,
    "test_inner_steps": 10,
    "seed": 1,
    "accuracy": {"mean": 0.5, "ci95": 0.006, "episodes": 1000},
    "sparsity": 0.85,
    "accuracy_before_adaptation": {"mean": 0.2, "ci95": 0.001, "episodes": 1000},
    "prune": {"score": "anp", "sparsity": 0.85, "begin": 0.5, "end": 0.75},
    "parameters": {"all": 29413, "kept": 4500},
    "seconds": {"train": 600.0},
    "episodes_per_second": 2.0,
    "versions": {},
    "devices": [],
  }
  np.savetxt(tmp_path / "test_episodes.csv", np.full((3, 2), 0.5), delimiter=",", header="a,b", comments="")
  for seed, inner_steps, mean in ((1, 5, 0.4), (2, 5, 0.6), (1, 5, 0.5), (1, 2, 0.3)):  # the first is run again; the last is another
    result |= {"seed": seed, "inner_steps": inner_steps, "accuracy": result["accuracy"] | {"mean": mean}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    readme.record_fewshot(tmp_path, tmp_path)
  text = readme.write_page("<!-- table: fewshot -->\n<!-- end -->", tmp_path)
  rows = [
    line
    for line in text.splitlines()
    if line.startswith("| cifarfs_maml, 5-way 1-shot | Conv-4 (32-32-32-32; 29,413 parameters), maml | 5 steps of 0.1; 10 in test | ")
  ]
  assert len(rows) == 2 and "maml | 2 steps of 0.1; 10 in test |" in text and "60.0" in rows[1]
  assert "| 100 steps, 5 queries, 10 min | 1 | 85 % by anp, steps 50 to 75 | 20.0 ± 0.1 | 50.0 ± 0.6 (1,000) |" in rows[0]


def test_few_shot_runs_are_compared_episode_by_episode(tmp_path):
  rng = np.random.default_rng(0)
  hard = rng.uniform(-0.3, 0.3, 400)  # what is hard about an episode is hard for every run, so pairs say more than means do
  runs = {
    "dense": (0.6 + hard, (64, 64), None, 1),
    "pruned": (0.58 + hard + rng.normal(0, 0.02, 400), (64, 64), "anp", 1),
    "other": (0.5 + hard, (64, 64), None, 2),
  }
  for name, (accuracy, widths, score, seed) in runs.items():
    folder = tmp_path / name
    folder.mkdir()
    result = dict.fromkeys(SETTINGS) | {
      "name": "cifarfs_maml",
      "dataset": "cifarfs",
      "ways": 5,
      "shots": 1,
      "steps": 100,
      "seed": seed,
      "model": "conv4",
      "widths": widths,
      "accuracy": interval(accuracy),
      "accuracy_before_adaptation": {},
      "sparsity": 0.85,
      "versions": {},
      "devices": [],
      "episodes_per_second": 2.0,
      "seconds": {},
      "parameters": {"all": 9000, "kept": 1000 if score else 9000},
      "prune": {"score": score, "sparsity": 0.85 if score else 0.0, "begin": 0.25, "end": 0.5},
    }
    (folder / "result.json").write_text(json.dumps(result))
    np.savetxt(folder / "test_episodes.csv", np.stack([accuracy, accuracy], 1), delimiter=",", header="a,b", comments="")
    readme.record_fewshot(folder, tmp_path)
  d = 100 * (runs["dense"][0] - runs["pruned"][0])
  text = readme.write_page("<!-- table: fewshot_pairs -->\n<!-- end -->", tmp_path)
  assert text.splitlines()[3:-1] == [
    "| cifarfs_maml, 5-way 1-shot, 1 | Conv-4 (64-64; 9,000 parameters), not pruned, 9,000 parameters kept | "
    "Conv-4 (64-64; 9,000 parameters), 85 % by anp, steps 25 to "
    f"50, 1,000 parameters kept | {d.mean():+.1f} ± {1.96 * d.std(ddof=1) / 20:.1f} (400) |"
  ]


def test_a_folder_without_a_report(tmp_path):
  with pytest.raises(ConfigError, match="there is no result.json"):
    readme.record_fewshot(tmp_path, tmp_path)
  (tmp_path / "result.json").write_text(json.dumps(dict.fromkeys(set(SETTINGS) - {"outer_lr"})))
  with pytest.raises(ConfigError, match="has no outer_lr, accuracy"):
    readme.record_fewshot(tmp_path, tmp_path)
  with pytest.raises(ConfigError, match="there is no report.json"):
    readme.record(tmp_path, tmp_path)


def test_pages_are_what_the_records_say():
  root = summarize._ROOT
  pages = [root / "README.md", *(root / "docs").rglob("*.md")]
  assert len(pages) > 3
  for page in pages:
    assert readme.write_page(page.read_text(), root / "results") == page.read_text(), page


def test_no_table_is_wider_than_eight_columns():
  root = summarize._ROOT
  for page in (root / "README.md", *(root / "docs").rglob("*.md"), *(root / "results").rglob("*.md")):
    widths = [line.count("|") - 1 for line in page.read_text().splitlines() if line.startswith("|--")]
    assert max(widths, default=0) <= 8, page


def test_a_mark_that_no_table_has():
  with pytest.raises(ConfigError, match="'table: tabel1', which is none of"):
    readme.write_page("<!-- table: tabel1 -->\n<!-- end -->", summarize._ROOT / "results")

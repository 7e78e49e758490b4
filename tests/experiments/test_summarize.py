"""README's tables follow from the records, and from nothing else."""

import json

import pytest

from experiments import summarize


def result(name, seed, accuracy, gated):
  spread = lambda mean: {"mean": mean, "std": 0.05, "per_task": [mean - 0.05, mean + 0.05]}
  return {"name": name, "seed": seed, "gated": gated, "accuracy": spread(accuracy),
          "accuracy_before_adaptation": spread(0.5), "sparsity": spread(0.3) if gated else None,
          "macs": {"dense": 100, "gated": 80.0 if gated else None},
          "parameters": {"dense": 200, "gated": 150.0 if gated else None}, "round_ms": 12.5,
          "seconds": {"load": 1.0, "compile": 2.0, "train": 3.0, "evaluate": 4.0, "total": 11.0}}


def test_tables_are_written_from_recorded_runs(tmp_path):
  for i, run in enumerate([result("cifar10", 2, 0.9, True), result("cifar10", 1, 0.8, True), result("mnist", 1, 0.97, False)]):
    (tmp_path / "runs" / str(i)).mkdir(parents=True)
    (tmp_path / "runs" / str(i) / "result.json").write_text(json.dumps(run))
  records = summarize.collect(tmp_path / "runs")
  assert [(r["name"], r["seed"]) for r in records] == [("cifar10", 1), ("cifar10", 2), ("mnist", 1)]
  assert "per_task" not in records[0]["accuracy"]
  (tmp_path / "runs.json").write_text(json.dumps(records))
  readme = "before\n<!-- table: runs -->\nold\n<!-- end -->\nbetween\n<!-- table: sparsity -->\nkept\n<!-- end -->\nafter\n"
  text = summarize.write_readme(readme, tmp_path)
  assert "| cifar10 | 1, 2 | 50.0 % ± 0.0 | 85.0 % ± 5.0 | 30.0 % ± 5.0 | 80 % | 75 % | 12.5 ms | 7 s |" in text
  assert "| mnist | 1 | 50.0 % ± 0.0 | 97.0 % ± 0.0 | no gates | 100 % | 100 % |" in text
  assert "old" not in text and "kept" in text and text.startswith("before\n") and text.endswith("after\n")
  assert summarize.write_readme(text, tmp_path) == text


def test_a_folder_without_runs(tmp_path):
  with pytest.raises(SystemExit, match="no result.json below"):
    summarize.collect(tmp_path)


def test_readme_is_what_the_records_say():
  root = summarize._ROOT
  text = (root / "README.md").read_text()
  assert summarize.write_readme(text, root / "results") == text

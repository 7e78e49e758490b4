"""The command as a user runs it, and what it says to bad input before any long work."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import call

import metagater_jax as mg
from configs import digits
from experiments.config.federated import check_config
from experiments.config.registry import make_network
from experiments.reports.run import report_run
from experiments.run import main
from experiments.runs.records import load_model
from experiments.studies.sparsity_curve import curve_of_run
from metagater_jax.data.datasets import load_dataset

ROOT = Path(__file__).resolve().parents[2]


SHORT = ["--config.rounds=6", "--config.eval_every=3", "--config.rounds_per_dispatch=2"]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
  """The default command twice with one seed: in a process of its own, which compiles its programs itself, and in this one. The first can
  print ASCII only, and has a Matplotlib backend that is none."""
  folders = [tmp_path_factory.mktemp("run") / "work" for _ in range(2)]
  process = subprocess.run(
    [sys.executable, "-m", "experiments.run", f"--workdir={folders[0]}", "--config.seed=3", *SHORT],
    cwd=ROOT,
    text=True,
    capture_output=True,
    timeout=300,
    env={
      **os.environ,
      "JAX_ENABLE_COMPILATION_CACHE": "false",
      "LC_ALL": "C",
      "PYTHONUTF8": "0",
      "PYTHONCOERCECLOCALE": "0",
      "MPLBACKEND": "nonsense",
    },
  )
  return folders, [process, call(main, f"--workdir={folders[1]}", "--config.seed=3", *SHORT)]


def test_the_command_writes_everything(two_runs):
  (folder, _), (process, other) = two_runs
  assert process.returncode == 0, process.stderr
  assert other.status == 0, other.err
  assert {path.name for path in folder.iterdir()} == {
    "config.json",
    "partition.json",
    "metrics.jsonl",
    "metrics.csv",
    "accuracy.png",
    "tasks.png",
    "gates.png",
    "meta_model.npz",
    "result.json",
  }
  for text in (
    "accuracy before adaptation",
    "accuracy after adaptation",
    "sparsity",
    "multiply-accumulates",
    "parameters",
    str(folder / "accuracy.png"),
    str(folder / "tasks.png"),
    str(folder / "gates.png"),
  ):
    assert text in process.stdout
  assert "round 6/6, loss=" in process.stderr and "accuracy=" in process.stderr and "left" in process.stderr
  assert "Warning" not in process.stderr and "W0000" not in process.stderr, process.stderr

  result = json.loads((folder / "result.json").read_text())
  assert {
    "name",
    "algorithm",
    "gated",
    "seed",
    "rounds",
    "accuracy",
    "accuracy_before_adaptation",
    "sparsity",
    "macs",
    "parameters",
    "round_ms",
    "seconds",
    "versions",
  } <= set(result)
  assert (result["name"], result["algorithm"], result["gated"], result["seed"], result["rounds"]) == ("digits", "metagater", True, 3, 6)
  for key in ("accuracy", "accuracy_before_adaptation", "sparsity"):
    values = result[key]["per_task"]
    assert len(values) == 5
    np.testing.assert_allclose((result[key]["mean"], result[key]["std"]), (np.mean(values), np.std(values, ddof=1)), rtol=1e-6)
  assert result["macs"]["gated"] < result["macs"]["dense"] and result["parameters"]["gated"] < result["parameters"]["dense"]
  assert set(result["seconds"]) == {"load", "compile", "train", "evaluate", "total"}
  assert sum(v for k, v in result["seconds"].items() if k != "total") <= result["seconds"]["total"]

  config = json.loads((folder / "config.json").read_text())
  assert config["beta"] == pytest.approx(0.02) and config["seed"] == 3
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  with (folder / "metrics.csv").open() as file:
    table = list(csv.DictReader(file))
  assert [row["round"] for row in rows] == [3, 6] == [int(row["round"]) for row in table]
  assert rows[-1]["accuracy_mean"] == pytest.approx(result["accuracy"]["mean"])


def test_one_seed_gives_one_result(two_runs):
  results = [json.loads((folder / "result.json").read_text()) for folder in two_runs[0]]
  for result in results:
    for key in ("round_ms", "learning_seconds", "seconds", "versions"):
      result.pop(key)
  gates = [result.pop("gates") for result in results]  # has correlations and sums over images, which a program may add in another order
  assert results[0] == results[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *gates)


def test_the_saved_partition_and_model_are_those_of_the_result(two_runs):
  folder = two_runs[0][0]
  result = json.loads((folder / "result.json").read_text())
  saved = json.loads((folder / "partition.json").read_text())
  data = load_dataset("digits")
  population = mg.make_population(data.images, data.labels, mg.data.Partition.from_json(saved["tasks"]))
  model, scalars = load_model(folder)
  network = make_network(check_config(digits.get_config()), 10)
  for i, task in enumerate(saved["target_tasks"]):
    metrics = mg.evaluate_task(network, model, population.test(task))
    assert float(metrics.accuracy) == pytest.approx(result["accuracy_before_adaptation"]["per_task"][i], abs=1e-6)
  assert result["gate_threshold"] is None and "threshold" not in scalars  # the gradient step alone decides


def test_a_finished_run_is_not_overwritten(two_runs):
  folder = two_runs[0][0]
  before = (folder / "result.json").read_bytes()
  outcome = call(main, f"--workdir={folder}", *SHORT)
  assert outcome.status == 2 and "already holds another run (result.json)" in outcome.err
  assert (folder / "result.json").read_bytes() == before


def test_the_knob_on_a_finished_run(two_runs):
  points = curve_of_run(two_runs[0][0], [0.0, 0.4, 0.8])
  reached = [point["sparsity"]["mean"] for point in points]
  # Targets are other tasks than those that the threshold was calibrated on, and the model is hardly trained.
  assert reached[0] < reached[1] < reached[2] and abs(reached[1] - 0.4) < 0.15 and abs(reached[2] - 0.8) < 0.15
  assert points[2]["macs"] < points[1]["macs"] < points[0]["macs"]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config=configs/digitz.py"], "no config file 'configs/digitz.py'. Did you mean configs/digits.py?"),
    (["--config.cohrt=5"], "unknown field 'cohrt'. Did you mean 'cohort'?"),
    (["--config.dataset=mnits"], "unknown dataset 'mnits'; did you mean mnist"),
    (["--config.dataset=mnist", "--config.data_dir=tests"], "'mnist' is not in the data directory tests"),
    (["--config.prune.scroe=anp"], "unknown field 'prune.scroe'. Did you mean 'prune.score'?"),
    (["--config.prune.score=anp", "--config.prune.sparsity=1.0"], "prune.sparsity must lie in [0, 1), got 1.0"),
    (["--config=configs/cifarfs_maml.py"], "is not for experiments.run"),
    (["--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir"),
    (["configs/mnist.py"], "unexpected argument 'configs/mnist.py'"),
    (["--config.seed=18446744073709551616"], "seed must lie in"),
    (["--config.name=a/b"], "name must be the plain name of a folder"),
    (["--config.beta=abc"], "could not convert string to float: 'abc'"),
  ],
)
def test_bad_input_ends_the_command_with_one_clear_line(arguments, message, tmp_path):
  outcome = call(main, f"--workdir={tmp_path / 'w'}", *arguments)
  assert outcome.status == 2 and outcome.out == ""
  assert outcome.err.startswith("experiments.run: ") and message in outcome.err
  assert not (tmp_path / "w").exists()


def test_a_name_makes_no_folder_elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  outcome = call(main, "--config.name=../up")
  assert outcome.status == 2 and "plain name of a folder" in outcome.err and list(tmp_path.iterdir()) == []


def test_an_interruption_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setattr("experiments.run.run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  outcome = call(main, f"--workdir={tmp_path / 'w'}")
  assert outcome.status == 130 and "interrupted" in outcome.err and "Traceback" not in outcome.err


def test_a_figure_that_cannot_be_drawn_ends_no_run(two_runs, monkeypatch):
  monkeypatch.setattr("experiments.reports.run.plot_tasks", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
  text = report_run(two_runs[0][0])
  assert "accuracy after adaptation" in text and "a figure could not be drawn (OSError: [Errno 28] No space left" in text

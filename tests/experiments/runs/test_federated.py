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

import metagater_jax as mg
from configs import cifar10, cifar10_moderate, cifar10_small, cifar100, digits, mnist
from experiments.config import ConfigError
from experiments.config.federated import check_config
from experiments.config.registry import make_network
from experiments.run import main, run
from experiments.runs.records import DivergedError, Progress, load_model, load_parameters
from experiments.runs.programs import Clock
from experiments.studies.sparsity_curve import curve_of_run
from metagater_jax.data.datasets import Dataset, load_dataset
from commands import call

ROOT = Path(__file__).resolve().parents[3]
SHORT = ["--config.rounds=6", "--config.eval_every=3", "--config.rounds_per_dispatch=2"]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
  """The default command twice with one seed: in a process of its own, which compiles its programs itself, and in this one."""
  folders = [tmp_path_factory.mktemp("run") / "work" for _ in range(2)]
  process = subprocess.run([sys.executable, "-m", "experiments.run", f"--workdir={folders[0]}", "--config.seed=3", *SHORT], cwd=ROOT, text=True,
                           capture_output=True, timeout=300, env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"})
  return folders, [process, call(main, f"--workdir={folders[1]}", "--config.seed=3", *SHORT)]


def test_the_command_writes_everything(two_runs):
  (folder, _), (process, other) = two_runs
  assert process.returncode == 0, process.stderr
  assert other.status == 0, other.err
  assert {path.name for path in folder.iterdir()} == {
      "config.json", "partition.json", "metrics.jsonl", "metrics.csv", "accuracy.png", "tasks.png", "meta_model.npz",
      "result.json"}
  for text in ("accuracy before adaptation", "accuracy after adaptation", "sparsity", "multiply-accumulates", "parameters",
               str(folder / "accuracy.png"), str(folder / "tasks.png")):
    assert text in process.stdout
  assert "round 6/6, loss=" in process.stderr and "accuracy=" in process.stderr and "left" in process.stderr
  assert "Warning" not in process.stderr and "W0000" not in process.stderr, process.stderr

  result = json.loads((folder / "result.json").read_text())
  assert {"name", "algorithm", "gated", "seed", "rounds", "accuracy", "accuracy_before_adaptation", "sparsity", "macs",
          "parameters", "round_ms", "seconds", "versions"} <= set(result)
  assert (result["name"], result["algorithm"], result["gated"], result["seed"], result["rounds"]) == (
      "digits", "metagater", True, 3, 6)
  for key in ("accuracy", "accuracy_before_adaptation", "sparsity"):
    values = result[key]["per_task"]
    assert len(values) == 5
    np.testing.assert_allclose((result[key]["mean"], result[key]["std"]), (np.mean(values), np.std(values)), rtol=1e-6)
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


def test_rate_and_time_left_are_without_compilation(monkeypatch, capsys):
  now = [1000.0]
  monkeypatch.setattr("tqdm.std.time", lambda: now[0])
  clock = Clock("compile")
  clock.seconds["compile"] = 5.0  # before the first step
  progress = Progress(100, False, "step", clock)
  for seconds, compiled in ((30, 20), (10, 0)):  # ten for 40 steps each, beside compilation
    now[0] += seconds
    clock.seconds["compile"] += compiled
    progress.advance(40, True)
  progress.close()
  first, second = capsys.readouterr().err.splitlines()
  assert "step 40/100 |  4.00 steps/s | 00:15 left" in first
  assert "step 80/100 |  4.00 steps/s | 00:05 left" in second


def test_one_seed_gives_one_result(two_runs):
  results = [json.loads((folder / "result.json").read_text()) for folder in two_runs[0]]
  for result in results:
    for key in ("round_ms", "learning_seconds", "seconds", "versions"):
      result.pop(key)
  assert results[0] == results[1]


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
  assert float(scalars["threshold"]) == pytest.approx(result["gate_threshold"])


def test_a_finished_run_is_not_overwritten(two_runs):
  folder = two_runs[0][0]
  before = (folder / "result.json").read_bytes()
  outcome = call(main, f"--workdir={folder}", *SHORT)
  assert outcome.status == 2 and "already holds another run (config.json, metrics.jsonl, result.json)" in outcome.err
  assert (folder / "result.json").read_bytes() == before


def test_the_knob_on_a_finished_run(two_runs):
  points = curve_of_run(two_runs[0][0], [0.0, 0.4, 0.8])
  reached = [point["sparsity"]["mean"] for point in points]
  # Targets are other tasks than those that the threshold was calibrated on, and the model is hardly trained.
  assert reached[0] < reached[1] < reached[2] and abs(reached[1] - 0.4) < 0.15 and abs(reached[2] - 0.8) < 0.15
  assert points[2]["macs"] < points[1]["macs"] < points[0]["macs"]


def test_pruning_in_the_rounds(tmp_path):
  config = digits.get_config()
  config.update(rounds=6, eval_every=3, widths=(4, 6, 8), algorithm="fedavg")
  config.prune.update(score="anp", sparsity=0.8, every=1)
  result = run(config, tmp_path / "run", quiet=True)
  assert result["pruned"] == pytest.approx(0.8, abs=0.005)
  params, _ = load_parameters(tmp_path / "run" / "meta_model.npz")
  leaves = jax.tree.leaves(params["backbone"])
  kernels = [leaf for leaf in leaves if leaf.ndim == 4]  # the convolutions'; the last layer stays
  assert (params["backbone"]["output"]["kernel"] != 0).all()
  zeros = sum((kernel == 0).sum() for kernel in kernels)
  assert zeros == pytest.approx(0.8 * sum(kernel.size for kernel in kernels), rel=0.01)
  assert result["parameters_kept"] == sum(leaf.size for leaf in leaves) - zeros
  assert 0.9 * result["parameters_kept"] < result["parameters_effective"] <= result["parameters_kept"]
  places = {"conv1": 8 * 8, "conv2": 4 * 4, "conv3": 2 * 2, "output": 1}  # per image, at which a kernel is applied
  macs = sum(count * (params["backbone"][name]["kernel"] != 0).sum() for name, count in places.items())
  assert 0.9 * macs < result["macs"]["effective"] <= macs
  mask = load_model(tmp_path / "run")[0].mask["backbone"]
  jax.tree.map(lambda w, c: np.testing.assert_array_equal(w != 0, c == 1), {n: params["backbone"][n]["kernel"] for n in places},
               {n: mask[n]["kernel"] for n in places})
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert rows[0]["pruned"] < rows[1]["pruned"] == result["pruned"]
  assert result["accuracy"]["mean"] > result["accuracy_before_adaptation"]["mean"]


@pytest.mark.parametrize("arguments, message", [
    (["--config=configs/digitz.py"], "no config file 'configs/digitz.py'. Did you mean configs/digits.py?"),
    (["--config.cohrt=5"], "unknown field 'cohrt'. Did you mean 'cohort'?"),
    (["--config.dataset=mnits"], "unknown dataset 'mnits'; did you mean mnist"),
    (["--config.dataset=mnist", "--config.data_dir=tests"], "'mnist' is not in the data directory tests"),
    (["--config.prune.scroe=anp"], "unknown field 'prune.scroe'. Did you mean 'prune.score'?"),
    (["--config.prune.score=anp", "--config.prune.sparsity=1.0"], "prune.sparsity must lie in [0, 1), got 1.0"),
    (["--config=configs/cifarfs_maml.py"], "is not for experiments.run"),
    (["--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir"),
    (["configs/mnist.py"], "unexpected argument 'configs/mnist.py'"),
    (["--config.beta=abc"], "could not convert string to float: 'abc'"),
])
def test_bad_input_ends_the_command_with_one_clear_line(arguments, message, tmp_path):
  outcome = call(main, f"--workdir={tmp_path / 'w'}", *arguments)
  assert outcome.status == 2 and outcome.out == ""
  assert outcome.err.startswith("experiments.run: ") and message in outcome.err
  assert not (tmp_path / "w").exists()


def test_checking_a_config_leaves_it_as_it_was():
  config = digits.get_config()
  before = config.to_dict()
  assert check_config(config).local_lr == 0.1 and config.to_dict() == before


@pytest.mark.parametrize("change, message", [
    (dict(cohort=16), "cohort is 16, but there are 15 training tasks"),
    (dict(labels_per_task=11), "labels_per_task is 11, but digits has 10 classes"),
    (dict(size_range=(100, 300)), r"cannot fill size_range=\(100, 300\)"),
    (dict(size_range=(9, 3)), "1 <= smallest <= largest"),
    (dict(local_lr=0.0), "local_lr must be positive, got 0.0"),
    (dict(adapt_lr=-1.0), "adapt_lr must be positive, got -1.0"),
    (dict(prox_weight=0.0), "prox_weight must be positive"),
    (dict(beta=-0.1), "beta must be positive, got -0.1"),
    (dict(penalty_weight=-1.0), "penalty_weight must not be negative"),
    (dict(rounds=0), "rounds must be at least 1"),
    (dict(target_sparsity=1.0), r"target_sparsity must lie in \[0, 1\), got 1.0"),
    (dict(target_tasks=20), "at least one must be left for meta-training"),
    (dict(gated_layers=("conv9",)), "'conv9' does not exist; the layers of ConvNet4 are conv1, conv2, conv3, output"),
    (dict(gated=True, gated_layers=()), "gated_layers is empty"),
    (dict(model="conv5"), "unknown model 'conv5'. Did you mean 'conv"),
    (dict(algorithm="metagator"), "unknown algorithm 'metagator'. Did you mean 'metagater'. Known: fedavg, fedprox, metagater, "
     "per_fedavg, pfedme, reptile"),
    (dict(derivative="second_order"), "Did you mean 'first_order'"),
    (dict(personalizer="two_stag"), "unknown personalizer 'two_stag'. Did you mean 'two_stage'"),
    (dict(personalizer="two_stage", gated=False), "adapts gates, but this model has none; use fine_tune or metasnip_weight"),
    (dict(algorithm="fedavg", personalizer="two_stage"), "adapts gates, but this model has none"),
    (dict(personalizer="metasnip_weight", target_sparsity=None), "prunes to target_sparsity, which is None"),
    (dict(meta_model="tests"), "meta_model is tests, which holds no finished run"),
    (dict(tuned="mnits"), "unknown tuned 'mnits'. Did you mean 'mnist'"),
    (dict(validation_tasks=15), "validation_tasks 15, but there are 20 tasks"),
    (dict(server_lr=0.0), "server_lr must be positive, got 0.0"),
    (dict(penalty="group_laso"), "Did you mean 'group_lasso'"),
    (dict(gamma="nestrov"), "Did you mean 'nesterov'"),
    (dict(widths=(16, 0, 3)), "widths must be positive"),
    (dict(test_fraction=0.0), "test_fraction must lie between 0 and 1"),
])
def test_bad_fields_are_named_before_anything_is_written(change, message, tmp_path):
  config = digits.get_config()
  for field, value in change.items():
    config[field] = value
  with pytest.raises(ConfigError, match=message):
    run(config, tmp_path / "w", quiet=True)
  assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("images, labels, message", [
    (np.zeros((40, 8, 8), np.uint8), np.arange(40) % 2, "expects images .batch, height, width, channels."),
    (np.zeros((40, 4, 4, 1), np.uint8), np.arange(40) % 2, "too small for this network"),
    (np.zeros((40, 8, 8, 1), np.uint8), np.arange(39) % 2, "40 images but 39 labels"),
    (np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 3, "labels must lie in 0 … 1, but range from 0 to 2"),
])
def test_own_data_that_does_not_fit(images, labels, message, tmp_path):
  with pytest.raises(ConfigError, match=message):
    run(digits.get_config(), tmp_path / "w", Dataset("mine", images, labels, 2), quiet=True)


def test_a_run_is_a_function_on_own_data(tmp_path):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 600)
  images = np.clip(rng.normal(60 * labels[:, None, None, None], 10, (600, 8, 8, 1)), 0, 255).astype(np.uint8)
  config = digits.get_config()
  config.update(model="mlp", widths=(8,), gated=False, tasks=8, target_tasks=2, cohort=3, size_range=(20, 60), rounds=5,
                eval_every=5)
  result = run(config, tmp_path / "w", Dataset("brightness", images, labels, 4), quiet=True)
  assert result["sparsity"] is None and result["macs"] == {"dense": 64 * 8 + 8 * 4, "gated": None, "effective": None}
  assert (tmp_path / "w" / "tasks.png").stat().st_size > 5000


def test_divergence_is_reported_with_what_to_lower_and_metrics_kept(tmp_path):
  config = digits.get_config()
  config.update(local_lr=1e30, rounds=40, eval_every=1, rounds_per_dispatch=1, gated=False)
  with pytest.raises(DivergedError, match="diverged. Lower beta .now 0.02., local_lr .now 1e.30., or set gamma=plain"):
    run(config, tmp_path / "w", quiet=True)
  assert (tmp_path / "w" / "metrics.jsonl").exists()


@pytest.mark.parametrize("config, tasks, labels, layers, rounds", [
    (mnist, 20, 2, (), 200), (cifar10, 100, 2, ("conv3",), 100), (cifar10_moderate, 100, 2, ("conv5", "conv6"), 30),
    (cifar10_small, 100, 2, ("conv5", "conv6"), 40), (cifar100, 100, 5, ("conv5", "conv6"), 40)])
def test_configs_are_the_papers_protocols(config, tasks, labels, layers, rounds):
  config = check_config(config.get_config())
  assert (config.tasks, config.labels_per_task, config.rounds, config.local_steps, config.batch_size) == (
      tasks, labels, rounds, 1, 20)
  assert (config.gated_layers if config.gated else ()) == layers
  assert config.data_dir is None
  network = make_network(config, 100 if config.dataset == "cifar100" else 10)
  shapes = jax.eval_shape(lambda key: network.init(key, (28, 28, 1) if config.dataset == "mnist" else (32, 32, 3)),
                          jax.random.key(0))
  assert set(shapes["gate"]) == set(layers)


def test_any_personalizer_follows_any_algorithm(tmp_path):
  """FedAvg, then MetaSNIP: trained once, and then from the model that is there, at the sparsity that a gate reached on each task."""
  config = digits.get_config()
  config.update(rounds=4, eval_every=4, widths=(4, 6, 8), algorithm="fedavg", personalizer="metasnip_weight", target_sparsity=0.4)
  pruned = run(config, tmp_path / "snip", quiet=True)
  np.testing.assert_allclose(pruned["sparsity"]["per_task"], 0.4, atol=2e-3)
  config.update(algorithm="metagater", gated=True, personalizer="two_stage")
  gated = run(config, tmp_path / "gated", quiet=True)
  config.update(gated=False, algorithm="fedavg", personalizer="metasnip_channel", meta_model=str(tmp_path / "snip"),
                sparsity_of=str(tmp_path / "gated"))
  given = run(config, tmp_path / "given", quiet=True)
  assert given["accuracy_before_adaptation"] == pruned["accuracy_before_adaptation"] and given["round_ms"] is None
  np.testing.assert_allclose(given["sparsity"]["per_task"], gated["sparsity"]["per_task"], atol=0.5 / 8 + 1e-6)
  before, after = (load_model(tmp_path / name)[0].params for name in ("snip", "given"))
  jax.tree.map(np.testing.assert_array_equal, before, after)  # no training
  config.update(gated=True, personalizer="two_stage")
  with pytest.raises(ConfigError, match="is of another network: gate/conv3/W1 is None there and"):
    run(config, tmp_path / "other", quiet=True)
  config.update(gated=False, personalizer="metasnip_channel", target_tasks=4)
  with pytest.raises(ConfigError, match="has no sparsity of 4 target tasks"):
    run(config, tmp_path / "other", quiet=True)
  assert not (tmp_path / "other").exists()


def test_a_pruned_models_targets_adapt_in_two_stages(tmp_path):
  config = digits.get_config()
  config.update(rounds=4, eval_every=4, widths=(4, 6, 8))
  config.prune.update(score="anp", sparsity=0.5, every=1)
  result = run(config, tmp_path / "run", quiet=True)
  assert result["personalizer"] == "two_stage" and result["pruned"] == pytest.approx(0.5, abs=0.01) and result["gate_threshold"] >= 0

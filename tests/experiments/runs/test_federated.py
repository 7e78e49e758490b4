"""Runs of every kind as functions: personalizers after any algorithm, pruning, own data, divergence."""

import json

import jax
import numpy as np
import pytest

from configs import digits
from experiments.config import ConfigError
from experiments.run import run
from experiments.runs.records import DivergedError, load_model, load_parameters
from metagater_jax.data.datasets import Dataset


@pytest.mark.slow
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
  jax.tree.map(
    lambda w, c: np.testing.assert_array_equal(w != 0, c == 1),
    {n: params["backbone"][n]["kernel"] for n in places},
    {n: mask[n]["kernel"] for n in places},
  )
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert rows[0]["pruned"] < rows[1]["pruned"] == result["pruned"]
  assert result["accuracy"]["mean"] > result["accuracy_before_adaptation"]["mean"]


@pytest.mark.parametrize(
  "images, labels, message",
  [
    (np.zeros((40, 8, 8), np.uint8), np.arange(40) % 2, "expects images .batch, height, width, channels."),
    (np.zeros((40, 4, 4, 1), np.uint8), np.arange(40) % 2, "too small for this network"),
    (np.zeros((40, 8, 8, 1), np.uint8), np.arange(39) % 2, "40 images but 39 labels"),
    (np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 3, "labels must lie in 0 … 1, but range from 0 to 2"),
  ],
)
def test_own_data_that_does_not_fit(images, labels, message, tmp_path):
  with pytest.raises(ConfigError, match=message):
    run(digits.get_config(), tmp_path / "w", Dataset("mine", images, labels, 2), quiet=True)


def test_a_run_is_a_function_on_own_data(tmp_path):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 600)
  images = np.clip(rng.normal(60 * labels[:, None, None, None], 10, (600, 8, 8, 1)), 0, 255).astype(np.uint8)
  config = digits.get_config()
  config.update(model="mlp", widths=(8,), gated=False, tasks=8, target_tasks=2, cohort=3, size_range=(20, 60), rounds=5, eval_every=5)
  result = run(config, tmp_path / "w", Dataset("brightness", images, labels, 4), quiet=True)
  assert result["sparsity"] is None and result["macs"] == {"dense": 64 * 8 + 8 * 4, "gated": None, "effective": None}
  assert (tmp_path / "w" / "tasks.png").stat().st_size > 5000


def test_divergence_is_reported_with_what_to_lower_and_metrics_kept(tmp_path):
  config = digits.get_config()
  config.update(local_lr=1e30, rounds=40, eval_every=1, rounds_per_dispatch=1, gated=False)
  with pytest.raises(DivergedError, match="diverged. Lower beta .now 0.02., local_lr .now 1e.30., or set gamma=plain"):
    run(config, tmp_path / "w", quiet=True)
  assert (tmp_path / "w" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_any_personalizer_follows_any_algorithm(tmp_path):
  """FedAvg, then MetaSNIP: trained once, and then from the model that is there, at the sparsity that a gate reached on each task."""
  config = digits.get_config()
  config.update(rounds=4, eval_every=4, widths=(4, 6, 8), algorithm="fedavg", personalizer="metasnip_weight", target_sparsity=0.4)
  pruned = run(config, tmp_path / "snip", quiet=True)
  np.testing.assert_allclose(pruned["sparsity"]["per_task"], 0.4, atol=2e-3)
  config.update(algorithm="metagater", gated=True, personalizer="two_stage")
  gated = run(config, tmp_path / "gated", quiet=True)
  config.update(
    gated=False, algorithm="fedavg", personalizer="metasnip_channel", meta_model=str(tmp_path / "snip"), sparsity_of=str(tmp_path / "gated")
  )
  given = run(config, tmp_path / "given", quiet=True)
  assert given["accuracy_before_adaptation"] == pruned["accuracy_before_adaptation"] and given["round_ms"] is None
  np.testing.assert_allclose(given["sparsity"]["per_task"], gated["sparsity"]["per_task"], atol=0.5 / 8 + 1e-6)
  before, after = (load_model(tmp_path / name)[0].params for name in ("snip", "given"))
  jax.tree.map(np.testing.assert_array_equal, before, after)  # no training
  config.update(gated=True)
  with pytest.raises(ConfigError, match="is of another network: gate/conv3/W1 is None there and"):
    run(config, tmp_path / "other", quiet=True)
  config.update(gated=False, target_tasks=4)
  with pytest.raises(ConfigError, match="a run of other tasks: target_tasks is 5 there and 4 here"):
    run(config, tmp_path / "other", quiet=True)
  assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_pruned_models_targets_adapt_in_two_stages(tmp_path):
  config = digits.get_config()
  config.update(rounds=4, eval_every=4, widths=(4, 6, 8))
  config.prune.update(score="anp", sparsity=0.5, every=1)
  result = run(config, tmp_path / "run", quiet=True)
  assert result["personalizer"] == "two_stage" and result["pruned"] == pytest.approx(0.5, abs=0.01) and result["gate_threshold"] is None

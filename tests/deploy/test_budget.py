"""Adaptation to a network of a fixed size: the two stages, for the work of what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg
from metagater_jax.deploy import Cutting, compact, device_loss, within_budget

IMAGE = (16, 16, 3)
KEEP = {"conv2": 3, "conv3": 5}


@pytest.fixture(scope="module")
def task():
  """(network, parameters, a batch of its data)."""
  network = mg.GatedNetwork(mg.ConvNet4(4, widths=(4, 6, 8)), ("conv2", "conv3"))
  images = jax.random.normal(jax.random.key(1), (12, *IMAGE))
  return network, network.init(jax.random.key(0), IMAGE), mg.data.Batch(images, jnp.arange(12) % 4, jnp.ones(12).at[10:].set(0))


@pytest.mark.parametrize("steps, gate_steps", [pytest.param(1, 1, marks=pytest.mark.slow), (3, 2)])
def test_it_is_two_stage_without_the_channels_that_are_off(task, steps, gate_steps):
  network, params, batch = task
  rates = {"gate_lr": 5.0, "lr": 0.1, "steps": steps, "gate_steps": gate_steps}
  whole = mg.two_stage(mg.classification_loss(network), network=network, keep=KEEP, **rates).adapt(mg.Model(params), batch)
  expected = compact(network, whole, IMAGE)
  budget = within_budget(network, IMAGE, KEEP, **rates)
  small, index = jax.jit(budget.adapt)(params, batch)
  assert {group: kept.tolist() for group, kept in index.items()} == {group: kept.tolist() for group, kept in expected.kept.items()}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), small, expected.params)
  widths = {layer.name: layer.outputs for layer in budget.network.layers(IMAGE)}
  assert small["gate"] == {} and widths == {"conv1": 4, "conv2": 3, "conv3": 5, "output": 4}
  # Put back, it is the whole network's answer, and channels that are off have the meta-model's weights.
  back = budget.cutting.put(small, index, whole.params)
  np.testing.assert_allclose(network.apply(back, batch.images)[0], network.apply(whole.params, batch.images)[0], atol=1e-5)
  off = np.setdiff1d(np.arange(8), index["conv3"])
  np.testing.assert_array_equal(back["backbone"]["conv3"]["kernel"][..., off], params["backbone"]["conv3"]["kernel"][..., off])


def test_it_costs_less_than_the_whole_network(task):
  """By the compiler's own count of operations."""
  network, params, batch = task
  keep = {"conv2": 1, "conv3": 1}
  wide = mg.GatedNetwork(mg.ConvNet4(4, widths=(8, 32, 32)), ("conv2", "conv3"))
  shapes = jax.eval_shape(lambda key: wide.init(key, IMAGE), jax.random.key(0))
  count = lambda function: jax.jit(function).lower(shapes, batch).compile().cost_analysis()["flops"]
  dense = count(lambda params, batch: mg.two_stage(mg.classification_loss(wide), network=wide, keep=keep).adapt(mg.Model(params), batch).params)
  small = count(lambda params, batch: within_budget(wide, IMAGE, keep).adapt(params, batch)[0])
  assert small < 0.75 * dense


def test_the_loss_for_devices_is_the_loss(task):
  network, params, batch = task
  value, gradient = jax.value_and_grad(mg.classification_loss(network))(params, batch)
  other, found = jax.value_and_grad(device_loss(network))(params, batch)
  assert float(value) == pytest.approx(float(other), rel=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, gradient)


def test_bad_budgets(task):
  network = task[0]
  with pytest.raises(ValueError, match="keep must say how many channels each gated layer keeps \\(conv2, conv3\\)"):
    within_budget(network, IMAGE, {"conv3": 2})
  with pytest.raises(ValueError, match="conv3 has 8 channels and must keep at least 1 of them, got 9"):
    within_budget(network, IMAGE, {"conv2": 2, "conv3": 9})
  with pytest.raises(ValueError, match="keep says how many channels each gated layer has"):
    mg.two_stage(mg.classification_loss(network), network=network, keep={"conv3": 2})
  with pytest.raises(ValueError, match="in the place of target_sparsity"):
    mg.two_stage(mg.classification_loss(network), network=network, keep=KEEP, target_sparsity=0.5)
  assert Cutting(network, IMAGE, {"conv2": 6}).groups == {}  # all of them: nothing is cut

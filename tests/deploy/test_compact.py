"""Compaction: a smaller network with the same outputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg
from metagater_jax.deploy import Cutting, compact, kept_channels
from metagater_jax.personalize import constant_gate

IMAGE = (16, 16, 3)


def images(count=6, shape=IMAGE, seed=1):
  return jax.random.normal(jax.random.key(seed), (count, *shape))


def random_params(network, shape=IMAGE, seed=0):
  """Parameters that are random everywhere, biases and normalizations too, so that nothing holds by being 0 or 1."""
  params = network.init(jax.random.key(seed), shape)
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return jax.tree.unflatten(structure, [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])


def logits(network, params, x):
  return np.asarray(jax.jit(lambda params: network.apply(params, x)[0])(params))


def same(small, network, params, x=None):
  x = images() if x is None else x
  expected = logits(network, params, x)
  np.testing.assert_allclose(logits(small.network, small.params, x), expected, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
  "backbone, gated, shape",
  [
    (mg.ConvNet4(5, widths=(4, 6, 8)), ("conv2", "conv3"), IMAGE),
    (mg.nn.ConvNet7(5, widths=(4, 4, 6, 6, 8, 8)), ("conv1", "conv5", "conv6"), IMAGE),
    (mg.nn.SensorNet(6, widths=(4, 6, 8)), ("conv2", "conv3"), (32, 3)),
    (mg.MLP(5, widths=(7, 6)), ("hidden1", "hidden2"), IMAGE),
    pytest.param(mg.nn.ResNet12(5, widths=(4, 6, 6, 8)), ("block1/conv1", "block2/conv2", "block3"), IMAGE, marks=pytest.mark.slow),
  ],
  ids=["conv4", "conv7", "sensor", "mlp", "resnet"],
)
def test_constant_gates_are_cut_out_exactly(backbone, gated, shape):
  network = mg.GatedNetwork(backbone, gated)
  params = random_params(network, shape)
  rng = np.random.default_rng(0)
  masks = {layer: rng.permutation(own["b2"].shape[0]) < own["b2"].shape[0] // 2 for layer, own in params["gate"].items()}
  params["gate"] = constant_gate(params["gate"], masks)
  small = compact(network, mg.Model(params), shape)
  assert small.network.gated_layers == ()
  same(small, network, params, images(shape=shape))
  # What is left is what the accounting of gated networks says, which follows layers in its own way.
  layers = network.layers(shape)
  kept = {layer: jnp.asarray(mask, jnp.float32) for layer, mask in masks.items()}
  macs, parameters = mg.nn.dense_cost(small.network.layers(shape))
  if not isinstance(backbone, mg.nn.ResNet12):  # there a gate's channels are those of a sum
    assert macs == pytest.approx(float(mg.nn.gated_macs(layers, kept))) and parameters == pytest.approx(float(mg.nn.gated_parameters(layers, kept)))
  assert parameters == sum(leaf.size for leaf in jax.tree.leaves(small.params)) < mg.nn.dense_cost(layers)[1]


@pytest.mark.slow
def test_gates_that_look_at_their_input_stay():
  """Whole channels go; the others' gates, and what they read of a layer that lost channels, stay as they were."""
  network = mg.GatedNetwork(mg.ConvNet4(5, widths=(6, 8, 8)), ("conv1", "conv2", "conv3"), initial_log_odds=0.0)
  params = random_params(network)
  off = {"conv1": [0, 3], "conv2": [1, 2, 7], "conv3": [4]}
  for layer, numbers in off.items():
    own = params["gate"][layer]
    params["gate"][layer] = {**own, "W2": own["W2"].at[:, jnp.array(numbers)].set(0), "b2": own["b2"].at[jnp.array(numbers)].set(-1)}
  x = images(40)
  masks = network.apply(params, x)[1]
  assert any(0.1 < float(rate) < 0.9 for mask in masks.values() for rate in mask.mean(0))  # some depend on the input
  small = compact(network, mg.Model(params), IMAGE)
  assert small.network.gated_layers == ("conv1", "conv2", "conv3") and dict(small.network.absent) == {"conv2": 2, "conv3": 3}
  same(small, network, params, x)
  found = small.network.outputs(small.params, x)
  for layer, numbers in off.items():
    left = np.setdiff1d(np.arange(masks[layer].shape[1]), numbers)
    assert small.kept[layer].tolist() == left.tolist()
    np.testing.assert_array_equal(found.masks[layer], masks[layer][:, left])
  # Once more: what was cut out before stays counted.
  again = small.params["gate"]["conv2"]
  further = {**small.params, "gate": {**small.params["gate"], "conv2": {**again, "W2": again["W2"].at[:, 0].set(0), "b2": again["b2"].at[0].set(-2)}}}
  twice = compact(small.network, mg.Model(further), IMAGE)
  assert dict(twice.network.absent) == {"conv2": 2, "conv3": 4}
  same(twice, small.network, further, x)


def test_channels_that_are_never_on_over_calibration_data():
  network = mg.GatedNetwork(mg.ConvNet4(5, widths=(4, 6, 8)), ("conv3",), initial_log_odds=0.0)
  params = random_params(network)
  x = images(30)
  batch = mg.data.Batch(x, jnp.zeros(30, jnp.int32), jnp.ones(30))
  rate = np.asarray(network.apply(params, x)[1]["conv3"]).mean(0)
  assert 0 < (rate == 0).sum() < 8 and ((rate > 0) & (rate < 0.3)).any()
  kept = kept_channels(network, mg.Model(params), IMAGE, batch)
  assert kept["conv3"].tolist() == (rate > 0).tolist()
  same(compact(network, mg.Model(params), IMAGE, kept), network, params, x)  # on the data itself
  assert kept_channels(network, mg.Model(params), IMAGE, batch, threshold=0.3)["conv3"].tolist() == (rate > 0.3).tolist()
  always = compact(network, mg.Model(params), IMAGE, kept, drop_gates=True)
  ungated = mg.GatedNetwork(network.backbone)
  zeroed = {**params["backbone"], "conv3": jax.tree.map(lambda leaf: leaf * kept["conv3"], params["backbone"]["conv3"])}
  same(always, ungated, {"backbone": zeroed, "gate": {}}, x)


@pytest.mark.parametrize(
  "backbone",
  [
    mg.ConvNet4(5, widths=(6, 8, 8)),
    mg.nn.FewShotConvNet(5, widths=(6, 8, 8, 6)),
    pytest.param(mg.nn.ResNet12(5, widths=(4, 6, 6, 8)), marks=pytest.mark.slow),
  ],
  ids=["conv4", "fewshot", "resnet"],
)
def test_filters_that_a_mask_removes_are_cut_out(backbone):
  network = mg.GatedNetwork(backbone)
  params = random_params(network)
  head = mg.nn.head_of(backbone, IMAGE)
  score = jax.tree.map(jnp.abs, params)
  mask = mg.make_mask(score, 0.5, granularity="channel", prunable=lambda name, leaf: leaf.ndim > 1 and head not in name, scope="layer")
  model = mg.Model(jax.tree.map(jnp.multiply, params, mask), mask)
  small = compact(network, model, IMAGE)
  same(small, network, model.params)
  assert small.network.backbone.head == head
  shapes = {layer.name: layer.outputs for layer in small.network.layers(IMAGE)}
  if isinstance(backbone, mg.nn.ResNet12):  # what is added keeps what either of both has
    for block in range(1, 5):
      one, other = (np.asarray(mask["backbone"][f"block{block}"][layer]["bias"]) > 0 for layer in ("conv3", "shortcut"))
      assert shapes[f"block{block}/conv3"] == shapes[f"block{block}/shortcut"] == (one | other).sum()
      assert shapes[f"block{block}/conv1"] == backbone.widths[block - 1] // 2
  else:
    assert all(shapes[f"conv{i}"] == width // 2 for i, width in enumerate(backbone.widths, 1))


def test_cutting_under_jit_by_traced_numbers_and_back():
  network = mg.GatedNetwork(mg.ConvNet4(5, widths=(4, 8, 8)), ("conv2", "conv3"))
  params = random_params(network)
  cutting = Cutting(network, IMAGE, {"conv2": 3, "conv3": 5}, ("conv2", "conv3"))
  index = {"conv2": jnp.array([1, 4, 6]), "conv3": jnp.array([0, 2, 3, 5, 7])}
  x = images()
  took = jax.jit(cutting.take)(params, index)
  masks = {layer: jnp.isin(jnp.arange(8), numbers) for layer, numbers in index.items()}
  expected = logits(network, {**params, "gate": constant_gate(params["gate"], masks)}, x)
  np.testing.assert_allclose(logits(cutting.network, took, x), expected, atol=3e-5 * np.abs(expected).max())
  # Back: what was taken is in its place, everything else as it was.
  back = jax.jit(cutting.put)(jax.tree.map(lambda leaf: leaf + 1, took), index, params)
  for layer, axes in (("conv1", (range(3), range(4))), ("conv2", (range(4), index["conv2"])), ("conv3", (index["conv2"], index["conv3"]))):
    there = np.zeros(params["backbone"][layer]["kernel"].shape[-2:], bool)
    there[np.ix_(*(np.asarray(axis) for axis in axes))] = True
    np.testing.assert_allclose(back["backbone"][layer]["kernel"], params["backbone"][layer]["kernel"] + there, rtol=1e-6)
  np.testing.assert_array_equal(back["gate"]["conv3"]["W2"], params["gate"]["conv3"]["W2"])


def test_an_empty_layer_keeps_one_channel_and_says_so():
  network = mg.GatedNetwork(mg.ConvNet4(5, widths=(4, 6, 8)), ("conv3",))
  params = random_params(network)
  params["gate"] = constant_gate(params["gate"], {"conv3": jnp.zeros(8)})
  with pytest.warns(UserWarning, match="every channel of conv3 is off; one is kept"):
    small = compact(network, mg.Model(params), IMAGE)
  assert small.kept["conv3"].tolist() == [0]
  same(small, network, params)


@pytest.mark.parametrize("constant", [True, False])
def test_channels_are_rounded_up_to_what_runtimes_like(constant):
  network = mg.GatedNetwork(mg.ConvNet4(5, widths=(4, 6, 13)), ("conv2", "conv3"))
  params = random_params(network)
  on = {"conv2": [0, 2, 5], "conv3": [1, 4, 6, 9, 12]}
  masks = {layer: jnp.isin(jnp.arange(width), jnp.array(on[layer])) for layer, width in (("conv2", 6), ("conv3", 13))}
  if constant:
    params["gate"] = constant_gate(params["gate"], masks)
  else:
    params["gate"] = {
      layer: {**own, "W2": own["W2"] * masks[layer], "b2": jnp.where(masks[layer], own["b2"], -1)} for layer, own in params["gate"].items()
    }
  small = compact(network, mg.Model(params), IMAGE, multiple=4)
  assert {layer: len(kept) for layer, kept in small.kept.items()} == {"conv2": 4, "conv3": 8}
  assert all(set(numbers) < set(small.kept[layer].tolist()) for layer, numbers in on.items())
  same(small, network, params)
  assert {layer: len(kept) for layer, kept in compact(network, mg.Model(params), IMAGE, multiple=16).kept.items()} == {}  # all of them


class Normalized(nn.Module):
  """A normalization over channels between two layers."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.LayerNorm(use_scale=False, use_bias=False, name="norm")(nn.Conv(8, (3, 3), name="first")(x)))
    return nn.Dense(5, name="output")(nn.relu(nn.Conv(6, (3, 3), name="second")(x)).mean((1, 2)))


def test_what_cannot_be_cut_is_refused():
  network = mg.GatedNetwork(Normalized(), ("first", "second"))
  params = random_params(network)
  half = lambda layer: {"first": jnp.ones(8), "second": jnp.ones(6), layer: (jnp.arange(8 if layer == "first" else 6) < 4).astype(jnp.float32)}
  second = {**params, "gate": constant_gate(params["gate"], half("second"))}
  same(compact(network, mg.Model(second), IMAGE), network, second)
  with pytest.raises(ValueError, match="channels of first cannot be cut out of Normalized"):
    compact(network, mg.Model({**params, "gate": constant_gate(params["gate"], half("first"))}), IMAGE)
  plain = mg.GatedNetwork(mg.ConvNet4(5, widths=(4, 6, 8)))
  with pytest.raises(ValueError, match="neither gates nor a mask"):
    compact(plain, mg.Model(plain.init(jax.random.key(0), IMAGE)), IMAGE)
  gated = mg.GatedNetwork(plain.backbone, ("conv3",))
  model = mg.Model(gated.init(jax.random.key(0), IMAGE))
  with pytest.raises(ValueError, match=r"images of shape \(8, 8, 3\), but the network is for \(16, 16, 3\)"):
    kept_channels(gated, model, IMAGE, mg.data.Batch(jnp.ones((2, 8, 8, 3)), jnp.zeros(2, jnp.int32), jnp.ones(2)))
  with pytest.raises(ValueError, match="there is no layer 'conv9'"):
    Cutting(gated, IMAGE, {"conv9": 1})
  with pytest.raises(ValueError, match="conv3 has 8 channels and must keep at least 1 of them, got 0"):
    Cutting(gated, IMAGE, {"conv3": 0})
  residual = mg.GatedNetwork(mg.nn.ResNet12(5, widths=(4, 4, 4, 4)))
  with pytest.raises(ValueError, match="are added to another layer's"):
    Cutting(residual, IMAGE, {"block1/conv3": 2, "block1/shortcut": 3})

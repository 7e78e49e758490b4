"""MACs and parameters: the figures of a network from which the unused channels were really cut out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg


def test_costs_are_those_of_the_smaller_network():
  network = mg.GatedNetwork(mg.nn.ConvNet7(classes=10, widths=(4, 4, 6, 6, 8, 10)), ("conv5", "conv6"))
  layers = network.layers((16, 16, 3))
  masks = {"conv5": jnp.zeros((2, 8)).at[:, :3].set(1), "conv6": jnp.zeros((2, 10)).at[:, :7].set(1)}
  small = mg.nn.ConvNet7(classes=10, widths=(4, 4, 6, 6, 3, 7))
  small_layers = mg.nn.network_layers(small, (16, 16, 3))
  np.testing.assert_allclose(mg.nn.gated_macs(layers, masks), [mg.nn.dense_cost(small_layers)[0]] * 2, rtol=1e-6)
  used = {name: mask[0] > 0 for name, mask in masks.items()}
  parameters = small.init(jax.random.key(0), jnp.ones((1, 16, 16, 3)))
  count = sum(x.size for x in jax.tree.leaves(parameters))
  np.testing.assert_allclose(mg.nn.gated_parameters(layers, used), count, rtol=1e-6)
  assert mg.nn.dense_cost(small_layers)[1] == count


def test_parameters_of_a_normalization_go_with_their_channel():
  layers = mg.nn.network_layers(mg.nn.FewShotConvNet(classes=5, widths=(4, 6)), (8, 8, 3))
  used = {"conv1": jnp.arange(4) < 3, "conv2": jnp.arange(6) < 1}
  parameters = mg.nn.FewShotConvNet(classes=5, widths=(3, 1)).init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
  np.testing.assert_allclose(mg.nn.gated_parameters(layers, used), sum(x.size for x in jax.tree.leaves(parameters)))


def test_all_on_is_dense_and_gates_cost_what_their_matrices_hold():
  network = mg.GatedNetwork(mg.ConvNet4(classes=10), ("conv3",))
  layers = network.layers((32, 32, 3))
  masks = {"conv3": jnp.ones((1, 128))}
  macs, parameters = mg.nn.dense_cost(layers)
  np.testing.assert_allclose(mg.nn.gated_macs(layers, masks), macs)
  np.testing.assert_allclose(mg.nn.gated_parameters(layers, {"conv3": jnp.ones(128, bool)}), parameters)
  gate = network.init(jax.random.key(0), (32, 32, 3))["gate"]
  assert mg.nn.gate_cost(layers, ("conv3",)) == (64 * 16 + 16 * 128, sum(x.size for x in jax.tree.leaves(gate)))


def test_macs_of_a_mask_are_those_of_the_smaller_network():
  """Of a residual network too: first and second convolutions of its blocks are narrower, and what reads them reads less."""
  network = mg.GatedNetwork(mg.nn.ResNet12(classes=5, widths=(4, 4, 6, 6)))
  backbone, layers = network.init(jax.random.key(0), (16, 16, 3))["backbone"], network.layers((16, 16, 3))
  mask = jax.tree.map(jnp.ones_like, backbone)
  np.testing.assert_allclose(mg.nn.masked_macs(layers, mask), mg.nn.dense_cost(layers)[0])
  for name in ("conv1", "conv2"):  # filters 1 and 2 of the first block
    mask["block1"][name] = {key: leaf.at[..., 1:3].set(0) for key, leaf in mask["block1"][name].items()}
  apply = lambda params, images: network.backbone.apply({"params": params}, images)
  effective = mg.pruning.effective_mask(apply, mask, jnp.ones((8, 16, 16, 3)))
  places = 16 * 16 * 9
  expected = mg.nn.dense_cost(layers)[0] - places * ((3 * 4 - 3 * 2) + (4 * 4 - 2 * 2) + (4 * 4 - 2 * 4))
  np.testing.assert_allclose(mg.nn.masked_macs(layers, effective), expected, rtol=1e-6)


def test_macs_of_single_weights():
  layers = mg.nn.network_layers(mg.MLP(classes=3, widths=(4,)), (2, 2, 1))
  mask = {"hidden1": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}, "output": {"kernel": jnp.ones((4, 3)).at[0].set(0), "bias": jnp.ones(3)}}
  np.testing.assert_allclose(mg.nn.masked_macs(layers, mask), 4 + 9)


def test_a_gate_on_a_block_counts_for_the_blocks_last_layer():
  layers = (
    mg.nn.Layer("block/conv1", "conv", 3, 4, 100, 10, 0, (8, 8, 3)),
    mg.nn.Layer("block/conv2", "conv", 4, 4, 200, 20, 0, (8, 8, 4), ("block/conv1",), ("block/conv2", "block")),
    mg.nn.Layer("output", "dense", 4, 2, 8, 8, 0, (4,), ("block/conv2",)),
  )
  np.testing.assert_allclose(mg.nn.gated_macs(layers, {"block": jnp.array([[1.0, 1.0, 0.0, 0.0]])}), [100 + 100 + 4])


def test_a_residual_networks_layers_read_what_they_really_read():
  """Gates on ResNet-12, against what is computed when its channels are really off: which layers see a zero."""
  network = mg.nn.ResNet12(classes=5, widths=(4, 4, 6, 6))
  layers = {layer.name: layer for layer in mg.nn.network_layers(network, (16, 16, 3))}
  assert layers["block1/shortcut"].sources == layers["block1/conv1"].sources == ()
  assert layers["block1/conv3"].sources == ("block1/conv2",)
  for name in ("block2/conv1", "block2/shortcut"):
    assert layers[name].sources == ("block1/conv3", "block1/shortcut")
  off = jnp.array([[1.0, 0.0, 0.0, 0.0]])
  dense = mg.nn.dense_cost(tuple(layers.values()))[0]
  saved = lambda **masks: dense - float(mg.nn.gated_macs(tuple(layers.values()), {f"block1/{name}": mask for name, mask in masks.items()})[0])
  macs = {name: layer.macs for name, layer in layers.items()}
  # A channel of the sum is there as long as either of its parts is: only conv3's own work goes.
  assert saved(conv3=off) == 0.75 * macs["block1/conv3"]
  both = 0.75 * (macs["block1/conv3"] + macs["block1/shortcut"] + macs["block2/conv1"] + macs["block2/shortcut"])
  assert saved(conv3=off, shortcut=off) == both
  # Where the two differ, what comes next reads the channels that are on in either.
  mostly = jnp.array([[0.0, 1.0, 1.0, 0.0]])
  either = 0.5 * macs["block1/conv3"] + 0.75 * macs["block1/shortcut"] + 0.25 * (macs["block2/conv1"] + macs["block2/shortcut"])
  assert saved(conv3=mostly, shortcut=off) == either
  # A gate on the block masks what both make, and reads what the block reads.
  assert dense - float(mg.nn.gated_macs(tuple(layers.values()), {"block1": off})[0]) == both
  assert mg.nn.gate_cost(tuple(layers.values()), ("block2",), hidden=16)[0] == 4 * 16 + 16 * 4


class Branches(nn.Module):
  """Two branches that are concatenated, a layer that is called twice, and a jitted part."""

  @nn.compact
  def __call__(self, x):
    both = jnp.concatenate([nn.Conv(2, (1, 1), name="left")(x), jax.jit(jax.nn.relu)(nn.Conv(6, (1, 1), name="right")(x))], -1)
    shared = nn.Conv(8, (1, 1), name="shared")
    return nn.Dense(3, name="head")(shared(shared(both)).mean((1, 2)))


def test_concatenated_and_shared_layers():
  layers = mg.nn.network_layers(Branches(), (4, 4, 3))
  assert [(layer.name, layer.sources) for layer in layers] == [
    ("left", ()),
    ("right", ()),
    ("shared", ("left", "right")),
    ("shared", ("shared",)),
    ("head", ("shared",)),
  ]
  variables = Branches().init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
  assert mg.nn.dense_cost(layers)[1] == sum(leaf.size for leaf in jax.tree.leaves(variables))
  off = {"left": jnp.zeros((1, 2))}  # two of the eight channels that are read
  saved = mg.nn.dense_cost(layers)[0] - float(mg.nn.gated_macs(layers, off)[0])
  assert saved == layers[0].macs + layers[2].macs / 4
  assert mg.nn.head_of(Branches(), (4, 4, 3)) == "head" and mg.nn.head_of(mg.MLP(classes=2), (4, 4, 1)) == "output"


@pytest.mark.parametrize("heads", [1, 4])
def test_projections_of_attention_against_flax_and_by_hand(heads):
  """Query, key, value and output are 16 × 12 and 12 × 16 matrices with biases at 9 places, however many heads share them."""

  class Attending(nn.Module):
    @nn.compact
    def __call__(self, images):
      x = nn.Dense(16, name="embed")(images.reshape(images.shape[0], 9, -1))
      x = nn.MultiHeadDotProductAttention(heads, qkv_features=12, name="attention")(x)
      return nn.Dense(3, name="output")(x.mean(1))

  layers = {layer.name: layer for layer in mg.nn.network_layers(Attending(), (3, 3, 2))}
  for name in ("query", "key", "value"):
    layer = layers[f"attention/{name}"]
    assert (layer.macs, layer.parameters, layer.kind, layer.inputs, layer.outputs) == (9 * 16 * 12, 16 * 12 + 12, "dense", 16, 12)
  out = layers["attention/out"]
  assert (out.macs, out.parameters, out.inputs, out.outputs) == (9 * 12 * 16, 12 * 16 + 16, 12, 16)
  params = Attending().init(jax.random.key(0), jnp.zeros((1, 3, 3, 2)))["params"]
  assert sum(layer.parameters for layer in layers.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_convolution_as_wide_as_its_image_is_no_matrix():
  class Wide(nn.Module):
    @nn.compact
    def __call__(self, images):
      return nn.Dense(2, name="output")(nn.Conv(3, (3, 3), name="conv")(images).mean((1, 2)))

  layer = mg.nn.network_layers(Wide(), (3, 3, 3))[0]
  assert (layer.kind, layer.macs, layer.parameters) == ("conv", 9 * 81, 84)

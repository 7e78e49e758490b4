"""MACs and parameters: the figures of a network from which the unused channels were really cut out."""

import jax
import jax.numpy as jnp
import numpy as np

import metagater_jax as mg


def test_costs_are_those_of_the_smaller_network():
  network = mg.GatedNetwork(mg.ConvNet7(classes=10, widths=(4, 4, 6, 6, 8, 10)), ("conv5", "conv6"))
  layers = network.layers((16, 16, 3))
  masks = {"conv5": jnp.zeros((2, 8)).at[:, :3].set(1), "conv6": jnp.zeros((2, 10)).at[:, :7].set(1)}
  small = mg.ConvNet7(classes=10, widths=(4, 4, 6, 6, 3, 7))
  small_layers = mg.network_layers(small, (16, 16, 3))
  np.testing.assert_allclose(mg.gated_macs(layers, masks), [mg.dense_cost(small_layers)[0]] * 2, rtol=1e-6)
  used = {name: mask[0] > 0 for name, mask in masks.items()}
  parameters = small.init(jax.random.key(0), jnp.ones((1, 16, 16, 3)))
  count = sum(x.size for x in jax.tree.leaves(parameters))
  np.testing.assert_allclose(mg.gated_parameters(layers, used), count, rtol=1e-6)
  assert mg.dense_cost(small_layers)[1] == count


def test_parameters_of_a_normalization_go_with_their_channel():
  layers = mg.network_layers(mg.FewShotConvNet(classes=5, widths=(4, 6)), (8, 8, 3))
  used = {"conv1": jnp.arange(4) < 3, "conv2": jnp.arange(6) < 1}
  parameters = mg.FewShotConvNet(classes=5, widths=(3, 1)).init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
  np.testing.assert_allclose(mg.gated_parameters(layers, used), sum(x.size for x in jax.tree.leaves(parameters)))


def test_all_on_is_dense_and_gates_cost_what_their_matrices_hold():
  network = mg.GatedNetwork(mg.ConvNet4(classes=10), ("conv3",))
  layers = network.layers((32, 32, 3))
  masks = {"conv3": jnp.ones((1, 128))}
  macs, parameters = mg.dense_cost(layers)
  np.testing.assert_allclose(mg.gated_macs(layers, masks), macs)
  np.testing.assert_allclose(mg.gated_parameters(layers, {"conv3": jnp.ones(128, bool)}), parameters)
  gate = network.init(jax.random.key(0), (32, 32, 3))["gate"]
  assert mg.gate_cost(layers, ("conv3",)) == (64 * 16 + 16 * 128, sum(x.size for x in jax.tree.leaves(gate)))


def test_macs_of_a_mask_are_those_of_the_smaller_network():
  """Of a residual network too: first and second convolutions of its blocks are narrower, and what reads them reads less."""
  network = mg.GatedNetwork(mg.ResNet12(classes=5, widths=(4, 4, 6, 6)))
  backbone, layers = network.init(jax.random.key(0), (16, 16, 3))["backbone"], network.layers((16, 16, 3))
  mask = jax.tree.map(jnp.ones_like, backbone)
  np.testing.assert_allclose(mg.masked_macs(layers, mask), mg.dense_cost(layers)[0])
  for name in ("conv1", "conv2"):  # filters 1 and 2 of the first block
    mask["block1"][name] = {key: leaf.at[..., 1:3].set(0) for key, leaf in mask["block1"][name].items()}
  apply = lambda params, images: network.backbone.apply({"params": params}, images)
  effective = mg.effective_mask(apply, mask, jnp.ones((8, 16, 16, 3)))
  places = 16 * 16 * 9
  expected = mg.dense_cost(layers)[0] - places * ((3 * 4 - 3 * 2) + (4 * 4 - 2 * 2) + (4 * 4 - 2 * 4))
  np.testing.assert_allclose(mg.masked_macs(layers, effective), expected, rtol=1e-6)


def test_macs_of_single_weights():
  layers = mg.network_layers(mg.MLP(classes=3, widths=(4,)), (2, 2, 1))
  mask = {"hidden1": {"kernel": jnp.eye(4), "bias": jnp.ones(4)},
          "output": {"kernel": jnp.ones((4, 3)).at[0].set(0), "bias": jnp.ones(3)}}
  np.testing.assert_allclose(mg.masked_macs(layers, mask), 4 + 9)


def test_a_gate_on_a_block_counts_for_the_blocks_last_layer():
  layers = (mg.Layer("block/conv1", "conv", 3, 4, 100, 10, 0, (8, 8, 3), None),
            mg.Layer("block/conv2", "conv", 4, 4, 200, 20, 0, (8, 8, 4), "block/conv1"),
            mg.Layer("output", "dense", 4, 2, 8, 8, 0, (4,), "block/conv2"))
  np.testing.assert_allclose(mg.gated_macs(layers, {"block": jnp.array([[1.0, 1.0, 0.0, 0.0]])}), [100 + 100 + 4])

"""Convolutions as matrix products against lax's own."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import metagater_jax as mg
from metagater_jax.nn import convolution

NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
  "kernel, strides, padding, dilation",
  [
    ((3, 3), (1, 1), "SAME", (1, 1)),
    ((1, 1), (1, 1), "VALID", (1, 1)),
    ((2, 5), (2, 1), "SAME", (1, 1)),
    ((3, 3), (3, 2), [(2, 0), (1, 3)], (1, 1)),
    ((3, 3), (1, 1), "SAME", (2, 1)),
    ((2, 5), (3, 2), "VALID", (2, 1)),
  ],
)
def test_equals_lax_convolution(kernel, strides, padding, dilation):
  x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
  w = jax.random.normal(jax.random.key(1), (*kernel, 3, 4))
  arguments = dict(window_strides=strides, padding=padding, rhs_dilation=dilation, dimension_numbers=NHWC)
  expected, vjp = jax.vjp(lambda x, w: lax.conv_general_dilated(x, w, **arguments), x, w)
  ours, our_vjp = jax.vjp(lambda x, w: mg.nn.conv_as_matmul(x, w, **arguments), x, w)
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
  cotangent = jax.random.normal(jax.random.key(2), expected.shape)
  for a, b in zip(our_vjp(cotangent), vjp(cotangent)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_grouped_convolutions_are_left_to_lax():
  x, w = jax.random.normal(jax.random.key(0), (2, 5, 5, 4)), jax.random.normal(jax.random.key(1), (3, 3, 2, 6))
  arguments = dict(window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC, feature_group_count=2)
  np.testing.assert_allclose(mg.nn.conv_as_matmul(x, w, **arguments), lax.conv_general_dilated(x, w, **arguments), rtol=1e-5)


@pytest.mark.parametrize("module", [dict(), dict(strides=2), dict(padding="CIRCULAR"), dict(padding="VALID", use_bias=False)])
def test_in_a_flax_module(module):
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  plain = nn.Conv(5, (3, 3), **module)
  ours = nn.Conv(5, (3, 3), conv_general_dilated=mg.nn.conv_as_matmul, **module)
  params = plain.init(jax.random.key(1), x)
  np.testing.assert_allclose(ours.apply(params, x), plain.apply(params, x), rtol=1e-4, atol=1e-5)


def test_no_convolution_is_left_in_a_models_program():
  network = mg.GatedNetwork(mg.nn.ConvNet7(classes=10), ("conv5", "conv6"))
  params = network.init(jax.random.key(0), (32, 32, 3))
  loss = lambda params, images: network.apply(params, images)[0].sum()
  program = str(jax.make_jaxpr(jax.vmap(jax.grad(loss), (None, 0)))(params, jnp.ones((2, 3, 32, 32, 3))))
  assert "dot_general" in program
  assert "conv_general_dilated" not in program and "select_and_scatter" not in program


@pytest.mark.parametrize("ours, flax_pool", [(mg.nn.max_pool, nn.max_pool), (mg.nn.average_pool, nn.avg_pool)])
@pytest.mark.parametrize("size, window", [((8, 8), 2), ((7, 9), 2), ((9, 9), 3)])
def test_pooling_equals_flax(ours, flax_pool, size, window):
  x = jax.random.normal(jax.random.key(0), (2, *size, 3))  # no ties, so that max has one gradient
  expected, vjp = jax.vjp(lambda x: flax_pool(x, (window, window), (window, window)), x)
  got, our_vjp = jax.vjp(lambda x: ours(x, window), x)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  np.testing.assert_allclose(our_vjp(got)[0], vjp(got)[0], rtol=1e-6)


def test_images_too_small_to_pool():
  with pytest.raises(ValueError, match="2×2 window does not fit into 1×4"):
    mg.nn.max_pool(jnp.ones((1, 1, 4, 1)))


def test_a_window_of_equal_elements_has_one_gradient():
  x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 1, 0].set(1.0)
  gradient = jax.grad(lambda x: mg.nn.max_pool(x).sum())(x)[0, :, :, 0]
  assert np.asarray(gradient).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
  assert np.isnan(mg.nn.max_pool(jnp.full((1, 2, 2, 1), jnp.nan))).all()


@pytest.mark.parametrize("pool", ["max", "average", None])
def test_a_unit_is_relu_of_the_convolution_and_then_the_pool(pool):
  """Written with lax and flax, in the order of Eq. 1; `ConvUnit` moves bias and relu behind the maximum."""
  unit = mg.nn.ConvUnit(5, pool)
  x = jax.random.normal(jax.random.key(0), (2, 8, 6, 3))
  params = unit.init(jax.random.key(1), x)["params"]
  params = {**params, "bias": jax.random.normal(jax.random.key(2), (5,))}

  def reference(params, x):
    h = jax.nn.relu(lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=NHWC) + params["bias"])
    return {None: lambda h: h, "max": lambda h: nn.max_pool(h, (2, 2), (2, 2)), "average": lambda h: nn.avg_pool(h, (2, 2), (2, 2))}[pool](h)

  expected, vjp = jax.vjp(reference, params, x)
  got, our_vjp = jax.vjp(lambda params, x: unit.apply({"params": params}, x), params, x)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  cotangent = jax.random.normal(jax.random.key(3), expected.shape)
  for a, b in zip(jax.tree.leaves(our_vjp(cotangent)), jax.tree.leaves(vjp(cotangent))):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_computing_in_bfloat16_rounds_and_keeps_float32_outside():
  network = lambda dtype: mg.GatedNetwork(mg.ConvNet4(classes=4, widths=(8, 8, 8)), ("conv3",), compute_dtype=dtype)
  params = network("float32").init(jax.random.key(0), (16, 16, 3))
  images = jax.random.normal(jax.random.key(1), (6, 16, 16, 3))
  logits = {dtype: network(dtype).apply(params, images)[0] for dtype in ("float32", "bfloat16")}
  assert logits["bfloat16"].dtype == jnp.float32
  difference = np.abs(logits["bfloat16"] - logits["float32"]).max() / np.abs(logits["float32"]).max()
  assert 1e-4 < difference < 0.05  # bfloat16 has 8 bits of mantissa
  loss = mg.classification_loss(network("bfloat16"))
  gradient = jax.grad(loss)(params, mg.data.Batch(images, jnp.arange(6) % 4, jnp.ones(6)), jax.random.key(2))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("block", [400_000, 9000, 1])
def test_normalized_convolution_is_batch_norm_relu_and_pooling(block, monkeypatch):
  """Against flax's and lax's operations, with scales of both signs, whole and in blocks; values and gradients."""
  monkeypatch.setattr(convolution, "_BLOCK", block)
  module = mg.nn.NormalizedConv(6, pool=True)
  images = jax.random.normal(jax.random.key(0), (12, 7, 8, 3))
  params = module.init(jax.random.key(1), images)["params"]
  params |= {"scale": jnp.array([1.0, -2, 0.5, -0.1, 3, 1]), "bias": jnp.linspace(-1, 1, 6)}

  def reference(params):
    h = lax.conv_general_dilated(images, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    norm = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)
    h = norm.apply({"batch_stats": {"mean": jnp.zeros(6), "var": jnp.ones(6)}}, h, mutable=["batch_stats"])[0]
    return nn.max_pool(jax.nn.relu(h * params["scale"] + params["bias"]), (2, 2), (2, 2))

  ours = lambda params: module.apply({"params": params}, images)
  np.testing.assert_allclose(ours(params), reference(params), atol=1e-5)
  gradients = [jax.grad(lambda params, f=f: jnp.sum(jnp.sin(f(params))))(params) for f in (ours, reference)]
  chex.assert_trees_all_close(*gradients, atol=3e-4)


def test_residual_networks_are_those_of_twelve_layers():
  """Parameters by hand, and that a block's output is what its definition says."""
  network = mg.nn.ResNet12(5, widths=(4, 6, 8, 10))
  images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
  params = network.init(jax.random.key(1), images)["params"]
  own, before = 0, 3
  for width in (4, 6, 8, 10):
    own += 9 * width * (before + 2 * width) + before * width + 4 * 2 * width
    before = width
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == own + 10 * 5 + 5
  _, state = network.apply({"params": params}, images, capture_intermediates=True)
  found = state["intermediates"]["block1"]["__call__"][0]
  unit = lambda name, z, size=3: mg.nn.NormalizedConv(4, size=size).apply({"params": params["block1"][name]}, z)
  leaky = lambda x: jnp.where(x > 0, x, 0.1 * x)
  h = unit("conv3", leaky(unit("conv2", leaky(unit("conv1", images)))))
  expected = nn.max_pool(leaky(h + unit("shortcut", images, 1)), (2, 2), (2, 2))
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_sensor_network_is_convolutions_over_time(key):
  """Against flax's own one-dimensional convolution and pooling."""
  network = mg.nn.SensorNet(classes=5, widths=(4, 6), size=5)
  windows = jax.random.normal(key, (3, 17, 2))
  params = network.init(jax.random.key(1), windows)["params"]
  h = windows
  for layer in ("conv1", "conv2"):
    kernel, bias = params[layer]["kernel"][:, 0], params[layer]["bias"] + 0.1
    params[layer]["bias"] = bias
    h = lax.conv_general_dilated(h, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")) + bias
    h = nn.max_pool(jax.nn.relu(h), (2,), (2,))
  expected = h.reshape(3, -1) @ params["output"]["kernel"] + params["output"]["bias"]
  np.testing.assert_allclose(network.apply({"params": params}, windows), expected, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match="expects windows .batch, time, sensors., got shape .3, 17, 2, 1."):
    network.apply({"params": params}, windows[..., None])
  macs = {layer.name: layer.macs for layer in mg.nn.network_layers(network, (17, 2))}
  assert macs == {"conv1": 17 * 5 * 2 * 4, "conv2": 8 * 5 * 4 * 6, "output": 4 * 6 * 5}


@pytest.mark.parametrize("ours, flax_pool", [(mg.nn.max_pool, nn.max_pool), (mg.nn.average_pool, nn.avg_pool)])
def test_a_window_of_different_sides(ours, flax_pool, key):
  x = jax.random.normal(key, (2, 7, 9, 3))
  np.testing.assert_allclose(ours(x, (2, 3)), flax_pool(x, (2, 3), (2, 3)), rtol=1e-6)

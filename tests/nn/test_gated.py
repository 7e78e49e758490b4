"""Gated networks: Eq. (1), gates by name on any model, and what a network says of its layers."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate

import metagater_jax as mg


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def convolution(z, layer):
  """3×3 'same' convolution of one image by scipy, channel by channel."""
  kernel, padded = layer["kernel"], np.pad(z, ((1, 1), (1, 1), (0, 0)))
  return (
    np.stack([sum(correlate(padded[..., i], kernel[..., i, o], "valid", "direct") for i in range(z.shape[-1])) for o in range(kernel.shape[-1])], -1)
    + layer["bias"]
  )


def pool(x):
  h, w, c = x.shape
  return x[: h // 2 * 2, : w // 2 * 2].reshape(h // 2, 2, w // 2, 2, c).max((1, 3))


def gated_forward(params, image):
  """The four-layer network with a gate on conv3, written out in float64 NumPy: h = relu(conv(z)) ⊙ m (Eq. 1)."""
  theta, phi = params["backbone"], params["gate"]["conv3"]
  z = image
  for name in ("conv1", "conv2"):
    z = pool(np.maximum(convolution(z, theta[name]), 0))
  pooled = z.mean((0, 1))
  pooled = (pooled - pooled.mean()) / np.sqrt(pooled.var() + 1e-6)
  log_odds = np.maximum(pooled @ phi["W1"] + phi["b1"], 0) @ phi["W2"] + phi["b2"]
  mask = (log_odds > 0).astype(np.float64)
  h = pool(np.maximum(convolution(z, theta["conv3"]), 0) * mask)
  return h.ravel() @ theta["output"]["kernel"] + theta["output"]["bias"], mask


def test_gated_network_is_equation_1(small_network, key):
  params = small_network.init(key, (8, 8, 1))
  params["gate"]["conv3"]["b2"] = jnp.array([0.3, -0.1, 0.0, 0.2, -2.0, 5.0])
  images = jax.random.normal(jax.random.key(1), (6, 8, 8, 1))
  logits, masks = small_network.apply(params, images)
  expected = [gated_forward(float64(params), np.asarray(image, np.float64)) for image in images]
  np.testing.assert_array_equal(masks["conv3"], [mask for _, mask in expected])
  np.testing.assert_allclose(logits, [logit for logit, _ in expected], rtol=1e-3, atol=1e-4)
  assert 0 < masks["conv3"].mean() < 1


def test_without_gates_it_is_the_backbone(key):
  backbone = mg.ConvNet4(classes=4, widths=(4, 5, 6))
  network = mg.GatedNetwork(backbone)
  params = network.init(key, (8, 8, 1))
  images = jax.random.normal(key, (3, 8, 8, 1))
  logits, masks = network.apply(params, images, key)
  assert params["gate"] == {} and masks == {}
  chex.assert_trees_all_equal(logits, backbone.apply({"params": params["backbone"]}, images))


def test_the_gradient_of_a_gate_is_that_of_equation_1_also_where_the_channel_is_off(small_network, key):
  params = small_network.init(key, (8, 8, 1))
  gate = params["gate"]["conv3"]
  gate["b2"] = jnp.array([3.0, -3.0, 3.0, -3.0, 0.0, 3.0])
  gate["W2"] = jnp.zeros_like(gate["W2"])
  images = jax.random.normal(jax.random.key(1), (6, 8, 8, 1))
  logits = lambda b2: small_network.apply({**params, "gate": {"conv3": {**gate, "b2": b2}}}, images)[0]
  direction = jax.random.normal(jax.random.key(2), (6, 4))
  got = np.asarray(jax.grad(lambda b2: jnp.sum(direction * logits(b2)))(gate["b2"]))
  # The network is linear in each channel's mask, and the backward pass multiplies with σ'(b₂): switch each channel by hand.
  for c in range(6):
    on, off = (logits(gate["b2"].at[c].set(value)) for value in (1.0, -1.0))
    sigma = 1 / (1 + np.exp(-float(gate["b2"][c])))
    np.testing.assert_allclose(got[c], sigma * (1 - sigma) * np.sum(direction * (on - off)), rtol=2e-3, atol=1e-5)
  assert (got[[1, 3, 4]] != 0).all()


class Residual(nn.Module):
  """Somebody else's model: blocks, batch-free normalization, a skip connection, a strided convolution."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3, 3), name="stem")(x)
    x = x + Block(6, name="block")(x)
    return nn.Dense(3)(nn.Conv(8, (3, 3), strides=2, name="down")(x).mean((1, 2)))


class Block(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    return jax.nn.relu(nn.LayerNorm()(nn.Conv(self.width, (3, 3), name="conv")(x)))


@pytest.mark.parametrize("layer, channels", [("stem", 6), ("block/conv", 6), ("block", 6), ("down", 8)])
def test_a_gate_goes_on_any_layer_of_any_model_by_name(layer, channels, key):
  network = mg.GatedNetwork(Residual(), (layer,))
  params = network.init(key, (8, 8, 2))
  images = jax.random.normal(key, (4, 8, 8, 2))
  _, masks = jax.jit(network.apply)(params, images)
  assert masks[layer].shape == (4, channels)
  off = jax.tree.map(jnp.zeros_like, params["gate"])
  plain, _ = mg.GatedNetwork(Residual()).apply({**params, "gate": {}}, images)
  on = jax.tree.map(jnp.zeros_like, params["gate"])
  on[layer]["b2"] += 1.0
  np.testing.assert_allclose(network.apply({**params, "gate": on}, images)[0], plain, rtol=1e-5, atol=1e-6)
  assert not np.allclose(network.apply({**params, "gate": off}, images)[0], plain)


def test_noise_is_drawn_in_training_only_and_not_for_the_plain_gate(small_network, key):
  params = small_network.init(key, (8, 8, 1))
  images = jax.random.normal(key, (64, 8, 8, 1))
  masks = lambda network, k: network.apply(params, images, k)[1]["conv3"]
  assert (masks(small_network, key) != masks(small_network, jax.random.key(8))).any()
  chex.assert_trees_all_equal(masks(small_network, None), masks(small_network, None))
  plain = mg.GatedNetwork(small_network.backbone, ("conv3",), temperature=None)
  chex.assert_trees_all_equal(masks(plain, key), masks(plain, None))


def test_per_task_parameters_under_vmap(small_network, key):
  params = jax.vmap(lambda k: small_network.init(k, (8, 8, 1)))(jax.random.split(key, 3))
  images = jax.random.normal(key, (3, 5, 8, 8, 1))
  together, _ = jax.jit(jax.vmap(small_network.apply))(params, images)
  for i in range(3):
    alone, _ = jax.jit(small_network.apply)(jax.tree.map(lambda x: x[i], params), images[i])
    np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)


def test_errors_list_the_layers_and_name_the_shapes(key):
  with pytest.raises(ValueError, match="'conv9' does not exist.*conv1, conv2, conv3, output"):
    mg.GatedNetwork(mg.ConvNet4(classes=2), ("conv9",)).init(key, (8, 8, 1))
  with pytest.raises(ValueError, match=r"expects images \(batch, height, width, channels\), got shape \(1, 8, 8\)"):
    mg.GatedNetwork(mg.ConvNet4(classes=2)).init(key, (8, 8))
  network = mg.GatedNetwork(mg.ConvNet4(classes=2))
  params = network.init(key, (32, 32, 3))
  with pytest.raises(ValueError, match=r"images of shape \(28, 28, 3\) do not fit these parameters of ConvNet4"):
    network.apply(params, jnp.ones((1, 28, 28, 3)))


@pytest.mark.parametrize(
  "model, shape, expected",
  [
    (
      mg.ConvNet4(classes=10),
      (32, 32, 3),
      [
        ("conv1", 3, 32, 32 * 32 * 27 * 32, 27 * 32 + 32),
        ("conv2", 32, 64, 16 * 16 * 288 * 64, 288 * 64 + 64),
        ("conv3", 64, 128, 8 * 8 * 576 * 128, 576 * 128 + 128),
        ("output", 2048, 10, 20480, 20490),
      ],
    ),
    (mg.MLP(classes=10), (28, 28, 1), [("hidden1", 784, 100, 78400, 78500), ("output", 100, 10, 1000, 1010)]),
  ],
)
def test_layers_of_the_papers_networks(model, shape, expected):
  layers = mg.GatedNetwork(model).layers(shape)
  assert [(l.name, l.inputs, l.outputs, l.macs, l.parameters) for l in layers] == expected
  assert [l.sources for l in layers] == [(), *((l.name,) for l in layers[:-1])]
  params = model.init(jax.random.key(0), jnp.ones((1, *shape)))
  assert sum(l.parameters for l in layers) == sum(x.size for x in jax.tree.leaves(params))


def test_seven_layer_network_has_six_convolutions_and_2048_features():
  layers = mg.GatedNetwork(mg.nn.ConvNet7(classes=100)).layers((32, 32, 3))
  assert [l.kind for l in layers] == ["conv"] * 6 + ["dense"]
  assert layers[-1].inputs == 2048 and layers[-1].outputs == 100


def test_classification_loss_ignores_padding(small_network, small_population, key):
  params = small_network.init(key, (8, 8, 1))
  loss = mg.classification_loss(small_network)
  data = small_population.train(2)
  count = int(data.count)
  padded = data.rows(jnp.arange(data.index.shape[0]))
  assert padded.weight.sum() == count < len(padded.weight)
  logits, _ = jax.jit(small_network.apply)(params, padded.images[:count])
  probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
  expected = -np.mean(np.log(probabilities[np.arange(count), padded.labels[:count]]))
  np.testing.assert_allclose(loss(params, padded), expected, rtol=1e-5)


class Dropping(nn.Module):
  """Two gated layers, one of them computed again in the backward pass, and dropout between them."""

  remat: bool = False
  rate: float = 0.5

  @nn.compact
  def __call__(self, images):
    unit = nn.remat(mg.nn.ConvUnit) if self.remat else mg.nn.ConvUnit
    x = unit(6, name="first")(images)
    x = nn.Dropout(self.rate)(x)
    x = mg.nn.ConvUnit(8, name="second")(x)
    return nn.Dense(3, name="output")(x.mean((1, 2)))


def test_a_gate_inside_remat_computes_the_same():
  networks = [mg.GatedNetwork(Dropping(remat), ("first", "second"), initial_log_odds=0.3, logit_scale=1.0) for remat in (False, True)]
  params = networks[0].init(jax.random.key(0), (6, 6, 2))
  assert jax.tree.structure(params) == jax.tree.structure(networks[1].init(jax.random.key(0), (6, 6, 2)))
  images = jax.random.normal(jax.random.key(1), (5, 6, 6, 2))
  batch = mg.data.Batch(images, jnp.arange(5) % 3, jnp.ones(5))
  for key in (None, jax.random.key(2)):
    (logits, masks), (again, other) = (jax.jit(network.apply)(params, images, key) for network in networks)
    np.testing.assert_allclose(logits, again, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, masks, other)
    assert 0 < masks["second"].mean() < 1
    gradients = [jax.jit(jax.grad(mg.classification_loss(network)))(params, batch, key) for network in networks]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *gradients)


def test_dropout_is_off_without_a_key_and_a_rows_own_with_one():
  network, certain = (mg.GatedNetwork(Dropping(rate=rate)) for rate in (0.5, 0.0))
  params = network.init(jax.random.key(0), (6, 6, 2))
  images = jax.random.normal(jax.random.key(1), (64, 6, 6, 2))
  np.testing.assert_array_equal(network.apply(params, images)[0], certain.apply(params, images)[0])
  keys = mg.core.row_keys(jax.random.key(2), 64)
  together = network.apply(params, images, keys)[0]
  apart = jnp.concatenate([network.apply(params, images[i : i + 8], keys[i : i + 8])[0] for i in range(0, 64, 8)])
  np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-6)
  # It drops half and doubles the rest: by the moments of what leaves the layer.
  dropped = mg.nn.drop(nn.Dropout(0.5), jnp.ones((64, 500)), keys)
  assert set(np.unique(dropped)) == {0, 2} and abs(dropped.mean() - 1) < 0.03
  assert mg.nn.network_layers(network.backbone, (6, 6, 2))[1].sources == ("first",)


def test_a_backbone_with_state_beside_its_parameters_is_refused():
  class Averaging(nn.Module):
    @nn.compact
    def __call__(self, images):
      x = nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(images))
      return nn.Dense(2)(x.mean((1, 2)))

  with pytest.raises(ValueError, match="Averaging keeps batch_stats beside its parameters, as nn.BatchNorm .*nn.GroupNorm or nn.LayerNorm"):
    mg.GatedNetwork(Averaging()).init(jax.random.key(0), (6, 6, 1))


def test_parameters_of_a_network_with_other_gates_are_refused(small_network):
  params = mg.GatedNetwork(small_network.backbone).init(jax.random.key(0), (8, 8, 1))
  with pytest.raises(ValueError, match="no gate for conv3.*other gated_layers"):
    small_network.apply(params, jnp.zeros((2, 8, 8, 1)))
  with pytest.raises(ValueError, match="two_stage adapts gates, but this model has none"):
    mg.two_stage(mg.classification_loss(small_network)).adapt(mg.Model(params), None)


def test_a_normalized_gate_does_not_see_the_scale_of_its_layer(key):
  """Features of any scale and offset give the same log-odds and, up to that scale, gradients of the same size in the gate's parameters."""
  gate = mg.ChannelGate(channels=6, hidden=8, initial_log_odds=0.5, logit_scale=1.0, normalize=True)
  z = jax.random.uniform(key, (5, 4, 4, 7))
  params = gate.init(jax.random.key(1), z)
  log_odds = gate.apply(params, z)
  for scaled in (100 * z, 0.5 * z, z + 3):
    np.testing.assert_allclose(gate.apply(params, scaled), log_odds, rtol=1e-3, atol=1e-3)
    of = lambda z: jax.grad(lambda p: (gate.apply(p, z) ** 2).sum())(params)["params"]["W1"]
    np.testing.assert_allclose(of(scaled), of(z), rtol=1e-2, atol=1e-2)
  pooled = np.asarray(z, np.float64).mean((1, 2))
  pooled = (pooled - pooled.mean(1, keepdims=True)) / pooled.std(1, keepdims=True)
  p = jax.tree.map(np.asarray, params["params"])
  expected = np.maximum(pooled @ p["W1"] + p["b1"], 0) @ p["W2"] + p["b2"]
  np.testing.assert_allclose(log_odds, expected, rtol=1e-3, atol=1e-3)
  assert np.isfinite(gate.apply(params, jnp.zeros_like(z))).all()


def test_the_scale_of_the_noise(small_network, key):
  params = small_network.init(jax.random.key(0), (8, 8, 1))
  images = jax.random.normal(key, (2000, 8, 8, 1))
  quiet, loud = (dataclasses.replace(small_network, noise=noise) for noise in (0.0, 2.0))
  without = small_network.apply(params, images)[1]["conv3"]
  assert (quiet.apply(params, images, jax.random.key(3))[1]["conv3"] == without).all()
  log_odds = small_network.outputs(params, images).log_odds["conv3"]
  masks = loud.apply(params, images, jax.random.key(3))[1]["conv3"]
  assert abs(float(masks.mean()) - float(jax.nn.sigmoid(log_odds / 2).mean())) < 0.02  # P(ℓ + 2g > 0) = σ(ℓ/2)
  assert ((log_odds > 0) == (without == 1)).all()


def test_channel_dropout(key):
  """Whole channels of a row go in training, what is left is scaled so that the mean stays, and inference knows nothing of it."""
  plain = mg.GatedNetwork(Scaled())
  network = dataclasses.replace(plain, dropped_layers=("unit",), dropout=0.4)
  params = network.init(jax.random.key(0), (3, 3, 8))
  images = jnp.ones((4000, 3, 3, 8))
  assert (network.apply(params, images)[0] == plain.apply(params, images)[0]).all()
  out = np.asarray(network.apply(params, images, key)[0])
  assert set(np.unique(out.round(4))) == {0.0, np.float32(1 / 0.6).round(4)}
  np.testing.assert_allclose(out.mean(0), 1, atol=0.05)
  rows = mg.core.row_keys(key, 4000)
  np.testing.assert_allclose(network.apply(params, images[:5], rows[:5])[0], out[:5], rtol=1e-6)  # a row's own, in whatever batch it is
  with pytest.raises(ValueError, match="dropped layer 'conv9' does not exist"):
    dataclasses.replace(network, dropped_layers=("conv9",)).init(jax.random.key(0), (3, 3, 8))


class Scaled(nn.Module):
  """Mean over places of a unit that is the identity."""

  @nn.compact
  def __call__(self, x):
    return Identity(name="unit")(x).mean((1, 2))


class Identity(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x * self.param("one", nn.initializers.ones, ())

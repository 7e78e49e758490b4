"""Gates: what binarize computes and differentiates, and what a vanished group means."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg


def soft_derivative(log_odds, temperature):
  """Central difference of σ(ℓ/τ) in float64."""
  log_odds = np.asarray(log_odds, np.float64)
  sigma = lambda x: 1 / (1 + np.exp(-x / temperature))
  return (sigma(log_odds + 1e-5) - sigma(log_odds - 1e-5)) / 2e-5


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.vmap(f), lambda f: jax.jit(jax.vmap(f))])
@pytest.mark.parametrize("temperature", [None, 0.5, 1.0, 3.0])
def test_binarize_values_and_gradients(wrap, temperature):
  log_odds = np.array([[-2.0, -1e-3, 0.0], [1e-3, 0.7, 30.0]], np.float32)
  incoming = np.array([[1.0, -2.0, 3.0], [0.5, 1.0, 1.0]], np.float32)
  values = wrap(lambda l: mg.binarize(l, temperature))(log_odds)
  np.testing.assert_array_equal(values, [[0, 0, 0], [1, 1, 1]])

  gradient = wrap(lambda l, g: jax.vjp(lambda l: mg.binarize(l, temperature), l)[1](g)[0])(log_odds, incoming)
  expected = incoming if temperature is None else incoming * soft_derivative(log_odds, temperature)
  np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=1e-6)


def test_binarize_keeps_dtype_and_rejects_a_temperature_of_zero():
  assert mg.binarize(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="temperature must be positive.*got 0"):
    mg.binarize(jnp.ones(3), 0.0)


def test_noisy_masks_are_on_with_the_probability_of_the_log_odds():
  log_odds = jnp.array([-2.0, 0.0, 1.0, 3.0])
  noise = mg.nn.logistic_noise(jax.random.key(0), (40_000, 4))
  rate = mg.binarize(log_odds + noise).mean(0)
  probability = 1 / (1 + np.exp(-np.asarray(log_odds)))
  # Four standard errors of a binomial proportion.
  assert np.all(np.abs(rate - probability) < 4 * np.sqrt(probability * (1 - probability) / 40_000))


def test_logistic_noise_is_the_difference_of_two_gumbels():
  gumbels = np.random.default_rng(0).gumbel(size=(2, 100_000))
  noise = np.asarray(mg.nn.logistic_noise(jax.random.key(1), (100_000,)))
  quantiles = [0.02, 0.2, 0.5, 0.8, 0.98]
  np.testing.assert_allclose(np.quantile(noise, quantiles), np.quantile(gumbels[0] - gumbels[1], quantiles), atol=0.06)


def test_gate_is_the_two_layer_network_of_the_paper():
  gate = mg.ChannelGate(channels=5, hidden=16, normalize=False)
  features = np.asarray(jax.random.normal(jax.random.key(0), (3, 6, 7, 4)))
  params = gate.init(jax.random.key(1), features)["params"]
  p = {name: np.asarray(value, np.float64) for name, value in params.items()}
  pooled = features.astype(np.float64).mean((1, 2))
  expected = np.maximum(pooled @ p["W1"] + p["b1"], 0) @ p["W2"] + p["b2"]
  np.testing.assert_allclose(gate.apply({"params": params}, features), expected, rtol=1e-5)
  assert p["W1"].shape == (4, 16) and p["W2"].shape == (16, 5)
  assert (p["b2"] == 0.5).all()  # training starts undecided, a little on the side of on


def test_a_channel_whose_group_vanishes_is_off_for_every_input():
  network = mg.GatedNetwork(mg.ConvNet4(classes=3, widths=(4, 4, 6)), ("conv3",))
  params = network.init(jax.random.key(0), (8, 8, 1))
  gate = params["gate"]["conv3"]
  gate["W2"], gate["b2"] = gate["W2"].at[:, 2].set(0), gate["b2"].at[2].set(0)
  images = 100 * jax.random.normal(jax.random.key(1), (500, 8, 8, 1))
  _, masks = network.apply(params, images)
  assert masks["conv3"][:, 2].sum() == 0
  assert masks["conv3"].sum() > 0
  # Off means out of the computation: the filter's weights do not matter any more.
  changed = jax.tree.map(lambda x: x, params)
  changed["backbone"]["conv3"]["kernel"] = params["backbone"]["conv3"]["kernel"].at[..., 2].set(1e3)
  chex.assert_trees_all_equal(network.apply(params, images)[0], network.apply(changed, images)[0])


def test_groups_are_columns_of_w2_with_their_bias():
  gate = {"conv3": {"W1": jnp.ones((4, 16)), "b1": jnp.ones(16), "W2": jnp.arange(32.0).reshape(16, 2), "b2": jnp.array([3.0, 4.0])}}
  norms = mg.optim.group_norms(mg.gate_groups, gate)
  w2, b2 = np.arange(32.0).reshape(16, 2), np.array([3.0, 4.0])
  expected = [np.linalg.norm(np.append(w2[:, c], b2[c])) for c in range(2)]
  assert list(norms) == ["conv3"]
  np.testing.assert_allclose(norms["conv3"], expected, rtol=1e-6)


def test_sparsity_counts_channels_over_all_layers():
  masks = {"a": jnp.array([[1.0, 0.0], [0.0, 0.0]]), "b": jnp.array([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])}
  np.testing.assert_allclose(mg.nn.sparsity(masks), [2 / 6, 2 / 6], rtol=1e-6)
  with pytest.raises(ValueError, match="no gated layer"):
    mg.nn.sparsity({})


def test_a_temperature_may_be_traced_and_annealed():
  """Under jit, vmap, in a scan, and as an argument that is differentiated: the threshold does not depend on it."""
  log_odds = jnp.array([[-2.0, 0.5, 1.0]])
  slope = lambda temperature: jax.grad(lambda l: mg.binarize(l, temperature).sum())(log_odds)
  temperatures = jnp.array([0.3, 1.0, 4.0])
  expected = [soft_derivative(log_odds, float(t)) for t in temperatures]
  np.testing.assert_allclose(jax.jit(jax.vmap(slope))(temperatures), expected, rtol=2e-4)
  annealed = jax.lax.scan(lambda t, _: (0.5 * t, slope(t)), 2.0, length=3)[1]
  np.testing.assert_allclose(annealed, [soft_derivative(log_odds, t) for t in (2.0, 1.0, 0.5)], rtol=2e-4)
  assert jax.grad(lambda t: mg.binarize(log_odds, t).sum())(1.0) == 0
  half = jax.grad(lambda l: mg.binarize(l, jnp.float32(0.5)).sum().astype(jnp.float32))(log_odds.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16

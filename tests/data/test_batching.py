"""Reductions in chunks are those of the whole."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss

import metagater_jax as mg


def whole_task(population, task):
  data = population.train(task)
  return data.rows(jnp.arange(data.index.shape[0]))


@pytest.mark.parametrize("rows", [1, 3, 4, 9, 100])
def test_microbatches_give_the_whole_batch(linear_problem, rows):
  """With padding, with weights that add up to less than one as a merged batch has, and to a second derivative."""
  population, _ = linear_problem
  params = {"w": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array(0.3)}
  batch = whole_task(population, 1)  # 7 samples and 2 rows of padding
  for weight in (batch.weight, batch.weight / 7, batch.weight * jnp.arange(9)):
    weighted = batch._replace(weight=weight)
    value, gradient = jax.value_and_grad(linear_loss)(params, weighted, None)
    parts = mg.data.microbatched(linear_loss, rows)
    got = jax.jit(jax.value_and_grad(parts))(params, weighted, None)
    chex.assert_trees_all_close(got, (value, gradient), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts(params, weighted), value, rtol=1e-6)
    step = lambda loss: jax.grad(lambda w: loss(jax.tree.map(lambda w, g: w - 0.3 * g, w, jax.grad(loss)(w, weighted, None)), weighted, None))(params)
    chex.assert_trees_all_close(step(parts), step(linear_loss), rtol=1e-4, atol=1e-6)


def test_microbatches_have_the_gate_noise_of_the_whole_batch(small_network, small_population, key):
  loss = mg.classification_loss(small_network)
  params = small_network.init(jax.random.key(0), (8, 8, 1))
  batch = mg.data.sample_batch(key, small_population.train(0), 12)
  plain = jax.jit(jax.value_and_grad(loss))
  expected = plain(params, batch, key)
  chex.assert_trees_all_close(jax.jit(jax.value_and_grad(mg.data.microbatched(loss, 3)))(params, batch, key), expected, rtol=1e-4, atol=1e-6)
  other = plain(params, batch, jax.random.key(99))
  assert abs(other[0] - expected[0]) > 1e-4  # the noise matters at all


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_full_batch_gradient_does_not_depend_on_chunks_or_padding(linear_problem, chunk):
  population, tasks = linear_problem
  params = {"w": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array(0.3)}
  for task, (x, y) in enumerate(tasks):
    value, gradient = mg.data.full_batch_gradient(linear_loss, params, population.train(task), chunk)
    error = x @ np.asarray(params["w"], np.float64) + 0.3 - y
    np.testing.assert_allclose(value, 0.5 * np.mean(error**2), rtol=1e-5)
    np.testing.assert_allclose(gradient["w"], x.T @ error / len(y), rtol=1e-4, atol=1e-5)

"""The local problem of Eq. (5)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import linear_loss

import metagater_jax as mg


def whole_task(population, task):
  data = population.train(task)
  return data.rows(jnp.arange(data.index.shape[0]))


def test_many_steps_reach_the_minimizer_of_the_local_problem(linear_problem, key):
  population, tasks = linear_problem
  md = {"w": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array(0.3)}
  batch = whole_task(population, 1)
  solution, _ = jax.jit(lambda md: mg.optim.local_solve(linear_loss, md, lambda i: (batch, None), prox_weight=2.0, steps=400,
                                                  optimizer=optax.sgd(0.2)))(md)
  # argmin ½|Xv − y|²/n + (λ/2)|v − md|² has a closed form.
  x, y = tasks[1]
  x = np.column_stack([x, np.ones(len(x))])
  start = np.append(np.asarray(md["w"], np.float64), 0.3)
  expected = np.linalg.solve(x.T @ x / len(x) + 2.0 * np.eye(4), x.T @ y / len(x) + 2.0 * start)
  np.testing.assert_allclose(np.append(solution["w"], solution["b"]), expected, rtol=1e-4, atol=1e-5)


def test_loss_is_the_mean_over_the_steps_without_the_pull(linear_problem, key):
  population, _ = linear_problem
  md = {"w": jnp.zeros(3), "b": jnp.array(0.0)}
  batch = whole_task(population, 0)
  v = md
  values = []
  for _ in range(3):
    values.append(linear_loss(v, batch, None))
    gradient = jax.grad(linear_loss)(v, batch, None)
    v = jax.tree.map(lambda v, g, m: v - 0.1 * (g + 4.0 * (v - m)), v, gradient, md)
  solution, loss = mg.optim.local_solve(linear_loss, md, lambda i: (batch, None), prox_weight=4.0, steps=3, optimizer=optax.sgd(0.1))
  np.testing.assert_allclose(loss, np.mean(values), rtol=1e-6)
  np.testing.assert_allclose(solution["w"], v["w"], rtol=1e-5)


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
    step = lambda loss: jax.grad(lambda w: loss(jax.tree.map(lambda w, g: w - 0.3 * g, w, jax.grad(loss)(w, weighted, None)),
                                                weighted, None))(params)
    chex.assert_trees_all_close(step(parts), step(linear_loss), rtol=1e-4, atol=1e-6)


def test_microbatches_have_the_gate_noise_of_the_whole_batch(small_network, small_population, key):
  loss = mg.classification_loss(small_network)
  params = small_network.init(jax.random.key(0), (8, 8, 1))
  batch = mg.data.sample_batch(key, small_population.train(0), 12)
  expected = jax.value_and_grad(loss)(params, batch, key)
  chex.assert_trees_all_close(jax.value_and_grad(mg.data.microbatched(loss, 3))(params, batch, key), expected, rtol=1e-4, atol=1e-6)
  other = jax.value_and_grad(loss)(params, batch, jax.random.key(99))
  assert abs(other[0] - expected[0]) > 1e-4  # the noise matters at all


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_full_batch_gradient_does_not_depend_on_chunks_or_padding(linear_problem, chunk):
  population, tasks = linear_problem
  params = {"w": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array(0.3)}
  for task, (x, y) in enumerate(tasks):
    value, gradient = mg.data.full_batch_gradient(linear_loss, params, population.train(task), chunk)
    error = x @ np.asarray(params["w"], np.float64) + 0.3 - y
    np.testing.assert_allclose(value, 0.5 * np.mean(error ** 2), rtol=1e-5)
    np.testing.assert_allclose(gradient["w"], x.T @ error / len(y), rtol=1e-4, atol=1e-5)


def test_classification_loss_ignores_padding(small_network, small_population, key):
  params = small_network.init(key, (8, 8, 1))
  loss = mg.classification_loss(small_network)
  data = small_population.train(2)
  count = int(data.count)
  padded = data.rows(jnp.arange(data.index.shape[0]))
  assert padded.weight.sum() == count < len(padded.weight)
  logits, _ = small_network.apply(params, padded.images[:count])
  probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
  expected = -np.mean(np.log(probabilities[np.arange(count), padded.labels[:count]]))
  np.testing.assert_allclose(loss(params, padded), expected, rtol=1e-5)

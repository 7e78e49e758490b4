"""The local problem of Eq. (5)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from problems import linear_loss

import metagater_jax as mg


def whole_task(population, task):
  data = population.train(task)
  return data.rows(jnp.arange(data.index.shape[0]))


def test_many_steps_reach_the_minimizer_of_the_local_problem(linear_problem, key):
  population, tasks = linear_problem
  md = {"w": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array(0.3)}
  batch = whole_task(population, 1)
  solution, _ = jax.jit(
    lambda md: mg.optim.local_solve(linear_loss, md, lambda i: (batch, None), prox_weight=2.0, steps=400, optimizer=optax.sgd(0.2))
  )(md)
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

"""Each baseline's rounds against loops over tasks in NumPy, float64, with gradients written down by hand."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss, numpy_tanh_gradient, numpy_tanh_loss, tanh_loss

import metagater_jax as mg

START = {"W": np.array([[0.4, -0.3], [0.2, 0.5], [-0.6, 0.1]]), "a": np.array([0.7, -0.9]), "b": np.array([0.1, -0.2])}


def axpy(scale, d, w):
  return {name: w[name] + scale * d[name] for name in w}


def mean(models):
  return {name: np.mean([m[name] for m in models], axis=0) for name in models[0]}


def finite_differences(f, w, step=1e-6):
  """Central differences of a function of a dict of float64 arrays."""
  gradient = {}
  for name, array in w.items():
    gradient[name] = np.zeros_like(array)
    for index in np.ndindex(array.shape):
      at = lambda h: f(
        {**w, name: np.where(np.arange(array.size).reshape(array.shape) == np.ravel_multi_index(index, array.shape), array + h, array)}
      )
      gradient[name][index] = (at(step) - at(-step)) / (2 * step)
  return gradient


# What one client does, from its model of the round and its data.


def fedavg_client(w, data, *, lr, steps, pull=0.0):
  v = w
  for _ in range(steps):
    g = axpy(pull, axpy(-1, w, v), numpy_tanh_gradient(v, *data))
    v = axpy(-lr, g, v)
  return v


def per_fedavg_client(w, data, *, lr, inner_lr, steps, kind):
  for _ in range(steps):
    w_tilde = axpy(-inner_lr, numpy_tanh_gradient(w, *data), w)
    g = numpy_tanh_gradient(w_tilde, *data)
    if kind == "exact":
      g = finite_differences(lambda v: numpy_tanh_loss(axpy(-inner_lr, numpy_tanh_gradient(v, *data), v), *data), w)
    elif kind == "hessian_free":
      norm = lambda tree: np.sqrt(sum((leaf**2).sum() for leaf in tree.values()))
      delta = 1e-2 * (1 + norm(w)) / norm(g)
      ahead, behind = (numpy_tanh_gradient(axpy(sign * delta, g, w), *data) for sign in (1, -1))
      g = axpy(-inner_lr / (2 * delta), axpy(-1, behind, ahead), g)
    w = axpy(-lr, g, w)
  return w


def pfedme_client(w, data, *, lr, personal_lr, pull, steps, inner_steps):
  theta = w
  for _ in range(steps):
    for _ in range(inner_steps):
      g = axpy(pull, axpy(-1, w, theta), numpy_tanh_gradient(theta, *data))
      theta = axpy(-personal_lr, g, theta)
    w = axpy(-lr * pull, axpy(-1, theta, w), w)
  return w


ALGORITHMS = {
  "fedavg": (lambda: mg.fedavg(tanh_loss, local_lr=0.3, local_steps=2), partial(fedavg_client, lr=0.3, steps=2), 1.0),
  "fedprox": (
    lambda: mg.federated.fedprox(tanh_loss, local_lr=0.3, local_steps=3, prox_weight=0.8),
    partial(fedavg_client, lr=0.3, steps=3, pull=0.8),
    1.0,
  ),
  "reptile": (lambda: mg.federated.reptile(tanh_loss, local_lr=0.3, local_steps=3, server_lr=0.4), partial(fedavg_client, lr=0.3, steps=3), 0.4),
  "pfedme": (
    lambda: mg.federated.pfedme(tanh_loss, local_lr=0.02, personal_lr=0.04, prox_weight=6.0, local_steps=2, inner_steps=4, server_lr=0.7),
    partial(pfedme_client, lr=0.02, personal_lr=0.04, pull=6.0, steps=2, inner_steps=4),
    0.7,
  ),
  **{
    f"per_fedavg {kind}": (
      lambda kind=kind: mg.per_fedavg(tanh_loss, local_lr=0.3, inner_lr=0.5, local_steps=2, derivative=kind),
      partial(per_fedavg_client, lr=0.3, inner_lr=0.5, steps=2, kind=kind),
      1.0,
    )
    for kind in mg.optim.DERIVATIVES
  },
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_rounds_are_loops_over_tasks(name, linear_problem, key):
  population, tasks = linear_problem
  make, client, server_lr = ALGORITHMS[name]
  algorithm = make()
  state = mg.federated_init(algorithm, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START), key)
  # The cohort is everybody and a batch is a whole task, so that no draw is left and padding occurs in every task but one.
  state, metrics = jax.jit(partial(mg.run_rounds, algorithm, rounds=2, cohort=5, batch_size=9))(state, population, jnp.arange(5))
  w = START
  for _ in range(2):
    w = axpy(server_lr, axpy(-1, w, mean([client(w, data) for data in tasks])), w)
  model = algorithm.deploy(state.server)
  moved = max(np.abs(w[leaf] - START[leaf]).max() for leaf in w)
  for leaf in w:
    np.testing.assert_allclose(model.params[leaf], w[leaf], atol=2e-4 * moved, err_msg=leaf)
  assert np.isfinite(metrics["loss"]).all()


def test_the_three_meta_gradients_differ_where_there_is_curvature(linear_problem):
  _, tasks = linear_problem
  kinds = ("first_order", "hessian_free", "exact")
  results = [per_fedavg_client(START, tasks[0], lr=0.3, inner_lr=0.5, steps=1, kind=kind) for kind in kinds]
  distance = lambda a, b: max(np.abs(a[name] - b[name]).max() for name in a)
  first_order, hessian_free, exact = results
  assert distance(first_order, exact) > 0.05
  assert distance(hessian_free, exact) < 0.01 * distance(first_order, exact)


def rounds_of(algorithm, population, key, params, rounds=3, batch_size=4):
  state = mg.federated_init(algorithm, params, key)
  run = jax.jit(partial(mg.run_rounds, algorithm, rounds=rounds, cohort=3, batch_size=batch_size))
  return algorithm.deploy(run(state, population, jnp.arange(5))[0].server).params


def test_limits_in_which_the_methods_are_one(linear_problem, key):
  population, _ = linear_problem
  params = {"w": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array(0.3)}
  run = partial(rounds_of, population=population, key=key, params=params)
  one_step = run(mg.fedavg(linear_loss, local_lr=0.1))
  # With one local step a pull to where one starts does nothing, and Reptile at ε is FedAvg at the rate εη.
  chex.assert_trees_all_equal(run(mg.federated.fedprox(linear_loss, local_lr=0.1, prox_weight=5.0)), one_step)
  chex.assert_trees_all_close(run(mg.federated.reptile(linear_loss, local_lr=0.2, server_lr=0.5, local_steps=1)), one_step, rtol=1e-5)
  # One local round of pFedMe with one inner step moves by η λ (inner rate) times the gradient: FedAvg at that rate. Both
  # see whole tasks, since their draws are not the same.
  whole = partial(run, batch_size=9)
  pfedme = mg.federated.pfedme(linear_loss, local_lr=0.5, personal_lr=0.05, prox_weight=4.0, inner_steps=1)
  chex.assert_trees_all_close(whole(pfedme), whole(mg.fedavg(linear_loss, local_lr=0.5 * 4.0 * 0.05)), rtol=1e-5)
  many = run(mg.fedavg(linear_loss, local_lr=0.1, local_steps=4))
  chex.assert_trees_all_close(run(mg.federated.fedprox(linear_loss, local_lr=0.1, local_steps=4, prox_weight=1e-6)), many, rtol=1e-4)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(run(mg.federated.fedprox(linear_loss, local_lr=0.1, local_steps=4, prox_weight=2.0)), many, rtol=1e-3)


def test_first_order_per_fedavg_uses_two_different_batches(small_network, small_population, key):
  """With a minute inner rate it is FedAvg on the second batch; its two draws must not be the same batch."""
  seen = []
  algorithm = mg.per_fedavg(lambda params, batch, key: jnp.sum(params * batch.labels[0]), local_lr=0.1, inner_lr=0.1, local_steps=2)

  def draw(i):
    seen.append(int(i))
    return mg.data.sample_batch(jax.random.fold_in(key, i), small_population.train(0), 4), key

  with jax.disable_jit():
    algorithm.client_update(jnp.ones(2), draw)
  assert sorted(set(seen)) == [0, 1, 2, 3] and algorithm.draws == 4


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: mg.fedavg(linear_loss, local_lr=0.0), "local_lr must be positive, got 0.0"),
    (lambda: mg.federated.fedprox(linear_loss, local_lr=0.1, prox_weight=-1.0), "prox_weight must be positive, got -1"),
    (lambda: mg.federated.reptile(linear_loss, local_lr=0.1, server_lr=0.0), "server_lr must be positive"),
    (
      lambda: mg.federated.pfedme(linear_loss, local_lr=0.1, personal_lr=0.1, inner_steps=0),
      "inner_steps must be a whole number of at least 1, got 0",
    ),
    (lambda: mg.per_fedavg(linear_loss, local_lr=0.1, inner_lr=-0.1), "inner_lr must be positive"),
    (
      lambda: mg.per_fedavg(linear_loss, local_lr=0.1, inner_lr=0.1, derivative="hesian_free"),
      "unknown derivative 'hesian_free'. Did you mean 'hessian_free'",
    ),
  ],
)
def test_bad_options_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()

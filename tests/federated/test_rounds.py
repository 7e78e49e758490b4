"""A communication round against a NumPy loop over tasks, and what must not change it."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import linear_loss

import metagater_jax as mg


def numpy_rounds(tasks, w, *, rounds, steps, lr, prox_weight, beta, mu, weights):
  """Algorithm 1 on linear regression as loops over rounds and tasks, in float64; returns ag. ℓ1 on all of w, γ = tβ/2."""
  soft = lambda x, s: np.sign(x) * np.maximum(np.abs(x) - s, 0)
  x, ag = w.copy(), w.copy()
  for t in range(1, rounds + 1):
    alpha, gamma = 2 / (t + 1), t * beta / 2
    md = (1 - alpha) * ag + alpha * x
    d = np.zeros_like(w)
    for (features, y), weight in zip(tasks, weights):
      features = np.column_stack([features, np.ones(len(y))])
      v = md.copy()
      for _ in range(steps):
        v = v - lr * (features.T @ (features @ v - y) / len(y) + prox_weight * (v - md))
      d += weight * prox_weight * (md - v)
    x = soft(x - gamma * d, gamma * mu)
    ag = soft(md - beta * d, beta * mu)
  return ag


@pytest.mark.parametrize(
  "task_axis, steps, devices, weighted",
  [
    ("vmap", 3, 1, False),
    ("map", 3, 1, True),
    (2, 3, 1, False),
    ("merged", 1, 1, True),
    ("merged", 1, 1, False),
    ("map", 3, 2, False),
    ("vmap", 3, 8, True),
    ("merged", 1, 4, True),
  ],
)
def test_rounds_are_a_loop_over_tasks(linear_problem, key, task_axis, steps, devices, weighted):
  population, tasks = linear_problem
  sizes = np.array([len(y) for _, y in tasks])
  weights = sizes / sizes.sum() if weighted else np.full(5, 0.2)
  expected = numpy_rounds(tasks, np.array([0.5, -1.0, 0.2, 0.3]), rounds=4, steps=steps, lr=0.05, prox_weight=3.0, beta=0.2, mu=0.05, weights=weights)
  algorithm = mg.metagater(linear_loss, local_lr=0.05, prox_weight=3.0, local_steps=steps, beta=0.2, penalty=mg.l1(), penalty_weight=0.05)
  state = mg.federated_init(algorithm, {"w": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array(0.3)}, key)
  # The cohort is everybody and a batch is a whole task, so that no draw is left and padding occurs in every task but one.
  rounds = jax.jit(partial(mg.run_rounds, algorithm, rounds=4, cohort=5, batch_size=9, weighted=weighted, task_axis=task_axis, mesh=mesh_of(devices)))
  state, metrics = rounds(state, population, jnp.arange(5))
  model = algorithm.deploy(state.server).params
  np.testing.assert_allclose(np.append(model["w"], model["b"]), expected, rtol=2e-5, atol=1e-6)
  assert state.round == 4 and metrics["loss"].shape == (4,)


def mesh_of(devices):
  """None for one device, so that the plain path is tested; five tasks on two, four or eight devices need padding."""
  return mg.core.task_mesh(jax.devices()[:devices]) if devices > 1 else None


@pytest.fixture(scope="module")
def gated(small_network, small_population):
  algorithm = mg.metagater(
    mg.classification_loss(small_network),
    local_lr=0.1,
    local_steps=2,
    penalty=mg.on_part(mg.group_lasso(mg.gate_groups), "gate"),
    penalty_weight=0.01,
  )
  params = small_network.init(jax.random.key(0), (8, 8, 1))
  return algorithm, mg.federated_init(algorithm, params, jax.random.key(1)), small_population


def test_several_rounds_per_dispatch_are_single_rounds(gated):
  algorithm, state, population = gated
  clients, options = jnp.arange(6), dict(cohort=3, batch_size=8)
  together, metrics = jax.jit(partial(mg.run_rounds, algorithm, rounds=3, **options))(state, population, clients)
  one = jax.jit(partial(mg.federated.federated_round, algorithm, **options))
  losses = []
  for _ in range(3):
    state, single = one(state, population, clients)
    losses.append(single["loss"])
  chex.assert_trees_all_close(together.server, state.server, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)


def test_order_and_padding_of_tasks_do_not_change_a_round(gated):
  algorithm, state, population = gated
  one = partial(mg.federated.federated_round, algorithm, cohort=6, batch_size=8)
  expected, _ = jax.jit(one)(state, population, jnp.arange(6))
  # Another order of the clients: the cohort is everybody, in another order.
  shuffled, _ = jax.jit(one)(state, population, jnp.array([4, 1, 5, 0, 3, 2]))
  chex.assert_trees_all_close(shuffled.server, expected.server, rtol=1e-4, atol=1e-6)
  # Rubbish behind each task's samples.
  rubbish = np.asarray(population.train_index).copy()
  for task, count in enumerate(population.train_count):
    rubbish[task, int(count) :] = 399
  padded, _ = jax.jit(one)(state, population._replace(train_index=jnp.asarray(rubbish)), jnp.arange(6))
  chex.assert_trees_all_close(padded.server, expected.server, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("task_axis, devices", [("vmap", 1), (2, 1), (3, 1), ("map", 8), ("vmap", 2)])
def test_how_tasks_are_mapped_does_not_change_a_round(gated, task_axis, devices):
  algorithm, state, population = gated
  run = lambda how, devices=1: jax.jit(
    partial(mg.federated.federated_round, algorithm, cohort=4, batch_size=8, task_axis=how, mesh=mesh_of(devices))
  )(state, population, jnp.arange(6))[0]
  chex.assert_trees_all_close(run(task_axis, devices).server, run("map").server, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_merged_batch_gives_the_mean_of_the_nodes_gate_noise_included(small_network, gated, devices):
  """Tasks smaller than a batch are among them, so rows of padding are too."""
  _, state, population = gated
  algorithm = mg.metagater(mg.classification_loss(small_network), local_lr=0.1)
  assert algorithm.mergeable
  run = lambda **options: jax.jit(partial(mg.run_rounds, algorithm, rounds=3, cohort=5, batch_size=20, weighted=True, **options))(
    state, population, jnp.arange(6)
  )
  (expected, losses), (merged, merged_losses) = run(task_axis="map"), run(task_axis="merged", mesh=mesh_of(devices))
  chex.assert_trees_all_close(merged.server, expected.server, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(merged_losses["loss"], losses["loss"], rtol=1e-5)


def test_what_cannot_be_merged_says_so(linear_problem, key):
  population, _ = linear_problem
  algorithm = mg.fedavg(linear_loss, local_lr=0.1, local_steps=2)
  with pytest.raises(ValueError, match="'merged' needs an algorithm whose mean update.*one local step"):
    mg.federated.federated_round(
      algorithm,
      mg.federated_init(algorithm, {"w": jnp.zeros(3), "b": jnp.array(0.0)}, key),
      population,
      jnp.arange(5),
      cohort=2,
      batch_size=4,
      task_axis="merged",
    )


def test_a_plan_depends_on_key_and_round_alone(linear_problem, key):
  """So rounds may be planned in any blocks, padded for any number of devices, by any process."""
  population, _ = linear_problem
  plan = partial(mg.federated.plan_rounds, key, counts=population.train_count, tasks=jnp.arange(5), cohort=3, batch_size=4, draws=2)
  whole = plan(start=0, rounds=6)
  chex.assert_trees_all_equal(jax.tree.map(lambda x: x[2:5], whole), plan(start=2, rounds=3))
  padded = plan(start=0, rounds=6, multiple=4)
  chex.assert_trees_all_equal(jax.tree.map(lambda x: x[:, :3], padded), whole)
  assert padded.share.shape == (6, 4) and (padded.share[:, 3] == 0).all()
  np.testing.assert_allclose(padded.share.sum(1), 1, rtol=1e-6)
  size = np.asarray(population.train_count)[np.asarray(whole.tasks)][:, :, None, None]
  np.testing.assert_array_equal(whole.weight, np.asarray(whole.positions) < size)


def test_a_mesh_that_does_not_fit():
  plan = mg.federated.plan_rounds(jax.random.key(0), 0, jnp.full(5, 9), jnp.arange(5), rounds=1, cohort=3, batch_size=2)
  pool = mg.data.Pool(None, None, jnp.ones(2))
  follow = lambda mesh: mg.federated.follow_plan(mg.fedavg(linear_loss, local_lr=0.1), {}, plan, None, pool, mesh=mesh)
  with pytest.raises(ValueError, match="3 tasks cannot be spread evenly over 2 devices; a multiple of 2 can"):
    follow(mesh_of(2))
  with pytest.raises(ValueError, match="must have one axis, 'tasks', but has .'x',."):
    follow(jax.make_mesh((3,), ("x",), devices=jax.devices()[:3]))


def test_a_run_goes_on_from_a_saved_state_as_if_it_had_not_stopped(gated):
  algorithm, state, population = gated
  step = jax.jit(partial(mg.run_rounds, algorithm, rounds=2, cohort=3, batch_size=8))
  halfway, _ = step(state, population, jnp.arange(6))
  # Through NumPy and back, as a checkpoint would: nothing but arrays is in the state.
  saved = jax.device_get(halfway._replace(key=jax.random.key_data(halfway.key)))
  restored = saved._replace(key=jax.random.wrap_key_data(jnp.asarray(saved.key)))
  chex.assert_trees_all_equal(step(restored, population, jnp.arange(6))[0].server, step(halfway, population, jnp.arange(6))[0].server)


def test_cohorts_are_drawn_without_replacement_and_evenly():
  clients = jnp.array([3, 5, 8, 9, 11, 20])
  cohorts = np.asarray(jax.vmap(lambda k: mg.federated.sample_cohort(k, clients, 2))(jax.random.split(jax.random.key(0), 3000)))
  assert (cohorts[:, 0] != cohorts[:, 1]).all()
  counts = np.array([(cohorts == c).sum() for c in np.asarray(clients)])
  assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 2 / 3)  # five standard deviations
  with pytest.raises(ValueError, match="cohort of 7 is larger than the 6 tasks"):
    mg.federated.sample_cohort(jax.random.key(0), clients, 7)


def test_metagater_reduces_the_meta_objective(linear_problem, key):
  population, tasks = linear_problem
  algorithm = mg.metagater(linear_loss, local_lr=0.05, prox_weight=3.0, local_steps=20, beta=0.1)
  state = mg.federated_init(algorithm, {"w": jnp.zeros(3), "b": jnp.array(0.0)}, key)
  state, _ = jax.jit(partial(mg.run_rounds, algorithm, rounds=300, cohort=5, batch_size=9))(state, population, jnp.arange(5))
  model = algorithm.deploy(state.server).params
  # The mean of Moreau envelopes of quadratics is a quadratic; its minimizer in closed form.
  matrix, right = np.zeros((4, 4)), np.zeros(4)
  for x, y in tasks:
    x = np.column_stack([x, np.ones(len(y))])
    hessian = x.T @ x / len(y)
    shrink = np.linalg.solve(hessian + 3.0 * np.eye(4), 3.0 * np.eye(4))
    matrix += shrink @ hessian
    right += shrink @ x.T @ y / len(y)
  np.testing.assert_allclose(np.append(model["w"], model["b"]), np.linalg.solve(matrix, right), rtol=0.02, atol=0.01)


def test_a_transformation_in_front_of_the_server(linear_problem, key):
  population, _ = linear_problem
  params = {"w": jnp.zeros(3), "b": jnp.array(0.0)}
  plain = mg.metagater(linear_loss, local_lr=0.05, beta=0.1)
  clipped = mg.metagater(linear_loss, local_lr=0.05, beta=0.1, before_server=optax.clip_by_global_norm(1e-3))
  for algorithm, limit in ((plain, None), (clipped, 1e-4)):
    state, _ = mg.federated.federated_round(algorithm, mg.federated_init(algorithm, params, key), population, jnp.arange(5), cohort=5, batch_size=9)
    moved = optax.tree.norm(algorithm.deploy(state.server).params)
    assert moved > 1e-2 if limit is None else moved <= limit * 1.001


@pytest.mark.parametrize("option", ["local_lr", "prox_weight", "local_steps"])
def test_rates_must_be_positive(option):
  with pytest.raises(ValueError, match=f"{option} must be .*, got -1"):
    mg.metagater(linear_loss, **{"local_lr": 0.1, option: -1})


@pytest.mark.parametrize(
  "make",
  [
    lambda loss: mg.fedavg(loss, local_lr=0.1),
    lambda loss: mg.metagater(loss, local_lr=0.1),
    lambda loss: mg.per_fedavg(loss, local_lr=0.1, inner_lr=0.1),
    lambda loss: mg.federated.federated_pruning(
      lambda loss: mg.metagater(loss, local_lr=0.1),
      loss,
      mg.pruning.sparsity_schedule("one_shot", 0.5),
      mg.pruning.magnitude(),
      prunable=lambda name, leaf: name == "w",
    ),
  ],
)
def test_a_donated_state_leaves_the_callers_parameters_and_key(linear_problem, make):
  """So that a second algorithm can start from them."""
  population, _ = linear_problem
  params, key = {"w": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array(0.3)}, jax.random.key(3)
  algorithm = make(linear_loss)
  rounds = jax.jit(partial(mg.run_rounds, algorithm, rounds=1, cohort=2, batch_size=4), donate_argnums=0)
  models = [algorithm.deploy(rounds(mg.federated_init(algorithm, params, key), population, jnp.arange(5))[0].server) for _ in range(2)]
  jax.tree.map(np.testing.assert_array_equal, *models)
  np.testing.assert_allclose(params["w"], [0.5, -1.0, 0.2])
  assert jax.random.key_data(key).shape == (2,)


def test_a_donated_meta_state_leaves_the_callers_parameters_and_key():
  params, key = {"w": jnp.ones(3)}, jax.random.key(3)
  learner = mg.maml(lambda p, batch, key: jnp.sum((p["w"] - batch) ** 2), inner_lr=0.1)
  optimizer = optax.adam(0.1)
  steps = jax.jit(
    partial(mg.fewshot.run_meta_steps, learner, optimizer, lambda key, data: mg.data.Episode(data, data), steps=1, episodes=1), donate_argnums=0
  )
  for _ in range(2):
    steps(mg.fewshot.meta_init(learner, optimizer, params, key), jnp.zeros(3))
  assert params["w"].sum() == 3 and jax.random.key_data(key).shape == (2,)


@pytest.mark.parametrize("option", ["rounds", "cohort", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_rounds_want_counts(linear_problem, key, option, value):
  algorithm = mg.fedavg(linear_loss, local_lr=0.1)
  state = mg.federated_init(algorithm, {"w": jnp.zeros(3), "b": jnp.array(0.0)}, key)
  with pytest.raises(ValueError, match=f"{option} must be a whole number of at least 1, got {value}"):
    mg.run_rounds(algorithm, state, linear_problem[0], jnp.arange(5), **{"rounds": 1, "cohort": 2, "batch_size": 4} | {option: value})

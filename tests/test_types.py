"""Results have their input's types: half, single and, where JAX has it, double precision, in everything that changes parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import tanh_loss

import metagater_jax as mg

ALL = [(False, jnp.bfloat16), (True, jnp.float32), (True, jnp.float64)]
PENALTIES = {
  "l1": mg.l1(),
  "group_lasso": mg.group_lasso(),
  "sizes": mg.group_lasso(size_weighted=True),
  "none": mg.optim.no_penalty(),
  "part": mg.on_part(mg.group_lasso(), "W"),
}


def prune(loss):
  score = mg.pruning.anp(mg.maml(loss, inner_lr=0.1).meta_loss)
  return mg.federated.federated_pruning(partial(mg.fedavg, local_lr=0.1), loss, mg.pruning.sparsity_schedule("one_shot", 0.5, begin=1), score)


ALGORITHMS = {
  "fedavg": lambda loss: mg.fedavg(loss, local_lr=np.float32(0.1)),
  "fedprox": lambda loss: mg.federated.fedprox(loss, local_lr=0.1, local_steps=2),
  "reptile": lambda loss: mg.federated.reptile(loss, local_lr=0.1),
  "pfedme": lambda loss: mg.federated.pfedme(loss, local_lr=0.1, personal_lr=0.1),
  "microbatched": lambda loss: mg.fedavg(mg.data.microbatched(loss, 2), local_lr=0.1),
  "pruned": prune,
  **{f"per_fedavg_{d}": lambda loss, d=d: mg.per_fedavg(loss, local_lr=0.1, inner_lr=0.1, derivative=d) for d in mg.optim.DERIVATIVES},
  **{
    f"metagater_{g}": lambda loss, g=g: mg.metagater(
      loss, local_lr=0.1, gamma=g, penalty=mg.l1(), penalty_weight=0.01, beta=optax.linear_schedule(0.02, 0.01, 9)
    )
    for g in mg.optim.GAMMA_SCHEDULES
  },
}


@pytest.fixture(params=ALL, ids=lambda case: f"{'x64-' * case[0]}{case[1].__name__}")
def problem(request):
  """(parameters, population) in a type, with JAX's 64-bit types or without."""
  x64, dtype = request.param
  with jax.enable_x64(x64):
    rng = np.random.default_rng(0)
    params = {"W": jnp.asarray(rng.normal(size=(3, 4)), dtype), "a": jnp.asarray(rng.normal(size=4), dtype), "b": jnp.zeros(4, dtype)}
    parts = tuple(np.arange(i, 24, 3) for i in range(3))
    yield params, mg.make_population(rng.normal(size=(24, 3)).astype(np.float32), np.arange(24) % 2, mg.data.Partition(parts, parts))


def same_types(found, params):
  assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, params)
  assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rounds(problem, name):
  params, population = problem
  loss = lambda *args: tanh_loss(*args)
  loss.rowwise = True
  algorithm = ALGORITHMS[name](loss)
  for task_axis in ("map", *(["merged", "vmap"] if name == "fedavg" else [])):
    state = mg.federated_init(algorithm, params, jax.random.key(0))
    state, _ = mg.run_rounds(algorithm, state, population, jnp.arange(3), rounds=2, cohort=2, batch_size=4, task_axis=task_axis)
    same_types(algorithm.deploy(state.server).params, params)


@pytest.mark.parametrize("derivative", mg.optim.DERIVATIVES)
def test_meta_gradients_and_scores(problem, derivative):
  params, population = problem
  episode = mg.data.Episode(*(population.train(i).rows(jnp.arange(6)) for i in range(2)))
  for rate in (np.float32(0.1), jnp.float32(0.1)):
    same_types(mg.maml(tanh_loss, inner_lr=rate, inner_steps=2, derivative=derivative).meta_gradient(params, episode)[1], params)
  learner = mg.maml(tanh_loss, inner_lr=0.1, learn_rates=True, derivative=derivative)
  same_types(learner.meta_gradient(learner.init(params), episode)[1]["weights"], params)
  same_types(mg.fewshot.meta_reptile(tanh_loss, inner_lr=0.1, inner_steps=2).meta_gradient(params, episode)[1], params)
  if derivative == "hessian_free":
    return
  for score in (
    mg.pruning.anp(mg.maml(tanh_loss, inner_lr=0.1, derivative=derivative).meta_loss),
    mg.pruning.snip(tanh_loss),
    mg.pruning.magnitude(),
    mg.pruning.random(),
  ):
    found = score.on_task(params, episode, jax.random.key(0))
    same_types(found, params)
    for granularity in mg.pruning.GRANULARITIES:
      same_types(mg.make_mask(found, 0.5, granularity=granularity), params)


def test_personalizers_and_masks(problem):
  params, population = problem
  mask = {"W": jnp.ones((3, 4), jnp.float32).at[0].set(0), "a": jnp.ones(4), "b": jnp.ones(4)}  # of another type than the parameters
  for personalizer in (mg.fine_tune(tanh_loss, lr=np.float32(0.1)), mg.metasnip(tanh_loss, sparsity=0.5)):
    for model in (mg.Model(params), mg.Model(mg.pruning.apply_mask(params, mask), mask)):
      adapted = personalizer.adapt(model, population.train(0))
      same_types(adapted.params, params)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_and_the_transform_in_a_loop(problem, name):
  params, penalty = problem[0], PENALTIES[name]
  same_types(penalty.prox(jax.tree.map(lambda x: (300 * x).astype(jnp.float16), params), 0.1), jax.tree.map(jnp.float16, params))  # squares overflow
  for step in (0.1, np.float32(0.1), jnp.asarray(0.1)):
    same_types(jax.jit(penalty.prox)(params, step), params)
  for gamma in ("nesterov", 0.1):
    transform = mg.accelerated_proximal(penalty, optax.constant_schedule(0.1), gamma=gamma, penalty_weight=optax.constant_schedule(0.1))

    def step(carry, _, transform=transform):
      w, state = carry
      updates, state = transform.update(jax.tree.map(jnp.ones_like, w), state, w)
      return (optax.apply_updates(w, updates), state), None

    (w, state), _ = jax.lax.scan(step, (params, transform.init(params)), length=3)
    same_types((w, state.x, state.ag), (params, params, params))


def test_pruning_while_training(problem):
  params = problem[0]
  optimizer = mg.gradual_pruning(optax.adam(0.1), mg.pruning.sparsity_schedule("linear", 0.5, begin=0, end=3))

  def step(carry, _):
    w, state = carry
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, w), state, w)
    return (optax.apply_updates(w, updates), state), None

  (w, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=4)
  same_types(w, params)
  assert float((w["W"] == 0).mean()) == 0.5


def test_whole_numbers_stay_so():
  """Counters among the parameters are no business of a penalty, but must pass it."""
  params = {"w": jnp.array([3.0, -0.2]), "count": jnp.array([3, 0])}
  for penalty in PENALTIES.values():
    if penalty is not PENALTIES["part"]:
      assert penalty.prox(params, 0.5)["count"].dtype == params["count"].dtype
  assert mg.pruning.apply_mask(params, jax.tree.map(jnp.ones_like, params))["count"].dtype == params["count"].dtype

"""Meta-training on episodes: the jitted loop that runs any `MetaLearner` with any optax optimizer, pruned while it trains or not."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from metagater_jax.core.checks import check_counts
from metagater_jax.core.tasks import TASK_AXIS, check_mesh, map_tasks, sum_over_tasks
from metagater_jax.core.trees import Model, Params
from metagater_jax.data.population import Episode
from metagater_jax.fewshot.learners import MetaLearner
from metagater_jax.personalize.personalizer import Personalizer
from metagater_jax.pruning.scores import Score
from metagater_jax.pruning.transform import find_pruning

__all__ = ["MetaState", "evaluate_episodes", "meta_init", "run_meta_steps"]


class MetaState(NamedTuple):
  """Everything a run needs to go on. Step t's randomness is a function of (key, t).

  Attributes:
    step: () integer, meta-steps done.
    key: the run's.
    params: the meta-parameters.
    optimizer: its state (masks too).
  """

  step: jax.Array
  key: jax.Array
  params: Params
  optimizer: Any


def meta_init(learner: MetaLearner, optimizer: optax.GradientTransformation, params: Params, key: jax.Array) -> MetaState:
  """The state before the first step, from a network's parameters.

  Args:
    learner: what is trained.
    optimizer: the outer one.
    params: of the network.
    key: the run's.

  Returns:
    The state. It has arrays of its own, so that it can be donated while the parameters and the key stay the caller's.
  """
  params, key = jax.tree.map(jnp.copy, (learner.init(params), key))
  return MetaState(jnp.zeros((), jnp.int32), key, params, jax.tree.map(jnp.copy, optimizer.init(params)))


def run_meta_steps(
  learner: MetaLearner,
  optimizer: optax.GradientTransformation,
  sample: Callable[..., Episode],
  state: MetaState,
  data: Any = None,
  *,
  steps: int,
  episodes: int,
  score: Score | None = None,
  score_episodes: int = 0,
  task_axis: str | int = "auto",
  mesh: Mesh | None = None,
) -> tuple[MetaState, dict[str, jax.Array]]:
  """`steps` outer steps in one program: w ← optimizer(w, mean over episodes of the meta-gradient).

  To be jitted with the state donated, and data as an argument (not captured):

      sample = lambda key, pool: mg.fewshot.sample_episode(key, pool, ways=5, shots=1, queries=15)
      step = jax.jit(partial(mg.fewshot.run_meta_steps, learner, optimizer, sample, steps=100, episodes=4), donate_argnums=0)
      state, metrics = step(state, pool)

  With `gradual_pruning` in the optimizer, its mask holds in the inner loop too.

  Args:
    learner: what is computed on an episode.
    optimizer: the outer one, any optax optimizer.
    sample: `(key, data) -> Episode`.
    state: from `meta_init` or the steps before.
    data: what `sample` draws from, as a `ClassPool`.
    steps: how many.
    episodes: per step.
    score: of the meta-parameters on episodes, for `gradual_pruning` in the optimizer; computed when its schedule is due, with the mask of
      what is pruned by then.
    score_episodes: how many fresh episodes the score gets.
    task_axis: see `map_tasks`.
    mesh: `task_mesh`, over which episodes are spread.

  Returns:
    The state after the last step, and metrics of shape (steps,): `loss`, the mean query loss.

  Raises:
    ValueError: numbers of steps or episodes that are no counts, or that the devices do not divide.
  """
  check_counts(steps=steps, episodes=episodes)
  devices = 1 if mesh is None else mesh.size
  if mesh is not None:
    check_mesh(mesh, episodes)
    check_mesh(mesh, score_episodes)
  axis_name = None if mesh is None else TASK_AXIS

  def own_keys(key, count):
    """The keys of this device's episodes; an episode is a function of the step and its number."""
    first = 0 if mesh is None else jax.lax.axis_index(TASK_AXIS) * (count // devices)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count // devices))

  def run(state, data):
    def one(state, _):
      train_key, score_key = jax.random.split(jax.random.fold_in(state.key, state.step))
      pruning = find_pruning(state.optimizer)
      mask = None if pruning is None else pruning.mask
      keys = own_keys(train_key, episodes)
      loss, gradient = sum_over_tasks(
        lambda key: learner.meta_gradient(state.params, sample(key, data), mask=mask), keys, jnp.full(keys.shape[0], 1 / episodes), task_axis
      )
      if mesh is not None:
        loss, gradient = jax.lax.psum((loss, gradient), TASK_AXIS)
      extra = {}
      if score is not None:
        drawn = lambda: jax.vmap(lambda key: sample(key, data))(own_keys(score_key, score_episodes))
        extra["score"] = lambda: score(
          state.params, None if score.contribution is None else drawn(), score_key, mask, task_axis=task_axis, axis_name=axis_name
        )
      updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params, **extra)
      params = optax.apply_updates(state.params, updates)
      return MetaState(state.step + 1, state.key, params, optimizer_state), {"loss": loss}

    return jax.lax.scan(one, state, length=steps)

  if mesh is not None:
    everywhere = PartitionSpec()
    run = jax.shard_map(run, mesh=mesh, in_specs=(everywhere, everywhere), out_specs=everywhere, check_vma=False)
  return run(state, data)


def evaluate_episodes(
  personalizer: Personalizer,
  logits: Callable[[Params, jax.Array], jax.Array],
  sample: Callable[..., Episode],
  model: Model,
  key: jax.Array,
  data: Any = None,
  *,
  episodes: int,
  calibration: Any = None,
  task_axis: str | int = "auto",
  mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Accuracy on the queries of so many episodes, before and after adaptation to their support, each (episodes,).

  Args:
    personalizer: adapts, a learner's own (`learner.personalizer`) or any other.
    logits: `(params, images) -> (batch, ways)` of the network.
    sample: `(key, data) -> Episode`.
    model: what an episode starts from, as `learner.deploy` gives it; what its mask removes stays removed.
    key: that the episodes are a function of: the same for what is to be compared in pairs.
    data: what `sample` draws from.
    calibration: of the personalizer; of a learner's own what `learner.deploy` gives.
    episodes, task_axis, mesh: as in `run_meta_steps`.

  Returns:
    Both, as fractions.

  Raises:
    ValueError: episodes that are no count, or that the devices do not divide.
  """
  check_counts(episodes=episodes)
  if mesh is not None:
    check_mesh(mesh, episodes)

  def run(keys, model, calibration, data):
    def one(key):
      support, query = sample(key, data)
      right = lambda params: jnp.argmax(logits(params, query.images), -1) == query.labels
      accuracy = lambda params: jnp.sum(right(params) * query.weight) / jnp.maximum(query.weight.sum(), 1)
      return accuracy(model.params), accuracy(personalizer.adapt(model, support, calibration).params)

    return map_tasks(one, keys, task_axis)

  if mesh is not None:
    spread, everywhere = PartitionSpec(TASK_AXIS), PartitionSpec()
    run = jax.shard_map(run, mesh=mesh, in_specs=(spread, everywhere, everywhere, everywhere), out_specs=spread, check_vma=False)
  return run(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(episodes)), model, calibration, data)

"""Communication rounds: the jitted loop that runs any federated algorithm.

Whatever is random in a round is decided before it is computed, in a `RoundPlan`: a function of the run's key and the round's
number alone. Rounds are planned many at a time, so that drawing costs nothing beside computing; what a plan asks for can be
read from a disk while earlier rounds run (`metagater_jax.federated.host_tasks`); and a plan's clients can be spread over any number of
devices or processes without a change in what each of them draws.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from metagater_jax.core.checks import check_counts
from metagater_jax.core.random import row_keys, sample_positions
from metagater_jax.core.tasks import TASK_AXIS, check_mesh, resolve_task_axis, sum_over_tasks
from metagater_jax.core.trees import like
from metagater_jax.data.population import Minibatches, Pool, Population, own_positions
from metagater_jax.federated.algorithm import FederatedAlgorithm, FederatedState

__all__ = ["RoundPlan", "federated_round", "follow_plan", "plan_rounds", "run_rounds", "sample_cohort"]

# At most so many rounds are planned at a time.
_PLANNED = 20


class RoundPlan(NamedTuple):
  """What is random in a round, with any leading axes (rounds).

  Attributes:
    tasks: (…, clients) numbers of the cohort's tasks. Clients beyond the cohort are padding: a task once more.
    share: (…, clients) their parts in the mean; they add up to 1, padding has 0.
    positions: (…, clients, draws, batch) which samples of its task a client draws; numbers from the task's size on are padding.
    weight: (…, clients, draws, batch) of the samples: 1, or 0 for padding.
    keys: (…, clients, draws) for what is random inside the model.
  """

  tasks: jax.Array
  share: jax.Array
  positions: jax.Array
  weight: jax.Array
  keys: jax.Array


def sample_cohort(key: jax.Array, tasks: jax.Array, size: int) -> jax.Array:
  """`size` different entries of `tasks`, uniformly.

  Args:
    key: that the draw is a function of.
    tasks: (tasks,) numbers.
    size: of the cohort.

  Returns:
    (size,) numbers.

  Raises:
    ValueError: a cohort larger than the tasks.
  """
  if size > tasks.shape[0]:
    raise ValueError(f"the cohort of {size} is larger than the {tasks.shape[0]} tasks there are to train on.")
  return tasks[sample_positions(key, jnp.array(tasks.shape[0]), size)]


def plan_rounds(
  key: jax.Array,
  start: jax.Array,
  counts: jax.Array,
  tasks: jax.Array,
  *,
  rounds: int,
  cohort: int,
  batch_size: int,
  draws: int = 1,
  weighted: bool = False,
  multiple: int = 1,
) -> RoundPlan:
  """The plan of rounds `start` … `start + rounds − 1`.

  A client's randomness is a function of (key, round, task number), so neither its place in the cohort nor the padding beside
  it changes what it computes.

  Args:
    key: the run's.
    start: number of the first round.
    counts: (tasks,) train samples of each task of the population.
    tasks: (training tasks,) their numbers in the population.
    rounds: how many.
    cohort: clients per round, drawn without replacement.
    batch_size: of the clients' minibatches, drawn without replacement; a smaller task gives all it has.
    draws: minibatches per client.
    weighted: average by the tasks' numbers of train samples instead of evenly.
    multiple: the cohort is padded to a multiple of this, for so many devices.

  Returns:
    The plan, with a leading axis of rounds.

  Raises:
    ValueError: a cohort larger than the tasks, or numbers that are no counts.
  """
  check_counts(rounds=rounds, cohort=cohort, batch_size=batch_size, draws=draws)
  padding = -cohort % multiple

  def one(round_):
    cohort_key, client_key = jax.random.split(jax.random.fold_in(key, round_))
    chosen = sample_cohort(cohort_key, tasks, cohort)
    share = counts[chosen].astype(jnp.float32) if weighted else jnp.ones(cohort, jnp.float32)
    share = jnp.pad(share / share.sum(), (0, padding))
    chosen = jnp.concatenate([chosen, jnp.broadcast_to(chosen[:1], (padding,))])
    client_keys = jax.vmap(jax.random.fold_in, (None, 0))(client_key, chosen)
    keys = jax.vmap(lambda key: jax.vmap(jax.random.split)(jax.random.split(key, draws)))(client_keys)
    positions = jax.vmap(lambda keys, count: jax.vmap(lambda key: sample_positions(key, count, batch_size))(keys))(keys[..., 0], counts[chosen])
    return RoundPlan(chosen, share, positions, (positions < counts[chosen][:, None, None]).astype(jnp.float32), keys[..., 1])

  return jax.vmap(one)(start + jnp.arange(rounds, dtype=jnp.int32))


def follow_plan(
  algorithm: FederatedAlgorithm,
  server: Any,
  plan: RoundPlan,
  minibatches: Minibatches,
  pool: Pool,
  *,
  task_axis: str | int = "auto",
  mesh: Mesh | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
  """The rounds of a plan, in one program without a return to the host.

  Args:
    algorithm: what clients and server compute.
    server: the server's state.
    plan: with a leading axis of rounds.
    minibatches: what the plan's clients draw, with leading axes (rounds, clients).
    pool: that `minibatches` has rows of.
    task_axis: "vmap" (all of a round's clients at once), "map" (one after the other), a number (so many at once), "merged" (as
      one batch; needs a mergeable algorithm), or "auto": "map" on CPU, "merged" elsewhere, or "vmap" where that cannot be.
    mesh: `task_mesh`, over which the clients are spread; the server's part is computed everywhere.

  Returns:
    The server's state after the last round, and the clients' mean metrics, (rounds,).

  Raises:
    ValueError: clients that the devices do not divide, or an unknown `task_axis`.
  """
  how = resolve_task_axis(task_axis, algorithm.mergeable)
  if mesh is not None:
    check_mesh(mesh, plan.share.shape[1])

  def mean_update(sent, share, keys, minibatches, pool):
    if how == "merged":
      # The batch is weighted to 1 whatever the clients' share of the whole, since a loss may divide by its weight.
      total = share.sum()  # 0 on a device that has nothing but padding
      batch = minibatches.merged(jnp.where(total > 0, share / total, 1 / share.shape[0]), pool)
      rows = jax.vmap(lambda key: row_keys(key, batch.labels.shape[0] // share.shape[0]))(keys[:, 0]).ravel()
      update = algorithm.client_update(sent, lambda i: (batch, rows))
      return like(jax.tree.map(lambda x: total * x, update), update)

    def client(keys_and_minibatches):
      keys, own = keys_and_minibatches
      return algorithm.client_update(sent, lambda i: (own.batch(i, pool), keys[i]))

    return sum_over_tasks(client, (keys, minibatches), share, how)

  def rounds(server, share, keys, minibatches, pool):
    def one(server, clients):
      mean = mean_update(algorithm.broadcast(server), *clients, pool)
      if mesh is not None:
        mean = jax.lax.psum(mean, TASK_AXIS)
      return algorithm.server_update(server, mean.delta), mean.metrics

    return jax.lax.scan(one, server, (share, keys, minibatches))

  if mesh is not None:
    clients = PartitionSpec(None, TASK_AXIS)
    rounds = jax.shard_map(
      rounds, mesh=mesh, in_specs=(PartitionSpec(), clients, clients, clients, PartitionSpec()), out_specs=PartitionSpec(), check_vma=False
    )
  return rounds(server, plan.share, plan.keys, minibatches, pool)


def federated_round(
  algorithm: FederatedAlgorithm, state: FederatedState, population: Population, tasks: jax.Array, **options
) -> tuple[FederatedState, dict[str, jax.Array]]:
  """One communication round: sample the cohort, update it locally, average, update the server.

  Arguments as in `run_rounds`.

  Args:
    algorithm, state, population, tasks, **options: as in `run_rounds`.

  Returns:
    The state after the round, and the clients' mean metrics.

  Raises:
    ValueError: as in `run_rounds`.
  """
  state, metrics = run_rounds(algorithm, state, population, tasks, rounds=1, **options)
  return state, jax.tree.map(lambda x: x[0], metrics)


def run_rounds(
  algorithm: FederatedAlgorithm,
  state: FederatedState,
  population: Population,
  tasks: jax.Array,
  *,
  rounds: int,
  cohort: int,
  batch_size: int,
  task_axis: str | int = "auto",
  weighted: bool = False,
  mesh: Mesh | None = None,
) -> tuple[FederatedState, dict[str, jax.Array]]:
  """`rounds` rounds in one program, without a return to the host; metrics are stacked to (rounds,).

  To be jitted with the state donated, the population as an argument (not captured):

      step = jax.jit(partial(run_rounds, algorithm, rounds=10, cohort=5, batch_size=20), donate_argnums=0)
      state, metrics = step(state, population, tasks)

  Args:
    algorithm: what clients and server compute.
    state: from `federated_init` or the rounds before.
    population: all tasks.
    tasks: (training tasks,) their numbers in the population.
    rounds, cohort, batch_size, weighted: see `plan_rounds`.
    task_axis, mesh: see `follow_plan`. The population is on every device of the mesh.

  Returns:
    The state after the last round, and the clients' mean metrics, (rounds,).

  Raises:
    ValueError: a cohort larger than the tasks, numbers that are no counts, clients that the devices do not divide, or an unknown `task_axis`.
  """
  check_counts(rounds=rounds, cohort=cohort, batch_size=batch_size)
  block = max(size for size in range(1, _PLANNED + 1) if rounds % size == 0)

  def blocks(state, _):
    plan = plan_rounds(
      state.key,
      state.round,
      population.train_count,
      tasks,
      rounds=block,
      cohort=cohort,
      batch_size=min(batch_size, population.train_index.shape[1]),
      draws=algorithm.draws,
      weighted=weighted,
      multiple=1 if mesh is None else mesh.size,
    )
    tasks_of = plan.tasks[..., None, None]
    rows = population.train_index[tasks_of, own_positions(plan.positions, population.train_count[tasks_of])]
    server, metrics = follow_plan(
      algorithm, state.server, plan, Minibatches(rows, None, None, plan.weight), population.pool, task_axis=task_axis, mesh=mesh
    )
    return FederatedState(state.round + block, state.key, server), metrics

  if block == rounds:
    return blocks(state, None)
  state, metrics = jax.lax.scan(blocks, state, length=rounds // block)
  return state, jax.tree.map(lambda x: x.reshape(rounds, *x.shape[2:]), metrics)

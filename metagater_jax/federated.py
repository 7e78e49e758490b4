"""Communication rounds: one interface for federated algorithms, and the jitted loop that runs any of them.

An `Algorithm` says what a node and what the server compute. The simulated round in here only composes them (cohort, map
over tasks, mean), so that the same two functions can run on real nodes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagater_jax.data.population import Population, TaskData, sample_batch, sample_positions
from metagater_jax.local import DrawBatch

__all__ = ["Algorithm", "ClientUpdate", "FederatedState", "federated_init", "federated_round", "map_tasks", "run_rounds",
           "sample_cohort"]

Params = Any


class ClientUpdate(NamedTuple):
  """What a node sends: `delta` (a pytree like the parameters), and scalars to be averaged."""

  delta: Params
  metrics: dict[str, jax.Array]


class Algorithm(NamedTuple):
  """A federated algorithm as pure functions of pytrees.

  Attributes:
    init: `params -> server state`.
    broadcast: `server state -> params` that the server sends to the nodes of a round.
    client_update: `(params, draw, key) -> ClientUpdate`, on one node; `draw(key)` gives a minibatch of its train data.
    server_update: `(server state, mean delta) -> server state`.
    deploy: `server state -> params` of the meta-model that a target task starts from.
    calibrate: `(params, population, tasks) -> calibration`: what target tasks need beside the meta-model, learned on
      training tasks after meta-training (for MetaGater the threshold that sets the sparsity).
    adapt: `(params, task data, calibration) -> params` adapted to a target task.
  """

  init: Callable[[Params], Any]
  broadcast: Callable[[Any], Params]
  client_update: Callable[[Params, DrawBatch, jax.Array], ClientUpdate]
  server_update: Callable[[Any, Params], Any]
  deploy: Callable[[Any], Params]
  calibrate: Callable[[Params, Population, jax.Array], Any]
  adapt: Callable[..., Params]


class FederatedState(NamedTuple):
  """Everything a run needs to go on: rounds done, the run's key, the algorithm's server state.

  Round t's randomness is a function of (key, t), so a run that goes on from a saved state is the run that was not
  interrupted.
  """

  round: jax.Array
  key: jax.Array
  server: Any


def federated_init(algorithm: Algorithm, params: Params, key: jax.Array) -> FederatedState:
  """The state before the first round."""
  return FederatedState(jnp.zeros((), jnp.int32), key, algorithm.init(params))


def map_tasks(function: Callable[[Any], Any], tasks: Any, how: str | int = "auto") -> Any:
  """`function` over the leading axis of `tasks`.

  Args:
    function: of one task.
    tasks: a pytree of arrays with a leading task axis.
    how: "vmap" (all at once), "map" (one after the other: less memory, and on a CPU faster, since a task's
      intermediates fit in the cache), a number (so many at once), or "auto": "map" on CPU, "vmap" elsewhere.
  """
  if how == "auto":
    how = "map" if jax.default_backend() == "cpu" else "vmap"
  if how == "vmap":
    return jax.vmap(function)(tasks)
  if how == "map":
    return jax.lax.map(function, tasks)
  if isinstance(how, int) and not isinstance(how, bool) and how > 0:
    return jax.lax.map(function, tasks, batch_size=how)
  raise ValueError(f"map_tasks: how must be 'auto', 'vmap', 'map' or a positive number of tasks, got {how!r}.")


def sample_cohort(key: jax.Array, clients: jax.Array, size: int) -> jax.Array:
  """`size` different entries of `clients`, uniformly.

  Raises:
    ValueError: a cohort larger than the clients.
  """
  if size > clients.shape[0]:
    raise ValueError(f"the cohort of {size} is larger than the {clients.shape[0]} tasks there are to train on.")
  return clients[sample_positions(key, jnp.array(clients.shape[0]), size)]


def client_round(algorithm: Algorithm, params: Params, data: TaskData, key: jax.Array, batch_size: int) -> ClientUpdate:
  """One node's part of a round, with minibatches drawn from its train data."""
  return algorithm.client_update(params, lambda key: sample_batch(key, data, batch_size), key)


def federated_round(algorithm: Algorithm, state: FederatedState, population: Population, clients: jax.Array, *,
                    cohort: int, batch_size: int, task_axis: str | int = "auto", weighted: bool = False
                    ) -> tuple[FederatedState, dict[str, jax.Array]]:
  """One communication round: sample the cohort, update it locally, average, update the server.

  A node's randomness is a function of (key, round, task number), so neither its place in the cohort nor the padding
  beside it changes what it computes.

  Args:
    algorithm: what nodes and server compute.
    state: from `federated_init` or the round before.
    population: all tasks.
    clients: (training tasks,) their numbers in the population.
    cohort: nodes per round, drawn without replacement.
    batch_size: of the nodes' minibatches.
    task_axis: see `map_tasks`.
    weighted: average by the nodes' numbers of train samples instead of evenly.

  Returns:
    The state after the round, and the nodes' mean metrics.
  """
  round_key = jax.random.fold_in(state.key, state.round)
  cohort_key, client_key = jax.random.split(round_key)
  chosen = sample_cohort(cohort_key, clients, cohort)
  params = algorithm.broadcast(state.server)

  def client(task):
    return client_round(algorithm, params, population.train(task), jax.random.fold_in(client_key, task), batch_size)

  updates = map_tasks(client, chosen, task_axis)
  weight = population.train_count[chosen].astype(jnp.float32) if weighted else jnp.ones(cohort)
  weight /= weight.sum()
  mean = jax.tree.map(lambda x: jnp.tensordot(weight, x, axes=1), updates)
  server = algorithm.server_update(state.server, mean.delta)
  return FederatedState(state.round + 1, state.key, server), mean.metrics


def run_rounds(algorithm: Algorithm, state: FederatedState, population: Population, clients: jax.Array, *, rounds: int,
               **options) -> tuple[FederatedState, dict[str, jax.Array]]:
  """`rounds` rounds in one program, without a return to the host; metrics are stacked to (rounds,).

  To be jitted with the state donated, the population as an argument (not captured):

      step = jax.jit(partial(run_rounds, algorithm, rounds=10, cohort=5, batch_size=20), donate_argnums=0)
      state, metrics = step(state, population, clients)
  """
  def one(state, _):
    return federated_round(algorithm, state, population, clients, **options)
  return jax.lax.scan(one, state, length=rounds)

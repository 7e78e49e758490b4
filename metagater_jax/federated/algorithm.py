"""What a federated algorithm is: pure functions of what a client and what the server compute in a round, and the state of a run.

The simulated round (`metagater_jax.federated.rounds`) only composes them, so that the same functions can run on real devices. How a target
task adapts the meta-model is not part of it: that is a `metagater_jax.personalize.Personalizer`, and any follows any algorithm.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagater_jax.core.trees import Model, Params
from metagater_jax.data.batching import DrawBatch

__all__ = ["ClientUpdate", "FederatedAlgorithm", "FederatedState", "federated_init"]


class ClientUpdate(NamedTuple):
  """What a client sends: `delta` (a pytree like the parameters), and `metrics`, scalars to be averaged."""

  delta: Params
  metrics: dict[str, jax.Array]


class FederatedAlgorithm(NamedTuple):
  """A federated algorithm as pure functions of pytrees.

  Attributes:
    init: `params -> server state`.
    broadcast: `server state -> what the server sends to the clients of a round`, the parameters that they start from as a rule.
    client_update: `(what the server sent, draw) -> ClientUpdate`, on one client; `draw(i)` gives its i-th minibatch of the round with a
      key for what is random inside the model on it, i = 0 … draws − 1.
    server_update: `(server state, mean delta) -> server state`.
    deploy: `server state -> Model`, the meta-model that a target task starts from.
    draws: minibatches that a client update uses.
    mergeable: whether the mean of the clients' updates is the update on their minibatches merged to one, weighted batch: true
      of one gradient step from the same parameters, for a loss in which rows do not see each other (`data.is_rowwise`).
  """

  init: Callable[[Params], Any]
  broadcast: Callable[[Any], Any]
  client_update: Callable[[Any, DrawBatch], ClientUpdate]
  server_update: Callable[[Any, Params], Any]
  deploy: Callable[[Any], Model]
  draws: int = 1
  mergeable: bool = False


class FederatedState(NamedTuple):
  """Everything a run needs to go on: rounds done, the run's key, the algorithm's server state.

  Round t's randomness is a function of (key, t), so a run that goes on from a saved state is the run that was not
  interrupted.
  """

  round: jax.Array
  key: jax.Array
  server: Any


def federated_init(algorithm: FederatedAlgorithm, params: Params, key: jax.Array) -> FederatedState:
  """The state before the first round.

  Args:
    algorithm: what runs.
    params: of the network, where it starts.
    key: the run's.

  Returns:
    The state. It has arrays of its own, so that it can be donated while the parameters and the key stay the caller's.
  """
  return FederatedState(jnp.zeros((), jnp.int32), jnp.copy(key), jax.tree.map(jnp.copy, algorithm.init(params)))

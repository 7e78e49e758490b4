"""Pruning inside communication rounds: the clients score weights on their own data, the server averages and prunes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagater_jax.core.trees import Model, Params
from metagater_jax.data.batching import Loss
from metagater_jax.data.population import Episode
from metagater_jax.federated.algorithm import FederatedAlgorithm
from metagater_jax.pruning.masks import Scope, apply_mask, is_kernel, mask_state, masked_loss, prune_further
from metagater_jax.pruning.schedules import PruningSchedule
from metagater_jax.pruning.scores import Score

__all__ = ["PruningServer", "federated_pruning"]


class PruningServer(NamedTuple):
  """`round` counts rounds, `mask` is a pytree like the parameters, `inner` the server state of the algorithm inside."""

  round: jax.Array
  mask: Params
  inner: Any


def federated_pruning(
  make: Callable[[Loss], FederatedAlgorithm],
  loss: Loss,
  schedule: PruningSchedule,
  score: Score,
  *,
  scope: str | Scope = "global",
  granularity: str = "weight",
  prunable: Callable[[str, jax.Array], bool] = is_kernel,
) -> FederatedAlgorithm:
  """Any federated algorithm, whose meta-model is pruned while it is trained: ANP joined with MetaGater, FedAvg, …

  In a round in which the schedule is due, each client also sends what its own task contributes to the score, on two minibatches of its own.
  The server averages the contributions, finishes the score and prunes by it. For ANP that is w ⊙ ∇M_i(w), the sensitivity of the client's
  meta-objective M_i(w) = L_i(w − α ∇L_i(w; B₁); B₂) to removing a weight. What is pruned is exactly 0 from then on: in what the server
  sends, in the clients' steps, in its own state, and in the model that it deploys with its mask.

  Args:
    make: `loss -> FederatedAlgorithm`, as `lambda loss: mg.fedavg(loss, local_lr=0.1)`. It is called with the loss of the masked
      parameters.
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    schedule: in rounds, see `pruning.sparsity_schedule`.
    score: of an `Episode` of two minibatches B₁ (support) and B₂ (query), as `pruning.anp(fewshot.maml(loss, inner_lr=α).meta_loss)`; one
      without contributions (`pruning.magnitude()`) costs the clients nothing.
    scope, granularity, prunable: see `pruning.make_mask`.

  Returns:
    The algorithm; its server state is a `PruningServer`.
  """
  plain = make(loss)

  def init(params):
    return PruningServer(jnp.zeros((), jnp.int32), jax.tree.map(jnp.ones_like, params), plain.init(params))

  def broadcast(server):
    sent = apply_mask(plain.broadcast(server.inner), server.mask)
    return Model(sent, server.mask), schedule.due(server.round)

  def client_update(sent, draw):
    model, due = sent
    update = make(masked_loss(loss, model.mask)).client_update(model.params, draw)
    if score.contribution is None:
      return update

    def contribution():
      (support, _), (query, key) = draw(plain.draws), draw(plain.draws + 1)
      return score.contribution(model.params, Episode(support, query), key, model.mask)

    zeros = jax.tree.map(lambda own: jnp.zeros(own.shape, own.dtype), jax.eval_shape(contribution))
    return update._replace(delta=(update.delta, jax.lax.cond(due, contribution, lambda: zeros)))

  def server_update(server, mean):
    delta, contribution = (mean, None) if score.contribution is None else mean
    params = apply_mask(plain.broadcast(server.inner), server.mask)

    def prune():
      scores = score.finish(params, contribution, jax.random.key(server.round))
      return prune_further(scores, server.mask, schedule.sparsity(server.round), scope=scope, granularity=granularity, prunable=prunable)

    mask = jax.lax.cond(schedule.due(server.round), prune, lambda: server.mask)
    inner = plain.server_update(mask_state(server.inner, mask), apply_mask(delta, mask))
    return PruningServer(server.round + 1, mask, mask_state(inner, mask))

  def deploy(server):
    return Model(apply_mask(plain.deploy(server.inner).params, server.mask), server.mask)

  return FederatedAlgorithm(
    init=init,
    broadcast=broadcast,
    client_update=client_update,
    server_update=server_update,
    deploy=deploy,
    draws=plain.draws + (0 if score.contribution is None else 2),
  )

"""Pruning inside communication rounds: the nodes score weights on their own data, the server averages and prunes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagater_jax.data.episodes import Episode
from metagater_jax.federated import Algorithm
from metagater_jax.gradual_pruning import PruningSchedule
from metagater_jax.local import Loss
from metagater_jax.metalearning import maml
from metagater_jax.pruning import apply_mask, check_average, is_kernel, nonzero_mask, prune_further, task_sensitivity

__all__ = ["FEDERATED_SCORES", "PruningServer", "federated_pruning"]

Params = Any

FEDERATED_SCORES = ("anp", "snip", "magnitude")


class PruningServer(NamedTuple):
  """`round` counts rounds, `mask` is a pytree like the parameters, `inner` the server state of the algorithm inside."""

  round: jax.Array
  mask: Params
  inner: Any


def federated_pruning(make: Callable[[Loss], Algorithm], loss: Loss, schedule: PruningSchedule, *, score: str = "anp",
                      inner_lr: float = 0.1, derivative: str = "exact", average: str = "signed", scope: str = "global",
                      granularity: str = "weight", prunable: Callable[[str, jax.Array], bool] = is_kernel) -> Algorithm:
  """Any federated algorithm, whose meta-model is pruned while it is trained: ANP joined with MetaGater, FedAvg, …

  In a round in which the schedule is due, each node also sends w ⊙ ∇M_i(w), the signed sensitivity of its own meta-objective
  M_i(w) = L_i(w − α ∇L_i(w; B₁); B₂) to removing a weight, on two minibatches of its own. The server averages them and prunes
  by the absolute value of the mean, which is the ANP score of all the nodes' tasks together (with `average` "absolute", nodes
  send the magnitude: the mean of the tasks' own scores). What is pruned is exactly 0 from
  then on: in what the server sends, in the nodes' steps, in its own state and in adaptation to target tasks. No mask is sent:
  a prunable weight that is 0 is pruned.

  Args:
    make: `loss -> Algorithm`, as `lambda loss: mg.fedavg(loss, local_lr=0.1)`. It is called with the loss of the masked
      parameters.
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    schedule: in rounds, see `sparsity_schedule`.
    score: "anp"; "snip", w ⊙ ∇L_i(w; B₂) without adaptation; or "magnitude", |w|, for which the nodes send nothing more.
    inner_lr: α.
    derivative: of ANP, "exact" or "first_order".
    average: of ANP and SNIP, "signed" or "absolute": see `anp_score`.
    scope, granularity, prunable: see `make_mask`. Leaves that something else sets to 0 (gates under a Group Lasso) must not be
      prunable.

  Raises:
    ValueError: an unknown score, derivative or average.
  """
  check_average(average)
  if score not in FEDERATED_SCORES:
    raise ValueError(f"federated_pruning: score must be one of {', '.join(FEDERATED_SCORES)}, got {score!r}.")
  plain = make(loss)
  meta_loss = maml(loss, inner_lr=inner_lr, derivative=derivative).meta_loss
  mask_of = partial(nonzero_mask, granularity=granularity, prunable=prunable)

  def masked(params):
    """The algorithm on the weights that these parameters have left."""
    mask = mask_of(params)
    return make(lambda w, batch, key=None: loss(apply_mask(w, mask), batch, key))

  def init(params):
    return PruningServer(jnp.zeros((), jnp.int32), jax.tree.map(jnp.ones_like, params), plain.init(params))

  def client_update(sent, draw):
    params, due = sent
    update = masked(params).client_update(params, draw)
    if score == "magnitude":
      return update

    def sensitivity():
      (inner, _), (outer, key) = draw(plain.draws), draw(plain.draws + 1)
      if score == "anp":
        gradient = jax.grad(meta_loss)(params, Episode(inner, outer), mask_of(params))
      else:
        gradient = jax.grad(loss)(params, outer, key)
      return task_sensitivity(params, gradient, average)

    zeros = jax.tree.map(jnp.zeros_like, params)
    return update._replace(delta=(update.delta, jax.lax.cond(due, sensitivity, lambda: zeros)))

  def server_update(server, mean):
    delta, sensitivity = (mean, None) if score == "magnitude" else mean
    params = apply_mask(plain.broadcast(server.inner), server.mask)

    def prune():
      scores = jax.tree.map(jnp.abs, params if sensitivity is None else sensitivity)
      return prune_further(scores, server.mask, schedule.sparsity(server.round), scope=scope, granularity=granularity,
                           prunable=prunable)

    mask = jax.lax.cond(schedule.due(server.round), prune, lambda: server.mask)
    inner = plain.server_update(_masked_state(server.inner, mask), apply_mask(delta, mask))
    return PruningServer(server.round + 1, mask, _masked_state(inner, mask))

  return plain._replace(
      init=init,
      broadcast=lambda server: (apply_mask(plain.broadcast(server.inner), server.mask), schedule.due(server.round)),
      client_update=client_update,
      server_update=server_update,
      deploy=lambda server: apply_mask(plain.deploy(server.inner), server.mask),
      calibrate=lambda params, *arguments: masked(params).calibrate(params, *arguments),
      adapt=lambda params, data, calibration: masked(params).adapt(params, data, calibration),
      draws=plain.draws + (0 if score == "magnitude" else 2),
      mergeable=False)


def _masked_state(state, mask):
  """A state in which every part that is like the parameters is masked."""
  structure = jax.tree.structure(mask)
  alike = lambda part: jax.tree.structure(part) == structure
  return jax.tree.map(lambda part: apply_mask(part, mask) if alike(part) else part, state, is_leaf=alike)

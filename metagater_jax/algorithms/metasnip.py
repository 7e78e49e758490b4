"""MetaSNIP, the paper's pruning baseline: SNIP at the meta-model on the target's data, then fine-tuning of what is kept."""

from collections.abc import Callable
from typing import Any

import jax

from metagater_jax.adaptation import fine_tune
from metagater_jax.data.population import TaskData
from metagater_jax.local import Loss, full_batch_gradient
from metagater_jax.pruning import apply_mask, connection_saliency, is_kernel, make_mask

__all__ = ["metasnip"]

Params = Any


def metasnip(loss: Loss, params: Params, data: TaskData, *, sparsity: float | jax.Array, lr: float, steps: int = 1,
             granularity: str = "weight", scope: str = "global", prunable: Callable[[str, jax.Array], bool] = is_kernel,
             chunk: int = 64) -> tuple[Params, Params]:
  """c = the fraction 1 − s of highest |∂L/∂c|;  w_i = c ⊙ (w − η ∇L_i(w)) from c ⊙ w (Section 5.4, Lee et al. 2018).

  The counterpart of `two_stage_adaptation` for a meta-model without gates: stage I chooses a subnetwork, stage II takes a
  gradient step on it.

  Args:
    loss: L_i.
    params: w, the meta-model.
    data: the target task's train data, all of which both stages use.
    sparsity: s, the fraction of candidates to remove: a number, or what a gate reached on the same task.
    lr, steps: η and the number of steps of the fine-tuning.
    granularity, scope, prunable: see `make_mask`; SNIP itself is "weight" and "global".
    chunk: samples at a time.

  Returns:
    The adapted parameters, and the mask c.
  """
  _, gradient = full_batch_gradient(lambda w, batch: loss(w, batch, None), params, data, chunk)
  mask = make_mask(connection_saliency(params, gradient), sparsity, granularity=granularity, scope=scope, prunable=prunable)

  def masked_loss(w, batch, key):
    return loss(apply_mask(w, mask), batch, key)  # so that the gradient of what was removed is zero

  return fine_tune(masked_loss, apply_mask(params, mask), data, lr=lr, steps=steps, chunk=chunk), mask

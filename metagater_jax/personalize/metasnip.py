"""MetaSNIP, the paper's pruning baseline: SNIP at the meta-model on the target's data, then fine-tuning of what is kept."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from metagater_jax.core.checks import check_counts, check_positive, check_sparsity
from metagater_jax.core.trees import Model
from metagater_jax.data.batching import Loss
from metagater_jax.personalize.fine_tune import gradient_steps
from metagater_jax.personalize.personalizer import Personalizer
from metagater_jax.pruning.masks import apply_mask, is_kernel, make_mask, masked_loss, prune_further
from metagater_jax.pruning.scores import Score, snip

__all__ = ["metasnip"]


def metasnip(
  loss: Loss,
  *,
  sparsity: float | jax.Array | Mapping[str, float],
  lr: float = 0.05,
  steps: int = 1,
  score: Score | None = None,
  granularity: str = "weight",
  scope: str = "global",
  prunable: Callable[[str, jax.Array], bool] = is_kernel,
  chunk: int = 64,
) -> Personalizer:
  """c = the fraction 1 − s of highest |∂L/∂c|;  w_i = c ⊙ (w − η ∇L_i(w)) from c ⊙ w (Section 5.4, Lee et al. 2018).

  The counterpart of `two_stage` for a model without gates: stage I chooses a subnetwork, stage II takes a gradient step on it. A model that
  is pruned already keeps what it lacks; s is then the whole sparsity.

  Args:
    loss: L_i, `(params, batch, key) -> scalar`; the key is None here.
    sparsity: s, the fraction of the prunable weights to remove, in [0, 1). It is the calibration, and `adapt` takes another in its
      place: what a gate reached on the same task, for instance. With scope "layer" it may be one for each leaf, by name: so many channels of each
      layer are what a device has room for.
    lr, steps: η and the number of steps of the fine-tuning.
    score: what ranks weights on the task's data; None: `pruning.snip(loss)`.
    granularity, scope, prunable: see `pruning.make_mask`; SNIP itself is "weight" and "global".
    chunk: samples at a time.

  Returns:
    The personalizer.

  Raises:
    ValueError: a rate or number of steps that is not positive; from `adapt`, what `make_mask` refuses.
  """
  check_positive(lr=lr)
  check_counts(steps=steps, chunk=chunk)
  for name, value in sparsity.items() if isinstance(sparsity, Mapping) else [("sparsity", sparsity)]:
    check_sparsity(**{name: value})
  score = snip(loss, chunk=chunk) if score is None else score
  options = {"granularity": granularity, "scope": scope, "prunable": prunable}

  def calibrate(model, population=None, tasks=None, share=None, axis_name=None):
    del model, population, tasks, share, axis_name
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), sparsity)

  def adapt(model, data, calibration=None):
    wanted = sparsity if calibration is None else calibration
    importance = score.on_task(model.params, data, mask=model.mask)
    mask = make_mask(importance, wanted, **options) if model.mask is None else prune_further(importance, model.mask, wanted, **options)
    start = apply_mask(model.params, mask)
    return Model(gradient_steps(masked_loss(loss, mask), start, data, lr=lr, steps=steps, chunk=chunk), mask)

  return Personalizer(calibrate, adapt, prunable)

"""Pruning while training: an optax wrapper that keeps the masks.

optimizer = gradual_pruning(optax.adam(1e-3), sparsity_schedule("cubic", 0.85, begin=1000, end=5000, every=200))
state = optimizer.init(params)
score = anp(meta_loss)
…
mask = pruning_mask(state)                          # for the inner loop, and anything else that must respect it
updates, state = optimizer.update(gradients, state, params, score=lambda: score(params, tasks, key, mask))
params = optax.apply_updates(params, updates)       # what is pruned is exactly 0 from here on
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagater_jax.core.trees import Params, like
from metagater_jax.pruning.masks import Scope, apply_mask, is_kernel, mask_state, prune_further
from metagater_jax.pruning.schedules import PruningSchedule
from metagater_jax.pruning.scores import magnitude

__all__ = ["GradualPruningState", "find_pruning", "gradual_pruning", "pruning_mask"]


class GradualPruningState(NamedTuple):
  """`step` counts updates; `mask` is a pytree like the parameters; `inner` is the wrapped optimizer's state."""

  step: jax.Array
  mask: Params
  inner: Any


def gradual_pruning(
  optimizer: optax.GradientTransformation,
  schedule: PruningSchedule,
  *,
  scope: str | Scope = "global",
  granularity: str = "weight",
  prunable: Callable[[str, jax.Array], bool] = is_kernel,
) -> optax.GradientTransformationExtraArgs:
  """Any optax optimizer, pruned by a schedule.

  `update(gradients, state, params, score=…)` takes the score of the parameters, as a pytree like them or as a function without
  arguments that makes it; the function is evaluated only at the steps at which the schedule is due. Without one it is |w|.
  After the update pruned parameters are exactly 0. Their gradients, and their entries in the optimizer's state (Adam's
  moments, see `mask_state`), are too, so what is pruned has no influence on what is kept, and never comes back.

  Args:
    optimizer: what makes updates of gradients: any of optax's, with what wraps and combines them (`chain`, `masked`, `multi_transform`, …).
      `optax.flatten` hides which number belongs to which parameter: wrap it around `gradual_pruning` or leave it out.
    schedule: in updates, see `sparsity_schedule`.
    scope, granularity, prunable: see `make_mask`.

  Returns:
    A transformation whose `update` needs `params`.

  Raises:
    ValueError: from `update`, missing parameters, or a score that is not like them.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def init(params):
    return GradualPruningState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.ones_like, params), optimizer.init(params))

  def update(gradients, state, params=None, *, score=None, **extra):
    if params is None:
      raise ValueError("gradual_pruning needs the parameters: optimizer.update(gradients, state, params).")

    def prune():
      scores = magnitude()(params) if score is None else score() if callable(score) else score
      _check_like(scores, params)
      return prune_further(scores, state.mask, schedule.sparsity(state.step), scope=scope, granularity=granularity, prunable=prunable)

    mask = jax.lax.cond(schedule.due(state.step), prune, lambda: state.mask)
    if "grad" in extra:  # what line searches get beside the gradients
      extra["grad"] = apply_mask(extra["grad"], mask)
    updates, inner = optimizer.update(apply_mask(gradients, mask), mask_state(state.inner, mask), apply_mask(params, mask), **extra)
    # A mask of NaN, from a score that was no number, passes on.
    updates = like(jax.tree.map(lambda u, w, c: jnp.where(c == 0, -w, u * c), updates, params, mask), params)
    return updates, GradualPruningState(state.step + 1, mask, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def find_pruning(state: Any) -> GradualPruningState | None:
  """The state of `gradual_pruning` in that of an optimizer of which it is a part; None if there is none.

  Args:
    state: of any optax optimizer.

  Returns:
    The state of `gradual_pruning`, or None.
  """
  is_pruning = lambda x: isinstance(x, GradualPruningState)
  return next((part for part in jax.tree.leaves(state, is_leaf=is_pruning) if is_pruning(part)), None)


def pruning_mask(state: Any) -> Params:
  """The mask in the state of an optimizer that has `gradual_pruning` somewhere in it.

  Args:
    state: of the optimizer.

  Returns:
    A pytree like the parameters of zeros and ones.

  Raises:
    ValueError: it has none.
  """
  found = find_pruning(state)
  if found is None:
    raise ValueError("there is no gradual_pruning in this optimizer's state.")
  return found.mask


def _check_like(tree, params):
  ours, theirs = jax.tree.structure(tree), jax.tree.structure(params)
  if ours != theirs:
    raise ValueError(f"the score is not a pytree like the parameters: {ours} against {theirs}.")

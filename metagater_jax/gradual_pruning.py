"""Pruning while training: sparsity schedules, and an optax wrapper that keeps the masks.

    optimizer = gradual_pruning(optax.adam(1e-3), sparsity_schedule("cubic", 0.85, begin=1000, end=5000, every=200))
    state = optimizer.init(params)
    …
    mask = pruning_mask(state)                          # for the inner loop, and anything else that must respect it
    updates, state = optimizer.update(gradients, state, params, score=lambda: anp_score(params, meta_loss, tasks, mask=mask))
    params = optax.apply_updates(params, updates)       # what is pruned is exactly 0 from here on
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagater_jax.pruning import apply_mask, is_kernel, magnitude_score, prune_further

__all__ = ["SCHEDULES", "GradualPruningState", "PruningSchedule", "find_pruning", "gradual_pruning", "pruning_mask",
           "sparsity_schedule", "staged_schedule"]

Params = Any

SCHEDULES = ("one_shot", "linear", "cubic")


class PruningSchedule(NamedTuple):
  """When to prune, and how much: `sparsity(step)`, and `due(step)` whether masks are made anew before that step's update."""

  sparsity: Callable[[jax.Array], jax.Array]
  due: Callable[[jax.Array], jax.Array]


def sparsity_schedule(kind: str, sparsity: float, *, begin: int = 0, end: int = 0, every: int = 1, start: float = 0.0
                      ) -> PruningSchedule:
  """From sparsity `start` to `sparsity` between the steps `begin` and `end`.

  With p = (step − begin)/(end − begin): "linear": start + p (s − start);  "cubic": s − (s − start)(1 − p)³ (Zhu & Gupta 2017:
  most goes early, while much is left);  "one_shot": s at `begin`.

  Args:
    kind: one of `SCHEDULES`.
    sparsity: s, in [0, 1).
    begin, end: first and last step at which is pruned, counted from 0; `end` is not used by "one_shot".
    every: steps of training between two prunings. The last is at `end` in any case.
    start: what is pruned already.

  Raises:
    ValueError: an unknown kind, a sparsity outside [0, 1) or below `start`, or an end that is not behind the beginning.
  """
  if kind not in SCHEDULES:
    raise ValueError(f"a pruning schedule is one of {', '.join(SCHEDULES)}, got {kind!r}.")
  for name, value in (("sparsity", sparsity), ("start", start)):
    if not 0 <= value < 1:
      raise ValueError(f"a pruning schedule's {name} must lie in [0, 1), got {value}.")
  if start > sparsity:
    raise ValueError(f"a pruning schedule cannot go from {start} down to {sparsity}: what is pruned stays pruned.")
  if kind == "one_shot":
    return PruningSchedule(lambda step: jnp.where(step >= begin, sparsity, start), lambda step: step == begin)
  if not 0 <= begin < end or every < 1:
    raise ValueError(f"a {kind} pruning schedule needs 0 <= begin < end and every >= 1, got begin {begin}, end {end} and every "
                     f"{every}.")
  power = {"linear": 1, "cubic": 3}[kind]

  def at(step):
    left = 1 - jnp.clip((step - begin) / (end - begin), 0, 1)
    return sparsity - (sparsity - start) * left**power

  def due(step):
    return ((step >= begin) & (step <= end) & ((step - begin) % every == 0)) | (step == end)
  return PruningSchedule(at, due)


def staged_schedule(levels: Sequence[float], steps: int, *, every: int = 1, ramp: float = 0.5) -> PruningSchedule:
  """One level of sparsity after the other, `steps` steps each, so that one training shows accuracy at all of them.

  Within a level the sparsity rises from the level before along a cubic for the fraction `ramp` of the steps; in the others the
  network recovers.

  Args:
    levels: increasing, in [0, 1).
    steps: of each level.
    every: steps between two prunings.
    ramp: in (0, 1).
  """
  if list(levels) != sorted(levels) or not all(0 <= level < 1 for level in levels):
    raise ValueError(f"levels of sparsity must increase and lie in [0, 1), got {tuple(levels)}.")
  rising = max(1, int(ramp * steps))
  if not 0 < ramp < 1 or rising >= steps:
    raise ValueError(f"ramp must lie in (0, 1) and leave a step of {steps} to recover in, got {ramp}.")
  stages = [sparsity_schedule("cubic", level, begin=i * steps, end=i * steps + rising, every=every, start=before)
            for i, (before, level) in enumerate(zip([0.0, *levels], levels))]

  def at(step):
    stage = jnp.clip(step // steps, 0, len(stages) - 1)
    return jnp.stack([jnp.asarray(s.sparsity(step), jnp.float32) for s in stages])[stage]

  def due(step):
    return jnp.any(jnp.stack([jnp.asarray(s.due(step)) for s in stages]))
  return PruningSchedule(at, due)


class GradualPruningState(NamedTuple):
  """`step` counts updates; `mask` is a pytree like the parameters; `inner` is the wrapped optimizer's state."""

  step: jax.Array
  mask: Params
  inner: Any


def gradual_pruning(optimizer: optax.GradientTransformation, schedule: PruningSchedule, *, scope: str = "global",
                    granularity: str = "weight", prunable: Callable[[str, jax.Array], bool] = is_kernel
                    ) -> optax.GradientTransformationExtraArgs:
  """Any optax optimizer, pruned by a schedule.

  `update(gradients, state, params, score=…)` takes the score of the parameters, as a pytree like them or as a function without
  arguments that makes it; the function is evaluated only at the steps at which the schedule is due. Without one it is |w|.
  After the update pruned parameters are exactly 0. Their gradients, and their entries in the optimizer's state (Adam's
  moments), are too, so what is pruned has no influence on what is kept, and never comes back.

  Args:
    optimizer: what makes updates of gradients.
    schedule: see `sparsity_schedule`.
    scope, granularity, prunable: see `make_mask`.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def init(params):
    return GradualPruningState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.ones_like, params), optimizer.init(params))

  def update(gradients, state, params=None, *, score=None, **extra):
    if params is None:
      raise ValueError("gradual_pruning needs the parameters: optimizer.update(gradients, state, params).")

    def prune():
      scores = magnitude_score(params) if score is None else score() if callable(score) else score
      _check_like(scores, params)
      return prune_further(scores, state.mask, schedule.sparsity(state.step), scope=scope, granularity=granularity,
                           prunable=prunable)

    mask = jax.lax.cond(schedule.due(state.step), prune, lambda: state.mask)
    inner = optax.tree.map_params(optimizer, lambda s, c: s * c, state.inner, mask)
    updates, inner = optimizer.update(apply_mask(gradients, mask), inner, apply_mask(params, mask), **extra)
    updates = jax.tree.map(lambda u, w, c: jnp.where(c > 0, u, -w), updates, params, mask)
    return updates, GradualPruningState(state.step + 1, mask, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def find_pruning(state: Any) -> GradualPruningState | None:
  """The state of `gradual_pruning` in that of an optimizer of which it is a part; None if there is none."""
  is_pruning = lambda x: isinstance(x, GradualPruningState)
  return next((part for part in jax.tree.leaves(state, is_leaf=is_pruning) if is_pruning(part)), None)


def pruning_mask(state: Any) -> Params:
  """The mask in the state of an optimizer that has `gradual_pruning` somewhere in it.

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

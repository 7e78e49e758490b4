"""When to prune, and how far: sparsity as a function of the step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagater_jax.core.checks import check_one_of

__all__ = ["SCHEDULES", "PruningSchedule", "sparsity_schedule", "staged_schedule"]

SCHEDULES = ("one_shot", "linear", "cubic")


class PruningSchedule(NamedTuple):
  """When to prune, and how much: `sparsity(step)`, and `due(step)` whether masks are made anew before that step's update."""

  sparsity: Callable[[jax.Array], jax.Array]
  due: Callable[[jax.Array], jax.Array]


def sparsity_schedule(kind: str, sparsity: float, *, begin: int = 0, end: int = 0, every: int = 1, start: float = 0.0) -> PruningSchedule:
  """From sparsity `start` to `sparsity` between the steps `begin` and `end`.

  With p = (step − begin)/(end − begin): "linear": start + p (s − start);  "cubic": s − (s − start)(1 − p)³ (Zhu & Gupta 2017:
  most goes early, while much is left);  "one_shot": s at `begin`.

  Args:
    kind: one of `SCHEDULES`.
    sparsity: s, in [0, 1).
    begin, end: first and last step at which is pruned, counted from 0; `end` is not used by "one_shot".
    every: steps of training between two prunings. The last is at `end` in any case.
    start: what is pruned already.

  Returns:
    The schedule.

  Raises:
    ValueError: an unknown kind, a sparsity outside [0, 1) or below `start`, or an end that is not behind the beginning.
  """
  check_one_of("pruning schedule", kind, SCHEDULES)
  for name, value in (("sparsity", sparsity), ("start", start)):
    if not 0 <= value < 1:
      raise ValueError(f"a pruning schedule's {name} must lie in [0, 1), got {value}.")
  if start > sparsity:
    raise ValueError(f"a pruning schedule cannot go from {start} down to {sparsity}: what is pruned stays pruned.")
  if kind == "one_shot":
    return PruningSchedule(lambda step: jnp.where(step >= begin, sparsity, start), lambda step: step == begin)
  if not 0 <= begin < end or every < 1:
    raise ValueError(f"a {kind} pruning schedule needs 0 <= begin < end and every >= 1, got begin {begin}, end {end} and every {every}.")
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

  Returns:
    The schedule.

  Raises:
    ValueError: levels that do not increase, or a ramp that leaves no step to recover in.
  """
  if list(levels) != sorted(levels) or not all(0 <= level < 1 for level in levels):
    raise ValueError(f"levels of sparsity must increase and lie in [0, 1), got {tuple(levels)}.")
  rising = max(1, int(ramp * steps))
  if not 0 < ramp < 1 or rising >= steps:
    raise ValueError(f"ramp must lie in (0, 1) and leave a step of {steps} to recover in, got {ramp}.")
  stages = [
    sparsity_schedule("cubic", level, begin=i * steps, end=i * steps + rising, every=every, start=before)
    for i, (before, level) in enumerate(zip([0.0, *levels], levels))
  ]

  def at(step):
    stage = jnp.clip(step // steps, 0, len(stages) - 1)
    return jnp.stack([jnp.asarray(s.sparsity(step), jnp.float32) for s in stages])[stage]

  def due(step):
    return jnp.any(jnp.stack([jnp.asarray(s.due(step)) for s in stages]))

  return PruningSchedule(at, due)

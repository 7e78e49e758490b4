"""Pruning: how important weights are, masks that keep the most important, and when they are made. Parameters are any pytree."""

from metagater_jax.pruning.channels import by_macs, channel_sensitivity
from metagater_jax.pruning.masks import (
  GRANULARITIES,
  SCOPES,
  apply_mask,
  effective_mask,
  highest_first,
  is_kernel,
  make_mask,
  mask_sparsity,
  mask_state,
  masked_loss,
  nonzero_mask,
  prune_further,
)
from metagater_jax.pruning.schedules import SCHEDULES, PruningSchedule, sparsity_schedule, staged_schedule
from metagater_jax.pruning.scores import AVERAGES, PLACES, Score, anp, contribution, magnitude, random, snip
from metagater_jax.pruning.transform import GradualPruningState, find_pruning, gradual_pruning, pruning_mask

__all__ = [
  "AVERAGES",
  "GRANULARITIES",
  "SCHEDULES",
  "SCOPES",
  "GradualPruningState",
  "PLACES",
  "PruningSchedule",
  "Score",
  "anp",
  "apply_mask",
  "by_macs",
  "channel_sensitivity",
  "contribution",
  "effective_mask",
  "find_pruning",
  "gradual_pruning",
  "highest_first",
  "is_kernel",
  "magnitude",
  "make_mask",
  "mask_sparsity",
  "mask_state",
  "masked_loss",
  "nonzero_mask",
  "prune_further",
  "pruning_mask",
  "random",
  "snip",
  "sparsity_schedule",
  "staged_schedule",
]

"""What a target task does with a meta-model: personalizers of equal rank, any of which follows any federated algorithm."""

from metagater_jax.personalize.evaluate import TaskMetrics, evaluate_targets, evaluate_task
from metagater_jax.personalize.fine_tune import fine_tune, gradient_steps
from metagater_jax.personalize.gate_statistics import GateStatistics, conditional, confidence_correlation, explained_by_class
from metagater_jax.personalize.metasnip import metasnip
from metagater_jax.personalize.personalizer import Personalizer, no_calibration
from metagater_jax.personalize.two_stage import (
  SPARSITY_BY,
  adapt_backbone,
  adapt_gate,
  calibrate_threshold,
  constant_gate,
  freeze_gate,
  keep_channels,
  log_odds_quantile,
  shift_gate,
  two_stage,
)

__all__ = [
  "SPARSITY_BY",
  "GateStatistics",
  "Personalizer",
  "TaskMetrics",
  "adapt_backbone",
  "adapt_gate",
  "calibrate_threshold",
  "conditional",
  "confidence_correlation",
  "constant_gate",
  "evaluate_targets",
  "evaluate_task",
  "explained_by_class",
  "fine_tune",
  "freeze_gate",
  "gradient_steps",
  "keep_channels",
  "log_odds_quantile",
  "metasnip",
  "no_calibration",
  "shift_gate",
  "two_stage",
]

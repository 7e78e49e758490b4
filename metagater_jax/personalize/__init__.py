"""What a target task does with a meta-model: personalizers of equal rank, any of which follows any federated algorithm."""

from metagater_jax.personalize.evaluate import TaskMetrics, evaluate_targets, evaluate_task
from metagater_jax.personalize.fine_tune import fine_tune, gradient_steps
from metagater_jax.personalize.metasnip import metasnip
from metagater_jax.personalize.personalizer import Personalizer, no_calibration
from metagater_jax.personalize.two_stage import adapt_backbone, adapt_gate, calibrate_threshold, two_stage

__all__ = ["Personalizer", "TaskMetrics", "adapt_backbone", "adapt_gate", "calibrate_threshold", "evaluate_targets", "evaluate_task",
           "fine_tune", "gradient_steps", "metasnip", "no_calibration", "two_stage"]

"""Optimization that knows nothing of networks, tasks or rounds: penalties with proximal operators, the accelerated proximal transform, the
inexact local solver, and gradient descent that can be differentiated."""

from metagater_jax.optim.accelerated_proximal import GAMMA_SCHEDULES, AcceleratedProximalState, accelerated_proximal, accelerated_proximal_eval_params
from metagater_jax.optim.hoisting import hoist
from metagater_jax.optim.inner_loop import DERIVATIVES, descend
from metagater_jax.optim.local_solver import local_solve
from metagater_jax.optim.metric import Rates, check_rates, in_metric, scale_parts
from metagater_jax.optim.penalties import Penalty, block_soft_threshold, group_lasso, group_norms, l1, no_penalty, on_part, soft_threshold

__all__ = [
  "DERIVATIVES",
  "GAMMA_SCHEDULES",
  "AcceleratedProximalState",
  "Penalty",
  "Rates",
  "accelerated_proximal",
  "accelerated_proximal_eval_params",
  "block_soft_threshold",
  "check_rates",
  "descend",
  "group_lasso",
  "group_norms",
  "hoist",
  "in_metric",
  "l1",
  "local_solve",
  "no_penalty",
  "on_part",
  "scale_parts",
  "soft_threshold",
]

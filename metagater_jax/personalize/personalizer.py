"""The interface of personalization: what a target task does with a model that it gets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from metagater_jax.core.trees import Model

__all__ = ["Personalizer", "no_calibration"]


class Personalizer(NamedTuple):
  """How a target task adapts a model, as pure functions of pytrees. Any personalizer follows any federated algorithm.

  Attributes:
    calibrate: `(model, population, tasks, share=None, axis_name=None) -> calibration`: what targets need beside the model, learned on
      training tasks after meta-training (for `two_stage` the threshold that sets the sparsity); None where they need nothing.
      `tasks` are numbers of tasks of the population, `share` (tasks,) their parts in a mean, 0 for padding; `axis_name` names the mesh
      axis that the tasks are spread over, or is None.
    adapt: `(model, data, calibration=None) -> model` adapted to a target task's train data, a `TaskData` or a `Batch` of all of it.
    prunable: `(name, leaf) -> bool`, which leaves `adapt` prunes, so that their sparsity can be told; None: it prunes none.
  """

  calibrate: Callable[..., Any]
  adapt: Callable[..., Model]
  prunable: Callable[[str, jax.Array], bool] | None = None


def no_calibration(model: Model, population: Any = None, tasks: Any = None, share: Any = None, axis_name: str | None = None) -> None:
  """The `calibrate` of personalizers that need nothing but the model.

  Args:
    model, population, tasks, share, axis_name: see `Personalizer`; they are not used.

  Returns:
    None.
  """
  del model, population, tasks, share, axis_name

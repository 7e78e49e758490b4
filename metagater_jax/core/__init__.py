"""Ground that everything stands on: trees of parameters, random keys, tasks side by side. It knows no networks and no data.

One word for one thing, here and everywhere. A *task* is the data of one device; a *client* is what computes on it in a round; a *target* is a
task that adapts a finished meta-model. A *mask* says what is kept (of weights or of channels), a *weight* is a parameter of a network or how
much a sample counts in a batch, a *share* is a task's part in a mean.
"""

from metagater_jax.core.checks import check_one_of
from metagater_jax.core.closures import lift
from metagater_jax.core.random import row_keys, sample_positions
from metagater_jax.core.tasks import TASK_AXIS, map_tasks, sum_over_tasks, task_axes, task_mesh
from metagater_jax.core.trees import Model, Params, leaf_name, like, named_leaves, precision_of

__all__ = [
  "TASK_AXIS",
  "Model",
  "Params",
  "check_one_of",
  "leaf_name",
  "lift",
  "like",
  "map_tasks",
  "named_leaves",
  "precision_of",
  "row_keys",
  "sample_positions",
  "sum_over_tasks",
  "task_axes",
  "task_mesh",
]

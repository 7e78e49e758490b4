"""Data of many tasks: partitions on the host, arrays on the device, and reductions over a task's samples.

Data sets on disk are read by `metagater_jax.data.datasets` and `metagater_jax.data.hapt`, which nothing in here imports.
"""

from metagater_jax.data.batching import DrawBatch, Loss, full_batch_gradient, is_rowwise, mean_over_task, microbatched
from metagater_jax.data.partition import (
  Partition,
  draw_sizes,
  partition_by_dirichlet,
  partition_by_group,
  partition_by_label,
  split_groups,
  split_samples,
  split_tasks,
)
from metagater_jax.data.population import (
  Batch,
  Episode,
  Minibatches,
  Pool,
  Population,
  TaskData,
  check_partition,
  check_samples,
  make_population,
  make_populations,
  make_task,
  sample_batch,
  to_float,
)

__all__ = [
  "Batch",
  "DrawBatch",
  "Episode",
  "Loss",
  "Minibatches",
  "Partition",
  "Pool",
  "Population",
  "TaskData",
  "check_partition",
  "check_samples",
  "draw_sizes",
  "full_batch_gradient",
  "is_rowwise",
  "make_population",
  "make_populations",
  "make_task",
  "mean_over_task",
  "microbatched",
  "partition_by_dirichlet",
  "partition_by_group",
  "partition_by_label",
  "sample_batch",
  "split_groups",
  "split_samples",
  "split_tasks",
  "to_float",
]

"""Many tasks at a time: one after the other, side by side, or spread over devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

__all__ = ["TASK_AXIS", "check_mesh", "map_tasks", "resolve_task_axis", "sum_over_tasks", "task_axes", "task_mesh"]

# Name of the mesh axis over which tasks are spread.
TASK_AXIS = "tasks"


def task_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of these devices (None: all there are) with the one axis over which tasks are spread.

  Args:
    devices: that the mesh has; None: all.

  Returns:
    A mesh with the axis `TASK_AXIS`.
  """
  return Mesh(np.array(jax.devices() if devices is None else devices), (TASK_AXIS,))


def task_axes(mergeable: bool = False) -> tuple[str, ...]:
  """The names that `task_axis` may have, beside positive numbers.

  Args:
    mergeable: whether tasks can be merged to one batch (`FederatedAlgorithm.mergeable`).

  Returns:
    The names.
  """
  return ("auto", "vmap", "map", *(["merged"] if mergeable else []))


def resolve_task_axis(task_axis: str | int, mergeable: bool = False) -> str | int:
  """What "auto" stands for on this backend: "map" on a CPU, where one task's intermediates fit in the cache; elsewhere one large
  product, "merged" or "vmap".

  Raises:
    ValueError: an unknown `task_axis`, or "merged" where the mean cannot be computed so.
  """
  if isinstance(task_axis, str) and task_axis.isdigit():  # as it comes from a command line
    task_axis = int(task_axis)
  if task_axis == "auto":
    return "map" if jax.default_backend() == "cpu" else "merged" if mergeable else "vmap"
  if task_axis in task_axes(mergeable) or (type(task_axis) is int and task_axis > 0):
    return task_axis
  if task_axis == "merged":
    raise ValueError(
      "task_axis 'merged' needs an algorithm whose mean update is that on the merged batch: one local step of "
      "plain gradient descent, on a loss whose attribute `rowwise` says that rows do not see each other. "
      "Use 'vmap', 'map' or a number of tasks."
    )
  raise ValueError(f"task_axis must be 'auto', 'vmap', 'map', 'merged' or a positive number of tasks, got {task_axis!r}.")


def map_tasks(function: Callable[[Any], Any], tasks: Any, how: str | int = "auto") -> Any:
  """`function` over the leading axis of `tasks`.

  Args:
    function: of one task.
    tasks: a pytree of arrays with a leading task axis.
    how: "vmap" (all at once), "map" (one after the other: less memory, and on a CPU faster, since a task's
      intermediates fit in the cache), a number (so many at once), or "auto": "map" on CPU, "vmap" elsewhere.

  Returns:
    The results, with a leading task axis.

  Raises:
    ValueError: an unknown `how`.
  """
  how = resolve_task_axis(how)
  if how == "vmap":
    return jax.vmap(function)(tasks)
  if how == "map":
    return jax.lax.map(function, tasks)
  return jax.lax.map(function, tasks, batch_size=int(how))


def sum_over_tasks(function: Callable[[Any], Any], tasks: Any, share: jax.Array, how: str | int = "auto") -> Any:
  """Σ_i share_i function(tasks_i). Only "vmap" ever holds all of the results.

  Args:
    function: of one task.
    tasks: a pytree of arrays with a leading task axis.
    share: (tasks,) their parts in the sum.
    how: as in `map_tasks`.

  Returns:
    The sum, a pytree like one result of `function`, in its types.

  Raises:
    ValueError: an unknown `how`.
  """
  how = resolve_task_axis(how)
  count = share.shape[0]
  together = min(count if how == "vmap" else 1 if how == "map" else int(how), count)

  def like(mean, x):  # a mean of float16 is float16, whatever the shares are; one of integers is no integer
    return mean.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else mean

  def block(tasks, share):
    if share.shape[0] == 1:
      result = function(jax.tree.map(lambda x: x[0], tasks))
      return jax.tree.map(lambda x: like(share[0] * x, x), result)
    return jax.tree.map(lambda x: like(jnp.tensordot(share, x, axes=1), x), jax.vmap(function)(tasks))

  blocks, rest = divmod(count, together)
  if blocks <= 1 and not rest:
    return block(tasks, share)
  whole = jax.tree.map(lambda x: x[: count - rest].reshape(blocks, together, *x.shape[1:]), (tasks, share))
  first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda whole: block(*jax.tree.map(lambda x: x[0], whole)), whole))
  total, _ = jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, block(*x)), None), first, whole)
  if rest:
    total = jax.tree.map(jnp.add, total, block(*jax.tree.map(lambda x: x[count - rest :], (tasks, share))))
  return total


def check_mesh(mesh: Mesh, tasks: int) -> None:
  """Raises a ValueError if the mesh is not one of `task_mesh`, or does not divide so many tasks evenly."""
  if mesh.axis_names != (TASK_AXIS,):
    raise ValueError(f"the mesh must have one axis, '{TASK_AXIS}', but has {mesh.axis_names}; make it with task_mesh().")
  if tasks % mesh.size:
    raise ValueError(f"{tasks} tasks cannot be spread evenly over {mesh.size} devices; a multiple of {mesh.size} can.")

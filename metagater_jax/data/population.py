"""Tasks as device arrays: one pool of images, and padded indices into it with counts.

A sample is stored once however unequal the tasks are; a batch is gathered by index on the device. Few-shot episodes and
populations of many thousand tasks are other indices into the same kind of pool.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagater_jax.core.checks import check_counts
from metagater_jax.core.random import sample_positions
from metagater_jax.data.partition import Partition

__all__ = [
  "Batch",
  "Episode",
  "Minibatches",
  "Pool",
  "Population",
  "TaskData",
  "check_partition",
  "check_samples",
  "make_population",
  "make_populations",
  "make_task",
  "own_positions",
  "sample_batch",
  "to_float",
]


class Batch(NamedTuple):
  """`images` (batch, …) floats, `labels` (batch,) integers, `weight` (batch,): 1, or 0 where a row is padding."""

  images: jax.Array
  labels: jax.Array
  weight: jax.Array


class Episode(NamedTuple):
  """One few-shot task: `support` (ways · shots rows) to adapt on, `query` (ways · queries rows) to be measured on.

  Labels are 0 … ways − 1; rows are sorted by label. Any leading axes (episodes) may precede.
  """

  support: Batch
  query: Batch


class Pool(NamedTuple):
  """`images` (samples, …) uint8 or floats, `labels` (samples,), and `scale` (mean, std) of pixels, see `to_float`."""

  images: jax.Array | None
  labels: jax.Array | None
  scale: jax.Array


class Minibatches(NamedTuple):
  """What a client draws in a round: rows of a pool, or the samples themselves. Any leading axes (rounds, clients) may precede.

  Attributes:
    rows: (draws, batch) of a pool; None where the samples are here.
    images, labels: (draws, batch, …) and (draws, batch); None where they are in a pool.
    weight: (draws, batch) 1, or 0 for padding.
  """

  rows: jax.Array | None
  images: jax.Array | None
  labels: jax.Array | None
  weight: jax.Array

  def batch(self, i: jax.Array | int, pool: Pool) -> Batch:
    """The client's i-th minibatch."""
    if self.rows is None:
      return Batch(to_float(self.images[i], pool.scale), self.labels[i], self.weight[i])  # type: ignore[index]
    return Batch(to_float(pool.images[self.rows[i]], pool.scale), pool.labels[self.rows[i]], self.weight[i])  # type: ignore[index]

  def merged(self, share: jax.Array, pool: Pool) -> Batch:
    """The first minibatches of several clients (clients, …) as one, whose weighted mean is that of the clients' means.

    Args:
      share: (clients,) their parts in the mean.
      pool: that `rows` are of.
    """
    first = jax.tree.map(lambda x: x[:, 0], self)
    weight = first.weight * (share / jnp.maximum(first.weight.sum(-1), 1))[:, None]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), first._replace(weight=weight))
    return jax.tree.map(lambda x: x[None], flat).batch(0, pool)


class TaskData(NamedTuple):
  """The train or the test part of one task: rows `index[:count]` of a pool.

  Attributes:
    images: (pool, …), uint8 or floats.
    labels: (pool,) integers.
    index: (longest,) integers; what follows `count` is padding and never used.
    count: how many samples there are.
    scale: (mean, std) of pixels, see `to_float`.
  """

  images: jax.Array
  labels: jax.Array
  index: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  count: jax.Array  # type: ignore[assignment]
  scale: jax.Array

  def rows(self, positions: jax.Array) -> Batch:
    """The samples at these positions (0 … count − 1) of the task; others become rows of weight 0.

    Such padding repeats samples of the task: a network that looks at a batch as a whole, as batch normalization does, must not see those of
    other tasks.
    """
    chosen = self.index[own_positions(positions, self.count)]
    return Batch(to_float(self.images[chosen], self.scale), self.labels[chosen], (positions < self.count).astype(jnp.float32))


def own_positions(positions: jax.Array, count: jax.Array) -> jax.Array:
  """Positions 0 … count − 1 as they are, and those beyond as these over again: padding of a task that is made of its own samples.

  Args:
    positions: integers.
    count: samples of the task, an array that broadcasts against them.

  Returns:
    Integers like `positions`.
  """
  return positions % jnp.maximum(count, 1)


class Population(NamedTuple):
  """All tasks. A pytree, to be passed to jitted functions as an argument.

  Attributes:
    images, labels: the pool that all tasks index.
    train_index, test_index: (tasks, longest) integers, padded.
    train_count, test_count: (tasks,) integers.
    scale: (mean, std) of pixels, see `to_float`.
  """

  images: jax.Array
  labels: jax.Array
  train_index: jax.Array
  train_count: jax.Array
  test_index: jax.Array
  test_count: jax.Array
  scale: jax.Array

  @property
  def pool(self) -> Pool:
    """What all tasks index."""
    return Pool(self.images, self.labels, self.scale)

  def train(self, task: jax.Array) -> TaskData:
    """The train part of one task."""
    return TaskData(self.images, self.labels, self.train_index[task], self.train_count[task], self.scale)

  def test(self, task: jax.Array) -> TaskData:
    """The test part of one task."""
    return TaskData(self.images, self.labels, self.test_index[task], self.test_count[task], self.scale)


# Mean and standard deviation that pixels in 0 … 1 are taken to have: uint8 images become floats in −1 … 1.
_SCALE = (0.5, 0.5)


def to_float(images: jax.Array, scale: jax.Array | tuple[float, float] = _SCALE) -> jax.Array:
  """uint8 pixels p to floats (p/255 − mean)/std with scale = (mean, std); floats stay as they are.

  Args:
    images: (…) uint8 or floats.
    scale: (mean, std) of pixels in 0 … 1.

  Returns:
    Floats of the same shape.
  """
  return (images.astype(jnp.float32) / 255 - scale[0]) / scale[1] if images.dtype == jnp.uint8 else images


def make_population(
  images: np.ndarray, labels: np.ndarray, partition: Partition, scale: tuple[float, float] = _SCALE, *, classes: int | None = None
) -> Population:
  """A population from any arrays: bring your own data.

  Args:
    images: (samples, height, width, channels) or any (samples, …), uint8 (scaled by `to_float`) or floats.
    labels: (samples,) integers 0 … classes − 1.
    partition: which samples belong to which task. Samples that no task holds are left out of the pool.
    scale: (mean, std) for uint8 images, see `to_float`.
    classes: how many the network tells apart; None: as many as there are labels, each of which must occur.

  Returns:
    The population; its pool has the samples that some task holds.

  Raises:
    ValueError: arrays that cannot be trained on (`check_samples`), a standard deviation that is not positive, or a partition that does not
      fit: of another data set, with negative numbers, or a task without train or test samples. The message names the first offender.
  """
  return make_populations(images, labels, [partition], scale, classes=classes)[0]


def make_populations(
  images: np.ndarray, labels: np.ndarray, partitions: Sequence[Partition], scale: tuple[float, float] = _SCALE, *, classes: int | None = None
) -> list[Population]:
  """Several populations of one data set that share the pool and have the same shapes, so that one program serves all.

  Arguments and errors as in `make_population`.

  Args:
    images, labels, scale, classes: as in `make_population`.
    partitions: one for each population.

  Returns:
    The populations, in the order of their partitions.

  Raises:
    ValueError: as in `make_population`.
  """
  labels = check_samples(images, labels, classes=classes)
  if not scale[1] > 0:
    raise ValueError(f"the standard deviation of pixels must be positive, got {scale[1]}.")
  partitions = [check_partition(partition, len(labels)) for partition in partitions]
  samples = np.unique(np.concatenate([part for p in partitions for part in (*p.train, *p.test)]))
  chosen = np.asarray(images[samples])
  check_finite(chosen, samples)
  pool, pool_labels = jnp.asarray(chosen), jnp.asarray(labels[samples])
  scale = jnp.asarray(np.array(scale, np.float32))
  longest = [max(len(part) for p in partitions for part in getattr(p, name)) for name in ("train", "test")]
  padded = [
    [_pad([np.searchsorted(samples, part) for part in parts], length) for parts, length in zip((p.train, p.test), longest)] for p in partitions
  ]
  return [Population(pool, pool_labels, *map(jnp.asarray, (*train, *test)), scale) for train, test in padded]  # type: ignore[call-arg]


def make_task(images: np.ndarray, labels: np.ndarray, scale: tuple[float, float] = _SCALE, *, classes: int | None = None) -> TaskData:
  """One task from plain arrays, to adapt to or to evaluate on.

  Args:
    images: (samples, …) uint8 (scaled by `to_float`) or floats.
    labels: (samples,) integers, 0 … classes − 1 of the network.
    scale: (mean, std) for uint8 images.
    classes: of the network, to check the labels against; None: they are not, since a task may lack some.

  Returns:
    A `TaskData` that holds all samples.

  Raises:
    ValueError: no samples, or arrays that cannot be trained on (`check_samples`).
  """
  labels = check_samples(images, labels, classes=classes, all_classes=False)
  check_finite(np.asarray(images), np.arange(len(labels)))
  return TaskData(*map(jnp.asarray, (images, labels, np.arange(len(labels), dtype=np.int32), np.int32(len(labels)), np.array(scale, np.float32))))


def check_samples(images: np.ndarray, labels: np.ndarray, *, classes: int | None = None, all_classes: bool = True) -> np.ndarray:
  """The labels as int32, if these are samples that a network can be trained on. Images are not read, so they may be a `numpy.memmap`.

  Args:
    images: (samples, …).
    labels: (samples,).
    classes: labels must be below; None: not checked, or see `all_classes`.
    all_classes: without `classes`, whether each of 0 … largest label must occur: labels 1 … n, or with gaps, are no numbers of a network's
      outputs.

  Returns:
    (samples,) int32.

  Raises:
    ValueError: images that are neither uint8 nor floats, labels that are not integers from 0 on, or numbers of both that differ. The message
      says what to do.
  """
  labels = np.asarray(labels)
  dtype = getattr(images, "dtype", None)
  if dtype is None or not hasattr(images, "shape"):
    raise ValueError(f"images must be an array (samples, …), got {type(images).__name__}.")
  if len(images) != len(labels):
    raise ValueError(f"there are {len(images)} images but {len(labels)} labels.")
  if not len(labels):
    raise ValueError("there are no samples.")
  if dtype != np.uint8 and not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(
      f"images must be uint8 (pixels 0 … 255, which are scaled) or floats (which are taken as they are), got {dtype}. Convert "
      "them: images.astype(np.float32) / their largest value, say."
    )
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    first = "" if labels.ndim != 1 or not labels.size else f" (the first is {labels[0]!r})"
    raise ValueError(f"labels must be integers of shape (samples,), got {labels.dtype}{list(labels.shape)}{first}.")
  if labels.min() < 0:
    worst = int(np.argmax(labels < 0))
    raise ValueError(f"labels must be 0 or more, but sample {worst} has {labels[worst]}; leave samples without a label out.")
  if classes is not None and labels.max() >= classes:
    worst = int(np.argmax(labels >= classes))
    raise ValueError(f"labels must lie in 0 … {classes - 1} for {classes} classes, but sample {worst} has {labels[worst]}.")
  if classes is None and all_classes:
    there = np.unique(labels)
    if len(there) != there[-1] + 1:
      missing = int(np.setdiff1d(np.arange(there[-1]), there)[0])
      raise ValueError(
        f"labels must be 0 … n − 1, but no sample has {missing} while the largest is {there[-1]}. Say how many classes the "
        f"network has (classes={there[-1] + 1}), or number them anew: np.unique(labels, return_inverse=True)[1]."
      )
  return labels.astype(np.int32)


def check_partition(partition: Partition, samples: int) -> Partition:
  """A partition with arrays of integers, if it fits a data set.

  Args:
    partition: whose parts may be lists.
    samples: of the data set.

  Returns:
    The partition.

  Raises:
    ValueError: a task without train or test samples, or a number that is not one of the data set's samples. The message names the first.
  """
  if len(partition.train) != len(partition.test) or not len(partition.train):
    raise ValueError(f"the partition has {len(partition.train)} train and {len(partition.test)} test parts; there must be one of each per task.")
  parts = {}
  for name in ("train", "test"):
    parts[name] = tuple(np.asarray(part) for part in getattr(partition, name))
    for task, part in enumerate(parts[name]):
      if not part.size:
        raise ValueError(f"task {task} of the partition has no {name} samples; leave such tasks out, or ask for larger ones.")
      if part.ndim != 1 or not np.issubdtype(part.dtype, np.integer):
        raise ValueError(f"the {name} part of task {task} must be numbers of samples, got {part.dtype}{list(part.shape)}.")
      if part.min() < 0:
        raise ValueError(f"the {name} part of task {task} names sample {part.min()}; samples are numbered from 0.")
      if part.max() >= samples:
        raise ValueError(
          f"the {name} part of task {task} names sample {part.max()}, but the data set has {samples}; the partition belongs to another one."
        )
  return Partition(**parts)


def check_finite(images: np.ndarray, numbers: np.ndarray) -> None:
  """Raises a ValueError that names the first image (by `numbers`) with a pixel that is not a finite number."""
  if images.dtype == np.uint8 or bool(np.isfinite(images.sum(dtype=np.float32 if images.dtype.itemsize < 8 else np.float64))):
    return  # a sum is quick, and finite if all are (it may overflow: then the search below finds nothing)
  bad = ~np.isfinite(images.reshape(len(images), -1).astype(np.float64)).all(1)
  if bad.any():
    raise ValueError(f"image {numbers[int(bad.argmax())]} has pixels that are not finite numbers.")


def sample_batch(key: jax.Array, data: TaskData, size: int) -> Batch:
  """A minibatch without replacement. A task with fewer than `size` samples gives all of them, padded with weight 0.

  Args:
    key: that the draw is a function of.
    data: the task.
    size: rows of the minibatch; at most the longest task has.

  Returns:
    The minibatch, (size, …).

  Raises:
    ValueError: a size that is not a whole number of at least 1.
  """
  check_counts(size=size)
  return data.rows(sample_positions(key, data.count, min(size, data.index.shape[0])))


def _pad(parts, length):
  counts = np.array([len(part) for part in parts], np.int32)
  index = np.zeros((len(parts), length), np.int32)
  for row, part in zip(index, parts):
    row[: len(part)] = part
  return index, counts

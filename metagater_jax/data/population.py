"""Tasks as device arrays: one pool of images, and padded indices into it with counts.

A sample is stored once however unequal the tasks are; a batch is gathered by index on the device. Few-shot episodes and
populations of many thousand tasks are other indices into the same kind of pool.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagater_jax.core.random import sample_positions
from metagater_jax.data.partition import Partition

__all__ = ["Batch", "Episode", "Minibatches", "Pool", "Population", "TaskData", "make_population", "make_populations", "make_task", "sample_batch",
           "to_float"]


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
      return Batch(to_float(self.images[i], pool.scale), self.labels[i], self.weight[i])
    return Batch(to_float(pool.images[self.rows[i]], pool.scale), pool.labels[self.rows[i]], self.weight[i])

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
  index: jax.Array
  count: jax.Array
  scale: jax.Array

  def rows(self, positions: jax.Array) -> Batch:
    """The samples at these positions (0 … count − 1) of the task; others become rows of weight 0."""
    chosen = self.index[positions]
    return Batch(to_float(self.images[chosen], self.scale), self.labels[chosen], (positions < self.count).astype(jnp.float32))


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


def make_population(images: np.ndarray, labels: np.ndarray, partition: Partition,
                    scale: tuple[float, float] = _SCALE) -> Population:
  """A population from any arrays: bring your own data.

  Args:
    images: (samples, height, width, channels) or any (samples, …), uint8 (scaled by `to_float`) or floats.
    labels: (samples,) integers 0 … classes − 1.
    partition: which samples belong to which task. Samples that no task holds are left out of the pool.
    scale: (mean, std) for uint8 images, see `to_float`.

  Returns:
    The population; its pool has the samples that some task holds.

  Raises:
    ValueError: lengths that differ, a standard deviation that is not positive, or a partition of another data set.
  """
  return make_populations(images, labels, [partition], scale)[0]


def make_populations(images: np.ndarray, labels: np.ndarray, partitions: Sequence[Partition],
                     scale: tuple[float, float] = _SCALE) -> list[Population]:
  """Several populations of one data set that share the pool and have the same shapes, so that one program serves all.

  Arguments and errors as in `make_population`.

  Args:
    images, labels, scale: as in `make_population`.
    partitions: one for each population.

  Returns:
    The populations, in the order of their partitions.

  Raises:
    ValueError: as in `make_population`.
  """
  if len(images) != len(labels):
    raise ValueError(f"there are {len(images)} images but {len(labels)} labels.")
  if not scale[1] > 0:
    raise ValueError(f"the standard deviation of pixels must be positive, got {scale[1]}.")
  samples = np.unique(np.concatenate([part for p in partitions for part in (*p.train, *p.test)]))
  if samples[-1] >= len(labels):
    raise ValueError(f"the partition names sample {samples[-1]}, but the data set has {len(labels)}; it belongs to another "
                     "one.")
  pool, pool_labels = jnp.asarray(images[samples]), jnp.asarray(np.asarray(labels)[samples].astype(np.int32))
  scale = jnp.asarray(np.array(scale, np.float32))
  longest = [max(len(part) for p in partitions for part in getattr(p, name)) for name in ("train", "test")]
  padded = [[_pad([np.searchsorted(samples, part) for part in parts], length)
             for parts, length in zip((p.train, p.test), longest)] for p in partitions]
  return [Population(pool, pool_labels, *map(jnp.asarray, (*train, *test)), scale) for train, test in padded]


def make_task(images: np.ndarray, labels: np.ndarray, scale: tuple[float, float] = _SCALE) -> TaskData:
  """One task from plain arrays, to adapt to or to evaluate on.

  Args:
    images: (samples, …) uint8 (scaled by `to_float`) or floats.
    labels: (samples,) integers.
    scale: (mean, std) for uint8 images.

  Returns:
    A `TaskData` that holds all samples.
  """
  return TaskData(*map(jnp.asarray, (images, np.asarray(labels, np.int32), np.arange(len(labels)), len(labels),
                                     np.array(scale, np.float32))))


def sample_batch(key: jax.Array, data: TaskData, size: int) -> Batch:
  """A minibatch without replacement. A task with fewer than `size` samples gives all of them, padded with weight 0.

  Args:
    key: that the draw is a function of.
    data: the task.
    size: rows of the minibatch; at most the longest task has.

  Returns:
    The minibatch, (size, …).
  """
  return data.rows(sample_positions(key, data.count, min(size, data.index.shape[0])))


def _pad(parts, length):
  counts = np.array([len(part) for part in parts], np.int32)
  index = np.zeros((len(parts), length), np.int32)
  for row, part in zip(index, parts):
    row[:len(part)] = part
  return index, counts

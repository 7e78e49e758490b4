"""Few-shot tasks, drawn on the device: N ways, K shots, Q queries per way.

An episode is a function of a key: which classes, in which order they are labelled, which samples support and which query.
Batches of episodes are gathered under `vmap` from one pool of images; the host has no part in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagater_jax.core.checks import check_counts
from metagater_jax.core.random import sample_positions
from metagater_jax.data.population import Batch, Episode, check_finite, check_samples, own_positions, to_float

__all__ = ["ClassPool", "augment_images", "check_episodes", "make_class_pool", "sample_episode", "sample_episodes", "with_rotations"]


class ClassPool(NamedTuple):
  """The samples of one split, by class. A pytree, to be passed to jitted functions as an argument.

  Attributes:
    images: (samples, …) uint8 or floats.
    index: (classes, longest) rows of `images`; what follows a class's count is padding and never used.
    count: (classes,) how many samples there are.
    scale: (mean, std) of pixels, see `to_float`.
  """

  images: jax.Array
  index: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  count: jax.Array  # type: ignore[assignment]
  scale: jax.Array


def make_class_pool(
  images: np.ndarray, labels: np.ndarray, classes: Sequence[int] | None = None, scale: tuple[float, float] = (0.5, 0.5)
) -> ClassPool:
  """The samples of some classes; nothing of the other classes is in the pool.

  Args:
    images: (samples, …), uint8 (scaled by `to_float`) or floats.
    labels: (samples,) integers.
    classes: which; None: all that `labels` has.
    scale: (mean, std) for uint8 images.

  Returns:
    The pool.

  Raises:
    ValueError: arrays that cannot be trained on (`data.check_samples`), a class twice, or one without samples.
  """
  labels = check_samples(images, labels, all_classes=False)
  classes = np.unique(labels) if classes is None else np.asarray(classes)
  if len(np.unique(classes)) != len(classes):
    raise ValueError("the classes of a pool must differ from each other.")
  rows = [np.flatnonzero(labels == label) for label in classes]
  if empty := [int(label) for label, own in zip(classes, rows) if not len(own)]:
    raise ValueError(f"there are no samples of class {', '.join(map(str, empty))}.")
  used = np.sort(np.concatenate(rows))
  check_finite(np.asarray(images[used]), used)
  count = np.array([len(own) for own in rows], np.int32)
  index = np.zeros((len(rows), count.max()), np.int32)
  for row, own in zip(index, rows):
    row[: len(own)] = np.searchsorted(used, own)
  return ClassPool(jnp.asarray(images[used]), jnp.asarray(index), jnp.asarray(count), jnp.asarray(np.array(scale, np.float32)))


def with_rotations(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Every class four times: class c turned by r · 90° is class 4c + r (the usual augmentation of Omniglot).

  Args:
    images: (samples, size, size, …), square.
    labels: (samples,) integers.

  Returns:
    Images and labels, four times as many.

  Raises:
    ValueError: images that are not square.
  """
  if images.shape[1] != images.shape[2]:
    raise ValueError(f"only square images can be turned by 90°; these are {images.shape[1]}×{images.shape[2]}.")
  turned = [np.rot90(images, r, axes=(1, 2)) for r in range(4)]
  return np.concatenate(turned), np.concatenate([4 * np.asarray(labels) + r for r in range(4)])


def check_episodes(pool: ClassPool, *, ways: int, shots: int, queries: int) -> None:
  """Raises a ValueError if such episodes cannot be drawn from a pool: too few classes, or too few samples in one.

  Args:
    pool: that is drawn from.
    ways, shots, queries: of the episodes.

  Returns:
    Nothing.

  Raises:
    ValueError: see there.
  """
  check_counts(ways=ways, shots=shots, queries=queries)
  if ways > pool.count.shape[0]:
    raise ValueError(f"{ways} ways are more than the {pool.count.shape[0]} classes there are.")
  if isinstance(pool.count, jax.core.Tracer):
    return  # checked where the pool is made; of a class that has too few, `sample_episode` gives rows of weight 0
  fewest = int(np.asarray(pool.count).min())  # NumPy's, because under `jit` even a constant's minimum is traced
  if shots + queries > fewest:
    raise ValueError(f"shots={shots} and queries={queries} need {shots + queries} samples of each class, but a class has {fewest}.")


def sample_episode(key: jax.Array, pool: ClassPool, *, ways: int, shots: int, queries: int) -> Episode:
  """One episode: `ways` different classes in random order, `shots + queries` different samples of each.

  Under `jit`, where the pool is an argument, the samples there are cannot be checked: a class with too few of them has rows of weight 0 in the
  place of the others, first among its queries. `check_episodes` says beforehand whether there is one.

  Args:
    key: that the episode is a function of.
    pool: what is drawn from.
    ways, shots, queries: how many classes, and samples of each to adapt on and to be measured on.

  Returns:
    The episode.

  Raises:
    ValueError: see `check_episodes`.
  """
  check_episodes(pool, ways=ways, shots=shots, queries=queries)
  class_key, sample_key = jax.random.split(key)
  classes = sample_positions(class_key, jnp.array(pool.count.shape[0]), ways)
  count = pool.count[classes]
  positions = jax.vmap(lambda key, count: sample_positions(key, count, shots + queries))(jax.random.split(sample_key, ways), count)
  # The samples of a class that has too few come first, so that it has a support as long as it has any.
  positions = jnp.where((count < shots + queries)[:, None], jnp.sort(positions, 1), positions)
  rows = pool.index[classes[:, None], own_positions(positions, count[:, None])]
  weight = (positions < count[:, None]).astype(jnp.float32)

  def part(own):
    labels = jnp.repeat(jnp.arange(ways), rows[:, own].shape[1])
    return Batch(to_float(pool.images[rows[:, own].ravel()], pool.scale), labels, weight[:, own].ravel())

  return Episode(part(slice(None, shots)), part(slice(shots, None)))


def sample_episodes(key: jax.Array, pool: ClassPool, episodes: int, *, ways: int, shots: int, queries: int) -> Episode:
  """So many independent episodes, with a leading axis.

  Args:
    key, pool, ways, shots, queries: as in `sample_episode`.
    episodes: how many.

  Returns:
    An `Episode` with a leading axis (episodes,).

  Raises:
    ValueError: as in `sample_episode`.
  """
  return jax.vmap(lambda key: sample_episode(key, pool, ways=ways, shots=shots, queries=queries))(jax.random.split(key, episodes))


def augment_images(key: jax.Array, images: jax.Array, *, flip: bool = True, shift: int = 4) -> jax.Array:
  """Each image on its own mirrored or not, and moved by up to `shift` pixels in both directions; what comes in repeats its border.

  For training episodes where a class has few samples. As a `sample` of `run_meta_steps`:

      def sample(key, pool):
        episode_key, *keys = jax.random.split(key, 3)
        episode = mg.fewshot.sample_episode(episode_key, pool, ways=5, shots=1, queries=15)
        return mg.data.Episode(*(part._replace(images=mg.fewshot.augment_images(k, part.images)) for k, part in zip(keys, episode)))

  Args:
    key: that the draw is a function of.
    images: (batch, height, width, channels).
    flip: left to right, with probability one half.
    shift: the largest, in pixels; 0: none.

  Returns:
    Images of the same shape.

  Raises:
    ValueError: images of other shapes, or a shift that is not in [0, the images' size).
  """
  if images.ndim != 4 or not 0 <= shift < min(images.shape[1:3]):
    raise ValueError(f"augment_images wants (batch, height, width, channels) and a shift in [0, their size), got {images.shape} and {shift}.")
  flip_key, shift_key = jax.random.split(key)
  if flip:
    mirrored = jax.random.bernoulli(flip_key, shape=images.shape[:1])
    images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
  if shift:
    moved = jax.random.randint(shift_key, (2, images.shape[0], 1), -shift, shift + 1)
    rows, columns = (jnp.clip(jnp.arange(size) + offset, 0, size - 1) for size, offset in zip(images.shape[1:3], moved))
    images = jax.vmap(lambda image, rows, columns: image[rows][:, columns])(images, rows, columns)
  return images

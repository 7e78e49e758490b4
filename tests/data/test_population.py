"""Padded task arrays: what a user puts in is what a task gives out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg


@pytest.fixture(scope="module")
def own_data():
  rng = np.random.default_rng(0)
  images, labels = rng.integers(0, 256, (50, 4, 4, 1)).astype(np.uint8), rng.integers(0, 3, 50)
  partition = mg.data.Partition((np.array([40, 3, 7]), np.array([11])), (np.array([20]), np.array([49, 0])))
  return images, labels, partition


def test_tasks_hold_their_samples(own_data):
  images, labels, partition = own_data
  population = mg.make_population(images, labels, partition)
  assert population.images.dtype == jnp.uint8 and len(population.images) == 7  # only what the tasks hold
  for part, indices in (("train", partition.train), ("test", partition.test)):
    for task, expected in enumerate(indices):
      batch = getattr(population, part)(task).rows(jnp.arange(4))
      count = len(expected)
      np.testing.assert_array_equal(batch.weight, np.arange(4) < count)
      np.testing.assert_array_equal(batch.labels[:count], labels[expected])
      np.testing.assert_allclose(batch.images[:count], images[expected] / 127.5 - 1, atol=1e-6)


def test_scale_of_pixels(own_data):
  images, labels, partition = own_data
  population = mg.make_population(images, labels, partition, scale=(0.1307, 0.3081))
  batch = population.train(1).rows(jnp.arange(1))
  np.testing.assert_allclose(batch.images[0], (images[11] / 255 - 0.1307) / 0.3081, rtol=1e-4, atol=1e-5)
  floats = mg.make_population(images.astype(np.float32), labels, partition)
  np.testing.assert_array_equal(floats.train(1).rows(jnp.arange(1)).images[0], images[11])


@pytest.mark.parametrize("size", [7, 8, 9, 20])
def test_a_batch_larger_than_the_task_is_the_whole_task(size):
  data = mg.data.make_task(np.arange(9, dtype=np.float32)[:, None], np.arange(9))._replace(count=jnp.array(7))
  batch = mg.data.sample_batch(jax.random.key(0), data, size)
  assert sorted(np.asarray(batch.labels)[np.asarray(batch.weight) == 1]) == list(range(7))
  assert batch.weight.sum() == 7 and len(batch.weight) == min(size, 9)


def test_errors(own_data):
  images, labels, partition = own_data
  with pytest.raises(ValueError, match="49 images but 50 labels"):
    mg.make_population(images[:-1], labels, partition)
  with pytest.raises(ValueError, match="train part of task 0 names sample 40, but the data set has 40"):
    mg.make_population(images[:40], labels[:40], partition)
  with pytest.raises(ValueError, match="standard deviation of pixels must be positive, got 0"):
    mg.make_population(images, labels, partition, scale=(0.0, 0.0))

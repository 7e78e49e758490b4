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


def test_minibatches_are_drawn_without_replacement_and_evenly():
  data = mg.data.make_task(np.arange(9, dtype=np.float32)[:, None], np.arange(9))._replace(count=jnp.array(7))
  draw = jax.jit(jax.vmap(lambda k: mg.data.sample_batch(k, data, 3).labels))
  drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 7000)))
  assert all(len(set(row)) == 3 for row in drawn[:500])
  counts = np.bincount(drawn.ravel(), minlength=9)
  assert counts[7] == counts[8] == 0  # padding is never drawn
  assert np.abs(counts[:7] - 3000).max() < 5 * np.sqrt(3000 * 4 / 7)


def test_positions_are_uniform_over_ordered_draws():
  draws = np.asarray(jax.vmap(lambda k: mg.core.sample_positions(k, jnp.array(4), 3))(
      jax.random.split(jax.random.key(0), 24_000)))
  counts = np.bincount(draws @ [16, 4, 1], minlength=64)
  assert (counts > 0).sum() == 24  # 4·3·2 ordered draws without repetition, and no other
  assert np.abs(counts[counts > 0] - 1000).max() < 5 * np.sqrt(1000)


def test_positions_of_a_large_task_beyond_the_unrolled_steps():
  drawn = np.asarray(mg.core.sample_positions(jax.random.key(1), jnp.array(100), 100))
  assert sorted(drawn) == list(range(100)) and (drawn != np.arange(100)).any()


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
  with pytest.raises(ValueError, match="names sample 49, but the data set has 40"):
    mg.make_population(images[:40], labels[:40], partition)
  with pytest.raises(ValueError, match="standard deviation of pixels must be positive, got 0"):
    mg.make_population(images, labels, partition, scale=(0.0, 0.0))

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


@pytest.fixture
def arrays():
  labels = np.arange(40) % 4
  parts = tuple(np.arange(i, 40, 4) for i in range(2))
  return np.zeros((40, 2, 2, 1), np.float32), labels, mg.data.Partition(parts, parts[::-1])


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda x, y: (x, y + 1), "no sample has 0 while the largest is 4.*classes=5.*return_inverse"),
    (lambda x, y: (x, 2 * y), "no sample has 1 while the largest is 6"),
    (lambda x, y: (x, np.where(np.arange(40) == 7, -1, y)), "sample 7 has -1"),
    (lambda x, y: (x, y + 0.9), "labels must be integers.*float64"),
    (lambda x, y: (x, y[:, None]), r"labels must be integers of shape \(samples,\), got int64\[40, 1\]"),
    (lambda x, y: (x.astype(np.uint16), y), "uint8 .*or floats.*got uint16"),
    (lambda x, y: (x.astype(np.int64), y), "got int64"),
    (lambda x, y: (x.astype(bool), y), "got bool"),
    (lambda x, y: (x.tolist(), y), "images must be an array"),
    (lambda x, y: (np.where(np.arange(40)[:, None, None, None] == 5, np.nan, x), y), "image 5 has pixels that are not finite"),
  ],
)
def test_arrays_that_would_train_to_nonsense(arrays, change, message):
  images, labels, partition = arrays
  mg.make_population(images, labels, partition)
  images, labels = change(images, labels)
  with pytest.raises(ValueError, match=message):
    mg.make_population(images, labels, partition)
  if "no sample has" not in message:  # a single task may lack labels, and a pool numbers its classes anew
    for make in (mg.data.make_task, mg.fewshot.make_class_pool):
      with pytest.raises(ValueError, match=message):
        make(images, labels)


def test_labels_may_have_gaps_where_the_number_of_classes_is_said(arrays):
  images, labels, partition = arrays
  assert mg.make_population(images, 2 * labels, partition, classes=7).labels.max() == 2
  with pytest.raises(ValueError, match="labels must lie in 0 … 5 for 6 classes, but sample 3 has 6"):
    mg.make_population(images, 2 * labels, partition, classes=6)
  with pytest.raises(ValueError, match="but sample 3 has 3"):
    mg.data.make_task(images, labels, classes=3)


@pytest.mark.parametrize(
  "train, test, message",
  [
    (([0, 1], [2]), ([3], []), "task 1 of the partition has no test samples"),
    (([0, 1], []), ([3], [4]), "task 1 .* no train samples"),
    (([0, -1], [2]), ([3], [4]), "train part of task 0 names sample -1"),
    (([0.0, 1.0], [2]), ([3], [4]), "task 0 must be numbers of samples, got float"),
    (([0], [1]), ([2],), "2 train and 1 test parts"),
    ((), (), "0 train and 0 test"),
  ],
)
def test_partitions_that_do_not_fit(arrays, train, test, message):
  images, labels, _ = arrays
  with pytest.raises(ValueError, match=message):
    mg.make_population(images, labels, mg.data.Partition(train, test))
  with pytest.raises(ValueError, match=message):
    mg.federated.TaskStore(images, labels, mg.data.Partition(train, test), (0.5, 0.5))


def test_a_partition_may_be_lists(arrays):
  images, labels, _ = arrays
  population = mg.make_population(images, labels, mg.data.Partition(([0, 1], [2, 5]), ([3], [4])))
  np.testing.assert_array_equal(population.labels[population.train_index], labels[[[0, 1], [2, 5]]])

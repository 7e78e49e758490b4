"""Properties of partitions that every user relies on, over generated data sets and settings."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import metagater_jax as mg


def check_partition(partition, labels):
  """Disjoint, within the data, and every label of a task in its train and in its test part."""
  everything = np.concatenate([*partition.train, *partition.test])
  assert len(np.unique(everything)) == len(everything)
  assert everything.min() >= 0 and everything.max() < len(labels)
  for train, test in zip(partition.train, partition.test):
    assert set(labels[train]) == set(labels[test]) != set()


labels_of = lambda classes, samples, seed: np.random.default_rng(seed).integers(0, classes, samples)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
  classes=st.integers(3, 12),
  tasks=st.integers(1, 15),
  labels_per_task=st.integers(1, 3),
  seed=st.integers(0, 999),
  fill=st.booleans(),
  cyclic=st.booleans(),
  low=st.integers(4, 20),
  test_fraction=st.sampled_from([0.1, 0.25, 0.5]),
)
def test_tasks_of_few_labels(classes, tasks, labels_per_task, seed, fill, cyclic, low, test_fraction):
  assume(tasks * low * labels_per_task <= 300)  # where there is plenty of data, there must be a partition
  labels = labels_of(classes, 2500, seed)
  partition = mg.partition_by_label(
    labels, tasks=tasks, labels_per_task=labels_per_task, size_range=(low, 4 * low), seed=seed, test_fraction=test_fraction, fill=fill, cyclic=cyclic
  )
  check_partition(partition, labels)
  assert len(partition) == tasks
  for i, (train, test) in enumerate(zip(partition.train, partition.test)):
    assert len(set(labels[train])) == labels_per_task
    # Rounding to whole samples of each label may take one more of each.
    assert low <= len(train) <= 4 * low + labels_per_task
    assert abs(len(test) / (len(train) + len(test)) - test_fraction) <= labels_per_task / len(train) + 0.02
    if cyclic:
      assert set(labels[train]) == {(i + j) % classes for j in range(labels_per_task)}


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(2, 10), tasks=st.integers(1, 12), concentration=st.sampled_from([0.1, 0.5, 5.0]), seed=st.integers(0, 999))
def test_dirichlet_tasks(classes, tasks, concentration, seed):
  tasks = min(tasks, {0.1: 2, 0.5: 4, 5.0: 12}[concentration])  # so few that a draw which fills them all is found
  labels = labels_of(classes, 3000, seed)
  partition = mg.data.partition_by_dirichlet(labels, tasks=tasks, concentration=concentration, seed=seed)
  check_partition(partition, labels)
  # Only labels of which a task would hold a single sample are left out.
  assert sum(map(len, partition.train + partition.test)) >= len(labels) - classes * tasks
  assert min(len(a) + len(b) for a, b in zip(partition.train, partition.test)) >= 8


def test_concentration_sets_how_alike_tasks_are():
  labels = labels_of(10, 20_000, 0)

  def mean_largest_share(concentration):
    partition = mg.data.partition_by_dirichlet(labels, tasks=10, concentration=concentration, seed=0)
    return np.mean([np.bincount(labels[p]).max() / len(p) for p in partition.train])

  shares = [mean_largest_share(c) for c in (0.1, 1.0, 100.0)]
  assert shares[0] > shares[1] > shares[2] and shares[2] < 0.15


def test_a_partition_is_a_function_of_its_seed():
  labels = labels_of(10, 3000, 0)
  make = lambda seed: mg.partition_by_label(labels, tasks=10, labels_per_task=2, size_range=(20, 200), seed=seed)
  for a, b in zip(make(3).train, make(3).train):
    np.testing.assert_array_equal(a, b)
  assert any(len(a) != len(b) or (a != b).any() for a, b in zip(make(3).train, make(4).train))


def test_filling_uses_the_data_and_sizes_spread_over_the_range():
  labels = np.repeat(np.arange(10), 6000)
  partition = mg.partition_by_label(labels, tasks=100, labels_per_task=2, size_range=(221, 2792), seed=0)
  sizes = np.array([len(p) for p in partition.train])
  held = sum(map(len, partition.train + partition.test))
  assert held > 0.95 * len(labels)
  assert sizes.min() >= 221 and sizes.max() > 1000 and np.median(sizes) < sizes.mean()
  small = mg.partition_by_label(labels, tasks=100, labels_per_task=2, size_range=(20, 100), seed=0, fill=False)
  assert sum(map(len, small.train)) < 7000


def test_json_round_trip():
  import json

  partition = mg.partition_by_label(labels_of(4, 200, 0), tasks=3, labels_per_task=2, size_range=(10, 30), seed=0)
  again = mg.data.Partition.from_json(json.loads(json.dumps(partition.to_json())))
  for a, b in zip(partition.train + partition.test, again.train + again.test):
    np.testing.assert_array_equal(a, b)


def test_target_and_validation_tasks_are_held_out():
  training, validation, targets = mg.data.split_tasks(20, 5, seed=0, validation=3)
  assert (len(training), len(validation), len(targets)) == (12, 3, 5)
  assert sorted([*training, *validation, *targets]) == list(range(20))
  np.testing.assert_array_equal(mg.data.split_tasks(20, 5, seed=0)[2], targets)  # the targets do not depend on validation
  assert any((mg.data.split_tasks(20, 5, seed=s)[2] != targets).any() for s in range(1, 4))


def test_target_tasks_may_be_seen_but_validation_tasks_never():
  training, validation, targets = mg.data.split_tasks(20, 5, seed=0, validation=3, seen=True)
  assert len(training) == 17 and set(targets) <= set(training) and not set(validation) & set(training)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(labels_per_task=11), "labels_per_task is 11, but the data has 10 classes"),
    (dict(size_range=(100, 50)), r"1 <= smallest <= largest, got \(100, 50\)"),
    (dict(size_range=(500, 900)), "cannot fill.*20 tasks of at least 500 train samples need 10000, there are 2250"),
    (dict(size_range=(1, 9)), "starts at 1, but a task of 2 labels"),
    (dict(tasks=0), "tasks must be at least 1, got 0"),
    (dict(test_fraction=1.0), "test_fraction must lie between 0 and 1, got 1.0"),
  ],
)
def test_errors_name_the_numbers(change, message):
  options = dict(tasks=20, labels_per_task=2, size_range=(20, 200), seed=0) | change
  with pytest.raises(ValueError, match=message):
    mg.partition_by_label(labels_of(10, 3000, 0), **options)


def test_other_errors():
  with pytest.raises(ValueError, match="one-dimensional integer array, got float64"):
    mg.partition_by_label(np.ones(3), tasks=1, labels_per_task=1, size_range=(1, 2), seed=0)
  with pytest.raises(ValueError, match="concentration must be positive, got 0"):
    mg.data.partition_by_dirichlet(labels_of(3, 30, 0), tasks=2, concentration=0, seed=0)
  with pytest.raises(ValueError, match="target_tasks is 4 and validation_tasks 0, but there are 4 tasks, of which at"):
    mg.data.split_tasks(4, 4, 0)
  with pytest.raises(ValueError, match="target_tasks is 2 and validation_tasks 2, but there are 4 tasks"):
    mg.data.split_tasks(4, 2, 0, validation=2)


def test_parts_of_a_data_set_share_nothing_and_have_every_class():
  labels = np.random.default_rng(0).integers(0, 7, 500)
  runs, held = mg.data.split_samples(labels, 0.25)
  assert sorted([*runs, *held]) == list(range(500)) and (np.diff(held) > 0).all()
  np.testing.assert_allclose(np.bincount(labels[held]), 0.25 * np.bincount(labels), atol=0.5)
  np.testing.assert_array_equal(mg.data.split_samples(labels, 0.25)[1], held)
  assert (mg.data.split_samples(labels, 0.25, seed=1)[1][:20] != held[:20]).any() and not len(mg.data.split_samples(labels, 0.0)[1])
  with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
    mg.data.split_samples(labels, 1.0)
  tasks = mg.partition_by_label(labels[held], tasks=3, labels_per_task=2, size_range=(4, 20), seed=0).of(held)
  assert set(np.concatenate(tasks.train)) <= set(held) and all(len(set(labels[part])) == 2 for part in tasks.train)

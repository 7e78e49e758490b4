"""Splits of classes: the benchmarks' own, and at random."""

from metagater_jax.fewshot.splits import CIFAR_FS, cifar_fs_classes, split_classes


def test_cifar_fs_is_split_by_name():
  classes = cifar_fs_classes()
  assert [len(classes[split]) for split in ("train", "validation", "test")] == [64, 16, 20]
  assert sorted(sum(classes.values(), [])) == list(range(100))
  # Some of CIFAR-100's own numbers.
  for split, name, number in (
    ("train", "apple", 0),
    ("test", "bicycle", 8),
    ("validation", "motorcycle", 48),
    ("test", "rocket", 69),
    ("test", "worm", 99),
  ):
    assert classes[split][CIFAR_FS[split].index(name)] == number


def test_a_split_of_classes_is_a_partition():
  split = split_classes(range(100, 140), seed=0)
  assert sorted(sum(split.values(), [])) == list(range(100, 140))
  assert [len(split[name]) for name in ("train", "validation", "test")] == [26, 4, 10]

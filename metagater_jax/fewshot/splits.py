"""The classes of few-shot benchmarks, and how they are split: CIFAR-FS, and Omniglot by characters."""

from collections.abc import Sequence

import numpy as np

__all__ = ["CIFAR_FS", "cifar_fs_classes", "split_classes"]

# The standard split of CIFAR-100's classes (Bertinetto et al. 2019).
CIFAR_FS = {
  "train": (
    "apple",
    "aquarium_fish",
    "bear",
    "bee",
    "bottle",
    "bowl",
    "boy",
    "bridge",
    "bus",
    "can",
    "castle",
    "caterpillar",
    "chair",
    "clock",
    "cloud",
    "cockroach",
    "couch",
    "cup",
    "dinosaur",
    "dolphin",
    "elephant",
    "forest",
    "girl",
    "hamster",
    "house",
    "kangaroo",
    "keyboard",
    "lawn_mower",
    "lion",
    "lizard",
    "lobster",
    "mountain",
    "mouse",
    "mushroom",
    "oak_tree",
    "orange",
    "orchid",
    "palm_tree",
    "pear",
    "pine_tree",
    "plate",
    "porcupine",
    "possum",
    "rabbit",
    "raccoon",
    "ray",
    "road",
    "seal",
    "shrew",
    "skunk",
    "skyscraper",
    "snake",
    "spider",
    "squirrel",
    "streetcar",
    "sunflower",
    "tank",
    "tiger",
    "train",
    "trout",
    "tulip",
    "turtle",
    "willow_tree",
    "wolf",
  ),
  "validation": (
    "beaver",
    "beetle",
    "butterfly",
    "camel",
    "cattle",
    "crab",
    "crocodile",
    "flatfish",
    "lamp",
    "maple_tree",
    "motorcycle",
    "otter",
    "sea",
    "shark",
    "television",
    "tractor",
  ),
  "test": (
    "baby",
    "bed",
    "bicycle",
    "chimpanzee",
    "fox",
    "leopard",
    "man",
    "pickup_truck",
    "plain",
    "poppy",
    "rocket",
    "rose",
    "snail",
    "sweet_pepper",
    "table",
    "telephone",
    "wardrobe",
    "whale",
    "woman",
    "worm",
  ),
}


def cifar_fs_classes() -> dict[str, list[int]]:
  """Labels of CIFAR-100's classes by split: its fine labels are numbered in the alphabetical order of their names.

  Returns:
    (64,), (16,) and (20,) labels.
  """
  number = {name: i for i, name in enumerate(sorted(name for names in CIFAR_FS.values() for name in names))}
  return {split: [number[name] for name in names] for split, names in CIFAR_FS.items()}


def split_classes(classes: Sequence[int], seed: int, validation: float = 0.1, test: float = 0.25) -> dict[str, list[int]]:
  """Classes at random into train, validation and test, of which two get these fractions.

  Args:
    classes: numbers.
    seed: that the split is a function of.
    validation, test: fractions of the classes.

  Returns:
    Sorted classes by name of the split.
  """
  order = np.random.default_rng(seed).permutation(np.asarray(classes))
  held = round(validation * len(order)), round(test * len(order))
  parts = np.split(order, [held[0], sum(held)])
  return {name: sorted(map(int, part)) for name, part in zip(("validation", "test", "train"), parts)}

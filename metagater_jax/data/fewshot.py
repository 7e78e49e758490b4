"""The classes of few-shot benchmarks, and how they are split: CIFAR-FS, and Omniglot by characters."""

from collections.abc import Sequence

import numpy as np

__all__ = ["CIFAR_FS_TEST", "CIFAR_FS_VALIDATION", "cifar_fs_classes", "split_classes"]

# The standard split of CIFAR-100's classes (Bertinetto et al. 2019); the other 64 are for training.
CIFAR_FS_VALIDATION = (
    "beaver", "beetle", "butterfly", "camel", "cattle", "crab", "crocodile", "flatfish", "lamp", "maple_tree", "motorcycle",
    "otter", "sea", "shark", "television", "tractor")
CIFAR_FS_TEST = (
    "baby", "bed", "bicycle", "chimpanzee", "fox", "leopard", "man", "pickup_truck", "plain", "poppy", "rocket", "rose", "snail",
    "sweet_pepper", "table", "telephone", "wardrobe", "whale", "woman", "worm")


def cifar_fs_classes(names: Sequence[str]) -> dict[str, list[int]]:
  """Labels of CIFAR-100's classes by split, from their names in the order of the labels.

  Raises:
    ValueError: these are not the names of CIFAR-100's fine classes.
  """
  if missing := sorted(set(CIFAR_FS_VALIDATION + CIFAR_FS_TEST) - set(names)):
    raise ValueError(f"these are not CIFAR-100's 100 classes: {', '.join(missing[:5])} are missing.")
  held_out = {"validation": CIFAR_FS_VALIDATION, "test": CIFAR_FS_TEST}
  splits = {split: [names.index(name) for name in own] for split, own in held_out.items()}
  return {"train": [i for i, name in enumerate(names) if name not in CIFAR_FS_VALIDATION + CIFAR_FS_TEST], **splits}


def split_classes(classes: Sequence[int], seed: int, validation: float = 0.1, test: float = 0.25) -> dict[str, list[int]]:
  """Classes at random into train, validation and test, of which two get these fractions."""
  order = np.random.default_rng(seed).permutation(np.asarray(classes))
  held = round(validation * len(order)), round(test * len(order))
  parts = np.split(order, [held[0], sum(held)])
  return {name: sorted(map(int, part)) for name, part in zip(("validation", "test", "train"), parts)}

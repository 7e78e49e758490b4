"""A few-shot experiment that takes seconds."""

import numpy as np

import metagater_jax as mg
from configs import cifarfs_maml


def small_splits():
  """Pools of 16×16 images whose pattern tells the class; 8, 5 and 5 classes of 10."""
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(18), 10)
  images = (rng.normal(size=(18, 16, 16, 1))[labels] + 0.4 * rng.normal(size=(180, 16, 16, 1))).astype(np.float32)
  own = {"train": range(8), "validation": range(8, 13), "test": range(13, 18)}
  return {split: mg.fewshot.make_class_pool(images, labels, list(classes)) for split, classes in own.items()}


def small(**fields):
  """The default few-shot config, made small, with these fields; `prune` is a dictionary of its own."""
  config = cifarfs_maml.get_config()
  prune = fields.pop("prune", {})
  config.update(
    {
      "ways": 3,
      "queries": 4,
      "widths": (4, 4, 4, 4),
      "steps": 40,
      "eval_every": 20,
      "validation_episodes": 10,
      "test_episodes": 30,
      "inner_lr": 0.1,
      "inner_steps": 2,
      "test_inner_steps": 3,
      "steps_per_dispatch": 20,
      "episodes": 2,
      "mesh": "none",
    }
    | fields
  )
  config.prune.update(episodes=4, every=5, **prune)
  return config

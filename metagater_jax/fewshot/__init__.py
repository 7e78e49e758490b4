"""Few-shot learning: episodes, meta-learners, and the loop that trains any of them."""

from metagater_jax.data.population import Episode
from metagater_jax.fewshot.episodes import ClassPool, augment_images, check_episodes, make_class_pool, sample_episode, sample_episodes, with_rotations
from metagater_jax.fewshot.learners import MetaLearner, anil, maml, meta_reptile
from metagater_jax.fewshot.splits import CIFAR_FS, cifar_fs_classes, split_classes
from metagater_jax.fewshot.training import MetaState, evaluate_episodes, meta_init, run_meta_steps

__all__ = [
  "CIFAR_FS",
  "ClassPool",
  "Episode",
  "MetaLearner",
  "MetaState",
  "anil",
  "augment_images",
  "check_episodes",
  "cifar_fs_classes",
  "evaluate_episodes",
  "make_class_pool",
  "maml",
  "meta_init",
  "meta_reptile",
  "run_meta_steps",
  "sample_episode",
  "sample_episodes",
  "split_classes",
  "with_rotations",
]

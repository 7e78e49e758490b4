"""The fields of a few-shot experiment, their defaults, and the checks that run before any long work."""

import jax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import metagater_jax as mg
from experiments.config import ConfigError, check_pruning, closest, pruning_fields

__all__ = ["LEARNERS", "MODELS", "SCORES", "base_config", "check_config", "make_learner", "make_network"]

MODELS = {"conv4": mg.FewShotConvNet, "resnet12": mg.ResNet12}
LEARNERS = ("maml", "anil", "reptile")
SCORES = ("anp", "snip", "magnitude", "random")


def base_config() -> ConfigDict:
  """All fields with their defaults. Files in configs/ set what a benchmark needs; a locked ConfigDict takes no others."""
  config = ConfigDict(type_safe=True)
  config.name = "cifarfs_maml"
  # Data
  config.dataset = "cifarfs"  # or "omniglot"
  config.data_dir = placeholder(str)  # None: TFDS's own default
  config.alphabets = ()  # Omniglot: whose characters; empty: all
  config.seed = 0
  # Episodes
  config.ways = 5
  config.shots = 1
  config.queries = 15  # per way
  config.train_queries = placeholder(int)  # per way in meta-training; None: as many
  config.augment = False  # mirror and move the images of training episodes at random
  # Network
  config.model = "conv4"  # or "resnet12"
  config.widths = ()  # of the four blocks; empty: the model's own
  # Meta-training
  config.learner = "maml"  # or "anil", "reptile"
  config.derivative = "exact"  # of MAML and ANIL; or "first_order"
  config.inner_lr = 0.1
  config.inner_steps = 5
  config.learn_rates = False  # MAML, ANIL: one inner rate per leaf, learned
  config.outer_lr = 3e-3  # of Adam; falls to zero along a cosine
  config.episodes = 4  # per outer step
  config.steps = 10_000
  # Evaluation
  config.test_inner_steps = 10
  config.eval_every = 1000
  config.validation_episodes = 200
  config.test_episodes = 1000
  # Pruning while training
  config.prune = pruning_fields()
  # How it is computed
  config.mesh = "auto"  # or "none", or how many devices episodes are spread over
  config.task_axis = "auto"
  config.steps_per_dispatch = 100
  return config


def check_config(config: ConfigDict) -> ConfigDict:
  """A copy with every field resolved, or a ConfigError that names the field, what it may be, and what it is."""
  config = config.copy_and_resolve_references()
  if config.train_queries is None:
    config.train_queries = config.queries
  for field, value, known in (
      ("model", config.model, MODELS), ("learner", config.learner, LEARNERS), ("derivative", config.derivative, mg.DERIVATIVES)):
    if value not in known:
      raise ConfigError(closest(field, value, known))
  for field in ("ways", "shots", "queries", "train_queries", "inner_steps", "test_inner_steps", "episodes", "steps", "eval_every",
                "validation_episodes", "test_episodes", "steps_per_dispatch"):
    if config[field] < 1:
      raise ConfigError(f"{field} must be at least 1, got {config[field]}.")
  for field in ("inner_lr", "outer_lr"):
    if not config[field] > 0:
      raise ConfigError(f"{field} must be positive, got {config[field]}.")
  if config.ways < 2:
    raise ConfigError(f"ways must be at least 2, got {config.ways}: with one class there is nothing to tell apart.")
  if config.learner == "reptile" and config.learn_rates:
    raise ConfigError("learn_rates is for maml and anil; reptile never differentiates its inner loop.")
  check_pruning(config.prune, SCORES)
  if config.mesh not in ("none", "auto") and not (config.mesh.isdigit() and int(config.mesh) > 0):
    raise ConfigError(f"mesh must be 'none', 'auto' or a number of devices, got '{config.mesh}'.")
  if config.task_axis not in mg.task_axes() and not (config.task_axis.isdigit() and int(config.task_axis) > 0):
    raise ConfigError(closest("task_axis", config.task_axis, mg.task_axes()) + " It may also be a number of tasks.")
  if config.widths and (len(config.widths) != 4 or not all(isinstance(w, int) and w > 0 for w in config.widths)):
    raise ConfigError(f"widths must be four positive whole numbers, one per block, got {tuple(config.widths)}.")
  try:
    network = make_network(config)
    jax.eval_shape(lambda key: network.init(key, (28, 28, 1) if config.dataset == "omniglot" else (32, 32, 3)), jax.random.key(0))
  except ValueError as error:
    raise ConfigError(f"model '{config.model}': {error}") from error
  return config


def make_network(config: ConfigDict) -> mg.GatedNetwork:
  """The network of a config, without gates."""
  options = {"widths": tuple(config.widths)} if config.widths else {}
  return mg.GatedNetwork(MODELS[config.model](classes=config.ways, **options))


def make_learner(config: ConfigDict, loss: mg.Loss, inner_steps: int | None = None) -> mg.MetaLearner:
  """The meta-learner of a config, with its own number of inner steps or another."""
  options = {"inner_lr": config.inner_lr, "inner_steps": inner_steps or config.inner_steps}
  if config.learner == "reptile":
    return mg.meta_reptile(loss, **options)
  options |= {"derivative": config.derivative, "learn_rates": config.learn_rates}
  return mg.maml(loss, **options) if config.learner == "maml" else mg.anil(loss, **options)

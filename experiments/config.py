"""The fields of an experiment, their defaults, and the checks that run before any long work."""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import metagater_jax as mg
from experiments import registry
from metagater_jax.accelerated_proximal import GAMMA_SCHEDULES
from metagater_jax.data.datasets import Dataset
from metagater_jax.gradual_pruning import SCHEDULES

__all__ = ["TUNED", "ConfigError", "base_config", "check_config", "check_dataset", "check_pruning", "check_same", "closest",
           "pruning_fields", "settings_of", "with_fields"]

TUNED = Path(__file__).resolve().parent.parent / "configs" / "tuned"


class ConfigError(ValueError):
  """A configuration that cannot run. The message says what was expected, what came and what to do."""


def base_config() -> ConfigDict:
  """All fields with their defaults. Files in configs/ set what a protocol needs; a locked ConfigDict takes no others."""
  config = ConfigDict(type_safe=True)
  config.name = "digits"
  # Data
  config.dataset = "digits"
  config.data_dir = placeholder(str)  # None: TFDS's own default
  config.pixel_mean = 0.5  # pixels in 0 … 1 become (pixel - mean) / std
  config.pixel_std = 0.5
  config.seed = 0
  # Tasks
  config.partition = "labels"  # or "dirichlet"
  config.tasks = 20
  config.target_tasks = 5
  config.validation_tasks = 0  # held out of meta-training: they set the gate's threshold, and settings are tuned on them
  config.target_tasks_seen = False  # whether target tasks take part in meta-training
  config.labels_per_task = 2
  config.cyclic_labels = False  # task i holds classes i, i + 1, … as in pFedMe's generator, instead of any
  config.size_range = (20, 200)  # train samples of a task
  config.fill = True  # scale the sizes so that all data is used, as far as the range allows
  config.test_fraction = 0.25
  config.concentration = 0.5  # of the Dirichlet partition
  # Network
  config.model = "conv4"
  config.widths = ()  # layer widths; empty: the model's own
  config.gated = placeholder(bool)  # None: MetaGater is, where there are gated_layers, and the baselines are not
  config.gated_layers = ("conv3",)
  config.gate_hidden = 16
  config.gate_temperature = 1.0  # 0: plain straight-through
  config.gate_initial_log_odds = 2.0  # b2 at the start: channels are on with probability 0.88 in training
  config.gate_logit_scale = 0.1  # of W2 at the start: small, so that training does not start with random masks
  # Meta-training. A setting that is None takes the value that `experiments.tune` found for this protocol, algorithm and
  # local_steps (the file `tuned` in configs/tuned/), or else the algorithm's default in `experiments.registry`.
  config.algorithm = "metagater"
  config.tuned = placeholder(str)
  config.rounds = 100
  config.eval_every = 20
  config.cohort = 5
  config.batch_size = 20
  config.weighted = False  # average nodes by their numbers of train samples instead of evenly
  config.local_steps = 1
  config.local_lr = placeholder(float)
  config.prox_weight = placeholder(float)  # MetaGater, pFedMe: λ; FedProx: μ
  config.beta = placeholder(float)  # MetaGater
  config.gamma = placeholder(str)
  config.penalty = "group_lasso"
  config.penalty_weight = placeholder(float)
  config.inner_lr = placeholder(float)  # Per-FedAvg: rate of the step that is learned for
  config.meta_gradient = "first_order"  # Per-FedAvg: or "hessian_free", "exact"
  config.personal_lr = placeholder(float)  # pFedMe: rate and number of steps for the personalized model
  config.inner_steps = 5
  config.server_lr = placeholder(float)  # Reptile, pFedMe
  # Adaptation
  config.adapt_lr = placeholder(float)
  config.gate_adapt_lr = 10.0
  config.adapt_steps = 1
  config.target_sparsity = placeholder(float)
  config.target_sparsity = 0.3  # mean fraction of gated channels that adapted tasks have off; None: no proximal step
  config.calibration_tasks = 20  # at most so many tasks set the threshold for it: validation or, if none, training tasks
  config.prune = pruning_fields()  # episodes: not used here, nodes score their own minibatches
  config.prune.every = 5
  # How it is computed
  config.task_axis = "auto"  # or "vmap", "map", "merged" (one batch of all nodes, with one local step), or a number of tasks
  config.microbatch = placeholder(int)  # samples at a time in a gradient; 0: whole batches; None: what suits the devices
  config.compute_dtype = "float32"  # or "bfloat16": of the backbone's forward and backward pass; parameters stay float32
  config.mesh = "none"  # or "auto" (all devices), or how many: tasks are spread over them
  config.memory_mb = placeholder(int)  # None: all tasks are on the device; else they stay on disk, and so much host memory
  config.seed_axis = "loop"  # or "vmap": the seeds of experiments.tables one by one or together
  config.rounds_per_dispatch = 10
  config.chunk = 64  # samples at a time in adaptation and evaluation
  return config


def pruning_fields() -> ConfigDict:
  """The part `prune` of a config: pruning while (meta-)training."""
  prune = ConfigDict(type_safe=True)
  prune.score = "none"  # or "anp", "snip" (the ordinary loss), "magnitude", and in few-shot experiments "random"
  prune.derivative = "exact"  # of ANP; or "first_order"
  prune.average = "absolute"  # of ANP and SNIP: the mean of the tasks' scores; or "signed", the score of the mean loss
  prune.sparsity = 0.0
  prune.schedule = "cubic"  # or "linear", "one_shot"
  prune.begin = 0.5  # first and last pruning, as fractions of the rounds or steps
  prune.end = 0.75
  prune.every = placeholder(int)  # rounds or steps between two prunings; None: a tenth of what lies between begin and end
  prune.scope = "global"  # or "layer": each by itself, as where many whole filters go, of which "global" may leave a layer a single one
  # The last layer too. Its weights are the smallest (few-shot meta-training leaves them near 0, whence each task takes them): by
  # magnitude it would go first and nearly as a whole, which loses any comparison for magnitude.
  prune.head = False
  prune.granularity = "weight"  # or "channel"
  prune.episodes = 64  # that a score is computed on
  return prune


def check_pruning(prune: ConfigDict, scores: Iterable[str]) -> None:
  """Raises a ConfigError that names the field of `prune` that cannot be."""
  for field, known in (("score", ("none", *scores)), ("derivative", mg.DERIVATIVES), ("average", mg.AVERAGES), ("schedule", SCHEDULES),
                       ("scope", ("global", "layer")), ("granularity", ("weight", "channel"))):
    if prune[field] not in known:
      raise ConfigError(closest(f"prune.{field}", prune[field], known))
  if not 0 <= prune.sparsity < 1:
    raise ConfigError(f"prune.sparsity must lie in [0, 1), got {prune.sparsity}.")
  if prune.sparsity > 0 and prune.score == "none":
    raise ConfigError(f"prune.sparsity is {prune.sparsity}, but prune.score is none; it may be {', '.join(scores)}.")
  if (prune.every is not None and prune.every < 1) or prune.episodes < 1:
    raise ConfigError(f"prune.every and prune.episodes must be at least 1, got {prune.every} and {prune.episodes}.")
  if not 0 <= prune.begin < prune.end <= 1:
    raise ConfigError("prune.begin and prune.end are fractions of the training with 0 <= begin < end <= 1, got "
                      f"{prune.begin} and {prune.end}.")


def closest(what: str, value: str, known: Iterable[str]) -> str:
  """A message for an unknown name that gives the nearest known ones, and all of them."""
  known = sorted(known)
  nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.4)
  hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
  return f"unknown {what} '{value}'.{hint} Known: {', '.join(known)}."


def check_same(where: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  """Raises a ConfigError that names every field in which a recorded configuration is not the wanted one."""
  different = [f"{field} is {held.get(field)!r} there and {wanted.get(field)!r} here"
               for field in sorted(held.keys() | wanted.keys()) if held.get(field) != wanted.get(field)]
  if different:
    raise ConfigError(f"{where} holds a run of another configuration: {'; '.join(different)}. Give another workdir, or "
                      "remove that run.")


def with_fields(config: ConfigDict, **fields: Any) -> ConfigDict:
  """A copy with these fields; what is changed in it later does not change `config`."""
  config = config.copy_and_resolve_references()
  config.update(fields)
  return config


def check_config(config: ConfigDict) -> ConfigDict:
  """A copy with every field resolved, or a ConfigError that names the field, what it may be, and what it is."""
  config = config.copy_and_resolve_references()  # a plain copy would share the fields that are None, and set them in both
  for field, known in (("model", registry.MODELS), ("algorithm", registry.ALGORITHMS), ("penalty", registry.PENALTIES),
                       ("partition", registry.PARTITIONS), ("meta_gradient", mg.META_GRADIENTS),
                       ("seed_axis", ("loop", "vmap")), ("compute_dtype", ("float32", "bfloat16"))):
    if config[field] not in known:
      raise ConfigError(closest(field, config[field], known))
  if config.gated is None:
    config.gated = config.algorithm == "metagater" and bool(config.gated_layers)
  for field, value in settings_of(config).items():
    if config[field] is None:
      config[field] = value
  if config.gamma is not None and config.gamma not in GAMMA_SCHEDULES:
    raise ConfigError(closest("gamma", config.gamma, GAMMA_SCHEDULES))
  if config.mesh not in ("none", "auto") and not (config.mesh.isdigit() and int(config.mesh) > 0):
    raise ConfigError(f"mesh must be 'none', 'auto' or a number of devices, got '{config.mesh}'.")
  if config.memory_mb is not None and config.memory_mb < 1:
    raise ConfigError(f"memory_mb must be at least 1, got {config.memory_mb}.")
  counts = ("rounds", "eval_every", "tasks", "target_tasks", "cohort", "labels_per_task", "batch_size", "local_steps",
            "adapt_steps", "gate_hidden", "rounds_per_dispatch", "chunk", "calibration_tasks", "inner_steps")
  for field in counts:
    if config[field] < 1:
      raise ConfigError(f"{field} must be at least 1, got {config[field]}.")
  for field in ("local_lr", "adapt_lr", "gate_adapt_lr", "prox_weight", "beta", "inner_lr", "personal_lr", "server_lr",
                "concentration", "pixel_std"):
    if config[field] is not None and not config[field] > 0:
      raise ConfigError(f"{field} must be positive, got {config[field]}.")
  for field in ("penalty_weight", "gate_temperature", "validation_tasks", "microbatch"):
    if config[field] is not None and not config[field] >= 0:
      raise ConfigError(f"{field} must not be negative, got {config[field]}.")
  if not 0 < config.test_fraction < 1:
    raise ConfigError(f"test_fraction must lie between 0 and 1, got {config.test_fraction}.")
  if config.target_sparsity is not None and not 0 <= config.target_sparsity < 1:
    raise ConfigError(f"target_sparsity must lie in [0, 1), got {config.target_sparsity}.")
  if not all(isinstance(width, int) and width > 0 for width in config.widths):
    raise ConfigError(f"widths must be positive whole numbers, one per layer, got {tuple(config.widths)}.")
  if len(config.size_range) != 2 or not 1 <= config.size_range[0] <= config.size_range[1]:
    raise ConfigError("size_range must be two numbers with 1 <= smallest <= largest, got "
                      f"{tuple(config.size_range)}.")
  try:
    training, _, _ = mg.split_tasks(config.tasks, config.target_tasks, config.seed, validation=config.validation_tasks,
                                    seen=config.target_tasks_seen)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  if config.cohort > len(training):
    raise ConfigError(f"cohort is {config.cohort}, but there are {len(training)} training tasks (tasks={config.tasks}, "
                      f"target_tasks={config.target_tasks}, validation_tasks={config.validation_tasks}); use a smaller cohort or "
                      "more tasks.")
  if config.gated and not config.gated_layers:
    raise ConfigError("gated is set, but gated_layers is empty; name a layer, or set gated=False.")
  check_pruning(config.prune, mg.FEDERATED_SCORES)
  _check_network(config, classes=2, image_shape=(32, 32, 3))  # names of layers do not depend on the images
  if config.algorithm == "metagater" and config.beta is None:
    config.beta = mg.default_beta(config.prox_weight)
  if config.algorithm == "per_fedavg" and config.inner_lr is None:
    config.inner_lr = config.adapt_lr
  _check_task_axis(config)
  return config


def settings_of(config: ConfigDict, algorithm: str | None = None) -> dict[str, Any]:
  """The settings of a config's algorithm (or of another): what was tuned for its protocol, over the defaults.

  Tuned settings are those found with the same `local_steps`, or else those of the nearest number of them.

  Raises:
    ConfigError: `tuned` names a file that is not there.
  """
  algorithm = algorithm or config.algorithm
  settings = dict(registry.SETTINGS[algorithm])
  if config.tuned is not None:
    path = TUNED / f"{config.tuned}.json"
    if not path.is_file():
      raise ConfigError(closest("tuned", config.tuned, [p.stem for p in TUNED.glob("*.json")]))
    entries = [entry for entry in json.loads(path.read_text())["methods"]
               if (entry["algorithm"], entry["gated"]) == (algorithm, config.gated)]
    if entries:
      settings |= min(entries, key=lambda entry: abs(entry["local_steps"] - config.local_steps))["settings"]
  return settings


def check_dataset(config: ConfigDict, dataset: Dataset) -> None:
  """Raises a ConfigError where the data does not fit the network or the tasks."""
  labels = np.asarray(dataset.labels)
  if len(dataset.images) != len(labels):
    raise ConfigError(f"there are {len(dataset.images)} images but {len(labels)} labels.")
  if labels.min() < 0 or labels.max() >= dataset.classes:
    raise ConfigError(f"labels must lie in 0 … {dataset.classes - 1}, but range from {labels.min()} to {labels.max()}.")
  if config.partition == "labels" and config.labels_per_task > dataset.classes:
    raise ConfigError(f"labels_per_task is {config.labels_per_task}, but {dataset.name} has {dataset.classes} classes.")
  _check_network(config, dataset.classes, dataset.images.shape[1:])


def _check_task_axis(config):
  mergeable = registry.make_algorithm(config, registry.make_network(config, classes=2)).mergeable
  if config.task_axis == "merged" and not mergeable:
    raise ConfigError(f"task_axis 'merged' needs an algorithm whose nodes take one plain gradient step, but {config.algorithm} "
                      f"with local_steps={config.local_steps} does not; use 'auto', 'vmap', 'map' or a number of tasks.")
  if config.task_axis not in mg.task_axes(mergeable) and not (config.task_axis.isdigit() and int(config.task_axis) > 0):
    raise ConfigError(closest("task_axis", config.task_axis, mg.task_axes(True)) + " It may also be a number of tasks.")


def _check_network(config, classes, image_shape):
  try:
    network = registry.make_network(config, classes)
    jax.eval_shape(lambda key: network.init(key, image_shape), jax.random.key(0))
  except ValueError as error:
    raise ConfigError(f"model '{config.model}' on images of shape {tuple(image_shape)}: {error}") from error

"""The fields of a federated experiment, their defaults, and the checks that run before any long work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import metagater_jax as mg
from experiments.config import fields, registry
from experiments.config.fields import TUNED, ConfigError, check_known, gate_fields, pruning_fields
from metagater_jax.core.checks import unknown
from metagater_jax.data.datasets import Dataset

__all__ = ["base_config", "check_config", "check_dataset", "settings_of"]


def base_config() -> ConfigDict:
  """All fields with their defaults. Files in configs/ set what a protocol needs; a locked ConfigDict takes no others."""
  config = fields.Config(type_safe=True)
  config.name = "digits"
  # Data
  config.dataset = "digits"
  config.data_dir = placeholder(str)  # None: TFDS's own default
  config.pixel_mean = 0.5  # pixels in 0 … 1 become (pixel - mean) / std
  config.pixel_std = 0.5
  config.seed = 0
  # A fraction of each class's images is for choosing settings (`experiments.tune`) and in no task of a run; 0: all are for runs, and nothing
  # can be tuned. Which ones they are does not depend on the seed.
  config.tuning_fraction = 0.0
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
  gate_fields(config)
  config.channel_dropout = placeholder(float)  # probability in training, on gated_layers, whether they have gates or not; None: no dropout
  # Meta-training. A setting that is None takes the value that `experiments.tune` found for this protocol, algorithm and
  # local_steps (the file `tuned` in configs/tuned/), or else the algorithm's default in `experiments.config.registry`.
  config.algorithm = "metagater"
  config.tuned = placeholder(str)
  config.rounds = placeholder(int)
  config.eval_every = 20
  config.cohort = 5
  config.batch_size = 20
  config.weighted = False  # average clients by their numbers of train samples instead of evenly
  config.local_steps = 1
  config.local_lr = placeholder(float)
  config.prox_weight = placeholder(float)  # MetaGater, pFedMe: λ; FedProx: μ
  config.beta = placeholder(float)  # MetaGater
  config.gamma = placeholder(str)
  config.penalty = "group_lasso"
  config.penalty_weight = placeholder(float)
  config.gate_rate = placeholder(float)  # MetaGater: of the gate, relative to the backbone's; a metric, see `optim.metric`
  config.inner_lr = placeholder(float)  # Per-FedAvg: rate of the step that is learned for
  config.derivative = "first_order"  # Per-FedAvg: or "hessian_free", "exact"
  config.personal_lr = placeholder(float)  # pFedMe: rate and number of steps for the personalized model
  config.inner_steps = 5
  config.server_lr = placeholder(float)  # Reptile, pFedMe
  # A finished run whose meta-model is taken instead of training one: its workdir. Tasks are those of this config.
  config.meta_model = placeholder(str)
  # Adaptation
  config.personalizer = placeholder(str)  # None: the algorithm's usual one; "fine_tune", "two_stage", "metasnip_weight", "metasnip_channel"
  config.adapt_lr = placeholder(float)
  config.gate_adapt_lr = placeholder(float)
  config.adapt_steps = 1
  config.gate_adapt_steps = placeholder(int)  # of stage I; None: adapt_steps
  # Mean fraction of gated channels that adapted tasks have off, reached as sparsity_by says; None: what gate and penalty learned. Of MetaSNIP and
  # others that prune, the fraction that they remove.
  config.target_sparsity = placeholder(float)
  # How many channels every task keeps of each gated layer, as counts or fractions: "conv2=32,conv3=0.25". In the place of target_sparsity.
  config.keep = placeholder(str)
  # A finished run of the same tasks: each target gets the sparsity that it reached there, in the place of target_sparsity.
  config.sparsity_of = placeholder(str)
  config.calibration_tasks = 20  # at most so many tasks set the threshold for it: validation or, if none, training tasks
  config.prune = pruning_fields()  # episodes: not used here, clients score their own minibatches
  config.prune.every = 5
  # How it is computed
  config.task_axis = "auto"  # or "vmap", "map", "merged" (one batch of all clients, with one local step), or a number of tasks
  config.microbatch = placeholder(int)  # samples at a time in a gradient; 0: whole batches; None: what suits the devices
  config.compute_dtype = "float32"  # or "bfloat16": of the backbone's forward and backward pass; parameters stay float32
  config.mesh = "none"  # or "auto" (all devices), or how many: tasks are spread over them
  config.memory_mb = placeholder(int)  # None: all tasks are on the device; else they stay on disk, and so much host memory
  config.seed_axis = "loop"  # or "vmap": the seeds of experiments.tables one by one or together
  config.rounds_per_dispatch = 10
  config.log = "none"  # beside metrics.csv and .jsonl: "tensorboard", or a writer of your own (docs/extending.md); several with commas
  config.chunk = 64  # samples at a time in adaptation and evaluation
  return config


def check_config(config: ConfigDict) -> ConfigDict:
  """A copy with every field resolved, or a ConfigError that names the field, what it may be, and what it is."""
  config = config.copy_and_resolve_references()  # a plain copy would share the fields that are None, and set them in both
  fields.check_name(config.name)
  fields.check_seed(config.seed)
  for field, known in (
    ("model", registry.NETWORKS),
    ("algorithm", registry.ALGORITHMS),
    ("penalty", registry.PENALTIES),
    ("partition", registry.PARTITIONS),
    ("derivative", mg.optim.DERIVATIVES),
    ("seed_axis", ("loop", "vmap")),
    ("sparsity_by", mg.personalize.SPARSITY_BY),
    ("compute_dtype", ("float32", "bfloat16")),
  ):
    check_known(field, config[field], known)
  if config.gated is None:
    config.gated = registry.ALGORITHMS[config.algorithm].gates and bool(config.gated_layers)
  if config.gated and not config.gated_layers:
    raise ConfigError("gated is set, but gated_layers is empty; name a layer, or set gated=False.")
  if config.personalizer is None:
    config.personalizer = registry.default_personalizer(config.algorithm, config.gated)
  fields.check_personalizer(config, config.gated)
  if config.sparsity_of is not None and not registry.PERSONALIZERS[config.personalizer].prunes:
    raise ConfigError(
      f"sparsity_of is given, but personalizer '{config.personalizer}' does not prune; use "
      f"{' or '.join(name for name, row in registry.PERSONALIZERS.items() if row.prunes)}."
    )
  settings = settings_of(config)
  for field, value in settings.items():
    if config[field] is None and not callable(value):
      config[field] = value
  if config.gamma is not None:
    check_known("gamma", config.gamma, mg.optim.GAMMA_SCHEDULES)
  if config.memory_mb is not None and config.memory_mb < 1:
    raise ConfigError(f"memory_mb must be at least 1, got {config.memory_mb}.")
  fields.check_counts(
    config,
    (
      "rounds",
      "eval_every",
      "tasks",
      "target_tasks",
      "cohort",
      "labels_per_task",
      "batch_size",
      "local_steps",
      "adapt_steps",
      "gate_hidden",
      "rounds_per_dispatch",
      "chunk",
      "calibration_tasks",
      "inner_steps",
    ),
  )
  fields.check_positive(
    config,
    (
      "local_lr",
      "adapt_lr",
      "gate_adapt_lr",
      "prox_weight",
      "beta",
      "inner_lr",
      "personal_lr",
      "server_lr",
      "gate_rate",
      "concentration",
      "pixel_std",
    ),
  )
  fields.check_not_negative(config, ("penalty_weight", "gate_temperature", "gate_noise", "gate_adapt_temperature", "validation_tasks", "microbatch"))
  if config.channel_dropout is not None and not 0 <= config.channel_dropout < 1:
    raise ConfigError(f"channel_dropout must lie in [0, 1), got {config.channel_dropout}.")
  if config.channel_dropout and not config.gated_layers:
    raise ConfigError("channel_dropout acts on gated_layers, but there are none.")
  if not 0 <= config.tuning_fraction < 1:
    raise ConfigError(f"tuning_fraction must lie in [0, 1), got {config.tuning_fraction}.")
  if not 0 < config.test_fraction < 1:
    raise ConfigError(f"test_fraction must lie between 0 and 1, got {config.test_fraction}.")
  if config.target_sparsity is not None and not 0 <= config.target_sparsity < 1:
    raise ConfigError(f"target_sparsity must lie in [0, 1), got {config.target_sparsity}.")
  if len(config.size_range) != 2 or not 1 <= config.size_range[0] <= config.size_range[1]:
    raise ConfigError(f"size_range must be two numbers with 1 <= smallest <= largest, got {tuple(config.size_range)}.")
  fields.check_widths(config)
  for field in ("meta_model", "sparsity_of"):
    if config[field] is not None and not (Path(config[field]) / "result.json").is_file():
      raise ConfigError(f"{field} is {config[field]}, which holds no finished run (there is no result.json).")
  try:
    training, _, _ = mg.data.split_tasks(
      config.tasks, config.target_tasks, config.seed, validation=config.validation_tasks, seen=config.target_tasks_seen
    )
  except ValueError as error:
    raise ConfigError(str(error)) from error
  if config.cohort > len(training):
    raise ConfigError(
      f"cohort is {config.cohort}, but there are {len(training)} training tasks (tasks={config.tasks}, "
      f"target_tasks={config.target_tasks}, validation_tasks={config.validation_tasks}); use a smaller cohort or "
      "more tasks."
    )
  fields.check_pruning(config.prune)
  for field, value in settings.items():
    if config[field] is None and callable(value):  # what follows from other fields, which are checked by now
      config[field] = value(config)
  row = registry.DATASETS.get(config.dataset, registry.DatasetRow())
  _check_network(config, classes=2, image_shape=row.image_shape)
  _check_task_axis(config)
  return config


def settings_of(config: ConfigDict) -> dict[str, Any]:
  """The settings of a config's algorithm and personalizer: what was tuned for its protocol, over the defaults.

  Tuned settings are those found with the same `local_steps`, or else those of the nearest number of them. A personalizer that is not the
  algorithm's usual one has settings of its own.

  Raises:
    ConfigError: `tuned` names a file that is not there.
  """
  settings = _COMMON | (_OF_GATES if config.gated else {}) | dict(registry.ALGORITHMS[config.algorithm].settings)
  settings |= _tuned(config, config.algorithm, config.gated)
  if config.personalizer != registry.default_personalizer(config.algorithm, config.gated):
    settings |= registry.PERSONALIZERS[config.personalizer].settings
    settings |= _tuned(config, config.personalizer, False)
  return settings


# Settings of every algorithm, and of those whose networks have gates.
_COMMON, _OF_GATES = {"rounds": 100}, {"gate_adapt_lr": 10.0}


def _tuned(config, name, gated):
  """What was tuned for an algorithm or a personalizer, as far as it was."""
  if config.tuned is None:
    return {}
  path = TUNED / f"{config.tuned}.json"
  if not path.is_file():
    raise ConfigError(unknown("tuned", config.tuned, [p.stem for p in TUNED.glob("*.json")]))
  entries = [entry for entry in json.loads(path.read_text(encoding="utf-8"))["methods"] if (entry["algorithm"], entry["gated"]) == (name, gated)]
  if not entries:
    return {}
  nearest = min(entries, key=lambda entry: abs(entry["local_steps"] - config.local_steps))
  tuned_with = {"rounds": nearest["rounds"]} if "rounds" in nearest else {}  # of entries that do not say how many are enough
  return tuned_with | nearest["settings"]


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


def _check_network(config, classes, image_shape):
  usual = config.personalizer == registry.default_personalizer(config.algorithm, config.gated)  # which can follow it
  fields.check_network(config, registry.make_network(config, classes), image_shape, personalized=not usual or bool(config.keep))


def _check_task_axis(config):
  network = registry.make_network(config, classes=2)
  if config.microbatch and not network.rowwise:
    raise ConfigError(
      f"microbatch is {config.microbatch}, but model '{config.model}' does not say (rowwise = True) that a sample's logits do not "
      "depend on the other samples of a batch, as they do with batch normalization; use microbatch=0."
    )
  mergeable = config.meta_model is None and registry.make_algorithm(config, network).mergeable
  if config.task_axis == "merged" and not mergeable:
    raise ConfigError(
      f"task_axis 'merged' needs an algorithm whose clients take one plain gradient step and a model in which samples do "
      f"not see each other, but {config.algorithm} with local_steps={config.local_steps} and model '{config.model}' is "
      "not such; use 'auto', 'vmap', 'map' or a number of tasks."
    )
  fields.check_devices(config, may_merge=True)

"""What the configs of all experiments share: groups of fields, and checks that name the field, what it may be, and what it is."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import metagater_jax as mg
from experiments.config import registry
from metagater_jax.core.checks import unknown

__all__ = [
  "FREE",
  "TUNED",
  "Config",
  "ConfigError",
  "check_counts",
  "check_devices",
  "check_known",
  "check_name",
  "check_network",
  "check_not_negative",
  "check_personalizer",
  "check_positive",
  "check_pruning",
  "check_same",
  "check_seed",
  "check_widths",
  "gate_fields",
  "pruning_fields",
  "with_fields",
]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TUNED = CONFIGS / "tuned"
# Fields on which a run's numbers do not depend: they may differ between the runs of one workdir.
FREE = (
  "name",
  "tuned",
  "data_dir",
  "log",
  "meta_model",
  "sparsity_of",
  "mesh",
  "memory_mb",
  "microbatch",
  "task_axis",
  "seed_axis",
  "rounds_per_dispatch",
  "steps_per_dispatch",
)


class ConfigError(ValueError):
  """A configuration that cannot run. The message says what was expected, what came and what to do."""


class Config(ConfigDict):
  """A ConfigDict that takes what has one meaning for a field: NumPy's numbers, paths for text, lists and arrays for tuples, and a number where a
  field is text that may be one (`mesh`, `task_axis`)."""

  def __setitem__(self, key, value):
    kind = self.get_type(key) if key in self else None
    try:
      super().__setitem__(key, _of_kind(kind, value))
    except TypeError as error:
      raise ConfigError(f"{key} must be {_KINDS.get(kind, getattr(kind, '__name__', kind))}, got {value!r} ({type(value).__name__}).") from error


_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a tuple, as (1, 2)"}


def _of_kind(kind, value):
  """A value as a field of some type holds it, where there is one such value."""
  if isinstance(value, np.ndarray | np.generic) and (np.ndim(value) or kind is tuple):
    value = np.asarray(value).tolist()
  if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
    value = value.item()
  if kind is tuple and isinstance(value, list | tuple):
    return tuple(_of_kind(None, item) for item in value)
  if kind is str and isinstance(value, os.PathLike):
    return os.fspath(value)
  if kind is str and isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if kind in (int, float) and isinstance(value, bool):
    raise TypeError("a number is no truth value")
  return value


def gate_fields(config: ConfigDict) -> None:
  """Adds the fields of a network's gates."""
  config.gate_hidden = 16
  config.gate_temperature = 1.0  # 0: plain straight-through
  config.gate_noise = 1.0  # scale of the logistic noise in training
  config.gate_normalize = True  # the pooled feature, over its channels
  config.gate_initial_log_odds = 0.5  # b2 at the start: near 0 the gate is undecided, and learns
  config.gate_logit_scale = 1.0  # of W2 at the start
  # At a target: τ of the gradient through the threshold in stage I. 0, plain straight-through, also moves what the meta-gate is sure of
  config.gate_adapt_temperature = 1.0
  config.sparsity_by = "log_odds"  # how target_sparsity is reached; or "group_norm", "budget", see `personalize.two_stage`
  config.gate_frozen = False  # after stage I: each channel on or off for all of a task's inputs, by the majority of its train data


def pruning_fields() -> ConfigDict:
  """The part `prune` of a config: pruning while (meta-)training."""
  prune = Config(type_safe=True)
  prune.score = "none"  # or "anp", "snip" (the ordinary loss), "magnitude", "random"
  prune.derivative = "exact"  # of ANP; or "first_order"
  prune.average = "absolute"  # of ANP and SNIP: the mean of the tasks' scores; or "signed", the score of the mean loss
  prune.mask_in = "inner_loop"  # of ANP: where the mask acts of which its score is the derivative; or "start"
  prune.sparsity = 0.0
  prune.schedule = "cubic"  # or "linear", "one_shot"
  prune.begin = 0.5  # first and last pruning, as fractions of the rounds or steps
  prune.end = 0.75
  prune.every = placeholder(int)  # rounds or steps between two prunings; None: a tenth of what lies between begin and end
  # Or "layer": each by itself; or, of whole channels, "macs": `sparsity` is a fraction of the network's work, taken where it costs least.
  prune.scope = "global"
  # The last layer too. Its weights are the smallest (few-shot meta-training leaves them near 0, whence each task takes them): by
  # magnitude it would go first and nearly as a whole, which loses any comparison for magnitude.
  prune.head = False
  prune.granularity = "weight"  # or "channel"
  prune.channel_score = "sensitivity"  # of ANP and SNIP by channel: that of the channel as one; or "sum", of its weights' own
  prune.multiple = 8  # scope "macs": channels go in blocks of so many
  prune.least = 0.125  # scope "macs": the fraction of its channels that each layer keeps
  prune.episodes = 64  # that a score is computed on
  return prune


def check_known(field: str, value: str, known: Iterable[str]) -> None:
  """Raises a ConfigError for a name that is not known, with the nearest that is."""
  known = list(known)
  if value not in known:
    raise ConfigError(unknown(field, value, known))


def check_counts(config: ConfigDict, fields: Iterable[str]) -> None:
  """Raises a ConfigError that names a field below 1."""
  for field in fields:
    if config[field] < 1:
      raise ConfigError(f"{field} must be at least 1, got {config[field]}.")


def check_positive(config: ConfigDict, fields: Iterable[str]) -> None:
  """Raises a ConfigError that names a field that is not positive; None passes."""
  for field in fields:
    if config[field] is not None and not 0 < config[field] < np.inf:
      raise ConfigError(f"{field} must be positive, got {config[field]}.")


def check_not_negative(config: ConfigDict, fields: Iterable[str]) -> None:
  """Raises a ConfigError that names a negative field; None passes."""
  for field in fields:
    if config[field] is not None and not 0 <= config[field] < np.inf:
      raise ConfigError(f"{field} must not be negative, got {config[field]}.")


def check_name(name: str) -> None:
  """Raises a ConfigError for a name that is no plain name of a folder."""
  if not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
    raise ConfigError(f"name must be the plain name of a folder, without / or \\, got {name!r}; where results go is --workdir.")


def check_seed(seed: int) -> None:
  """Raises a ConfigError for a seed that keys have no place for."""
  if not 0 <= seed < 2**32:
    raise ConfigError(f"seed must lie in 0 … 2^32 − 1, got {seed}.")


def check_widths(config: ConfigDict) -> None:
  """Raises a ConfigError for widths that are not positive whole numbers."""
  if not all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in config.widths):
    raise ConfigError(f"widths must be positive whole numbers, one per layer, got {tuple(config.widths)}.")


def check_devices(config: ConfigDict, *, may_merge: bool = False) -> None:
  """Raises a ConfigError for a `mesh` or `task_axis` that cannot be; `may_merge` says whether tasks can be merged at all."""
  if config.mesh not in ("none", "auto") and not (config.mesh.isdigit() and int(config.mesh) > 0):
    raise ConfigError(f"mesh must be 'none', 'auto' or a number of devices, got '{config.mesh}'.")
  if config.task_axis not in mg.core.task_axes(may_merge) and not (config.task_axis.isdigit() and int(config.task_axis) > 0):
    raise ConfigError(unknown("task_axis", config.task_axis, mg.core.task_axes(may_merge)) + " It may also be a number of tasks.")


def check_personalizer(config: ConfigDict, gated: bool) -> None:
  """Raises a ConfigError for a personalizer that is not known, cannot follow a model without gates, or has no sparsity to prune to."""
  check_known("personalizer", config.personalizer, registry.PERSONALIZERS)
  row = registry.PERSONALIZERS[config.personalizer]
  if row.needs_gates and not gated:
    others = [name for name, other in registry.PERSONALIZERS.items() if not other.needs_gates]
    raise ConfigError(
      f"personalizer '{config.personalizer}' adapts gates, but this model has none; use {' or '.join(others)}, or a model "
      "with gates (gated_layers; gated=True)."
    )
  keep = getattr(config, "keep", None)
  if row.prunes and config.target_sparsity is None and getattr(config, "sparsity_of", None) is None and not keep:
    raise ConfigError(f"personalizer '{config.personalizer}' prunes to target_sparsity, which is None; give a number in [0, 1).")
  if keep and config.target_sparsity is not None:
    raise ConfigError(f"keep is '{keep}' and target_sparsity {config.target_sparsity}: say one of them.")


def check_network(config: ConfigDict, network: mg.GatedNetwork, image_shape: Sequence[int], personalized: bool = True) -> None:
  """Raises a ConfigError where a network cannot take such images, or the config's personalizer cannot follow it (without `personalized` that
  is not tried). Everything is traced on shapes only."""
  try:
    params = jax.eval_shape(lambda key: network.init(key, image_shape), jax.random.key(0))
    if personalized:
      batch = mg.data.Batch(
        *(jax.ShapeDtypeStruct((2, *shape), dtype) for shape, dtype in ((tuple(image_shape), np.float32), ((), np.int32), ((), np.float32)))
      )
      jax.eval_shape(registry.make_personalizer(config, network).adapt, mg.Model(params), batch)
  except ValueError as error:
    raise ConfigError(f"model '{config.model}' with personalizer '{config.personalizer}' on images of shape {tuple(image_shape)}: {error}") from error


def check_pruning(prune: ConfigDict) -> None:
  """Raises a ConfigError that names the field of `prune` that cannot be."""
  for field, known in (
    ("score", ("none", *registry.SCORES)),
    ("derivative", mg.optim.DERIVATIVES),
    ("average", mg.pruning.AVERAGES),
    ("mask_in", mg.pruning.PLACES),
    ("schedule", mg.pruning.SCHEDULES),
    ("scope", (*mg.pruning.SCOPES, "macs")),
    ("granularity", mg.pruning.GRANULARITIES),
    ("channel_score", ("sensitivity", "sum")),
  ):
    check_known(f"prune.{field}", prune[field], known)
  if not 0 <= prune.sparsity < 1:
    raise ConfigError(f"prune.sparsity must lie in [0, 1), got {prune.sparsity}.")
  if prune.sparsity > 0 and prune.score == "none":
    raise ConfigError(f"prune.sparsity is {prune.sparsity}, but prune.score is none; it may be {', '.join(registry.SCORES)}.")
  if prune.scope == "macs" and prune.granularity != "channel":
    raise ConfigError(f"prune.scope is macs, which counts whole channels, but prune.granularity is {prune.granularity}; set it to channel.")
  if prune.multiple < 1 or not 0 <= prune.least < 1:
    raise ConfigError(f"prune.multiple must be at least 1 and prune.least lie in [0, 1), got {prune.multiple} and {prune.least}.")
  if (prune.every is not None and prune.every < 1) or prune.episodes < 1:
    raise ConfigError(f"prune.every and prune.episodes must be at least 1, got {prune.every} and {prune.episodes}.")
  if not 0 <= prune.begin < prune.end <= 1:
    raise ConfigError(f"prune.begin and prune.end are fractions of the training with 0 <= begin < end <= 1, got {prune.begin} and {prune.end}.")


def check_same(where: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  """Raises a ConfigError that names every field in which a recorded configuration is not the wanted one."""
  different = [
    f"{field} is {held.get(field)!r} there and {wanted.get(field)!r} here"
    for field in sorted(held.keys() | wanted.keys())
    if held.get(field) != wanted.get(field)
  ]
  if different:
    raise ConfigError(f"{where} holds a run of another configuration: {'; '.join(different)}. Give another workdir, or remove that run.")


def with_fields(config: ConfigDict, **fields: Any) -> ConfigDict:
  """A copy with these fields; what is changed in it later does not change `config`."""
  config = config.copy_and_resolve_references()
  config.update(fields)
  return config

"""What the names in a config stand for: models, penalties, algorithms, partitions."""

from functools import partial

import jax
from ml_collections import ConfigDict

import metagater_jax as mg

__all__ = ["ALGORITHMS", "MODELS", "PARTITIONS", "PENALTIES", "SETTINGS", "evaluation_axis", "is_pruned", "make_algorithm", "make_network",
           "make_partition", "make_penalty", "snip_candidates", "train_axis"]

MODELS = {"mlp": mg.MLP, "conv4": mg.ConvNet4, "conv7": mg.ConvNet7}

PENALTIES = {"group_lasso": lambda: mg.group_lasso(mg.gate_groups), "l1": mg.l1}

PARTITIONS = {
    "labels": lambda c, labels: mg.partition_by_label(
        labels, tasks=c.tasks, labels_per_task=c.labels_per_task, size_range=tuple(c.size_range), seed=c.seed,
        test_fraction=c.test_fraction, fill=c.fill, cyclic=c.cyclic_labels),
    "dirichlet": lambda c, labels: mg.partition_by_dirichlet(
        labels, tasks=c.tasks, concentration=c.concentration, seed=c.seed, test_fraction=c.test_fraction),
}


def _adaptation(c: ConfigDict) -> dict:
  return {"adapt_lr": c.adapt_lr, "adapt_steps": c.adapt_steps, "chunk": c.chunk}


def _local(c: ConfigDict) -> dict:
  return {"local_lr": c.local_lr, "local_steps": c.local_steps} | _adaptation(c)


# Name of an algorithm to a function of (config, loss, network).
ALGORITHMS = {
    "fedavg": lambda c, loss, _: mg.fedavg(loss, **_local(c)),
    "fedprox": lambda c, loss, _: mg.fedprox(loss, prox_weight=c.prox_weight, **_local(c)),
    "metagater": lambda c, loss, network: mg.metagater(
        loss, prox_weight=c.prox_weight, beta=c.beta, gamma=c.gamma, penalty=make_penalty(c), penalty_weight=c.penalty_weight,
        gate_adapt_lr=c.gate_adapt_lr, target_sparsity=c.target_sparsity, network=network,
        task_axis=evaluation_axis(c), **_local(c)),
    "per_fedavg": lambda c, loss, _: mg.per_fedavg(loss, inner_lr=c.inner_lr, meta_gradient=c.meta_gradient, **_local(c)),
    "pfedme": lambda c, loss, _: mg.pfedme(
        loss, prox_weight=c.prox_weight, personal_lr=c.personal_lr, inner_steps=c.inner_steps, server_lr=c.server_lr,
        **_local(c)),
    "reptile": lambda c, loss, _: mg.reptile(loss, server_lr=c.server_lr, **_local(c)),
}

# What a config leaves open and nobody tuned.
SETTINGS = {
    "fedavg": {"local_lr": 0.1, "adapt_lr": 0.1},
    "fedprox": {"local_lr": 0.1, "prox_weight": 0.1, "adapt_lr": 0.1},
    "metagater": {"local_lr": 0.1, "prox_weight": 15.0, "gamma": "ghadimi_lan", "penalty_weight": 0.005, "adapt_lr": 0.05},
    "metasnip_channel": {"adapt_lr": 0.05},
    "metasnip_weight": {"adapt_lr": 0.05},
    "per_fedavg": {"local_lr": 0.1, "adapt_lr": 0.05},  # inner_lr: adapt_lr
    "pfedme": {"local_lr": 0.05, "personal_lr": 0.1, "prox_weight": 15.0, "server_lr": 1.0, "adapt_lr": 0.1},
    "reptile": {"local_lr": 0.1, "server_lr": 0.5, "adapt_lr": 0.1},
}


def make_network(config: ConfigDict, classes: int) -> mg.GatedNetwork:
  """The backbone of a config with its gates (none if it is not gated)."""
  options = {"widths": tuple(config.widths)} if config.widths else {}
  return mg.GatedNetwork(
      MODELS[config.model](classes=classes, **options), tuple(config.gated_layers) if config.gated else (),
      hidden=config.gate_hidden, temperature=config.gate_temperature or None,
      initial_log_odds=config.gate_initial_log_odds, logit_scale=config.gate_logit_scale,
      compute_dtype=config.compute_dtype)


def make_penalty(config: ConfigDict) -> mg.Penalty | None:
  """R on the gate's parameters; None without gates."""
  return mg.on_part(PENALTIES[config.penalty](), "gate") if config.gated else None


def make_algorithm(config: ConfigDict, network: mg.GatedNetwork) -> mg.Algorithm:
  """The federated algorithm of a config."""
  loss, prune = mg.classification_loss(network), ConfigDict(config.prune)

  def make(loss):
    return ALGORITHMS[config.algorithm](config, mg.microbatched(loss, config.microbatch) if config.microbatch else loss, network)

  if not prune.sparsity:
    return make(loss)
  schedule = pruning_schedule(prune, config.rounds)
  return mg.federated_pruning(make, loss, schedule, score=prune.score, inner_lr=config.adapt_lr, derivative=prune.derivative,
                              average=prune.average, scope=prune.scope, granularity=prune.granularity, prunable=partial(is_pruned, prune))


def pruning_schedule(prune: ConfigDict, steps: int) -> mg.PruningSchedule:
  """When a training of so many rounds or steps is pruned, and how far; without `prune.every`, in ten parts."""
  begin = int(prune.begin * steps)
  end = max(int(prune.end * steps), begin + 1)
  return mg.sparsity_schedule(prune.schedule, prune.sparsity, begin=begin, end=end, every=prune.every or max(1, (end - begin) // 10))


def is_pruned(prune: ConfigDict, path: str, leaf: jax.Array) -> bool:
  """What pruning may remove of a network: the backbone's kernels, the last layer's only with `prune.head` and not by channel, as
  its channels are the classes. Gates are no part of it: their own penalty prunes them."""
  parts = path.split("/")
  head = prune.head and prune.granularity == "weight"
  return "gate" not in parts and mg.is_kernel(path, leaf) and (head or "output" not in parts)


def snip_candidates(config: ConfigDict, granularity: str):
  """What MetaSNIP may prune: all kernels by weight, as SNIP does; by channel the layers that a gate could switch, so that
  it is compared on what the gate decides about."""
  if granularity == "weight":
    return mg.is_kernel
  layers = tuple(f"backbone/{layer}/kernel" for layer in config.gated_layers)
  return lambda path, leaf: path in layers


def train_axis(config: ConfigDict, algorithm: mg.Algorithm) -> str:
  """`config.task_axis` of meta-training; "auto" knows what was measured on CPUs: `python -m benchmarks --only=task_axes`."""
  if config.task_axis != "auto" or not _small_on_cpu(config):
    return config.task_axis
  return "merged" if algorithm.mergeable else "vmap"


def evaluation_axis(config: ConfigDict) -> str:
  """The same for adaptation and evaluation, where tasks have parameters of their own and cannot be merged."""
  if config.task_axis == "merged" or config.task_axis == "auto":
    return "vmap" if _small_on_cpu(config) else "auto"
  return config.task_axis


def _small_on_cpu(config):
  return config.model == "mlp" and jax.default_backend() == "cpu"  # a task is too little work for a loop


def make_partition(config: ConfigDict, labels) -> mg.Partition:
  """How the labelled samples are distributed over the tasks of a config."""
  return PARTITIONS[config.partition](config, labels)

"""What the names in a config stand for: models, penalties, algorithms, partitions."""

from ml_collections import ConfigDict

import metagater_jax as mg

__all__ = ["ALGORITHMS", "MODELS", "PARTITIONS", "PENALTIES", "make_algorithm", "make_network", "make_partition",
           "make_penalty"]

MODELS = {"mlp": mg.MLP, "conv4": mg.ConvNet4, "conv7": mg.ConvNet7}

PENALTIES = {"group_lasso": lambda: mg.group_lasso(mg.gate_groups), "l1": mg.l1}

PARTITIONS = {
    "labels": lambda c, labels: mg.partition_by_label(
        labels, tasks=c.tasks, labels_per_task=c.labels_per_task, size_range=tuple(c.size_range), seed=c.seed,
        test_fraction=c.test_fraction, fill=c.fill, cyclic=c.cyclic_labels),
    "dirichlet": lambda c, labels: mg.partition_by_dirichlet(
        labels, tasks=c.tasks, concentration=c.concentration, seed=c.seed, test_fraction=c.test_fraction),
}


def _metagater(config: ConfigDict, network: mg.GatedNetwork) -> mg.Algorithm:
  return mg.metagater(
      mg.classification_loss(network), local_lr=config.local_lr, local_steps=config.local_steps,
      prox_weight=config.prox_weight, beta=config.beta, gamma=config.gamma, penalty=make_penalty(config),
      penalty_weight=config.penalty_weight, adapt_lr=config.adapt_lr, gate_adapt_lr=config.gate_adapt_lr,
      adapt_steps=config.adapt_steps, target_sparsity=config.target_sparsity, network=network, chunk=config.chunk,
      task_axis=config.task_axis)


ALGORITHMS = {"metagater": _metagater}


def make_network(config: ConfigDict, classes: int) -> mg.GatedNetwork:
  """The backbone of a config with its gates (none if it is not gated)."""
  options = {"widths": tuple(config.widths)} if config.widths else {}
  return mg.GatedNetwork(
      MODELS[config.model](classes=classes, **options), tuple(config.gated_layers) if config.gated else (),
      hidden=config.gate_hidden, temperature=config.gate_temperature or None,
      initial_log_odds=config.gate_initial_log_odds, logit_scale=config.gate_logit_scale)


def make_penalty(config: ConfigDict) -> mg.Penalty | None:
  """R on the gate's parameters; None without gates."""
  return mg.on_part(PENALTIES[config.penalty](), "gate") if config.gated else None


def make_algorithm(config: ConfigDict, network: mg.GatedNetwork) -> mg.Algorithm:
  """The federated algorithm of a config."""
  return ALGORITHMS[config.algorithm](config, network)


def make_partition(config: ConfigDict, labels) -> mg.Partition:
  """How the labelled samples are distributed over the tasks of a config."""
  return PARTITIONS[config.partition](config, labels)

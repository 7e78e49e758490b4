"""What the paper's tables and its Figure 4 consist of: protocols, methods, and what the paper itself reports."""

import importlib
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.config import registry
from experiments.config.fields import CONFIGS, check_known

__all__ = [
  "BASE",
  "CLASSES",
  "CURVES",
  "EXTRA",
  "GATED",
  "PROTOCOL_LABELS",
  "TABLES",
  "Row",
  "Table",
  "is_pruning",
  "label_of",
  "protocol_config",
  "rows_of",
]


class Row(NamedTuple):
  """One row of a table.

  Attributes:
    protocol: name of a config.
    method: name in `experiments.config.registry.methods()`.
    local_steps: K.
    paper_seconds: the time that the paper reports on its GPU: of the training or, in the tables on adaptation, of learning
      one target task; None where it has none. Its accuracies and sparsities are lost in the text that we have.
  """

  protocol: str
  method: str
  local_steps: int = 1
  paper_seconds: float | None = None


class Table(NamedTuple):
  """One table: `kind` is "training" (Tables 1, 3, 5) or "adaptation" (Tables 2, 4, 6)."""

  title: str
  kind: str
  rows: tuple[Row, ...]


PROTOCOL_LABELS = {
  "digits": "Digits",
  "mnist": "MNIST",
  "cifar10": "CIFAR-10",
  "cifar10_moderate": "CIFAR-10, moderate local data",
  "cifar10_small": "CIFAR-10, small local data",
  "cifar100": "CIFAR-100, small local data",
  "har": "Human activity, people as tasks",
}

# Among how many classes a network of each protocol decides.
CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar10_moderate": 10, "cifar10_small": 10, "cifar100": 100, "har": 6}


def _training(protocol, *rows):
  return tuple(Row(protocol, method, steps, seconds) for method, steps, seconds in rows)


def _adaptation(protocol, ungated, snip, gated):
  return (
    Row(protocol, "metagater_ungated", 1, ungated),
    Row(protocol, "metasnip_weight", 1, snip),
    Row(protocol, "metasnip_channel"),
    Row(protocol, "metagater", 1, gated),
  )


def _four(protocol, fedavg, per_fedavg, ungated, gated):
  return _training(protocol, ("fedavg", 1, fedavg), ("per_fedavg", 1, per_fedavg), ("metagater_ungated", 1, ungated), ("metagater", 1, gated))


# Rows that the paper does not have. With one local step FedProx is FedAvg, and Reptile is FedAvg at another rate.
EXTRA = _training(
  "mnist", ("fedavg", 2, None), ("per_fedavg", 2, None), ("fedprox", 2, None), ("reptile", 2, None), ("pfedme", 1, None), ("pfedme", 2, None)
)

TABLES = {
  "1": Table(
    "Meta-models via federated meta-learning",
    "training",
    (
      *_training("mnist", ("fedavg", 1, 396), ("per_fedavg", 1, 920), ("metagater_ungated", 1, 763), ("metagater_ungated", 2, 1417)),
      *EXTRA,
      *_training(
        "cifar10",
        ("fedavg", 1, 1139),
        ("per_fedavg", 1, 2056),
        ("metagater_ungated", 1, 1186),
        ("metagater_ungated", 2, 2046),
        ("metagater", 1, 1960),
        ("metagater", 2, 3719),
      ),
    ),
  ),
  "2": Table("Fast adaptation on CIFAR-10", "adaptation", _adaptation("cifar10", 1.2, 1.4, 1.03)),
  "3": Table("Meta-models with moderate local data", "training", _four("cifar10_moderate", 1677, 3098, 1939, 2558)),
  "4": Table("Fast adaptation with moderate local data", "adaptation", _adaptation("cifar10_moderate", 1.6, 1.5, 1.4)),
  "5": Table("Meta-models with small local data", "training", (*_four("cifar10_small", 187, 339, 189, 356), *_four("cifar100", 192, 367, 208, 399))),
  "6": Table(
    "Fast adaptation with small local data",
    "adaptation",
    (*_adaptation("cifar10_small", 0.56, 0.55, 0.51), *_adaptation("cifar100", 0.61, 0.57, 0.52)),
  ),
  "har": Table(
    "Meta-models of people's activities (not in the paper)", "training", (*_four("har", None, None, None, None), Row("har", "metagater_dropout"))
  ),
  "har_adaptation": Table("Fast adaptation to people never seen (not in the paper)", "adaptation", _adaptation("har", None, None, None)),
}

# Figure 4: accuracy over rounds, one panel per protocol, in these methods.
CURVES = {"mnist": ("fedavg", "per_fedavg", "metagater_ungated"), "cifar10": ("fedavg", "per_fedavg", "metagater_ungated", "metagater")}


def rows_of(tables) -> list[Row]:
  """The different rows that these tables need, with what MetaSNIP builds on, in an order in which they can be run."""
  rows = {}
  for number in tables:
    for row in TABLES[number].rows:
      rows.setdefault(row[:3], row)
  return sorted(rows.values(), key=lambda row: is_pruning(row.method))


# What prunes at a target takes the meta-model of the first, and each target's sparsity from the second.
BASE, GATED = "metagater_ungated", "metagater"


def is_pruning(method: str) -> bool:
  """Whether a method takes another's meta-model and prunes it at each target."""
  return registry.PERSONALIZERS[registry.methods()[method].personalizer].prunes


def label_of(method: str) -> str:
  """What a reader sees of a method."""
  return registry.methods()[method].label


def protocol_config(name: str, data_dir: str | None = None, rounds: int | None = None) -> ConfigDict:
  """The config of a protocol by name, with another data directory or number of rounds.

  Raises:
    ConfigError: an unknown name.
  """
  check_known("protocol", name, [p.stem for p in CONFIGS.glob("*.py") if not p.stem.startswith("_")])
  config = importlib.import_module(f"configs.{name}").get_config()
  config.data_dir = data_dir
  if rounds is not None:
    config.rounds = rounds
    config.eval_every = min(config.eval_every, rounds)
  return config

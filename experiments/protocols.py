"""What the paper's tables and its Figure 4 consist of: protocols, methods, and what the paper itself reports."""

from typing import NamedTuple

__all__ = ["CLASSES", "CURVES", "EXTRA", "LABELS", "PROTOCOL_LABELS", "SNIP", "TABLES", "Row", "Table", "rows_of"]


class Row(NamedTuple):
  """One row of a table.

  Attributes:
    protocol: name of a config.
    method: key of `LABELS`.
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
    "mnist": "MNIST", "cifar10": "CIFAR-10", "cifar10_moderate": "CIFAR-10, moderate local data",
    "cifar10_small": "CIFAR-10, small local data", "cifar100": "CIFAR-100, small local data"}

# Among how many classes a network of each protocol decides.
CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar10_moderate": 10, "cifar10_small": 10, "cifar100": 100}

# Methods beside those of `experiments.tune`: MetaSNIP starts from the meta-model without gates.
SNIP = {"metasnip_weight": "weight", "metasnip_channel": "channel"}

LABELS = {
    "fedavg": "FedAvg", "per_fedavg": "Per-FedAvg", "metagater_ungated": "MetaGater w/o gating",
    "metagater": "MetaGater w/ gating", "metasnip_weight": "MetaSNIP", "metasnip_channel": "MetaSNIP, by channel",
    "fedprox": "FedProx", "reptile": "Reptile", "pfedme": "pFedMe"}


def _training(protocol, *rows):
  return tuple(Row(protocol, method, steps, seconds) for method, steps, seconds in rows)


def _adaptation(protocol, ungated, snip, gated):
  return (Row(protocol, "metagater_ungated", 1, ungated), Row(protocol, "metasnip_weight", 1, snip),
          Row(protocol, "metasnip_channel"), Row(protocol, "metagater", 1, gated))


def _four(protocol, fedavg, per_fedavg, ungated, gated):
  return _training(protocol, ("fedavg", 1, fedavg), ("per_fedavg", 1, per_fedavg), ("metagater_ungated", 1, ungated),
                   ("metagater", 1, gated))


# Rows that the paper does not have. With one local step FedProx is FedAvg, and Reptile is FedAvg at another rate.
EXTRA = _training("mnist", ("fedavg", 2, None), ("per_fedavg", 2, None), ("fedprox", 2, None), ("reptile", 2, None),
                  ("pfedme", 1, None), ("pfedme", 2, None))

TABLES = {
    "1": Table("Meta-models via federated meta-learning", "training", (
        *_training("mnist", ("fedavg", 1, 396), ("per_fedavg", 1, 920), ("metagater_ungated", 1, 763),
                   ("metagater_ungated", 2, 1417)), *EXTRA,
        *_training("cifar10", ("fedavg", 1, 1139), ("per_fedavg", 1, 2056), ("metagater_ungated", 1, 1186),
                   ("metagater_ungated", 2, 2046), ("metagater", 1, 1960), ("metagater", 2, 3719)))),
    "2": Table("Fast adaptation on CIFAR-10", "adaptation", _adaptation("cifar10", 1.2, 1.4, 1.03)),
    "3": Table("Meta-models with moderate local data", "training", _four("cifar10_moderate", 1677, 3098, 1939, 2558)),
    "4": Table("Fast adaptation with moderate local data", "adaptation", _adaptation("cifar10_moderate", 1.6, 1.5, 1.4)),
    "5": Table("Meta-models with small local data", "training", (
        *_four("cifar10_small", 187, 339, 189, 356), *_four("cifar100", 192, 367, 208, 399))),
    "6": Table("Fast adaptation with small local data", "adaptation", (
        *_adaptation("cifar10_small", 0.56, 0.55, 0.51), *_adaptation("cifar100", 0.61, 0.57, 0.52))),
}

# Figure 4: accuracy over rounds, one panel per protocol, in these methods.
CURVES = {"mnist": ("fedavg", "per_fedavg", "metagater_ungated"),
          "cifar10": ("fedavg", "per_fedavg", "metagater_ungated", "metagater")}


def rows_of(tables) -> list[Row]:
  """The different rows that these tables need, with what MetaSNIP builds on, in an order in which they can be run."""
  rows = {}
  for number in tables:
    for row in TABLES[number].rows:
      rows.setdefault(row[:3], row)
  return sorted(rows.values(), key=lambda row: row.method in SNIP)

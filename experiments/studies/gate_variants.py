"""The variants of a gate that `experiments.studies.gates` compares, and where each is recorded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["LABELS", "MODELS", "PROTOCOLS", "SPARSITIES", "VARIANTS", "Variant", "variant_folder"]

PROTOCOLS = ("cifar10", "cifar10_moderate", "cifar10_small", "cifar100", "har")
SPARSITIES = (0.3, 0.5, 0.7)


class Variant(NamedTuple):
  """How a meta-model is adapted: `method` in the tables whose meta-model it is, and fields of the config that differ from that run's."""

  method: str
  changes: Mapping[str, Any]


VARIANTS = {
  "c": Variant("metagater_dropout", {"personalizer": "static_channels"}),
  "d": Variant("metagater_dropout", {"personalizer": "random_channels"}),
  "e": Variant("metagater", {"gate_frozen": True}),
  "f": Variant("metagater", {}),
}
# Meta-models: (a), (b), and that of (e) and (f), which is (f) at its own sparsity.
MODELS = {"a": "metagater_ungated", "b": "metagater_dropout", "f": "metagater"}
LABELS = {
  "a": "no gate",
  "b": "channel dropout",
  "c": "static channels, by one gradient",
  "d": "random channels",
  "e": "learned gates, frozen",
  "f": "learned gates, conditional",
}


def variant_folder(workdir: Path, protocol: str, variant: str, sparsity: float | None, seed: int) -> Path:
  """Where a variant is recorded; its sparsity is None where it is what the gate led to."""
  return workdir / f"{protocol}-gates-{variant}{'' if sparsity is None else f'-{sparsity:g}'}" / f"seed-{seed}"

"""What a gate is worth, taken apart: each gain of gating by its cause, at the same sparsity of the same layers.

    (a) no gate                          (d) as (b), with as many channels at random
    (b) no gate, channel dropout         (e) learned gates, fixed for a task to the majority over its train data
    (c) as (b), with static channels     (f) learned gates, conditional on each input
        chosen by one gradient

(a), (b) and the gated meta-model are ordinary rows of the tables and share their records; (c) to (f) adapt these meta-models, at several sparsities
and, for (e) and (f), at the sparsity that gate and penalty led to.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.config import base_config
from experiments.config.federated import check_config
from experiments.config.fields import check_known, with_fields
from experiments.reports import gates as report
from experiments.runs.federated import run_seeds
from experiments.studies.gate_variants import MODELS, PROTOCOLS, SPARSITIES, VARIANTS, Variant, variant_folder
from experiments.studies.paper import accuracy_line, folder_of, run_rows
from experiments.studies.protocols import Row
from experiments.studies.study import Part, carry_out
from metagater_jax.data.datasets import Dataset

__all__ = ["reproduce"]


def reproduce(
  workdir: str | Path,
  *,
  protocols: Sequence[str] | None = None,
  seeds: Sequence[int],
  rounds: int | None = None,
  data_dir: str | None = None,
  datasets: Mapping[str, Dataset] | None = None,
  log=print,
) -> dict[str, Any]:
  """Runs what is not yet recorded, and writes gates.json, gates.md and gates.png.

  Args:
    workdir, seeds, rounds, data_dir, datasets, log: as in `experiments.studies.paper.reproduce`, whose workdir it may be.
    protocols: some of `PROTOCOLS`; None: all.

  Returns:
    What gates.json holds.

  Raises:
    ConfigError: before anything runs, as there.
  """
  for protocol in protocols or ():
    check_known("protocol of the gates", protocol, PROTOCOLS)
  workdir, protocols = Path(workdir), [protocol for protocol in PROTOCOLS if not protocols or protocol in protocols]
  rows = [Row(protocol, method) for protocol in protocols for method in MODELS.values()]
  configs, datasets = run_rows(workdir, rows, seeds, rounds=rounds, data_dir=data_dir, datasets=datasets, log=log)
  groups, planned = {}, {}
  for row, config in configs.items():
    for name, variant in VARIANTS.items():
      if variant.method != row.method:
        continue
      own = [None] if "gate_frozen" in variant.changes else []  # (f) at its own sparsity is the gated row itself
      for sparsity in [*own, *SPARSITIES]:
        fields = _fields(config, variant, sparsity)
        group = f"{row.protocol} gates ({name}) at {'its own sparsity' if sparsity is None else f'sparsity {sparsity:g}'}"
        planned[group] = row, fields
        groups[group] = [
          Part(variant_folder(workdir, row.protocol, name, sparsity, seed) / "result.json", with_fields(fields, seed=seed), seed=seed)
          for seed in seeds
        ]

  def run(group, parts):
    row, fields = planned[group]
    ready, by_seed, outcomes = {}, {}, {}
    for part in parts:
      model = folder_of(workdir, row, part.seed)
      if not (model / "result.json").is_file():
        outcomes[part.record] = FileNotFoundError(f"it needs the finished run {model.name} of {model.parent.name}.")
        continue
      ready[part.seed], by_seed[part.seed] = part.record.parent, {"meta_model": str(model)}
    found = run_seeds(fields, ready, datasets[row.protocol], quiet=True, by_seed=by_seed) if ready else {}
    return outcomes | {ready[seed] / "result.json": outcome for seed, outcome in found.items()}

  carry_out(groups, run, defaults=base_config(), line=accuracy_line, log=log, keep_going=True)
  return report.write(workdir, protocols, seeds, configs)


def _fields(config: ConfigDict, variant: Variant, sparsity: float | None) -> ConfigDict:
  """The config of a variant: that of its meta-model with another adaptation, whose rate is its own where it was tuned."""
  changes = dict(variant.changes) | {"target_sparsity": sparsity}
  if "personalizer" in changes:
    changes["adapt_lr"] = None  # what was tuned for this personalizer, or its default
  return check_config(with_fields(config, **changes))

"""A backbone pruned in communication rounds by each score, over the same seeds.

Every score prunes the meta-model of a config to the same sparsity, along the same schedule; "none" trains the same rounds without pruning. A
seed has the same tasks and draws for all, so differences are paired. A finished run is recorded in a folder of its own and not run again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.config import base_config
from experiments.config.federated import check_config
from experiments.config.fields import check_known, with_fields
from experiments.reports.pruned_rounds import make_report
from experiments.runs.federated import run_seeds
from experiments.runs.records import make_folder, read_result
from experiments.studies.anp_cases import SCORES as ANP_SCORES
from experiments.studies.protocols import protocol_config
from experiments.studies.study import Part, carry_out, check_seeds
from metagater_jax.data.datasets import Dataset

__all__ = ["PROTOCOL", "SCORES", "reproduce"]

PROTOCOL = "cifar10_anp"
# Name in the table to fields of `prune`.
SCORES: dict[str, dict[str, Any]] = {"none": {"score": "none", "sparsity": 0.0}} | {
  name: ANP_SCORES[name].fields for name in ("anp", "anp_signed", "snip", "magnitude")
}


def reproduce(
  workdir: str | Path,
  *,
  scores: Sequence[str] = tuple(SCORES),
  seeds: Sequence[int] = (1, 2, 3),
  config: ConfigDict | None = None,
  dataset: Dataset | None = None,
  log=print,
) -> dict[str, Any]:
  """Runs what is not yet recorded.

  Args:
    workdir: holds the records, one folder per score and seed.
    scores: names in `SCORES`.
    seeds: of tasks and runs.
    config: instead of the default protocol; its `prune.sparsity` is what is pruned to.
    dataset: instead of the one that the config names.
    log: gets a line per finished score.

  Returns:
    Sparsity, rounds, seeds and, by score, accuracies by seed, kept parameters, sparsity by kernel, and the differences
    "anp minus another" over seeds with their 95 % intervals.

  Raises:
    ConfigError: before anything runs: an unknown score, no seeds, a config that cannot run, or records of another one.
    DivergedError: a run's loss is no longer finite; the runs before it are recorded.
  """
  workdir, config = Path(workdir), protocol_config(PROTOCOL) if config is None else config
  for score in scores:
    check_known("score", score, SCORES)
  check_seeds(seeds)
  configs, groups = {}, {}
  for score in scores:
    configs[score] = with_fields(config, eval_every=config.rounds)
    configs[score].prune.update(SCORES[score])
    groups[score] = [
      Part(workdir / f"{score}-seed-{seed}" / "result.json", check_config(with_fields(configs[score], seed=seed)), seed=seed) for seed in seeds
    ]

  def run(score, parts):
    outcomes = run_seeds(configs[score], {part.seed: part.record.parent for part in parts}, dataset, quiet=True)
    return {part.record: outcomes[part.seed] for part in parts}

  def line(score, outcomes, seconds):
    return (
      f"{ANP_SCORES[score].label}: "
      + ", ".join(f"{100 * read_result(part.record.parent)['accuracy']['mean']:.2f} %" for part in groups[score])
      + f" ({seconds:.0f} s)"
    )

  make_folder(workdir)
  carry_out(groups, run, defaults=base_config(), line=line, log=log)
  return make_report(workdir, scores, seeds, config)

"""`python -m experiments.pruned_rounds`: a backbone pruned in communication rounds by each score, over the same seeds.

Every score prunes MetaGater's backbone in `configs/cifar10_anp.py` to the same sparsity, along the same schedule; "none" trains the
same rounds without pruning. A seed has the same tasks and draws for all, so differences are paired. A finished run is recorded
in a folder of its own and not run again.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import cifar10_anp
from experiments import anp_tables, placement, reporting
from experiments.anp_tables import NAMES
from experiments.config import ConfigError, check_config, check_same, closest, with_fields
from experiments.paired import paired_difference
from experiments.training import run_seeds
from metagater_jax.data.datasets import Dataset

__all__ = ["SCORES", "main", "markdown", "reproduce"]

# Name in the table to fields of `prune`.
SCORES: dict[str, dict[str, Any]] = {"none": {"score": "none", "sparsity": 0.0}} | {
    name: anp_tables.SCORES[name] for name in ("anp", "anp_signed", "snip", "magnitude")}
# Fields on which a run's numbers do not depend.
_FREE = ("data_dir", "mesh", "task_axis", "microbatch", "seed_axis", "rounds_per_dispatch", "name", "memory_mb", "eval_every")


def reproduce(workdir: str | Path, *, scores: Sequence[str] = tuple(SCORES), seeds: Sequence[int] = (1, 2, 3),
              config: ConfigDict | None = None, dataset: Dataset | None = None, log=print) -> dict[str, Any]:
  """Runs what is not yet recorded.

  Args:
    workdir: holds the records, one folder per score and seed.
    scores: names in `SCORES`.
    seeds: of tasks and runs.
    config: instead of `configs/cifar10_anp.py`; its `prune.sparsity` is what is pruned to.
    dataset: instead of the one that the config names.
    log: gets a line per finished score.

  Returns:
    Sparsity, rounds, seeds and, by score, accuracies by seed, kept parameters, sparsity by kernel, and the differences
    "anp minus another" over seeds with their 95 % intervals.

  Raises:
    ConfigError: before anything runs: an unknown score, no seeds, a config that cannot run, or records of another one.
    DivergedError: a run's loss is no longer finite; the runs before it are recorded.
  """
  workdir, config = Path(workdir), cifar10_anp.get_config() if config is None else config
  for score in scores:
    if score not in SCORES:
      raise ConfigError(closest("score", score, SCORES))
  if not seeds:
    raise ConfigError("there must be at least one seed.")
  configs = {}
  for score in scores:
    own = with_fields(config, eval_every=config.rounds)
    own.prune.update(SCORES[score])
    configs[score] = own
    for seed in seeds:
      record = workdir / f"{score}-seed-{seed}" / "config.json"
      if (record.parent / "result.json").is_file():
        check_same(record, _settings(json.loads(record.read_text())),
                   _settings(json.loads(check_config(with_fields(own, seed=seed)).to_json_best_effort())))
  for score, own in configs.items():
    folders = {seed: workdir / f"{score}-seed-{seed}" for seed in seeds}
    missing = {seed: folder for seed, folder in folders.items() if not (folder / "result.json").is_file()}
    if not missing:
      continue
    for folder in missing.values():
      shutil.rmtree(folder, ignore_errors=True)  # what an interrupted call left
    for outcome in run_seeds(own, missing, dataset, quiet=True).values():
      if isinstance(outcome, Exception):
        raise outcome
    log(f"{NAMES[score]}: " + ", ".join(f"{100 * _accuracy(folder):.2f} %" for folder in folders.values()))
  return _report(workdir, scores, seeds, config)


def _settings(config):
  return {field: value for field, value in config.items() if field not in _FREE}


def _accuracy(folder):
  return json.loads((folder / "result.json").read_text())["accuracy"]["mean"]


def _report(workdir, scores, seeds, config):
  report = {"name": config.name, "rounds": config.rounds, "sparsity": config.prune.sparsity, "head": config.prune.head,
            "seeds": list(seeds), "scores": {}}
  accuracy = {score: {seed: _accuracy(workdir / f"{score}-seed-{seed}") for seed in seeds} for score in scores}
  for score in scores:
    results = [json.loads((workdir / f"{score}-seed-{seed}" / "result.json").read_text()) for seed in seeds]
    entry = {"accuracy": list(accuracy[score].values()), "pruned": results[0]["pruned"] or 0.0,
             "parameters_kept": results[0]["parameters_kept"] or results[0]["parameters"]["dense"],
             "gate_sparsity": float(np.mean([result["sparsity"]["mean"] for result in results])),
             "seconds": float(np.median([result["seconds"]["train"] for result in results])), "differences": {}}
    for other in scores:
      if score.startswith("anp") and not other.startswith("anp"):
        entry["differences"][other] = paired_difference(accuracy[score], accuracy[other])._asdict()
    report["scores"][score] = entry
  return report


def markdown(report: dict[str, Any]) -> str:
  """The report as a table."""
  others = [score for score in report["scores"] if not score.startswith("anp")]
  lines = [f"{report['name']}: {report['rounds']} rounds, {100 * report['sparsity']:.0f} % of the "
           f"{'kernels' if report['head'] else 'convolutions’ kernels'} pruned, seeds {', '.join(map(str, report['seeds']))}; differences "
           "in points with their 95 % interval over seeds (paired, Student's t).", "",
           "| score | accuracy of target tasks by seed (%) | mean (%) | parameters kept | " + " | ".join(
               f"minus {NAMES[other]}" for other in others) + " |", "|---|---|---|---|" + "---|" * len(others)]
  for score, entry in report["scores"].items():
    parts = [entry["differences"].get(other) for other in others]
    lines.append(f"| {NAMES[score]} | {', '.join(f'{100 * value:.1f}' for value in entry['accuracy'])} | "
                 f"{100 * np.mean(entry['accuracy']):.1f} | {entry['parameters_kept']:,} | "
                 + " | ".join(_difference(part) if part else "" for part in parts) + " |")
  return "\n".join(lines)


def _difference(part):
  if part["low"] is None:
    return f"{100 * part['mean']:+.1f}"
  return f"{100 * part['mean']:+.1f} ({100 * part['low']:+.1f} to {100 * part['high']:+.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.pruned_rounds", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--scores", type=lambda text: text.split(","), default=list(SCORES), help=f"of {', '.join(SCORES)}")
  parser.add_argument("--seeds", type=int, default=3, help="seeds 1 ... so many")
  parser.add_argument("--workdir", default="runs/pruned_rounds", help="where runs are recorded")
  parser.add_argument("--data_dir", help="where the data is; default: TFDS's own directory")
  parser.add_argument("--out", type=Path, help="a JSON file for the report, results/pruned_rounds.json for README's table")
  options = parser.parse_args(arguments)
  logging.getLogger().setLevel(logging.WARNING)
  config = cifar10_anp.get_config()
  config.data_dir = options.data_dir
  try:
    placement.use_cores(config)
    report = reproduce(options.workdir, scores=options.scores, seeds=range(1, options.seeds + 1), config=config,
                       log=lambda line: print(line, flush=True))
  except (ConfigError, reporting.DivergedError) as error:
    reporting.fail("experiments.pruned_rounds", error)
  print(markdown(report))
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    reporting.write_json(options.out, report)


if __name__ == "__main__":
  main()

"""Tables 1-6 and Figure 4 of the paper, from real data to a report.

Every run is recorded in a folder of its own below the workdir when it ends. A run that fails is recorded as failed and shown as such; it is
tried again by the next call. The report (`report.md`, `report.html`, `report.json`) is written anew from the records at the end of every call.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.config import base_config, registry
from experiments.config.federated import check_config
from experiments.config.fields import check_known, with_fields
from experiments.reports import paper as report
from experiments.runs import placement
from experiments.runs.federated import load, run_seeds
from experiments.runs.records import make_folder
from experiments.studies.protocols import BASE, CURVES, GATED, TABLES, Row, is_pruning, protocol_config, rows_of
from experiments.studies.study import Part, carry_out, check_rounds, check_seeds
from metagater_jax.data.datasets import Dataset

__all__ = ["accuracy_line", "config_of", "folder_of", "reproduce", "run_rows"]


def config_of(row: Row, *, rounds: int | None = None, data_dir: str | None = None) -> ConfigDict:
  """The checked config of a row. What prunes at a target has that of the meta-model it starts from, with its own personalizer."""
  config = protocol_config(row.protocol, data_dir, rounds)
  method = registry.methods()[row.method]
  config.update(algorithm=method.algorithm, gated=method.gated, personalizer=method.personalizer, local_steps=row.local_steps)
  if is_pruning(row.method):
    config.mesh = "none"  # each target has a sparsity of its own, which is not spread
    config.target_sparsity = 0.5  # in whose place each run takes what the gate reached on the same task
  config = check_config(config)
  if row.local_steps > 1 or row.method not in CURVES.get(row.protocol, ()):
    config.eval_every = config.rounds  # only what Figure 4 shows is evaluated on the way
  return config


def folder_of(workdir: Path, row: Row, seed: int) -> Path:
  """Where the run of a row with a seed is recorded."""
  return workdir / f"{row.protocol}-{row.method}-k{row.local_steps}" / f"seed-{seed}"


def reproduce(
  workdir: str | Path,
  *,
  tables: Sequence[str] = tuple(TABLES),
  seeds: Sequence[int] = tuple(range(31, 41)),
  rounds: int | None = None,
  data_dir: str | None = None,
  protocols: Sequence[str] | None = None,
  datasets: Mapping[str, Dataset] | None = None,
  log=print,
) -> dict[str, Any]:
  """Runs what is not yet recorded, and writes the report.

  Args:
    workdir: holds the records.
    tables: by number.
    seeds: of the partitions and runs; the same for all methods, so that differences are paired.
    rounds: instead of the configs'.
    data_dir: where data sets are.
    protocols: only the rows of these.
    datasets: by protocol, images and labels to use instead of the named data sets.
    log: gets a line per finished step.

  Returns:
    What `report.json` holds.

  Raises:
    ConfigError: before anything runs: an unknown table or protocol, no seeds, data that is missing, or a workdir whose
      runs have another configuration.
  """
  for table in tables:
    check_known("table", table, TABLES)
  rows = rows_of(tables)
  known = sorted({row.protocol for row in rows})
  for protocol in protocols or ():
    check_known(f"protocol in table{'s' if len(tables) > 1 else ''} {', '.join(tables)}", protocol, known)
  rows = [row for row in rows if not protocols or row.protocol in protocols]
  configs, _ = run_rows(workdir, rows, seeds, rounds=rounds, data_dir=data_dir, datasets=datasets, log=log)
  return report.write(Path(workdir), [number for number in TABLES if number in tables], seeds, configs)


def run_rows(
  workdir: str | Path,
  rows: Sequence[Row],
  seeds: Sequence[int],
  *,
  rounds: int | None = None,
  data_dir: str | None = None,
  datasets: Mapping[str, Dataset] | None = None,
  log=print,
) -> tuple[dict[Row, ConfigDict], dict[str, Dataset]]:
  """Runs what is not yet recorded of these rows.

  Args:
    workdir, seeds, rounds, data_dir, datasets, log: as in `reproduce`.
    rows: in an order in which they can be run.

  Returns:
    The config of each row, and the data sets by protocol.

  Raises:
    ConfigError: as in `reproduce`.
  """
  workdir, datasets = Path(workdir), dict(datasets or {})
  check_seeds(seeds)
  check_rounds(rounds)
  for protocol in dict.fromkeys(row.protocol for row in rows):
    placement.use_cores(protocol_config(protocol))
  configs = {row: config_of(row, rounds=rounds, data_dir=data_dir) for row in rows}
  by_name = {_name(row): row for row in rows}
  groups = {
    name: [Part(folder_of(workdir, row, seed) / "result.json", with_fields(configs[row], seed=seed), seed=seed) for seed in seeds]
    for name, row in by_name.items()
  }
  for row, config in configs.items():
    if row.protocol not in datasets:
      datasets[row.protocol] = load(config)

  def run(name, parts):
    row = by_name[name]
    return _run_row(workdir, row, configs[row], [part.seed for part in parts], datasets[row.protocol])

  make_folder(workdir)
  carry_out(groups, run, defaults=base_config(), line=accuracy_line, log=log, keep_going=True)
  return configs, datasets


def accuracy_line(name: str, outcomes: Mapping[Path, Any], seconds: float) -> str:
  """What a log says of a row that has run: its mean accuracy, and what failed."""
  good = [100 * outcome["accuracy"]["mean"] for outcome in outcomes.values() if not isinstance(outcome, Exception)]
  failed = [f"{record.parent.name} failed: {outcome}" for record, outcome in outcomes.items() if isinstance(outcome, Exception)]
  figures = f"{np.mean(good):.1f} % over {len(good)} seeds" if good else ""
  return f"{name}: {'; '.join(filter(None, [figures, *failed]))} ({seconds:.0f} s)"


def _name(row):
  return f"{row.protocol} {row.method} K={row.local_steps}"


def _run_row(workdir, row, config, seeds, dataset):
  """By record, results or errors. What prunes at a target takes the finished runs of the same seed without and with gates."""
  record = lambda seed: folder_of(workdir, row, seed) / "result.json"
  outcomes, by_seed = {}, {seed: {} for seed in seeds}
  if is_pruning(row.method):
    for seed in seeds:
      base, gated = (folder_of(workdir, row._replace(method=method), seed) for method in (BASE, GATED))
      by_seed[seed] = {"meta_model": str(base), "sparsity_of": str(gated)}
      if not all((folder / "result.json").is_file() for folder in (base, gated)):
        outcomes[record(seed)] = FileNotFoundError(
          f"{row.method} needs the finished runs {base.name} of {base.parent.name} and of {gated.parent.name}."
        )
  ready = {seed: folder_of(workdir, row, seed) for seed in seeds if record(seed) not in outcomes}
  if ready:
    found = run_seeds(config, ready, dataset, quiet=True, by_seed=by_seed)
    outcomes |= {record(seed): outcome for seed, outcome in found.items()}
  return outcomes

"""`python -m experiments.run --config=configs/cifar100.py`: one experiment, from data to table and figures.

Without --config it runs the embedded digits. Fields are overridden with --config.field=value. On several hosts the same command
runs on each, with --coordinator, --num_processes and --process_id, or --distributed; only process 0 writes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments.command import launch
from experiments.config import base_config
from experiments.reports.run import report_run
from experiments.runs.distributed import join
from experiments.runs.federated import run_seeds
from experiments.runs.placement import use_cores
from experiments.runs.records import check_workdir
from metagater_jax.data.datasets import Dataset

__all__ = ["main", "run"]


def run(config: ConfigDict, workdir: str | Path, dataset: Dataset | None = None, quiet: bool = False) -> dict[str, Any]:
  """Meta-trains, adapts to the target tasks, records everything in `workdir` and draws its figures; what `result.json` holds. Arguments and
  errors are those of `experiments.runs.federated.run_seeds`; `quiet` leaves out the progress line and the table."""
  result = run_seeds(config, {config.seed: workdir}, dataset, quiet)[config.seed]
  if isinstance(result, Exception):
    raise result
  if jax.process_index() == 0:
    text = report_run(workdir)
    if not quiet:
      print(text)
  return result


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  launch("experiments.run", "digits", base_config(), _run, arguments, _define)


def _define(values):
  flags.DEFINE_string("coordinator", None, "host:port of process 0, for a run on several processes.", flag_values=values)
  flags.DEFINE_integer("num_processes", None, "How many processes there are.", flag_values=values)
  flags.DEFINE_integer("process_id", None, "Number of this one, from 0.", flag_values=values)
  flags.DEFINE_bool("distributed", False, "Take these three from a TPU pod, SLURM or MPI.", flag_values=values)
  flags.DEFINE_integer("timeout", 300, "Seconds to wait for the other processes.", flag_values=values)


def _run(config, workdir, options):
  if options.process_id == 0:
    check_workdir(workdir)  # before the others wait for this process
  join(options.coordinator, options.num_processes, options.process_id, environment=options.distributed, timeout=options.timeout)
  if options.coordinator is None and not options.distributed:
    use_cores(config)
  run(config, workdir)


if __name__ == "__main__":
  main()

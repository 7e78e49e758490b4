"""`python -m experiments.run --config=configs/cifar100.py`: one experiment, from data to table and figures.

Without --config it runs the embedded digits. Fields are overridden with --config.field=value. On several hosts the same command
runs on each, with --coordinator, --num_processes and --process_id, or --distributed; only process 0 writes.
"""

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

_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for a run on several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this one, from 0.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Take these three from a TPU pod, SLURM or MPI.")
_TIMEOUT = flags.DEFINE_integer("timeout", 300, "Seconds to wait for the other processes.")


def run(config: ConfigDict, workdir: str | Path, dataset: Dataset | None = None, quiet: bool = False) -> dict[str, Any]:
  """Meta-trains, adapts to the target tasks, records everything in `workdir` and draws its figures; what `result.json` holds.

  From a notebook: `run(configs.digits.get_config(), "runs/mine")`. Arguments are those of `experiments.runs.federated.run_seeds`; `quiet`
  leaves out the progress line and the table.

  Raises:
    ConfigError: before any long work.
    DivergedError: the loss is no longer finite; metrics until then are kept.
  """
  result = run_seeds(config, {config.seed: workdir}, dataset, quiet)[config.seed]
  if isinstance(result, Exception):
    raise result
  if jax.process_index() == 0:
    text = report_run(workdir)
    if not quiet:
      print(text)
  return result


def main() -> None:
  """The command."""
  launch("experiments.run", "digits", base_config(), _run)


def _run(config: ConfigDict, workdir: Path):
  if not _PROCESS_ID.value:
    check_workdir(workdir)  # before the others wait for this process
  join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, environment=_DISTRIBUTED.value, timeout=_TIMEOUT.value)
  if _COORDINATOR.value is None and not _DISTRIBUTED.value:
    use_cores(config)
  run(config, workdir)


if __name__ == "__main__":
  main()

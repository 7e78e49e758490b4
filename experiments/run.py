"""`python -m experiments.run --config=configs/cifar100.py`: one experiment, from data to table and figures.

Without --config it runs the embedded digits. Fields are overridden with --config.field=value. On several hosts the same command
runs on each, with --coordinator, --num_processes and --process_id, or --distributed; only process 0 writes.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from experiments.command import launch
from experiments.config import base_config
from experiments.distributed import join
from experiments.placement import use_cores
from experiments.training import check_workdir, run

_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for a run on several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this one, from 0.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Take these three from a TPU pod, SLURM or MPI.")
_TIMEOUT = flags.DEFINE_integer("timeout", 300, "Seconds to wait for the other processes.")


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

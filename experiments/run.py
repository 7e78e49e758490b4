"""`python -m experiments.run --config=configs/cifar100.py`: one experiment, from data to table and figures.

Without --config it runs the embedded digits. Fields are overridden with --config.field=value. On several hosts the same command
runs on each, with --coordinator, --num_processes and --process_id, or --distributed; only process 0 writes.
"""

import difflib
import time
from functools import partial
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import reporting
from experiments.config import ConfigError, base_config, closest
from experiments.distributed import join
from experiments.placement import use_cores
from experiments.training import DivergedError, check_workdir, run

_ROOT = Path(__file__).resolve().parent.parent
# The default is filled in by _parse: a default given here is parsed, with its overrides, before errors can be caught.
_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment; see configs/. Default: configs/digits.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; by default a new folder under runs/.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for a run on several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this one, from 0.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Take these three from a TPU pod, SLURM or MPI.")
_TIMEOUT = flags.DEFINE_integer("timeout", 300, "Seconds to wait for the other processes.")


def main() -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  logging.set_verbosity(logging.WARNING)  # JAX reports every accelerator it did not find, Matplotlib its fonts
  app.run(_main, flags_parser=_parse)


def _main(arguments):
  del arguments
  config = _CONFIG.value
  workdir = _WORKDIR.value or _new_workdir(config.name)
  try:
    if not _PROCESS_ID.value:
      check_workdir(Path(workdir))  # before the others wait for this process
    join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, environment=_DISTRIBUTED.value, timeout=_TIMEOUT.value)
    if _COORDINATOR.value is None and not _DISTRIBUTED.value:
      use_cores(config)
    run(config, workdir)
  except (ConfigError, DivergedError) as error:
    _fail(error)


def _new_workdir(name):
  stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
  return next(path for path in (stem.with_name(stem.name + suffix) for suffix in ("", *(f"-{i}" for i in range(1, 1000))))
              if not path.exists())


def _parse(arguments):
  """absl's flag parsing with errors that name what is near."""
  given = []
  for argument, following in zip(arguments[1:], [*arguments[2:], ""]):
    option, equals, value = argument.lstrip("-").partition("=")
    if option == "config":
      given.append(value if equals else following)
  if not given:
    arguments = [arguments[0], f"--config={_ROOT / 'configs' / 'digits.py'}", *arguments[1:]]
  for path in filter(None, given):
    _check_config_file(path)
  try:
    rest = flags.FLAGS(arguments)
  except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    _fail(_explain(error, arguments))
  if len(rest) > 1:
    _fail(f"unexpected argument '{rest[1]}'; options are written --name=value.")
  return rest


def _check_config_file(path):
  file = Path(path.partition(":")[0])
  if file.is_file():
    return
  known = sorted(p.stem for p in (_ROOT / "configs").glob("*.py") if not p.stem.startswith("_"))
  nearest = difflib.get_close_matches(file.stem, known, n=1, cutoff=0.4)
  hint = f" Did you mean configs/{nearest[0]}.py?" if nearest else ""
  _fail(f"there is no config file '{path}'.{hint} Known: {', '.join(f'configs/{name}.py' for name in known)}.")


def _explain(error, arguments):
  """Names the nearest field where a --config.field is unknown; other messages of absl are clear as they are."""
  fields = list(base_config())
  for argument in arguments[1:]:
    prefix, _, field = argument.lstrip("-").partition("=")[0].partition(".")
    if prefix == "config" and field and field not in fields:
      return closest("field", field, fields).replace("Known:", "Fields:")
  return error


_fail = partial(reporting.fail, "experiments.run")


if __name__ == "__main__":
  main()

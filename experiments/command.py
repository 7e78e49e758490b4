"""What the commands share: flags of config files, errors that name what is near, and a workdir of their own."""

import difflib
import logging as python_logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments.config.fields import CONFIGS, ConfigError
from experiments.runs.records import DivergedError, fail
from metagater_jax.core.checks import unknown

__all__ = ["launch", "numbers", "study_command", "words"]


def launch(program: str, default: str, base: ConfigDict, body: Callable[[ConfigDict, Path], None]) -> None:
  """Runs `body(config, workdir)` of a command. Bad input ends it with one line on standard error and exit status 2.

  Args:
    program: the command's name, for messages.
    default: of the config file, by its name in configs/.
    base: a config with all fields that the command knows.
    body: may raise ConfigError or DivergedError.
  """
  # The default is filled in by _parse: a default given here is parsed, with its overrides, before errors can be caught.
  config = config_flags.DEFINE_config_file("config", None, f"The experiment; see configs/. Default: configs/{default}.py.")
  workdir = flags.DEFINE_string("workdir", None, "Where results go; by default a new folder under runs/.")
  logging.set_verbosity(logging.WARNING)  # JAX reports every accelerator it did not find, Matplotlib its fonts

  def main(arguments):
    del arguments
    try:
      _check_kind(program, config.value, base)
      body(config.value, Path(workdir.value or _new_workdir(config.value.name)))
    except (ConfigError, DivergedError) as error:
      fail(program, error)

  app.run(main, flags_parser=partial(_parse, program, default, _fields(base)))


def _fields(base, prefix=""):
  """All fields, those of parts as part.field."""
  names = []
  for name in base:
    part = isinstance(base.get_ref(name).get(), ConfigDict)
    names += _fields(base[name], f"{prefix}{name}.") if part else [prefix + name]
  return names


def _check_kind(program, config, base):
  if set(config) != set(base):
    other = "experiments.run" if program == "experiments.fewshot" else "experiments.fewshot"
    raise ConfigError(f"the config '{config.get('name', '')}' is not for {program}: it lacks "
                      f"{', '.join(sorted(set(base) - set(config))[:3]) or 'nothing'}; try `python -m {other}`.")


def _new_workdir(name):
  stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
  return next(path for path in (stem.with_name(stem.name + suffix) for suffix in ("", *(f"-{i}" for i in range(1, 1000))))
              if not path.exists())


def _parse(program, default, fields, arguments):
  """absl's flag parsing with errors that name what is near."""
  stop = partial(fail, program)
  given = []
  for argument, following in zip(arguments[1:], [*arguments[2:], ""]):
    option, equals, value = argument.lstrip("-").partition("=")
    if option == "config":
      given.append(value if equals else following)
  if not given:
    arguments = [arguments[0], f"--config={CONFIGS / default}.py", *arguments[1:]]
  for path in filter(None, given):
    _check_config_file(path, stop)
  try:
    rest = flags.FLAGS(arguments)
  except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    stop(_explain(error, arguments, fields))
  if len(rest) > 1:
    stop(f"unexpected argument '{rest[1]}'; options are written --name=value.")
  return rest


def _check_config_file(path, stop):
  file = Path(path.partition(":")[0])
  if file.is_file():
    return
  known = sorted(p.stem for p in CONFIGS.glob("*.py") if not p.stem.startswith("_"))
  nearest = difflib.get_close_matches(file.stem, known, n=1, cutoff=0.4)
  hint = f" Did you mean configs/{nearest[0]}.py?" if nearest else ""
  stop(f"there is no config file '{path}'.{hint} Known: {', '.join(f'configs/{name}.py' for name in known)}.")


def _explain(error, arguments, fields):
  """Names the nearest field where a --config.field is unknown; other messages of absl are clear as they are."""
  for argument in arguments[1:]:
    prefix, _, field = argument.lstrip("-").partition("=")[0].partition(".")
    if prefix == "config" and field and field not in fields:
      return unknown("field", field, fields).replace("Known:", "Fields:")
  return error


def study_command(program: str, body: Callable[[], None]) -> None:
  """Runs the body of a study's command. A ConfigError or DivergedError ends it with one line on standard error and exit status 2."""
  python_logging.getLogger().setLevel(python_logging.WARNING)  # as in `launch`
  try:
    body()
  except (ConfigError, DivergedError) as error:
    fail(program, error)


def words(text: str) -> list[str]:
  """Names separated by commas, for argparse."""
  return text.split(",")


def numbers(text: str) -> list[int]:
  """Whole numbers separated by commas, for argparse."""
  return [int(value) for value in text.split(",")]

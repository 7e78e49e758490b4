"""What the commands share: options, errors that name what is near and end in one line, and a workdir of their own."""

import difflib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from experiments.config.fields import CONFIGS, ConfigError, check_name
from experiments.runs.records import DivergedError, NotSavedError
from metagater_jax.core.checks import unknown

__all__ = ["launch", "numbers", "study_command", "words"]


def launch(
  program: str,
  default: str,
  base: ConfigDict,
  body: Callable[[ConfigDict, Path, flags.FlagValues], None],
  arguments: Sequence[str] | None = None,
  define: Callable[[flags.FlagValues], None] = lambda values: None,
) -> None:
  """Runs `body(config, workdir, options)` of a command that takes a config file. Bad input ends it with one line on standard error and exit
  status 2.

  Args:
    program: the command's name, for messages.
    default: of the config file, by its name in configs/.
    base: a config with all fields that the command knows.
    body: may raise ConfigError or DivergedError.
    arguments: of the command line; None: those of the process.
    define: adds the command's own options.
  """
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  _quiet()
  files = _config_files(arguments)
  if not files:  # here, because a flag's own default is parsed, with its overrides, before errors can be caught
    arguments = [f"--config={CONFIGS / default}.py", *arguments]
  options = flags.FlagValues()  # not absl's own, so that commands can be called several times in a process
  config_flags.DEFINE_config_file(
    "config", None, f"The experiment; see configs/. Default: configs/{default}.py.", flag_values=options, sys_argv=["command", *arguments]
  )
  flags.DEFINE_string("workdir", None, "Where results go; by default a new folder under runs/.", flag_values=options)
  define(options)
  if {"--help", "-h", "--helpfull"} & set(arguments):
    print(
      f"python -m {program}\n{options.get_help(include_special_flags=False)}\n\nFields, as --config.field=value:\n  " + "\n  ".join(_fields(base))
    )
    return
  try:
    for file in files:
      _check_config_file(file)
    _parse(_fields(base), arguments, options)
    _check_kind(program, options.config, base)
    body(options.config, Path(options.workdir or _new_workdir(options.config.name)), options)
  except (ConfigError, DivergedError, NotSavedError) as error:
    _fail(program, error)
  except KeyboardInterrupt:
    _interrupted(program)


def study_command(program: str, body: Callable[[], None]) -> None:
  """Runs the body of a study's command. A ConfigError or DivergedError ends it with one line on standard error and exit status 2."""
  _quiet()
  try:
    body()
  except (ConfigError, DivergedError, NotSavedError) as error:
    _fail(program, error)
  except KeyboardInterrupt:
    _interrupted(program)


def words(text: str) -> list[str]:
  """Names separated by commas, for argparse."""
  return text.split(",")


def numbers(text: str) -> list[int]:
  """Whole numbers separated by commas, for argparse."""
  return [int(value) for value in text.split(",")]


def _quiet():
  # JAX reports every accelerator it did not find, Matplotlib its fonts.
  absl_logging.use_absl_handler()
  absl_logging.set_verbosity(absl_logging.WARNING)
  logging.getLogger().setLevel(logging.WARNING)
  for stream in (sys.stdout, sys.stderr):  # where ± cannot be encoded, a ? does no harm, and the end of a long run is no place to fail
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="replace")


def _interrupted(program: str) -> NoReturn:
  print(f"\n{program}: interrupted. What was recorded until then is kept; the same command may be given again.", file=sys.stderr)
  sys.exit(130)


def _fail(program: str, error: object) -> NoReturn:
  print(f"{program}: {error}", file=sys.stderr)
  sys.exit(2)


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
    raise ConfigError(
      f"the config '{config.get('name', '')}' is not for {program}: it lacks "
      f"{', '.join(sorted(set(base) - set(config))[:3]) or 'nothing'}; try `python -m {other}`."
    )


def _new_workdir(name):
  check_name(name)
  stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
  return next(path for path in (stem.with_name(stem.name + suffix) for suffix in ("", *(f"-{i}" for i in range(1, 1000)))) if not path.exists())


def _config_files(arguments):
  """What is given as --config."""
  given = []
  for argument, following in zip(arguments, [*arguments[1:], ""]):
    option, equals, value = argument.lstrip("-").partition("=")
    if option == "config":
      given.append(value if equals else following)
  return list(filter(None, given))


def _parse(fields, arguments, options):
  """absl's flag parsing with errors that name what is near."""
  try:
    rest = options(["command", *arguments])
  except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    raise ConfigError(_explain(error, arguments, fields)) from error
  if len(rest) > 1:
    raise ConfigError(f"unexpected argument '{rest[1]}'; options are written --name=value.")


def _check_config_file(path):
  file = Path(path.partition(":")[0])
  if file.is_file():
    return
  known = sorted(p.stem for p in CONFIGS.glob("*.py") if not p.stem.startswith("_"))
  nearest = difflib.get_close_matches(file.stem, known, n=1, cutoff=0.4)
  hint = f" Did you mean configs/{nearest[0]}.py?" if nearest else ""
  raise ConfigError(f"there is no config file '{path}'.{hint} Known: {', '.join(f'configs/{name}.py' for name in known)}.")


def _explain(error, arguments, fields):
  """Names the nearest field where a --config.field is unknown; other messages of absl are clear as they are."""
  for argument in arguments:
    prefix, _, field = argument.lstrip("-").partition("=")[0].partition(".")
    if prefix == "config" and field and field not in fields:
      return unknown("field", field, fields).replace("Known:", "Fields:")
  return str(error)

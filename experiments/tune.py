"""`python -m experiments.tune --protocols=mnist,cifar10`: settings of every method of a protocol, at one budget for all.

What is tuned, and how, is in `experiments.studies.tune`. A method that is tuned is recorded in the workdir, and not tuned again; the settings go to
configs/tuned/, where the configs read them.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments.command import numbers, study_command, words
from experiments.config import registry
from experiments.config.fields import TUNED
from experiments.studies.protocols import protocol_config
from experiments.studies.study import parse_seeds
from experiments.studies.tune import adaptation_rates, reproduce

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.tune", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument(
    "--protocols",
    type=words,
    default=["mnist", "cifar10", "cifar10_small", "har"],
    help="configs to tune, by name, separated by commas; default: those with a file of their own",
  )
  known = [name for name, method in registry.methods().items() if method.space]
  parser.add_argument("--methods", type=words, help=f"some of {', '.join(known)}; default: those of the paper's tables")
  parser.add_argument("--trials", type=int, default=8, help="meta-trainings per method and seed; default: 8")
  parser.add_argument("--seeds", default="100", help="populations to tune on, none that a table reports: 100, 100-102 or 100,105; default: 100")
  parser.add_argument("--local_steps", type=numbers, default=[1], help="numbers of local steps to tune for")
  parser.add_argument("--rates", type=int, default=9, help="adaptation rates, from 0.005 to 1.28; default: 9")
  parser.add_argument("--rounds", type=int, default=200, help="of each meta-training, at most; how many are enough is found; default: 200")
  parser.add_argument("--data_dir", help="where the data is; default: TFDS's own directory")
  parser.add_argument("--workdir", default="runs/tune", help="where each method's trials are recorded")
  parser.add_argument("--out", type=Path, default=TUNED, help="folder of the results; default: where the configs read them")
  options = parser.parse_args(arguments)

  def body():
    configs = {name: protocol_config(name, options.data_dir, options.rounds) for name in options.protocols}
    reproduce(
      options.workdir,
      options.out,
      configs,
      methods=options.methods,
      local_steps=options.local_steps,
      seeds=parse_seeds(options.seeds),
      trials=options.trials,
      rates=adaptation_rates(max(options.rates, 0)),
      log=partial(print, flush=True),
    )

  study_command("experiments.tune", body)


if __name__ == "__main__":
  main()

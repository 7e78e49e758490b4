"""`python -m experiments.tables`: Tables 1-6 and Figure 4 of the paper, from real data to a report.

How runs are recorded and resumed is in `experiments.studies.paper`. The tables of ANP are those of `python -m experiments.anp`.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial

from experiments.command import study_command, words
from experiments.config import ConfigError
from experiments.studies import gates
from experiments.studies.paper import reproduce
from experiments.studies.protocols import TABLES
from experiments.studies.study import parse_seeds

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.tables", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument(
    "--tables",
    type=words,
    default=list(TABLES),
    help=f"{', '.join(TABLES)}, or gates (what a gate is worth), separated by commas; default: all but that",
  )
  parser.add_argument("--protocols", type=words, help="only the rows of these protocols, cifar10 for instance")
  parser.add_argument("--seeds", default="31-40", help="3, 1-3 or 1,4-6; default: 31-40, those of the recorded reports")
  parser.add_argument("--rounds", type=int, help="of every run; default: what the protocols' configs say")
  parser.add_argument("--workdir", default="runs/tables", help="where runs are recorded and the report goes")
  parser.add_argument("--data_dir", help="where the data is; default: TFDS's own directory")
  options = parser.parse_args(arguments)

  def body():
    start = time.perf_counter()
    if "anp" in options.tables:
      raise ConfigError("the tables of ANP are made by `python -m experiments.anp`.")
    arguments = {
      "seeds": parse_seeds(options.seeds),
      "rounds": options.rounds,
      "data_dir": options.data_dir,
      "protocols": options.protocols,
      "log": partial(print, flush=True),
    }
    written, numbered = [], [table for table in options.tables if table != "gates"]
    if numbered:
      reproduce(options.workdir, tables=numbered, **arguments)
      written += ["report.md", "report.html", "report.json"]
    if "gates" in options.tables:
      gates.reproduce(options.workdir, **arguments)
      written += ["gates.md", "gates.png", "gates.json"]
    print(f"{', '.join(f'{options.workdir}/{name}' for name in written)}, after {time.perf_counter() - start:.0f} s")

  study_command("experiments.tables", body)


if __name__ == "__main__":
  main()

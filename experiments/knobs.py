"""`python -m experiments.knobs`: how accuracy and sparsity answer to each setting of MetaGater, on human activity.

What is run, and how it is recorded and resumed, is in `experiments.studies.knobs`.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments.command import study_command, words
from experiments.reports.knobs import draw, ranges_table, values_table
from experiments.runs.records import write_json
from experiments.studies.knobs import KNOBS, reproduce
from experiments.studies.study import parse_seeds

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.knobs", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--knobs", type=words, default=list(KNOBS), help=f"of {', '.join(KNOBS)}")
  parser.add_argument("--seeds", default="61-65", help="3, 1-3 or 1,4-6; default: 61-65")
  parser.add_argument("--rounds", type=int, help="instead of the tuned number")
  parser.add_argument("--workdir", default="runs/knobs", help="where runs are recorded")
  parser.add_argument("--data_dir", help="the folder with hapt.npz or the original files")
  parser.add_argument("--out", type=Path, help="a folder for the report, results/knobs for the tables in docs/")
  options = parser.parse_args(arguments)

  def body():
    report = reproduce(
      options.workdir,
      knobs=options.knobs,
      seeds=parse_seeds(options.seeds),
      rounds=options.rounds,
      data_dir=options.data_dir,
      log=partial(print, flush=True),
    )
    folder = options.out or Path(options.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "knobs.json", report)
    draw(report, folder / "knobs.png")
    print(f"{ranges_table(report)}\n\n{values_table(report)}\n\n{folder / 'knobs.png'}")

  study_command("experiments.knobs", body)


if __name__ == "__main__":
  main()

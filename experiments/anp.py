"""`python -m experiments.anp`: accuracy against sparsity of meta-trained networks, for every pruning score, from real data to a report.

What is run, and how it is recorded and resumed, is in `experiments.studies.anp`; the networks and tasks are in `anp_cases`.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial

from experiments.command import numbers, study_command, words
from experiments.reports.anp import overview
from experiments.studies.anp import reproduce
from experiments.studies.anp_cases import CASES, SCORES
from experiments.studies.study import parse_seeds

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.anp", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--cases", type=words, default=list(CASES), help=f"some of {', '.join(CASES)}; default: all")
  parser.add_argument("--scores", type=words, default=list(SCORES), help=f"some of {', '.join(SCORES)}; default: all")
  parser.add_argument("--seeds", default="1-3", help="3, 1-3 or 1,4-6; default: 1-3")
  parser.add_argument("--steps", type=int, help="of meta-training before pruning, and in proportion at each sparsity; default: each case's own")
  parser.add_argument(
    "--level_steps", type=numbers, help="steps of meta-training at each sparsity; default: those of each case, in courses of their own"
  )
  parser.add_argument("--workdir", default="runs/anp", help="where runs are recorded and the report goes")
  parser.add_argument("--data_dir", help="where the data is; default: TFDS's own directory")
  options = parser.parse_args(arguments)

  def body():
    start = time.perf_counter()
    report = reproduce(
      options.workdir,
      cases=options.cases,
      seeds=parse_seeds(options.seeds),
      scores=options.scores,
      steps=options.steps,
      level_steps=options.level_steps,
      data_dir=options.data_dir,
      log=partial(print, flush=True),
    )
    print(overview(report))
    print(f"{options.workdir}/anp.md, anp.json and anp.png, after {time.perf_counter() - start:.0f} s")

  study_command("experiments.anp", body)


if __name__ == "__main__":
  main()

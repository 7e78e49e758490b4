"""`python -m experiments.pruned_rounds`: a backbone pruned in communication rounds by each score, over the same seeds.

What is run, and how it is recorded and resumed, is in `experiments.studies.pruned_rounds`.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments.command import study_command, words
from experiments.reports.pruned_rounds import markdown
from experiments.runs.placement import use_cores
from experiments.runs.records import write_json
from experiments.studies.protocols import protocol_config
from experiments.studies.pruned_rounds import PROTOCOL, SCORES, reproduce
from experiments.studies.study import parse_seeds

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.pruned_rounds", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--scores", type=words, default=list(SCORES), help=f"of {', '.join(SCORES)}")
  parser.add_argument("--seeds", default="1-3", help="3, 1-3 or 1,4-6; default: 1-3")
  parser.add_argument("--workdir", default="runs/pruned_rounds", help="where runs are recorded")
  parser.add_argument("--data_dir", help="where the data is; default: TFDS's own directory")
  parser.add_argument("--out", type=Path, help="a JSON file for the report, results/pruned_rounds.json for the table in docs/")
  options = parser.parse_args(arguments)

  def body():
    config = protocol_config(PROTOCOL, options.data_dir)
    use_cores(config)
    report = reproduce(options.workdir, scores=options.scores, seeds=parse_seeds(options.seeds), config=config, log=partial(print, flush=True))
    print(markdown(report))
    if options.out:
      options.out.parent.mkdir(parents=True, exist_ok=True)
      write_json(options.out, report)

  study_command("experiments.pruned_rounds", body)


if __name__ == "__main__":
  main()

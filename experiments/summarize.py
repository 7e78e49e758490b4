"""`python -m experiments.summarize --tables=WORKDIR`: what is recorded in results/, and the tables of README.md and docs/ from it.

With --tables the report of `experiments.tables` in that workdir is recorded in results/tables/: its numbers (report.json, and
runs.csv with a row per run), its text and its figures; protocols that it does not have stay as they are recorded. With --gates what
`--tables=gates` found there is, in results/gates/. With --deploy what `experiments.deploy` measured is, in
results/deploy.json. With --anp that of `experiments.anp` is, in results/anp/; with --fewshot the result
of a run of `experiments.fewshot`. All tables of the pages are then written anew; without these options only that is done.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.command import study_command
from experiments.reports.readme import record, record_anp, record_deploy, record_fewshot, record_gates, write_pages

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.summarize", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--tables", type=Path, help="workdir of experiments.tables whose report is to be recorded")
  parser.add_argument("--gates", type=Path, help="workdir of experiments.tables --tables=gates whose numbers are to be recorded")
  parser.add_argument(
    "--deploy",
    type=lambda text: list(map(Path, text.split(","))),
    default=[],
    help="runs, separated by commas, of which experiments.deploy has made files",
  )
  parser.add_argument("--anp", type=Path, help="workdir of experiments.anp whose report is to be recorded")
  parser.add_argument("--fewshot", type=Path, help="workdir of experiments.fewshot whose result is to be recorded")
  options = parser.parse_args(arguments)

  def body():
    for add, workdir in ((record, options.tables), (record_gates, options.gates), (record_anp, options.anp), (record_fewshot, options.fewshot)):
      if workdir:
        add(workdir, _ROOT / "results")
    for workdir in options.deploy:
      record_deploy(workdir, _ROOT / "results")
    write_pages(_ROOT)

  study_command("experiments.summarize", body)


if __name__ == "__main__":
  main()

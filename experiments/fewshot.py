"""`python -m experiments.fewshot --config=configs/cifarfs_maml.py`: meta-training on few-shot episodes, pruned while it trains or
not, and accuracy on episodes of classes that it never saw.

Fields are overridden with --config.field=value, as --config.prune.score=anp --config.prune.sparsity=0.85.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.command import launch
from experiments.config.fewshot import base_config
from experiments.reports.run import report_fewshot
from experiments.runs import fewshot
from experiments.runs.placement import use_cores

__all__ = ["main", "run"]


def run(config: ConfigDict, workdir: str | Path, splits: fewshot.Splits | None = None, quiet: bool = False) -> dict[str, Any]:
  """Meta-trains, evaluates on test episodes, records everything in `workdir` and draws its figure; what `result.json` holds. Arguments and errors
  are those of `experiments.runs.fewshot.run`; `quiet` leaves out the progress line and the table."""
  result = fewshot.run(config, workdir, splits, quiet)
  text = report_fewshot(workdir)
  if not quiet:
    print(text)
  return result


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""

  def body(config, workdir, options):
    del options
    use_cores(config)
    run(config, workdir)

  launch("experiments.fewshot", "cifarfs_maml", base_config(), body, arguments)


if __name__ == "__main__":
  main()

"""`python -m experiments.sparsity_curve --run=runs/mine`: accuracy against sparsity of one meta-model, by each of the knobs.

Several runs (seeds) of one config, separated by commas, become a mean. See `experiments.studies.sparsity_curve`.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments.command import study_command, words
from experiments.reports.run import plot_sparsity_curve
from experiments.runs.records import make_folder, read_config, write_json
from experiments.studies.sparsity_curve import curve_of_run
from metagater_jax.personalize import SPARSITY_BY

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.sparsity_curve", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--run", type=words, required=True, help="workdirs of gated runs of one config, separated by commas")
  parser.add_argument(
    "--sparsities",
    type=lambda text: list(map(float, text.split(","))),
    default=[i / 10 for i in range(9)],
    help="wanted mean sparsities; default: 0 to 0.8",
  )
  parser.add_argument("--by", type=words, default=list(SPARSITY_BY), help="how they are reached; default: in each way")
  parser.add_argument("--data_dir", help="where the data is, if not where the runs found it")
  parser.add_argument("--out", type=Path, default=Path("sparsity_curve"), help="files to write: OUT.json and OUT.png")
  options = parser.parse_args(arguments)

  def body():
    make_folder(options.out.parent, "out")
    curves = [curve_of_run(run, options.sparsities, options.data_dir, partial(print, flush=True), by=by) for by in options.by for run in options.run]
    write_json(options.out.with_suffix(".json"), curves)
    title = f"{read_config(options.run[0])['name']}: {len(options.run)} seed{'s' if len(options.run) > 1 else ''}"
    plot_sparsity_curve(options.out.with_suffix(".png"), curves, title)
    print(f"{options.out.with_suffix('.json')}, {options.out.with_suffix('.png')}")

  study_command("experiments.sparsity_curve", body)


if __name__ == "__main__":
  main()

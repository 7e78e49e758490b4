"""`python -m experiments.channel_pruning`: whole filters of few-shot networks pruned to a share of their work, by each way of choosing them.

What is run, and how it is recorded and resumed, is in `experiments.studies.channel_pruning`.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments.command import study_command, words
from experiments.config import ConfigError
from experiments.reports.channel_pruning import accuracy_table, device_table, draw, summarized
from experiments.runs.records import write_json
from experiments.studies.channel_pruning import CASES, LEVELS, WAYS, reproduce
from experiments.studies.study import parse_seeds
from metagater_jax.deploy.signature import needs

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.channel_pruning", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--cases", type=words, default=list(CASES), help=f"of {', '.join(CASES)}")
  parser.add_argument("--ways", type=words, default=list(WAYS), help=f"of {', '.join(WAYS)}")
  parser.add_argument(
    "--levels",
    type=lambda text: [float(level) for level in text.split(",")],
    default=list(LEVELS),
    help="fractions of the multiply-accumulates that go",
  )
  parser.add_argument("--seeds", default="8-9", help="3, 1-3 or 1,4-6; default: 8-9")
  parser.add_argument("--steps", type=int, help="of meta-training before pruning; default: the case's own")
  parser.add_argument("--level_steps", type=int, help="of meta-training at each level; default: the case's own")
  parser.add_argument("--workdir", default="runs/channel_pruning", help="where runs are recorded")
  parser.add_argument("--data_dir", help="where CIFAR-100 is; default: TFDS's own directory")
  parser.add_argument("--out", type=Path, help="a folder for the report, results/channel_pruning for the tables in docs/")
  options = parser.parse_args(arguments)

  def body():
    try:
      for package in ("litert_converter", "ai_edge_litert", "onnx", "onnxruntime"):
        needs(package)
    except ImportError as error:
      raise ConfigError(str(error)) from error
    found = reproduce(
      options.workdir,
      cases=options.cases,
      ways=options.ways,
      levels=options.levels,
      seeds=parse_seeds(options.seeds),
      steps=options.steps,
      level_steps=options.level_steps,
      data_dir=options.data_dir,
      log=partial(print, flush=True),
    )
    report = summarized(found)
    folder = options.out or Path(options.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "channel_pruning.json", report)
    draw(report, folder / "channel_pruning.png")
    print(f"{accuracy_table(report)}\n\n{device_table(report)}\n\n{folder / 'channel_pruning.png'}")

  study_command("experiments.channel_pruning", body)


if __name__ == "__main__":
  main()

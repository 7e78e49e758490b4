"""`python -m experiments.deploy --workdir=RUN --task=17 --format=tflite,onnx`: adapted networks of a run as files for devices.

It adapts, cuts out the channels that the task does not use, exports, verifies each file against JAX on the task's test data, and times dense and
compact files by turns on one thread. See `experiments.runs.deploy`.
"""

import argparse
from collections.abc import Sequence
from functools import partial

from experiments.command import numbers, study_command, words
from experiments.reports.deploy import report_deploy
from experiments.runs.deploy import FORMATS, deploy_run

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.deploy", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--workdir", required=True, help="of a finished run with gates, or whose personalizer removes channels")
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument("--task", type=numbers, help="target tasks by number, separated by commas")
  which.add_argument("--all", action="store_true", help="every target task")
  parser.add_argument("--format", type=words, default=["tflite", "onnx"], help=f"some of {', '.join(FORMATS)}; default: tflite,onnx")
  parser.add_argument("--threshold", type=float, default=0.0, help="cut channels that are on for no more than this part of a task's data; default: 0")
  parser.add_argument("--always_on", action="store_true", help="what is kept is always on: no gates in the files")
  parser.add_argument("--multiple", type=int, default=8, help="numbers of channels are rounded up to multiples of this; default: 8")
  parser.add_argument("--batches", type=numbers, default=[1, 32], help="images at a time: files are of the first, all are timed; default: 1,32")
  parser.add_argument("--repeats", type=int, default=200, help="of each measurement; default: 200")
  parser.add_argument("--samples", type=int, default=64, help="that the file which adapts takes; default: 64; 0: no such file")
  parser.add_argument("--page", action="store_true", help="a web page for each task, in which it adapts (LiteRT.js; see docs/device.md)")
  parser.add_argument(
    "--dense", help="a finished run of the same tasks without gates to compare with; default: the same meta-model with all channels"
  )
  parser.add_argument("--data_dir", help="where the data is, if not where the run found it")
  options = parser.parse_args(arguments)

  def body():
    deploy_run(
      options.workdir,
      options.task,
      formats=options.format,
      threshold=options.threshold,
      always_on=options.always_on,
      multiple=options.multiple,
      batches=options.batches,
      repeats=options.repeats,
      samples=options.samples,
      page=options.page,
      dense=options.dense,
      data_dir=options.data_dir,
      log=partial(print, flush=True),
    )
    print(report_deploy(options.workdir))

  study_command("experiments.deploy", body)


if __name__ == "__main__":
  main()

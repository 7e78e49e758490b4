"""Where a run's numbers go, and what a person sees of it on a terminal, in a notebook and in a log file."""

import io
import sys
import types

import pytest
from commands import call

from configs import digits
from experiments.config import ConfigError
from experiments.run import main, run
from experiments.runs import live
from experiments.runs.programs import Clock


def quick(**fields):
  c = digits.get_config()
  c.update(rounds=4, eval_every=2, widths=(4, 4, 8), tuned=None, **fields)
  return c


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def progress(monkeypatch):
  """A view of ten rounds, after four of them, as a stream of this kind has it."""

  def shown(stream):
    monkeypatch.setattr(sys, "stderr", stream)
    bar = live.Progress(10, False, "round", Clock("compile"), "digits")
    for _ in range(2):
      bar.show(loss=0.25, accuracy_before=0.5, accuracy=0.875, sparsity=None)
      bar.advance(2, True)
    bar.close()
    return stream.getvalue()

  return shown


def test_a_terminal_has_one_view_that_is_drawn_anew(progress):
  text = progress(Terminal())
  assert "round 4/10" in text and "accuracy before" in text and "0.875" in text and "\x1b[" in text and "sparsity" not in text


def test_a_log_file_has_a_line_per_evaluation(progress):
  lines = progress(io.StringIO()).splitlines()
  assert len(lines) == 2 and lines[1].startswith("round 4/10, loss=0.250, accuracy_before=0.500, accuracy=0.875 | ")


def test_a_notebook_has_one_line_that_is_rewritten(progress, monkeypatch):
  monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
  text = progress(io.StringIO())
  assert text.count("\n") == 1 and text.count("\r") >= 2


@pytest.mark.slow
def test_a_writer_of_one_s_own_gets_every_row_and_may_fail(tmp_path, monkeypatch, capsys):
  got = []

  class Mine:
    def __init__(self, workdir, config):
      got.append((workdir, config.name))

    def write(self, row):
      got.append(row["round"])
      if row["round"] == 4:
        raise ConnectionError("the service is away")

    def close(self):
      got.append("closed")

  monkeypatch.setitem(live.WRITERS, "mine", Mine)
  result = run(quick(log="mine"), tmp_path / "run", quiet=True)
  assert got == [(tmp_path / "run", "digits"), 2, 4]  # it failed in its last row, and is left out
  assert result["rounds"] == 4 and len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3
  assert "log=mine failed and is left out (ConnectionError: the service is away)" in capsys.readouterr().err


def test_tensorboard_has_the_numbers_of_the_metrics(tmp_path):
  event_file = pytest.importorskip("tensorboardX.event_file_writer")
  del event_file
  writer = live.TensorBoard(tmp_path, quick())
  writer.write({"round": 3, "accuracy_mean": 0.5, "sparsity_mean": None})
  writer.close()
  (file,) = (tmp_path / "tensorboard").iterdir()
  assert b"accuracy_mean" in file.read_bytes() and b"sparsity_mean" not in file.read_bytes()


def test_bad_input_ends_before_the_run(tmp_path, monkeypatch):
  outcome = call(main, "--config.log=tensorbord", f"--workdir={tmp_path / 'run'}")
  assert outcome.status == 2 and "Did you mean 'tensorboard'" in outcome.err and not (tmp_path / "run").exists()
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(ConfigError, match=r"pip install 'metagater_jax\[tensorboard\]'"):
    live.check_log("tensorboard")

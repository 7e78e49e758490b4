"""The command for the paper's tables: what it says to bad input before any long work."""

import pytest
from commands import call

from experiments.tables import main


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--tables=1,7"], "unknown table '7'. Known: 1, 2, 3, 4, 5, 6, har, har_adaptation."),
    (["--seeds=some"], "seeds are written 4, 1-3 or 1,4-6; got 'some'."),
    (["--seeds=3-2"], "got '3-2'."),
    (["--tables=anp"], "made by `python -m experiments.anp`"),
    (["--rounds=0"], "rounds must be at least 1, got 0."),
    (["--protocols=cifar11"], "Did you mean 'cifar10"),
    (["--tables=1", "--data_dir=tests"], "'mnist' is not in the data directory tests"),
  ],
)
def test_bad_input_ends_the_command_with_one_clear_line(arguments, message, tmp_path):
  outcome = call(main, f"--workdir={tmp_path / 'w'}", *arguments)
  assert outcome.status == 2 and outcome.out == ""
  assert outcome.err.startswith("experiments.tables: ") and message in outcome.err
  assert not (tmp_path / "w").exists()

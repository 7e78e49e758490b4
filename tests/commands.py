"""Commands called as functions, where no process of their own is what is tested."""

import contextlib
import io
from typing import NamedTuple


class Outcome(NamedTuple):
  """What a command left: its exit status, and what it printed."""

  status: int
  out: str
  err: str


def call(main, *arguments):
  """A command's `main` with these arguments."""
  out, err, status = io.StringIO(), io.StringIO(), 0
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      main(list(map(str, arguments)))
    except SystemExit as stop:
      status = stop.code or 0
  return Outcome(status, out.getvalue(), err.getvalue())

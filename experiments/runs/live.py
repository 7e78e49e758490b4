"""What a person sees while a run goes on, and where its numbers go: one small interface for both."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from experiments.config import ConfigError
from experiments.config.fields import check_known
from experiments.runs.programs import Clock
from experiments.runs.records import MetricsWriter

__all__ = ["WRITERS", "Progress", "TensorBoard", "Writer", "Writers", "check_log", "writer_names"]


class Progress:
  """Rounds (or steps), loss, accuracy before and after adaptation, sparsity, rate and time left, on standard error.

  A view that is drawn anew on a terminal, one line that is rewritten in a notebook, and elsewhere (a log file) a line per evaluation. The seconds
  that the clock has for compilation count for neither rate nor time left: a run of a few seconds would seem to last as long as its compilation.

  Args:
    total: rounds or steps.
    quiet: show nothing.
    unit: what one is called.
    clock: of the run; its phase "compile" is read.
    title: above the view on a terminal.
  """

  def __init__(self, total: int, quiet: bool, unit: str, clock: Clock, title: str = ""):
    self._total, self._unit, self._title, self._clock, self._quiet = total, unit, title, clock, quiet
    self._start, self._compiled_before = time.perf_counter(), clock.seconds["compile"]
    self._done, self._values = 0, {}
    self._live, self._notebook = None, not quiet and "ipykernel" in sys.modules
    if not quiet and not self._notebook and sys.stderr.isatty():
      self._live = Live(self._view(), console=Console(stderr=True), refresh_per_second=4, transient=False)
      self._live.start()

  def show(self, **values: float | None) -> None:
    """Values to be shown from now on; None leaves one out."""
    self._values |= {name: float(value) for name, value in values.items() if value is not None}
    self._draw()

  def advance(self, count: int, evaluated: bool) -> None:
    """So many more are done; with an evaluation a log file gets its line."""
    self._done += count
    if evaluated and not self._quiet and self._live is None and not self._notebook:
      print(self.line(), file=sys.stderr, flush=True)
    self._draw()

  def close(self) -> None:
    """Ends the view."""
    if self._live is not None:
      self._live.update(self._view(), refresh=True)
      self._live.stop()
      self._live = None
    elif self._notebook:
      print(file=sys.stderr, flush=True)

  def line(self) -> str:
    """All of it in one line."""
    values = ", ".join(f"{name}={value:.3f}" for name, value in self._values.items())
    return f"{self._unit} {self._done}/{self._total}{', ' if values else ''}{values} | {self._pace()}"

  def _pace(self):
    seconds = time.perf_counter() - self._start - (self._clock.seconds["compile"] - self._compiled_before)
    if not self._done or seconds <= 0:
      return "compiling"
    rate = self._done / seconds
    left = round((self._total - self._done) / rate)
    hours, minutes = divmod(left // 60, 60)
    return f"{rate:.2f} {self._unit}s/s | {f'{hours}:' if hours else ''}{minutes:02d}:{left % 60:02d} left"

  def _draw(self):
    if self._live is not None:
      self._live.update(self._view())
    elif self._notebook:
      print(f"\r{self.line()}", end="    ", file=sys.stderr, flush=True)

  def _view(self):
    head = Table.grid(padding=(0, 1))
    head.add_row(
      Text(f"{self._unit} {self._done}/{self._total}", style="bold"),
      ProgressBar(total=max(1, self._total), completed=self._done, width=32),
      Text(self._pace().replace(" | ", ", "), style="dim"),
    )
    rows = Table.grid(padding=(0, 2))
    if self._values:
      rows.add_row(*(Text(name.replace("_", " "), style="dim") for name in self._values))
      rows.add_row(*(Text(f"{value:.3f}", style="bold cyan" if name == "accuracy" else "") for name, value in self._values.items()))
    return Group(*([Text(self._title)] if self._title else []), head, rows)


class Writer(Protocol):
  """Where the numbers of a run go; anything with these two methods."""

  def write(self, row: Mapping[str, Any]) -> None:
    """A row per evaluation, with "round" or "step" and numbers (None: there is none)."""

  def close(self) -> None:
    """After the last row."""


class TensorBoard:
  """Numbers as scalars for TensorBoard, in the workdir; `tensorboard --logdir=WORKDIR` shows them."""

  packages = ("tensorboardX",)

  def __init__(self, workdir: Path, config: ConfigDict):
    from tensorboardX import SummaryWriter

    del config
    self._writer = SummaryWriter(str(workdir / "tensorboard"))

  def write(self, row: Mapping[str, Any]) -> None:
    """One scalar per number."""
    at = row.get("round", row.get("step"))
    for name, value in row.items():
      if name not in ("round", "step") and isinstance(value, int | float):
        self._writer.add_scalar(name, value, at)
    self._writer.flush()

  def close(self) -> None:
    """Ends the file."""
    self._writer.close()


# By name, as `--config.log=tensorboard` says it: (workdir, config) -> Writer. A config file may add its own, see docs/extending.md.
WRITERS: dict[str, Callable[[Path, ConfigDict], Writer]] = {"tensorboard": TensorBoard}


def writer_names(log: str) -> list[str]:
  """The writers that a config's `log` names."""
  return [name.strip() for name in log.split(",") if name.strip() not in ("", "none")]


def check_log(log: str) -> None:
  """Raises a ConfigError for a writer that is not known, or whose packages are missing."""
  for name in writer_names(log):
    check_known("log", name, ("none", *WRITERS))
    for package in getattr(WRITERS[name], "packages", ()):
      try:
        __import__(package)
      except ImportError as error:
        raise ConfigError(f"log={name} needs the package {package}: pip install 'metagater_jax[{name}]'.") from error


class Writers:
  """CSV and JSONL always (`MetricsWriter`), and what `config.log` names. One of these that fails says so once and is left out: a run does not end
  because a service is away."""

  def __init__(self, workdir: Path, config: ConfigDict):
    self._files, self._workdir, self._others = MetricsWriter(workdir), workdir, {}
    for name in writer_names(config.log):
      self._attempt(name, lambda name=name: self._others.__setitem__(name, WRITERS[name](workdir, config)))

  def write(self, row: Mapping[str, Any]) -> None:
    """To all of them."""
    self._files.write(dict(row))
    for name, writer in list(self._others.items()):
      self._attempt(name, lambda writer=writer: writer.write(row))

  def close(self) -> None:
    """All of them."""
    for name, writer in list(self._others.items()):
      self._attempt(name, writer.close)

  def _attempt(self, name: str, action: Callable[[], Any]) -> None:
    try:
      action()
    except Exception as error:
      self._others.pop(name, None)
      print(
        f"log={name} failed and is left out ({type(error).__name__}: {error}); metrics.csv in {self._workdir} has everything.",
        file=sys.stderr,
        flush=True,
      )

"""Studies: many runs that are planned, checked against what is recorded, carried out as far as they are missing, and recorded.

A study says what its parts are and how they run; this module is the only loop that does so. A finished part leaves a record that holds
its config, so that an interrupted study goes on where it stopped, and a workdir of another configuration is refused before anything runs.
"""

import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.config.fields import FREE, ConfigError, check_same, check_seed
from experiments.runs.records import read_config, write_json

__all__ = ["Part", "carry_out", "check_rounds", "check_seeds", "parse_seeds", "settings_of"]


class Part(NamedTuple):
  """A part of a study that is recorded on its own.

  Attributes:
    record: the file that says that it is finished; `result.json` in a folder of the part's own, or a file that holds its "config".
    config: checked; with `more` what its numbers depend on.
    more: values beside the config that they depend on.
    seed: of the run.
    complete: whether a record lacks nothing.
  """

  record: Path
  config: ConfigDict
  more: Mapping[str, Any] = {}
  seed: int = 0
  complete: Callable[[Path], bool] = Path.is_file

  @property
  def finished(self) -> bool:
    """Whether it is recorded and complete."""
    return self.complete(self.record)


def settings_of(part: Part) -> dict[str, Any]:
  """What a part's numbers depend on, as JSON has it."""
  fields = json.loads(part.config.to_json_best_effort()) | json.loads(json.dumps(dict(part.more)))
  return {name: value for name, value in fields.items() if name not in FREE}


def carry_out(
  groups: Mapping[str, Sequence[Part]],
  run: Callable[[str, list[Part]], Mapping[Path, Any]],
  *,
  defaults: ConfigDict | None = None,
  line: Callable[[str, Mapping[Path, Any], float], str] | None = None,
  log: Callable[[str], None] = print,
  keep_going: bool = False,
) -> None:
  """Runs what is not recorded.

  Args:
    groups: parts by name of what runs together, in the order in which they run.
    run: `(name, missing parts) -> ` by record what came of each part: its result, or an exception. It writes the records.
    defaults: a config with the values of fields that are newer than a record.
    line: `(name, outcomes, seconds) -> ` what `log` gets when a group ends.
    log: gets a line per group.
    keep_going: record a part that fails as failed (`failure.json` in its folder) and go on; the next call tries it again.

  Raises:
    ConfigError: before anything runs: a record of another configuration.
  """
  for parts in groups.values():
    for part in parts:
      if part.record.is_file():
        _check_record(part, defaults)
  for name, parts in groups.items():
    missing = [part for part in parts if not part.finished]
    if not missing:
      continue
    for part in missing:
      if part.record.name == "result.json":
        shutil.rmtree(part.record.parent, ignore_errors=True)  # what an interrupted or failed call left
    start = time.perf_counter()
    try:
      outcomes = run(name, missing)
    except Exception as error:
      if not keep_going:
        raise
      log(traceback.format_exc())
      outcomes = {part.record: error for part in missing if not part.finished}
    for record, outcome in outcomes.items():
      if isinstance(outcome, Exception):
        if not keep_going:
          raise outcome
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record.parent / "failure.json", {"error": f"{type(outcome).__name__}: {outcome}"})
    if line is not None:
      log(line(name, outcomes, time.perf_counter() - start))


def _check_record(part, defaults):
  own = part.record.name == "result.json"
  held = read_config(part.record.parent) if own else json.loads(part.record.read_text(encoding="utf-8"))["config"]
  if defaults is not None:
    held = json.loads(defaults.to_json_best_effort()) | held  # a field that is newer than the run had its default
  where = part.record.parent if own else part.record
  check_same(where, {name: value for name, value in held.items() if name not in FREE}, settings_of(part))


def parse_seeds(text: str) -> tuple[int, ...]:
  """Seeds as all commands write them: "1-3" (1 to 3), "4" (this one), "1,4-6" (these).

  Raises:
    ConfigError: something else.

  >>> parse_seeds("1-3,7")
  (1, 2, 3, 7)
  """
  seeds: list[int] = []
  for part in text.split(","):
    first, dash, last = part.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
      raise ConfigError(f"seeds are written 4, 1-3 or 1,4-6; got '{text}'.")
    check_seed(int(last or first))
    seeds += range(int(first), int(last or first) + 1)
  return tuple(dict.fromkeys(seeds))


def check_rounds(rounds: int | None) -> None:
  """Raises a ConfigError for a number of rounds, in the place of the configs', that is none."""
  if rounds is not None and rounds < 1:
    raise ConfigError(f"rounds must be at least 1, got {rounds}.")


def check_seeds(seeds: Iterable[int]) -> None:
  """Raises a ConfigError if there are none."""
  if not list(seeds):
    raise ConfigError("there must be at least one seed.")

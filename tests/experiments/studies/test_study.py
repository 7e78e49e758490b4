"""The loop of all studies: what is recorded is not run again, other configurations are refused, failures are kept or raised."""

import json

import pytest
from ml_collections import ConfigDict

from experiments.config import ConfigError
from experiments.runs.records import write_json
from experiments.studies.study import Part, carry_out, parse_seeds


def part(folder, name, more=(), **fields):
  return Part(folder / name / "result.json", ConfigDict({"rounds": 3, "data_dir": "here"} | fields), dict(more))


def record(part):
  part.record.parent.mkdir(parents=True)
  write_json(part.record.parent / "config.json", json.loads(part.config.to_json()) | dict(part.more))
  write_json(part.record, {"accuracy": 0.5})
  return 0.5


def test_only_what_is_missing_runs_and_in_its_group(tmp_path):
  parts = {name: [part(tmp_path, f"{name}{i}") for i in range(2)] for name in "ab"}
  record(parts["a"][1])
  left = parts["b"][0].record.parent
  left.mkdir()
  (left / "metrics.jsonl").write_text("half a run")
  ran, lines = [], []

  def run(name, missing):
    ran.append((name, [p.record.parent.name for p in missing]))
    assert not left.exists() or name == "a"  # what an interrupted call left is gone before its part runs again
    return {p.record: record(p) for p in missing}

  line = lambda name, outcomes, seconds: f"{name}: {len(outcomes)}"
  carry_out(parts, run, line=line, log=lines.append)
  assert ran == [("a", ["a0"]), ("b", ["b0", "b1"])] and lines == ["a: 1", "b: 2"]
  carry_out(parts, run, line=line, log=lines.append)
  assert len(ran) == 2


def test_another_configuration_is_refused_before_anything_runs(tmp_path):
  record(part(tmp_path, "b"))
  run = lambda name, missing: pytest.fail("nothing may run")
  with pytest.raises(ConfigError, match="b holds a run of another configuration: rounds is 3 there and 4 here"):
    carry_out({"a": [part(tmp_path, "a", rounds=4)], "b": [part(tmp_path, "b", rounds=4)]}, run)
  with pytest.raises(ConfigError, match="levels is None there and .1. here"):
    carry_out({"b": [part(tmp_path, "b", {"levels": (1,)})]}, run)
  carry_out({"b": [part(tmp_path, "b", data_dir="elsewhere")]}, run)  # where the data is changes no number
  with pytest.raises(ConfigError, match="newer is None there and 1 here"):
    carry_out({"b": [part(tmp_path, "b", newer=1)]}, run)
  carry_out({"b": [part(tmp_path, "b", newer=1)]}, run, defaults=ConfigDict({"newer": 1}))  # the record is older than the field


@pytest.mark.parametrize("raised", [True, False])
def test_failures(tmp_path, raised):
  """A run that raises fails the group, one that gives an exception fails alone; with `keep_going` both are recorded and tried again."""
  parts = {"a": [part(tmp_path, "a0"), part(tmp_path, "a1")], "b": [part(tmp_path, "b0")]}
  tries = []

  def run(name, missing):
    tries.append(name)
    if name == "b":
      return {missing[0].record: record(missing[0])}
    if raised:
      raise ArithmeticError("the loss is nan")
    return {missing[0].record: ArithmeticError("the loss is nan")} | {p.record: record(p) for p in missing[1:]}

  with pytest.raises(ArithmeticError):
    carry_out(parts, run)
  assert tries == ["a"]
  carry_out(parts, run, keep_going=True, log=lambda line: None)
  assert tries == ["a", "a", "b"]
  failure = json.loads((tmp_path / "a0" / "failure.json").read_text())
  assert failure == {"error": "ArithmeticError: the loss is nan"} and parts["b"][0].finished
  carry_out(parts, run, keep_going=True, log=lambda line: None)
  assert tries == ["a", "a", "b", "a"]  # tried again, and only what failed


@pytest.mark.parametrize("text, seeds", [("4", (4,)), ("1-3", (1, 2, 3)), ("1,4-6", (1, 4, 5, 6)), ("2,2-3", (2, 3)), ("0", (0,))])
def test_seeds_are_written_in_one_way(text, seeds):
  assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1,,2", "1.5"])
def test_what_are_no_seeds(text):
  with pytest.raises(ConfigError, match="seeds are written 4, 1-3 or 1,4-6"):
    parse_seeds(text)

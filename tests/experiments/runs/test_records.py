"""What runs write, where they may write it, and what is left when they cannot."""

import errno
import json
import os
import platform
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import metagater_jax as mg
from configs import digits
from experiments.config import ConfigError
from experiments.config.federated import check_config
from experiments.runs import live, records
from experiments.runs.live import Progress
from experiments.runs.programs import Clock


def test_rate_and_time_left_are_without_compilation(monkeypatch, capsys):
  now = [1000.0]
  monkeypatch.setattr(live.time, "perf_counter", lambda: now[0])
  clock = Clock("compile")
  clock.seconds["compile"] = 5.0  # before the first step
  progress = Progress(100, False, "step", clock)
  for seconds, compiled in ((30, 20), (10, 0)):  # ten for 40 steps each, beside compilation
    now[0] += seconds
    clock.seconds["compile"] += compiled
    progress.advance(40, True)
  progress.close()
  first, second = capsys.readouterr().err.splitlines()
  assert "step 40/100 | 4.00 steps/s | 00:15 left" in first
  assert "step 80/100 | 4.00 steps/s | 00:05 left" in second


@pytest.fixture
def model():
  return mg.Model({"backbone": {"layer": {"kernel": np.arange(6.0).reshape(2, 3)}}, "gate": {}})


def failing(monkeypatch, name, folders):
  """`records.name` fails as on a full disk, in these folders."""
  plain = getattr(records, name)

  def call(path, *arguments, **options):
    if any(folder in (path, *Path(path).parents) for folder in folders):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return plain(path, *arguments, **options)

  monkeypatch.setattr(records, name, call)


@pytest.mark.parametrize("what", ["save_model", "write_json"])
def test_a_full_disk_at_the_end_loses_nothing(tmp_path, monkeypatch, model, what):
  work = tmp_path / "work"
  work.mkdir()
  failing(monkeypatch, what, [work])
  with pytest.raises(records.NotSavedError, match=f"the run has ended, but {work} cannot be written .No space left") as caught:
    records.save_run(work, model, {"accuracy": 1}, threshold=0.5)
  elsewhere = Path(re.search(r"result are in (.*)\.$", str(caught.value))[1])
  found, scalars = records.load_model(elsewhere)
  np.testing.assert_array_equal(found.params["backbone"]["layer"]["kernel"], model.params["backbone"]["layer"]["kernel"])
  assert scalars["threshold"] == 0.5 and records.read_result(elsewhere) == {"accuracy": 1}
  assert not (work / "result.json").exists()
  shutil.rmtree(elsewhere)


def test_metrics_wait_for_a_disk_that_is_full(tmp_path, monkeypatch, capsys):
  writer = records.MetricsWriter(tmp_path)
  writer.write({"round": 1})
  with monkeypatch.context() as full:
    full.setattr(records.MetricsWriter, "_append_csv", lambda self, row: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    writer.write({"round": 2})
    assert "cannot be written (No space left); the run goes on" in capsys.readouterr().err
  writer.write({"round": 3})
  assert [row["round"] for row in records.read_metrics(tmp_path)] == [1, 2, 3]  # the file that could be written has no row twice
  assert (tmp_path / "metrics.csv").read_text().split() == ["round", "1", "2", "3"]


def test_half_a_file_is_none(tmp_path, monkeypatch, model):
  monkeypatch.setattr(np, "savez", lambda path, **arrays: (Path(path).write_bytes(b"half"), (_ for _ in ()).throw(OSError(28, "full"))))
  with pytest.raises(OSError):
    records.save_model(tmp_path, model)
  assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_starts_anew_and_another_does_not(tmp_path):
  config = check_config(digits.get_config())
  work = tmp_path / "work"
  records.check_workdir(work, config)
  records.write_json(work / "config.json", json.loads(config.to_json_best_effort()))
  records.MetricsWriter(work).write({"round": 1})
  records.check_workdir(work, config)  # the same configuration
  assert list(work.iterdir()) == []
  records.write_json(work / "config.json", json.loads(config.to_json_best_effort()))
  other = config.copy_and_resolve_references()
  other.rounds = 7
  with pytest.raises(ConfigError, match="another configuration: rounds is 60 there and 7 here"):
    records.check_workdir(work, other)
  with records.claim(work):  # by a process that lives: here its parent's number stands for another's
    records.write_json(work / "running.json", {"process": os.getppid(), "host": platform.node()})
    with pytest.raises(ConfigError, match=f"process {os.getppid()} on .* is writing into the workdir"):
      records.check_workdir(work, config)
  records.check_workdir(work, config)
  with records.claim(tmp_path / "work"):
    pass
  assert not work.exists()  # nothing was written, so nothing is left


def test_folders_that_cannot_be_written_are_named(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  for path, message in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "below", "cannot be written .Not a directory")):
    with pytest.raises(ConfigError, match=message):
      records.check_workdir(path)
  monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
  with pytest.raises(ConfigError, match="cannot be written .Permission denied.*--workdir"):
    records.check_workdir(tmp_path / "new")


def test_what_older_gates_were_is_read_from_their_records(tmp_path):
  """Fields that are newer than a run have the value that says what it did, not today's default."""
  old = {"gated": True, "gate_hidden": 16, "gate_initial_log_odds": 2.0, "gate_logit_scale": 0.1}
  for folder, config in (("old", old), ("plain", old | {"gated": False}), ("new", old | {"gate_normalize": True, "sparsity_by": "budget"})):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text(json.dumps(config))
  read = lambda folder: records.read_config(tmp_path / folder)
  assert read("old") == old | {"gate_normalize": False, "sparsity_by": "group_norm"}
  assert "gate_normalize" not in read("plain") and (read("new")["gate_normalize"], read("new")["sparsity_by"]) == (True, "budget")

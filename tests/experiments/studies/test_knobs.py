"""One setting at a time: what is run, compared and recorded, on made-up people."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from commands import call

from experiments import knobs as command
from experiments.config import ConfigError
from experiments.reports.knobs import draw, ranges_table, values_table
from experiments.runs.records import DivergedError, write_json
from experiments.studies import knobs

DATASET = SimpleNamespace()


@pytest.fixture
def runs(monkeypatch):
  """Runs that are not run: an accuracy that falls by a point per doubling of the local rate, and diverges at the highest."""
  asked = []

  def run_seeds(config, workdirs, dataset, quiet):
    assert dataset is DATASET
    found = {}
    for seed, folder in workdirs.items():
      asked.append((folder.parent.name, seed))
      tuned = 0.145
      doublings = np.log2(config.local_lr / tuned)
      if doublings > 2.9 and seed == 62:
        found[seed] = DivergedError("not finite")
        continue
      result = {
        "accuracy": {"mean": 0.9 - 0.01 * abs(doublings) - 0.1 * (config.target_sparsity or 0) + 0.001 * seed},
        "sparsity": {"mean": config.target_sparsity or 0.3},
      }
      folder.mkdir(parents=True)
      write_json(folder / "result.json", result)
      write_json(folder / "config.json", json.loads(config.to_json_best_effort()) | {"seed": seed})
      found[seed] = result
    return found

  monkeypatch.setattr(knobs, "run_seeds", run_seeds)
  return asked


def reproduce(workdir, **changes):
  return knobs.reproduce(
    workdir, **{"knobs": ("local_lr", "beta", "target_sparsity"), "seeds": (61, 62), "dataset": DATASET, "log": lambda line: None} | changes
  )


def test_each_setting_runs_once_and_what_is_known_not_again(runs, tmp_path):
  found = reproduce(tmp_path)
  assert len(runs) == len(set(runs)) == 2 * (1 + 6 + 6 + 5)  # the tuned values of all knobs are one setting
  rows = {row["factor"]: row for row in found["knobs"]["local_lr"]["rows"]}
  assert list(rows) == [0.125, 0.25, 0.5, 1, 2, 4, 8]
  assert rows[0.5]["value"] == pytest.approx(0.145 / 2) and rows[8]["accuracy"] == {"61": pytest.approx(0.9 - 0.03 + 0.061), "62": None}
  count = len(runs)
  assert reproduce(tmp_path) == found and len(runs) == count  # a seed that diverged would again


def test_tables_have_what_changed(runs, tmp_path):
  found = json.loads(json.dumps(reproduce(tmp_path)))
  values = values_table(found).splitlines()
  row = next(line for line in values if line.startswith("| local rate η | 0.25 ×"))
  assert "| -2.0 (-2.0 … -2.0) | 30.0 ± 0.0 |" in row
  assert next(line for line in values if "| local rate η | 8 ×" in line).endswith("| 1 |")
  assert "| -9.0 (-9.0 … -9.0) | 90.0 ± 0.0 |" in values[-1]
  first, second = ranges_table(found).splitlines()[2:]
  assert first.startswith("| local rate η | 95.2 … 96.2 |") and first.endswith("| 8 × |")
  assert second.startswith("| server's step β | 96.2 … 96.2 | 96.2 … 96.2 |")
  draw(found, tmp_path / "knobs.png")
  assert (tmp_path / "knobs.png").stat().st_size > 10_000


def test_settings_differ_in_the_knob_alone():
  tuned = knobs.check_config(knobs.with_fields(knobs.har.get_config(), gated=True))
  for name, knob in knobs.KNOBS.items():
    own = {knob.field, *knob.scale, *knob.fields}
    for setting in knobs._settings(name, tuned):
      differ = {field for field in tuned if setting.config[field] != tuned[field]}
      assert differ <= own and (differ or setting.folder == "tuned")


def test_a_run_that_fails_otherwise_has_not_diverged(runs, tmp_path, monkeypatch):
  monkeypatch.setattr(knobs, "run_seeds", lambda config, workdirs, dataset, quiet: dict.fromkeys(workdirs, OSError("disk full")))
  with pytest.raises(ConfigError, match="6 of the runs failed and did not diverge; why is in failure.json"):
    reproduce(tmp_path, knobs=("target_sparsity",), seeds=(61,))


def test_bad_input_ends_before_anything_runs(runs, tmp_path):
  for fields, message in (
    ({"knobs": ("betta",)}, "unknown knob 'betta'.*beta"),
    ({"seeds": ()}, "at least one seed"),
    ({"rounds": 0}, "rounds must be"),
  ):
    with pytest.raises(ConfigError, match=message):
      reproduce(tmp_path, **fields)
  outcome = call(command.main, "--seeds=a", f"--workdir={tmp_path}")
  assert outcome.status == 2 and "seeds are written" in outcome.err and not runs

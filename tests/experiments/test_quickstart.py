"""The first command that anybody runs: what it shows is true, and it says so where it cannot make files."""

import json

import numpy as np
import pytest
from commands import call

from experiments import quickstart


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("quickstart")
  return workdir, call(quickstart.main, f"--workdir={workdir}", "--seed=3")


@pytest.mark.slow
def test_the_step_helps_for_less_work(shown):
  workdir, outcome = shown
  assert outcome.status == 0, outcome.err
  found = json.loads((workdir / "seed-3" / "quickstart.json").read_text())
  methods = found["methods"]
  assert all(len(own["before"]) == len(own["after"]) == 10 for own in methods.values())
  for own in methods.values():
    assert np.mean(own["after"]) > np.mean(own["before"])
  assert np.mean(methods["MetaGater"]["after"]) > 0.93
  assert found["asked"] == pytest.approx(1 / 3) and abs(found["sparsity"] - found["asked"]) < 0.05
  # By hand: 8×8 images, 3×3 filters, pooled before conv2 and conv3, and after it; 40 and 88 of 64 and 128 filters are left.
  work = lambda conv2, conv3: 64 * 9 * 32 + 16 * 9 * 32 * conv2 + 4 * 9 * conv2 * conv3 + conv3 * 10
  assert methods["FedAvg"]["macs"] == work(64, 128)
  assert work(40, 88) <= methods["MetaGater"]["macs"] < 1.05 * work(40, 88)
  assert methods["MetaGater"]["bytes"] < 0.7 * methods["FedAvg"]["bytes"]
  assert "33 % of their filters off (33 % asked)" in outcome.out and (workdir / "seed-3" / "quickstart.png").stat().st_size > 10_000


@pytest.mark.slow
def test_without_what_makes_files_it_shows_the_rest(monkeypatch, tmp_path):
  def missing(package):
    raise ImportError(f"{package} is missing: pip install 'metagater_jax[deploy]'")

  monkeypatch.setattr(quickstart, "needs", missing)
  monkeypatch.setattr(quickstart, "_SHARED", quickstart._SHARED | {"rounds": 2, "eval_every": 2, "widths": (8, 64, 128)})
  outcome = call(quickstart.main, f"--workdir={tmp_path}")
  assert outcome.status == 0 and "No files are made: litert_converter is missing" in outcome.out and "bytes" not in outcome.out


@pytest.mark.slow
def test_over_seeds_it_is_one_seed_each_time(monkeypatch, tmp_path):
  monkeypatch.setattr(quickstart, "_SHARED", quickstart._SHARED | {"rounds": 4, "eval_every": 4, "widths": (8, 64, 128)})
  monkeypatch.setattr(quickstart, "_PACKAGES", ("no_such_package",))
  outcome = call(quickstart.main, f"--workdir={tmp_path / 'runs'}", "--seeds=3-4", f"--out={tmp_path / 'results' / 'quickstart.json'}")
  assert outcome.status == 0, outcome.err
  found = json.loads((tmp_path / "results" / "quickstart.json").read_text())
  alone = quickstart.quickstart(tmp_path / "alone", seed=4, log=lambda line: None)
  for name, own in alone["methods"].items():
    assert [found["methods"][name][when]["4"] for when in ("before", "after")] == pytest.approx(
      [np.mean(own["before"]), np.mean(own["after"])], abs=1e-6
    )
  gains = {seed: 100 * (found["methods"]["FedAvg"]["after"][seed] - found["methods"]["FedAvg"]["before"][seed]) for seed in "34"}
  row = next(line for line in outcome.out.splitlines() if line.startswith("| FedAvg"))
  worst = min(gains, key=gains.get)
  assert f"| {sum(gain > 0 for gain in gains.values())} of 2 | {gains[worst]:+.1f} (seed {worst}) |" in row


def test_bad_input(tmp_path):
  outcome = call(quickstart.main, "--out=x.json")
  assert outcome.status == 2 and "--seeds=0-9" in outcome.err
  outcome = call(quickstart.main, "--seed=-1")
  assert outcome.status == 2 and "seed must be" in outcome.err
  (tmp_path / "file").write_text("")
  outcome = call(quickstart.main, f"--workdir={tmp_path / 'file'}")
  assert outcome.status == 2 and "cannot be written" in outcome.err

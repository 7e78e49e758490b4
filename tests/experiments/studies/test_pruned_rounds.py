"""Pruning in rounds by several scores, on the embedded digits: what is run, paired differences, and bad input."""

import json

import pytest

from configs import digits
from experiments.config import ConfigError
from experiments.reports.pruned_rounds import markdown
from experiments.studies import pruned_rounds


def config(**fields):
  found = digits.get_config()
  found.update({"rounds": 4, "tasks": 8, "target_tasks": 3} | fields)
  found.prune.update(score="anp", sparsity=0.8, every=1)
  return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  workdir, lines = tmp_path_factory.mktemp("pruned_rounds"), []
  run = lambda **fields: pruned_rounds.reproduce(
    workdir, scores=("none", "anp", "magnitude"), seeds=(1, 2), config=config(**fields), log=lines.append
  )
  return workdir, run(), lines, run


@pytest.mark.slow
def test_scores_are_compared_seed_by_seed(recorded):
  workdir, report, _, _ = recorded
  accuracy = {
    (score, seed): json.loads((workdir / f"{score}-seed-{seed}" / "result.json").read_text())["accuracy"]["mean"]
    for score in ("none", "anp", "magnitude")
    for seed in (1, 2)
  }
  scores = report["scores"]
  assert scores["magnitude"]["accuracy"] == [accuracy["magnitude", 1], accuracy["magnitude", 2]]
  assert scores["anp"]["differences"]["none"]["mean"] == pytest.approx(
    (accuracy["anp", 1] - accuracy["none", 1] + accuracy["anp", 2] - accuracy["none", 2]) / 2
  )
  assert scores["none"]["pruned"] == 0
  # As many weights are gone by either score, none of them the last layer's.
  assert scores["anp"]["pruned"] == scores["magnitude"]["pruned"] == pytest.approx(0.8, abs=0.005)
  assert scores["anp"]["parameters_kept"] == scores["magnitude"]["parameters_kept"] < scores["none"]["parameters_kept"]
  assert "| ANP |" in markdown(report)


@pytest.mark.slow
def test_what_is_recorded_is_not_run_again(recorded):
  _, report, lines, run = recorded
  before = len(lines)
  assert run() == report and len(lines) == before
  with pytest.raises(ConfigError, match="none-seed-1 holds a run of another configuration: .*rounds is 4 there and 5 here"):
    run(rounds=5)


def test_bad_input(tmp_path):
  for options, message in (({"scores": ("npa",)}, "unknown score 'npa'"), ({"seeds": ()}, "at least one seed")):
    with pytest.raises(ConfigError, match=message):
      pruned_rounds.reproduce(tmp_path / "w", **options)

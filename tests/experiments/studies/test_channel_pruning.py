"""Whole filters on small pools: what is run, recorded and resumed, and what the tables say of it."""

import json

import numpy as np
import pytest
from commands import call
from fewshot_problem import small, small_splits

from experiments import channel_pruning as command
from experiments.config import ConfigError
from experiments.reports.channel_pruning import accuracy_table, device_table, draw, summarized
from experiments.studies import channel_pruning

FIELDS = {
  name: value
  for name, value in small().items()
  if name not in ("steps", "eval_every", "shots", "model", "prune", "data_dir", "seed", "name", "widths")
} | {"widths": (8, 16, 16)}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  workdir, lines = tmp_path_factory.mktemp("channel_pruning"), []
  run = lambda **changes: channel_pruning.reproduce(
    workdir,
    **{
      "cases": ("conv4",),
      "ways": ("none", "narrow", "anp", "anp_layer"),
      "seeds": (1,),
      "levels": (0.3, 0.5),
      "steps": 8,
      "level_steps": 4,
      "splits": small_splits(),
      "fields": FIELDS,
      "log": lines.append,
    }
    | changes,
  )
  return run(), lines, run, workdir


@pytest.mark.slow
def test_every_way_has_the_work_that_was_asked_for(recorded):
  found, lines, run, _ = recorded
  ways = {way: own["1"] for way, own in found["cases"]["conv4"]["ways"].items()}
  dense = ways["base"]["dense_macs"]
  for way, share in (("narrow", 0.0), ("anp", 0.0), ("anp_layer", 0.0)):
    for level, own in zip((0.3, 0.5), ways[way]["levels"]):
      assert own["macs"] <= (1 - level + share) * dense * 1.001
  assert all(own["macs"] == dense for own in ways["none"]["levels"])
  assert all(count % 8 == 0 for own in ways["anp"]["levels"] for count in own["kept"].values())
  for own in ways["anp"]["levels"]:
    assert max(own["difference"].values()) < 1e-4 and own["bytes"]["tflite"]["compact"] < own["bytes"]["tflite"]["dense"]
  count = len(lines)
  assert run() == json.loads(json.dumps(found)) and len(lines) == count == 5  # recorded: nothing runs again


@pytest.mark.slow
def test_tables_and_figure(recorded, tmp_path):
  found, *_ = recorded
  report = summarized(found)
  ways = found["cases"]["conv4"]["ways"]
  episodes = np.subtract(ways["anp"]["1"]["levels"][1]["accuracy"], ways["none"]["1"]["levels"][1]["accuracy"])
  own = report["cases"]["conv4"]["ways"]["anp"][1]["minus_none"]
  assert own["mean"] == pytest.approx(100 * episodes.mean())
  assert own["ci95"] == pytest.approx(1.96 * 100 * episodes.std(ddof=1) / np.sqrt(len(episodes)))
  assert f"{own['mean']:+.1f} ± {own['ci95']:.1f}" in accuracy_table(report)
  assert device_table(report).count("→") == 2 * 3
  draw(report, tmp_path / "figure.png")
  assert (tmp_path / "figure.png").stat().st_size > 5000


def test_bad_input_ends_before_anything_runs(tmp_path):
  for fields, message in (
    ({"cases": ("conv5",)}, "unknown case 'conv5'"),
    ({"ways": ("anq",)}, "unknown way 'anq'"),
    ({"seeds": ()}, "at least one seed"),
    ({"levels": (0.5, 0.3)}, "levels must increase"),
    ({"level_steps": 2}, "level_steps must be at least 4"),
  ):
    with pytest.raises(ConfigError, match=message):
      channel_pruning.reproduce(tmp_path, **{"splits": small_splits(), **fields})
  outcome = call(command.main, "--seeds=a", f"--workdir={tmp_path}")
  assert outcome.status == 2 and "seeds are written" in outcome.err

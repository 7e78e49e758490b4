"""The command for the paper's tables, on the embedded digits: what it runs, what it keeps, and what it says when runs fail."""

import json

import chex
import numpy as np
import pytest

from configs import digits
from experiments.config import ConfigError
from experiments.reports import paper as report
from experiments.run import run
from experiments.runs.federated import run_seeds
from experiments.runs.records import load_parameters
from experiments.studies import paper as tables
from experiments.studies import protocols


@pytest.fixture(scope="module")
def small_tables():
  """Tables of two rows each on digits in the place of the paper's."""
  patch = pytest.MonkeyPatch()
  row = protocols.Row
  small = {
    "1": protocols.Table(
      "meta-models", "training", (row("digits", "fedavg", 1, 396), row("digits", "metagater_ungated"), row("digits", "metagater"))
    ),
    "2": protocols.Table(
      "adaptation",
      "adaptation",
      (row("digits", "metagater_ungated"), row("digits", "metasnip_weight"), row("digits", "metasnip_channel"), row("digits", "metagater")),
    ),
    "3": protocols.Table("data that is not there", "training", (row("mnist", "fedavg"),)),
  }
  patch.setattr(protocols, "TABLES", small)
  patch.setattr(tables, "TABLES", small)
  patch.setattr(report, "TABLES", small)
  patch.setitem(protocols.CURVES, "digits", ("fedavg", "metagater"))
  yield small
  patch.undo()


@pytest.fixture(scope="module")
def finished(small_tables, tmp_path_factory):
  workdir, lines = tmp_path_factory.mktemp("tables") / "w", []
  content = tables.reproduce(workdir, tables=("1", "2"), seeds=(1, 2), rounds=4, log=lines.append)
  return workdir, content, lines


def test_it_runs_every_row_and_writes_the_report(finished):
  workdir, content, lines = finished
  assert [line.split(":")[0] for line in lines] == [
    "digits fedavg K=1",
    "digits metagater_ungated K=1",
    "digits metagater K=1",
    "digits metasnip_weight K=1",
    "digits metasnip_channel K=1",
  ]
  assert json.loads((workdir / "report.json").read_text()) == json.loads(json.dumps(content))
  text, page = (workdir / "report.md").read_text(), (workdir / "report.html").read_text()
  for part in ("| Digits | FedAvg | 1 |", "| 396 |", "MetaSNIP, by channel (not in the paper)", "## Claims", "### Claim 3"):
    assert part in text
  assert "Runs that failed" not in text
  assert page.count("data:image/png;base64,") == 3 and "figures/" not in page and "<table>" in page
  assert {p.name for p in (workdir / "figures").iterdir()} == {"curves.png", "task_sparsity.png", "channels.png"}


def test_numbers_are_those_of_the_runs(finished):
  workdir, content, _ = finished
  runs = {seed: json.loads((workdir / "digits-metagater-k1" / f"seed-{seed}" / "result.json").read_text()) for seed in (1, 2)}
  row = content["tables"]["1"]["rows"][2]
  means = [runs[seed]["accuracy"]["mean"] for seed in (1, 2)]
  assert row["accuracy"]["mean"] == pytest.approx(np.mean(means)) and row["accuracy"]["std"] == pytest.approx(np.std(means, ddof=1))
  assert row["sparsity_std_over_tasks"]["mean"] == pytest.approx(np.mean([runs[s]["sparsity"]["std"] for s in (1, 2)]))
  assert content["curves"]["digits"]["metagater"][1]["rounds"] == [4]


def test_metasnip_has_the_sparsity_of_the_gate_on_every_task(finished):
  workdir, _, _ = finished
  read = lambda method: json.loads((workdir / f"digits-{method}-k1" / "seed-2" / "result.json").read_text())
  gate = read("metagater")["sparsity"]["per_task"]
  np.testing.assert_allclose(read("metasnip_weight")["sparsity"]["per_task"], gate, atol=1e-3)
  np.testing.assert_allclose(read("metasnip_channel")["sparsity"]["per_task"], gate, atol=0.5 / 64 + 1e-6)
  kept = np.array(read("metasnip_channel")["on_rate"]["conv3"])
  np.testing.assert_allclose(1 - kept.mean(1), read("metasnip_channel")["sparsity"]["per_task"], atol=1e-6)


def test_a_second_call_runs_nothing_and_an_interrupted_one_goes_on(finished, small_tables):
  workdir, content, _ = finished
  lines = []
  kept = workdir / "digits-fedavg-k1" / "seed-1" / "result.json"
  before = kept.stat().st_mtime_ns
  again = tables.reproduce(workdir, tables=("1", "2"), seeds=(1, 2), rounds=4, log=lines.append)
  assert lines == [] and again == content
  lost = workdir / "digits-fedavg-k1" / "seed-2" / "result.json"
  accuracy = json.loads(lost.read_text())["accuracy"]
  lost.unlink()  # as when the call was killed in the middle of this run
  tables.reproduce(workdir, tables=("1", "2"), seeds=(1, 2), rounds=4, log=lines.append)
  assert len(lines) == 1 and "digits fedavg K=1" in lines[0] and "over 1 seeds" in lines[0]
  assert json.loads(lost.read_text())["accuracy"] == accuracy and kept.stat().st_mtime_ns == before


def test_another_configuration_in_the_workdir(finished, small_tables):
  workdir, _, _ = finished
  with pytest.raises(ConfigError, match="seed-1 holds a run of another configuration: .*rounds is 4 there and 5 here"):
    tables.reproduce(workdir, tables=("1",), seeds=(1, 2), rounds=5)


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_the_others_still_run(small_tables, tmp_path, monkeypatch):
  real = tables.protocol_config

  def diverging(name, *arguments):
    changed = real(name, *arguments)
    changed.local_lr = 1e30
    return changed

  monkeypatch.setattr(tables, "protocol_config", diverging)
  fine = tables.config_of(protocols.Row("digits", "metagater"), rounds=2)
  fine.local_lr = 0.1
  real_config_of = tables.config_of
  monkeypatch.setattr(tables, "config_of", lambda row, **options: fine if row.method == "metagater" else real_config_of(row, **options))
  lines = []
  content = tables.reproduce(tmp_path, tables=("1", "2"), seeds=(1, 2), rounds=2, log=lines.append)
  rows = {row["method"]: row for table in content["tables"].values() for row in table["rows"]}
  assert rows["metagater"]["accuracy"] and not rows["metagater"]["failures"]
  assert rows["fedavg"]["accuracy"] is None and "DivergedError: the loss is" in rows["fedavg"]["failures"][1]
  assert "needs the finished runs seed-1 of digits-metagater_ungated-k1" in rows["metasnip_weight"]["failures"][1]
  text = (tmp_path / "report.md").read_text()
  assert "no run; 2 failed" in text and "## Runs that failed" in text and "seed 2: DivergedError" in text
  assert any("digits fedavg K=1: seed-1 failed: the loss is" in line for line in lines)


@pytest.mark.slow
def test_several_seeds_are_single_runs(tmp_path):
  """Padding to a common shape, one compilation, and a leading seed axis change no result."""
  c = digits.get_config()
  c.update(rounds=4, eval_every=2, widths=(4, 5, 6), target_sparsity=0.5, sparsity_by="group_norm")  # with a calibration
  single = {}
  for seed in (1, 2):
    c.seed = seed
    single[seed] = run(c, tmp_path / f"single{seed}", quiet=True)
  for axis in ("loop", "vmap"):
    c.seed_axis = axis
    several = run_seeds(c, {seed: tmp_path / axis / str(seed) for seed in (1, 2)}, quiet=True)
    for seed in (1, 2):
      assert several[seed]["seed"] == seed and several[seed]["seeds_together"] == (2 if axis == "vmap" else 1)
      model, scalars = load_parameters(tmp_path / axis / str(seed) / "meta_model.npz")
      expected, expected_scalars = load_parameters(tmp_path / f"single{seed}" / "meta_model.npz")
      chex.assert_trees_all_close(model, expected, rtol=1e-3, atol=1e-5)
      np.testing.assert_allclose(scalars["threshold"], expected_scalars["threshold"], rtol=1e-3)
      # Nothing but a sample whose logits tie to float32 round-off may be decided otherwise.
      np.testing.assert_allclose(several[seed]["accuracy"]["per_task"], single[seed]["accuracy"]["per_task"], atol=0.03)
      assert json.loads((tmp_path / axis / str(seed) / "partition.json").read_text()) == json.loads(
        (tmp_path / f"single{seed}" / "partition.json").read_text()
      )
  assert single[1]["accuracy"] != single[2]["accuracy"]

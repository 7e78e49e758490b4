"""What a gate is worth: every variant is run on the same meta-models, at the sparsity that is asked, and the page says what the records say."""

import json

import numpy as np
import pytest
from commands import call
from scipy import stats

from configs import digits
from experiments.config import ConfigError
from experiments.reports import gates as report
from experiments.reports import readme
from experiments.studies import gate_variants, gates
from experiments.tables import main

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The study on digits with a small network, two rounds of meta-training each."""
  patch = pytest.MonkeyPatch()
  patch.setattr(gates, "PROTOCOLS", ("digits",))
  for module in (gates, gate_variants, report):
    patch.setattr(module, "SPARSITIES", (0.5,))
  original = digits.get_config

  def small():
    config = original()
    config.update(widths=(4, 4, 20), target_tasks=3)
    return config

  patch.setattr(digits, "get_config", small)
  workdir, lines = tmp_path_factory.mktemp("gates") / "w", []
  content = gates.reproduce(workdir, seeds=SEEDS, rounds=2, log=lines.append)
  yield workdir, content, lines
  patch.undo()


def result(workdir, name, seed):
  return json.loads((workdir / f"digits-{name}" / f"seed-{seed}" / "result.json").read_text())


@pytest.mark.slow
def test_every_variant_is_run_and_none_twice(finished):
  workdir, content, lines = finished
  assert len(lines) == 3 + 5 and not any("failed" in line for line in lines)
  assert set(content["protocols"]["digits"]["runs"]) == {"a 0", "b 0", "f own", "e own", "c 0.5", "d 0.5", "e 0.5", "f 0.5"}
  before = len(lines)
  gates.reproduce(workdir, seeds=SEEDS, rounds=2, log=lines.append)
  assert len(lines) == before
  text = (workdir / "gates.md").read_text()
  assert "| Digits | 50 % |" in text and (workdir / "gates.png").stat().st_size > 10_000


@pytest.mark.slow
def test_variants_have_the_same_sparsity_of_the_same_meta_models(finished):
  workdir, content, _ = finished
  for seed in SEEDS:
    for name in ("gates-c-0.5", "gates-d-0.5"):
      own = result(workdir, name, seed)
      kept = np.array(own["on_rate"]["conv3"])
      assert (kept.sum(1) == 10).all() and own["sparsity"]["mean"] == pytest.approx(0.5)
      assert own["meta_model"].endswith(f"metagater_dropout-k1/seed-{seed}") and own["macs"]["gated"] < own["macs"]["dense"]
    frozen = np.array(result(workdir, "gates-e-0.5", seed)["on_rate"]["conv3"])
    assert set(np.unique(frozen)) <= {0.0, 1.0} and ((frozen.sum(1) >= 9) & (frozen.sum(1) <= 10)).all()
    assert result(workdir, "gates-e-0.5", seed)["conditional"]["mean"] == 0
    free = result(workdir, "gates-f-0.5", seed)
    assert free["sparsity"]["mean"] == pytest.approx(0.5, abs=0.1) and free["meta_model"].endswith(f"metagater-k1/seed-{seed}")
    chosen, random = (np.array(result(workdir, name, seed)["on_rate"]["conv3"]) for name in ("gates-c-0.5", "gates-d-0.5"))
    assert (chosen != random).any() and (random[0] != random[1]).any()


@pytest.mark.slow
def test_numbers_on_the_page_are_those_of_the_runs(finished):
  workdir, content, _ = finished
  runs = content["protocols"]["digits"]["runs"]
  at = lambda name: [result(workdir, name, seed)["accuracy"]["mean"] for seed in SEEDS]
  assert [runs["f own"][str(seed)]["accuracy"] for seed in SEEDS] == at("metagater-k1")
  assert [runs["b 0"][str(seed)]["accuracy"] for seed in SEEDS] == at("metagater_dropout-k1")
  entry = next(e for e in report.differences(content) if e["what"].startswith("looking at the input") and e["sparsity"] == 0.5)
  paired = np.array(at("gates-f-0.5")) - np.array(at("gates-e-0.5"))
  assert entry["mean"] == pytest.approx(paired.mean())
  if paired.std() > 0:
    assert entry["p"] == pytest.approx(stats.ttest_1samp(paired, 0).pvalue)
  assert f"{100 * np.mean(at('gates-c-0.5')):.1f} ±" in report.accuracies(content)
  assert "Looking at the input: (f) over (e)" in report.summary(content)


@pytest.mark.slow
def test_workdirs_are_merged_by_seed_unless_the_protocol_differs(finished, tmp_path):
  workdir, content, _ = finished
  readme.record_gates(workdir, tmp_path)
  other = json.loads(json.dumps(content))
  for runs in other["protocols"]["digits"]["runs"].values():
    runs["3"] = runs.pop("2")
  merged = report.merge(report.read(tmp_path / "gates" / "gates.json"), other)
  assert set(merged["protocols"]["digits"]["runs"]["f own"]) == {"1", "2", "3"}
  other["protocols"]["digits"]["rounds"]["metagater"] = 9
  assert set(report.merge(content, other)["protocols"]["digits"]["runs"]["f own"]) == {"1", "3"}
  page = readme.write_page("<!-- table: gates_behaviour -->\n<!-- end -->", tmp_path)
  assert "| Digits | its own |" in page


def test_bad_input(tmp_path):
  outcome = call(main, "--tables=gates", "--protocols=mnist", f"--workdir={tmp_path / 'w'}")
  assert outcome.status == 2 and "unknown protocol of the gates 'mnist'" in outcome.err
  with pytest.raises(ConfigError, match="there is no gates.json"):
    readme.record_gates(tmp_path, tmp_path)

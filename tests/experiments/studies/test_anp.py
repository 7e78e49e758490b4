"""The ANP tables on small pools: what is recorded and not run again, paired differences, and the report."""

import json

import numpy as np
import pytest
from commands import call
from fewshot_problem import small, small_splits

from experiments import anp as command
from experiments.config import ConfigError
from experiments.reports import readme
from experiments.studies import anp, anp_cases

FIELDS = {
  name: value for name, value in small().items() if name not in ("steps", "eval_every", "shots", "model", "prune", "data_dir", "seed", "name")
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  workdir, lines = tmp_path_factory.mktemp("anp"), []
  run = lambda: anp.reproduce(
    workdir,
    cases=("conv4-1",),
    seeds=(1, 2),
    scores=("none", "magnitude"),
    steps=20,
    level_steps=(5,),
    splits=small_splits(),
    fields=FIELDS,
    log=lines.append,
  )
  return workdir, run(), lines, run


@pytest.mark.slow
def test_levels_and_differences(recorded):
  workdir, report, _, _ = recorded
  case = report["cases"]["conv4-1"]
  levels = case["courses"]["5"]["magnitude"]
  np.testing.assert_allclose([level["sparsity"]["mean"] for level in levels], anp_cases.LEVELS, atol=0.01)
  runs = {
    (seed, score): json.loads((workdir / "conv4-1" / f"seed-{seed}-{score}-5.json").read_text()) for seed in (1, 2) for score in ("none", "magnitude")
  }
  differences = np.concatenate([np.subtract(*(runs[seed, score]["levels"][2]["accuracy"] for score in ("magnitude", "none"))) for seed in (1, 2)])
  found = levels[2]["minus_none"]
  assert found["mean"] == pytest.approx(differences.mean())
  assert found["ci95"] == pytest.approx(1.96 * differences.std(ddof=1) / np.sqrt(60))
  base = [json.loads((workdir / "conv4-1" / f"seed-{seed}-base.json").read_text())["accuracy"] for seed in (1, 2)]
  after = [runs[seed, "magnitude"]["levels"][2]["accuracy"] for seed in (1, 2)]
  assert levels[2]["minus_base"]["mean"] == pytest.approx(np.mean(after) - np.mean(base))
  assert all(level["sparsity"]["mean"] == 0 for level in case["courses"]["5"]["none"])
  assert case["agreement"]["anp"]["spearman"]["mean"] == pytest.approx(1)
  assert 0 < case["agreement"]["magnitude"]["kept_in_common"]["mean"] < 1
  bases = [json.loads((workdir / "conv4-1" / f"seed-{seed}-base.json").read_text())["agreement"] for seed in (1, 2)]
  at_85 = np.concatenate([np.subtract(*(base[score]["at_once"][-1] for score in ("anp", "magnitude"))) for base in bases])
  assert case["agreement"]["magnitude"]["anp_minus"][-1]["mean"] == pytest.approx(at_85.mean())
  text = (workdir / "anp.md").read_text()
  assert "Conv-4 (64), ANIL, 5-way 1-shot" in text and "| magnitude |" in text and (workdir / "anp.png").stat().st_size


@pytest.mark.slow
def test_the_report_is_recorded_for_readme(recorded, tmp_path):
  workdir, _, _, _ = recorded
  readme.record_anp(workdir, tmp_path)
  assert {path.name for path in (tmp_path / "anp").iterdir()} == {"anp.json", "anp.md", "anp.png"}
  text = readme.write_page("<!-- table: anp -->\n<!-- end -->\n", tmp_path)
  case = json.loads((workdir / "anp.json").read_text())["cases"]["conv4-1"]
  for i, level in ((2, 85), (3, 95)):
    row = next(line for line in text.splitlines() if f"| {level} % |" in line)
    for score in ("none", "magnitude"):
      assert f"| {100 * case['courses']['5'][score][i]['accuracy']['mean']:.1f} ±" in row
  before = (tmp_path / "anp" / "anp.json").read_text()
  readme.record_anp(workdir, tmp_path)  # a second time adds nothing
  assert (tmp_path / "anp" / "anp.json").read_text() == before
  with pytest.raises(ConfigError, match="there are no records in"):
    readme.record_anp(tmp_path, tmp_path)


@pytest.mark.slow
def test_what_is_recorded_is_not_run_again(recorded):
  workdir, report, lines, run = recorded
  assert len(lines) == 6  # two base models, two scores each
  (workdir / "conv4-1" / "seed-2-magnitude-5.json").unlink()
  again = run()
  assert len(lines) == 7 and lines[-1].startswith("Conv-4 (64), ANIL, 5-way 1-shot, seed 2, magnitude, 5 steps:")
  assert again == report  # the same course from the same base


@pytest.mark.slow
def test_records_of_another_configuration_are_not_mixed_in(recorded):
  workdir, _, lines, _ = recorded
  before = len(lines)
  with pytest.raises(ConfigError, match="seed-1-base.json holds a run of another configuration: inner_lr is 0.1 there and 0.2 here"):
    anp.reproduce(
      workdir,
      cases=("conv4-1",),
      seeds=(1,),
      scores=("none",),
      steps=20,
      level_steps=(5,),
      splits=small_splits(),
      fields=FIELDS | {"inner_lr": 0.2},
      log=lines.append,
    )
  assert len(lines) == before


@pytest.mark.slow
def test_a_case_that_prunes_otherwise_takes_the_trained_network(recorded):
  workdir, _, lines, _ = recorded
  report = anp.reproduce(
    workdir,
    cases=("conv4-1-filters",),
    seeds=(1,),
    scores=("anp",),
    steps=20,
    level_steps=(5,),
    splits=small_splits(),
    fields=FIELDS,
    log=lines.append,
  )
  base = "seed-1-base.npz"
  assert (workdir / "conv4-1-filters" / base).read_bytes() == (workdir / "conv4-1" / base).read_bytes()
  cases = report["cases"]
  levels = json.loads((workdir / "conv4-1-filters" / "seed-1-anp-5.json").read_text())["levels"]
  filters = [[4 * share for name, share in level["by_layer"].items() if "output" not in name] for level in levels[:2]]
  np.testing.assert_allclose(filters, np.round(filters), atol=1e-5)  # 4 filters a layer, of which whole ones go
  np.testing.assert_allclose(np.sum(filters, axis=1), [8, 11])  # 50 and 70 % of all 16
  reported = cases["conv4-1-filters"]["courses"]["5"]["anp"]
  assert [sum(layer["mean"] for layer in level["filters"].values()) for level in reported[:2]] == [8, 5]
  assert list(cases["conv4-1-filters"]["agreement"]) == ["anp"] and list(cases["conv4-1"]["agreement"]) == ["anp", "magnitude"]


def test_bad_input(tmp_path):
  for options, message in (
    ({"cases": ("conv5-1",)}, "unknown case 'conv5-1'. Did you mean 'conv4-1'"),
    ({"scores": ("npa",)}, "unknown score 'npa'"),
    ({"seeds": ()}, "at least one seed"),
    ({"level_steps": (50, 1)}, "conv4-1: 8000 steps of meta-training and 50, 1 at each"),
  ):
    with pytest.raises(ConfigError, match=message):
      anp.reproduce(tmp_path, **options)


def test_the_command_hands_on_what_is_chosen(monkeypatch):
  """So that different machines can run different parts of the study."""
  asked = []
  monkeypatch.setattr(command, "reproduce", lambda workdir, **options: asked.append(options))
  monkeypatch.setattr(command, "overview", lambda report: "the table")
  outcome = call(command.main, "--seeds=2-3", "--level_steps=50,400", "--scores=anp,none", "--cases=conv4-1")
  assert outcome.status == 0 and "the table" in outcome.out
  assert call(command.main, "--seeds=2").status == 0
  assert [options["seeds"] for options in asked] == [(2, 3), (2,)]
  assert asked[0]["level_steps"] == [50, 400] and asked[1]["level_steps"] is None
  assert asked[0]["scores"] == ["anp", "none"] and asked[0]["cases"] == ["conv4-1"]
  outcome = call(command.main, "--seeds=some")
  assert outcome.status == 2 and "seeds are written 4, 1-3 or 1,4-6; got 'some'" in outcome.err

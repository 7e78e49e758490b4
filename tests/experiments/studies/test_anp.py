"""The ANP tables on small pools: what is recorded and not run again, paired differences, and the report."""

import json

import jax
import numpy as np
import pytest
from scipy import stats
from fewshot_problem import small, small_splits

from commands import call
from experiments import anp as command
from experiments.config import ConfigError
from experiments.reports import anp as report_of, readme
from experiments.reports.figures import pyplot
from experiments.studies import anp, anp_cases

FIELDS = {name: value for name, value in small().items() if name not in (
    "steps", "eval_every", "shots", "model", "prune", "data_dir", "seed", "name")}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  workdir, lines = tmp_path_factory.mktemp("anp"), []
  run = lambda: anp.reproduce(workdir, cases=("conv4-1",), seeds=(1, 2), scores=("none", "magnitude"), steps=20,
                                     level_steps=(5,), splits=small_splits(), fields=FIELDS, log=lines.append)
  return workdir, run(), lines, run


@pytest.mark.slow
def test_levels_and_differences(recorded):
  workdir, report, _, _ = recorded
  case = report["cases"]["conv4-1"]
  levels = case["courses"]["5"]["magnitude"]
  np.testing.assert_allclose([level["sparsity"]["mean"] for level in levels], anp_cases.LEVELS, atol=0.01)
  runs = {(seed, score): json.loads((workdir / "conv4-1" / f"seed-{seed}-{score}-5.json").read_text())
          for seed in (1, 2) for score in ("none", "magnitude")}
  differences = np.concatenate([np.subtract(*(runs[seed, score]["levels"][2]["accuracy"] for score in ("magnitude", "none")))
                                for seed in (1, 2)])
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


def _made_up_records(workdir, accuracies, case="conv4-1", granularity="weight", by_layer=None):
  """Records of a case without any training: by seed, accuracies of the base model and of courses at all levels, by score."""
  folder = workdir / case
  config = {"ways": 5, "model": "conv4", "widths": [4, 8], "prune": {"granularity": granularity}}
  folder.mkdir(parents=True)
  for seed, (base, courses) in accuracies.items():
    (folder / f"seed-{seed}-base.json").write_text(json.dumps({
        "accuracy": base, "steps": 8000, "agreement": {
            score: {"seconds": seed**4 * (seed if score == "magnitude" else 1.0), "temporary_mb": 2.0, "spearman": 0.5,
                    "kept_in_common": 0.7, "at_once": [base] * len(anp_cases.AT_ONCE)} for score in ("anp", "magnitude")}}))
    for score, accuracy in courses.items():
      level = {"sparsity": 0.6, "by_layer": (by_layer or {}).get(score, {}), "train_loss": 1.0, "accuracy": accuracy}
      (folder / f"seed-{seed}-{score}-400.json").write_text(json.dumps({
          "config": config, "levels": [level] * len(anp_cases.LEVELS)}))
  return workdir


def _random_records(seeds, scores=("anp", "magnitude")):
  draw = lambda seed, score: np.random.default_rng([seed, len(score)]).uniform(size=20 + seed).tolist()
  return {seed: (draw(seed, ""), {score: draw(seed, score) for score in scores}) for seed in seeds}


def test_reports_of_other_seeds_are_merged_as_if_made_together(tmp_path):
  """Means and intervals over the episodes of all seeds follow from those of each, without the episodes."""
  parts = [report_of.make_report(_made_up_records(tmp_path / str(seed), _random_records([seed]))) for seed in (2, 1, 3)]
  together = report_of.make_report(_made_up_records(tmp_path / "all", _random_records((1, 2, 3))))
  merged = report_of.merge_reports(report_of.merge_reports(*parts[:2]), parts[2])
  # ANP took 1, 16 and 81 seconds, on machines of different speed; magnitude 1, 2 and 3 times as long on the same.
  assert [line.split("|")[5].strip() for line in report_of.markdown(together).splitlines() if "| 0.50 | 70 % |" in line] == [
      "1.00 (16.0 s)", "2.00"]
  flat, expected = (jax.tree_util.tree_leaves_with_path(report) for report in (merged, together))
  assert [path for path, _ in flat] == [path for path, _ in expected]
  assert len(flat) > 200
  for (path, value), (_, other) in zip(flat, expected):
    assert value == (other if isinstance(other, str) else pytest.approx(other, rel=1e-9)), path
  assert report_of.markdown(merged) == report_of.markdown(together)
  differences = [np.subtract(courses["anp"], courses["magnitude"]) for _, courses in _random_records((1, 2, 3)).values()]
  means = [100 * d.mean() for d in differences]
  half = stats.t.ppf(0.975, 2) * np.std(means, ddof=1) / np.sqrt(3)
  values = np.concatenate(differences)
  cell = (f"{100 * values.mean():+.1f} ± {196 * values.std(ddof=1) / np.sqrt(len(values)):.1f} ("
          + ", ".join(f"{mean:+.1f}" for mean in means) + f"; seeds ± {half:.1f})")
  assert report_of.differences(merged).count(cell) == 2


def test_costs_are_of_the_seeds_that_were_timed(tmp_path):
  """Seeds without times, as those timed with code of other speed, count for everything else; a base not measured yet for nothing."""
  records = _made_up_records(tmp_path, _random_records((1, 2, 3)))
  base = json.loads((records / "conv4-1" / "seed-3-base.json").read_text())
  (records / "conv4-1" / "seed-3-base.json").write_text(json.dumps({k: v for k, v in base.items() if k != "agreement"}))

  def row():
    text = report_of.markdown(report_of.make_report(records))
    found = [line.split("|")[2:7] for line in text.splitlines() if line.startswith("| magnitude | 1, 2 | 0.5")]
    return [*found, "time and MB of seeds 1, 2:" in text, "time and MB of seed 1:" in text]

  assert row() == [[" 1, 2 ", " 0.50 ", " 70 % ", " 1.50 ", " 2 "], True, False]
  for seed, cost in ((2, [" 1.00 ", " 2 "]), (1, ["  ", "  "])):
    base = json.loads((records / "conv4-1" / f"seed-{seed}-base.json").read_text())
    for values in base["agreement"].values():
      del values["seconds"], values["temporary_mb"]
    (records / "conv4-1" / f"seed-{seed}-base.json").write_text(json.dumps(base))
    assert row() == [[" 1, 2 ", " 0.50 ", " 70 % ", *cost], False, seed == 2]


def test_claims_are_judged_by_the_interval_over_seeds(tmp_path):
  """Student's t over 0.020, 0.025, 0.030 is ± 0.012, over the first two ± 0.032; one seed is judged by its episodes."""
  spread = np.tile([-0.01, 0.01], 50)  # an interval of ± 0.002 over 100 episodes

  def cells(seeds, ahead, behind):
    courses = lambda seed: {"none": (0.6 + 0 * spread).tolist(), "anp": (0.6 - behind + spread).tolist(),
                            "magnitude": (0.6 - behind - ahead[seed] + 0 * spread).tolist()}
    folder = _made_up_records(tmp_path / str((seeds, behind)), {seed: ([0.5] * 100, courses(seed)) for seed in seeds})
    row = report_of.claims(report_of.make_report(folder)).splitlines()[-1]
    return [cell.strip() for cell in row.split("|")[2:-1]]

  ahead = {1: 0.02, 2: 0.025, 3: 0.03, 4: -0.0025, 5: -0.0015}
  assert cells((1, 2, 3), ahead, 0.0115) == [
      "refuted (3 seeds)", "not run", "confirmed (3 seeds)", "not run", "confirmed (3 seeds)"]
  assert cells((1, 2), ahead, 0.009)[::2] == ["confirmed (2 seeds)", "not confirmed (2 seeds)", "not confirmed (2 seeds)"]
  one = lambda *verdicts: [f"{verdict} (1 seed, over its episodes)" for verdict in verdicts]
  assert cells((4,), ahead, 0.0085)[::2] == one("not confirmed", "refuted", "refuted")
  assert cells((5,), ahead, 0.0075)[::2] == one("confirmed", "not confirmed", "not confirmed")


def test_curves_of_one_panel_are_of_the_same_seeds(tmp_path, monkeypatch):
  records = _random_records([1], ("none", "anp")) | _random_records([2, 3], ("none", "anp", "snip"))
  records[2][1]["random"] = records[2][1]["snip"]  # a control that one seed has takes nothing from the others
  plt = pyplot()
  monkeypatch.setattr(plt, "close", lambda figure: None)
  report_of.write_report(report_of.make_report(_made_up_records(tmp_path, records)), tmp_path)
  axis, = plt.gcf().axes
  for (score, seeds), container in zip((("none", (2, 3)), ("anp", (2, 3)), ("snip", (2, 3)), ("random", (2,))), axis.containers,
                                       strict=True):
    assert container.get_label().endswith(f"(seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})")
    mean = lambda of, seeds=seeds: 100 * np.mean(np.concatenate([of(*records[seed]) for seed in seeds]))
    expected = [mean(lambda base, courses: base), *[mean(lambda base, courses, score=score: courses[score])] * 4]
    np.testing.assert_allclose(np.asarray(container.lines[0].get_ydata(), float), expected)


def test_what_is_left_is_told_where_whole_filters_go(tmp_path):
  """Of 4 and 8 filters 6 go in both, but not as many parameters: a filter's normalization goes with it, and what reads it."""
  parameters = lambda first, second: 29 * first + 9 * first * second + 2 * second + 8 * 8 * second * 5 + 5  # 8×8 places are read
  of_all = lambda *filters: f"{100 * parameters(*filters) / parameters(4, 8):.1f} % of the parameters"
  kernels = lambda first, second: {"backbone/conv1/kernel": first, "backbone/conv2/kernel": second, "backbone/output/kernel": 0.0}
  records = _made_up_records(tmp_path, _random_records([1]), "conv4-1-filters", "channel",
                             {"anp": kernels(0.5, 0.5), "magnitude": kernels(0.75, 0.375)})
  report = report_of.make_report(records)
  assert (f"| 85 % (left: ANP 2-4, {of_all(2, 4)}; magnitude 1-5, {of_all(1, 5)}) |"
          in report_of.overview(report).splitlines()[2])
  rows = {line.split(" | ")[0]: line for line in report_of.markdown(report).splitlines()[4:8]}
  assert rows["| ANP"].count(f"(left: 2-4, {of_all(2, 4)})") == 4
  assert rows["| magnitude"].count(f"(left: 1-5, {of_all(1, 5)})") == 4
  courses = report["cases"]["conv4-1-filters"]["courses"]["400"]
  assert {level["sparsity"]["mean"] for levels in courses.values() for level in levels} == {0.5}  # of filters, not the weights' 0.6
  assert "left:" not in report_of.overview(report_of.make_report(_made_up_records(tmp_path / "weights", _random_records([1]))))


def test_courses_from_different_networks_of_a_seed_are_not_compared(tmp_path):
  records = _random_records((1, 2))
  held = report_of.make_report(_made_up_records(tmp_path / "held", records))
  same = report_of.make_report(_made_up_records(tmp_path / "same", {1: (records[1][0], {"snip": records[1][1]["anp"]})}))
  courses = report_of.merge_reports(held, same)["cases"]["conv4-1"]["courses"]["400"]
  assert {score: list(levels[0]["accuracy"]["by_seed"]) for score, levels in courses.items()} == {
      "anp": ["1", "2"], "snip": ["1"], "magnitude": ["1", "2"]}
  row = next(line for line in report_of.overview(report_of.merge_reports(held, same)).splitlines() if "| 85 %" in line)
  assert row.startswith("| Conv-4 (64), ANIL, 5-way 1-shot; seeds 1, 2 |") and row.count("(seed 1 only)") == 1  # SNIP's mean
  other = report_of.make_report(_made_up_records(tmp_path / "other", {1: (records[2][0][:21], {"snip": records[1][1]["anp"]})}))
  courses = report_of.merge_reports(held, other)["cases"]["conv4-1"]["courses"]["400"]
  assert {score: list(levels[0]["accuracy"]["by_seed"]) for score, levels in courses.items()} == {
      "anp": ["2"], "snip": ["1"], "magnitude": ["2"]}
  for field, value in (("steps", 4000), ("title", "Conv-5")):
    case = held["cases"]["conv4-1"] | {field: value}
    with pytest.raises(ConfigError, match=f"conv4-1: {field} is {value} in the recorded report and"):
      report_of.merge_reports(held | {"cases": {"conv4-1": case}}, same)


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
    anp.reproduce(workdir, cases=("conv4-1",), seeds=(1,), scores=("none",), steps=20, level_steps=(5,),
                         splits=small_splits(), fields=FIELDS | {"inner_lr": 0.2}, log=lines.append)
  assert len(lines) == before


@pytest.mark.slow
def test_a_case_that_prunes_otherwise_takes_the_trained_network(recorded):
  workdir, _, lines, _ = recorded
  report = anp.reproduce(workdir, cases=("conv4-1-filters",), seeds=(1,), scores=("anp",), steps=20, level_steps=(5,),
                                splits=small_splits(), fields=FIELDS, log=lines.append)
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
  for options, message in (({"cases": ("conv5-1",)}, "unknown case 'conv5-1'. Did you mean 'conv4-1'"),
                           ({"scores": ("npa",)}, "unknown score 'npa'"), ({"seeds": ()}, "at least one seed"),
                           ({"level_steps": (50, 1)}, "conv4-1: 8000 steps of meta-training and 50, 1 at each")):
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

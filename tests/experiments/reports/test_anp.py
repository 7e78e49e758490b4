"""The report on ANP from made-up records: statistics, costs and words follow from the numbers."""

import json

import jax
import numpy as np
import pytest
from scipy import stats

from experiments.config import ConfigError
from experiments.reports import anp as report_of
from experiments.reports.figures import pyplot
from experiments.studies import anp_cases


def _made_up_records(workdir, accuracies, case="conv4-1", granularity="weight", by_layer=None):
  """Records of a case without any training: by seed, accuracies of the base model and of courses at all levels, by score."""
  folder = workdir / case
  config = {"ways": 5, "model": "conv4", "widths": [4, 8], "prune": {"granularity": granularity}}
  folder.mkdir(parents=True)
  for seed, (base, courses) in accuracies.items():
    (folder / f"seed-{seed}-base.json").write_text(
      json.dumps(
        {
          "accuracy": base,
          "steps": 8000,
          "agreement": {
            score: {
              "seconds": seed**4 * (seed if score == "magnitude" else 1.0),
              "temporary_mb": 2.0,
              "spearman": 0.5,
              "kept_in_common": 0.7,
              "at_once": [base] * len(anp_cases.AT_ONCE),
            }
            for score in ("anp", "magnitude")
          },
        }
      )
    )
    for score, accuracy in courses.items():
      level = {"sparsity": 0.6, "by_layer": (by_layer or {}).get(score, {}), "train_loss": 1.0, "accuracy": accuracy}
      (folder / f"seed-{seed}-{score}-400.json").write_text(json.dumps({"config": config, "levels": [level] * len(anp_cases.LEVELS)}))
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
  assert [line.split("|")[5].strip() for line in report_of.markdown(together).splitlines() if "| 0.50 | 70 % |" in line] == ["1.00 (16.0 s)", "2.00"]
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
  cell = (
    f"{100 * values.mean():+.1f} ± {196 * values.std(ddof=1) / np.sqrt(len(values)):.1f} ("
    + ", ".join(f"{mean:+.1f}" for mean in means)
    + f"; seeds ± {half:.1f})"
  )
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
    courses = lambda seed: {
      "none": (0.6 + 0 * spread).tolist(),
      "anp": (0.6 - behind + spread).tolist(),
      "magnitude": (0.6 - behind - ahead[seed] + 0 * spread).tolist(),
    }
    folder = _made_up_records(tmp_path / str((seeds, behind)), {seed: ([0.5] * 100, courses(seed)) for seed in seeds})
    row = report_of.claims(report_of.make_report(folder)).splitlines()[-1]
    return [cell.strip() for cell in row.split("|")[2:-1]]

  ahead = {1: 0.02, 2: 0.025, 3: 0.03, 4: -0.0025, 5: -0.0015}
  assert cells((1, 2, 3), ahead, 0.0115) == ["refuted (3 seeds)", "not run", "confirmed (3 seeds)", "not run", "confirmed (3 seeds)"]
  assert cells((1, 2), ahead, 0.009)[::2] == ["confirmed (2 seeds)", "not confirmed (2 seeds)", "not confirmed (2 seeds)"]
  one = lambda *verdicts: [f"{verdict} (1 seed, over its episodes)" for verdict in verdicts]
  assert cells((4,), ahead, 0.0085)[::2] == one("not confirmed", "refuted", "refuted")
  assert cells((5,), ahead, 0.0075)[::2] == one("confirmed", "not confirmed", "not confirmed")


def test_curves_of_one_panel_are_of_the_same_seeds(tmp_path, monkeypatch):
  records = _random_records([1], ("none", "anp")) | _random_records([2, 3], ("none", "anp", "snip"))
  records[2][1]["random"] = records[2][1]["snip"]  # a control that one seed has takes nothing from the others
  drawn = []
  monkeypatch.setattr(type(pyplot()), "close", lambda self, figure: drawn.append(figure))
  report_of.write_report(report_of.make_report(_made_up_records(tmp_path, records)), tmp_path)
  (axis,) = drawn[-1].axes
  for (score, seeds), container in zip((("none", (2, 3)), ("anp", (2, 3)), ("snip", (2, 3)), ("random", (2,))), axis.containers, strict=True):
    assert container.get_label().endswith(f"(seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})")
    mean = lambda of, seeds=seeds: 100 * np.mean(np.concatenate([of(*records[seed]) for seed in seeds]))
    expected = [mean(lambda base, courses: base), *[mean(lambda base, courses, score=score: courses[score])] * 4]
    np.testing.assert_allclose(np.asarray(container.lines[0].get_ydata(), float), expected)


def test_what_is_left_is_told_where_whole_filters_go(tmp_path):
  """Of 4 and 8 filters 6 go in both, but not as many parameters: a filter's normalization goes with it, and what reads it."""
  parameters = lambda first, second: 29 * first + 9 * first * second + 2 * second + 8 * 8 * second * 5 + 5  # 8×8 places are read
  of_all = lambda *filters: f"{100 * parameters(*filters) / parameters(4, 8):.1f} % of the parameters"
  kernels = lambda first, second: {"backbone/conv1/kernel": first, "backbone/conv2/kernel": second, "backbone/output/kernel": 0.0}
  records = _made_up_records(
    tmp_path, _random_records([1]), "conv4-1-filters", "channel", {"anp": kernels(0.5, 0.5), "magnitude": kernels(0.75, 0.375)}
  )
  report = report_of.make_report(records)
  assert f"| 85 % (left: ANP 2-4, {of_all(2, 4)}; magnitude 1-5, {of_all(1, 5)}) |" in report_of.overview(report).splitlines()[2]
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
    "anp": ["1", "2"],
    "snip": ["1"],
    "magnitude": ["1", "2"],
  }
  row = next(line for line in report_of.overview(report_of.merge_reports(held, same)).splitlines() if "| 85 %" in line)
  assert row.startswith("| Conv-4 (64), ANIL, 5-way 1-shot; seeds 1, 2 |") and row.count("(seed 1 only)") == 1  # SNIP's mean
  other = report_of.make_report(_made_up_records(tmp_path / "other", {1: (records[2][0][:21], {"snip": records[1][1]["anp"]})}))
  courses = report_of.merge_reports(held, other)["cases"]["conv4-1"]["courses"]["400"]
  assert {score: list(levels[0]["accuracy"]["by_seed"]) for score, levels in courses.items()} == {"anp": ["2"], "snip": ["1"], "magnitude": ["2"]}
  for field, value in (("steps", 4000), ("title", "Conv-5")):
    case = held["cases"]["conv4-1"] | {field: value}
    with pytest.raises(ConfigError, match=f"conv4-1: {field} is {value} in the recorded report and"):
      report_of.merge_reports(held | {"cases": {"conv4-1": case}}, same)

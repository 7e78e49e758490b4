"""`python -m experiments.tables --tables=anp`: accuracy against sparsity of meta-trained networks, for every pruning score.

A network is meta-trained once per seed. From there every score prunes it in stages, level after level, with the same steps of
meta-training at each: few of them, so that the score's choice shows, and many, so that what is left recovers. "none" trains as
many steps on without pruning, and is what the others are compared with. All of them are measured on the same test episodes, so
differences are paired. A finished part is recorded and not run again.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from scipy import stats

import metagater_jax as mg
from configs import cifarfs_maml
from experiments import placement, reporting
from experiments.config import ConfigError, check_same, closest
from experiments.fewshot import FewShot, Splits, load_splits, make_score
from experiments.fewshot_config import check_config
from experiments.programs import compiler_options
from experiments.training import load_parameters, save_parameters

__all__ = ["CASES", "LEVELS", "NAMES", "SCORES", "Case", "make_report", "markdown", "overview", "reproduce", "run_case",
           "write_report"]

LEVELS = (0.5, 0.7, 0.85, 0.95)
# Sparsities at which a trained network is pruned at once, without training after it.
AT_ONCE = (0.3, 0.5, 0.7, 0.85)
# Name in the tables to fields of `prune`.
SCORES = {"none": {}, "anp": {"score": "anp", "average": "absolute"},
          "anp_first_order": {"score": "anp", "average": "absolute", "derivative": "first_order"},
          "anp_layer": {"score": "anp", "average": "absolute", "scope": "layer"},
          "anp_signed": {"score": "anp", "average": "signed"}, "snip": {"score": "snip", "average": "absolute"},
          "snip_signed": {"score": "snip", "average": "signed"}, "magnitude": {"score": "magnitude"},
          "magnitude_layer": {"score": "magnitude", "scope": "layer"}, "random": {"score": "random"}}
# Names in the tables to what a reader sees.
NAMES = {"none": "not pruned", "anp": "ANP", "anp_first_order": "ANP, first-order", "anp_layer": "ANP, layer-wise",
          "anp_signed": "ANP, signed", "snip": "SNIP / Taylor on the ordinary loss",
          "snip_signed": "SNIP / Taylor on the ordinary loss, signed", "magnitude": "magnitude",
          "magnitude_layer": "magnitude, layer-wise", "random": "random"}


class Case(NamedTuple):
  """A network and a kind of episodes; `steps` of meta-training, then each of `level_steps` in turn at each level of sparsity.

  With `trained`, another case that differs only in how it prunes, that one's network is taken, if it is there.
  """

  title: str
  fields: dict[str, Any]
  steps: int
  level_steps: tuple[int, ...]
  trained: str | None = None


# Of the scores that are not here, a course with few steps per level is enough.
MAIN = ("none", "anp", "snip", "magnitude")
# ANIL, because a step of it costs a third of MAML's and reaches more in the same time; `conv4-1-maml` is there to compare.
_ANIL = {"learner": "anil", "train_queries": 5}
_CONV4 = {"widths": (64, 64, 64, 64)}
_RESNET = {"model": "resnet12", "widths": (16, 32, 64, 128)}
CASES = {
    "conv4-1": Case("Conv-4 (64), ANIL, 5-way 1-shot", _ANIL | _CONV4 | {"shots": 1}, 8000, (50, 400, 1600)),
    "conv4-5": Case("Conv-4 (64), ANIL, 5-way 5-shot", _ANIL | _CONV4 | {"shots": 5}, 5000, (50, 400)),
    "resnet12-1": Case("ResNet-12 (16-32-64-128), ANIL, 5-way 1-shot", _ANIL | _RESNET | {"shots": 1}, 4000, (50, 400)),
    "resnet12-5": Case("ResNet-12 (16-32-64-128), ANIL, 5-way 5-shot", _ANIL | _RESNET | {"shots": 5}, 3000, (50, 400)),
    "conv4-1-filters": Case("Conv-4 (64), ANIL, 5-way 1-shot, whole filters", _ANIL | _CONV4 | {
        "shots": 1, "prune": {"granularity": "channel"}}, 8000, (50,), trained="conv4-1"),
    "conv4-1-maml": Case("Conv-4 (32), MAML, 5-way 1-shot", {"shots": 1}, 8000, (50, 400)),
}


def reproduce(workdir: str | Path, *, cases: Sequence[str] = tuple(CASES), seeds: Sequence[int] = (1, 2, 3),
              scores: Sequence[str] = tuple(SCORES), data_dir: str | None = None, steps: int | None = None,
              level_steps: Sequence[int] | None = None, splits: Splits | None = None, fields: dict[str, Any] | None = None, log=print
              ) -> dict[str, Any]:
  """Runs what is not yet recorded, and writes `anp.json`, `anp.md` and `anp.png`.

  Args:
    workdir: holds the records.
    cases: names in `CASES`.
    seeds: of initialization and training episodes; test episodes are the same for all.
    scores: names in `SCORES`.
    data_dir: where CIFAR-100 is.
    steps, level_steps: instead of the cases' own; with `steps` alone, `level_steps` changes in proportion.
    splits: pools to use instead of CIFAR-FS.
    fields: of the config, over the cases' own.
    log: gets a line per finished part.

  Raises:
    ConfigError: before anything runs: an unknown case or score, no seeds, too few steps, data that is missing, or a workdir
      whose records have another configuration.
  """
  for what, names, known in (("case", cases, CASES), ("score", scores, SCORES)):
    for name in names:
      if name not in known:
        raise ConfigError(closest(what, name, known))
  if not seeds:
    raise ConfigError("there must be at least one seed.")
  placement.use_cores(cifarfs_maml.get_config())  # before configs are checked, which uses JAX
  workdir = Path(workdir)
  planned = {}
  for name in cases:
    case = CASES[name]
    if steps is not None:
      case = case._replace(steps=steps, level_steps=tuple(
          dict.fromkeys(max(2, round(count * steps / case.steps)) for count in case.level_steps)))
    case = case._replace(level_steps=case.level_steps if level_steps is None else tuple(level_steps),
                         fields=case.fields | {"data_dir": data_dir} | (fields or {}))
    if case.steps < 1 or not case.level_steps or min(case.level_steps) < 2:
      raise ConfigError(f"{name}: {case.steps} steps of meta-training and {', '.join(map(str, case.level_steps)) or 'none'} at each "
                        "sparsity; there must be at least 1 and 2.")
    planned[name] = case
    for seed in seeds:
      for part in [("base",), *_courses(case, scores)]:
        record = _record(workdir / name, seed, *part)
        if record.is_file():
          check_same(record, json.loads(record.read_text())["config"], _settings(_config(case, seed, *part), case))
  config = cifarfs_maml.get_config()
  config.data_dir = data_dir
  splits = load_splits(config) if splits is None else splits
  for seed in seeds:
    for name, case in planned.items():
      run_case(workdir / name, case, seed, scores, splits, log)
  report = make_report(workdir)
  write_report(report, workdir)
  return report


def run_case(folder: Path, case: Case, seed: int, scores: Sequence[str], splits: Splits, log=print) -> None:
  """The base model of a seed, and each score's course from it, as far as they are not recorded."""
  folder.mkdir(parents=True, exist_ok=True)
  base, base_record = folder / f"seed-{seed}-base.npz", _record(folder, seed, "base")
  config = _config(case, seed, "base")
  if case.trained is not None and not base_record.is_file():
    _take(folder.parent / case.trained, base, base_record, _settings(config, case))
  if not (base.is_file() and base_record.is_file()):
    start = time.perf_counter()
    experiment = FewShot(config, splits)
    state = experiment.train(experiment.init(), case.steps)
    save_parameters(folder / "partial.npz", state.params)
    (folder / "partial.npz").replace(base)
    reporting.write_json(base_record, {
        "config": _settings(config, case), "steps": case.steps, "seconds": time.perf_counter() - start,
        "compile_seconds": experiment.clock.seconds["compile"], "episodes_per_second": experiment.episodes_per_second()})
  record = json.loads(base_record.read_text())
  unmeasured = [name for name in ("anp", *scores) if name != "none" and name not in record.get("agreement", {})]
  if not unmeasured and "accuracy" in record and all(_record(folder, seed, *part).is_file() for part in _courses(case, scores)):
    return
  experiment = FewShot(config, splits)  # its compiled evaluation is shared by all courses
  state = _with_parameters(experiment.init(), base)
  if "accuracy" not in record:
    before, after = experiment.evaluate(state, "test", config.test_episodes)
    record |= {"accuracy": after.tolist(), "before": before.tolist()}
    log(f"{case.title}, seed {seed}: {100 * after.mean():.2f} % after {case.steps} steps, {record['seconds']:.0f} s")
  if unmeasured:
    record["agreement"] = record.get("agreement", {}) | _agreement(experiment, state, unmeasured)
  reporting.write_json(base_record, record)
  for name, level_steps in _courses(case, scores):
    path = _record(folder, seed, name, level_steps)
    if not path.is_file():
      own = _config(case, seed, name, level_steps)
      record = {"config": _settings(own, case)} | _course(
          own, level_steps, base, splits, experiment.evaluate, pruned=name != "none")
      reporting.write_json(path, record)
      log(f"{case.title}, seed {seed}, {name}, {level_steps} steps: " + ", ".join(
          f"{100 * np.mean(level['accuracy']):.2f} % at {level['sparsity']:.2f}" for level in record["levels"])
          + f", {record['seconds']:.0f} s")


def _take(other: Path, base: Path, base_record: Path, settings: dict[str, Any]) -> None:
  """The model that another case trained, unless there is none or it was trained otherwise."""
  if (other / base.name).is_file() and (other / base_record.name).is_file():
    record = json.loads((other / base_record.name).read_text())
    trained = lambda config: {field: value for field, value in config.items() if field != "prune"}
    if trained(record["config"]) == trained(settings):
      shutil.copy(other / base.name, base)
      reporting.write_json(base_record, {field: value for field, value in record.items() if field not in _MEASURED} | {
          "config": settings})


# What is measured on a base model after its training.
_MEASURED = ("accuracy", "before", "agreement")


def _courses(case: Case, scores: Sequence[str]) -> list[tuple[str, int]]:
  """(score, steps per level), the longest for the main scores only."""
  return [(score, steps) for steps in sorted(case.level_steps) for score in scores
          if steps == min(case.level_steps) or score in MAIN]


def _record(folder: Path, seed: int, part: str, level_steps: int | None = None) -> Path:
  return folder / f"seed-{seed}-{part}{'' if level_steps is None else f'-{level_steps}'}.json"


def _config(case: Case, seed: int, part: str, level_steps: int | None = None):
  """The checked config of the base model, or of a score's course from it."""
  config = cifarfs_maml.get_config()
  config.update({"seed": seed, "steps": case.steps, "eval_every": case.steps} | case.fields)
  if level_steps is not None:
    config.prune.update(SCORES[part])
    config.update(steps=level_steps * len(LEVELS), eval_every=level_steps, outer_lr=config.outer_lr / 2)
  return check_config(config)


def _settings(config, case):
  """What a record's numbers depend on, as JSON has it."""
  free = ("data_dir", "mesh", "task_axis", "steps_per_dispatch", "name")
  fields = {name: value for name, value in config.to_dict().items() if name not in free}
  return json.loads(json.dumps(fields | {"base_steps": case.steps, "levels": LEVELS}))


def _with_parameters(state, path):
  """A state with the parameters of a file."""
  return state._replace(params=load_parameters(path)[0])


def _course(config, level_steps, base, splits, evaluate, pruned):
  """Meta-training through all levels from saved parameters: accuracies on test episodes at the end of each. The mask is made anew
  five times on the way to a level, in the first half of its steps, or the first 200; in the others what is left recovers."""
  start = time.perf_counter()
  experiment = FewShot(config, splits)
  restarts = optax.join_schedules([optax.cosine_decay_schedule(config.outer_lr, level_steps) for _ in LEVELS],
                                  [level_steps * i for i in range(1, len(LEVELS))])
  optimizer = optax.adam(restarts)
  if pruned:
    rising = min(level_steps // 2, 200)
    schedule = mg.staged_schedule(LEVELS, level_steps, every=max(1, rising // 5), ramp=rising / level_steps)
    optimizer = mg.gradual_pruning(optimizer, schedule, scope=config.prune.scope, granularity=config.prune.granularity,
                                   prunable=experiment.prunable)
  state = _with_parameters(experiment.init(optimizer), base)
  state = state._replace(key=jax.random.fold_in(state.key, 1))  # other episodes than the base model's
  levels = []

  def evaluated(state, loss):
    after = evaluate(state, "test", config.test_episodes)[1]
    levels.append({"sparsity": experiment.sparsity(state), "by_layer": experiment.sparsity_by_layer(state),
                   "train_loss": loss, "accuracy": after.tolist()})

  experiment.train(state, config.steps, evaluated, optimizer=optimizer)
  return {"levels": levels, "level_steps": level_steps, "seconds": time.perf_counter() - start}


def _agreement(experiment, state, names):
  """How these scores rank the weights of a trained network, against the exact ANP score: Spearman's correlation, and the share of
  the 15 % that its mask keeps which the other's keeps too. With what each costs, and the accuracies on validation episodes after
  pruning at once, without any training after it."""
  config = experiment.config
  episodes = jax.vmap(lambda key: experiment.sample(key, experiment.splits["train"]))(
      jax.random.split(jax.random.key(7), config.prune.episodes))
  params, loss = jax.device_get(state.params), mg.classification_loss(experiment.network)
  found, scores = {}, {}
  for name in dict.fromkeys(("anp", *names)):
    fields = config.copy_and_resolve_references()
    fields.prune.update(SCORES[name])
    score = make_score(fields, experiment.learner, loss) or (lambda params, *_: mg.magnitude_score(params))
    jitted = jax.jit(lambda params, episodes, score=score: score(params, episodes, jax.random.key(0), None, None))
    ready = jitted.lower(params, episodes).compile(compiler_options=compiler_options(convolutions=True))
    jax.block_until_ready(ready(params, episodes))
    start = time.perf_counter()
    scores[name] = jax.device_get(ready(params, episodes))
    found[name] = {"seconds": time.perf_counter() - start, "temporary_mb": ready.memory_analysis().temp_size_in_bytes / 2**20}
  prunable = experiment.prunable
  weights = lambda tree: np.concatenate([np.ravel(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
                                         if prunable(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)])
  flat = {name: weights(score) for name, score in scores.items()}
  mask_of = lambda name, sparsity: mg.make_mask(scores[name], sparsity, scope=SCORES[name].get("scope", "global"),
                                                granularity=config.prune.granularity, prunable=prunable)
  kept = {name: weights(mask_of(name, 0.85)) > 0 for name in scores}

  def accuracy(mask):
    pruned = state._replace(params=mg.apply_mask(params, mask), optimizer=mg.GradualPruningState(0, mask, ()))
    return experiment.evaluate(pruned, "validation", config.validation_episodes)[1].tolist()

  for name in names:
    found[name] |= {"spearman": float(stats.spearmanr(flat["anp"], flat[name]).statistic),
                    "kept_in_common": float((kept["anp"] & kept[name]).sum() / kept["anp"].sum()),
                    "at_once": [accuracy(mask_of(name, sparsity)) for sparsity in AT_ONCE]}
  return {name: found[name] for name in names}


def make_report(workdir: Path) -> dict[str, Any]:
  """Everything that the records of a workdir say, as numbers."""
  report = {"levels": LEVELS, "cases": {}}
  for name, case in CASES.items():
    bases = {int(path.stem.split("-")[1]): json.loads(path.read_text())
             for path in sorted((workdir / name).glob("seed-*-base.json"))}
    bases = {seed: record for seed, record in bases.items() if "accuracy" in record}
    if not bases:
      continue
    first = next(iter(bases.values()))
    entry = {"title": case.title, "steps": first["steps"], "seeds": sorted(bases),
             "episodes": len(first["accuracy"]), "base": _mean([bases[seed]["accuracy"] for seed in sorted(bases)]),
             "episodes_per_second": float(np.median([b["episodes_per_second"] for b in bases.values()])),
             "compile_seconds": float(np.median([b["compile_seconds"] for b in bases.values()])),
             "seconds": [b["seconds"] for b in bases.values()],
             "agreement": _agreements([bases[seed]["agreement"] for seed in sorted(bases)]), "courses": {}}
    records = {}
    for path in sorted((workdir / name).glob("seed-*-*-*.json")):
      _, seed, score, level_steps = path.stem.split("-")
      records.setdefault(int(level_steps), {}).setdefault(score, {})[int(seed)] = json.loads(path.read_text())["levels"]
    for level_steps, runs in sorted(records.items()):
      entry["courses"][str(level_steps)] = {score: _levels(score, runs, bases) for score in SCORES if score in runs}
    report["cases"][name] = entry
  return report


def _levels(score, runs, bases):
  """At each sparsity: accuracy over seeds and episodes, and on the same episodes the differences from the network before pruning
  and from other scores."""
  levels = []
  for i in range(len(LEVELS)):
    own = {seed: record[i] for seed, record in sorted(runs[score].items())}
    level = {"sparsity": float(np.mean([x["sparsity"] for x in own.values()])), "seeds": list(own),
             "train_loss": float(np.mean([x["train_loss"] for x in own.values()])),
             "accuracy": _mean([x["accuracy"] for x in own.values()]),
             "minus_base": _mean([np.subtract(x["accuracy"], bases[seed]["accuracy"]) for seed, x in own.items()])}
    for other in _COMPARED:
      both = [seed for seed in own if seed in runs.get(other, {})]
      if other != score and both:
        level[f"minus_{other}"] = _mean([np.subtract(own[seed]["accuracy"], runs[other][seed][i]["accuracy"]) for seed in both])
    levels.append(level)
  return levels


def _agreements(records):
  """The scores of the networks before pruning, over seeds."""
  found = {}
  for score in (score for score in SCORES if all(score in record for record in records)):
    own = [record[score] for record in records]
    found[score] = {key: float(np.mean([values[key] for values in own]))
                    for key in ("seconds", "temporary_mb", "spearman", "kept_in_common")}
    found[score]["at_once"] = [_mean(seeds) for seeds in zip(*(values["at_once"] for values in own))]
    if score != "anp":
      found[score]["anp_minus"] = [_mean([np.subtract(*pair) for pair in zip(ours, theirs)]) for ours, theirs in zip(
          zip(*(record["anp"]["at_once"] for record in records)), zip(*(values["at_once"] for values in own)))]
  return found


# What the ANP scores are compared with, episode by episode.
_COMPARED = ("none", "magnitude", "snip", "snip_signed")


def _mean(by_seed):
  """Mean, and half the 95 % interval over the episodes of all seeds; and the means of the seeds."""
  values = np.concatenate(by_seed)
  return {"mean": float(values.mean()), "ci95": float(1.96 * values.std(ddof=1) / np.sqrt(len(values))),
          "by_seed": [float(np.mean(seed)) for seed in by_seed]}


def overview(report: dict[str, Any]) -> str:
  """One table of all cases at the highest two sparsities."""
  shown = [score for score in MAIN if score != "none"]
  lines = ["| network and task | seeds | before pruning | steps per level | sparsity | not pruned | "
           + " | ".join(NAMES[score] for score in shown)
           + " | ANP minus before pruning | ANP minus not pruned | ANP minus SNIP | ANP minus magnitude |",
           "|---|" + "---|" * (len(shown) + 9)]
  for case in report["cases"].values():
    for level_steps, scores in case["courses"].items():
      for i in (-2, -1):
        accuracy = [_percent(scores[score][i]["accuracy"]) if score in scores else "" for score in ("none", *shown)]
        ours = scores.get("anp", ({},) * len(report["levels"]))[i]
        parts = [ours.get(f"minus_{other}") for other in ("base", "none", "snip", "magnitude")]
        seeds = min(len(levels[i]["seeds"]) for levels in scores.values())
        lines.append(f"| {case['title']} | {seeds} | {_percent(case['base'])} | {level_steps} | {100 * report['levels'][i]:.0f} % | "
                     + " | ".join(accuracy) + " | " + " | ".join(_points(part) if part else "" for part in parts) + " |")
  return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
  """The report's tables as text."""
  lines = []
  for case in report["cases"].values():
    lines += [f"**{case['title']}, CIFAR-FS (300 per class)**: {case['steps']:,} steps of meta-training; before pruning "
              f"{_percent(case['base'])} %. {len(case['seeds'])} seed(s), {case['episodes']:,} test episodes each; ± is half the 95 % "
              "interval over episodes.", ""]
    for level_steps, scores in case["courses"].items():
      lines += [f"Accuracy (%) with {level_steps} steps of meta-training at each sparsity:", "",
                "| score | seeds | " + " | ".join(f"{100 * level:.0f} %" for level in report["levels"]) + " |",
                "|---|---|" + "---|" * len(report["levels"])]
      for score, levels in scores.items():
        lines.append(f"| {NAMES[score]} | {len(levels[0]['seeds'])} | " + " | ".join(_percent(x["accuracy"]) for x in levels) + " |")
      ours = [score for score in scores if score.startswith("anp")]
      if ours:
        lines += ["", "Differences on the same episodes, in points, and by seed:", "",
                  "| score | sparsity | minus before pruning | " + " | ".join(f"minus {NAMES[other]}" for other in _COMPARED) + " |",
                  "|---|---|---|" + "---|" * len(_COMPARED)]
        for score in ours:
          for i in (i for i, level in enumerate(report["levels"]) if level >= 0.85):
            parts = [scores[score][i].get(f"minus_{other}") for other in ("base", *_COMPARED)]
            lines.append(f"| {NAMES[score]} | {100 * report['levels'][i]:.0f} % | "
                         + " | ".join(_points(part) if part else "" for part in parts) + " |")
      lines.append("")
    lines += ["The scores of the networks before pruning; accuracy (%) is on validation episodes after pruning at once, without any "
              "training, and in brackets how much better ANP's is, in points:", "",
              "| score | rank correlation with ANP | kept in common at 85 % | seconds | MB | "
              + " | ".join(f"{100 * sparsity:.0f} % at once" for sparsity in AT_ONCE) + " |",
              "|---|---|---|---|---|" + "---|" * len(AT_ONCE)]
    for score, values in case["agreement"].items():
      at_once = [_percent(part) for part in values["at_once"]]
      if "anp_minus" in values:
        at_once = [f"{part} ({100 * d['mean']:+.1f} ± {100 * d['ci95']:.1f})" for part, d in zip(at_once, values["anp_minus"])]
      lines.append(f"| {NAMES[score]} | {values['spearman']:.2f} | {100 * values['kept_in_common']:.0f} % | "
                   f"{values['seconds']:.2f} | {values['temporary_mb']:.0f} | " + " | ".join(at_once) + " |")
    lines.append("")
  return "\n".join(lines)


def _percent(value):
  return f"{100 * value['mean']:.1f} ± {100 * value['ci95']:.1f}"


def _points(value):
  by_seed = ", ".join(f"{100 * x:+.1f}" for x in value["by_seed"])
  return f"{100 * value['mean']:+.1f} ± {100 * value['ci95']:.1f}" + (f" ({by_seed})" if len(value["by_seed"]) > 1 else "")


def write_report(report: dict[str, Any], folder: Path) -> None:
  """`anp.json`, `anp.md`, and `anp.png`: accuracy against sparsity, a column per case, a row for few steps and one for many."""
  folder.mkdir(parents=True, exist_ok=True)
  reporting.write_json(folder / "anp.json", report)
  (folder / "anp.md").write_text(markdown(report))
  cases = [case for case in report["cases"].values() if case["courses"]]
  if not cases:
    return
  plt = reporting.pyplot()
  rows = max(len(case["courses"]) for case in cases)
  figure, axes = plt.subplots(rows, len(cases), figsize=(5 * len(cases), 3.6 * rows), layout="constrained", squeeze=False)
  for axis in axes.flat:
    axis.set_visible(False)
  for column, case in zip(axes.T, cases):
    for axis, (level_steps, scores) in zip(column, case["courses"].items()):
      axis.set_visible(True)
      for score, levels in scores.items():
        unpruned = score == "none"
        points = [case["base"], *(level["accuracy"] for level in levels)]
        axis.errorbar([0, *(100 * level for level in report["levels"])], [100 * point["mean"] for point in points],
                      yerr=[100 * point["ci95"] for point in points], fmt="--" if unpruned else "o-",
                      color="k" if unpruned else f"C{list(SCORES).index(score) - 1}", markersize=4, capsize=2,
                      label=NAMES[score] + (", same steps" if unpruned else ""))
      axis.set(xlabel="sparsity (%)", ylabel="accuracy (%)", title=f"{case['title']}\n{level_steps} steps per level")
      axis.grid(alpha=0.3)
      axis.legend(fontsize=6)
  figure.savefig(folder / "anp.png", dpi=120)
  plt.close(figure)

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
from experiments.paired import paired_difference
from experiments.programs import compiler_options
from experiments.training import load_parameters, save_parameters

__all__ = ["CASES", "LEVELS", "NAMES", "SCORES", "Case", "claims", "make_report", "markdown", "merge_reports", "overview",
           "reproduce", "run_case", "write_report"]

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
    partial = base.with_suffix(".partial.npz")
    save_parameters(partial, state.params)
    partial.replace(base)
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
    seconds = []
    for _ in range(3):
      start = time.perf_counter()
      scores[name] = jax.device_get(ready(params, episodes))
      seconds.append(time.perf_counter() - start)
    found[name] = {"seconds": float(np.median(seconds)), "temporary_mb": ready.memory_analysis().temp_size_in_bytes / 2**20}
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
  """Everything that the records of a workdir say, as numbers: each a mean with what it is made of, seed by seed."""
  report = {"levels": list(LEVELS), "cases": {}}
  for name, case in CASES.items():
    bases = {int(path.stem.split("-")[1]): json.loads(path.read_text())
             for path in sorted((workdir / name).glob("seed-*-base.json"))}
    bases = {seed: record for seed, record in sorted(bases.items()) if "accuracy" in record}
    if not bases:
      continue
    entry = {"title": case.title, "steps": next(iter(bases.values()))["steps"],
             "base": _pool({seed: record["accuracy"] for seed, record in bases.items()}),
             "agreement": _agreements({seed: record.get("agreement", {}) for seed, record in bases.items()}), "courses": {}}
    records = {}
    for path in sorted((workdir / name).glob("seed-*-*-*.json")):
      _, seed, score, level_steps = path.stem.split("-")
      records.setdefault(int(level_steps), {}).setdefault(score, {})[int(seed)] = _read_levels(path)
    for level_steps, runs in sorted(records.items()):
      entry["courses"][str(level_steps)] = {score: _levels(score, runs, bases) for score in SCORES if score in runs}
    report["cases"][name] = entry
  return report


def _read_levels(path):
  """The levels of a recorded course. Where whole filters go, each with how many every layer has left, and the share of the
  network's parameters that is left once the others are cut out: with a filter go the next layer's weights that read it."""
  record = json.loads(path.read_text())
  config = record["config"]
  if config["prune"]["granularity"] == "channel":
    layers = mg.network_layers(mg.FewShotConvNet(config["ways"], tuple(config["widths"])), (32, 32, 3))
    convolutions = {layer.name: layer.outputs for layer in layers if layer.kind == "conv"}
    for level in record["levels"]:
      pruned = lambda name: level["by_layer"].get(f"backbone/{name}/kernel", 0.0)
      level["filters"] = {name: round(width * (1 - pruned(name))) for name, width in convolutions.items()}
      level["sparsity"] = 1 - sum(level["filters"].values()) / sum(convolutions.values())  # older records have that of weights
      used = {name: np.arange(width) < level["filters"][name] for name, width in convolutions.items()}
      level["parameters"] = float(mg.gated_parameters(layers, used)) / mg.dense_cost(layers)[1]
  return record["levels"]


def _levels(score, runs, bases):
  """At each sparsity: accuracy over seeds and episodes, and on the same episodes the differences from the network before pruning
  and from other scores."""
  levels = []
  for i in range(len(LEVELS)):
    own = {seed: record[i] for seed, record in sorted(runs[score].items())}
    level = {field: _pool({seed: x[field] for seed, x in own.items()}) for field in ("sparsity", "train_loss", "accuracy")}
    if all("filters" in x for x in own.values()):
      level["parameters"] = _pool({seed: x["parameters"] for seed, x in own.items()})
      level["filters"] = {layer: _pool({seed: x["filters"][layer] for seed, x in own.items()})
                          for layer in next(iter(own.values()))["filters"]}
    level["minus_base"] = _pool({seed: np.subtract(x["accuracy"], bases[seed]["accuracy"]) for seed, x in own.items()})
    for other in _COMPARED:
      both = {seed: np.subtract(x["accuracy"], runs[other][seed][i]["accuracy"])
              for seed, x in own.items() if seed in runs.get(other, {})}
      if other != score and both:
        level[f"minus_{other}"] = _pool(both)
    levels.append(level)
  return levels


def _agreements(records):
  """The scores of the networks before pruning."""
  found = {}
  for score in (score for score in SCORES if any(score in record for record in records.values())):
    own = {seed: record[score] for seed, record in records.items() if score in record}
    fields = {field: {seed: values[field] for seed, values in own.items() if field in values}
              for field in ("seconds", "temporary_mb", "spearman", "kept_in_common")}
    found[score] = {field: _pool(by_seed) for field, by_seed in fields.items() if by_seed}
    at_once = lambda of: [_pool({seed: of(seed, i) for seed in own}) for i in range(len(AT_ONCE))]
    found[score]["at_once"] = at_once(lambda seed, i, own=own: own[seed]["at_once"][i])
    if score != "anp":
      found[score]["anp_minus"] = at_once(lambda seed, i, own=own: np.subtract(
          records[seed]["anp"]["at_once"][i], own[seed]["at_once"][i]))
  return found


# What the ANP scores are compared with, episode by episode.
_COMPARED = ("none", "magnitude", "magnitude_layer", "snip", "snip_signed")


def _pool(by_seed):
  """A statistic of numbers by seed, or of arrays over a seed's episodes."""
  parts = {}
  for seed, values in by_seed.items():
    values = np.atleast_1d(np.asarray(values, np.float64))
    parts[str(seed)] = {"mean": float(values.mean())}
    if len(values) > 1:
      parts[str(seed)] |= {"ci95": float(1.96 * values.std(ddof=1) / np.sqrt(len(values))), "episodes": len(values)}
  return _statistic(parts)


def _statistic(parts):
  """What is in the report for each quantity: by seed its mean, and half the 95 % interval over so many episodes; and both over the
  episodes of all seeds, as if they were computed from them together."""
  parts = dict(sorted(parts.items(), key=lambda part: int(part[0])))
  means = np.array([part["mean"] for part in parts.values()])
  if not all("ci95" in part for part in parts.values()):
    return {"mean": float(means.mean()), "by_seed": parts}
  count = np.array([part["episodes"] for part in parts.values()])
  within = np.array([part["ci95"] for part in parts.values()]) ** 2 * count * (count - 1) / 1.96**2
  mean = np.average(means, weights=count)
  squares = np.sum(within) + np.sum(count * (means - mean) ** 2)
  return {"mean": float(mean), "ci95": float(1.96 * np.sqrt(squares / (count.sum() - 1) / count.sum())), "by_seed": parts}


def merge_reports(held: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
  """The report of the seeds of both, so that seeds may be run on different machines.

  A seed that both have is the union of its courses if they start from the same network; if not, only `new` counts, since courses
  from different networks cannot be compared in pairs.

  Raises:
    ConfigError: the same case with other training or other levels.
  """
  if held["levels"] != new["levels"]:
    raise ConfigError(f"levels of sparsity are {held['levels']} in the recorded report and {new['levels']} in this.")
  cases = {}
  for name in (name for name in CASES if name in held["cases"] or name in new["cases"]):
    old, own = held["cases"].get(name), new["cases"].get(name)
    if old and own:
      for field in ("title", "steps"):
        if old[field] != own[field]:
          raise ConfigError(f"{name}: {field} is {old[field]} in the recorded report and {own[field]} in this.")
      bases = [case["base"]["by_seed"] for case in (old, own)]
      replaced = {seed for seed in bases[0] if seed in bases[1] and bases[0][seed] != bases[1][seed]}
      cases[name] = _merge(_without(old, replaced), own)
    else:
      cases[name] = old or own
    for level_steps, courses in cases[name]["courses"].items():  # in the order of the tables
      cases[name]["courses"][level_steps] = {score: courses[score] for score in SCORES if score in courses}
    cases[name]["courses"] = dict(sorted(cases[name]["courses"].items(), key=lambda course: int(course[0])))
    cases[name]["agreement"] = {score: cases[name]["agreement"][score] for score in SCORES if score in cases[name]["agreement"]}
  return {"levels": new["levels"], "cases": cases}


def _without(tree, seeds):
  """A report without some seeds; None where nothing is left."""
  if isinstance(tree, dict) and "by_seed" in tree:
    parts = {seed: part for seed, part in tree["by_seed"].items() if seed not in seeds}
    return _statistic(parts) if parts else None
  if isinstance(tree, dict):
    rest = {key: _without(value, seeds) for key, value in tree.items()}
    rest = {key: value for key, value in rest.items() if value is not None}
    return rest or None
  if isinstance(tree, list):
    rest = [_without(value, seeds) for value in tree]
    return rest if all(value is not None for value in rest) else None
  return tree


def _merge(held, new):
  if held is None or new is None:
    return held if new is None else new
  if isinstance(new, dict) and "by_seed" in new:
    return _statistic(held["by_seed"] | new["by_seed"])
  if isinstance(new, dict):
    return {key: _merge(held.get(key), new.get(key)) for key in dict.fromkeys([*held, *new])}
  if isinstance(new, list):
    return [_merge(*pair) for pair in zip(held, new, strict=True)]
  return new


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
        seeds = _seeds((scores["anp"] if "anp" in scores else next(iter(scores.values())))[i]["accuracy"])
        cell = lambda value, seeds=seeds: _percent(value) + (
            "" if _seeds(value) == seeds else f" ({_which_seeds(_seeds(value))} only)")
        accuracy = [cell(scores[score][i]["accuracy"]) if score in scores else "" for score in ("none", *shown)]
        ours = scores.get("anp", ({},) * len(report["levels"]))[i]
        parts = [ours.get(f"minus_{other}") for other in ("base", "none", "snip", "magnitude")]
        before = _without(case["base"], set(_seeds(case["base"])) - set(seeds))
        lines.append(f"| {case['title']} | {', '.join(seeds)} | {_percent(before)} | {level_steps} | "
                     f"{100 * report['levels'][i]:.0f} %"
                     f"{_what_is_left({score: scores[score] for score in MAIN if score in scores}, i)} | "
                     + " | ".join(accuracy) + " | " + " | ".join(_points(part) if part else "" for part in parts) + " |")
  return "\n".join(lines)


# What ANP is expected to do: sparsity, how it is said, the score it is compared with, and by how much it may be behind.
_CLAIMS = ((-2, "within 1 point of not pruned", "none", 0.01), (-2, "ahead of SNIP", "snip", 0.0),
           (-2, "ahead of magnitude", "magnitude", 0.0), (-1, "ahead of SNIP", "snip", 0.0), (-1, "ahead of magnitude", "magnitude", 0.0))


def claims(report: dict[str, Any]) -> str:
  """A table of what ANP is expected to do at the highest two sparsities, and in which cases the intervals say that it does.

  The interval is that over the means of the seeds (Student's t); with one seed it is over test episodes, and the cell says so.
  """
  lines = ["| network and task, steps per level | " + " | ".join(
      f"{100 * report['levels'][i]:.0f} %: {what}" for i, what, _, _ in _CLAIMS) + " |", "|---|" + "---|" * len(_CLAIMS)]
  for case in report["cases"].values():
    for level_steps, scores in case["courses"].items():
      if "anp" in scores:
        cells = [_verdict(scores["anp"][i].get(f"minus_{other}"), margin) for i, _, other, margin in _CLAIMS]
        lines.append(f"| {case['title']}, {level_steps} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _verdict(value, margin):
  if value is None:
    return "not run"
  difference, seeds = _over_seeds(value), len(value["by_seed"])
  if seeds == 1:
    difference = difference._replace(low=value["mean"] - value["ci95"], high=value["mean"] + value["ci95"])
  return f"{difference.verdict(margin)} ({f'{seeds} seeds' if seeds > 1 else '1 seed, over its episodes'})"


def markdown(report: dict[str, Any]) -> str:
  """The report's tables as text."""
  lines = []
  for case in report["cases"].values():
    lines += [f"**{case['title']}, CIFAR-FS (300 per class)**: {case['steps']:,} steps of meta-training; before pruning "
              f"{_percent(case['base'])} %. {_which_seeds(_seeds(case['base'])).capitalize()}, {_episodes(case['base'])} test episodes; ± is "
              "half the 95 % interval over the episodes of all seeds; a difference's “seeds ±” that over the means of the seeds "
              "(Student's t).", ""]
    for level_steps, scores in case["courses"].items():
      lines += [f"Accuracy (%) with {level_steps} steps of meta-training at each sparsity:", "",
                "| score | seeds | " + " | ".join(f"{100 * level:.0f} %" for level in report["levels"]) + " |",
                "|---|---|" + "---|" * len(report["levels"])]
      for score, levels in scores.items():
        lines.append(f"| {NAMES[score]} | {', '.join(_seeds(levels[0]['accuracy']))} | "
                     + " | ".join(_percent(x["accuracy"]) + _what_is_left({score: levels}, i) for i, x in enumerate(levels)) + " |")
      ours = [score for score in scores if score.startswith("anp")]
      if ours:
        compared = [other for other in _COMPARED if any(f"minus_{other}" in scores[score][0] for score in ours)]
        lines += ["", "Differences on the same episodes, in points, and by seed:", "",
                  "| score | sparsity | minus before pruning | " + " | ".join(f"minus {NAMES[other]}" for other in compared) + " |",
                  "|---|---|---|" + "---|" * len(compared)]
        for score in ours:
          for i in (i for i, level in enumerate(report["levels"]) if level >= 0.85):
            parts = [scores[score][i].get(f"minus_{other}") for other in ("base", *compared)]
            lines.append(f"| {NAMES[score]} | {100 * report['levels'][i]:.0f} % | "
                         + " | ".join(_points(part) if part else "" for part in parts) + " |")
      lines.append("")
    # Seeds without times are those timed with code of other speed.
    timed = {score: {seed: part["mean"] for seed, part in values.get("seconds", {"by_seed": {}})["by_seed"].items()}
             for score, values in case["agreement"].items()}
    lines += ["The scores of the networks before pruning; accuracy (%) is on validation episodes after pruning at once, without any "
              "training, and in brackets how much better ANP's is, in points"
              + (f"; time and MB of {_which_seeds(timed['anp'])}:" if timed["anp"] else ":"), "",
              "| score | seeds | rank correlation with ANP | kept in common at 85 % | time (ANP: 1) | MB | "
              + " | ".join(f"{100 * sparsity:.0f} % at once" for sparsity in AT_ONCE) + " |",
              "|---|---|---|---|---|---|" + "---|" * len(AT_ONCE)]
    for score, values in case["agreement"].items():
      # Within a seed, whose scores were timed on one machine; the median, as machines are shared.
      cost = ["", ""]
      if seconds := timed[score]:
        ratio = np.median([own / timed["anp"][seed] for seed, own in seconds.items()])
        cost = [f"{ratio:.2f}" + (f" ({np.median(list(seconds.values())):.1f} s)" if score == "anp" else ""),
                f"{values['temporary_mb']['mean']:.0f}"]
      at_once = [_percent(part) for part in values["at_once"]]
      if "anp_minus" in values:
        at_once = [f"{part} ({100 * d['mean']:+.1f} ± {100 * d['ci95']:.1f})" for part, d in zip(at_once, values["anp_minus"])]
      lines.append(f"| {NAMES[score]} | {', '.join(_seeds(values['spearman']))} | {values['spearman']['mean']:.2f} | "
                   f"{100 * values['kept_in_common']['mean']:.0f} % | " + " | ".join(cost + at_once) + " |")
    lines.append("")
  return "\n".join(lines)


def _percent(value):
  return f"{100 * value['mean']:.1f} ± {100 * value['ci95']:.1f}"


def _points(value):
  text = f"{100 * value['mean']:+.1f} ± {100 * value['ci95']:.1f}"
  over_seeds = _over_seeds(value)
  if over_seeds.high is None:
    return text
  by_seed = ", ".join(f"{100 * part['mean']:+.1f}" for part in value["by_seed"].values())
  return f"{text} ({by_seed}; seeds ± {50 * (over_seeds.high - over_seeds.low):.1f})"


def _over_seeds(value):
  means = {seed: part["mean"] for seed, part in value["by_seed"].items()}
  return paired_difference(means, dict.fromkeys(means, 0.0))


def _what_is_left(scores, i):
  """What is left at a level where whole filters go: of a given share of them, it depends on which."""
  parts = []
  for score, levels in scores.items():
    if score != "none" and "filters" in levels[i]:
      filters = "-".join(f"{layer['mean']:.0f}" for layer in levels[i]["filters"].values())
      name = f"{NAMES[score]} " if len(scores) > 1 else ""
      parts.append(f"{name}{filters}, {100 * levels[i]['parameters']['mean']:.1f} % of the parameters")
  return f" (left: {'; '.join(parts)})" if parts else ""


def _which_seeds(seeds):
  return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def _seeds(value):
  return list(value["by_seed"])


def _episodes(value):
  return " or ".join(f"{count:,}" for count in sorted({part["episodes"] for part in value["by_seed"].values()}))


def write_report(report: dict[str, Any], folder: Path) -> None:
  """`anp.json`, `anp.md`, and `anp.png`: accuracy against sparsity, a panel per case and length of its courses. A panel's curves are
  means over the seeds that all of `MAIN` have there, if there are any: seeds differ more than scores do. Other scores' curves are
  over those of them that they have."""
  folder.mkdir(parents=True, exist_ok=True)
  reporting.write_json(folder / "anp.json", report)
  (folder / "anp.md").write_text(markdown(report))
  panels = [(case, level_steps, scores) for case in report["cases"].values() for level_steps, scores in case["courses"].items()]
  if not panels:
    return
  plt = reporting.pyplot()
  columns = min(4, len(panels))
  rows = -(-len(panels) // columns)
  figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 4.2 * rows), layout="constrained", squeeze=False)
  for axis in axes.flat[len(panels):]:
    axis.set_visible(False)
  for axis, (case, level_steps, scores) in zip(axes.flat, panels):
    own = {score: set(_seeds(levels[0]["accuracy"])) for score, levels in scores.items()}
    common = set.intersection(*([own[score] for score in MAIN if score in own] or own.values()))
    for score, levels in scores.items():
      unpruned, seeds = score == "none", common & own[score] or own[score]
      points = [_without(point, set(_seeds(point)) - seeds) for point in (case["base"], *(level["accuracy"] for level in levels))]
      axis.errorbar([0, *(100 * level for level in report["levels"])], [100 * point["mean"] for point in points],
                    yerr=[100 * point["ci95"] for point in points], fmt="--" if unpruned else "o-",
                    color="k" if unpruned else f"C{list(SCORES).index(score) - 1}", markersize=4, capsize=2,
                    label=f"{NAMES[score]}{', same steps' if unpruned else ''} ({_which_seeds(sorted(seeds, key=int))})")
    axis.set(xlabel="sparsity (%)", ylabel="accuracy (%)", title=f"{case['title']}\n{level_steps} steps per level")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)  # below: in many a panel curves are everywhere
  figure.savefig(folder / "anp.png", dpi=120)
  plt.close(figure)

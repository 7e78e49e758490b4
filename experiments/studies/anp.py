"""Accuracy against sparsity of meta-trained networks, for every pruning score.

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
from typing import Any

import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy import stats

import metagater_jax as mg
from configs import cifarfs_maml
from experiments.config import ConfigError, registry
from experiments.config.fewshot import check_config
from experiments.config.fields import check_known
from experiments.reports.anp import make_report, write_report
from experiments.runs import placement
from experiments.runs.fewshot import FewShot, Splits, load_splits
from experiments.runs.programs import compiler_options
from experiments.runs.records import load_parameters, make_folder, save_parameters, write_json
from experiments.studies.anp_cases import AT_ONCE, CASES, LEVELS, MAIN, SCORES, Case
from experiments.studies.study import Part, carry_out, check_seeds, settings_of
from metagater_jax.core.trees import named_leaves

__all__ = ["reproduce", "run_case"]


def reproduce(
  workdir: str | Path,
  *,
  cases: Sequence[str] = tuple(CASES),
  seeds: Sequence[int] = (1, 2, 3),
  scores: Sequence[str] = tuple(SCORES),
  data_dir: str | None = None,
  steps: int | None = None,
  level_steps: Sequence[int] | None = None,
  splits: Splits | None = None,
  fields: dict[str, Any] | None = None,
  log=print,
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
      check_known(what, name, known)
  check_seeds(seeds)
  placement.use_cores(cifarfs_maml.get_config())  # before configs are checked, which uses JAX
  workdir, groups, planned = Path(workdir), {}, {}
  for seed in seeds:
    for name in cases:
      case = CASES[name]
      if steps is not None:
        case = case._replace(steps=steps, level_steps=tuple(dict.fromkeys(max(2, round(count * steps / case.steps)) for count in case.level_steps)))
      case = case._replace(
        level_steps=case.level_steps if level_steps is None else tuple(level_steps), fields=case.fields | {"data_dir": data_dir} | (fields or {})
      )
      if case.steps < 1 or not case.level_steps or min(case.level_steps) < 2:
        raise ConfigError(
          f"{name}: {case.steps} steps of meta-training and {', '.join(map(str, case.level_steps)) or 'none'} at each "
          "sparsity; there must be at least 1 and 2."
        )
      group = f"{case.title}, seed {seed}"
      planned[group] = workdir / name, case, seed
      # What the scores say of the base model is a part of its record that may be missing.
      groups[group] = [
        _part(workdir / name, case, seed, "base")._replace(complete=lambda record: _is_measured(record, scores)),
        *(_part(workdir / name, case, seed, *course) for course in _courses(case, scores)),
      ]
  config = cifarfs_maml.get_config()
  config.data_dir = data_dir
  splits = load_splits(config) if splits is None else splits

  def run(group, parts):
    del parts  # run_case looks itself, since all of a case starts from its base model
    run_case(*planned[group], scores, splits, log)
    return {}

  make_folder(workdir)
  carry_out(groups, run, log=log)
  report = make_report(workdir)
  write_report(report, workdir)
  return report


def _is_measured(path, scores):
  record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
  return "accuracy" in record and not _unmeasured(record, scores)


def _unmeasured(record, scores):
  """The scores whose agreement with ANP's is not measured yet."""
  return [name for name in ("anp", *scores) if name != "none" and name not in record.get("agreement", {})]


def run_case(folder: Path, case: Case, seed: int, scores: Sequence[str], splits: Splits, log=print) -> None:
  """The base model of a seed, and each score's course from it, as far as they are not recorded."""
  folder.mkdir(parents=True, exist_ok=True)
  base, base_record = folder / f"seed-{seed}-base.npz", _part(folder, case, seed, "base").record
  config = _config(case, seed, "base")
  if case.trained is not None and not base_record.is_file():
    _take(folder.parent / case.trained, base, base_record, _settings(case, seed, "base"))
  if not (base.is_file() and base_record.is_file()):
    start = time.perf_counter()
    experiment = FewShot(config, splits)
    state = experiment.train(experiment.init(), case.steps)
    partial = base.with_suffix(".partial.npz")
    save_parameters(partial, state.params)
    partial.replace(base)
    write_json(
      base_record,
      {
        "config": _settings(case, seed, "base"),
        "steps": case.steps,
        "seconds": time.perf_counter() - start,
        "compile_seconds": experiment.clock.seconds["compile"],
        "episodes_per_second": experiment.episodes_per_second(),
      },
    )
  record = json.loads(base_record.read_text(encoding="utf-8"))
  unmeasured = _unmeasured(record, scores)
  experiment = FewShot(config, splits)  # its compiled evaluation is shared by all courses
  state = _with_parameters(experiment.init(), base)
  if "accuracy" not in record:
    before, after = experiment.evaluate(state, "test", config.test_episodes)
    record |= {"accuracy": after.tolist(), "before": before.tolist()}
    log(f"{case.title}, seed {seed}: {100 * after.mean():.2f} % after {case.steps} steps, {record['seconds']:.0f} s")
  if unmeasured:
    record["agreement"] = record.get("agreement", {}) | _agreement(experiment, state, unmeasured)
  write_json(base_record, record)
  for name, level_steps in _courses(case, scores):
    part = _part(folder, case, seed, name, level_steps)
    if not part.finished:
      record = {"config": settings_of(part)} | _course(part.config, level_steps, base, splits, experiment.evaluate, pruned=name != "none")
      write_json(part.record, record)
      log(
        f"{case.title}, seed {seed}, {name}, {level_steps} steps: "
        + ", ".join(f"{100 * np.mean(level['accuracy']):.2f} % at {level['sparsity']:.2f}" for level in record["levels"])
        + f", {record['seconds']:.0f} s"
      )


def _take(other: Path, base: Path, base_record: Path, settings: dict[str, Any]) -> None:
  """The model that another case trained, unless there is none or it was trained otherwise."""
  if (other / base.name).is_file() and (other / base_record.name).is_file():
    record = json.loads((other / base_record.name).read_text(encoding="utf-8"))
    trained = lambda config: {field: value for field, value in config.items() if field != "prune"}
    if trained(record["config"]) == trained(settings):
      shutil.copy(other / base.name, base)
      write_json(base_record, {field: value for field, value in record.items() if field not in _MEASURED} | {"config": settings})


# What is measured on a base model after its training.
_MEASURED = ("accuracy", "before", "agreement")


def _courses(case: Case, scores: Sequence[str]) -> list[tuple[str, int]]:
  """(score, steps per level), the longest for the main scores only."""
  return [(score, steps) for steps in sorted(case.level_steps) for score in scores if steps == min(case.level_steps) or score in MAIN]


def _config(case: Case, seed: int, part: str, level_steps: int | None = None):
  """The checked config of the base model, or of a score's course from it."""
  config = cifarfs_maml.get_config()
  config.update({"seed": seed, "steps": case.steps, "eval_every": case.steps} | case.fields)
  if level_steps is not None:
    config.prune.update(SCORES[part].fields)
    config.update(steps=level_steps * len(LEVELS), eval_every=level_steps, outer_lr=config.outer_lr / 2)
  return check_config(config)


def _part(folder: Path, case: Case, seed: int, part: str, level_steps: int | None = None) -> Part:
  """The base model, or a score's course from it."""
  record = folder / f"seed-{seed}-{part}{'' if level_steps is None else f'-{level_steps}'}.json"
  return Part(record, _config(case, seed, part, level_steps), {"base_steps": case.steps, "levels": LEVELS}, seed)


def _settings(case, seed, part):
  return settings_of(_part(Path(), case, seed, part))


def _with_parameters(state, path):
  """A state with the parameters of a file."""
  return state._replace(params=load_parameters(path)[0])


def _course(config, level_steps, base, splits, evaluate, pruned):
  """Meta-training through all levels from saved parameters: accuracies on test episodes at the end of each. The mask is made anew
  five times on the way to a level, in the first half of its steps, or the first 200; in the others what is left recovers."""
  start = time.perf_counter()
  experiment = FewShot(config, splits)
  restarts = optax.join_schedules(
    [optax.cosine_decay_schedule(config.outer_lr, level_steps) for _ in LEVELS], [level_steps * i for i in range(1, len(LEVELS))]
  )
  optimizer = optax.adam(restarts)
  if pruned:
    rising = min(level_steps // 2, 200)
    schedule = mg.pruning.staged_schedule(LEVELS, level_steps, every=max(1, rising // 5), ramp=rising / level_steps)
    optimizer = mg.gradual_pruning(optimizer, schedule, **registry.pruning_options(config.prune, experiment.network, experiment.image_shape))
  state = _with_parameters(experiment.init(optimizer), base)
  state = state._replace(key=jax.random.fold_in(state.key, 1))  # other episodes than the base model's
  levels = []

  def evaluated(state, loss):
    after = evaluate(state, "test", config.test_episodes)[1]
    levels.append(
      {"sparsity": experiment.sparsity(state), "by_layer": experiment.sparsity_by_layer(state), "train_loss": loss, "accuracy": after.tolist()}
    )

  experiment.train(state, config.steps, evaluated, optimizer=optimizer)
  return {"levels": levels, "level_steps": level_steps, "seconds": time.perf_counter() - start}


def _agreement(experiment, state, names):
  """How these scores rank the weights of a trained network, against the exact ANP score: Spearman's correlation, and the share of
  the 15 % that its mask keeps which the other's keeps too. How each ranks weights against what removing them one by one does to the
  meta-objective (Spearman's correlation, `removal`). With what each costs, and the accuracies on validation episodes after
  pruning at once, without any training after it."""
  config = experiment.config
  episodes = jax.vmap(lambda key: experiment.sample(key, experiment.splits["train"]))(jax.random.split(jax.random.key(7), config.prune.episodes))
  params = jax.device_get(state.params)
  found, scores = {}, {}
  for name in dict.fromkeys(("anp", *names)):
    fields = config.copy_and_resolve_references()
    fields.prune.update(SCORES[name].fields)
    score = experiment.make_score(fields.prune)
    jitted = jax.jit(lambda params, episodes, score=score: score(params, episodes, jax.random.key(0), task_axis=config.task_axis))
    ready = jitted.lower(params, episodes).compile(compiler_options=compiler_options(experiment.network.small))
    jax.block_until_ready(ready(params, episodes))
    seconds = []
    for _ in range(3):
      start = time.perf_counter()
      scores[name] = jax.device_get(ready(params, episodes))
      seconds.append(time.perf_counter() - start)
    found[name] = {"seconds": float(np.median(seconds)), "temporary_mb": ready.memory_analysis().temp_size_in_bytes / 2**20}
  prunable = experiment.prunable
  weights = lambda tree: np.concatenate([np.ravel(leaf) for name, leaf in named_leaves(tree).items() if prunable(name, leaf)])
  flat = {name: weights(score) for name, score in scores.items()}
  mask_of = lambda name, sparsity: mg.make_mask(
    scores[name], sparsity, scope=SCORES[name].fields.get("scope", "global"), granularity=config.prune.granularity, prunable=prunable
  )
  kept = {name: weights(mask_of(name, 0.85)) > 0 for name in scores}

  def accuracy(mask):
    pruned = state._replace(params=mg.pruning.apply_mask(params, mask), optimizer=mg.pruning.GradualPruningState(0, mask, ()))
    return experiment.evaluate(pruned, "validation", config.validation_episodes)[1].tolist()

  true = _effect_of_removal(experiment, params, episodes)
  for name in names:
    found[name] |= {"removal": float(stats.spearmanr(true, _flat(scores[name])[_places(experiment, params)]).statistic)}
    found[name] |= {
      "spearman": float(stats.spearmanr(flat["anp"], flat[name]).statistic),
      "kept_in_common": float((kept["anp"] & kept[name]).sum() / kept["anp"].sum()),
      "at_once": [accuracy(mask_of(name, sparsity)) for sparsity in AT_ONCE],
    }
  return {name: found[name] for name in names}


# Weights that are removed one by one.
REMOVED = 300


def _places(experiment, params):
  """Some of the prunable weights, by their place in all parameters one after the other."""
  sizes = {name: leaf.size for name, leaf in named_leaves(params).items()}
  starts = dict(zip(sizes, np.cumsum([0, *sizes.values()])))
  prunable = np.concatenate([np.arange(sizes[name]) + starts[name] for name, leaf in named_leaves(params).items() if experiment.prunable(name, leaf)])
  return np.sort(np.random.default_rng(0).choice(prunable, min(REMOVED, len(prunable)), replace=False))


def _flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _effect_of_removal(experiment, params, episodes):
  """Mean over episodes of |L_query after adaptation without a weight − with it|, by weight of `_places`: removed is removed in the inner loop,
  too, as pruning does it."""
  ones, unravel = ravel_pytree(jax.tree.map(np.ones_like, params))

  @jax.jit
  def losses(params, episodes, place):
    mask = unravel(ones.at[place].set(0.0, mode="drop"))
    return jax.lax.map(lambda episode: experiment.learner.meta_loss(params, episode, mask=mask), episodes)

  whole = np.asarray(losses(params, episodes, ones.size), np.float64)  # a place that is none
  return np.array([np.abs(np.asarray(losses(params, episodes, place), np.float64) - whole).mean() for place in _places(experiment, params)])

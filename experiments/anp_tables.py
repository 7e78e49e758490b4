"""`python -m experiments.tables --tables=anp`: accuracy against sparsity of meta-trained networks, for every pruning score.

A network is meta-trained once per seed. From there every score prunes it in stages, level after level, with the same steps of
meta-training at each; "none" trains as many steps on without pruning, and is what the others are compared with. All of them
are measured on the same test episodes, so differences are paired. A finished part is recorded and not run again.
"""

import json
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

__all__ = ["CASES", "LEVELS", "SCORES", "Case", "make_report", "markdown", "reproduce", "run_case", "write_report"]

LEVELS = (0.5, 0.7, 0.85, 0.95)
# Sparsities at which a trained network is pruned at once, without training after it.
AT_ONCE = (0.3, 0.5, 0.7)
# Name in the tables to fields of `prune`.
SCORES = {"none": {}, "anp": {"score": "anp", "average": "signed"}, "anp_absolute": {"score": "anp", "average": "absolute"},
          "anp_first_order": {"score": "anp", "average": "absolute", "derivative": "first_order"},
          "anp_layer": {"score": "anp", "average": "absolute", "scope": "layer"}, "snip": {"score": "snip", "average": "signed"},
          "snip_absolute": {"score": "snip", "average": "absolute"}, "magnitude": {"score": "magnitude"},
          "random": {"score": "random"}}


class Case(NamedTuple):
  """A network and a kind of episodes; `steps` of meta-training, then `level_steps` at each level of sparsity."""

  title: str
  fields: dict[str, Any]
  steps: int
  level_steps: int


CASES = {
    "conv4-1": Case("Conv-4, 5-way 1-shot", {"shots": 1}, 8000, 400),
    "conv4-5": Case("Conv-4, 5-way 5-shot", {"shots": 5}, 4000, 400),
    "resnet12-1": Case("ResNet-12 (16-32-64-128), 5-way 1-shot", {
        "shots": 1, "model": "resnet12", "widths": (16, 32, 64, 128)}, 2000, 200),
    "resnet12-5": Case("ResNet-12 (16-32-64-128), 5-way 5-shot", {
        "shots": 5, "model": "resnet12", "widths": (16, 32, 64, 128)}, 1000, 100),
}


def reproduce(workdir: str | Path, *, cases: Sequence[str] = tuple(CASES), seeds: Sequence[int] = (1, 2, 3),
              scores: Sequence[str] = tuple(SCORES), data_dir: str | None = None, steps: int | None = None,
              level_steps: int | None = None, splits: Splits | None = None, fields: dict[str, Any] | None = None, log=print
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
  workdir = Path(workdir)
  planned = {}
  for name in cases:
    case = CASES[name]
    if steps is not None:
      case = case._replace(steps=steps, level_steps=round(case.level_steps * steps / case.steps))
    case = case._replace(level_steps=case.level_steps if level_steps is None else level_steps,
                         fields=case.fields | {"data_dir": data_dir} | (fields or {}))
    if case.steps < 1 or case.level_steps < 2:
      raise ConfigError(f"{name}: {case.steps} steps of meta-training and {case.level_steps} at each sparsity; there must be at "
                        "least 1 and 2.")
    planned[name] = case
    for seed in seeds:
      for part in ("base", *scores):
        record = _record(workdir / name, seed, part)
        if record.is_file():
          check_same(record, json.loads(record.read_text())["config"], _settings(_config(case, seed, part), case))
  config = cifarfs_maml.get_config()
  config.data_dir = data_dir
  placement.use_cores(config)
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
  if "accuracy" not in record:
    experiment = FewShot(config, splits)
    state = _with_parameters(experiment.init(), base)
    before, after = experiment.evaluate(state, "test", config.test_episodes)
    reporting.write_json(base_record, record | {"accuracy": after.tolist(), "before": before.tolist(),
                                                "agreement": _agreement(experiment, state)})
    log(f"{case.title}, seed {seed}: {100 * after.mean():.2f} % after {case.steps} steps, {record['seconds']:.0f} s")
  for name in scores:
    path = _record(folder, seed, name)
    if not path.is_file():
      record = _course(_config(case, seed, name), case, base, splits, pruned=name != "none")
      reporting.write_json(path, record)
      log(f"{case.title}, seed {seed}, {name}: " + ", ".join(
          f"{100 * np.mean(level['accuracy']):.2f} % at {level['sparsity']:.2f}" for level in record["levels"])
          + f", {record['seconds']:.0f} s")


def _record(folder: Path, seed: int, part: str) -> Path:
  return folder / f"seed-{seed}-{part}.json"


def _config(case: Case, seed: int, part: str):
  """The checked config of the base model, or of a score's course from it."""
  config = cifarfs_maml.get_config()
  config.update({"seed": seed, "steps": case.steps, "eval_every": case.steps} | case.fields)
  if part != "base":
    config.prune.update(SCORES[part])
    config.update(steps=case.level_steps * len(LEVELS), eval_every=case.level_steps, outer_lr=config.outer_lr / 2)
  return check_config(config)


def _settings(config, case):
  """What a record's numbers depend on, as JSON has it."""
  free = ("data_dir", "mesh", "task_axis", "steps_per_dispatch", "name")
  fields = {name: value for name, value in config.to_dict().items() if name not in free}
  return json.loads(json.dumps(fields | {"base_steps": case.steps, "levels": LEVELS}))


def _with_parameters(state, path):
  """A state with the parameters of a file."""
  return state._replace(params=load_parameters(path)[0])


def _course(config, case, base, splits, pruned):
  """Meta-training through all levels from saved parameters: accuracies on test episodes at the end of each."""
  start = time.perf_counter()
  experiment = FewShot(config, splits)
  restarts = optax.join_schedules([optax.cosine_decay_schedule(config.outer_lr, case.level_steps) for _ in LEVELS],
                                  [case.level_steps * i for i in range(1, len(LEVELS))])
  optimizer = optax.adam(restarts)
  if pruned:
    schedule = mg.staged_schedule(LEVELS, case.level_steps, every=max(1, case.level_steps // 10))
    optimizer = mg.gradual_pruning(optimizer, schedule, scope=config.prune.scope, granularity=config.prune.granularity,
                                   prunable=experiment.prunable)
  state = _with_parameters(experiment.init(optimizer), base)
  state = state._replace(key=jax.random.fold_in(state.key, 1))  # other episodes than the base model's
  levels = []

  def evaluated(state, loss):
    before, after = experiment.evaluate(state, "test", config.test_episodes)
    levels.append({"sparsity": experiment.sparsity(state), "by_layer": experiment.sparsity_by_layer(state),
                   "train_loss": loss, "accuracy": after.tolist()})

  experiment.train(state, config.steps, evaluated, optimizer=optimizer)
  return {"config": _settings(config, case), "levels": levels, "level_steps": case.level_steps,
          "seconds": time.perf_counter() - start}


def _agreement(experiment, state):
  """How the scores rank the weights of a trained network, against the exact signed ANP score: Spearman's correlation, and the share of
  the 15 % that its mask keeps which the other's keeps too. With what each costs, and the accuracy on validation episodes after
  pruning at once, without any training after it."""
  config = experiment.config
  episodes = jax.vmap(lambda key: experiment.sample(key, experiment.splits["train"]))(
      jax.random.split(jax.random.key(7), config.prune.episodes))
  params, loss = jax.device_get(state.params), mg.classification_loss(experiment.network)
  found, scores = {}, {}
  names = [name for name in SCORES if name != "none"]
  for name in names:
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
  mask_of = lambda name, sparsity: mg.make_mask(scores[name], sparsity, scope=SCORES[name].get("scope", "global"), prunable=prunable)
  kept = {name: weights(mask_of(name, 0.85)) > 0 for name in names}

  def accuracy(mask):
    pruned = state._replace(params=mg.apply_mask(params, mask), optimizer=mg.GradualPruningState(0, mask, ()))
    return float(experiment.evaluate(pruned, "validation", config.validation_episodes)[1].mean())

  for name in names:
    found[name] |= {"spearman": float(stats.spearmanr(flat["anp"], flat[name]).statistic),
                    "kept_in_common": float((kept["anp"] & kept[name]).sum() / kept["anp"].sum()),
                    "at_once": [accuracy(mask_of(name, sparsity)) for sparsity in AT_ONCE]}
  return found


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
             "agreement": {score: {key: np.mean([b["agreement"][score][key] for b in bases.values()], axis=0).tolist()
                                   for key in values} for score, values in first["agreement"].items()}, "scores": {}}
    runs = {score: {int(path.stem.split("-")[1]): json.loads(path.read_text())
                    for path in sorted((workdir / name).glob(f"seed-*-{score}.json"))} for score in SCORES}
    for score, records in runs.items():
      levels = []
      for i in range(len(LEVELS) if records else 0):
        own = {seed: record["levels"][i] for seed, record in records.items()}
        level = {"sparsity": float(np.mean([x["sparsity"] for x in own.values()])), "seeds": sorted(own),
                 "accuracy": _mean([x["accuracy"] for x in own.values()])}
        for other in _COMPARED:
          both = sorted(set(own) & set(runs[other]))
          if other != score and both:
            level[f"minus_{other}"] = _mean([np.subtract(own[seed]["accuracy"], runs[other][seed]["levels"][i]["accuracy"])
                                             for seed in both])
        levels.append(level)
      if levels:
        entry["level_steps"] = next(iter(records.values()))["level_steps"]
        entry["scores"][score] = levels
    report["cases"][name] = entry
  return report


# What the ANP scores are compared with, episode by episode.
_COMPARED = ("none", "magnitude", "snip", "snip_absolute")


def _mean(by_seed):
  """Mean, and half the 95 % interval over the episodes of all seeds; and the means of the seeds."""
  values = np.concatenate(by_seed)
  return {"mean": float(values.mean()), "ci95": float(1.96 * values.std(ddof=1) / np.sqrt(len(values))),
          "by_seed": [float(np.mean(seed)) for seed in by_seed]}


_NAMES = {"none": "not pruned", "anp": "ANP (exact, signed)", "anp_absolute": "ANP (exact)", "anp_first_order": "ANP (first-order)",
          "anp_layer": "ANP (exact, layer-wise)", "snip": "SNIP / Taylor on the ordinary loss, signed",
          "snip_absolute": "SNIP / Taylor on the ordinary loss", "magnitude": "magnitude", "random": "random"}


def markdown(report: dict[str, Any]) -> str:
  """The report's tables as text."""
  lines = []
  percent = lambda value: f"{100 * value['mean']:.1f} ± {100 * value['ci95']:.1f}"
  for case in report["cases"].values():
    lines += [f"**{case['title']}, CIFAR-FS (300 per class)**: {case['steps']:,} steps of meta-training, then "
              f"{case.get('level_steps', 0):,} at each sparsity; {len(case['seeds'])} seed(s), {case['episodes']:,} test episodes "
              f"each; accuracy (%) ± 95 % interval. Before pruning: {percent(case['base'])}.", "",
              "| score | " + " | ".join(f"{100 * level:.0f} %" for level in report["levels"]) + " |",
              "|---|" + "---|" * len(report["levels"])]
    for score, levels in case["scores"].items():
      lines.append(f"| {_NAMES[score]} | " + " | ".join(percent(level["accuracy"]) for level in levels) + " |")
    ours = [score for score in case["scores"] if score.startswith("anp")]
    if ours:
      lines += ["", "Differences on the same episodes, in points ± 95 % interval:", "",
                "| score | sparsity | " + " | ".join(f"minus {_NAMES[other]}" for other in _COMPARED) + " |",
                "|---|---|" + "---|" * len(_COMPARED)]
      for score in ours:
        for i in (i for i, level in enumerate(report["levels"]) if level >= 0.85):
          parts = [case["scores"][score][i].get(f"minus_{other}") for other in _COMPARED]
          lines.append(f"| {_NAMES[score]} | {100 * report['levels'][i]:.0f} % | " + " | ".join(
              f"{100 * part['mean']:+.1f} ± {100 * part['ci95']:.1f}" if part else "" for part in parts) + " |")
    lines += ["", "The scores of the network before pruning; accuracy is on validation episodes after pruning at once, without any "
              "training:", "", "| score | rank correlation with ANP (exact, signed) | kept in common at 85 % | seconds | MB | "
              + " | ".join(f"{100 * sparsity:.0f} % at once" for sparsity in AT_ONCE) + " |",
              "|---|---|---|---|---|" + "---|" * len(AT_ONCE)]
    for score, values in case["agreement"].items():
      lines.append(f"| {_NAMES[score]} | {values['spearman']:.2f} | {100 * values['kept_in_common']:.0f} % | "
                   f"{values['seconds']:.2f} | {values['temporary_mb']:.0f} | "
                   + " | ".join(f"{100 * accuracy:.1f}" for accuracy in values["at_once"]) + " |")
    lines.append("")
  return "\n".join(lines)


def write_report(report: dict[str, Any], folder: Path) -> None:
  """`anp.json`, `anp.md`, and `anp.png`: accuracy against sparsity, a panel per case."""
  folder.mkdir(parents=True, exist_ok=True)
  reporting.write_json(folder / "anp.json", report)
  (folder / "anp.md").write_text(markdown(report))
  cases = [case for case in report["cases"].values() if case["scores"]]
  if not cases:
    return
  plt = reporting.pyplot()
  figure, axes = plt.subplots(1, len(cases), figsize=(5 * len(cases), 4), layout="constrained", squeeze=False)
  for axis, case in zip(axes[0], cases):
    for score, levels in case["scores"].items():
      axis.errorbar([100 * level for level in report["levels"]], [100 * level["accuracy"]["mean"] for level in levels],
                    yerr=[100 * level["accuracy"]["ci95"] for level in levels], fmt="k--" if score == "none" else "o-",
                    markersize=4, capsize=2, label=_NAMES[score] + (", same steps" if score == "none" else ""))
    axis.set(xlabel="sparsity (%)", ylabel="accuracy (%)", title=case["title"])
    axis.grid(alpha=0.3)
  axes[0, 0].legend(fontsize=7)
  figure.savefig(folder / "anp.png", dpi=120)
  plt.close(figure)

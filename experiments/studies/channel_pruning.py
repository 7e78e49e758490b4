"""Whole filters of a few-shot network pruned to a share of its work, by each way of choosing them, and what their files cost on a device.

A network is meta-trained once per seed. From it every way prunes to one level of multiply-accumulates after the other, with steps of meta-training
at each: in the first half of them the mask grows, in the rest the network recovers. "none" trains on as long. "narrow" is a dense network of the
level's work, trained from the start for as many steps in all: what pruning must beat to be worth anything. All are measured on the same episodes.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import metagater_jax as mg
from configs import cifarfs_maml
from experiments.config import ConfigError, registry
from experiments.config.fewshot import check_config, make_network
from experiments.config.fields import check_known
from experiments.runs import placement
from experiments.runs.deploy import WRITERS
from experiments.runs.fewshot import FewShot, Splits, load_splits
from experiments.runs.records import load_parameters, make_folder, save_parameters, write_json
from experiments.runs.runtimes import RUNTIMES, interleaved
from experiments.studies.study import Part, carry_out, check_seeds, settings_of

__all__ = ["CASES", "LEVELS", "WAYS", "reproduce"]

# Fractions of the multiply-accumulates that are gone.
LEVELS = (0.5, 0.75)
_ANIL = {"learner": "anil", "train_queries": 5, "shots": 1}


class Case(NamedTuple):
  """A network on CIFAR-FS: fields of its config, steps of meta-training and steps at each level."""

  title: str
  fields: dict[str, Any]
  steps: int
  level_steps: int


CASES = {
  "conv4": Case("Conv-4 (64), ANIL, 5-way 1-shot", _ANIL | {"widths": (64, 64, 64, 64)}, 8000, 400),
  "resnet12": Case("ResNet-12 (16-32-64-128), ANIL, 5-way 1-shot", _ANIL | {"model": "resnet12", "widths": (16, 32, 64, 128)}, 4000, 400),
}


class Way(NamedTuple):
  """A way to prune: what a reader sees of it, and fields of a config's part `prune`; without any, it is a training of its own."""

  label: str
  prune: dict[str, Any] | None = None


_CHANNELS = {"granularity": "channel", "scope": "macs"}
WAYS = {
  "none": Way("not pruned, trained on"),
  "narrow": Way("dense and narrow from the start"),
  "anp": Way("ANP of whole filters, by MACs", _CHANNELS | {"score": "anp"}),
  "anp_sum": Way("ANP summed over a filter's weights, by MACs", _CHANNELS | {"score": "anp", "channel_score": "sum"}),
  "anp_layer": Way("ANP of whole filters, the same share of each layer", _CHANNELS | {"score": "anp", "scope": "layer"}),
  "snip": Way("SNIP of whole filters, by MACs", _CHANNELS | {"score": "snip"}),
  "magnitude": Way("magnitude summed over a filter's weights, by MACs", _CHANNELS | {"score": "magnitude"}),
  "random": Way("random filters, by MACs", _CHANNELS | {"score": "random"}),
}


def reproduce(
  workdir: str | Path,
  *,
  cases: Sequence[str] = tuple(CASES),
  ways: Sequence[str] = tuple(WAYS),
  seeds: Sequence[int] = (8, 9),
  levels: Sequence[float] = LEVELS,
  data_dir: str | None = None,
  steps: int | None = None,
  level_steps: int | None = None,
  splits: Splits | None = None,
  fields: Mapping[str, Any] | None = None,
  log=print,
) -> dict[str, Any]:
  """Runs what is not yet recorded.

  Args:
    workdir: holds the records, one per case, seed and way, and the networks before pruning.
    cases, ways: names in `CASES` and `WAYS`.
    seeds: of initialization and training episodes; test episodes are the same for all.
    levels: fractions of the multiply-accumulates that are gone, increasing.
    data_dir: where CIFAR-100 is.
    steps, level_steps: instead of the cases' own.
    splits: pools to use instead of CIFAR-FS.
    fields: of the config, over the cases' own.
    log: gets a line per finished part.

  Returns:
    The records: `levels`, and by case its title, ways and seeds (`experiments.reports.channel_pruning` makes tables of it).

  Raises:
    ConfigError: before anything runs: unknown names, no seeds, levels that do not increase, missing data, or records of another configuration.
  """
  for what, names, known in (("case", cases, CASES), ("way", ways, WAYS)):
    for name in names:
      check_known(what, name, known)
  check_seeds(seeds)
  if list(levels) != sorted(set(levels)) or not levels or not 0 < levels[0] <= levels[-1] < 1:
    raise ConfigError(f"levels must increase and lie between 0 and 1, got {tuple(levels)}.")
  workdir, planned, groups = Path(workdir), {}, {}
  placement.use_cores(cifarfs_maml.get_config())
  for case_name in cases:
    case = CASES[case_name]._replace(fields=CASES[case_name].fields | {"data_dir": data_dir} | dict(fields or {}))
    case = case._replace(steps=steps or case.steps, level_steps=level_steps or case.level_steps)
    if case.level_steps < 4:
      raise ConfigError(f"level_steps must be at least 4, to prune and to recover, got {case.level_steps}.")
    for seed in seeds:
      for way in ("base", *ways):
        name = f"{case.title}, seed {seed}, {WAYS[way].label if way in WAYS else 'before pruning'}"
        record = workdir / case_name / f"seed-{seed}-{way}.json"
        groups[name] = [Part(record, _config(case, seed, way), {"levels": list(levels), "base_steps": case.steps, "way": way}, seed)]
        planned[name] = case, seed, way
  config = cifarfs_maml.get_config()
  config.data_dir = data_dir
  splits = load_splits(config) if splits is None else splits

  def run(name, parts):
    case, seed, way = planned[name]
    record = parts[0].record
    record.parent.mkdir(parents=True, exist_ok=True)
    base = record.with_name(f"seed-{seed}-base.npz")
    start = time.perf_counter()
    found = (_base if way == "base" else _narrow if way == "narrow" else _course)(parts[0].config, case, way, base, splits, levels)
    found["seconds"] = time.perf_counter() - start
    write_json(record, {"config": settings_of(parts[0])} | found)
    return {record: found}

  def line(name, outcomes, seconds):
    own = next(iter(outcomes.values()))
    return (
      f"{name}: "
      + ", ".join(f"{100 * np.mean(level['accuracy']):.2f} % at {level['macs'] / own['dense_macs']:.2f} of the MACs" for level in own["levels"])
      + f" ({seconds:.0f} s)"
    )

  make_folder(workdir)
  carry_out(groups, run, line=line, log=log)
  found: dict[str, Any] = {"levels": list(levels), "cases": {}}
  for case_name in cases:
    own = {}
    for way in ("base", *ways):
      records = {str(seed): json.loads((workdir / case_name / f"seed-{seed}-{way}.json").read_text(encoding="utf-8")) for seed in seeds}
      own[way] = {seed: {key: value for key, value in record.items() if key != "config"} for seed, record in records.items()}
    found["cases"][case_name] = {
      "title": CASES[case_name].title,
      "steps": steps or CASES[case_name].steps,
      "level_steps": level_steps or CASES[case_name].level_steps,
      "ways": own,
    }
  return found


def _config(case: Case, seed: int, way: str) -> ConfigDict:
  config = cifarfs_maml.get_config()
  config.update({"seed": seed, "steps": case.steps, "eval_every": case.steps} | case.fields)
  if way in WAYS and WAYS[way].prune:
    config.prune.update(WAYS[way].prune)
  return check_config(config)


def _base(config, case, way, base, splits, levels):
  experiment = FewShot(config, splits)
  state = experiment.train(experiment.init(), case.steps)
  save_parameters(base, state.params)
  return {"dense_macs": _macs(experiment), "levels": [_level(experiment, state)]}


def _narrow(config, case, way, base, splits, levels):
  """A network of each level's work, from the start, for as many steps as what is pruned to that level has had."""
  dense, found = FewShot(config, splits), []
  for place, level in enumerate(levels):
    own = config.copy_and_resolve_references()
    own.widths = _narrow_widths(config, dense, level)
    own.steps = own.eval_every = case.steps + case.level_steps * (place + 1)
    experiment = FewShot(check_config(own), splits)
    state = experiment.train(experiment.init(), own.steps)
    found.append(_level(experiment, state) | {"widths": list(own.widths)})
  return {"dense_macs": _macs(dense), "levels": found}


def _narrow_widths(config, dense, level):
  """The widest network of the same shape whose work is no more than the level's."""
  widths = dense.network.backbone.widths
  for count in range(widths[0], 0, -1):
    own = config.copy_and_resolve_references()
    own.widths = tuple(max(1, round(width * count / widths[0])) for width in widths)
    if mg.nn.dense_cost(make_network(own).layers(dense.image_shape))[0] <= (1 - level) * _macs(dense):
      return own.widths
  raise ConfigError(f"no network of this shape has {1 - level:g} of the work.")


def _course(config, case, way, base, splits, levels):
  """From the saved network through all levels, with what is left measured at the end of each."""
  steps = case.level_steps
  config = config.copy_and_resolve_references()
  config.update(steps=steps * len(levels), eval_every=steps)
  experiment = FewShot(config, splits)
  restarts = optax.join_schedules(
    [optax.cosine_decay_schedule(config.outer_lr / 2, steps) for _ in levels], [steps * i for i in range(1, len(levels))]
  )
  optimizer, rising = optax.adam(restarts), steps // 2
  if WAYS[way].prune:
    at = levels if config.prune.scope == "macs" else [_share_of_each_layer(experiment, level) for level in levels]
    schedule = mg.pruning.staged_schedule(at, steps, every=max(1, rising // 10), ramp=0.5)
    optimizer = mg.gradual_pruning(optimizer, schedule, **registry.pruning_options(config.prune, experiment.network, experiment.image_shape))
  state = experiment.init(optimizer)
  state = state._replace(params=load_parameters(base)[0], key=jax.random.fold_in(state.key, 1))  # other episodes than before
  found = []

  def evaluated(state, loss):
    del loss
    found.append(_level(experiment, state) | (_on_device(experiment, state) if WAYS[way].prune else {}))

  experiment.train(state, steps * len(levels), evaluated, optimizer=optimizer)
  return {"dense_macs": _macs(experiment), "levels": found}


def _share_of_each_layer(experiment, level):
  """The share of every layer's filters without which the network has the level's work."""
  costs = registry.channel_costs(experiment.network, experiment.image_shape)
  macs = lambda share: costs.macs({group: width - round(share * width) for group, width in costs.widths.items()})
  return next(share for share in np.linspace(0, 0.99, 991) if macs(share) <= (1 - level) * costs.macs(costs.widths))


def _macs(experiment):
  return mg.nn.dense_cost(experiment.network.layers(experiment.image_shape))[0]


def _level(experiment, state):
  """Accuracies on test episodes, the work that is left, and filters by layer."""
  after = experiment.evaluate(state, "test", experiment.config.test_episodes)[1]
  cost, mask = experiment.cost(state), mg.pruning.find_pruning(state.optimizer)
  kept = {}
  if mask is not None:
    model, _ = experiment.learner.deploy(state.params, mask.mask)
    used = mg.deploy.kept_channels(experiment.network, model, experiment.image_shape)
    kept = {layer: int(own.sum()) for layer, own in used.items()}
  return {"accuracy": after.tolist(), "macs": cost["macs"]["effective"], "parameters": cost["parameters"]["effective"], "kept": kept}


def _on_device(experiment, state, repeats: int = 100) -> dict[str, Any]:
  """Bytes, and microseconds of a batch of one image, of the network as it was and without the filters that are gone, by turns."""
  network, shape = experiment.network, experiment.image_shape
  model, _ = experiment.learner.deploy(state.params, mg.pruning.find_pruning(state.optimizer).mask)
  small = mg.deploy.compact(network, model, shape)
  networks = {"dense": (network, model.params), "compact": (small.network, small.params)}
  networks = {
    name: (dataclasses.replace(own, gated_layers=()), {"backbone": params["backbone"], "gate": {}}) for name, (own, params) in networks.items()
  }
  images = np.asarray(jax.random.normal(jax.random.key(0), (1, *shape)), np.float32)
  found: dict[str, Any] = {"latency_us": {}, "bytes": {}, "difference": {}}
  for form, runtime in RUNTIMES.items():
    contents = {name: WRITERS[form](mg.deploy.inference(own, params, shape, 1)) for name, (own, params) in networks.items()}
    expected = np.asarray(jax.jit(lambda params, own=networks["compact"][0]: own.apply(params, jnp.asarray(images))[0])(networks["compact"][1]))
    actual = runtime(contents["compact"]).logits(images, 1)
    found["difference"][runtime.label] = float(np.abs(actual - expected).max() / np.abs(expected).max())
    times = interleaved({name: runtime(content).call(images) for name, content in contents.items()}, repeats)
    found["latency_us"][runtime.label] = {name: own["median"] for name, own in times.items()}
    found["bytes"][form] = {name: len(content) for name, content in contents.items()}
  return found

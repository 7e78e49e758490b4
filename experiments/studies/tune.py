"""Settings of every method of a protocol, at one budget for all.

Each method gets the same number of meta-trainings, at points that fill its search space evenly (a Sobol sequence), and on
each meta-model the same adaptation rates; after a quarter and after half of the rounds the better half of them goes on (successive halving, Jamieson
and Talwalkar 2016). What counts is the accuracy after adaptation on validation tasks, which are not trained
on. All tasks here are made of images that are in no task of a run (`tuning_fraction`). How many rounds to train is found on the way, by one rule
for all methods: a trial ends where its accuracy has come within half a point of the best it reaches. The best
point goes to `configs/tuned/PROTOCOL.json`, with all trials; the configs read it.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy.stats import qmc

import metagater_jax as mg
from experiments.config import ConfigError, registry
from experiments.config.federated import check_config
from experiments.config.fields import check_known, with_fields
from experiments.runs.federated import load, make_tasks
from experiments.runs.records import make_folder, write_json
from experiments.studies.protocols import is_pruning
from experiments.studies.study import Part, carry_out, check_seeds, settings_of

__all__ = ["PRUNED", "Tuner", "adaptation_rates", "merge", "method_config", "points", "reproduce", "space_of", "tune_method"]

# What is tuned by default: the methods of the paper's tables, and the one that tells a gate's gain from that of its noise.
_PAPER = ("fedavg", "per_fedavg", "metagater_ungated", "metagater", "metagater_dropout")
# The sparsity at which the rates of what prunes at a target are tuned.
PRUNED = 0.5


def adaptation_rates(count: int = 9) -> tuple[float, ...]:
  """`count` rates from 0.005 to 1.28, even in their logarithm: with 9, each is twice the one before."""
  return tuple(float(f"{rate:.2g}") for rate in np.geomspace(0.005, 1.28, count))


def points(space: Mapping[str, tuple[float, float]], count: int, seed: int = 0) -> list[dict[str, float]]:
  """`count` points of a space that fill it evenly in the logarithm of every setting: a scrambled Sobol sequence."""
  with np.errstate(all="ignore"):
    unit = qmc.Sobol(len(space), seed=seed).random(1 << (count - 1).bit_length())[:count]
  low, high = np.log(np.array(list(space.values()))).T
  return [dict(zip(space, (float(f"{v:.3g}") for v in row))) for row in np.exp(low + unit * (high - low))]


class Tuner:
  """Meta-trains a method at given settings and measures it on validation tasks: compiled once for all settings.

  Args:
    config: a checked config of the method; its settings are replaced by those of a trial.
    seeds: populations to train on.
    rates: adaptation rates to measure each meta-model with.
  """

  def __init__(self, config: ConfigDict, seeds: Sequence[int], rates: Sequence[float] = adaptation_rates()):
    self.config, self.rates = config, tuple(rates)
    dataset = load(config)
    # A protocol that holds no validation tasks out gives up as many training tasks for them as it has targets.
    validation_tasks = config.validation_tasks or config.target_tasks
    self.tasks = []
    for seed in seeds:
      population = with_fields(config, seed=int(seed), validation_tasks=validation_tasks)
      self.tasks.append((int(seed), make_tasks(population, dataset, tuning=True)))
    self.populations = mg.data.make_populations(
      dataset.images,
      np.asarray(dataset.labels),
      [tasks.partition for _, tasks in self.tasks],
      (config.pixel_mean, config.pixel_std),
      classes=dataset.classes,
    )
    self.network, self.classes = registry.make_network(config, dataset.classes), dataset.classes
    self.image_shape = dataset.images.shape[1:]
    self._start = jax.jit(self._init)
    self._train = jax.jit(self._rounds, static_argnames="rounds", donate_argnums=1)
    self._measure = jax.jit(self._accuracies, static_argnames="personalizer")

  def trial(self, settings: Mapping[str, float]) -> Iterator[tuple[int, list[mg.Model], np.ndarray, dict[str, float]]]:
    """Meta-trains at these settings. After a quarter, half and all of the rounds of the config: the round, the meta-models by seed, and what
    `accuracies` gives."""
    settings = {name: jnp.asarray(value) for name, value in settings.items()}
    states = [self._start(settings, jnp.asarray(seed)) for seed, _ in self.tasks]
    done = 0
    for end in sorted({max(1, self.config.rounds // part) for part in _LOOKS}):
      trained = [
        self._train(settings, state, population, jnp.asarray(tasks.training), rounds=end - done)
        for state, (_, tasks), population in zip(states, self.tasks, self.populations)
      ]
      (states, models), done = zip(*trained), end
      yield done, list(models), *self.accuracies(models, settings)

  def accuracies(
    self, models: Sequence[mg.Model], settings: Mapping[str, Any], personalizer: str | None = None
  ) -> tuple[np.ndarray, dict[str, float]]:
    """Accuracy on the validation tasks by adaptation rate, mean over tasks and seeds, with the config's personalizer or another; and the value of
    the setting that the personalizer has beside its rate, if any, that was best at one usual rate. What is no number counts as 0."""
    personalizer = personalizer or self.config.personalizer

    def at(rates, own):
      measure = partial(self._measure, settings={**settings, **own}, rates=jnp.asarray(rates), personalizer=personalizer)
      return np.nan_to_num(
        np.mean(
          [
            np.asarray(measure(model, population, jnp.asarray(tasks.validation)))
            for model, population, (_, tasks) in zip(models, self.populations, self.tasks)
          ],
          axis=0,
        )
      )

    grid, own = registry.PERSONALIZERS[personalizer].grid, {}
    if grid is not None:
      name, values = grid
      usual = [self.rates[len(self.rates) // 3]]  # of nine 0.04, near what most methods choose
      own = {name: float(values[int(np.argmax([at(usual, {name: value})[0] for value in values]))])}
    return at(self.rates, own), own

  def _algorithm(self, settings):
    config = registry.with_changes(self.config, **settings)
    network = registry.make_network(config, self.classes)
    return config, network, registry.make_algorithm(config, network)

  def _init(self, settings, seed):
    _, network, algorithm = self._algorithm(settings)
    init_key, run_key = jax.random.split(jax.random.key(seed))
    return mg.federated_init(algorithm, network.init(init_key, self.image_shape), run_key)

  def _rounds(self, settings, state, population, training, rounds):
    config, network, algorithm = self._algorithm(settings)
    state, _ = mg.run_rounds(
      algorithm,
      state,
      population,
      training,
      rounds=rounds,
      cohort=config.cohort,
      batch_size=config.batch_size,
      weighted=config.weighted,
      task_axis=registry.train_axis(self.config, network, algorithm),
    )
    return state, algorithm.deploy(state.server)

  def _accuracies(self, model, population, validation, settings, rates, personalizer):
    make = lambda **changes: registry.make_personalizer(
      registry.with_changes(self.config, **settings, personalizer=personalizer), self.network, **changes
    )
    # The rate is of the adaptation alone: what is calibrated does not depend on it.
    calibration = make().calibrate(model, population, validation)

    def one(task):
      # Under vmap what does not depend on the rate (the gradient at the meta-model) is computed once for all rates.
      return jax.vmap(
        lambda rate: (
          mg.evaluate_task(
            self.network, make(adapt_lr=rate).adapt(model, population.train(task), calibration), population.test(task), chunk=self.config.chunk
          ).accuracy
        )
      )(rates)

    return mg.core.map_tasks(one, validation, "map").mean(0)


# Accuracy that a trial may be below the best that it reaches, for the sake of fewer rounds.
_TOLERANCE = 0.005
# A trial is measured after the rounds over each of these.
_LOOKS = (4, 2, 1)


def tune_method(
  config: ConfigDict,
  name: str,
  *,
  local_steps: int,
  seeds: Sequence[int],
  trials: int,
  rates: Sequence[float] = adaptation_rates(),
  report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
  """The tuned settings of a method with its trials, and of what prunes its meta-models at a target.

  Args:
    config: of the protocol.
    name: in `experiments.config.registry.methods()`.
    local_steps: K.
    seeds: populations to tune on.
    trials: points of the method's search space; a meta-training is begun at each, per seed, and a quarter of them are carried through.
    rates: adaptation rates that each meta-model is measured with.
    report: gets a line per trial.
  """
  method = registry.methods()[name]
  start = time.perf_counter()
  tuner = Tuner(method_config(config, name, local_steps), seeds, rates)
  running = {number: (settings, tuner.trial(settings), []) for number, settings in enumerate(points(space_of(method, local_steps), trials))}
  found = {}
  while running:
    for number, (settings, trial, looks) in list(running.items()):
      if (look := next(trial, None)) is None:
        del running[number]
        continue
      looks.append(look)
      reached = [accuracies.max() for _, _, accuracies, _ in looks]
      rounds, models, accuracies, own = looks[int(np.argmax(np.array(reached) >= max(reached) - _TOLERANCE))]
      rate = int(accuracies.argmax())
      found[number] = (
        {
          **settings,
          **own,
          "adapt_lr": rates[rate],
          "rounds": rounds,
          "accuracy": round(float(accuracies[rate]), 4),
          "accuracies": {str(done): round(float(value), 4) for (done, *_), value in zip(looks, reached)},
        },
        models,
      )
      report(f"{config.name} {name} K={local_steps}: {found[number][0]} ({time.perf_counter() - start:.0f} s)")
    better = sorted(running, key=lambda number: -max(found[number][0]["accuracies"].values()))
    running = {number: running[number] for number in sorted(better[: (len(better) + 1) // 2])}
  trial_records = [found[number][0] for number in sorted(found)]
  best = max((found[number] for number in sorted(found)), key=lambda one: one[0]["accuracy"])
  settings = {key: value for key, value in best[0].items() if key not in ("accuracy", "accuracies")}
  entry = {
    "algorithm": method.algorithm,
    "gated": method.gated,
    "local_steps": local_steps,
    "settings": settings,
    "validation_accuracy": best[0]["accuracy"],
    "meta_trainings": trials * len(seeds),
    "adaptation_rates": len(rates),
    "rounds": config.rounds,
    "seeds": list(map(int, seeds)),
    "validation_tasks": len(tuner.tasks[0][1].validation),
    "seconds": round(time.perf_counter() - start, 1),
    "trials": trial_records,
  }
  entries = [entry]
  for pruner, other in registry.methods().items():
    if is_pruning(pruner) and (other.algorithm, other.gated) == (method.algorithm, method.gated) and config.gated_layers:
      accuracies, _ = tuner.accuracies(best[1], settings | {"target_sparsity": PRUNED}, other.personalizer)
      rate = int(accuracies.argmax())
      own = {"adapt_lr": rates[rate], "rounds": settings["rounds"]}
      report(f"{config.name} {pruner} K={local_steps}: {own} {accuracies[rate]:.4f}")
      entries.append({**entry, "algorithm": pruner, "settings": own, "trials": [], "validation_accuracy": round(float(accuracies[rate]), 4)})
  return entries


def space_of(method: registry.Method, local_steps: int) -> dict[str, tuple[float, float]]:
  """What is searched for a method: with several local steps more than with one, where only a product of some settings matters."""
  more = registry.ALGORITHMS[method.algorithm].several_steps if local_steps > 1 else {}
  return dict(method.space) | dict(more)


def method_config(config: ConfigDict, name: str, local_steps: int) -> ConfigDict:
  """The checked config of a method in a protocol, with its defaults in the place of what was tuned."""
  method = registry.methods()[name]
  if not config.tuning_fraction:
    raise ConfigError(
      f"{config.name} keeps no images for choosing settings: all of them are in the tasks of runs. Set its tuning_fraction (0.25, say)."
    )
  return check_config(
    with_fields(config, algorithm=method.algorithm, gated=method.gated, personalizer=method.personalizer, local_steps=local_steps, tuned=None)
  )


def reproduce(
  workdir: str | Path,
  out: Path,
  configs: Mapping[str, ConfigDict],
  *,
  methods: Sequence[str] | None = None,
  local_steps: Sequence[int] = (1,),
  seeds: Sequence[int] = (100,),
  trials: int = 8,
  rates: Sequence[float] = adaptation_rates(),
  log: Callable[[str], None] = print,
) -> None:
  """Tunes what is not yet recorded in `workdir`, and writes each protocol's settings to `out/PROTOCOL.json`.

  Args:
    workdir: holds a record per protocol, method and number of local steps.
    out: folder that configs read.
    configs: by name of the protocol.
    methods: names; None: those of the paper's tables.
    local_steps: numbers of local steps to tune for.
    seeds, trials, rates: see `tune_method`.
    log: gets a line per trial.

  Raises:
    ConfigError: before anything runs: an unknown method, one that cannot be tuned, a number below 1, or a record of another configuration.
  """
  known = [name for name, method in registry.methods().items() if method.space]
  for name in methods or ():
    check_known("method", name, known)
  for field, value in (("trials", trials), ("rates", len(rates)), *(("local_steps", k) for k in local_steps)):
    if value < 1:
      raise ConfigError(f"{field} must be at least 1, got {value}.")
  check_seeds(seeds)
  more = {"trials": trials, "rates": list(rates), "seeds": list(seeds)}
  groups, planned = {}, {}
  for protocol, config in configs.items():
    load(method_config(config, "fedavg", 1))  # before anything runs: data that is missing
    chosen = methods or [name for name in _PAPER if config.gated_layers or name in _PAPER[:3]]
    for k in local_steps:
      for name in chosen:
        group = f"{protocol} {name} K={k}"
        planned[group] = config, name, k
        record = Path(workdir) / f"{protocol}-{name}-k{k}.json"
        groups[group] = [Part(record, method_config(config, name, k), more)]

  def run(group, parts):
    config, name, k = planned[group]
    entries = tune_method(config, name, local_steps=k, seeds=seeds, trials=trials, rates=rates, report=log)
    parts[0].record.parent.mkdir(parents=True, exist_ok=True)
    write_json(parts[0].record, {"config": settings_of(parts[0]), "entries": entries})
    return {parts[0].record: entries}

  make_folder(workdir)
  make_folder(out, "out")
  carry_out(groups, run, log=log)
  for group, (config, _, _) in planned.items():
    merge(out / f"{config.name}.json", config.name, json.loads(groups[group][0].record.read_text(encoding="utf-8"))["entries"])


def merge(path: Path, protocol: str, entries: Sequence[dict[str, Any]]) -> None:
  """Writes the entries into a protocol's file, in the place of older ones of the same method and local steps."""
  key = lambda entry: (entry["algorithm"], entry["gated"], entry["local_steps"])
  old = json.loads(path.read_text(encoding="utf-8"))["methods"] if path.is_file() else []
  new = {key(entry) for entry in entries}
  path.parent.mkdir(parents=True, exist_ok=True)
  methods = sorted([entry for entry in old if key(entry) not in new] + list(entries), key=key)
  write_json(path, {"protocol": protocol, "methods": methods})

"""`python -m experiments.tune --protocols=mnist,cifar10`: settings of every method of a protocol, at one budget for all.

Each method gets the same number of meta-trainings, at points that fill its search space evenly (a Sobol sequence), and on
each meta-model the same adaptation rates. What counts is the accuracy after adaptation on validation tasks, which are
neither trained on nor targets, in populations (seeds) that no table reports. The best point goes to
`configs/tuned/PROTOCOL.json`, with all trials; the configs read it.
"""

import argparse
import importlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy.stats import qmc

import metagater_jax as mg
from experiments import registry, reporting
from experiments.config import TUNED, ConfigError, check_config, closest, with_fields
from experiments.training import load, make_tasks

__all__ = ["METHODS", "SPACES", "Method", "Tuner", "adaptation_rates", "main", "points", "tune_protocol"]


class Method(NamedTuple):
  """An algorithm as the tables tell them apart."""

  algorithm: str
  gated: bool = False


METHODS = {
    "fedavg": Method("fedavg"), "per_fedavg": Method("per_fedavg"), "metagater_ungated": Method("metagater"),
    "metagater": Method("metagater", gated=True), "fedprox": Method("fedprox"), "reptile": Method("reptile"),
    "pfedme": Method("pfedme")}
_PAPER = ("fedavg", "per_fedavg", "metagater_ungated", "metagater")

# Smallest and largest value of each setting, searched evenly in its logarithm.
_RATE = {"local_lr": (0.02, 0.4)}
SPACES: dict[str, dict[str, tuple[float, float]]] = {
    "fedavg": _RATE,
    "fedprox": _RATE | {"prox_weight": (0.01, 3.0)},
    "reptile": _RATE | {"server_lr": (0.3, 1.5)},
    "per_fedavg": _RATE | {"inner_lr": (0.005, 0.2)},
    "pfedme": _RATE | {"personal_lr": (0.01, 0.06), "prox_weight": (5.0, 30.0)},
    # With one local step only the product of rate, λ and β matters, and λβ/rate is what is searched.
    "metagater_ungated": _RATE | {"beta": (0.005, 0.05)},
    "metagater": _RATE | {"beta": (0.005, 0.05), "penalty_weight": (0.0005, 0.05)},
}


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
    self.validation_tasks = config.validation_tasks or config.target_tasks
    self.tasks = []
    for seed in seeds:
      population = with_fields(config, seed=int(seed), validation_tasks=self.validation_tasks)
      self.tasks.append((int(seed), make_tasks(population, dataset)))
    self.populations = mg.make_populations(dataset.images, np.asarray(dataset.labels),
                                           [tasks.partition for _, tasks in self.tasks],
                                           (config.pixel_mean, config.pixel_std))
    self.network = registry.make_network(config, dataset.classes)
    self.image_shape = dataset.images.shape[1:]
    self._train = jax.jit(self._train_and_deploy)
    self._measure = jax.jit(self._accuracies)
    self._snip = jax.jit(self._snip_accuracies, static_argnames="granularity")

  def algorithm(self, settings: Mapping[str, Any]) -> mg.Algorithm:
    """The config's algorithm at these settings, which may be traced."""
    return registry.make_algorithm(SimpleNamespace(**{**self.config.to_dict(), **settings}), self.network)

  def trial(self, settings: Mapping[str, float]) -> tuple[np.ndarray, list[Any]]:
    """Accuracy on the validation tasks by adaptation rate, mean over tasks and seeds, and the meta-models by seed."""
    accuracies, models = [], []
    for (seed, tasks), population in zip(self.tasks, self.populations):
      validation = jnp.asarray(tasks.validation)
      params = self._train(dict(settings), jnp.asarray(seed), population, jnp.asarray(tasks.training))
      accuracies.append(self._measure(dict(settings), params, population, validation))
      models.append(params)
    return np.mean(np.asarray(accuracies), axis=0), models

  def snip(self, models: Sequence[Any], granularity: str) -> np.ndarray:
    """The same for MetaSNIP at these meta-models, at the sparsity that the config asks of the gate."""
    return np.mean([np.asarray(self._snip(params, population, jnp.asarray(tasks.validation), granularity=granularity))
                    for params, population, (_, tasks) in zip(models, self.populations, self.tasks)], axis=0)

  def _train_and_deploy(self, settings, seed, population, training):
    algorithm, config = self.algorithm(settings), self.config
    init_key, run_key = jax.random.split(jax.random.key(seed))
    state = mg.federated_init(algorithm, self.network.init(init_key, self.image_shape), run_key)
    state, _ = mg.run_rounds(algorithm, state, population, training, rounds=config.rounds, cohort=config.cohort,
                             batch_size=config.batch_size, weighted=config.weighted, task_axis=registry.train_axis(config, algorithm))
    return algorithm.deploy(state.server)

  def _accuracies(self, settings, params, population, validation):
    calibration = self.algorithm(settings).calibrate(params, population, validation)

    def adapt(data, rate):
      return self.algorithm({**settings, "adapt_lr": rate}).adapt(params, data, calibration)
    return self._by_rate(adapt, population, validation)

  def _snip_accuracies(self, params, population, validation, granularity):
    prunable = registry.snip_candidates(self.config, granularity)

    def adapt(data, rate):
      return mg.metasnip(mg.classification_loss(self.network), params, data, sparsity=self.config.target_sparsity, lr=rate,
                         granularity=granularity, prunable=prunable, chunk=self.config.chunk)[0]
    return self._by_rate(adapt, population, validation)

  def _by_rate(self, adapt, population, validation):
    rates = jnp.asarray(self.rates)

    def one(task):
      # Under vmap what does not depend on the rate (the gradient at the meta-model) is computed once for all rates.
      return jax.vmap(lambda rate: mg.evaluate_task(
          self.network, adapt(population.train(task), rate), population.test(task), self.config.chunk).accuracy)(rates)
    return mg.map_tasks(one, validation, "map").mean(0)


def tune_protocol(config: ConfigDict, methods: Sequence[str], *, local_steps: int, seeds: Sequence[int], trials: int,
                  rates: Sequence[float] = adaptation_rates(), report=print) -> list[dict[str, Any]]:
  """The tuned settings of each method with its trials, and of MetaSNIP where the method without gates is among them."""
  entries = []
  for name in methods:
    method = METHODS[name]
    chosen = config.copy_and_resolve_references()
    chosen.update(algorithm=method.algorithm, gated=method.gated, local_steps=local_steps, tuned=None)
    start = time.perf_counter()
    tuner = Tuner(check_config(chosen), seeds, rates)
    records, best = [], None
    for settings in points(SPACES[name], trials):
      accuracies, models = tuner.trial(settings)
      accuracies = np.nan_to_num(accuracies)
      rate = int(accuracies.argmax())
      records.append({**settings, "adapt_lr": rates[rate], "accuracy": round(float(accuracies[rate]), 4)})
      report(f"{config.name} {name} K={local_steps}: {records[-1]} ({time.perf_counter() - start:.0f} s)")
      if best is None or records[-1]["accuracy"] > best[0]["accuracy"]:
        best = records[-1], models
    settings = {key: value for key, value in best[0].items() if key != "accuracy"}
    entry = {"algorithm": method.algorithm, "gated": method.gated, "local_steps": local_steps, "settings": settings,
             "validation_accuracy": best[0]["accuracy"], "meta_trainings": trials * len(seeds),
             "adaptation_rates": len(rates), "rounds": config.rounds, "seeds": list(map(int, seeds)),
             "validation_tasks": tuner.validation_tasks, "seconds": round(time.perf_counter() - start, 1), "trials": records}
    entries.append(entry)
    if name == "metagater_ungated" and config.gated_layers:
      for granularity in ("weight", "channel"):
        accuracies = tuner.snip(best[1], granularity)
        rate = int(accuracies.argmax())
        settings = {"adapt_lr": rates[rate]}
        report(f"{config.name} metasnip {granularity} K={local_steps}: {settings} {accuracies[rate]:.4f}")
        entries.append({**entry, "algorithm": f"metasnip_{granularity}", "settings": settings, "trials": [],
                        "validation_accuracy": round(float(accuracies[rate]), 4)})
  return entries


def merge(path: Path, protocol: str, entries: Sequence[dict[str, Any]]) -> None:
  """Writes the entries into a protocol's file, in the place of older ones of the same method and local steps."""
  key = lambda entry: (entry["algorithm"], entry["gated"], entry["local_steps"])
  old = json.loads(path.read_text())["methods"] if path.is_file() else []
  new = {key(entry) for entry in entries}
  path.parent.mkdir(parents=True, exist_ok=True)
  methods = sorted([entry for entry in old if key(entry) not in new] + list(entries), key=key)
  reporting.write_json(path, {"protocol": protocol, "methods": methods})


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.tune", description=__doc__.split("\n")[0], allow_abbrev=False)
  names, numbers = lambda text: text.split(","), lambda text: [int(value) for value in text.split(",")]
  parser.add_argument("--protocols", type=names, default=["mnist", "cifar10", "cifar10_small"],
                      help="configs to tune, by name, separated by commas; default: those with a file of their own")
  parser.add_argument("--methods", type=names, help=f"some of {', '.join(METHODS)}; default: those of the paper's tables")
  parser.add_argument("--trials", type=int, default=8, help="meta-trainings per method and seed; default: 8")
  parser.add_argument("--seeds", type=numbers, default=[100], help="populations to tune on, none that a table reports")
  parser.add_argument("--local_steps", type=numbers, default=[1], help="numbers of local steps to tune for")
  parser.add_argument("--rates", type=int, default=9, help="adaptation rates, from 0.005 to 1.28; default: 9")
  parser.add_argument("--rounds", type=int, help="of each meta-training; default: the config's")
  parser.add_argument("--data_dir", help="where the data is; default: TFDS's own directory")
  parser.add_argument("--out", type=Path, default=TUNED, help="folder of the results; default: where the configs read them")
  options = parser.parse_args(arguments)
  logging.getLogger().setLevel(logging.WARNING)
  try:
    for method in options.methods or ():
      if method not in METHODS:
        raise ConfigError(closest("method", method, METHODS))
    for name, value in (("trials", options.trials), ("rates", options.rates), ("rounds", options.rounds),
                        *(("local_steps", k) for k in options.local_steps)):
      if value is not None and value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}.")
    configs = {name: protocol_config(name, options.data_dir, options.rounds) for name in options.protocols}
    for config in configs.values():
      load(check_config(config))
  except ConfigError as error:
    reporting.fail("experiments.tune", error)
  for name, config in configs.items():
    methods = options.methods or [m for m in _PAPER if config.gated_layers or not METHODS[m].gated]
    for k in options.local_steps:
      for method in methods:  # one by one, so that what is found is kept
        merge(options.out / f"{name}.json", name, tune_protocol(
            config, [method], local_steps=k, seeds=options.seeds, trials=options.trials,
            rates=adaptation_rates(options.rates), report=partial(print, flush=True)))


def protocol_config(name: str, data_dir: str | None = None, rounds: int | None = None) -> ConfigDict:
  """The config of a protocol by name, with another data directory or number of rounds.

  Raises:
    ConfigError: an unknown name.
  """
  known = sorted(p.stem for p in (TUNED.parent).glob("*.py") if not p.stem.startswith("_"))
  if name not in known:
    raise ConfigError(closest("protocol", name, known))
  config = importlib.import_module(f"configs.{name}").get_config()
  config.data_dir = data_dir
  if rounds is not None:
    config.rounds = rounds
    config.eval_every = min(config.eval_every, rounds)
  return config


if __name__ == "__main__":
  main()

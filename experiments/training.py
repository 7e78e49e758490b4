"""The one loop that runs any federated algorithm on any population, and writes what it finds."""

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import metagater_jax as mg
from experiments import registry, reporting
from experiments.config import ConfigError, check_config, check_dataset
from metagater_jax.data.datasets import Dataset, load_dataset

__all__ = ["DivergedError", "load_parameters", "make_tasks", "run", "save_parameters"]


def run(config: ConfigDict, workdir: str | Path, dataset: Dataset | None = None, quiet: bool = False) -> dict[str, Any]:
  """Meta-trains on the training tasks of a config, adapts to its target tasks, and writes everything into `workdir`.

  From a notebook:

      from configs import digits
      from experiments.training import run
      result = run(digits.get_config(), "runs/mine")

  Args:
    config: as the files in configs/ make it; its fields are in `experiments.config`.
    workdir: a folder that holds no other run; it is made if it is missing.
    dataset: images and labels of your own instead of those that `config.dataset` names.
    quiet: no progress line and no table.

  Returns:
    What `result.json` holds.

  Raises:
    ConfigError: before any long work.
    DivergedError: the loss is no longer finite; metrics until then are kept.
  """
  start = time.perf_counter()
  clock = _Clock("load", "compile", "train", "evaluate")
  workdir = Path(workdir)
  config = check_config(config)
  _check_workdir(workdir)
  with clock("load"):
    dataset, partition, training_tasks, target_tasks = make_tasks(config, dataset)
    population = mg.make_population(dataset.images, np.asarray(dataset.labels), partition,
                                    (config.pixel_mean, config.pixel_std))
  workdir.mkdir(parents=True, exist_ok=True)
  reporting.write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))
  reporting.write_json(workdir / "partition.json", {
      "dataset": dataset.name, "samples": len(dataset.labels), "training_tasks": training_tasks.tolist(),
      "target_tasks": target_tasks.tolist(), "tasks": partition.to_json()})

  network = registry.make_network(config, dataset.classes)
  algorithm = registry.make_algorithm(config, network)
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  params = network.init(init_key, dataset.images.shape[1:])
  state = mg.federated_init(algorithm, params, run_key)
  train = _Compiled(clock, "train", partial(
      mg.run_rounds, algorithm, cohort=config.cohort, batch_size=config.batch_size, task_axis=config.task_axis),
      donate_argnums=0)
  evaluate = _Compiled(clock, "evaluate", partial(_evaluate, algorithm, network, config))
  training_tasks, targets = jnp.asarray(training_tasks), jnp.asarray(target_tasks)

  writer = reporting.MetricsWriter(workdir)
  rows, round_ms = [], []
  progress = _Progress(config.rounds, quiet)
  while (done := int(state.round)) < config.rounds:
    next_evaluation = min(config.rounds, (done // config.eval_every + 1) * config.eval_every)
    count = min(config.rounds_per_dispatch, next_evaluation - done)
    state, metrics = train(state, population, training_tasks, rounds=count)
    round_ms += [1000 * train.seconds / count] * count
    done += count
    loss = float(metrics["loss"].mean())
    if not np.isfinite(loss):
      progress.close()
      raise DivergedError(f"the loss is {loss} after round {done}: meta-training diverged. Lower beta (now "
                          f"{config.beta:g}) or local_lr (now {config.local_lr:g}), or set gamma=plain. What was computed "
                          f"until then is in {workdir}.")
    progress.show(loss=loss)
    if done == next_evaluation:
      threshold, before, after = jax.device_get(evaluate(state.server, population, training_tasks, targets))
      rows.append(_row(done, loss, before, after, config.gated))
      writer.write(rows[-1])
      progress.show(accuracy=rows[-1]["accuracy_mean"], sparsity=rows[-1]["sparsity_mean"])
    progress.advance(count, evaluated=done == next_evaluation)
  progress.close()

  save_parameters(workdir / "meta_model.npz", algorithm.deploy(state.server), threshold=threshold)
  layers = network.layers(dataset.images.shape[1:])
  dense_macs, dense_parameters = mg.dense_cost(layers)
  result = {
      "name": config.name, "algorithm": config.algorithm, "gated": config.gated, "seed": config.seed,
      "rounds": config.rounds,
      "accuracy": reporting.summary(after.accuracy),
      "accuracy_before_adaptation": reporting.summary(before.accuracy),
      "sparsity": reporting.summary(after.sparsity) if config.gated else None,
      "sparsity_before_adaptation": reporting.summary(before.sparsity) if config.gated else None,
      "macs": {"dense": dense_macs, "gated": float(after.macs.mean()) if config.gated else None},
      "parameters": {"dense": dense_parameters, "gated": float(after.parameters.mean()) if config.gated else None},
      "gate_threshold": float(threshold) if config.gated else None,
      "round_ms": float(np.median(round_ms)),
      "seconds": {**clock.seconds, "total": time.perf_counter() - start},
      "versions": {"python": platform.python_version(), "jax": jax.__version__, "backend": jax.default_backend(),
                   "metagater_jax": importlib.metadata.version("metagater_jax")},
  }
  reporting.write_json(workdir / "result.json", result)
  labels = np.asarray(dataset.labels)
  reporting.plot_accuracy(workdir / "accuracy.png", rows, f"{config.name}: mean ± spread over {len(targets)} target tasks")
  reporting.plot_tasks(workdir / "tasks.png", result, [
      {"task": int(t), "labels": np.unique(labels[partition.train[t]]).tolist(), "train_samples": len(partition.train[t])}
      for t in target_tasks])
  if not quiet:
    print(reporting.result_table(result))
    print(f"figures: {workdir / 'accuracy.png'}, {workdir / 'tasks.png'}; everything else is in {workdir}")
  return result


class DivergedError(ArithmeticError):
  """Meta-training left the finite numbers. The message says what to lower and where the metrics until then are."""


def save_parameters(path: Path, params: Any, **scalars: Any) -> None:
  """A model as a NumPy archive: one array per parameter, named "gate/conv3/W2", and scalars beside them."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  np.savez(path, **{jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf) for key, leaf in leaves},
           **scalars)


def load_parameters(path: str | Path) -> tuple[Any, dict[str, np.ndarray]]:
  """The inverse of `save_parameters`: the parameters, and the scalars."""
  params, scalars = {"backbone": {}, "gate": {}}, {}
  with np.load(path) as archive:
    for name, array in archive.items():
      *folders, last = name.split("/")
      if not folders:
        scalars[last] = array
        continue
      place = params
      for folder in folders:
        place = place.setdefault(folder, {})
      place[last] = array
  return params, scalars


def make_tasks(config: ConfigDict, dataset: Dataset | None = None
               ) -> tuple[Dataset, mg.Partition, np.ndarray, np.ndarray]:
  """The data of a config, how it is distributed, and the numbers of the training and of the target tasks.

  Raises:
    ConfigError: a data set that is not there, or that cannot be distributed as the config wants it.
  """
  try:
    dataset = dataset or load_dataset(config.dataset, config.data_dir)
    check_dataset(config, dataset)
    partition = registry.make_partition(config, np.asarray(dataset.labels))
  except ConfigError:
    raise
  except ValueError as error:  # of the data set or the partitioner, whose messages name the config's fields
    raise ConfigError(str(error)) from error
  return dataset, partition, *mg.split_targets(config.tasks, config.target_tasks, config.seed,
                                               seen=config.target_tasks_seen)


def _evaluate(algorithm, network, config, server, population, training_tasks, targets):
  """Calibration, and metrics of the target tasks before and after adaptation."""
  params = algorithm.deploy(server)
  calibration = algorithm.calibrate(params, population, training_tasks[:config.calibration_tasks])
  before, after = mg.evaluate_targets(network, lambda params, data: algorithm.adapt(params, data, calibration), params,
                                      population, targets, chunk=config.chunk, task_axis=config.task_axis)
  return calibration, before, after


def _row(round_, loss, before, after, gated):
  values = {"accuracy": after.accuracy, "accuracy_before": before.accuracy}
  row = {"round": round_, "train_loss": loss}
  for name, array in values.items():
    row |= {f"{name}_mean": float(array.mean()), f"{name}_std": float(array.std())}
  row |= {"target_loss": float(after.loss.mean()),
          "sparsity_mean": float(after.sparsity.mean()) if gated else None,
          "sparsity_std": float(after.sparsity.std()) if gated else None,
          "sparsity_before_mean": float(before.sparsity.mean()) if gated else None}
  return row


def _check_workdir(workdir):
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f"the workdir {workdir} is a file; give a folder.")
  held = [name for name in ("config.json", "metrics.jsonl", "result.json") if (workdir / name).exists()]
  if held:
    raise ConfigError(f"the workdir {workdir} already holds another run ({', '.join(held)}); give a new folder, or remove "
                      "this one.")


class _Clock:
  """Seconds by phase."""

  def __init__(self, *phases):
    self.seconds = dict.fromkeys(phases, 0.0)

  @contextmanager
  def __call__(self, phase):
    start = time.perf_counter()
    yield
    self.seconds[phase] += time.perf_counter() - start


class _Compiled:
  """A jitted function that keeps compiling and running apart in a clock; keyword arguments are static."""

  def __init__(self, clock: _Clock, phase: str, function: Callable, **jit_options):
    self._clock, self._phase, self._function, self._options = clock, phase, function, jit_options
    self._programs = {}
    self.seconds = 0.0  # of the last run

  def __call__(self, *arguments, **static):
    key = tuple(sorted(static.items()))
    if key not in self._programs:
      with self._clock("compile"):
        jitted = jax.jit(partial(self._function, **static), **self._options)
        self._programs[key] = jitted.lower(*arguments).compile()
    start = time.perf_counter()
    with self._clock(self._phase):
      out = jax.block_until_ready(self._programs[key](*arguments))
    self.seconds = time.perf_counter() - start
    return out


class _Progress:
  """Round, loss, target accuracy, sparsity, rounds per second and time left, on standard error.

  One line that is rewritten on a terminal; elsewhere (a log file) a line per evaluation.
  """

  def __init__(self, rounds, quiet):
    self._shown, self._lines = {}, not quiet and not sys.stderr.isatty()
    self._bar = tqdm(total=rounds, disable=quiet, unit=" rounds", mininterval=0.2, dynamic_ncols=True,
                     file=open(os.devnull, "w") if self._lines else sys.stderr,
                     bar_format="round {n_fmt}/{total_fmt}{postfix} | {rate_noinv_fmt} | {remaining} left")

  def show(self, **values):
    self._shown |= {name: f"{value:.3f}" for name, value in values.items() if value is not None}
    self._bar.set_postfix(self._shown, refresh=False)

  def advance(self, count, evaluated):
    self._bar.update(count)
    if self._lines and evaluated:
      print(self._bar, file=sys.stderr, flush=True)

  def close(self):
    self._bar.close()

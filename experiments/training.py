"""The one loop that runs any federated algorithm on any population, for one seed or several, and writes what it finds."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import metagater_jax as mg
from experiments import placement, registry, reporting
from experiments.config import ConfigError, check_config, check_dataset, with_fields
from experiments.programs import Clock, Compiled, compiler_options, dispatches
from experiments.reporting import DivergedError, Progress
from metagater_jax.data.datasets import Dataset, load_dataset
from metagater_jax.data.stream import TaskStore

__all__ = ["DivergedError", "Tasks", "check_workdir", "load", "load_parameters", "make_tasks", "run", "run_seeds", "save_parameters",
           "what_is_left"]


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
  result = run_seeds(config, {config.seed: workdir}, dataset, quiet)[config.seed]
  if isinstance(result, DivergedError):
    raise result
  return result


def run_seeds(config: ConfigDict, workdirs: Mapping[int, str | Path], dataset: Dataset | None = None, quiet: bool = False
              ) -> dict[int, "dict[str, Any] | DivergedError"]:
  """`run` for several seeds of one config, with one compilation for all of them.

  The data is loaded once, and the seeds' tasks are padded to one shape. With `config.seed_axis` "vmap" the seeds are a
  leading axis of every array and advance together: for accelerators that one seed's round does not fill. With "loop" they
  run one after the other, which was faster on two cores even for the MNIST round.

  Args:
    config: its `seed` is replaced.
    workdirs: a new folder for each seed.
    dataset, quiet: as in `run`.

  Returns:
    By seed, what `result.json` holds, or the error of a seed that diverged (which the others outlive).

  Raises:
    ConfigError: before any long work.
  """
  start = time.perf_counter()
  seeds = list(workdirs)
  workdirs = {seed: Path(workdir) for seed, workdir in workdirs.items()}
  config = check_config(with_fields(config, seed=seeds[0]))
  mesh = placement.make_mesh(config)
  config.microbatch = placement.microbatch(config, mesh)
  together = config.seed_axis == "vmap" and len(seeds) > 1
  streamed = mesh is not None or config.memory_mb is not None
  if together and streamed:
    raise ConfigError("seed_axis is 'vmap', which needs all tasks on one device; leave out mesh and memory_mb.")
  if jax.process_index() == 0:
    for workdir in workdirs.values():
      check_workdir(workdir)
  clock = Clock("load", "compile", "train", "evaluate")
  with clock("load"):
    dataset = load(config, dataset)
    tasks = {seed: make_tasks(with_fields(config, seed=seed), dataset) for seed in seeds}
    partitions, scale = [tasks[seed].partition for seed in seeds], (config.pixel_mean, config.pixel_std)
    if streamed:
      data = [TaskStore(dataset.images, dataset.labels, partition, scale) for partition in partitions]
    else:
      data = mg.make_populations(dataset.images, np.asarray(dataset.labels), partitions, scale)
    data = dict(zip(seeds, data))
  experiment = _Experiment(config, dataset, clock, mesh)
  if streamed:
    experiment.check_memory([(tasks[seed], data[seed]) for seed in seeds])
  results = {}
  for group in ([seeds] if together else [[seed] for seed in seeds]):
    members = [_Member(with_fields(config, seed=seed), workdirs[seed], tasks[seed], data[seed]) for seed in group]
    if jax.process_index() == 0:
      for member in members:
        member.open(dataset)
    results |= experiment.run(members, quiet, start)
    start = time.perf_counter()
    clock.reset()  # what the next seed finds loaded and compiled costs it nothing
  return results


class Tasks(NamedTuple):
  """How the data of a config is distributed: the partition, and which of its tasks are for what (sorted numbers)."""

  partition: mg.Partition
  training: np.ndarray
  validation: np.ndarray
  target: np.ndarray

  def calibration(self, count: int) -> np.ndarray:
    """At most `count` tasks that set what targets need beside the meta-model: not trained on, where there are such."""
    return (self.validation if len(self.validation) else self.training)[:count]


class _Member(NamedTuple):
  """One seed of an experiment."""

  config: ConfigDict
  workdir: Path
  tasks: Tasks
  data: "mg.Population | TaskStore"

  def open(self, dataset):
    self.workdir.mkdir(parents=True, exist_ok=True)
    reporting.write_json(self.workdir / "config.json", json.loads(self.config.to_json_best_effort()))
    partition = self.tasks.partition
    reporting.write_json(self.workdir / "partition.json", {
        "dataset": dataset.name, "samples": len(dataset.labels), "training_tasks": self.tasks.training.tolist(),
        "validation_tasks": self.tasks.validation.tolist(), "target_tasks": self.tasks.target.tolist()},
        tasks=({"train": train.tolist(), "test": test.tolist()} for train, test in zip(partition.train, partition.test)))


class _Experiment:
  """The compiled functions of a config, which all its seeds share."""

  def __init__(self, config, dataset, clock, mesh):
    self.config, self.dataset, self.clock, self.mesh = config, dataset, clock, mesh
    self.rounds_per_dispatch = config.rounds_per_dispatch
    self.network = registry.make_network(config, dataset.classes)
    self.algorithm = registry.make_algorithm(config, self.network)
    self.image_shape = dataset.images.shape[1:]
    self.layers = self.network.layers(self.image_shape)
    train = partial(mg.run_rounds, self.algorithm, cohort=config.cohort, batch_size=config.batch_size,
                    weighted=config.weighted, task_axis=registry.train_axis(config, self.algorithm))
    options = {"compiler_options": compiler_options(convolutions=config.model != "mlp")}
    self._train = Compiled(clock, "train", train, donate_argnums=0, **options)
    evaluate = placement.evaluate_function(self.algorithm, self.network, config)
    self._evaluate = Compiled(clock, "evaluate", evaluate, **options)
    self._train_streamed = Compiled(clock, "train", placement.train_function(self.algorithm, config, mesh), donate_argnums=0,
                                    **options)
    self._evaluate_streamed = Compiled(clock, "evaluate", placement.evaluate_function(self.algorithm, self.network, config,
                                                                                      mesh), **options)
    axes = _STACKED_POPULATION
    self._train_together = Compiled(clock, "train", lambda *arguments, **static: jax.vmap(
        partial(train, **static), in_axes=(0, axes, 0))(*arguments), donate_argnums=0, **options)
    self._evaluate_together = Compiled(clock, "evaluate", jax.vmap(evaluate, in_axes=(0, axes, 0, 0, axes, 0)), **options)
    self._adapt = Compiled(clock, "evaluate", self.algorithm.adapt, **options)

  def check_memory(self, tasks_and_stores):
    """Raises a ConfigError, before anything is compiled, where the tasks of a seed do not fit in `memory_mb`."""
    for tasks, store in tasks_and_stores:
      evaluated = [*tasks.calibration(self.config.calibration_tasks), *tasks.target]
      self.rounds_per_dispatch = min(self.rounds_per_dispatch, placement.check_memory(
          self.config, store, self.algorithm.draws, self.mesh, evaluated))

  def run(self, members, quiet, start):
    """Trains and evaluates the seeds of `members`, together if there are several; results or errors by seed."""
    config, clock, several = self.config, self.clock, len(members) > 1
    states = [mg.federated_init(self.algorithm, self.network.init(init_key, self.image_shape), run_key)
              for init_key, run_key in (jax.random.split(jax.random.key(m.config.seed)) for m in members)]
    blocks = dispatches(config.rounds, config.eval_every, self.rounds_per_dispatch)
    numbers = [np.stack(part) for part in zip(*((m.tasks.training, m.tasks.calibration(config.calibration_tasks),
                                                 m.tasks.target) for m in members))]
    if isinstance(members[0].data, TaskStore):
      tasks = placement.Streamed(config, self.algorithm, states[0], members[0].data, *(n[0] for n in numbers), blocks,
                                 self._train_streamed, self._evaluate_streamed, self.mesh)
    elif several:
      tasks = placement.Resident(jax.tree.map(lambda *x: jnp.stack(x), *states), _stack([m.data for m in members]),
                                 *map(jnp.asarray, numbers), self._train_together, self._evaluate_together, stacked=True)
    else:
      tasks = placement.Resident(states[0], members[0].data, *(jnp.asarray(n[0]) for n in numbers), self._train,
                                 self._evaluate, stacked=False)

    writers = [reporting.MetricsWriter(m.workdir) for m in members] if jax.process_index() == 0 else []
    rows, errors, round_ms, done = [[] for _ in members], {}, [], 0
    quiet = quiet or jax.process_index() > 0
    progress = Progress(config.rounds, quiet, "round", clock)
    for count in blocks:
      if len(errors) == len(members):
        break
      metrics, seconds = tasks.advance(count)
      round_ms += [1000 * seconds / count / len(members)] * count
      done += count
      losses = metrics["loss"].mean(-1)
      for i, member in enumerate(members):
        if not np.isfinite(losses[i]) and i not in errors:
          errors[i] = _diverged(config, member, losses[i], done)
      progress.show(loss=np.mean(losses))
      evaluated = done % config.eval_every == 0 or done == config.rounds
      if evaluated and len(errors) < len(members):
        threshold, before, after = tasks.evaluate()
        for i in range(len(members)):
          if i not in errors:
            rows[i].append(_row(done, float(losses[i]), *jax.tree.map(lambda x, i=i: x[i], (before, after)), config.gated)
                           | {"pruned": self._pruned(self.algorithm.deploy(tasks.server(i)))[0] if config.prune.sparsity else None})
        for i, writer in enumerate(writers):
          if i not in errors:
            writer.write(rows[i][-1])
        shown = [row[-1] for i, row in enumerate(rows) if i not in errors]
        progress.show(accuracy=np.mean([row["accuracy_mean"] for row in shown]),
                      sparsity=np.mean([row["sparsity_mean"] for row in shown]) if config.gated else None)
      progress.advance(count, evaluated)
    progress.close()
    tasks.close()

    results = {}
    for i, member in enumerate(members):
      seed = member.config.seed
      if i in errors:
        results[seed] = errors[i]
        continue
      params = self.algorithm.deploy(tasks.server(i))
      learning = self._learning_seconds(params, tasks, i, member.tasks.target, jnp.asarray(threshold[i]))
      seconds = {name: value / len(members) for name, value in clock.seconds.items()}
      seconds["total"] = (time.perf_counter() - start) / len(members)
      results[seed] = self._finish(member, params, threshold[i], *jax.tree.map(lambda x, i=i: x[i], (before, after)), rows[i],
                                   {"round_ms": float(np.median(round_ms)), "learning_seconds": learning,
                                    "seconds": seconds, "seeds_together": len(members)}, quiet)
    return results

  def _learning_seconds(self, params, tasks, i, targets, threshold):
    """Median time of both stages of the adaptation for one target task, compiled, over a few of them."""
    seconds = []
    for data in tasks.train_data(i, targets[:5]):
      self._adapt(params, data, threshold)
      seconds.append(self._adapt.seconds)
    return float(np.median(seconds))

  def _pruned(self, params):
    """The fraction that pruning has removed of the backbone's kernels, or filters, and the mask; None without pruning."""
    if not self.config.prune.sparsity:
      return None, None
    prunable, granularity = partial(registry.is_pruned, self.config.prune), self.config.prune.granularity
    mask = mg.nonzero_mask(params, granularity=granularity, prunable=prunable)
    return float(mg.mask_sparsity(mask, prunable, granularity=granularity)), mask

  def _finish(self, member, params, threshold, before, after, rows, times, quiet):
    config, workdir = member.config, member.workdir
    targets, partition, labels = member.tasks.target, member.tasks.partition, np.asarray(self.dataset.labels)
    target_labels = [np.unique(labels[partition.train[task]]).tolist() for task in targets]
    dense_macs, dense_parameters = mg.dense_cost(self.layers)
    pruned, mask = self._pruned(params)
    left = dict.fromkeys(("kept", "effective", "macs")) if mask is None else what_is_left(self.network, mask, self.image_shape)
    result = {
        "name": config.name, "algorithm": config.algorithm, "gated": config.gated, "seed": config.seed,
        "rounds": config.rounds, "local_steps": config.local_steps, "target_labels": target_labels,
        "accuracy": reporting.summary(after.accuracy),
        "accuracy_before_adaptation": reporting.summary(before.accuracy),
        "sparsity": reporting.summary(after.sparsity) if config.gated else None,
        "sparsity_before_adaptation": reporting.summary(before.sparsity) if config.gated else None,
        "on_rate": {layer: np.round(rate, 3).tolist() for layer, rate in after.on_rate.items()},
        "macs": {"dense": dense_macs, "gated": float(after.macs.mean()) if config.gated else None, "effective": left["macs"]},
        "parameters": {"dense": dense_parameters, "gated": float(after.parameters.mean()) if config.gated else None},
        "pruned": pruned, "parameters_kept": left["kept"], "parameters_effective": left["effective"],
        "gate_threshold": float(threshold) if config.gated else None,
        **times,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "backend": jax.default_backend(),
                     "metagater_jax": importlib.metadata.version("metagater_jax"), "devices": jax.device_count() if
                     self.mesh is None else self.mesh.size, "processes": jax.process_count()},
    }
    if jax.process_index() > 0:
      return result
    save_parameters(workdir / "meta_model.npz", params, threshold=threshold)
    reporting.plot_accuracy(workdir / "accuracy.png", rows,
                            f"{config.name}: mean ± spread over {len(targets)} target tasks")
    reporting.plot_tasks(workdir / "tasks.png", result, [
        {"task": int(task), "labels": names, "train_samples": len(partition.train[task])}
        for task, names in zip(targets, target_labels)])
    reporting.write_json(workdir / "result.json", result)  # last: a folder that has it is a finished run
    if not quiet:
      print(reporting.result_table(result))
      print(f"figures: {workdir / 'accuracy.png'}, {workdir / 'tasks.png'}; everything else is in {workdir}")
    return result


def _diverged(config, member, loss, done):
  lower = ", ".join(f"{field} (now {config[field]:g})" for field in ("beta", "local_lr", "server_lr") if config[field])
  return DivergedError(f"the loss is {loss} after round {done}: meta-training diverged. Lower {lower}"
                       f"{', or set gamma=plain' if config.algorithm == 'metagater' else ''}. What was computed until then "
                       f"is in {member.workdir}.")


# Axes of a population in which the seeds' tasks are stacked and their pool of images is shared.
_STACKED_POPULATION = mg.Population(None, None, 0, 0, 0, 0, None)


def _stack(populations):
  indexed = [(p.train_index, p.train_count, p.test_index, p.test_count) for p in populations]
  return populations[0]._replace(**dict(zip(("train_index", "train_count", "test_index", "test_count"),
                                            map(jnp.stack, zip(*indexed)))))


def what_is_left(network: mg.GatedNetwork, mask: Mapping[str, Any], image_shape: Sequence[int]) -> dict[str, int]:
  """How many of the backbone's parameters a mask keeps, how many of these are effective (`metagater_jax.effective_mask`), and the
  multiply-accumulates per image of those."""
  apply = lambda backbone, images: network.backbone.apply({"params": backbone}, images)
  backbone = mask["backbone"]
  count = lambda tree: int(sum(leaf.sum() for leaf in jax.tree.leaves(tree)))
  effective = mg.effective_mask(apply, backbone, jnp.ones((8, *image_shape)))
  return {"kept": count(backbone), "effective": count(effective),
          "macs": round(float(mg.masked_macs(network.layers(image_shape), effective)))}


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


def load(config: ConfigDict, dataset: Dataset | None = None) -> Dataset:
  """The data set of a config, checked against it.

  Raises:
    ConfigError: a data set that is not there, or does not fit the network.
  """
  try:
    dataset = dataset or load_dataset(config.dataset, config.data_dir)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  check_dataset(config, dataset)
  return dataset


def make_tasks(config: ConfigDict, dataset: Dataset) -> Tasks:
  """How the data of a config is distributed over tasks, and what each task is for.

  Raises:
    ConfigError: data that cannot be distributed as the config wants it.
  """
  try:
    partition = registry.make_partition(config, np.asarray(dataset.labels))
  except ValueError as error:  # of the partitioner, whose messages name the config's fields
    raise ConfigError(str(error)) from error
  return Tasks(partition, *mg.split_tasks(config.tasks, config.target_tasks, config.seed, seen=config.target_tasks_seen,
                                          validation=config.validation_tasks))


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


def check_workdir(workdir: Path) -> None:
  """Raises a ConfigError where a run cannot go."""
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f"the workdir {workdir} is a file; give a folder.")
  held = [name for name in ("config.json", "metrics.jsonl", "result.json") if (workdir / name).exists()]
  if held:
    raise ConfigError(f"the workdir {workdir} already holds another run ({', '.join(held)}); give a new folder, or remove "
                      "this one.")

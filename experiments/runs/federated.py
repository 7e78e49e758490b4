"""The one loop that runs any federated algorithm on any population, for one seed or several, and writes what it finds."""

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import metagater_jax as mg
from experiments.config import ConfigError, registry
from experiments.config.federated import base_config, check_config, check_dataset
from experiments.config.fields import with_fields
from experiments.runs import placement, records
from experiments.runs.live import Progress, Writers, check_log
from experiments.runs.measures import gates_of, spread, what_is_left
from experiments.runs.programs import Clock, Compiled, compiler_options, dispatches
from experiments.runs.records import DivergedError, NotSavedError, check_workdir
from metagater_jax.core.trees import named_leaves
from metagater_jax.data.datasets import Dataset, load_dataset
from metagater_jax.federated.host_tasks import TaskStore

__all__ = ["Tasks", "check_same_tasks", "load", "make_tasks", "run_seeds"]


def run_seeds(
  config: ConfigDict,
  workdirs: Mapping[int, str | Path],
  dataset: Dataset | None = None,
  quiet: bool = False,
  by_seed: Mapping[int, Mapping[str, str]] | None = None,
) -> dict[int, "dict[str, Any] | DivergedError | NotSavedError"]:
  """Meta-trains on the training tasks of a config, adapts to its target tasks, and records everything in the workdirs, by seed.

  There is one compilation for all seeds. The data is loaded once, and the seeds' tasks are padded to one shape. With `config.seed_axis` "vmap"
  the seeds are a leading axis of every array and advance together: for accelerators that one seed's round does not fill. With "loop" they
  run one after the other, which was faster on two cores even for the MNIST round.

  Args:
    config: as the files in configs/ make it; its fields are in `experiments.config.federated`. Its `seed` is replaced.
    workdirs: a folder for each seed that holds no other run; it is made if it is missing.
    dataset: images and labels of your own instead of those that `config.dataset` names.
    quiet: no progress line.
    by_seed: values of `meta_model` and `sparsity_of`, the only fields beside the seed that may differ between seeds.

  Returns:
    By seed, what `result.json` holds, or the error of a seed that diverged or could not be saved (which the others outlive).

  Raises:
    ConfigError: before any long work.
  """
  start = time.perf_counter()
  seeds = list(workdirs)
  workdirs = {seed: Path(workdir) for seed, workdir in workdirs.items()}
  configs = {seed: check_config(with_fields(config, seed=seed, **(by_seed or {}).get(seed, {}))) for seed in seeds}
  config = configs[seeds[0]]
  mesh = placement.make_mesh(config)
  for own in configs.values():
    own.microbatch = placement.microbatch(own, registry.make_network(own, classes=2), mesh)
  together = config.seed_axis == "vmap" and len(seeds) > 1
  streamed = mesh is not None or config.memory_mb is not None
  if together and streamed:
    raise ConfigError("seed_axis is 'vmap', which needs all tasks on one device; leave out mesh and memory_mb.")
  if config.sparsity_of is not None and (streamed or together):
    raise ConfigError("sparsity_of needs all tasks of a seed on one device; leave out mesh, memory_mb and seed_axis.")
  if jax.process_index() == 0:
    for seed, workdir in workdirs.items():
      check_log(configs[seed].log)
      check_workdir(workdir, configs[seed])
  with records.claim(*(workdirs.values() if jax.process_index() == 0 else ())):
    return _run_seeds(configs, workdirs, dataset, quiet, mesh, together, streamed, start)


def _run_seeds(configs, workdirs, dataset, quiet, mesh, together, streamed, start):
  seeds = list(workdirs)
  config = configs[seeds[0]]
  clock = Clock("load", "compile", "train", "evaluate")
  with clock("load"):
    dataset = load(config, dataset)
    tasks = {seed: make_tasks(configs[seed], dataset) for seed in seeds}
    partitions, scale = [tasks[seed].partition for seed in seeds], (config.pixel_mean, config.pixel_std)
    if streamed:
      data = [TaskStore(dataset.images, dataset.labels, partition, scale, dataset.classes) for partition in partitions]
    else:
      data = mg.data.make_populations(dataset.images, np.asarray(dataset.labels), partitions, scale, classes=dataset.classes)
    data = dict(zip(seeds, data))
  experiment = _Experiment(config, dataset, clock, mesh)
  given = {seed: experiment.given(configs[seed]) for seed in seeds}
  if streamed:
    experiment.check_memory([(tasks[seed], data[seed]) for seed in seeds])
  results = {}
  for group in [seeds] if together else [[seed] for seed in seeds]:
    members = [_Member(configs[seed], workdirs[seed], tasks[seed], data[seed], *given[seed]) for seed in group]
    if jax.process_index() == 0:
      for member in members:
        member.open(dataset)
    results |= experiment.run(members, quiet, start)
    start = time.perf_counter()
    clock.reset()  # what the next seed finds loaded and compiled costs it nothing
  return results


class Tasks(NamedTuple):
  """How the data of a config is distributed: the partition, and which of its tasks are for what (sorted numbers)."""

  partition: mg.data.Partition
  training: np.ndarray
  validation: np.ndarray
  target: np.ndarray

  def calibration(self, count: int) -> np.ndarray:
    """At most `count` tasks that set what targets need beside the meta-model: not trained on, where there are such."""
    return (self.validation if len(self.validation) else self.training)[:count]


class _Member(NamedTuple):
  """One seed of an experiment; `model` is given instead of trained, `sparsity` (targets,) given instead of learned."""

  config: ConfigDict
  workdir: Path
  tasks: Tasks
  data: "mg.data.Population | TaskStore"
  model: mg.Model | None
  sparsity: np.ndarray | None

  def open(self, dataset):
    self.workdir.mkdir(parents=True, exist_ok=True)
    records.write_json(self.workdir / "config.json", json.loads(self.config.to_json_best_effort()))
    partition = self.tasks.partition
    records.write_json(
      self.workdir / "partition.json",
      {
        "dataset": dataset.name,
        "samples": len(dataset.labels),
        "training_tasks": self.tasks.training.tolist(),
        "validation_tasks": self.tasks.validation.tolist(),
        "target_tasks": self.tasks.target.tolist(),
      },
      tasks=({"train": train.tolist(), "test": test.tolist()} for train, test in zip(partition.train, partition.test)),
    )


class _Experiment:
  """The compiled functions of a config, which all its seeds share."""

  def __init__(self, config, dataset, clock, mesh):
    self.config, self.dataset, self.clock, self.mesh = config, dataset, clock, mesh
    self.rounds_per_dispatch = config.rounds_per_dispatch
    self.network = registry.make_network(config, dataset.classes)
    self.algorithm = registry.make_algorithm(config, self.network) if config.meta_model is None else _GIVEN
    self.personalizer = registry.make_personalizer(config, self.network)
    self.image_shape = dataset.images.shape[1:]
    self.layers = self.network.layers(self.image_shape)
    train = partial(
      mg.run_rounds,
      self.algorithm,
      cohort=config.cohort,
      batch_size=config.batch_size,
      weighted=config.weighted,
      task_axis=registry.train_axis(config, self.network, self.algorithm),
    )
    options = {"compiler_options": compiler_options(small=self.network.small)}
    self._train = Compiled(clock, "train", train, donate_argnums=0, **options)
    evaluate = placement.evaluate_function(self.algorithm.deploy, self.personalizer, self.network, config)
    self._evaluate = Compiled(clock, "evaluate", evaluate, **options)
    self._train_streamed = Compiled(clock, "train", placement.train_function(self.algorithm, self.network, config, mesh), donate_argnums=0, **options)
    self._evaluate_streamed = Compiled(
      clock, "evaluate", placement.evaluate_function(self.algorithm.deploy, self.personalizer, self.network, config, mesh), **options
    )
    axes = _STACKED_POPULATION
    self._train_together = Compiled(
      clock, "train", lambda *arguments, **static: jax.vmap(partial(train, **static), in_axes=(0, axes, 0))(*arguments), donate_argnums=0, **options
    )
    self._evaluate_together = Compiled(clock, "evaluate", jax.vmap(evaluate, in_axes=(0, axes, 0, 0, axes, 0)), **options)
    self._adapt = Compiled(clock, "evaluate", self.personalizer.adapt, **options)

  def given(self, config):
    """The model that a config takes instead of training one, and the sparsity of each target that it takes from another run.

    Raises:
      ConfigError: a model of another network, or a run of other target tasks.
    """
    model = sparsity = None
    if config.meta_model is not None:
      model, _ = records.load_model(config.meta_model)
      shapes = lambda tree: {name: leaf.shape for name, leaf in named_leaves(tree).items()}
      held, wanted = shapes(model.params), shapes(jax.eval_shape(lambda key: self.network.init(key, self.image_shape), jax.random.key(0)))
      if differing := sorted(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name)):
        raise ConfigError(
          f"the model in {config.meta_model} is of another network: {differing[0]} is {held.get(differing[0])} there and "
          f"{wanted.get(differing[0])} here. Give the config of that run's network (model, widths, gated, gated_layers)."
        )
      model = jax.tree.map(jnp.asarray, model)
    if config.sparsity_of is not None:
      reached = records.read_result(config.sparsity_of)["sparsity"]
      check_same_tasks(config, config.sparsity_of, "sparsity_of")
      if reached is None:
        raise ConfigError(
          f"sparsity_of is {config.sparsity_of}, whose targets have no sparsity: it has neither gates nor a personalizer that prunes."
        )
      sparsity = np.asarray(reached["per_task"], np.float32)
    return model, sparsity

  def check_memory(self, tasks_and_stores):
    """Raises a ConfigError, before anything is compiled, where the tasks of a seed do not fit in `memory_mb`."""
    for tasks, store in tasks_and_stores:
      evaluated = [*tasks.calibration(self.config.calibration_tasks), *tasks.target]
      self.rounds_per_dispatch = min(self.rounds_per_dispatch, placement.check_memory(self.config, store, self.algorithm.draws, self.mesh, evaluated))

  def run(self, members, quiet, start):
    """Trains and evaluates the seeds of `members`, together if there are several; results or errors by seed."""
    config, clock, several = self.config, self.clock, len(members) > 1
    states = [
      mg.federated_init(self.algorithm, self.network.init(init_key, self.image_shape) if m.model is None else m.model, run_key)
      for m, (init_key, run_key) in ((m, jax.random.split(jax.random.key(m.config.seed))) for m in members)
    ]
    rounds = 0 if config.meta_model else config.rounds
    blocks = dispatches(rounds, config.eval_every, self.rounds_per_dispatch)
    numbers = [np.stack(part) for part in zip(*((m.tasks.training, m.tasks.calibration(config.calibration_tasks), m.tasks.target) for m in members))]
    if isinstance(members[0].data, TaskStore):
      tasks = placement.Streamed(
        config, self.algorithm, states[0], members[0].data, *(n[0] for n in numbers), blocks, self._train_streamed, self._evaluate_streamed, self.mesh
      )
    elif several:
      tasks = placement.Resident(
        jax.tree.map(lambda *x: jnp.stack(x), *states),
        _stack([m.data for m in members]),
        *map(jnp.asarray, numbers),
        self._train_together,
        self._evaluate_together,
        stacked=True,
      )
    else:
      tasks = placement.Resident(
        states[0], members[0].data, *(jnp.asarray(n[0]) for n in numbers), self._train, self._evaluate, stacked=False, given=members[0].sparsity
      )

    writers = [Writers(m.workdir, m.config) for m in members] if jax.process_index() == 0 else []
    rows, errors, round_ms, done = [[] for _ in members], {}, [], 0
    quiet = quiet or jax.process_index() > 0 or not rounds
    progress = Progress(rounds, quiet, "round", clock, _title(config, members))
    for count in blocks or [0]:  # without rounds a given model is evaluated once
      if len(errors) == len(members):
        break
      losses = [None] * len(members)
      if count:
        metrics, seconds = tasks.advance(count)
        round_ms += [1000 * seconds / count / len(members)] * count
        done += count
        losses = metrics["loss"].mean(-1).astype(float).tolist()
        for i, member in enumerate(members):
          if not np.isfinite(losses[i]) and i not in errors:
            errors[i] = _diverged(config, member, losses[i], done)
        progress.show(loss=np.mean(losses))
      evaluated = done % config.eval_every == 0 or done == rounds
      if evaluated and len(errors) < len(members):
        calibration, before, after = tasks.evaluate()
        for i in range(len(members)):
          if i not in errors:
            rows[i].append(
              _row(done, losses[i], *jax.tree.map(lambda x, i=i: x[i], (before, after)), config.gated)
              | {"pruned": self._pruned(self.algorithm.deploy(tasks.server(i)))}
            )
        for i, writer in enumerate(writers):
          if i not in errors:
            writer.write(rows[i][-1])
        shown = [row[-1] for i, row in enumerate(rows) if i not in errors]
        progress.show(
          accuracy_before=np.mean([row["accuracy_before_mean"] for row in shown]),
          accuracy=np.mean([row["accuracy_mean"] for row in shown]),
          sparsity=np.mean([row["sparsity_mean"] for row in shown]) if config.gated else None,
        )
      progress.advance(count, evaluated)
    progress.close()
    for writer in writers:
      writer.close()
    tasks.close()

    results = {}
    for i, member in enumerate(members):
      seed = member.config.seed
      if i in errors:
        results[seed] = errors[i]
        continue
      model, own = self.algorithm.deploy(tasks.server(i)), jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), calibration)
      learning = self._learning_seconds(model, tasks, i, member.tasks.target, own, member.sparsity is not None)
      seconds = {name: value / len(members) for name, value in clock.seconds.items()}
      seconds["total"] = (time.perf_counter() - start) / len(members)
      times = {
        "round_ms": float(np.median(round_ms)) if round_ms else None,
        "learning_seconds": learning,
        "seconds": seconds,
        "seeds_together": len(members),
      }
      try:
        results[seed] = self._finish(member, model, own, *jax.tree.map(lambda x, i=i: x[i], (before, after)), times)
      except NotSavedError as error:
        results[seed] = error
    return results

  def _learning_seconds(self, model, tasks, i, targets, calibration, by_task):
    """Median time of the adaptation for one target task, compiled, over a few of them."""
    seconds = []
    for j, data in enumerate(tasks.train_data(i, targets[:5])):
      self._adapt(model, data, calibration[j] if by_task else calibration)
      seconds.append(self._adapt.seconds)
    return float(np.median(seconds))

  def _pruned(self, model):
    """The fraction that pruning has removed of the backbone's kernels, or filters; None where nothing is pruned in training."""
    prune = self.config.prune
    if model.mask is None or not prune.sparsity:
      return None
    return float(mg.pruning.mask_sparsity(model.mask, registry.prunable_of(prune, self.network), granularity=prune.granularity))

  def _channel_macs(self, kept):
    """MACs without the channels that a personalizer has removed as a whole; None where it removes weights, or nothing."""
    return float(np.mean(mg.nn.gated_macs(self.layers, kept))) if _are_whole(kept) else None

  def _finish(self, member, model, calibration, before, after, times):
    config, workdir = member.config, member.workdir
    targets, partition, labels = member.tasks.target, member.tasks.partition, np.asarray(self.dataset.labels)
    target_labels = [np.unique(labels[partition.train[task]]).tolist() for task in targets]
    dense_macs, dense_parameters = mg.nn.dense_cost(self.layers)
    pruned = self._pruned(model)
    left = dict.fromkeys(("kept", "effective", "macs")) if pruned is None else what_is_left(self.network, model.mask, self.image_shape)
    removed = None if self.personalizer.prunable is None else records.summary(_removed(after))
    rounds = config.rounds if config.meta_model is None else records.read_result(config.meta_model).get("rounds")
    learned = registry.PERSONALIZERS[config.personalizer].needs_gates and calibration is not None
    threshold = {"threshold": calibration} if learned else {}
    on_rate = after.on_rate or {layer: kept > 0 for layer, kept in after.kept.items()}
    result = {
      "name": config.name,
      "algorithm": config.algorithm,
      "gated": config.gated,
      "personalizer": config.personalizer,
      "seed": config.seed,
      "rounds": rounds,
      "local_steps": config.local_steps,
      "meta_model": config.meta_model,
      "target_labels": target_labels,
      "target_tasks": targets.tolist(),
      "target_train_samples": [len(partition.train[task]) for task in targets],
      "accuracy": records.summary(after.accuracy),
      "accuracy_before_adaptation": records.summary(before.accuracy),
      "sparsity": records.summary(after.sparsity) if config.gated else removed,
      "sparsity_before_adaptation": records.summary(before.sparsity) if config.gated else None,
      "on_rate": {layer: np.round(rate.astype(np.float32), 3).tolist() for layer, rate in on_rate.items()},
      "macs": {"dense": dense_macs, "effective": left["macs"], "gated": float(after.macs.mean()) if config.gated else self._channel_macs(after.kept)},
      "parameters": {"dense": dense_parameters, "gated": float(after.parameters.mean()) if config.gated else None},
      "pruned": pruned,
      "parameters_kept": left["kept"],
      "parameters_effective": left["effective"],
      "gate_threshold": float(calibration) if threshold else None,
      # The fraction of gated channels that are neither on nor off for all of a target's test images, see `personalize.conditional`.
      "conditional": records.summary(np.asarray(mg.personalize.conditional(after.on_rate))) if config.gated else None,
      "gates": {"before": gates_of(before), "after": gates_of(after)} if config.gated else None,
      **times,
      "versions": records.versions() | {"devices": jax.device_count() if self.mesh is None else self.mesh.size},
    }
    if jax.process_index() > 0:
      return result
    records.save_run(workdir, model, result, **threshold)
    return result


def _are_whole(kept):
  """Whether a personalizer has removed nothing but whole channels."""
  return bool(kept) and all(np.isin(rate, (0, 1)).all() for rate in kept.values())


def _removed(metrics):
  """(tasks,) the fraction that a personalizer has removed: of the channels, where these go as a whole, as a gate's sparsity is, or else of the
  weights."""
  if not _are_whole(metrics.kept):
    return metrics.removed
  return 1 - np.concatenate([np.asarray(rate, np.float64) for rate in metrics.kept.values()], axis=1).mean(1)


# Fields that the tasks of a config, and which of them are targets, are a function of.
_TASK_FIELDS = (
  "dataset",
  "seed",
  "tuning_fraction",
  "partition",
  "tasks",
  "target_tasks",
  "validation_tasks",
  "target_tasks_seen",
  "labels_per_task",
  "cyclic_labels",
  "size_range",
  "fill",
  "test_fraction",
  "concentration",
)

# In the place of an algorithm where the meta-model is given: the server's state is the model, and there are no rounds.
_GIVEN = mg.federated.FederatedAlgorithm(
  init=lambda model: model, broadcast=lambda model: model, client_update=None, server_update=None, deploy=lambda model: model
)


def check_same_tasks(config: ConfigDict, run: str | Path, option: str) -> None:
  """Raises a ConfigError if the tasks of a finished run, which an option names, are not those of a config."""
  other = base_config().to_dict() | records.read_config(run)  # a field that is newer than the run had its default
  own = json.loads(config.to_json_best_effort())
  if differing := [field for field in _TASK_FIELDS if other.get(field) != own[field]]:
    raise ConfigError(f"{option} is {run}, a run of other tasks: {differing[0]} is {other.get(differing[0])} there and {own[differing[0]]} here.")


def _title(config, members):
  seeds = ", ".join(str(member.config.seed) for member in members)
  return f"{config.name}: {config.algorithm}{', gated' if config.gated else ''}, seed{'s' if len(members) > 1 else ''} {seeds}"


def _diverged(config, member, loss, done):
  lower = ", ".join(f"{field} (now {config[field]:g})" for field in ("beta", "local_lr", "server_lr") if config[field])
  return DivergedError(
    f"the loss is {loss} after round {done}: meta-training diverged. Lower {lower}"
    f"{', or set gamma=plain' if config.gamma not in (None, 'plain') else ''}. What was computed until then "
    f"is in {member.workdir}."
  )


# Axes of a population in which the seeds' tasks are stacked and their pool of images is shared.
_STACKED_POPULATION = mg.data.Population(None, None, 0, 0, 0, 0, None)


def _stack(populations):
  indexed = [(p.train_index, p.train_count, p.test_index, p.test_count) for p in populations]
  return populations[0]._replace(**dict(zip(("train_index", "train_count", "test_index", "test_count"), map(jnp.stack, zip(*indexed)))))


def load(config: ConfigDict, dataset: Dataset | None = None) -> Dataset:
  """The data set of a config, checked against it.

  Raises:
    ConfigError: a data set that is not there, or does not fit the network.
  """
  try:
    row = registry.DATASETS.get(config.dataset, registry.DatasetRow(load=partial(load_dataset, config.dataset)))
    if dataset is None and row.load is None:
      raise ConfigError(f"the data set '{config.dataset}' is made of few-shot episodes; try `python -m experiments.fewshot`.")
    dataset = dataset or row.load(config.data_dir)
  except ConfigError:
    raise
  except ValueError as error:
    raise ConfigError(str(error)) from error
  check_dataset(config, dataset)
  return dataset


def make_tasks(config: ConfigDict, dataset: Dataset, tuning: bool = False) -> Tasks:
  """How the data of a config is distributed over tasks, and what each task is for; with `tuning` the images that are in no task of a run.

  Raises:
    ConfigError: data that cannot be distributed as the config wants it.
  """
  try:
    partition = registry.make_partition(config, dataset, tuning)
    if len(partition) == config.tasks:
      return Tasks(
        partition,
        *mg.data.split_tasks(config.tasks, config.target_tasks, config.seed, seen=config.target_tasks_seen, validation=config.validation_tasks),
      )
    # Natural tasks, of which fewer are for tuning: as large a part is held out, and as nothing is a target there, all of that is for validation.
    share = lambda count: max(1, round(count * len(partition) / config.tasks))
    training, validation, target = mg.data.split_tasks(
      len(partition), share(config.target_tasks), config.seed, validation=share(config.validation_tasks)
    )
    return Tasks(partition, training, np.sort(np.concatenate([validation, target])), target)
  except ValueError as error:  # of the partitioner, whose messages name the config's fields
    raise ConfigError(str(error)) from error


def _row(round_, loss, before, after, gated):
  values = {"accuracy": after.accuracy, "accuracy_before": before.accuracy}
  row = {"round": round_, "train_loss": loss}
  for name, array in values.items():
    row |= {f"{name}_mean": float(array.mean()), f"{name}_std": spread(array)}
  row |= {
    "target_loss": float(after.loss.mean()),
    "sparsity_mean": float(after.sparsity.mean()) if gated else None,
    "sparsity_std": spread(after.sparsity) if gated else None,
    "sparsity_before_mean": float(before.sparsity.mean()) if gated else None,
    "conditional_mean": float(np.mean(mg.personalize.conditional(after.on_rate))) if gated else None,
  }
  return row

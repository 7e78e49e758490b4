"""Where a run's tasks are while it computes: on one device, or on the host and spread over any number of devices.

Both ways give the same rounds; `experiments.runs.federated` drives either.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import metagater_jax as mg
from experiments.config import ConfigError, registry
from metagater_jax.core.trees import Model
from metagater_jax.federated.host_tasks import PlannedRounds, TaskStore, rounds_in_memory

__all__ = ["Resident", "Streamed", "check_memory", "evaluate_function", "make_mesh", "microbatch", "round_bytes", "train_function", "use_cores"]


def make_mesh(config: ConfigDict) -> Mesh | None:
  """The devices that `config.mesh` asks for; None: the default device alone.

  Raises:
    ConfigError: more devices than there are, or not all of those of several processes.
  """
  devices = jax.devices()
  if config.mesh == "none" and jax.process_count() == 1:
    return None
  if config.mesh == "auto" or config.mesh == "none":
    return mg.core.task_mesh(devices) if len(devices) > 1 else None
  count = int(config.mesh)
  have = f"there are {len(devices)} {jax.default_backend()} device{'s' if len(devices) > 1 else ''}"
  if count > len(devices):
    hint = (
      " On a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count to have more."
      if jax.default_backend() == "cpu" and jax.process_count() == 1
      else ""
    )
    raise ConfigError(
      f"mesh is {count}, but {have} in {jax.process_count()} process{'es' if jax.process_count() > 1 else ''}; use mesh=auto for all of them.{hint}"
    )
  if jax.process_count() > 1 and count != len(devices):
    raise ConfigError(f"mesh is {count}, but {have} in {jax.process_count()} processes, each of which must take part; use mesh=auto.")
  return mg.core.task_mesh(devices[:count])


def use_cores(config: ConfigDict) -> None:
  """Where `config.mesh` is "auto" and JAX has only a CPU: makes a device of each core. To be called before JAX is used.

  Most operations in a loop use one core, so as many loops over fewer tasks are faster than one over all.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if config.mesh == "auto" and not forced and jax.config.jax_num_cpu_devices < 2:
    try:
      jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:
      logging.warning(
        "mesh is 'auto', but JAX is in use already, with %d device(s) for %d cores; to use all, set "
        "jax.config.update('jax_num_cpu_devices', %d) before anything else.",
        len(jax.devices()),
        cores,
        cores,
      )


def microbatch(config: ConfigDict, network: mg.GatedNetwork, mesh: Mesh | None) -> int:
  """`config.microbatch`; None: 2 where convolutions run on cores of a CPU, whose caches hold the intermediates of so many
  samples (`python -m benchmarks --only=cores`), or else 0, whole batches."""
  if config.microbatch is not None:
    return config.microbatch
  cut = mesh is not None and jax.default_backend() == "cpu" and network.rowwise and not network.small
  return 2 if cut else 0


def round_bytes(config: ConfigDict, store: TaskStore, draws: int, mesh: Mesh | None) -> int:
  """What the minibatches of one round take in this process."""
  clients = config.cohort
  if mesh is not None:
    each = -(-config.cohort // mesh.size)
    clients = each * sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
  return clients * draws * min(config.batch_size, store.longest) * store.sample_bytes


def check_memory(config: ConfigDict, store: TaskStore, draws: int, mesh: Mesh | None, evaluated: Sequence[int]) -> int:
  """Rounds per dispatch that `config.memory_mb` allows, at most `config.rounds_per_dispatch`.

  Raises:
    ConfigError: not even one round fits.
  """
  if config.memory_mb is None:
    return config.rounds_per_dispatch
  try:
    rounds = rounds_in_memory(
      config.memory_mb * 2**20, round_bytes=round_bytes(config, store, draws, mesh), other_bytes=store.population_bytes(evaluated)
    )
  except ValueError as error:
    raise ConfigError(f"memory_mb is {config.memory_mb}: {error}") from error
  return min(rounds, config.rounds_per_dispatch)


def evaluate_function(
  deploy: Callable[[Any], Model], personalizer: mg.personalize.Personalizer, network: mg.GatedNetwork, config: ConfigDict, mesh: Mesh | None = None
):
  """`(server, calibration population, its tasks, their share, target population, its tasks, given) -> calibration, metrics before
  adaptation, metrics after`. `given` (targets,) is a calibration for each target instead of what is learned; None: none. Over a mesh both
  populations are spread, as `TaskStore.population` makes them."""

  def evaluate(server, calibration, calibration_tasks, share, population, targets, given=None, axis_name=None):
    model = deploy(server)
    calibrated = personalizer.calibrate(model, calibration, calibration_tasks, share, axis_name) if given is None else given
    before, after = mg.evaluate_targets(
      network,
      personalizer,
      model,
      population,
      targets,
      calibrated,
      by_task=given is not None,
      chunk=config.chunk,
      task_axis=registry.evaluation_axis(config, network),
    )
    return calibrated, before, after

  if mesh is None:
    return evaluate

  def local(server, calibration, share, population):
    """On the tasks of one device."""
    own = lambda population: jnp.arange(population.train_count.shape[0])
    calibrated, *metrics = evaluate(server, calibration, own(calibration), share, population, own(population), None, mg.core.TASK_AXIS)
    return calibrated, *jax.tree.map(lambda x: jax.lax.all_gather(x, mg.core.TASK_AXIS, tiled=True), metrics)

  tasks, everywhere = PartitionSpec(mg.core.TASK_AXIS), PartitionSpec()
  spread = mg.data.Population(tasks, tasks, tasks, tasks, tasks, tasks, everywhere)
  spread_local = jax.shard_map(local, mesh=mesh, in_specs=(everywhere, spread, tasks, spread), out_specs=everywhere, check_vma=False)
  return lambda server, calibration, _, share, population, __: spread_local(server, calibration, share, population)


def train_function(algorithm: mg.federated.FederatedAlgorithm, network: mg.GatedNetwork, config: ConfigDict, mesh: Mesh | None = None):
  """`(server, planned rounds, pixel scale) -> server, metrics`, for rounds that come from a `TaskStore`."""

  def train(server, planned: PlannedRounds, scale):
    plan = planned.plan._replace(keys=jax.random.wrap_key_data(planned.key_data))
    return mg.federated.follow_plan(
      algorithm,
      server,
      plan,
      planned.minibatches,
      mg.data.Pool(None, None, scale),
      task_axis=registry.train_axis(config, network, algorithm),
      mesh=mesh,
    )

  return train


class Resident:
  """All tasks on the default device, of one seed or of several that advance together (`stacked`)."""

  def __init__(self, state, population, training, calibration, targets, train, evaluate, stacked: bool, given=None):
    self._given = given
    self._state, self._population = state, population
    self._training, self._calibration, self._targets = training, calibration, targets
    self._train, self._evaluate, self._stacked = train, evaluate, stacked

  def advance(self, rounds: int) -> tuple[Any, float]:
    """Metrics with leading axes (seeds, rounds), and the seconds it took."""
    self._state, metrics = self._train(self._state, self._population, self._training, rounds=rounds)
    return self._by_seed(metrics), self._train.seconds

  def evaluate(self) -> tuple[Any, mg.personalize.TaskMetrics, mg.personalize.TaskMetrics]:
    """Calibration, and metrics before and after adaptation, with leading axes (seeds, targets)."""
    share = jnp.ones(self._calibration.shape)
    given = () if self._given is None else (self._given,)
    return self._by_seed(self._evaluate(self._state.server, self._population, self._calibration, share, self._population, self._targets, *given))

  def server(self, i: int) -> Any:
    """The server's state of the i-th seed."""
    return jax.tree.map(lambda x: x[i], self._state.server) if self._stacked else self._state.server

  def train_data(self, i: int, numbers: Sequence[int]) -> list[mg.data.TaskData]:
    """Train data of some tasks of the i-th seed."""
    population = self._population
    index, count = (x[i] if self._stacked else x for x in (population.train_index, population.train_count))
    return [mg.data.TaskData(population.images, population.labels, index[n], count[n], population.scale) for n in numbers]

  def close(self) -> None:
    """Nothing to end."""

  def _by_seed(self, tree):
    tree = jax.device_get(tree)
    return tree if self._stacked else jax.tree.map(lambda x: np.asarray(x)[None], tree)


class Streamed:
  """Tasks on the host: minibatches of the next rounds are fetched while the devices, one or a mesh, compute."""

  def __init__(
    self,
    config: ConfigDict,
    algorithm: mg.federated.FederatedAlgorithm,
    state: mg.federated.FederatedState,
    store: TaskStore,
    training: np.ndarray,
    calibration: np.ndarray,
    targets: np.ndarray,
    blocks: Sequence[int],
    train,
    evaluate,
    mesh: Mesh | None,
  ):
    self._store, self._train, self._evaluate, self._mesh = store, train, evaluate, mesh
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    self._server = jax.device_put(jax.device_get(state.server), everywhere)
    self._scale = jax.device_put(np.array(store.scale, np.float32), everywhere)
    self._calibration, self._share = store.population(calibration, mesh)
    self._targets, _ = store.population(targets, mesh)
    self._target_count = len(targets)
    self._rounds: Iterator[PlannedRounds] = store.rounds(
      state.key,
      training,
      start=0,
      blocks=blocks,
      cohort=config.cohort,
      batch_size=config.batch_size,
      draws=algorithm.draws,
      weighted=config.weighted,
      mesh=mesh,
    )

  def advance(self, rounds: int) -> tuple[Any, float]:
    """Metrics with leading axes (1, rounds), and the seconds it took, waiting for data included."""
    start = time.perf_counter()
    planned = next(self._rounds)
    waited = time.perf_counter() - start
    self._server, metrics = self._train(self._server, planned, self._scale)
    return jax.tree.map(lambda x: np.asarray(x)[None], jax.device_get(metrics)), waited + self._train.seconds

  def evaluate(self) -> tuple[Any, mg.personalize.TaskMetrics, mg.personalize.TaskMetrics]:
    """Calibration, and metrics before and after adaptation, with leading axes (1, targets)."""
    own = lambda population: jnp.arange(population.train_count.shape[0])
    one = self._mesh is None
    calibration, *metrics = jax.device_get(
      self._evaluate(
        self._server, self._calibration, own(self._calibration) if one else None, self._share, self._targets, own(self._targets) if one else None
      )
    )
    return (jax.tree.map(lambda x: np.asarray(x)[None], calibration), *jax.tree.map(lambda x: np.asarray(x)[None, : self._target_count], metrics))

  def server(self, i: int) -> Any:
    """The server's state, on the default device."""
    del i
    return jax.tree.map(jnp.asarray, jax.device_get(self._server))

  def train_data(self, i: int, numbers: Sequence[int]) -> list[mg.data.TaskData]:
    """Train data of some tasks, on the default device."""
    del i
    population, _ = self._store.population(numbers)
    return [population.train(n) for n in range(len(numbers))]

  def close(self) -> None:
    """Ends the thread that fetches, also where rounds are left."""
    self._rounds.close()

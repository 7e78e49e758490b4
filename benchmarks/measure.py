"""What all benchmarks share: medians of alternating repeats, facts about the machine, random tasks, compiled rounds."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metagater_jax as mg
from experiments.config.registry import NETWORKS
from experiments.runs.programs import compiler_options

__all__ = [
  "CASES",
  "ROUNDS",
  "Case",
  "Program",
  "as_experiments_do",
  "compiled",
  "cores",
  "flop_per_round",
  "machine",
  "matrix_rate",
  "medians",
  "network_of",
  "peak_bytes",
  "population",
  "program",
  "row",
]

ROUNDS = 10  # per dispatch, as the configs have it


class Case(NamedTuple):
  """A round that is measured: tasks of a cohort, batch 20, on random images (a round costs the same on any)."""

  name: str
  shape: tuple[int, ...]
  classes: int
  model: str
  gated: tuple[str, ...]
  cohort: int
  task_axis: str = "auto"


CASES = {
  "mnist": Case("MNIST round", (28, 28, 1), 10, "mlp", (), 5),
  "cifar10": Case("CIFAR-10 round", (32, 32, 3), 10, "conv4", (), 20),
  "cifar10_gated": Case("CIFAR-10 round, gated", (32, 32, 3), 10, "conv4", ("conv3",), 20),
  "cifar100": Case("CIFAR-100 round, seven layers", (32, 32, 3), 100, "conv7", ("conv5", "conv6"), 20),
}


class Program(NamedTuple):
  """A compiled function without arguments, what it took to compile, what it needs on the device, and what XLA counts in it."""

  run: Callable[[], Any]
  compile_seconds: float
  peak_bytes: int
  cost: Mapping[str, float] = MappingProxyType({})


def row(what: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
  """One line of the benchmark's table."""
  return {"what": what, "value": float(value), "unit": unit, **more}


def cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict[str, Any]:
  """Facts that a figure depends on."""
  model = next(
    (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor() or platform.machine()
  )
  memory = next((int(line.split()[1]) // 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), None)
  return {
    "processor": model,
    "cores": cores(),
    "memory_gib": memory,
    "backend": jax.default_backend(),
    "devices": [device.device_kind for device in jax.devices()],
    "jax": jax.__version__,
    "python": platform.python_version(),
    "date": time.strftime("%Y-%m-%d"),
  }


def _lines(path):
  try:
    with open(path) as file:
      return file.readlines()
  except OSError:
    return []


def medians(repeats: int, functions: dict[str, Callable[[], Any]], pause: float = 0.0) -> dict[str, float]:
  """Median seconds of each function; they take turns, so that a busy minute hits all of them.

  With a `pause` each turn waits so many seconds and calls the function once before it is timed: PyTorch's threads go on
  spinning for a while after their work, on the cores that the next function needs.
  """
  seconds = {name: [] for name in functions}
  for _ in range(repeats + 1):
    for name, function in functions.items():
      if pause:
        time.sleep(pause)
        jax.block_until_ready(function())
      start = time.perf_counter()
      jax.block_until_ready(function())
      seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first is a warm-up


def compiled(function: Callable, *arguments: Any, **jit_options) -> Program:
  """A function of these arguments, compiled ahead."""
  start = time.perf_counter()
  ready = jax.jit(function, **jit_options).lower(*arguments).compile()
  seconds = time.perf_counter() - start
  return Program(lambda: ready(*arguments), seconds, peak_bytes(ready), dict(ready.cost_analysis() or {}))


def peak_bytes(ready) -> int:
  """What a compiled program needs at once: arguments, results and temporaries, as XLA lays them out."""
  memory = ready.memory_analysis()
  return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def population(tasks: int, samples: int, shape: tuple[int, ...], classes: int) -> mg.data.Population:
  """Tasks of random images, all of one size."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (tasks * samples, *shape), np.uint8)
  parts = tuple(np.split(np.arange(tasks * samples), tasks))
  return mg.make_population(images, rng.integers(0, classes, len(images)), mg.data.Partition(parts, parts), classes=classes)


def network_of(case: Case, widths: tuple[int, ...] = (), compute_dtype: str = "float32") -> mg.GatedNetwork:
  """The case's network."""
  options = {"widths": widths} if widths else {}
  return mg.GatedNetwork(NETWORKS[case.model].make(classes=case.classes, **options), case.gated, compute_dtype=compute_dtype)


def as_experiments_do(case: Case):
  """(mesh, microbatch) with which `experiments.run` computes the case by default: convolutions over all cores of a CPU."""
  on_cores = jax.default_backend() == "cpu" and not network_of(case).small and len(jax.devices()) > 1
  return (mg.core.task_mesh(), 2) if on_cores else (None, 0)


def program(
  case: Case,
  tasks: mg.data.Population,
  *,
  steps: int = 1,
  cohort: int | None = None,
  task_axis: str | int | None = None,
  widths: tuple[int, ...] = (),
  mesh=None,
  microbatch: int = 0,
  compute_dtype: str = "float32",
  make=None,
  rounds: int = ROUNDS,
  default: bool = False,
  options: dict[str, bool] | None = None,
) -> Program:
  """`rounds` rounds of MetaGater (or `make(loss)`) on a case, compiled; `default`: as `experiments.run` computes them.

  `options` are XLA's.
  """
  if default:
    mesh, microbatch = as_experiments_do(case)
  network = network_of(case, widths, compute_dtype)
  loss = mg.classification_loss(network)
  if microbatch:
    loss = mg.data.microbatched(loss, microbatch)
  if make is None:
    penalty = mg.on_part(mg.group_lasso(mg.gate_groups), "gate") if case.gated else None
    algorithm = mg.metagater(
      loss, local_lr=0.05, local_steps=steps, penalty=penalty, penalty_weight=0.001, rates={"gate": 30.0} if case.gated else None
    )
  else:
    algorithm = make(loss)
  on_cpu_small = network.small and jax.default_backend() == "cpu"
  how = task_axis or ("auto" if not on_cpu_small else "merged" if algorithm.mergeable else "vmap")
  state = mg.federated_init(algorithm, network.init(jax.random.key(0), case.shape), jax.random.key(1))
  arguments = state, tasks, jnp.arange(tasks.train_count.shape[0])
  if mesh is not None:
    arguments = jax.device_put(arguments, jax.NamedSharding(mesh, jax.P()))
  if options is None:
    options = compiler_options(network.small) if default else {}
  return compiled(
    partial(mg.run_rounds, algorithm, rounds=rounds, cohort=cohort or case.cohort, batch_size=20, task_axis=how, mesh=mesh),
    *arguments,
    compiler_options=options,
  )


def flop_per_round(case: Case, steps: int = 1, cohort: int | None = None, widths: tuple[int, ...] = ()) -> int:
  """Floating-point operations of a round's products: forward, and two products backward; none for the images' gradient."""
  network = network_of(case, widths)
  layers = network.layers(case.shape)
  macs, _ = mg.nn.dense_cost(layers)
  return (cohort or case.cohort) * 20 * steps * 2 * (3 * macs - layers[0].macs)


def matrix_rate(size: int | None = None, dtype=jnp.float32) -> tuple[Callable[[], Any], int]:
  """A product of two square matrices, and its floating-point operations; 2048² on CPU, 8192² elsewhere."""
  size = size or (2048 if jax.default_backend() == "cpu" else 8192)
  matrix = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a: a @ a)
  product(matrix).block_until_ready()
  return lambda: product(matrix), 2 * size**3

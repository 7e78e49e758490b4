"""How a round's cost grows: with the population (not at all), the cohort, local steps and width; and data larger than memory."""

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metagater_jax as mg
from benchmarks.measure import CASES, medians, network_of, population, program, row
from metagater_jax.federated.host_tasks import TaskStore

__all__ = ["cohorts", "larger_than_memory", "populations", "steps_and_widths"]

_SAMPLES = 500  # of a task, the size that the issue of populations is about


@contextmanager
def synthetic_file(tasks: int) -> Iterator[Path]:
  """Random CIFAR-sized images of so many tasks in a file for `numpy.load`, without holding them."""
  folder = Path(tempfile.mkdtemp(prefix="metagater-"))
  try:
    block = np.random.default_rng(0).integers(0, 256, (20 * _SAMPLES, 32, 32, 3), np.uint8)
    with (folder / "images.npy").open("wb") as file:
      np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (tasks * _SAMPLES, 32, 32, 3)})
      for start in range(0, tasks * _SAMPLES, len(block)):
        file.write(block[: tasks * _SAMPLES - start].data)
    yield folder / "images.npy"
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _tasks_of(path, tasks):
  """The first tasks of such a file: images, labels, and which task holds what."""
  rows = np.arange(tasks * _SAMPLES, dtype=np.int32).reshape(tasks, _SAMPLES)
  images = np.load(path, mmap_mode="r")
  return images, np.arange(len(images), dtype=np.int32) % 10, mg.data.Partition(tuple(rows[:, :375]), tuple(rows[:, 375:]))


def _streamed(images, labels, partition, rounds, blocks):
  """Seconds of each block of CIFAR-10 rounds from the host, data included, and what the program needs on the device."""
  case, tasks = CASES["cifar10"], len(partition)
  network = network_of(case)
  algorithm = mg.metagater(mg.classification_loss(network), local_lr=0.05)
  store = TaskStore(images, labels, partition, (0.5, 0.5))
  server = mg.federated_init(algorithm, network.init(jax.random.key(0), case.shape), jax.random.key(1)).server

  def step(server, plan, key_data, minibatches):
    return mg.federated.follow_plan(
      algorithm, server, plan._replace(keys=jax.random.wrap_key_data(key_data)), minibatches, mg.data.Pool(None, None, jnp.array([0.5, 0.5]))
    )

  stream = store.rounds(jax.random.key(1), np.arange(tasks), start=0, blocks=[rounds] * (blocks + 1), cohort=case.cohort, batch_size=20)
  planned = next(stream)
  without_keys = lambda planned: planned.plan._replace(keys=None)
  ready = jax.jit(step).lower(server, without_keys(planned), planned.key_data, planned.minibatches).compile()
  memory = ready.memory_analysis()
  run = lambda planned: jax.block_until_ready(ready(server, without_keys(planned), planned.key_data, planned.minibatches))
  run(planned)

  def seconds():
    start = time.perf_counter()
    run(next(stream))
    return time.perf_counter() - start

  return seconds, memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def populations(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """CIFAR-10 rounds, cohort 20, with 20 ... 10,000 tasks on the host: the blocks of all populations take turns."""
  sizes = [20, 1000] if quick else [20, 100, 1000, 10_000]
  needed, free = sizes[-1] * _SAMPLES * 3072, shutil.disk_usage(tempfile.gettempdir()).free
  if needed > 0.8 * free:
    sizes = [size for size in sizes if size * _SAMPLES * 3072 < 0.8 * free]
    print(f"there are {free / 2**30:.0f} GiB of disk: the largest population is {sizes[-1]} tasks.")
  rounds = 5
  with synthetic_file(sizes[-1]) as path:
    runs = {size: _streamed(*_tasks_of(path, size), rounds, repeats) for size in sizes}
    taken = {size: [] for size in sizes}
    for _ in range(repeats):
      for size, (seconds, _) in runs.items():
        taken[size].append(seconds())
  median = {size: float(np.median(values)) for size, values in taken.items()}
  rows = [
    row(
      f"CIFAR-10 round from the host, {size} tasks of {_SAMPLES} images",
      1000 * median[size] / rounds,
      "ms",
      key=f"population-{size}",
      peak_mb=runs[size][1] / 2**20,
    )
    for size in sizes
  ]
  return [*rows, row(f"population {sizes[0]} -> {sizes[-1]}: round time", median[sizes[-1]] / median[sizes[0]], "ratio", key="population")]


def cohorts(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """CIFAR-10 rounds with larger cohorts, and the MNIST round."""
  case = CASES["cifar10"]
  sizes = [1, 20, 64] if quick else [1, 4, 20, 64, 200, 256]
  tasks = population(256, 40, case.shape, case.classes)
  programs = {size: program(case, tasks, cohort=size, rounds=1, default=True) for size in sizes}
  seconds = medians(repeats, {size: p.run for size, p in programs.items()})
  rows = [
    row(f"CIFAR-10 round, cohort {size}", 1000 * seconds[size], "ms", key=f"cohort-{size}", peak_mb=programs[size].peak_bytes / 2**20)
    for size in sizes
  ]
  if 200 in sizes:
    rows.append(row("cohort 20 -> 200: round time", seconds[200] / seconds[20], "ratio", key="cohort"))
  return rows


def steps_and_widths(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """CIFAR-10 rounds with more local steps and other widths."""
  case = CASES["cifar10"]
  tasks = population(20, 200, case.shape, case.classes)
  steps = [1, 4] if quick else [1, 2, 5, 10, 20]
  widths = [(16, 32, 64), (32, 64, 128)] if quick else [(8, 16, 32), (16, 32, 64), (32, 64, 128), (64, 128, 256)]
  programs = {f"K = {k}": program(case, tasks, steps=k, rounds=1, default=True) for k in steps}
  programs |= {f"widths {'-'.join(map(str, w))}": program(case, tasks, widths=w, rounds=1, default=True) for w in widths}
  seconds = medians(repeats, {name: p.run for name, p in programs.items()})
  return [
    row(f"CIFAR-10 round, {name}", 1000 * seconds[name], "ms", compile_seconds=p.compile_seconds, peak_mb=p.peak_bytes / 2**20)
    for name, p in programs.items()
  ]


def larger_than_memory(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """Meta-training on 10,000 tasks of 500 images (15 GB in a file) by `experiments.training.run` with `memory_mb`: what the
  process takes at its peak beyond what the same run takes on 100 tasks."""
  del repeats
  if quick:
    return []
  size = 10_000
  if size * _SAMPLES * 3072 > 0.8 * shutil.disk_usage(tempfile.gettempdir()).free:
    print("too little disk for a population of 15 GB.")
    return []
  rows, peaks = [], {}
  with synthetic_file(size) as path:
    for tasks in (100, size):
      done = subprocess.run([sys.executable, "-m", "benchmarks.scaling", str(path), str(tasks)], capture_output=True, text=True, timeout=1800)
      if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
      peaks[tasks], seconds, round_ms = map(float, done.stdout.split()[-3:])
      rows.append(
        row(
          f"training on {tasks} tasks of {_SAMPLES} images, memory_mb = 256: peak of the process",
          peaks[tasks],
          "MB",
          round_ms=round_ms,
          seconds=seconds,
        )
      )
  return [
    *rows,
    row(f"the same, {size} tasks beyond 100 (the data is {size * _SAMPLES * 3072 / 2**20:,.0f} MB)", peaks[size] - peaks[100], "MB", key="memory"),
  ]


def _train(path: str, tasks: int) -> None:
  """Prints this process's peak memory in MB, seconds and milliseconds per round of a run on so many tasks of a file."""
  from configs import cifar10
  from experiments.config import registry
  from experiments.run import run
  from metagater_jax.data.datasets import Dataset

  config = cifar10.get_config()
  config.update(tasks=tasks, memory_mb=256, rounds=20, eval_every=20, rounds_per_dispatch=5, target_tasks=10, validation_tasks=10, gated=False)
  images, labels, partition = _tasks_of(path, tasks)
  registry.PARTITIONS["labels"] = lambda *_: partition  # the file's own tasks; drawing them would cost more than a round
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    result = run(config, Path(folder) / "run", Dataset("copies", images, labels, 10), quiet=True)
    seconds = time.perf_counter() - start
  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds, result["round_ms"])


if __name__ == "__main__":
  _train(sys.argv[1], int(sys.argv[2]))

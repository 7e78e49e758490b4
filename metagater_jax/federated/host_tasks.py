"""Tasks that stay on the host, in arrays that may be larger than memory: what a plan of rounds draws is fetched ahead.

A client's round needs its minibatches only. They are known as soon as the round is planned, so a thread reads those of the next
rounds from the memory-mapped arrays while the devices compute the current ones. Over a mesh each process reads what its own
devices will use, and nothing else.
"""

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metagater_jax.core.tasks import TASK_AXIS
from metagater_jax.data.partition import Partition
from metagater_jax.data.population import Minibatches, Pool, Population, check_partition, check_samples, make_population
from metagater_jax.federated.rounds import RoundPlan, plan_rounds

__all__ = ["PlannedRounds", "TaskStore", "rounds_in_memory"]

# Blocks of rounds that exist at the same time: one is computed on, one waits, one is being read.
BLOCKS = 3


class PlannedRounds(NamedTuple):
  """Some rounds on the devices, ready for `follow_plan`: their `plan`, its keys as plain integers (`key_data`), and the `minibatches` that it
  draws."""

  plan: RoundPlan
  key_data: jax.Array
  minibatches: Minibatches


class TaskStore:
  """A data set and how it is distributed over tasks, on the host.

  Args:
    images: (samples, …) uint8 or floats; a `numpy.memmap` is read row by row and never held.
    labels: (samples,) integers.
    partition: which samples belong to which task.
    scale: (mean, std) of pixels, see `to_float`.
    classes: as in `data.make_population`.
  """

  def __init__(self, images: np.ndarray, labels: np.ndarray, partition: Partition, scale: tuple[float, float], classes: int | None = None):
    self.images, self.labels, self.scale = images, check_samples(images, labels, classes=classes), scale
    self.partition = check_partition(partition, len(self.labels))
    self.counts = np.array([len(part) for part in partition.train], np.int32)
    self.longest = int(self.counts.max())
    self.sample_bytes = int(np.prod(images.shape[1:], dtype=np.int64)) * images.dtype.itemsize

  def fetch(self, tasks: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (clients, …, *image shape) and labels (clients, …) of these train samples of tasks (clients,); padding is any sample."""
    rows = np.stack([self.partition.train[task][own % self.counts[task]] for task, own in zip(tasks, positions)])
    return self._read(rows), self.labels[rows].astype(np.int32)

  def _read(self, rows):
    out = self.images[rows]
    pages = getattr(self.images, "_mmap", None)
    if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
      pages.madvise(mmap.MADV_DONTNEED)  # or each row that was ever read would count as this process's memory
    return np.asarray(out)

  def rounds(
    self,
    key: jax.Array,
    training: np.ndarray,
    *,
    start: int,
    blocks: Sequence[int],
    cohort: int,
    batch_size: int,
    draws: int = 1,
    weighted: bool = False,
    mesh: Mesh | None = None,
  ) -> Iterator[PlannedRounds]:
    """Blocks of rounds from number `start` on, each with everything its clients draw; the next one is fetched meanwhile.

    Args:
      key, training (tasks), cohort, batch_size, draws, weighted: see `plan_rounds`; the same plan as on a device.
      start: number of the first round.
      blocks: rounds in each block.
      mesh: over which the clients are spread; None: the default device.
    """
    plan = jax.jit(
      partial(
        plan_rounds,
        cohort=cohort,
        batch_size=min(batch_size, self.longest),
        draws=draws,
        weighted=weighted,
        multiple=1 if mesh is None else mesh.size,
      ),
      static_argnames="rounds",
    )
    training, counts = np.asarray(training, np.int32), self.counts

    def prepare(start, rounds):
      planned = plan(key, start, counts, training, rounds=rounds)
      host = jax.device_get(planned._replace(keys=jax.random.key_data(planned.keys)))
      if mesh is None:
        images, labels = zip(*(self.fetch(*one) for one in zip(host.tasks, host.positions)))
        minibatches = jax.device_put(Minibatches(None, np.stack(images), np.stack(labels), host.weight))
        return PlannedRounds(planned, jax.random.key_data(planned.keys), minibatches)
      spread = partial(_spread, NamedSharding(mesh, PartitionSpec(None, TASK_AXIS)))
      fetched = {}

      def part(which, index):
        span = index[1].indices(host.tasks.shape[1])[:2]  # the clients of one device
        if span not in fetched:
          own = slice(*span)
          images, labels = zip(*(self.fetch(*one) for one in zip(host.tasks[:, own], host.positions[:, own])))
          fetched[span] = np.stack(images), np.stack(labels)
        return fetched[span][which]

      shape = host.positions.shape
      images = jax.make_array_from_callback(shape + self.images.shape[1:], spread.args[0], partial(part, 0))
      labels = jax.make_array_from_callback(shape, spread.args[0], partial(part, 1))
      return PlannedRounds(host._replace(share=spread(host.share)), spread(host.keys), Minibatches(None, images, labels, spread(host.weight)))

    # One thread: what it does is to wait for the disk, and two would read what the memory was not promised for.
    with ThreadPoolExecutor(1) as thread:
      starts = [start + sum(blocks[:i]) for i in range(len(blocks))]
      ahead = thread.submit(prepare, starts[0], blocks[0]) if blocks else None
      for i in range(len(blocks)):
        ready = ahead.result()  # type: ignore[union-attr]
        ahead = thread.submit(prepare, starts[i + 1], blocks[i + 1]) if i + 1 < len(blocks) else None
        yield ready

  def population(self, tasks: Sequence[int], mesh: Mesh | None = None) -> tuple[Population, jax.Array]:
    """Some tasks as a population of their own, numbered from 0, and their share of a mean over them.

    Over a mesh every array is cut along its first axis, so that each device holds a population of its own tasks (inside
    `shard_map`, with `PartitionSpec("tasks")` for all but `scale`); tasks are added, with share 0, until all have as many.
    """
    tasks = [int(task) for task in tasks]
    select = lambda tasks: Partition(*(tuple(part[task] for task in tasks) for part in (self.partition.train, self.partition.test)))
    if mesh is None:
      own = select(tasks)
      samples = np.unique(np.concatenate([*own.train, *own.test]))
      local = Partition(*(tuple(np.searchsorted(samples, part) for part in parts) for parts in (own.train, own.test)))
      return (
        make_population(self._read(samples), self.labels[samples], local, self.scale, classes=int(self.labels.max()) + 1),
        jax.device_put(np.ones(len(tasks), np.float32)),
      )
    each = -(-len(tasks) // mesh.size)
    padded = tasks + tasks[:1] * (each * mesh.size - len(tasks))
    by_device = [select(padded[i * each : (i + 1) * each]) for i in range(mesh.size)]
    samples = [np.unique(np.concatenate([*own.train, *own.test])) for own in by_device]
    size = max(map(len, samples))
    index, count = {}, {}
    for name in ("train", "test"):
      parts = [[np.searchsorted(held, part) for part in getattr(own, name)] for own, held in zip(by_device, samples)]
      flat = [part for device in parts for part in device]
      count[name] = np.array([len(part) for part in flat], np.int32)
      index[name] = np.zeros((len(flat), count[name].max()), np.int32)
      for row, part in zip(index[name], flat):
        row[: len(part)] = part
    sharding = NamedSharding(mesh, PartitionSpec(TASK_AXIS))
    spread = partial(_spread, sharding)

    def own_rows(index):
      held = samples[(index[0].start or 0) // size]
      return np.resize(held, size)  # filled up with samples that no index names

    images = jax.make_array_from_callback((size * mesh.size, *self.images.shape[1:]), sharding, lambda index: self._read(own_rows(index)))
    labels = jax.make_array_from_callback((size * mesh.size,), sharding, lambda index: self.labels[own_rows(index)].astype(np.int32))
    scale = _spread(NamedSharding(mesh, PartitionSpec()), np.array(self.scale, np.float32))
    share = np.zeros(len(padded), np.float32)
    share[: len(tasks)] = 1
    return (
      Population(images, labels, spread(index["train"]), spread(count["train"]), spread(index["test"]), spread(count["test"]), scale),
      spread(share),
    )

  def population_bytes(self, tasks: Sequence[int]) -> int:
    """What the samples of some tasks take."""
    return sum(len(part[task]) for task in tasks for part in (self.partition.train, self.partition.test)) * self.sample_bytes

  def pool(self) -> Pool:
    """For `follow_plan`, whose minibatches come with their samples."""
    return Pool(None, None, np.array(self.scale, np.float32))  # type: ignore[arg-type]


def rounds_in_memory(limit: int, *, round_bytes: int, other_bytes: int = 0) -> int:
  """How many rounds a block may have so that the blocks that exist at the same time fit in `limit` bytes.

  Args:
    limit: bytes of host memory.
    round_bytes: of one round's minibatches.
    other_bytes: what else stays in memory (the tasks that are evaluated).

  Raises:
    ValueError: not even one round fits; the message gives the numbers.
  """
  rounds = (limit - other_bytes) // (BLOCKS * round_bytes)
  if rounds < 1:
    megabytes = lambda size: f"{size / 2**20:.1f} MB"
    raise ValueError(
      f"{megabytes(limit)} of memory are too little: the minibatches of one cohort are {megabytes(round_bytes)}, {BLOCKS} such "
      f"blocks exist at a time, and the tasks that are evaluated take {megabytes(other_bytes)}; at least "
      f"{megabytes(BLOCKS * round_bytes + other_bytes)} are needed. Allow more, or use a smaller cohort, fewer local steps, "
      "a smaller batch, or fewer target tasks."
    )
  return int(rounds)


def _spread(sharding: NamedSharding, value: Any) -> jax.Array:
  """A host array that is the same in all processes, as a global array."""
  value = np.asarray(value)
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

"""Tasks on the host: the rounds are those of tasks on the device, whatever is fetched when, and by which device."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg
from metagater_jax.federated.host_tasks import TaskStore, rounds_in_memory


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
  """(store on a memory map, the same tasks on the device, algorithm, parameters)."""
  rng = np.random.default_rng(0)
  path = tmp_path_factory.mktemp("stream") / "images.npy"
  images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(300, 4, 4, 1))
  labels = rng.integers(0, 3, 300)
  images[:] = rng.integers(0, 100, images.shape) + 70 * labels[:, None, None, None] // 2
  images.flush()
  sizes = np.array([5, 40, 12, 33, 21, 9, 60])  # one is smaller than a batch
  parts = np.split(rng.permutation(300)[: 2 * sizes.sum() // 2], np.cumsum(sizes)[:-1])
  partition = mg.data.Partition(tuple(p[:-2] for p in parts), tuple(p[-2:] for p in parts))
  memory_mapped = np.load(path, mmap_mode="r")
  network = mg.GatedNetwork(mg.MLP(classes=3, widths=(6,)))
  algorithm = mg.metagater(mg.classification_loss(network), local_lr=0.1, local_steps=2)
  params = network.init(jax.random.key(0), (4, 4, 1))
  return (
    TaskStore(memory_mapped, labels, partition, (0.3, 0.4)),
    mg.make_population(np.asarray(memory_mapped), labels, partition, (0.3, 0.4)),
    algorithm,
    params,
  )


def follow(problem, blocks, mesh=None, cohort=3):
  store, _, algorithm, params = problem
  state = mg.federated_init(algorithm, params, jax.random.key(1))

  @jax.jit
  def step(server, planned):
    plan = planned.plan._replace(keys=jax.random.wrap_key_data(planned.key_data))
    return mg.federated.follow_plan(algorithm, server, plan, planned.minibatches, mg.data.Pool(None, None, jnp.array([0.3, 0.4])), mesh=mesh)

  server, losses = state.server, []
  if mesh is not None:
    server = jax.device_put(jax.device_get(server), jax.NamedSharding(mesh, jax.P()))
  for planned in store.rounds(state.key, np.arange(6), start=0, blocks=blocks, cohort=cohort, batch_size=8, draws=2, weighted=True, mesh=mesh):
    server, metrics = step(server, planned)
    losses += np.asarray(metrics["loss"]).tolist()
  return jax.device_get(server), losses


@pytest.fixture(scope="module")
def on_the_device(problem):
  _, population, algorithm, params = problem
  state = mg.federated_init(algorithm, params, jax.random.key(1))
  return jax.jit(partial(mg.run_rounds, algorithm, rounds=6, cohort=3, batch_size=8, weighted=True))(state, population, jnp.arange(6))


@pytest.mark.parametrize("blocks, devices", [([6], 1), ([4, 2], 1), ([3, 3], 2), ([6], 8)])
def test_rounds_are_those_of_tasks_on_the_device(problem, on_the_device, blocks, devices):
  expected, metrics = on_the_device
  server, losses = follow(problem, blocks, mg.core.task_mesh(jax.devices()[:devices]) if devices > 1 else None)
  chex.assert_trees_all_close(server, jax.device_get(expected.server), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(losses, metrics["loss"], rtol=1e-5)


def test_only_what_is_drawn_is_read_and_by_the_device_that_needs_it(problem, monkeypatch):
  store, *_ = problem
  reads = []
  real = TaskStore._read
  monkeypatch.setattr(TaskStore, "_read", lambda self, rows: (reads.append(rows.shape), real(self, rows))[1])
  planned = next(
    store.rounds(jax.random.key(1), np.arange(6), start=0, blocks=[2], cohort=3, batch_size=8, draws=2, mesh=mg.core.task_mesh(jax.devices()[:2]))
  )
  # Two devices with two clients each (one is padding), two rounds; images and labels of a device are read together.
  assert reads == [(2, 2, 8)] * 4
  assert planned.minibatches.images.sharding.shard_shape(planned.minibatches.images.shape) == (2, 2, 2, 8, 4, 4, 1)


def test_blocks_are_fetched_ahead(problem, monkeypatch):
  store, *_ = problem
  import threading

  fetched, second = [], threading.Event()
  real = TaskStore.fetch

  def fetch(self, tasks, positions):
    fetched.append(len(fetched))
    if len(fetched) > 2:
      second.set()
    return real(self, tasks, positions)

  monkeypatch.setattr(TaskStore, "fetch", fetch)
  rounds = store.rounds(jax.random.key(1), np.arange(6), start=0, blocks=[2, 2, 2], cohort=3, batch_size=8)
  next(rounds)
  assert second.wait(30)  # of the next block, which nobody asked for yet
  rounds.close()
  assert len(fetched) <= 4  # and no further


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_some_tasks_as_a_population(problem, devices):
  store, population, *_ = problem
  mesh = mg.core.task_mesh(jax.devices()[:devices]) if devices > 1 else None
  some, weight = store.population([4, 0, 6], mesh)
  each = some.train_count.shape[0] // devices
  rows = some.images.shape[0] // devices
  assert np.asarray(weight).tolist() == [1] * 3 + [0] * (some.train_count.shape[0] - 3)
  for place, task in enumerate([4, 0, 6]):
    device = place // each
    cut = lambda x, size: jnp.asarray(jax.device_get(x)[device * size : (device + 1) * size])
    local = mg.data.Population(
      cut(some.images, rows),
      cut(some.labels, rows),
      cut(some.train_index, each),
      cut(some.train_count, each),
      cut(some.test_index, each),
      cut(some.test_count, each),
      jnp.asarray(jax.device_get(some.scale)),
    )
    for part in ("train", "test"):
      own, expected = getattr(local, part)(place % each), getattr(population, part)(task)
      assert own.count == expected.count
      batch, wanted = own.rows(jnp.arange(own.count)), expected.rows(jnp.arange(own.count))
      np.testing.assert_array_equal(batch.labels, wanted.labels)
      np.testing.assert_allclose(batch.images, wanted.images, rtol=1e-5, atol=1e-6)


def test_the_memory_that_is_allowed_sets_the_rounds():
  assert rounds_in_memory(100 * 2**20, round_bytes=2**20) == 33
  assert rounds_in_memory(100 * 2**20, round_bytes=2**20, other_bytes=70 * 2**20) == 10
  with pytest.raises(ValueError, match="10.0 MB of memory are too little: the minibatches of one cohort are 4.0 MB.*at least 13.0 MB are needed"):
    rounds_in_memory(10 * 2**20, round_bytes=4 * 2**20, other_bytes=2**20)

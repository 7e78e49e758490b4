"""Batches are padded to one shape; a network that looks at a batch as a whole must see nothing of other tasks there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg

OWN = 1  # the task whose numbers must not depend on the others'


@pytest.fixture(scope="module")
def problem():
  rng = np.random.default_rng(0)
  images, labels = rng.normal(size=(60, 4, 4, 1)).astype(np.float32), np.arange(60) % 3
  order = rng.permutation(60)
  parts = lambda cuts: tuple(np.split(order, cuts))
  train, test = parts([20, 25, 45])[:3], (order[45:52], order[52:55], order[55:])
  network = mg.GatedNetwork(mg.nn.FewShotConvNet(classes=3, widths=(4, 4)))
  partition = mg.data.Partition(train, test)
  mine = np.concatenate([train[OWN], test[OWN]])
  foreign = np.where(np.isin(np.arange(60), mine)[:, None, None, None], images, images + 100)
  return network, network.init(jax.random.key(0), (4, 4, 1)), partition, labels, images, foreign


def evaluation(network, params, partition, labels, images):
  population = mg.make_population(images, labels, partition)
  return mg.evaluate_task(network, mg.Model(params), population.test(OWN), chunk=5)


def adaptation(network, params, partition, labels, images):
  population = mg.make_population(images, labels, partition)
  return mg.fine_tune(mg.classification_loss(network), chunk=8).adapt(mg.Model(params), population.train(OWN)).params


def rounds(network, params, partition, labels, images, **options):
  population = mg.make_population(images, labels, partition)
  algorithm = mg.fedavg(mg.classification_loss(network), local_lr=0.1)
  state = mg.federated_init(algorithm, params, jax.random.key(1))
  return mg.run_rounds(algorithm, state, population, jnp.array([OWN]), rounds=2, cohort=1, batch_size=16, **options)[0].server


def streamed(network, params, partition, labels, images):
  store = mg.federated.TaskStore(images, labels, partition, (0.5, 0.5))
  algorithm = mg.fedavg(mg.classification_loss(network), local_lr=0.1)
  server = algorithm.init(params)
  for planned in store.rounds(jax.random.key(1), np.array([OWN]), start=0, blocks=[2], cohort=1, batch_size=16):
    server, _ = mg.federated.follow_plan(algorithm, server, planned.plan, planned.minibatches, mg.data.Pool(None, None, jnp.array([0.5, 0.5])))
  return server


def episode(network, params, partition, labels, images):
  """Of a pool whose first class has fewer samples than an episode asks for; the rest of the images belong to no class of it."""
  own = np.concatenate([partition.train[OWN], partition.test[OWN]])
  index = np.zeros((1, 12), np.int32)
  index[0, : len(own)] = own
  pool = mg.fewshot.ClassPool(jnp.asarray(images), jnp.asarray(index), jnp.array([len(own)]), jnp.array([0.5, 0.5]))
  sample = jax.jit(partial(mg.fewshot.sample_episode, ways=1, shots=4, queries=8))
  found = sample(jax.random.key(0), pool)
  assert int(found.support.weight.sum() + found.query.weight.sum()) == len(own)
  return jax.value_and_grad(mg.classification_loss(network))(params, found.query)


@pytest.mark.parametrize("compute", [evaluation, adaptation, rounds, partial(rounds, task_axis="vmap"), streamed, episode])
def test_a_change_of_every_foreign_sample_changes_no_bit(problem, compute):
  network, params, partition, labels, images, foreign = problem
  before, after = (compute(network, params, partition, labels, x) for x in (images, foreign))
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_small_client_has_the_gradient_of_its_own_samples(problem):
  """Five samples in a batch of twenty, against the loss of the five alone."""
  network, params, partition, labels, images, _ = problem
  data = mg.make_population(images, labels, partition).train(OWN)
  padded, own = data.rows(jnp.arange(20)), data.rows(jnp.arange(5))
  assert padded.weight.tolist() == [1] * 5 + [0] * 15
  loss = mg.classification_loss(network)
  (value, gradient), (expected, own_gradient) = (jax.value_and_grad(loss)(params, batch) for batch in (padded, own))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, own_gradient)


def test_batches_of_such_a_network_are_neither_merged_nor_cut(problem):
  network, params, partition, labels, images, _ = problem
  loss = mg.classification_loss(network)
  assert not mg.fedavg(loss, local_lr=0.1).mergeable and mg.fedavg(mg.classification_loss(mg.GatedNetwork(mg.MLP(3))), local_lr=0.1).mergeable
  with pytest.raises(ValueError, match="'merged' needs .*rows do not see each other"):
    rounds(network, params, partition, labels, images, task_axis="merged")
  assert mg.data.is_rowwise(mg.data.microbatched(mg.pruning.masked_loss(mg.classification_loss(mg.GatedNetwork(mg.MLP(3))), {}), 2))

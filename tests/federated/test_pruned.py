"""ANP inside rounds: it is the score of all clients' tasks, and what is pruned stays pruned everywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss

import metagater_jax as mg


@pytest.fixture(scope="module")
def trained(small_population):
  """By granularity: (algorithm, its state after the rounds, network): MetaGater pruned to one half in rounds 2 … 4."""
  network = mg.GatedNetwork(mg.ConvNet4(classes=4, widths=(4, 5, 6)), ("conv3",))
  make = partial(mg.metagater, local_lr=0.1, penalty=mg.on_part(mg.group_lasso(mg.gate_groups), "gate"), penalty_weight=0.01)
  schedule = mg.pruning.sparsity_schedule("linear", 0.5, begin=2, end=4, every=1)
  results = {}
  for granularity in ("weight", "channel"):
    algorithm = mg.federated.federated_pruning(
      make, mg.classification_loss(network), schedule, anp(mg.classification_loss(network)), granularity=granularity, prunable=backbone
    )
    state = mg.federated_init(algorithm, network.init(jax.random.key(0), (8, 8, 1)), jax.random.key(1))
    state, _ = jax.jit(partial(mg.run_rounds, algorithm, rounds=8, cohort=3, batch_size=8))(state, small_population, jnp.arange(5))
    results[granularity] = algorithm, state, network
  return results


def anp(loss, inner_lr=0.1, average="signed"):
  return mg.pruning.anp(mg.maml(loss, inner_lr=inner_lr).meta_loss, average=average)


def backbone(path, leaf):
  return path.startswith("backbone") and mg.pruning.is_kernel(path, leaf)


def assert_zero(tree, mask):
  jax.tree.map(lambda w, c: np.testing.assert_array_equal(np.asarray(w)[np.asarray(c) == 0], 0), tree, mask)


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_what_is_pruned_stays_pruned(trained, small_population, granularity):
  algorithm, state, network = trained[granularity]
  mask, model = state.server.mask, algorithm.deploy(state.server)
  assert abs(mg.pruning.mask_sparsity(mask, backbone) - 0.5) < (0.01 if granularity == "weight" else 0.15)
  assert mg.pruning.mask_sparsity(mask["gate"]) == 0
  assert_zero(model.params, mask)
  assert_zero(algorithm.broadcast(state.server)[0].params, mask)
  assert_zero(state.server.inner.md, mask)
  jax.tree.map(np.testing.assert_array_equal, model.mask, mask)
  loss = mg.classification_loss(network)
  for personalizer in (mg.two_stage(loss, network=network, target_sparsity=0.2), mg.fine_tune(loss)):
    calibration = jax.jit(personalizer.calibrate)(model, small_population, jnp.arange(3))
    adapted = jax.jit(personalizer.adapt)(model, small_population.train(5), calibration)
    assert_zero(adapted.params["backbone"], mask["backbone"])
    jax.tree.map(np.testing.assert_array_equal, adapted.mask, mask)
    kernel = adapted.params["backbone"]["conv2"]["kernel"]
    assert (kernel != model.params["backbone"]["conv2"]["kernel"]).any()


@pytest.mark.parametrize("gone, average", [(None, "signed"), (1, "signed"), pytest.param(None, "absolute", marks=pytest.mark.slow)])
def test_the_servers_score_is_that_of_all_clients_tasks(linear_problem, gone, average):
  """The mean of the clients' sensitivities against the ANP score by finite differences on the tasks' whole data; where a
  weight is pruned already, of the problem without its feature: it must not come back in the inner step."""
  population, tasks = linear_problem
  w = np.random.default_rng(0).normal(size=4)  # the last is the bias
  kept = np.ones(4)
  if gone is not None:
    w[gone] = kept[gone] = 0
  longest = max(len(y) for _, y in tasks)  # every client draws all it has, so that both minibatches are the whole task

  def gradient(w, x, y):
    x = np.column_stack([x, np.ones(len(y))])
    return x.T @ (x @ w - y) / len(y)

  def objectives(c):  # of a mask on the start and on the step
    adapted = [c * w - 0.05 * c * kept * gradient(c * w, x, y) for x, y in tasks]
    return np.array([0.5 * np.mean((x @ v[:3] + v[3] - y) ** 2) for v, (x, y) in zip(adapted, tasks)])

  expected = [kept @ e * (objectives(1 + 1e-5 * e) - objectives(1 - 1e-5 * e)) / 2e-5 for e in np.eye(4)[:3]]
  expected = np.mean(expected if average == "signed" else np.abs(expected), axis=1)
  algorithm = mg.federated.federated_pruning(
    partial(mg.fedavg, local_lr=0.1),
    linear_loss,
    mg.pruning.sparsity_schedule("one_shot", 0.4),
    anp(linear_loss, 0.05, average),
    prunable=lambda path, leaf: path == "w",
  )
  params = {"w": jnp.asarray(w[:3], jnp.float32), "b": jnp.float32(w[3])}
  mask = {"w": jnp.asarray(kept[:3], jnp.float32), "b": jnp.float32(1)}
  plan = mg.federated.plan_rounds(
    jax.random.key(0), jnp.array(0), population.train_count, jnp.arange(5), rounds=1, cohort=5, batch_size=longest, draws=algorithm.draws
  )
  rows = population.train_index[plan.tasks[..., None, None], plan.positions]
  minibatches = mg.data.Minibatches(rows[0], None, None, plan.weight[0])
  sent = []
  for i in range(5):
    own = jax.tree.map(lambda x, i=i: x[i], minibatches)
    draw = lambda j, own=own: (own.batch(j, population.pool), None)
    sent.append(algorithm.client_update((mg.Model(params, mask), jnp.array(True)), draw).delta[1]["w"])
  np.testing.assert_allclose(np.mean(sent, axis=0), expected, rtol=1e-3, atol=1e-4)
  if gone is not None:
    return
  state = mg.federated_init(algorithm, params, jax.random.key(0))
  state, _ = mg.run_rounds(algorithm, state, population, jnp.arange(5), rounds=1, cohort=5, batch_size=longest)
  assert np.flatnonzero(np.asarray(state.server.mask["w"]) == 0).tolist() == [int(np.argmin(np.abs(expected)))]


@pytest.mark.parametrize(
  "score", [anp(linear_loss), mg.pruning.snip(linear_loss), mg.pruning.magnitude(), mg.pruning.random()], ids=["anp", "snip", "magnitude", "random"]
)
def test_before_it_is_due_it_is_the_algorithm_inside(linear_problem, score):
  population, _ = linear_problem
  params = {"w": jnp.array([0.3, -0.2, 0.1]), "b": jnp.array(0.1)}
  never = mg.pruning.sparsity_schedule("one_shot", 0.4, begin=100)
  make = partial(mg.fedavg, local_lr=0.1)
  pruned = mg.federated.federated_pruning(make, linear_loss, never, score, prunable=lambda path, leaf: path == "w")
  both = [
    mg.run_rounds(a, mg.federated_init(a, params, jax.random.key(0)), population, jnp.arange(5), rounds=1, cohort=5, batch_size=9)[0]
    for a in (make(linear_loss), pruned)
  ]
  np.testing.assert_allclose(pruned.deploy(both[1].server).params["w"], make(linear_loss).deploy(both[0].server).params["w"], rtol=1e-5)


@pytest.mark.parametrize("score", [mg.pruning.snip(linear_loss, samples=lambda episode: episode.query), mg.pruning.random()], ids=["snip", "random"])
def test_any_score_prunes_when_it_is_due(linear_problem, score):
  population, _ = linear_problem
  algorithm = mg.federated.federated_pruning(
    partial(mg.fedavg, local_lr=0.1), linear_loss, mg.pruning.sparsity_schedule("one_shot", 0.4), score, prunable=lambda path, leaf: path == "w"
  )
  state = mg.federated_init(algorithm, {"w": jnp.array([0.3, -0.2, 0.1]), "b": jnp.array(0.1)}, jax.random.key(0))
  state, _ = mg.run_rounds(algorithm, state, population, jnp.arange(5), rounds=2, cohort=5, batch_size=9)
  assert int((algorithm.deploy(state.server).params["w"] == 0).sum()) == 1


def test_a_weight_that_is_zero_by_chance_is_not_pruned(linear_problem):
  """The mask is state: a model that starts at zero is trained like any other."""
  population, _ = linear_problem
  start = {"w": jnp.zeros(3), "b": jnp.array(0.0)}
  make = partial(mg.fedavg, local_lr=0.1)
  never = mg.pruning.sparsity_schedule("one_shot", 0.4, begin=100)
  pruned = mg.federated.federated_pruning(make, linear_loss, never, mg.pruning.magnitude(), prunable=lambda path, leaf: path == "w")
  both = [
    a.deploy(mg.run_rounds(a, mg.federated_init(a, start, jax.random.key(0)), population, jnp.arange(5), rounds=3, cohort=5, batch_size=9)[0].server)
    for a in (make(linear_loss), pruned)
  ]
  assert (np.abs(both[0].params["w"]) > 0.01).all()
  np.testing.assert_allclose(both[1].params["w"], both[0].params["w"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_whole_filters_of_a_gated_network_go_by_their_work(small_population):
  """The gate of a layer has the layer's name and as many columns; what is pruned is the backbone's."""
  network = mg.GatedNetwork(mg.ConvNet4(4, widths=(8, 8, 8)), ("conv3",))
  loss = mg.classification_loss(network)
  shape = small_population.train(0).rows(jnp.arange(1)).images.shape[1:]
  costs = mg.nn.channel_costs(network.layers(shape))
  score = mg.pruning.channel_sensitivity(mg.pruning.anp(mg.maml(loss, inner_lr=0.05).meta_loss, average="signed"), costs.groups)
  algorithm = mg.federated.federated_pruning(
    lambda loss: mg.metagater(loss, local_lr=0.05),
    loss,
    mg.pruning.sparsity_schedule("one_shot", 0.5, begin=1),
    score,
    scope=mg.pruning.by_macs(costs),
  )
  state = mg.federated_init(algorithm, network.init(jax.random.key(0), shape), jax.random.key(1))
  state, _ = jax.jit(lambda state: mg.run_rounds(algorithm, state, small_population, jnp.arange(3), rounds=3, cohort=2, batch_size=4))(state)
  mask = algorithm.deploy(state.server).mask
  kept = {layer: int(mask["backbone"][layer]["bias"].sum()) for layer in costs.groups}
  assert 0 < costs.macs(kept) <= 0.5 * costs.macs(costs.widths) and all(count > 0 for count in kept.values())
  assert all((leaf == 1).all() for leaf in jax.tree.leaves(mask["gate"]))

"""Gates that look at their input: a problem that only they solve, what they leave alone, and networks cut to what a task keeps."""

import dataclasses
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg
from metagater_jax.personalize import constant_gate, freeze_gate, keep_channels, log_odds_quantile, shift_gate


class Filters(nn.Module):
  """relu(± z₀), relu(± z₁) of inputs (z₀, z₁, style)."""

  @nn.compact
  def __call__(self, z):
    kernel = self.param("kernel", lambda *_: jnp.array([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]))
    return jax.nn.relu(z @ kernel)


class TwoStyles(nn.Module):
  """The sum of what the filters see, as the log-odds of label 1."""

  @nn.compact
  def __call__(self, z):
    h = Filters(name="filters")(z)
    weight = self.param("weight", lambda *_: jnp.array([1.0, -1.0, 1.0, -1.0]))
    logit = 3 * h @ weight
    return jnp.stack([-logit, logit], axis=-1)


def two_styles(rng, count):
  """The label is the sign of z₀ in the first style and of z₁ in the second; the other one is as large, and says nothing."""
  style = rng.integers(0, 2, count)
  z = rng.choice([-1, 1], (count, 2)) * rng.uniform(0.5, 1.5, (count, 2))
  label = (z[np.arange(count), style] > 0).astype(np.int64)
  return np.concatenate([z, 3.0 * (2 * style - 1)[:, None]], 1).astype(np.float32), label


@pytest.fixture(scope="module")
def styles():
  """(network, meta-trained gate on the planted filters, a target task's train and test data)."""
  rng = np.random.default_rng(0)
  x, y = two_styles(rng, 1200)
  parts = tuple(np.array_split(np.arange(1200), 6))
  population = mg.make_population(x, y, mg.data.Partition(parts, parts))
  network = mg.GatedNetwork(TwoStyles(), ("filters",), hidden=8, initial_log_odds=0.5, logit_scale=1.0, normalize=True)
  params = network.init(jax.random.key(0), (3,))
  algorithm = mg.metagater(mg.classification_loss(network), local_lr=0.02, rates={"gate": 100.0})
  state, _ = mg.run_rounds(
    algorithm, mg.federated_init(algorithm, params, jax.random.key(1)), population, jnp.arange(6), rounds=150, cohort=4, batch_size=50
  )
  target = [mg.data.make_task(*two_styles(rng, count)) for count in (200, 400)]
  return network, algorithm.deploy(state.server), target


@pytest.mark.slow
def test_a_conditional_gate_solves_with_half_the_channels_what_no_static_choice_can(styles):
  network, model, (train, test) = styles
  adapt = lambda **options: mg.two_stage(
    mg.classification_loss(network), network=network, gate_lr=1.0, lr=0.01, target_sparsity=0.5, **options
  ).adapt(model, train)
  gated = mg.evaluate_task(network, adapt(), test)
  assert gated.accuracy > 0.97 and abs(gated.sparsity - 0.5) < 0.03
  assert float(mg.personalize.conditional(gated.on_rate)) == 1.0  # every channel looks at its input

  static = []
  for kept in itertools.combinations(range(4), 2):  # with the backbone trained for it, as well as it can be in 30 steps
    gate = constant_gate(model.params["gate"], {"filters": jnp.isin(jnp.arange(4), jnp.array(kept))})
    params = mg.personalize.adapt_backbone(mg.classification_loss(network), {**model.params, "gate": gate}, train, lr=0.1, steps=30)
    static.append(float(mg.evaluate_task(network, mg.Model(params), test).accuracy))
  assert max(static) < 0.9
  assert float(mg.evaluate_task(network, adapt(frozen=True), test).accuracy) < 0.9
  assert float(mg.evaluate_task(network, adapt(sparsity_by="budget"), test).accuracy) < 0.9


def conditional_params(network, seed=0):
  """Parameters whose gates depend strongly on the input, with some channels on for all and some off for all of it."""
  params = network.init(jax.random.key(seed), (8, 8, 1))
  gate = {layer: {**own, "W2": 4 * own["W2"], "b2": jnp.linspace(-6, 6, own["b2"].shape[0])} for layer, own in params["gate"].items()}
  return {**params, "gate": gate}


@pytest.fixture(scope="module")
def network():
  return mg.GatedNetwork(mg.ConvNet4(classes=4, widths=(4, 8, 12)), ("conv2", "conv3"), normalize=True, initial_log_odds=0.5, logit_scale=1.0)


def on_rates(network, params, data):
  masks = network.apply(params, data.rows(jnp.arange(int(data.count))).images)[1]
  return {layer: np.asarray(mask).mean(0) for layer, mask in masks.items()}


def test_stage_two_leaves_alone_what_no_image_of_the_task_uses(network, small_population):
  """Channels that some images of the task use learn, from these; those that none uses keep their weights to the bit."""
  params, data = conditional_params(network), small_population.train(0)
  rates = on_rates(network, params, data)
  after = mg.personalize.adapt_backbone(mg.classification_loss(network), params, data, lr=0.5)["backbone"]
  seen = 0
  for layer, rate in rates.items():
    moved = np.asarray((after[layer]["kernel"] != params["backbone"][layer]["kernel"]).any((0, 1, 2)))
    assert not moved[rate == 0].any() and (rate == 0).any() and (rate == 1).any()
    seen += moved[(rate > 0) & (rate < 1)].sum()
  assert seen > 0


def test_frozen_to_the_majority_is_the_network_without_the_other_channels(network, small_population):
  """The mask of a frozen gate against a network from which the channels are cut out, computed in NumPy."""
  params, data = conditional_params(network), small_population.train(1)
  rates = on_rates(network, params, data)
  kept = {layer: rate >= 0.5 for layer, rate in rates.items()}
  frozen = {**params, "gate": freeze_gate(network, params, data, chunk=5)}
  images = np.random.default_rng(0).normal(size=(7, 8, 8, 1)).astype(np.float32)
  logits, masks = network.apply(frozen, jnp.asarray(images))
  for layer, mask in masks.items():
    assert (np.asarray(mask) == kept[layer]).all()

  backbone = jax.tree.map(lambda x: np.asarray(x, np.float64), params["backbone"])
  h, reads = images.astype(np.float64), slice(None)
  for layer in ("conv1", "conv2", "conv3"):
    own = kept.get(layer, slice(None))
    kernel, bias = backbone[layer]["kernel"][:, :, reads][..., own], backbone[layer]["bias"][own]
    padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h = sum(padded[:, i : i + h.shape[1], j : j + h.shape[2]] @ kernel[i, j] for i in range(3) for j in range(3)) + bias
    h = np.maximum(h, 0).reshape(7, h.shape[1] // 2, 2, h.shape[2] // 2, 2, -1).max((2, 4))
    reads = own
  dense = backbone["output"]["kernel"].reshape(h.shape[1], h.shape[2], 12, 4)[:, :, kept["conv3"]]
  np.testing.assert_allclose(logits, np.einsum("bhwc,hwck->bk", h, dense) + backbone["output"]["bias"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_quantile_of_log_odds_sets_the_sparsity(network, small_population, wanted, frozen):
  params = conditional_params(network)
  for task in (0, 3):
    data = small_population.train(task)
    shift = jax.jit(lambda data: log_odds_quantile(network, params, data, wanted, frozen=frozen))(data)
    gate = shift_gate(params["gate"], shift)
    if frozen:
      gate = freeze_gate(network, {**params, "gate": gate}, data)
    rates = np.concatenate(list(on_rates(network, {**params, "gate": gate}, data).values()))
    assert 1 - rates.mean() == pytest.approx(wanted, abs=0.06)  # a channel is 1/20


@pytest.mark.parametrize("wanted", [0.3, 0.6])
def test_the_sparsity_is_that_of_the_adapted_network(network, small_population, wanted):
  """Stage II moves the features that gates look at: what counts are the masks after it."""
  loss, data = mg.classification_loss(network), small_population.train(0)
  model = mg.Model(conditional_params(network))
  adapted = mg.two_stage(loss, network=network, gate_lr=1.0, lr=1.0, target_sparsity=wanted).adapt(model, data).params
  rates = np.concatenate(list(on_rates(network, adapted, data).values()))
  assert 1 - rates.mean() == pytest.approx(wanted, abs=0.06)
  # The step is large enough that a threshold from before it would not do.
  stage_one = mg.two_stage(loss, network=network, gate_lr=1.0, lr=1e-9, target_sparsity=wanted).adapt(model, data).params
  drifted = np.concatenate(list(on_rates(network, {**adapted, "gate": stage_one["gate"]}, data).values()))
  assert abs(1 - drifted.mean() - wanted) > 0.08


@pytest.mark.parametrize("wanted", [0.2, 0.5, 0.8])
def test_with_one_gated_layer_it_is_the_quantile(small_population, wanted):
  network = mg.GatedNetwork(mg.ConvNet4(classes=4, widths=(4, 8, 12)), ("conv3",), normalize=True, initial_log_odds=0.5, logit_scale=1.0)
  params, data = conditional_params(network), small_population.train(3)
  values = network.outputs(params, data.rows(jnp.arange(int(data.count))).images).log_odds["conv3"]
  shift = log_odds_quantile(network, params, data, wanted)
  np.testing.assert_allclose(shift, np.quantile(np.asarray(values), wanted, method="inverted_cdf"), rtol=1e-4, atol=1e-4)
  median = log_odds_quantile(network, params, data, wanted, frozen=True)
  np.testing.assert_allclose(
    median,
    np.quantile(np.quantile(-np.asarray(values), 0.5, axis=0, method="inverted_cdf") * -1, wanted, method="inverted_cdf"),
    rtol=1e-4,
    atol=1e-4,
  )


def test_channels_that_are_structurally_off_stay_off(network, small_population):
  params, data = conditional_params(network), small_population.train(2)
  zero = lambda own: {**own, "W2": own["W2"].at[:, :3].set(0), "b2": own["b2"].at[:3].set(0)}
  params = {**params, "gate": {layer: zero(own) for layer, own in params["gate"].items()}}
  for wanted in (0.0, 0.1, 0.6):  # 6 of 20 are off anyway: less cannot be
    gate = shift_gate(params["gate"], log_odds_quantile(network, params, data, wanted))
    rates = on_rates(network, {**params, "gate": gate}, data)
    assert all((rate[:3] == 0).all() for rate in rates.values())
    assert 1 - np.concatenate(list(rates.values())).mean() == pytest.approx(max(wanted, 0.3), abs=0.05)


@pytest.mark.parametrize("wanted", [0.25, 0.5, 0.95])
def test_a_budget_keeps_as_many_channels_of_each_layer_of_each_task(network, small_population, wanted):
  params, chosen = conditional_params(network), set()
  for task in range(4):
    data = small_population.train(task)
    gate = keep_channels(network, params, data, wanted, chunk=7)
    rates = on_rates(network, {**params, "gate": gate}, data)
    for layer, rate in rates.items():
      assert set(rate.tolist()) <= {0.0, 1.0} and rate.sum() == max(round((1 - wanted) * len(rate)), 1)
      batch = data.rows(jnp.arange(int(data.count)))
      mean = np.asarray(network.outputs(params, batch.images).log_odds[layer]).mean(0)
      assert mean[rate == 1].min() >= mean[rate == 0].max()
    chosen.add(tuple(np.concatenate(list(rates.values()))))


def test_stage_one_with_a_loss_of_its_own(network, small_population):
  """Plain straight-through moves channels of which the soft gate is so sure that its gradient vanishes."""
  params, data = conditional_params(network), small_population.train(0)
  sure = {**params, "gate": {layer: {**own, "W2": 0 * own["W2"], "b2": own["b2"] * 0 + 40.0} for layer, own in params["gate"].items()}}
  loss = mg.classification_loss(network)
  plain = mg.classification_loss(dataclasses.replace(network, temperature=None))
  moved = [mg.two_stage(loss, gate_lr=1.0, gate_loss=own).adapt(mg.Model(sure), data).params["gate"] for own in (None, plain)]
  chex.assert_trees_all_equal(moved[0]["conv3"]["b2"], sure["gate"]["conv3"]["b2"])
  assert (moved[1]["conv3"]["b2"] != sure["gate"]["conv3"]["b2"]).any()


def test_errors(network):
  loss = mg.classification_loss(network)
  with pytest.raises(ValueError, match="sparsity_by.*log_odds"):
    mg.two_stage(loss, sparsity_by="norm")
  with pytest.raises(ValueError, match="frozen gates need the network"):
    mg.two_stage(loss, frozen=True)

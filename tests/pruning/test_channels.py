"""Whole channels: their sensitivity against finite differences, and masks by MACs against a search over all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg
from metagater_jax.core.trees import named_leaves
from metagater_jax.pruning import by_macs, channel_sensitivity

SHAPE = (8, 8, 2)


@pytest.fixture(scope="module")
def problem():
  network = mg.GatedNetwork(mg.nn.FewShotConvNet(3, widths=(4, 5, 4)))
  params = network.init(jax.random.key(0), SHAPE)
  params = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
  images = jax.random.normal(jax.random.key(1), (2, 12, *SHAPE))
  batches = mg.data.Batch(images, jnp.tile(jnp.arange(12) % 3, (2, 1)), jnp.ones((2, 12)))
  layers = network.layers(SHAPE)
  return network, params, batches, layers, mg.nn.channel_costs(layers)


def scaled(params, layer, channel, factor):
  """All that makes a channel times a factor."""
  own = {name: leaf.at[..., channel].multiply(factor) for name, leaf in params["backbone"][layer].items()}
  return {**params, "backbone": {**params["backbone"], layer: own}}


def test_a_channel_s_sensitivity_is_the_derivative_by_a_factor_on_it(problem):
  network, params, batches, _, costs = problem
  loss = mg.classification_loss(network)
  score = channel_sensitivity(mg.pruning.snip(loss, average="signed"), costs.groups)
  found = score(params, batches)
  objective = jax.jit(jax.vmap(loss, (None, 0, None)))
  for layer, width in costs.widths.items():
    kernel = np.asarray(found["backbone"][layer]["kernel"], np.float64)
    for channel in range(width):
      above, below = (np.asarray(objective(scaled(params, layer, channel, factor), batches, None), np.float64) for factor in (1.001, 0.999))
      assert kernel[..., channel].sum() == pytest.approx(np.mean(np.abs(above - below)) / 0.002, rel=0.01, abs=5e-4)
  assert not np.any(found["backbone"]["output"]["kernel"])


def test_before_a_normalization_a_filter_alone_has_no_sensitivity(problem):
  """Why the weights' own sensitivities are not added: a factor on the filter changes nothing (Euler), though each weight's has a magnitude."""
  network, params, batches, _, costs = problem
  loss = mg.classification_loss(network)
  signed = jax.grad(lambda w: loss(w, jax.tree.map(lambda leaf: leaf[0], batches), None))(params)
  for layer in costs.groups:
    kernel = params["backbone"][layer]["kernel"] * signed["backbone"][layer]["kernel"]
    assert np.abs(kernel.sum((0, 1, 2))).max() < 0.02 * np.abs(kernel).sum((0, 1, 2)).min()


def kept_of(mask, costs):
  leaves = named_leaves(mask)
  return {
    group: int(leaves[f"backbone/{modules[0]}/kernel"].reshape(-1, costs.widths[group]).max(0).sum()) for group, modules in costs.groups.items()
  }


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_a_mask_by_macs_keeps_nearly_the_best_score_that_the_work_allows(problem, sparsity):
  _, params, _, layers, costs = problem
  rng = np.random.default_rng(3)
  score = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(size=leaf.shape) ** 4, jnp.float32), params)
  mask = jax.jit(lambda score, sparsity: mg.make_mask(score, sparsity, scope=by_macs(costs), granularity="channel"))(score, sparsity)
  of = {group: np.sort(np.asarray(score["backbone"][group]["kernel"], np.float64).sum((0, 1, 2)))[::-1] for group in costs.groups}
  kept = kept_of(mask, costs)
  total = costs.macs(costs.widths)
  assert costs.macs(kept) <= (1 - sparsity) * total
  value = lambda kept: sum(of[group][:count].sum() for group, count in kept.items())
  possible = [dict(zip(of, counts)) for counts in itertools.product(*(range(1, width + 1) for width in costs.widths.values()))]
  best = max(value(kept) for kept in possible if costs.macs(kept) <= (1 - sparsity) * total)
  assert value(kept) >= 0.85 * best
  # Of each layer those that matter most stay, with all that makes them; the logits' layer is whole.
  for group in costs.groups:
    stays = np.asarray(mask["backbone"][group]["kernel"]).max((0, 1, 2)) > 0
    sums = np.asarray(score["backbone"][group]["kernel"]).sum((0, 1, 2))
    assert sums[stays].min() >= (sums[~stays].max() if (~stays).any() else 0)
    assert (np.asarray(mask["backbone"][group]["scale"]) > 0).tolist() == stays.tolist()
  assert np.all(mask["backbone"]["output"]["kernel"])


def test_costs_are_those_of_the_network_without_the_channels():
  for backbone in (mg.ConvNet4(3, widths=(4, 6, 8)), mg.nn.ResNet12(3, widths=(4, 4, 8, 8)), mg.nn.FewShotConvNet(3, widths=(4, 4))):
    network = mg.GatedNetwork(backbone)
    costs = mg.nn.channel_costs(network.layers((16, 16, 3)))
    counts = {group: max(1, width // 2) for group, width in costs.widths.items()}
    small = mg.deploy.Cutting(network, (16, 16, 3), counts).network
    assert costs.macs(counts) == pytest.approx(mg.nn.dense_cost(small.layers((16, 16, 3)))[0])
    assert costs.macs(costs.widths) == mg.nn.dense_cost(network.layers((16, 16, 3)))[0]


@pytest.mark.slow
def test_layers_whose_outputs_are_added_keep_the_same_channels():
  network = mg.GatedNetwork(mg.nn.ResNet12(3, widths=(8, 8, 16, 16)))
  costs = mg.nn.channel_costs(network.layers((16, 16, 3)))
  params = network.init(jax.random.key(0), (16, 16, 3))
  mask = mg.make_mask(jax.tree.map(jnp.abs, params), 0.5, scope=by_macs(costs, multiple=4, least=0.25), granularity="channel")
  for block in range(1, 5):
    own = mask["backbone"][f"block{block}"]
    assert own["conv3"]["scale"].tolist() == own["shortcut"]["scale"].tolist()
  kept = kept_of(mask, costs)
  assert all(count % 4 == 0 and count >= max(4, costs.widths[group] // 4) for group, count in kept.items())
  small = mg.deploy.compact(network, mg.Model(params, mask), (16, 16, 3))
  assert mg.nn.dense_cost(small.network.layers((16, 16, 3)))[0] == pytest.approx(costs.macs(kept))


def test_what_is_gone_stays_gone_while_the_work_shrinks(problem):
  _, params, _, _, costs = problem
  mask, sparsity_before = jax.tree.map(jnp.ones_like, params), 0.0
  for i, sparsity in enumerate((0.2, 0.4, 0.6, 0.8)):
    score = jax.tree.map(lambda leaf, i=i: jax.random.uniform(jax.random.key(i + leaf.size), leaf.shape), params)
    new = mg.pruning.prune_further(score, mask, sparsity, scope=by_macs(costs))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a <= b).all()), new, mask)))
    assert 1 - costs.macs(kept_of(new, costs)) / costs.macs(costs.widths) >= sparsity > sparsity_before
    mask, sparsity_before = new, sparsity


@pytest.mark.parametrize(
  "scores, work, sparsity, kept",
  [
    # A channel of b matters twice as much and costs four times as much: it goes. By scores alone three of a would go.
    ((0.5, 1.0), (10, 40), 0.15, (4, 3)),
    # Channels of a go first, being cheap to lose; one of b must, and then there is room for a's again.
    ((0.01, 1.0), (1, 10), 0.2, (4, 3)),
  ],
)
def test_what_goes_costs_least_for_the_work_it_saves(scores, work, sparsity, kept):
  costs = mg.nn.ChannelCosts({"a": ("a",), "b": ("b",)}, {"a": 4, "b": 4}, tuple((4 * each, group, ()) for each, group in zip(work, "ab")))
  score = {name: {"kernel": jnp.full((1, 4), own)} for name, own in zip("ab", scores)}
  mask = mg.make_mask(score, sparsity, scope=by_macs(costs))
  assert tuple(int(mask[name]["kernel"].sum()) for name in "ab") == kept


def test_a_gate_or_a_block_that_is_named_alike_is_left_alone():
  kernel = jnp.ones((3, 4))
  score = {
    "backbone": {"conv1": {"kernel": kernel}, "block": {"conv1": {"kernel": kernel}}},
    "gate": {"conv1": {"W1": jnp.ones((3, 16)), "W2": jnp.ones((16, 4)), "b2": jnp.ones(4)}},
  }
  costs = mg.nn.ChannelCosts(
    {"conv1": ("conv1",), "block/conv1": ("block/conv1",)}, {"conv1": 4, "block/conv1": 4}, ((100, "conv1", ()), (1, "block/conv1", ()))
  )
  mask = mg.make_mask(score, 0.4, scope=by_macs(costs))
  assert float(mask["backbone"]["conv1"]["kernel"][0].sum()) == 2 and np.all(mask["backbone"]["block"]["conv1"]["kernel"])
  assert all(np.all(leaf) for leaf in jax.tree.leaves(mask["gate"]))


def test_learned_rates_of_the_same_names_are_left_alone():
  """Meta-SGD's meta-parameters hold a rate for each kernel, a number, under the kernel's name."""
  weights = {"a": {"kernel": jnp.arange(8.0).reshape(2, 4)}, "b": {"kernel": jnp.ones((4, 4))}}
  costs = mg.nn.ChannelCosts({"a": ("a",), "b": ("b",)}, {"a": 4, "b": 4}, ((4, "a", ()), (1, "b", ())))
  alone = mg.make_mask(weights, 0.5, scope=by_macs(costs))
  both = mg.make_mask({"inner_lr": jax.tree.map(lambda _: jnp.float32(0.1), weights), "weights": weights}, 0.5, scope=by_macs(costs))
  jax.tree.map(np.testing.assert_array_equal, both["weights"], alone)
  assert all(both["inner_lr"][name]["kernel"] == 1 for name in "ab")


def test_bad_input(problem):
  network, params, batches, _, costs = problem
  loss = mg.classification_loss(network)
  with pytest.raises(ValueError, match="no contributions of tasks"):
    channel_sensitivity(mg.pruning.magnitude(), costs.groups)
  with pytest.raises(ValueError, match="the kernels of conv9 stand 0 times"):
    channel_sensitivity(mg.pruning.snip(loss, average="signed"), {"a": ("conv9",)})(params, batches)
  with pytest.raises(ValueError, match="least is a fraction"):
    by_macs(costs, least=1.0)
  with pytest.raises(ValueError, match="is not a number everywhere"):
    mg.make_mask(jax.tree.map(lambda leaf: leaf * jnp.nan, params), 0.5, scope=by_macs(costs))

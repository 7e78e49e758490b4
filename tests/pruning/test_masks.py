"""Masks against the number they promise, and what of them can still matter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import metagater_jax as mg

TREE = {"conv1": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "conv2": {"kernel": (3, 3, 4, 6), "bias": (6,)}, "output": {"kernel": (24, 5), "bias": (5,)}}


def tree_of(seed, ties):
  rng = np.random.default_rng(seed)
  draw = (lambda shape: rng.integers(0, 3, shape).astype(np.float32)) if ties else (lambda shape: rng.random(shape))
  return jax.tree.map(lambda shape: jnp.asarray(draw(shape), jnp.float32), TREE, is_leaf=lambda x: isinstance(x, tuple))


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.99), st.sampled_from(["global", "layer"]), st.booleans(), st.integers(0, 5))
@example(0.984375, "global", False, 1)  # a leaf whose best is not among the highest of all
def test_masks_keep_exactly_the_requested_number_of_the_highest(sparsity, scope, ties, seed):
  score = tree_of(seed, ties)
  mask = mg.make_mask(score, sparsity, scope=scope)
  assert all((mask[module]["bias"] == 1).all() for module in mask)
  kernels = lambda tree: [np.asarray(tree[module]["kernel"]) for module in TREE]
  groups = (
    [(np.concatenate([k.ravel() for k in kernels(score)]), np.concatenate([k.ravel() for k in kernels(mask)]))]
    if scope == "global"
    else [(s.ravel(), m.ravel()) for s, m in zip(kernels(score), kernels(mask))]
  )
  best = np.concatenate([np.arange(k.size) == k.argmax() for k in kernels(score)]) if scope == "global" else False
  for values, kept in groups:
    assert set(np.unique(kept)) <= {0.0, 1.0}
    assert (kept == 0).sum() == np.round(np.float32(sparsity) * len(values))
    chosen = (kept == 1) & ~np.asarray(best)  # the best of each leaf stays, whatever the others have
    if chosen.any() and (kept == 0).any():
      assert values[chosen].min() >= values[kept == 0].max()
    # The best of each leaf is among what is kept, unless fewer are kept than there are leaves.
    best_of = np.flatnonzero(best) if scope == "global" else [values.argmax()]
    assert kept[best_of].all() or kept.sum() < len(best_of)
  total = sum(m.size for m in kernels(mask))
  assert float(mg.pruning.mask_sparsity(mask)) == pytest.approx(sum((m == 0).sum() for m in kernels(mask)) / total, abs=1e-6)


def test_scores_may_be_numpy_arrays():
  score = tree_of(0, False)
  for scope in ("global", "layer"):
    jax.tree.map(
      np.testing.assert_array_equal, mg.make_mask(jax.tree.map(np.asarray, score), 0.4, scope=scope), mg.make_mask(score, 0.4, scope=scope)
    )


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_channel_masks_remove_filters_with_their_biases(scope):
  score = tree_of(1, ties=False)
  gated = lambda path, leaf: path in ("conv1/kernel", "conv2/kernel")
  mask = mg.make_mask(score, 0.5, scope=scope, granularity="channel", prunable=gated)
  removed = {}
  for module in ("conv1", "conv2"):
    kernel, bias = np.asarray(mask[module]["kernel"]), np.asarray(mask[module]["bias"])
    assert (kernel == kernel[0, 0, 0]).all() and (kernel[0, 0, 0] == bias).all()
    sums = np.asarray(score[module]["kernel"]).sum((0, 1, 2))
    assert sums[bias == 1].min() > sums[bias == 0].max() if 0 < bias.sum() < len(bias) else True
    removed[module] = int((bias == 0).sum())
  assert float(mg.pruning.mask_sparsity(mask, gated, granularity="channel")) == sum(removed.values()) / 10
  assert removed == {"conv1": 2, "conv2": 3} if scope == "layer" else sum(removed.values()) == 5
  assert (mask["output"]["kernel"] == 1).all() and (mask["output"]["bias"] == 1).all()


def test_effective_mask_follows_paths_from_input_to_output():
  """Fully connected layers: a weight is of use if its input reaches the network's and its output the network's output."""
  rng = np.random.default_rng(0)
  masks = [rng.random(shape) < 0.2 for shape in ((6, 12), (12, 12), (12, 12), (12, 4))]
  network = lambda w, x: jax.nn.relu(jax.nn.relu(jax.nn.relu(x @ w[0]) @ w[1]) @ w[2]) @ w[3]
  effective = mg.pruning.effective_mask(network, [jnp.asarray(m, jnp.float32) for m in masks], jnp.ones((3, 6)))
  fed = [np.ones(6, bool)]
  for m in masks:
    fed.append((fed[-1][:, None] & m).any(0))
  read = [np.ones(4, bool)]
  for m in reversed(masks):
    read.insert(0, (m & read[0]).any(1))
  expected = [fed[i][:, None] & m & read[i + 1] for i, m in enumerate(masks)]
  assert sum(e.sum() for e in expected) < sum(m.sum() for m in masks)  # or nothing is tested
  jax.tree.map(np.testing.assert_array_equal, effective, expected)


@pytest.mark.parametrize(
  "network, smaller, channels",
  [
    (mg.nn.FewShotConvNet(5, (4, 6)), mg.nn.FewShotConvNet(5, (3, 1)), {"conv1": 3, "conv2": 1}),
    (
      mg.nn.ResNet12(5, (4, 6)),
      mg.nn.ResNet12(5, (3, 2)),
      {
        "block1/conv1": 3,
        "block1/conv2": 3,
        "block1/conv3": 3,
        "block1/shortcut": 3,
        "block2/conv1": 2,
        "block2/conv2": 2,
        "block2/conv3": 2,
        "block2/shortcut": 2,
      },
    ),
  ],
)
def test_effective_mask_of_removed_filters_is_the_smaller_network(key, network, smaller, channels):
  images = jnp.ones((4, 8, 8, 3))

  def masked(path, leaf):
    kept = channels.get(jax.tree_util.keystr(path[1:-1], simple=True, separator="/"), leaf.shape[-1])
    return jnp.broadcast_to(jnp.arange(leaf.shape[-1]) < kept, leaf.shape).astype(jnp.float32)

  mask = jax.tree_util.tree_map_with_path(masked, jax.eval_shape(network.init, key, images))
  effective = mg.pruning.effective_mask(network.apply, mask, images)
  leaves = zip(jax.tree.leaves(jax.eval_shape(smaller.init, key, images)), jax.tree.leaves(mask), jax.tree.leaves(effective))
  assert all(kept.sum() == small.size and (kept <= own).all() for small, own, kept in leaves)


def test_a_channel_beside_a_shortcut_is_still_read():
  """With one summand of a residual sum gone, the other still feeds what comes next; with both gone, nothing does."""
  block = lambda w, x: jax.nn.relu(jax.nn.relu(x @ w["in"]) @ w["main"] + x @ w["shortcut"]) @ w["out"]
  mask = {"in": jnp.ones((3, 2)), "main": jnp.ones((2, 3)).at[:, 1:].set(0), "shortcut": jnp.ones((3, 3)).at[:, 2].set(0), "out": jnp.ones((3, 2))}
  effective = mg.pruning.effective_mask(block, mask, jnp.ones((4, 3)))
  jax.tree.map(np.testing.assert_array_equal, effective, mask | {"out": jnp.ones((3, 2)).at[2].set(0)})


def test_sparsity_may_be_traced():
  score = tree_of(2, ties=True)
  sparsities = jnp.array([0.0, 0.3, 0.75])
  masks = jax.jit(jax.vmap(lambda s: mg.make_mask(score, s)))(sparsities)
  for i, sparsity in enumerate(sparsities):
    alone = mg.make_mask(score, float(sparsity))
    assert all((masks[m]["kernel"][i] == alone[m]["kernel"]).all() for m in TREE)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(sparsity=1.0), r"sparsity must lie in \[0, 1\), got 1.0"),
    (dict(sparsity=-0.1), "got -0.1"),
    (dict(sparsity=0.5, scope="both"), "unknown scope 'both'. .*Known: global, layer"),
    (dict(sparsity=0.5, granularity="row"), "unknown granularity 'row'"),
    (dict(sparsity=0.5, prunable=lambda path, leaf: False), "none of the leaves is prunable; there are conv1/bias"),
  ],
)
def test_errors_say_what_is_wrong(options, message):
  with pytest.raises(ValueError, match=message):
    mg.make_mask(tree_of(0, ties=False), **options)


@pytest.mark.parametrize("scope", mg.pruning.SCOPES)
@pytest.mark.parametrize("granularity", mg.pruning.GRANULARITIES)
@pytest.mark.parametrize("channels, sparsity", [(8, 0.95), (3, 0.85), (4, 0.9), (1, 0.6)])
def test_no_layer_goes_as_a_whole(scope, granularity, channels, sparsity):
  score = {name: {"kernel": np.random.default_rng(i).uniform(size=(2, channels)).astype(np.float32)} for i, name in enumerate("ab")}
  mask = mg.make_mask(score, sparsity, scope=scope, granularity=granularity)
  kept = [np.asarray(layer["kernel"]) for layer in mask.values()]
  assert all(leaf.any() for leaf in kept)
  per_leaf = [channels, channels] if granularity == "channel" else [2 * channels] * 2
  wanted = sum(max(1, n - round(sparsity * n)) for n in per_leaf) if scope == "layer" else max(2, sum(per_leaf) - round(sparsity * sum(per_leaf)))
  assert sum(leaf.max(0).sum() if granularity == "channel" else leaf.sum() for leaf in kept) == wanted
  for leaf, own in zip(kept, score.values()):  # and what is kept of each is its best
    sums = own["kernel"].sum(0) if granularity == "channel" else own["kernel"]
    assert leaf.max(0)[sums.argmax()] if granularity == "channel" else leaf.ravel()[sums.argmax()]


def test_two_kernels_of_a_module_have_masks_of_their_own():
  score = {"cell": {"input": jnp.array([[1.0, 2.0, 3.0, 4.0]]), "state": jnp.array([[4.0, 3.0, 2.0, 1.0]]), "bias": jnp.ones(4)}}
  mask = mg.make_mask(score, 0.5, scope="layer", granularity="channel")["cell"]
  assert (mask["input"].tolist(), mask["state"].tolist()) == ([[0, 0, 1, 1]], [[1, 1, 0, 0]])
  assert mask["bias"].tolist() == [1, 1, 1, 1]  # each channel has one of its kernels
  score["cell"]["state"] = 2 * score["cell"]["input"]
  assert mg.make_mask(score, 0.5, scope="layer", granularity="channel")["cell"]["bias"].tolist() == [0, 0, 1, 1]


def test_a_score_that_is_no_number_is_refused_or_seen():
  score = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)).at[1, 2].set(jnp.nan), "bias": jnp.full(4, jnp.nan)}
  for prune in (partial(mg.make_mask, score), partial(mg.pruning.prune_further, score, jax.tree.map(jnp.ones_like, score))):
    with pytest.raises(ValueError, match="the score of 'b' is not a number"):
      prune(0.5)
    assert all(np.isnan(leaf).all() for name, leaf in jax.jit(prune)(0.5).items() if name != "bias")
  mask = jax.tree.map(jnp.ones_like, score) | {"b": jnp.ones((4, 4)).at[1, 2].set(0)}  # what is removed already needs no score
  kept = mg.pruning.prune_further(score, mask, 0.5)
  assert kept["b"][1, 2] == 0 and sum(float(kept[name].sum()) for name in "ab") == 16


def test_an_optimizers_state_is_masked_by_path_and_shape():
  mask = {"a": jnp.array([[1.0, 0.0]]), "b": {"a": jnp.array([0.0, 1.0, 1.0])}}
  state = {"mu": {"a": jnp.ones((1, 2)), "b": {"a": jnp.ones(3)}}, "history": {"b": {"a": jnp.ones((4, 3))}}, "rows": {"a": jnp.ones(1)}, "count": 3}
  found = mg.pruning.mask_state(state, mask)
  np.testing.assert_array_equal(found["mu"]["a"], [[1, 0]])
  np.testing.assert_array_equal(found["mu"]["b"]["a"], [0, 1, 1])
  np.testing.assert_array_equal(found["history"]["b"]["a"], [[0, 1, 1]] * 4)
  np.testing.assert_array_equal(found["rows"]["a"], [1])
  assert found["count"] == 3

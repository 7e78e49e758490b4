"""Pruning by scores: how important each weight is, and masks that keep the most important ones.

A score is a pytree like the parameters, with one non-negative number per weight; a score function is
`(params, loss, batch, key) -> score`. What a mask may remove is the mask maker's argument, not the score's. Nothing in here
knows of networks: parameters are any pytree, and a leaf's output channels are its last axis, as in flax.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metagater_jax.local import Loss
from metagater_jax.tasks import sum_over_tasks

__all__ = ["AVERAGES", "SCORES", "anp_score", "apply_mask", "connection_saliency", "effective_mask", "is_kernel", "magnitude_score",
           "make_mask", "mask_sparsity", "nonzero_mask", "prune_further", "random_score", "snip_score"]

Params = Any

# How a score on several tasks is averaged: before or after its magnitude is taken.
AVERAGES = ("signed", "absolute")


def magnitude_score(params: Params, loss: Loss | None = None, batch: Any = None, key: jax.Array | None = None) -> Params:
  """|w|. Needs neither loss nor data."""
  del loss, batch, key
  return jax.tree.map(jnp.abs, params)


def random_score(params: Params, loss: Loss | None = None, batch: Any = None, key: jax.Array | None = None) -> Params:
  """Uniform numbers in [0, 1): the control that every other score must beat. Needs a key."""
  del loss, batch
  if key is None:
    raise ValueError("random_score needs a key.")
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(structure, [jax.random.uniform(k, jnp.shape(w)) for k, w in zip(keys, leaves)])


def connection_saliency(params: Params, gradient: Params) -> Params:
  """|∂L/∂c| at c = 1 of a mask c that multiplies the weights: |g ⊙ w| (Lee et al. 2018)."""
  return jax.tree.map(lambda w, g: jnp.abs(w * g), params, gradient)


def snip_score(params: Params, loss: Loss, batch: Any, key: jax.Array | None = None) -> Params:
  """Connection sensitivity of SNIP (Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity").

  |∂L(c ⊙ w)/∂c| at c = 1, to first order the change of the loss when a weight is removed. The paper divides by the sum,
  which changes no order.

  Args:
    params: w, where the loss is differentiated.
    loss: `(params, batch, key) -> scalar`.
    batch: the data.
    key: for randomness in the loss; None for the deterministic model.
  """
  return connection_saliency(params, jax.grad(loss)(params, batch, key))


def anp_score(params: Params, meta_loss: Callable[..., jax.Array], tasks: Any, derivative: str = "exact", *,
              average: str = "signed", mask: Params | None = None, by_layer: bool = False, task_axis: str | int = "auto",
              axis_name: str | None = None) -> Params:
  """Adaptation-aware importance (ANP, Gao et al. 2021): how sensitive the meta-objective is to a weight.

  |∂M(w ⊙ c)/∂c| at c = 1, which is |w ⊙ ∇M(w)|, of M(w) = mean over tasks of L_query(A_T(w)): a weight is important if the network
  adapts worse without it, whatever its own loss on anything is.

  Args:
    params: w, the (meta-)parameters.
    meta_loss: `(params, task, mask=…, derivative=…) -> scalar`, as the `meta_loss` of a `MetaLearner`.
    tasks: a pytree with a leading task axis, such as `sample_episodes` makes.
    derivative: "exact" differentiates through the inner loop; "first_order" takes the gradient at the adapted weights, which
      needs no second derivatives.
    average: over the tasks: "signed", the score of the mean objective M as above; "absolute", the mean of the tasks' own scores
      |w ⊙ ∇L_query(A_T(w))|. Near a minimum of M the tasks' gradients cancel, and "signed" ranks what is left by chance.
    mask: what is pruned already. It holds in the inner loop, or weights that are gone would move in it.
    by_layer: one gradient after the other, each of one layer only: the same score for more time, and less memory where gradients
      are what fills it (of our networks on a CPU they are not: `python -m benchmarks --only=anp`). A layer is the leaves with one
      parent in the tree; a leaf at its top is a layer of its own.
    task_axis: see `map_tasks`.
    axis_name: of a mesh over which the tasks are spread evenly; each device has its part of `tasks`.

  Returns:
    A pytree like `params`.

  Raises:
    ValueError: an unknown `average`.
  """
  check_average(average)
  count = jax.tree.leaves(tasks)[0].shape[0]
  share = jnp.full(count, 1 / count)

  def score(loss, part):
    mean = sum_over_tasks(lambda task: task_sensitivity(part, jax.grad(loss)(part, task), average), tasks, share, task_axis)
    return jax.tree.map(jnp.abs, mean if axis_name is None else jax.lax.pmean(mean, axis_name))

  if not by_layer:
    return score(lambda w, task: meta_loss(w, task, mask=mask, derivative=derivative), params)
  paths, structure = jax.tree_util.tree_flatten_with_path(params)
  leaves = [leaf for _, leaf in paths]
  layers: dict[Any, list[int]] = {}
  for i, (path, _) in enumerate(paths):
    layers.setdefault(path[:-1] or path, []).append(i)
  scores: dict[int, jax.Array] = {}
  for layer in layers.values():
    # Behind a barrier, or the compiler would make one program with all gradients out of it again.
    fixed, _ = jax.lax.optimization_barrier((leaves, scores))

    def loss_of_layer(own, task, layer=layer, fixed=fixed):
      changed = list(fixed)
      for i, leaf in zip(layer, own):
        changed[i] = leaf
      return meta_loss(jax.tree.unflatten(structure, changed), task, mask=mask, derivative=derivative)
    scores |= dict(zip(layer, score(loss_of_layer, [fixed[i] for i in layer])))
  return jax.tree.unflatten(structure, [scores[i] for i in range(len(leaves))])


def task_sensitivity(params: Params, gradient: Params, average: str) -> Params:
  """What a task adds to a mean of scores: w ⊙ ∇L, or |w ⊙ ∇L| with `average` "absolute"."""
  sensitivity = jax.tree.map(jnp.multiply, params, gradient)
  return sensitivity if average == "signed" else jax.tree.map(jnp.abs, sensitivity)


def check_average(average: str) -> None:
  """Raises a ValueError for what is not one of `AVERAGES`."""
  if average not in AVERAGES:
    raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {average!r}.")


SCORES = {"magnitude": magnitude_score, "random": random_score, "snip": snip_score}


def is_kernel(path: str, leaf: jax.Array) -> bool:
  """What is pruned by default: every leaf with two axes or more. Biases and scales are few, and stay."""
  del path
  return jnp.ndim(leaf) > 1


def make_mask(score: Params, sparsity: float | jax.Array, *, scope: str = "global", granularity: str = "weight",
              prunable: Callable[[str, jax.Array], bool] = is_kernel) -> Params:
  """A mask (0 or 1, in each leaf's shape) that keeps the weights of the highest score.

  Of n candidates it removes round(sparsity · n), exactly; among equal scores those that come later in the tree go. The best of
  each leaf is kept before anything else, so that no layer goes as a whole. Works under `jit` and `vmap`, also with a traced
  sparsity.

  Args:
    score: non-negative numbers, a pytree like the parameters.
    sparsity: fraction of the candidates to remove, in [0, 1).
    scope: "global": the candidates are ranked together; "layer": each leaf by itself.
    granularity: "weight": single weights; "channel": output channels (the last axis) of a leaf by the sum of their
      weights' scores. A channel that goes takes with it its entry in the other leaves of the same module (its bias), so
      after a relu it is exactly 0 and can be cut out. A sum grows with how many weights
      a channel has, so "global" may leave a layer with few of them, or of little sensitivity, a single channel.
    prunable: `(path, leaf) -> bool`, which leaves are candidates; path is like "backbone/conv3/kernel". The mask is 1
      elsewhere.

  Raises:
    ValueError: a sparsity outside [0, 1), an unknown scope or granularity, or nothing to prune.

  >>> import jax.numpy as jnp
  >>> score = {"kernel": jnp.array([[0.1, 3.0], [0.2, 1.0]]), "bias": jnp.array([9.0, 9.0])}
  >>> make_mask(score, 0.5)["kernel"].tolist()
  [[0.0, 1.0], [0.0, 1.0]]
  >>> make_mask(score, 0.5, granularity="channel")["bias"].tolist()
  [0.0, 1.0]
  """
  if not isinstance(sparsity, jax.core.Tracer) and not 0 <= sparsity < 1:
    raise ValueError(f"make_mask: sparsity must lie in [0, 1), got {sparsity}.")
  for name, value, known in (("scope", scope, ("global", "layer")), ("granularity", granularity, ("weight", "channel"))):
    if value not in known:
      raise ValueError(f"make_mask: {name} must be one of {', '.join(known)}, got {value!r}.")
  flat, structure = jax.tree_util.tree_flatten_with_path(score)
  paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
  candidates = {path: leaf for path, (_, leaf) in zip(paths, flat) if prunable(path, leaf)}
  if not candidates:
    raise ValueError(f"make_mask: none of the leaves is prunable; there are {', '.join(paths)}.")
  if granularity == "channel":
    candidates = {path: leaf.reshape(-1, leaf.shape[-1]).sum(0) for path, leaf in candidates.items()}
  groups = [list(candidates)] if scope == "global" else [[path] for path in candidates]
  if scope == "global":  # no layer goes as a whole: nothing would pass it
    candidates = {path: _spare_best(leaf) for path, leaf in candidates.items()}
  kept = {}
  for group in groups:
    kept |= _keep_highest({path: candidates[path] for path in group}, sparsity)
  if granularity == "weight":
    masks = [kept.get(path, jnp.ones_like(leaf)) for path, (_, leaf) in zip(paths, flat)]
  else:
    masks = _by_channel(kept, paths, [leaf for _, leaf in flat])
  return jax.tree.unflatten(structure, masks)


def prune_further(score: Params, mask: Params, sparsity: float | jax.Array, **options: Any) -> Params:
  """A mask of more sparsity that keeps nothing of what `mask` has removed, whatever its score; `options` are `make_mask`'s."""
  ranked = jax.tree.map(lambda s, c: jnp.where(c > 0, s, -1.0), score, mask)  # scores are not negative: these go first
  return jax.tree.map(lambda new, old: (new * old).astype(old.dtype), make_mask(ranked, sparsity, **options), mask)


def apply_mask(params: Params, mask: Params) -> Params:
  """w ⊙ c."""
  return jax.tree.map(lambda w, c: w * c, params, mask)


def nonzero_mask(params: Params, *, granularity: str = "weight", prunable: Callable[[str, jax.Array], bool] = is_kernel
                 ) -> Params:
  """The mask that was applied to pruned parameters: 0 where a prunable weight is 0, or an output channel has no other weights.

  Args:
    params: a pytree in which what is pruned is exactly 0.
    granularity, prunable: as they were given to `make_mask`.
  """
  flat, structure = jax.tree_util.tree_flatten_with_path(params)
  paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
  kept = {path: (leaf != 0).astype(leaf.dtype) for path, (_, leaf) in zip(paths, flat) if prunable(path, leaf)}
  if granularity == "weight":
    return jax.tree.unflatten(structure, [kept.get(path, jnp.ones_like(leaf)) for path, (_, leaf) in zip(paths, flat)])
  channels = {path: mask.reshape(-1, mask.shape[-1]).max(0) for path, mask in kept.items()}
  return jax.tree.unflatten(structure, _by_channel(channels, paths, [leaf for _, leaf in flat]))


def mask_sparsity(mask: Params, prunable: Callable[[str, jax.Array], bool] = is_kernel, *, granularity: str = "weight") -> jax.Array:
  """The fraction of the prunable weights that a mask removes, or with granularity "channel" of their output channels (as a whole)."""
  flat, _ = jax.tree_util.tree_flatten_with_path(mask)
  leaves = [leaf for path, leaf in flat if prunable(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)]
  if granularity == "channel":
    leaves = [leaf.reshape(-1, leaf.shape[-1]).max(0) for leaf in leaves]
  return 1 - sum(leaf.sum() for leaf in leaves) / sum(leaf.size for leaf in leaves)


def effective_mask(function: Callable[[Params, jax.Array], jax.Array], mask: Params, inputs: jax.Array) -> Params:
  """What of a mask can still matter to the output: its *effective* sparsity (Vysogorets and Kempe 2023, "Connectivity Matters:
  Neural Network Pruning Through the Lens of Effective Sparsity").

  A weight that the mask keeps is of no use where all that it reads is removed, or all that reads it: with a filter go the next
  layer's weights of that filter. Nothing is assumed of how layers are connected (chains, residual sums): kept is what the output's
  gradient reaches at positive random weights and inputs, at which nothing cancels and no relu is off for good.

  Args:
    function: (params, inputs) -> outputs, of a network with relus, poolings, normalizations and the like.
    mask: as `make_mask` makes it, for all parameters of `function`. A channel that has no weights any more but a bias is a
      constant, not 0, so what reads it counts as effective; with granularity "channel" biases go too.
    inputs: a batch of the right shape; its values do not matter. A few examples, where activations are normalized over the batch.

  >>> import jax.numpy as jnp
  >>> mask = {"in": jnp.array([[1.0, 0.0]]), "out": jnp.array([[1.0], [1.0]])}
  >>> effective_mask(lambda w, x: x @ w["in"] @ w["out"], mask, jnp.ones((1, 1)))["out"].tolist()
  [[1.0], [0.0]]
  """
  leaves, structure = jax.tree.flatten(mask)
  own, weight, *keys = jax.random.split(jax.random.key(0), len(leaves) + 2)
  positive = lambda key, x: jax.random.uniform(key, x.shape, minval=0.5, maxval=1.5)
  params = jax.tree.unflatten(structure, [  # over the number of inputs, so that numbers neither grow nor vanish from layer to layer
      positive(k, leaf) / math.prod(leaf.shape[:-1]) for k, leaf in zip(keys, leaves)])
  inputs = positive(own, inputs)

  def some_sum(params):
    outputs = function(apply_mask(params, mask), inputs)
    return (outputs * positive(weight, outputs)).sum()
  return jax.tree.map(lambda c, slope: c * (slope != 0), mask, jax.jit(jax.grad(some_sum))(params))


def _spare_best(scores):
  flat = jnp.ravel(scores)
  return flat.at[jnp.argmax(flat)].set(jnp.inf).reshape(scores.shape)


def _by_channel(kept: dict[str, jax.Array], paths: list[str], leaves: list[jax.Array]) -> list[jax.Array]:
  """Masks of all leaves from those of the pruned leaves' channels."""
  by_module = {path.rpartition("/")[0]: mask for path, mask in kept.items()}
  return [jnp.ones_like(leaf) * _channels_of(by_module.get(path.rpartition("/")[0]), leaf) for path, leaf in zip(paths, leaves)]


def _keep_highest(scores: dict[str, jax.Array], sparsity) -> dict[str, jax.Array]:
  flat = jnp.concatenate([score.ravel() for score in scores.values()])
  remove = jnp.round(sparsity * flat.size).astype(int)
  # By rank, not by a threshold, so that ties do not change the number.
  order = jnp.argsort(-flat, stable=True)
  kept = jnp.zeros_like(flat).at[order].set((jnp.arange(flat.size) < flat.size - remove).astype(flat.dtype))
  sizes = [score.size for score in scores.values()]
  parts: Sequence[jax.Array] = jnp.split(kept, list(_running(sizes))[:-1])
  return {path: part.reshape(score.shape) for (path, score), part in zip(scores.items(), parts)}


def _running(sizes):
  total = 0
  for size in sizes:
    total += size
    yield total


def _channels_of(mask, leaf):
  return mask if mask is not None and jnp.ndim(leaf) and leaf.shape[-1] == mask.shape[0] else 1.0

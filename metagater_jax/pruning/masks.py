"""Masks that keep the most important weights: made from scores, applied, and what of them can still matter.

Parameters are any pytree, and a leaf's output channels are its last axis, as in flax.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from metagater_jax.core.checks import check_one_of, check_sparsity
from metagater_jax.core.trees import Params, like, named_leaves, precision_of
from metagater_jax.data.batching import Loss

__all__ = [
  "GRANULARITIES",
  "SCOPES",
  "apply_mask",
  "effective_mask",
  "highest_first",
  "is_kernel",
  "make_mask",
  "mask_sparsity",
  "mask_state",
  "masked_loss",
  "nonzero_mask",
  "prune_further",
]

SCOPES = ("global", "layer")
# Or a function of (score, sparsity) that makes the mask, as `pruning.by_macs` does.
Scope = Callable[[Params, Any], Params]
GRANULARITIES = ("weight", "channel")


def is_kernel(name: str, leaf: jax.Array) -> bool:
  """What is pruned by default: every leaf with two axes or more. Biases and scales are few, and stay.

  Args:
    name: of the leaf.
    leaf: its value.

  Returns:
    Whether it has two axes or more.
  """
  del name
  return jnp.ndim(leaf) > 1


def make_mask(
  score: Params,
  sparsity: float | jax.Array | Mapping[str, float],
  *,
  scope: str | Scope = "global",
  granularity: str = "weight",
  prunable: Callable[[str, jax.Array], bool] = is_kernel,
) -> Params:
  """A mask (0 or 1, in each leaf's shape) that keeps the weights of the highest score.

  Of n candidates it removes round(sparsity · n), exactly; among equal scores those that come later in the tree go. The best of
  each leaf is kept before anything else, so that no layer goes as a whole: where the sparsity leaves less than one for each leaf, fewer are
  removed. Works under `jit` and `vmap`, also with a traced sparsity.

  Args:
    score: non-negative numbers, a pytree like the parameters. What is no number (NaN) ranks nothing: it is refused or, where values are not
      known yet (under `jit`), makes all of the mask NaN, so that a training that goes on with it is seen to fail.
    sparsity: fraction of the candidates to remove, in [0, 1); with scope "layer" it may be one for each, by name of the leaf.
    scope: "global": the candidates are ranked together; "layer": each leaf by itself. Or a function `(score, sparsity) -> mask` that decides alone
      (`by_macs`), to which granularity and `prunable` mean nothing.
    granularity: "weight": single weights; "channel": output channels (the last axis) of a leaf by the sum of their
      weights' scores. A channel that goes takes with it its entry in the other leaves of the same module (its bias), so
      after a relu it is exactly 0 and can be cut out; where a module has several kernels of as many channels, an entry goes that all of
      them have removed. A sum grows with how many weights a channel has, so "global" may leave a layer with few of them, or of little
      sensitivity, a single channel.
    prunable: `(name, leaf) -> bool`, which leaves are candidates; the name is like "backbone/conv3/kernel". The mask is 1
      elsewhere.

  Returns:
    A pytree like `score`.

  Raises:
    ValueError: a sparsity outside [0, 1), an unknown scope or granularity, nothing to prune, or a score that is not a number.

  >>> import jax.numpy as jnp
  >>> score = {"kernel": jnp.array([[0.1, 3.0], [0.2, 1.0]]), "bias": jnp.array([9.0, 9.0])}
  >>> make_mask(score, 0.5)["kernel"].tolist()
  [[0.0, 1.0], [0.0, 1.0]]
  >>> make_mask(score, 0.5, granularity="channel")["bias"].tolist()
  [0.0, 1.0]
  """
  by_leaf = isinstance(sparsity, Mapping)
  of_leaf: Mapping[str, Any] = sparsity if isinstance(sparsity, Mapping) else {}
  check_sparsity(**({f"make_mask: sparsity of {name}": value for name, value in of_leaf.items()} if by_leaf else {"make_mask: sparsity": sparsity}))
  if callable(scope):
    return _decided(scope, score, sparsity)
  check_one_of("scope", scope, SCOPES)
  check_one_of("granularity", granularity, GRANULARITIES)
  leaves, structure = named_leaves(score), jax.tree.structure(score)
  candidates = {name: leaf.astype(precision_of(leaf)) for name, leaf in leaves.items() if prunable(name, leaf)}
  if not candidates:
    raise ValueError(f"make_mask: none of the leaves is prunable; there are {', '.join(leaves)}.")
  if by_leaf and (scope != "layer" or set(of_leaf) != set(candidates)):
    raise ValueError(
      f"make_mask: a sparsity for each leaf needs scope 'layer' and the names of what is prunable, {', '.join(candidates)}; got scope "
      f"'{scope}' and {', '.join(of_leaf)}."
    )
  if granularity == "channel":
    candidates = {path: leaf.reshape(-1, leaf.shape[-1]).sum(0) for path, leaf in candidates.items()}
  spoilt = _spoilt(candidates)
  groups = [list(candidates)] if scope == "global" else [[path] for path in candidates]
  candidates = {path: _spare_best(leaf) for path, leaf in candidates.items()}  # no layer goes as a whole: nothing would pass it
  kept = {}
  for group in groups:
    kept |= _keep_highest({path: candidates[path] for path in group}, of_leaf[group[0]] if by_leaf else sparsity)
  kept = {path: (mask * spoilt).astype(leaves[path].dtype) for path, mask in kept.items()}
  masks = _of_weights(kept, leaves) if granularity == "weight" else _of_channels(kept, leaves)
  return jax.tree.unflatten(structure, masks)


def _decided(scope, score, sparsity):
  """The mask of a scope that is a function."""
  spoilt = _spoilt(named_leaves(score))
  return jax.tree.map(lambda mask, leaf: (mask * spoilt).astype(leaf.dtype), scope(score, sparsity), score)


def _spoilt(leaves):
  """1, or NaN where a score that is traced has one; a ValueError where values are known."""
  unknown = {path: jnp.isnan(leaf).any() for path, leaf in leaves.items()}
  for path, found in unknown.items():
    if not isinstance(found, jax.core.Tracer) and found:
      raise ValueError(
        f"make_mask: the score of '{path}' is not a number everywhere (NaN), so it ranks nothing; see whether the loss that it is "
        "a derivative of is finite."
      )
  return jnp.where(jnp.stack(list(unknown.values())).any(), jnp.nan, 1.0)


def prune_further(score: Params, mask: Params, sparsity: float | jax.Array | Mapping[str, float], **options: Any) -> Params:
  """A mask of more sparsity that keeps nothing of what `mask` has removed, whatever its score; `options` are `make_mask`'s.

  Args:
    score: as in `make_mask`.
    mask: what is pruned already, a pytree like `score`.
    sparsity: of the new mask, as a whole.
    **options: of `make_mask`.

  Returns:
    A mask like `mask`.

  Raises:
    ValueError: as in `make_mask`.
  """
  # Scores are not negative, so what is removed already goes first. What is not 0 is kept: a mask of NaN stays one.
  ranked = jax.tree.map(lambda s, c: jnp.where(c == 0, jnp.asarray(-1, s.dtype), s), score, mask)
  return jax.tree.map(lambda new, old: (new * old).astype(old.dtype), make_mask(ranked, sparsity, **options), mask)


def apply_mask(params: Params, mask: Params) -> Params:
  """w ⊙ c.

  Args:
    params: w.
    mask: c, a pytree like `params`.

  Returns:
    A pytree like `params`.
  """
  return like(jax.tree.map(jnp.multiply, params, mask), params)


def mask_state(state: Any, mask: Params) -> Any:
  """A state (of an optimizer, of a server) in which everything that belongs to a parameter is masked as it is.

  That are the leaves whose path ends in that of a parameter and whose last axes are its: moments, averages, a history of updates (L-BFGS).
  What summarizes several parameters in one number, as Adafactor's rows and columns, is left as it is.

  Args:
    state: any pytree, such as wrapped, masked or partitioned optax transformations have.
    mask: a pytree like the parameters.

  Returns:
    A state like `state`.
  """
  masks = dict(jax.tree_util.tree_leaves_with_path(mask))
  longest = max(map(len, masks))

  def own(path, leaf):
    for length in range(min(longest, len(path)), -1, -1):
      found = masks.get(path[len(path) - length :])
      if found is not None and jnp.shape(leaf)[jnp.ndim(leaf) - found.ndim :] == found.shape and not _is_key(leaf):
        return (leaf * found).astype(jnp.result_type(leaf))
    return leaf

  return jax.tree_util.tree_map_with_path(own, state)


def masked_loss(loss: Loss, mask: Params | None) -> Loss:
  """The loss on what a mask keeps, so that the gradient of what is removed is 0; None: the loss as it is.

  Args:
    loss: `(params, batch, key) -> scalar`.
    mask: a pytree like the parameters, or None.

  Returns:
    A loss.
  """
  if mask is None:
    return loss

  @functools.wraps(loss)
  def masked(params, batch, key=None):
    return loss(apply_mask(params, mask), batch, key)

  return masked


def nonzero_mask(params: Params, *, granularity: str = "weight", prunable: Callable[[str, jax.Array], bool] = is_kernel) -> Params:
  """The mask that was applied to pruned parameters: 0 where a prunable weight is 0, or an output channel has no other weights.

  Args:
    params: a pytree in which what is pruned is exactly 0.
    granularity, prunable: as they were given to `make_mask`.

  Returns:
    A pytree like `params` of zeros and ones.
  """
  leaves, structure = named_leaves(params), jax.tree.structure(params)
  kept = {name: (leaf != 0).astype(leaf.dtype) for name, leaf in leaves.items() if prunable(name, leaf)}
  if granularity == "weight":
    return jax.tree.unflatten(structure, _of_weights(kept, leaves))
  channels = {name: mask.reshape(-1, mask.shape[-1]).max(0) for name, mask in kept.items()}
  return jax.tree.unflatten(structure, _of_channels(channels, leaves))


def mask_sparsity(mask: Params, prunable: Callable[[str, jax.Array], bool] = is_kernel, *, granularity: str = "weight") -> jax.Array:
  """The fraction of the prunable weights that a mask removes, or with granularity "channel" of their output channels (as a whole).

  Args:
    mask: a pytree of zeros and ones.
    prunable: `(name, leaf) -> bool`, which leaves count.
    granularity: "weight" or "channel".

  Returns:
    A scalar in [0, 1].
  """
  leaves = [leaf for name, leaf in named_leaves(mask).items() if prunable(name, leaf)]
  if granularity == "channel":
    leaves = [leaf.reshape(-1, leaf.shape[-1]).max(0) for leaf in leaves]
  return 1 - sum(leaf.sum() for leaf in leaves) / sum(leaf.size for leaf in leaves)  # type: ignore[return-value]


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

  Returns:
    A mask like `mask`.

  >>> import jax.numpy as jnp
  >>> mask = {"in": jnp.array([[1.0, 0.0]]), "out": jnp.array([[1.0], [1.0]])}
  >>> effective_mask(lambda w, x: x @ w["in"] @ w["out"], mask, jnp.ones((1, 1)))["out"].tolist()
  [[1.0], [0.0]]
  """
  leaves, structure = jax.tree.flatten(mask)
  own, weight, *keys = jax.random.split(jax.random.key(0), len(leaves) + 2)
  positive = lambda key, x: jax.random.uniform(key, x.shape, minval=0.5, maxval=1.5)
  params = jax.tree.unflatten(
    structure,
    [  # over the number of inputs, so that numbers neither grow nor vanish from layer to layer
      positive(k, leaf) / math.prod(leaf.shape[:-1]) for k, leaf in zip(keys, leaves)
    ],
  )
  inputs = positive(own, inputs)

  def some_sum(params):
    outputs = function(apply_mask(params, mask), inputs)
    return (outputs * positive(weight, outputs)).sum()

  return jax.tree.map(lambda c, slope: c * (slope != 0), mask, jax.jit(jax.grad(some_sum))(params))


def highest_first(values: jax.Array) -> jax.Array:
  """Each number's rank, 0 for the highest; of equal ones the first comes first.

  Args:
    values: (n,). Of up to 1,024 (a layer's channels) the ranks are found by comparisons alone: runtimes on devices do not sort.

  Returns:
    (n,) integers.

  >>> import jax.numpy as jnp
  >>> highest_first(jnp.array([1.0, 3.0, 3.0, 2.0])).tolist()
  [3, 0, 1, 2]
  """
  place = jnp.arange(values.shape[0], dtype=jnp.int32)
  if values.shape[0] > 1024:
    return jnp.zeros_like(place).at[jnp.argsort(-values, stable=True)].set(place)
  before = (values[None] > values[:, None]) | ((values[None] == values[:, None]) & (place[None] < place[:, None]))
  return before.sum(1, dtype=jnp.int32)


def _is_key(leaf):
  return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _spare_best(scores):
  flat = jnp.ravel(scores)
  return jnp.where(jnp.arange(flat.size) == jnp.argmax(flat), jnp.inf, flat).reshape(scores.shape)


def _of_weights(kept: dict[str, jax.Array], leaves: dict[str, jax.Array]) -> list[jax.Array]:
  """Masks of all leaves from those of the pruned ones."""
  return [kept.get(name, jnp.ones_like(leaf)) for name, leaf in leaves.items()]


def _of_channels(kept: dict[str, jax.Array], leaves: dict[str, jax.Array]) -> list[jax.Array]:
  """Masks of all leaves from those of the pruned leaves' channels: a pruned leaf's from its own, another's from those of its module."""

  def channels(name, leaf):
    if name in kept:
      return kept[name]
    width = jnp.shape(leaf)[-1:]
    beside = [mask for other, mask in kept.items() if other.rpartition("/")[0] == name.rpartition("/")[0] and mask.shape == width]
    return reduce(jnp.maximum, beside) if beside else 1

  return [(jnp.ones_like(leaf) * channels(name, leaf)).astype(leaf.dtype) for name, leaf in leaves.items()]


def _keep_highest(scores: dict[str, jax.Array], sparsity) -> dict[str, jax.Array]:
  flat = jnp.concatenate([score.ravel() for score in scores.values()])
  remove = jnp.minimum(jnp.round(sparsity * flat.size).astype(jnp.int32), flat.size - len(scores))
  # By rank, not by a threshold, so that ties do not change the number.
  kept = (highest_first(flat) < flat.size - remove).astype(flat.dtype)
  sizes = [score.size for score in scores.values()]
  parts: Sequence[jax.Array] = jnp.split(kept, list(_running(sizes))[:-1])
  return {path: part.reshape(score.shape) for (path, score), part in zip(scores.items(), parts)}


def _running(sizes):
  total = 0
  for size in sizes:
    total += size
    yield total

"""Sparsity penalties R and their proximal operators, for any pytree of parameters.

A penalty is a pair of pure functions. `value(w)` is R(w); `prox(w, step)` solves

    prox_{step·R}(w) = argmin_v  step·R(v) + ½‖v − w‖².

The weight of a penalty is part of the step, as in prox_{γμR}: whoever takes the step multiplies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagater_jax.core.trees import leaf_name, like, precision_of

__all__ = ["Penalty", "block_soft_threshold", "group_lasso", "group_norms", "l1", "no_penalty", "on_part", "soft_threshold"]

Tree = Any
# What a leaf contributes to: a family of groups by name, and the axis along which the family is indexed (None: the
# whole leaf is one group). Leaves that give the same name share their groups.
Groups = Callable[[str, jax.Array], tuple[str, int | None] | None]


class Penalty(NamedTuple):
  """A convex penalty R: `value(w) -> scalar` and `prox(w, step) -> tree like w`."""

  value: Callable[[Tree], jax.Array]
  prox: Callable[[Tree, Any], Tree]


def soft_threshold(x: jax.Array, step) -> jax.Array:
  """argmin_v step·|v| + ½(v − x)², element by element.

  Args:
    x: any array.
    step: a number, or an array that broadcasts against x.

  Returns:
    An array like x.
  """
  return (x - jnp.clip(x, -step, step)).astype(jnp.result_type(x))


def block_soft_threshold(x: jax.Array, step, axis: int | tuple[int, ...] | None = None) -> jax.Array:
  """argmin_v step·‖v‖₂ + ½‖v − x‖², with the norm taken over `axis` (None: over all of x).

  Args:
    x: any array.
    step: a number, or an array that broadcasts against the norms.
    axis: over which the norm is taken.

  Returns:
    An array like x.
  """
  x = jnp.asarray(x)
  return (x * _shrink(_root(jnp.sum(_square(x), axis=axis, keepdims=True)), step)).astype(x.dtype)


def no_penalty() -> Penalty:
  """R = 0, whose prox is the identity: accelerated gradient descent without a penalty.

  Returns:
    The penalty.
  """
  return Penalty(lambda w: jnp.zeros((), precision_of(w)), lambda w, step: w)


def l1() -> Penalty:
  """R(w) = Σ|w_j|; its prox is soft-thresholding.

  Returns:
    The penalty.

  >>> import jax.numpy as jnp
  >>> l1().prox(jnp.array([3.0, -0.5]), 1.0).tolist()
  [2.0, 0.0]
  """
  return Penalty(
    value=lambda w: sum((_wide(jnp.abs(x)).sum() for x in jax.tree.leaves(w)), start=jnp.zeros((), precision_of(w))),
    prox=lambda w, step: jax.tree.map(lambda x: soft_threshold(x, step), w),
  )


def group_lasso(groups: Groups | jax.Array | int | None = 0, *, size_weighted: bool = False) -> Penalty:
  """R(w) = Σ_g c_g ‖w_g‖₂ with c_g = 1, or √(elements of g) if `size_weighted` (Yuan & Lin 2006).

  Its prox is block soft-thresholding: a group whose norm is at most step·c_g becomes exactly zero.

  Args:
    groups: how parameters form groups. One of
      an axis: each index along that axis of each leaf is a group (None: each leaf is one);
      an integer array of group numbers 0…G−1, of the shape of the parameters (then a single array);
      a function `(path, leaf) -> (name, axis)` or None for a leaf that is not penalized, with the path written
      "layer/kernel". Leaves with the same name share groups: the norm goes over all of them.
    size_weighted: weight each group by the square root of its size.

  Returns:
    The penalty.

  Raises:
    ValueError: leaves of one name with different numbers of groups, group numbers of another shape than the
      parameters, or a function that no leaf answers (nothing would be penalized).

  >>> import jax.numpy as jnp
  >>> group_lasso(jnp.array([0, 0, 1])).prox(jnp.array([3.0, 4.0, 0.5]), 2.5).tolist()
  [1.5, 2.0, 0.0]
  """
  if not (groups is None or isinstance(groups, int) or callable(groups)):
    groups = np.asarray(groups)  # known before tracing: the number of groups is a shape

  def weights(sizes):
    return jnp.sqrt(sizes) if size_weighted else 1.0

  def value(w):
    squares, sizes, _ = _group_squares(groups, w)
    return sum((jnp.sum(weights(sizes[name]) * _root(s)) for name, s in squares.items()), start=jnp.zeros((), precision_of(w)))

  def prox(w, step):
    squares, sizes, members = _group_squares(groups, w)
    scale = {name: _shrink(_root(s), step * weights(sizes[name])) for name, s in squares.items()}
    leaves, tree = jax.tree.flatten(w)
    return like(jax.tree.unflatten(tree, [x if member is None else x * member.spread(scale[member.name]) for x, member in zip(leaves, members)]), w)

  return Penalty(value, prox)


def group_norms(groups: Groups | jax.Array | int | None, w: Tree) -> dict[str, jax.Array]:
  """‖w_g‖₂ of every group by family name, each of shape (groups,); `groups` as in `group_lasso`.

  Args:
    groups: as in `group_lasso`.
    w: parameters.

  Returns:
    (groups,) by name of a family.

  Raises:
    ValueError: as in `group_lasso`.
  """
  return {name: _root(s) for name, s in _group_squares(groups, w)[0].items()}


def on_part(penalty: Penalty, part: str | Callable[[str, jax.Array], bool]) -> Penalty:
  """The penalty applied to a chosen part of the parameters; the rest has value 0 and a prox that leaves it as it is.

  Args:
    penalty: what to apply. It sees paths that start below `part` where that is a key.
    part: a key of the parameter dictionary (as "gate"), or a function `(path, leaf) -> bool` that picks leaves.

  Returns:
    The penalty.

  Raises:
    ValueError: parameters that have no such part.
  """
  if isinstance(part, str):

    def value(w):
      return penalty.value(_sub_tree(w, part))

    def prox(w, step):
      return {**w, part: penalty.prox(_sub_tree(w, part), step)}

    return Penalty(value, prox)

  def picked(w):  # None is an empty subtree, so that the penalty sees only the leaves that were picked
    return jax.tree_util.tree_map_with_path(lambda path, x: x if part(leaf_name(path), x) else None, w)

  def prox_of_picked(w, step):
    moved = penalty.prox(picked(w), step)
    return jax.tree.map(lambda new, old: old if new is None else new, moved, w, is_leaf=lambda x: x is None)

  return Penalty(lambda w: penalty.value(picked(w)), prox_of_picked)


class _Member(NamedTuple):
  name: str
  spread: Callable[[jax.Array], jax.Array]  # from one number per group to the shape of the leaf


def _group_squares(groups, w):
  """Σ w² and number of elements of every group by family name, and how each leaf belongs to a family."""
  squares, sizes, members = {}, {}, []
  for path, leaf in jax.tree_util.tree_leaves_with_path(w):
    path = leaf_name(path)
    if callable(groups):
      answer = groups(path, leaf)
      if answer is None:
        members.append(None)
        continue
      name, axis = answer
      square, size, spread = _along_axis(leaf, axis)
    elif groups is None or isinstance(groups, int):
      name = path
      square, size, spread = _along_axis(leaf, groups)
    else:
      name = path
      square, size, spread = _by_number(leaf, groups)
    if name in squares and squares[name].shape != square.shape:
      raise ValueError(
        f"group_lasso: '{path}' has {square.shape[0]} groups named '{name}', another leaf of that name "
        f"has {squares[name].shape[0]}; leaves that share a name must have the same groups."
      )
    squares[name] = squares.get(name, 0) + square
    sizes[name] = sizes.get(name, 0) + size
    members.append(_Member(name, spread))
  if members and not squares:
    raise ValueError(
      "group_lasso: no leaf belongs to a group, so nothing is penalized. The group function was asked "
      f"about {[leaf_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(w)]}."
    )
  return squares, sizes, members


def _along_axis(leaf, axis):
  if axis is None:
    return jnp.sum(_square(leaf))[None], jnp.full((1,), leaf.size, precision_of(leaf)), lambda scale: scale[0]
  others = tuple(d for d in range(leaf.ndim) if d != axis % leaf.ndim)
  count = leaf.shape[axis]
  square = jnp.sum(_square(leaf), axis=others)
  return square, jnp.full((count,), leaf.size // max(count, 1), precision_of(leaf)), lambda scale: jnp.expand_dims(scale, others)


def _by_number(leaf, numbers):
  if numbers.shape != leaf.shape:
    raise ValueError(
      f"group_lasso: the group numbers have shape {numbers.shape}, the parameters {leaf.shape}; "
      "give one number per parameter, or a function or an axis for a pytree."
    )
  count = int(numbers.max()) + 1
  square = jax.ops.segment_sum(_square(leaf).ravel(), numbers.ravel(), count)
  size = jnp.bincount(numbers.ravel(), length=count).astype(square.dtype)
  return square, size, lambda scale: scale[numbers]


def _wide(x):
  """In float32 at least: squares of float16 are soon too large for it, and sums of bfloat16 have two digits."""
  return x.astype(precision_of(x))


def _square(x):
  return jnp.square(_wide(x))


def _root(square):
  """√, with derivative 0 at 0: a subgradient of the norm there, where √'s own is infinite and 0·∞ no number."""
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _shrink(norm, step):
  # At norm 0 the group is inside the ball, where the prox and its derivative are 0; without a ball (step 0) the prox is the identity.
  return jnp.where(norm > 0, jnp.maximum(1 - step / jnp.where(norm > 0, norm, 1), 0), jnp.where(jnp.asarray(step) > 0, 0.0, 1.0))


def _sub_tree(w, part):
  if part not in w:
    raise ValueError(f"on_part: the parameters have no part '{part}'; they have {sorted(w)}.")
  return w[part]

"""Pytrees of parameters: what a model is, and how its leaves are named."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Model", "Params", "leaf_name", "like", "named_leaves", "precision_of"]

# Parameters: any pytree of arrays. Those of a `GatedNetwork` are {"backbone": θ, "gate": {layer: φ_l}}.
Params = Any


class Model(NamedTuple):
  """A model that is handed on: from meta-training to personalization, from there to a device.

  Attributes:
    params: a pytree of arrays.
    mask: a pytree like `params` of zeros and ones, what pruning has kept; None: nothing is pruned. What it removes is exactly 0 in `params`
      and stays so in everything that trains or adapts the model.
  """

  params: Params
  mask: Params | None = None


def precision_of(tree: Params) -> jnp.dtype:
  """What scalars beside a tree are computed in: float32, or float64 where a leaf is.

  Args:
    tree: any pytree of arrays.

  Returns:
    The type.
  """
  return jnp.result_type(jnp.float32, *(leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)))


def like(values: Params, tree: Params) -> Params:
  """The values in the types of a tree's leaves, so that what is computed in another precision does not change parameters' types.

  Args:
    values, tree: pytrees of one structure.

  Returns:
    A pytree like `tree`.
  """
  return jax.tree.map(lambda value, leaf: jnp.asarray(value, jnp.result_type(leaf)), values, tree)


def leaf_name(path: tuple[Any, ...]) -> str:
  """The name of a leaf from its key path: "backbone/conv3/kernel".

  Args:
    path: of key entries, as `jax.tree_util` gives it.

  Returns:
    The keys, joined by "/".
  """
  return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Params) -> dict[str, jax.Array]:
  """The leaves of a tree by name, in the tree's order.

  Args:
    tree: any pytree.

  Returns:
    A dictionary of its leaves.

  >>> named_leaves({"conv": {"kernel": 1, "bias": 2}})
  {'conv/bias': 2, 'conv/kernel': 1}
  """
  return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

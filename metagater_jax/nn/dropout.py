"""flax's Dropout inside a backbone: off without a key, and with one a function of each row's own."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["drop", "drop_entries", "without_dropout"]


def without_dropout(next_function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
  """For `nn.intercept_methods`: a Dropout module is the identity, whatever it says itself.

  Args:
    next_function, args, kwargs, context: of an interceptor.

  Returns:
    What the module gives.
  """
  return args[0] if isinstance(context.module, nn.Dropout) and context.method_name == "__call__" else next_function(*args, **kwargs)


def drop(module: nn.Dropout, x: jax.Array, keys: jax.Array) -> jax.Array:
  """What a Dropout module gives in training, with a key for each row: the same in whatever batch a row is.

  Args:
    module: whose `rate`, `broadcast_dims` and `deterministic` hold.
    x: (batch, …).
    keys: (batch,).

  Returns:
    An array like x.
  """
  if module.rate == 0 or module.deterministic:
    return x
  return drop_entries(x, module.rate, keys, module.broadcast_dims)


def drop_entries(x: jax.Array, rate: float | jax.Array, keys: jax.Array, broadcast_dims: Sequence[int] = ()) -> jax.Array:
  """x with entries that are 0 with probability `rate`, drawn by each row's own key, and the rest divided by 1 − rate.

  Args:
    x: (batch, …).
    rate: in [0, 1); it may be traced.
    keys: (batch,).
    broadcast_dims: axes along which a draw is shared.

  Returns:
    An array like x.
  """
  shape = tuple(1 if i in broadcast_dims else size for i, size in enumerate(x.shape))[1:]
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys)
  return jnp.where(keep, x / jnp.maximum(1 - rate, 1e-9), 0).astype(x.dtype)

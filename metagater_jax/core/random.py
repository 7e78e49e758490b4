"""Randomness that does not depend on how work is arranged: a row's key, and samples drawn without replacement."""

import jax
import jax.numpy as jnp

__all__ = ["row_keys", "sample_positions"]

# Up to so many samples a draw is a float32 times their number; no sample's probability is then off by more than a thousandth.
_FEW = 2**13


def row_keys(key: jax.Array, rows: int) -> jax.Array:
  """A key for each row of a batch, (rows,), so that a row's noise does not depend on which batch it is part of.

  Args:
    key: of the batch.
    rows: how many rows it has.

  Returns:
    (rows,) keys.
  """
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def sample_positions(key: jax.Array, count: jax.Array, size: int) -> jax.Array:
  """`size` different numbers out of 0 … count − 1, uniformly; where count < size, all of them and then count … size − 1.

  The first `size` steps of a Fisher-Yates shuffle of an array that is never made, so that the cost does not depend on how
  many samples a task has: swap k exchanges the places k and r_k ≥ k, and what a place holds follows from the swaps before.

  Args:
    key: that the draw is a function of.
    count: () integer, how many numbers there are to draw from.
    size: how many are drawn.

  Returns:
    (size,) integers.
  """
  k = jnp.arange(size, dtype=jnp.int32)
  span = jnp.maximum(jnp.asarray(count, jnp.int32) - k, 1)
  # A float32 in [0, 1) is one of 2²³ numbers: of many more samples it would miss some, and prefer some where they are nearly as many.
  few = jnp.minimum((jax.random.uniform(key, (size,), jnp.float32) * span).astype(jnp.int32), span - 1)
  partner = k + jnp.where(span <= _FEW, few, jax.random.randint(key, (size,), 0, span, jnp.int32))

  def held(place, step, moved):
    swap = jnp.max(jnp.where((partner == place) & (k < step), k, -1))  # the last one that put something there
    return jnp.where(swap >= 0, moved[swap], place)

  def exchange(step, carry):
    drawn, moved = carry
    return (drawn.at[step].set(held(partner[step], step, moved)), moved.at[step].set(held(step, step, moved)))

  zeros = jnp.zeros(size, jnp.int32)
  return jax.lax.fori_loop(0, size, exchange, (zeros, zeros))[0]

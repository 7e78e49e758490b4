"""The inexact local problem of Eq. (5): gradient descent on a loss that is pulled to a centre."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metagater_jax.core.checks import check_counts
from metagater_jax.optim.metric import Rates, scale_parts

__all__ = ["local_solve"]

Params = Any


def local_solve(
  loss: Callable[[Params, Any, jax.Array | None], jax.Array],
  center: Params,
  draw: Callable[[jax.Array | int], tuple[Any, jax.Array | None]],
  *,
  optimizer: optax.GradientTransformation,
  steps: int,
  prox_weight: float = 0.0,
  start: Params | None = None,
  rates: Rates | None = None,
) -> tuple[Params, jax.Array]:
  """w_i ≈ argmin_v L_i(v) + (λ/2)‖v − md‖² (Eq. 5), by `steps` steps of gradient descent from md.

  Args:
    loss: L_i, `(params, batch, key) -> scalar`.
    center: md, what the solution is pulled to, and where the steps start.
    draw: gives the minibatch of step i = 0 … K − 1, with a key for the randomness inside the model on it.
    optimizer: how a step is made from the gradient; `optax.sgd(η)` is the paper's.
    steps: K.
    prox_weight: λ; 0 is plain local training.
    start: where the steps start instead.
    rates: ρ, the metric D of `optim.metric`: the pull is then (λ/2)‖v − md‖² in the norm of D⁻¹, and a step v − η(D ∇L_i(v) + λ(v − md)).

  Returns:
    w_i and the mean of the losses L_i met on the way (without the pull), a scalar.

  Raises:
    ValueError: steps that are not a whole number of at least 1.
  """
  check_counts(steps=steps)

  def step(carry, i):
    v, optimizer_state = carry
    value, gradient = jax.value_and_grad(loss)(v, *draw(i))
    gradient = scale_parts(gradient, rates)
    gradient = jax.tree.map(lambda g, v, md: g + prox_weight * (v - md), gradient, v, center)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, v)
    return (optax.apply_updates(v, updates), optimizer_state), value

  start = center if start is None else start
  (solution, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(steps, dtype=jnp.int32))
  return solution, losses.mean()

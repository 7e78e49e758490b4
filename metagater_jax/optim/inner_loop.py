"""Gradient descent that can be differentiated: A(w) = w − α∇L(w), repeated, and its derivative in three ways.

The inner loop of MAML and its kin, of Per-FedAvg's meta-gradient and of ANP's meta-objective.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metagater_jax.core.checks import check_counts, check_one_of
from metagater_jax.core.closures import lift
from metagater_jax.core.trees import like, named_leaves
from metagater_jax.optim.hoisting import hoist

__all__ = ["DERIVATIVES", "descend"]

Params = Any

# How what depends on the result is differentiated: through the steps; as if their gradients were constants (rates and masks are not); or through
# the steps with differences of gradients in the place of Hessian-vector products.
DERIVATIVES = ("exact", "first_order", "hessian_free")


def descend(
  loss: Callable[[Params, Any, jax.Array | None], jax.Array],
  params: Params,
  draw: Callable[[jax.Array | int], tuple[Any, jax.Array | None]],
  *,
  rates: Any,
  steps: int = 1,
  derivative: str = "exact",
  mask: Params | None = None,
  adapted: Callable[[str], bool] | None = None,
  hessian_step: float = 1e-2,
) -> Params:
  """w_K of w_{t+1} = w_t − α ∇L(w_t; B_t), to be differentiated with respect to `params` and `rates`.

  Backwards λ ← λ − α ∇²L(w_t; B_t) λ from the last step to the first; nothing is kept for it but the weights w_t.

  Args:
    loss: L, `(params, batch, key) -> scalar`.
    params: w_0, any pytree.
    draw: gives the batch of step t = 0 … K − 1, with a key for the randomness inside the model on it (None: none).
    rates: α, a number, or a pytree like `params` of one each.
    steps: K.
    derivative: one of `DERIVATIVES`. "exact": Hessian-vector products; "hessian_free": [∇L(w + δλ) − ∇L(w − δλ)] / 2δ in their place
      (Fallah et al. 2020); "first_order": λ as it is.
    mask: a pytree like `params`: w_0 and every step are multiplied with it.
    adapted: `name -> bool`, which leaves the steps change; None: all. Names are like "backbone/conv1/kernel".
    hessian_step: length ‖δλ‖ of the difference in "hessian_free", relative to 1 + ‖w_t‖: float32 gradients are no good for much
      shorter ones.

  Returns:
    w_K, a pytree like `params`.

  Raises:
    ValueError: an unknown derivative, steps that are not a whole number of at least 1, no leaf that is adapted, or "hessian_free" where some are not.
  """
  check_one_of("derivative", derivative, DERIVATIVES)
  check_counts(steps=steps)
  if mask is not None:
    params = like(jax.tree.map(jnp.multiply, params, mask), params)
  names, leaves, structure = list(named_leaves(params)), jax.tree.leaves(params), jax.tree.structure(params)
  moving = [i for i, name in enumerate(names) if adapted is None or adapted(name)]
  if not moving:
    raise ValueError(f"the inner loop adapts none of the parameters; there are {', '.join(names)}.")
  if derivative == "hessian_free" and len(moving) < len(leaves):
    raise ValueError("derivative 'hessian_free' needs an inner loop that adapts all parameters; use 'exact' or 'first_order'.")
  is_number = len(jax.tree.leaves(rates)) == 1 and jax.tree.structure(rates) != structure  # type: ignore[operator]
  rates = [jnp.asarray(rates, leaf.dtype) for leaf in leaves] if is_number else jax.tree.leaves(rates)
  # What a step multiplies the gradient with: α, or 0 where the mask is.
  factors = [jnp.asarray(rates[i] if mask is None else rates[i] * jax.tree.leaves(mask)[i], leaves[i].dtype) for i in moving]
  numbers = jnp.arange(steps, dtype=jnp.int32)
  part, fixed = ([leaf for i, leaf in enumerate(leaves) if (i in moving) == own] for own in (True, False))

  def value(part, fixed, i):
    rest, moved = iter(fixed), iter(part)
    whole = [next(moved) if i in moving else next(rest) for i in range(len(leaves))]
    return loss(jax.tree.unflatten(structure, whole), *draw(i))

  if fixed:  # what does not change between steps, as a body's features, is computed once; from here on it is what is fixed
    head, fixed = hoist(lambda moved, fixed: value(moved[0], fixed, moved[1]), (part, jnp.int32(0)), fixed)
    value = lambda part, fixed, i: head((part, i), fixed)
  # What the loss refers to (a batch, a value that is learned) becomes an argument: to be differentiated where it is of floats.
  lifted, captured = lift(value, part, fixed, jnp.int32(0))
  is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in captured]
  others, own = [x for x, floats in zip(captured, is_float) if not floats], len(fixed)
  fixed = [*fixed, *(x for x, floats in zip(captured, is_float) if floats)]

  def merged(others):
    """The loss of (part, fixed, i), with the values that have no derivative."""

    def value(part, fixed, i):
      floats, rest = iter(fixed[own:]), iter(others)
      return lifted([next(floats if is_own else rest) for is_own in is_float], part, fixed[:own], i)

    return value

  def run(part, fixed, others, factors):
    """The weights after the last step, and before each."""

    def step(part, i):
      gradient = jax.grad(merged(others))(part, fixed, i)
      return [w - a * g for w, a, g in zip(part, factors, gradient)], part

    return jax.lax.scan(step, part, numbers)

  def run_summing(part, fixed, others, factors):
    """The weights after the last step, and the sum of all steps' gradients."""

    def step(carry, i):
      part, total = carry
      gradient = jax.grad(merged(others))(part, fixed, i)
      return ([w - a * g for w, a, g in zip(part, factors, gradient)], [s + g for s, g in zip(total, gradient)]), None

    return jax.lax.scan(step, (part, jax.tree.map(jnp.zeros_like, part)), numbers)[0]

  def gradient_and_curvature(value, part, fixed, i, direction):
    """∇L with respect to the moving part, and ∇²L there times a direction."""
    if derivative == "hessian_free":
      length = jnp.sqrt(sum(jnp.vdot(v, v) for v in direction))
      size = jnp.sqrt(sum(jnp.vdot(w, w) for w in part))
      delta = jnp.where(length > 0, hessian_step * (1 + size) / jnp.where(length > 0, length, 1), 1)
      ahead, behind = (jax.grad(value)([w + sign * delta * v for w, v in zip(part, direction)], fixed, i) for sign in (1, -1))
      return jax.grad(value)(part, fixed, i), [(a - b) / (2 * delta) for a, b in zip(ahead, behind)]
    if "custom_vjp_call" in str(jax.make_jaxpr(value)(part, fixed, i)):
      # Gates and microbatches have no forward derivative: reverse over reverse.
      gradient, pull = jax.vjp(lambda part: jax.grad(value)(part, fixed, i), part)
      return gradient, pull(direction)[0]
    # Forward over reverse, which is faster (benchmarks/NOTES.md).
    return jax.jvp(lambda part: jax.grad(value)(part, fixed, i), (part,), (direction,))

  def of_factors(factors, cotangent, gradient):
    return [jnp.sum(v * g) if jnp.ndim(a) == 0 else v * g for v, g, a in zip(cotangent, gradient, factors)]

  def back(saved, cotangent):
    """λ ← λ − ∇²L(w_t) αλ from the last step to the first. Nothing is saved for it but the weights w_t."""
    path, fixed, others, factors = saved
    value = merged(others)

    def step(carry, t):
      i, part = t
      co_part, co_factors = carry
      direction = [a * v for a, v in zip(factors, co_part)]
      gradient, curved = gradient_and_curvature(value, part, fixed, i, direction)
      minus = lambda tree, other: jax.tree.map(jnp.subtract, tree, other)
      return (minus(co_part, curved), minus(co_factors, of_factors(factors, co_part, gradient))), direction

    start = cotangent, jax.tree.map(jnp.zeros_like, factors)
    (co_part, co_factors), directions = jax.lax.scan(step, start, (numbers, path), reverse=True)

    def bent(fixed):
      """Σ_t ∇L(w_t)·αλ_t."""
      gradients = jax.vmap(lambda part, i: jax.grad(value)(part, fixed, i))(path, numbers)
      return sum(jnp.vdot(v, g) for v, g in zip(directions, gradients))

    co_fixed = jax.tree.map(jnp.negative, jax.grad(bent)(fixed)) if fixed else fixed
    return co_part, co_fixed, None, co_factors

  def forward(part, fixed, others, factors):
    solution, path = run(part, fixed, others, factors)
    return solution, (path, fixed, others, factors)

  def first_order_forward(part, fixed, others, factors):
    solution, total = run_summing(part, fixed, others, factors)
    return solution, (total, fixed, factors)

  def first_order_back(saved, cotangent):
    """w_K = w_0 − α Σ_t g_t with constants g_t."""
    total, fixed, factors = saved
    return cotangent, jax.tree.map(jnp.zeros_like, fixed), None, jax.tree.map(jnp.negative, of_factors(factors, cotangent, total))

  adapt = jax.custom_vjp(lambda part, fixed, others, factors: run(part, fixed, others, factors)[0])
  adapt.defvjp(*((first_order_forward, first_order_back) if derivative == "first_order" else (forward, back)))
  solution = adapt(part, fixed, others, factors)
  for i, leaf in zip(moving, solution):
    leaves[i] = leaf
  return jax.tree.unflatten(structure, leaves)

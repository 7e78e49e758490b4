"""Few-shot meta-learners in one interface: MAML, first-order MAML, ANIL and Reptile.

All of them know a network only by its loss, as everything in this library does, and parameters are any pytree. A mask on the
parameters (`metagater_jax.pruning`) holds through the inner loop: what it removes stays exactly 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagater_jax.checks import check_not_negative, check_positive
from metagater_jax.data.population import Batch
from metagater_jax.hoisting import hoist
from metagater_jax.local import Loss
from metagater_jax.pruning import apply_mask

__all__ = ["DERIVATIVES", "MetaLearner", "anil", "maml", "meta_reptile"]

Params = Any

# How the meta-objective is differentiated: through the inner loop, or as if the inner gradients were constants.
DERIVATIVES = ("exact", "first_order")


class MetaLearner(NamedTuple):
  """A meta-learner as pure functions of pytrees.

  Attributes:
    init: `params -> meta-parameters`: the parameters themselves, or with what else is learned beside them.
    adapt: `(meta-parameters, support, mask=None) -> params` of the network, adapted to a task by the inner loop A_T.
    meta_loss: `(meta-parameters, episode, mask=None, derivative=None) -> scalar` L_query(A_T(w)), to be differentiated;
      `derivative`, one of `DERIVATIVES`, says how (None: as the learner itself does).
    meta_gradient: `(meta-parameters, episode, mask=None) -> (query loss, gradient)`, what the outer optimizer gets.
    params: `meta-parameters -> params` of the network before adaptation.
  """

  init: Callable[[Params], Params]
  adapt: Callable[..., Params]
  meta_loss: Callable[..., jax.Array]
  meta_gradient: Callable[..., tuple[jax.Array, Params]]
  params: Callable[[Params], Params]


def maml(loss: Loss, *, inner_lr: float, inner_steps: int = 1, derivative: str = "exact", learn_rates: bool = False,
         adapted: Callable[[str], bool] | None = None) -> MetaLearner:
  """Model-agnostic meta-learning (Finn et al. 2017): A_T(w) = w − α ∇L_support(w), `inner_steps` times;  min_w E_T L_query(A_T(w)).

  Args:
    loss: `(params, batch, key) -> scalar`; the key is None here.
    inner_lr: α, or where it starts if it is learned.
    inner_steps: of gradient descent on the whole support set.
    derivative: "exact" (through the inner loop) or "first_order" (the gradient at the adapted weights, FOMAML).
    learn_rates: one α per leaf of the parameters, learned with them (Meta-SGD by layers). Meta-parameters are then
      {"weights": params, "inner_lr": one scalar per leaf}.
    adapted: `path -> bool`, which leaves the inner loop changes; None: all. Paths are like "backbone/conv1/kernel".

  Raises:
    ValueError: a rate or number of steps that is not positive, or an unknown derivative.
  """
  check_not_negative(inner_lr=inner_lr)
  check_positive(inner_steps=inner_steps)
  _check_derivative(derivative)

  def init(params):
    if not learn_rates:
      return params
    return {"weights": params, "inner_lr": jax.tree.map(lambda _: jnp.float32(inner_lr), params)}

  def split(meta_params):
    return (meta_params["weights"], meta_params["inner_lr"]) if learn_rates else (meta_params, None)

  def adapt(meta_params, support, mask=None, derivative="exact"):
    params, rates = split(meta_params)
    mask = split(mask)[0] if mask is not None else None
    return _descend(loss, params, inner_lr if rates is None else rates, inner_steps, lambda _: support, mask, derivative,
                    adapted)

  own_derivative = derivative

  def meta_loss(meta_params, episode, mask=None, derivative=None):
    derivative = own_derivative if derivative is None else derivative
    _check_derivative(derivative)
    return loss(adapt(meta_params, episode.support, mask, derivative), episode.query, None)

  return MetaLearner(init, adapt, meta_loss, jax.value_and_grad(meta_loss), lambda meta_params: split(meta_params)[0])


def anil(loss: Loss, *, head: str = "output", **options: Any) -> MetaLearner:
  """Almost no inner loop (Raghu et al. 2020): MAML whose inner loop changes the last layer only.

  Args:
    loss: `(params, batch, key) -> scalar`.
    head: name of the last layer, a part of its leaves' paths.
    **options: of `maml`.
  """
  return maml(loss, adapted=lambda path: head in path.split("/"), **options)


def meta_reptile(loss: Loss, *, inner_lr: float, inner_steps: int = 5) -> MetaLearner:
  """Reptile (Nichol et al. 2018): the outer optimizer follows (w − A_T(w)) / α, A_T taking steps on different minibatches.

  In meta-training step i of the inner loop has every `inner_steps`-th sample of support and query together, so that the
  minibatches of a task differ, as Reptile needs it; adaptation to a new task has its support alone. `meta_loss` is the query
  loss after that, which a pruning score may differentiate; Reptile itself never does.

  Args:
    loss: `(params, batch, key) -> scalar`.
    inner_lr: α.
    inner_steps: of gradient descent.
  """
  check_positive(inner_lr=inner_lr)
  plain = maml(loss, inner_lr=inner_lr, inner_steps=inner_steps, derivative="first_order")

  def meta_gradient(params, episode, mask=None):
    samples = jax.tree.map(lambda *parts: jnp.concatenate(parts), episode.support, episode.query)
    count = samples.labels.shape[0] // inner_steps
    if not count:
      raise ValueError(f"{samples.labels.shape[0]} samples of an episode are not enough for {inner_steps} inner steps.")
    deal = lambda i: jax.tree.map(lambda x: x[i + inner_steps * jnp.arange(count)], samples)
    solution = _descend(loss, params, inner_lr, inner_steps, deal, mask, "first_order", None)
    gradient = jax.tree.map(lambda w, v: (w - v) / inner_lr, params, solution)
    return loss(solution, episode.query, None), gradient

  return plain._replace(meta_gradient=meta_gradient)


def _descend(loss, params, rates, steps, batch: Callable[[jax.Array], Batch], mask, derivative, adapted):
  """`steps` steps of gradient descent of the adapted leaves; w and every step are multiplied with the mask."""
  if mask is not None:
    params = apply_mask(params, mask)
  flat, structure = jax.tree_util.tree_flatten_with_path(params)
  paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
  leaves = [leaf for _, leaf in flat]
  moving = [i for i, path in enumerate(paths) if adapted is None or adapted(path)]
  if not moving:
    raise ValueError(f"the inner loop adapts none of the parameters; there are {', '.join(paths)}.")
  rates = [jnp.asarray(rates, jnp.float32)] * len(leaves) if isinstance(rates, float | int) else jax.tree.leaves(rates)
  # What a step multiplies the gradient with: α, or 0 where the mask is.
  factors = [rates[i] if mask is None else rates[i] * jax.tree.leaves(mask)[i] for i in moving]
  part, fixed = ([leaf for i, leaf in enumerate(leaves) if (i in moving) == own] for own in (True, False))

  def value(part, fixed, i):
    rest, moved = iter(fixed), iter(part)
    whole = [next(moved) if i in moving else next(rest) for i in range(len(leaves))]
    return loss(jax.tree.unflatten(structure, whole), batch(i), None)

  if fixed:  # what does not change between steps, as a body's features, is computed once; from here on it is what is fixed
    head, fixed = hoist(lambda moved, fixed: value(moved[0], fixed, moved[1]), (part, jnp.int32(0)), fixed)
    value = lambda part, fixed, i: head((part, i), fixed)

  def descend(part, fixed, factors):
    """The weights after the last step, and before each."""
    def step(part, i):
      gradient = jax.grad(value)(part, fixed, i)
      return [w - a * g for w, a, g in zip(part, factors, gradient)], part
    return jax.lax.scan(step, part, jnp.arange(steps))

  def gradient_and_curvature(part, fixed, i, direction):
    """∇L with respect to the moving part, and ∇²L there times a direction."""
    if "custom_vjp_call" in str(jax.make_jaxpr(value)(part, fixed, i)):
      # Gates and microbatches have no forward derivative: reverse over reverse.
      gradient, pull = jax.vjp(lambda part: jax.grad(value)(part, fixed, i), part)
      return gradient, pull(direction)[0]
    # Forward over reverse, which is faster (benchmarks/NOTES.md).
    return jax.jvp(lambda part: jax.grad(value)(part, fixed, i), (part,), (direction,))

  def back(saved, cotangent):
    """λ ← λ − ∇²L(w_t) αλ from the last step to the first. Nothing is saved for it but the weights w_t."""
    path, fixed, factors = saved

    def step(carry, t):
      i, part = t
      co_part, co_factors = carry
      direction = [a * v for a, v in zip(factors, co_part)]
      gradient, curved = gradient_and_curvature(part, fixed, i, direction)
      of_factors = [jnp.sum(v * g) if jnp.ndim(a) == 0 else v * g for v, g, a in zip(co_part, gradient, factors)]
      minus = lambda tree, other: jax.tree.map(jnp.subtract, tree, other)
      return (minus(co_part, curved), minus(co_factors, of_factors)), direction

    start = cotangent, jax.tree.map(jnp.zeros_like, factors)
    (co_part, co_factors), directions = jax.lax.scan(step, start, (jnp.arange(steps), path), reverse=True)

    def bent(fixed):
      """Σ_t ∇L(w_t)·αλ_t."""
      gradients = jax.vmap(lambda part, i: jax.grad(value)(part, fixed, i))(path, jnp.arange(steps))
      return sum(jnp.vdot(v, g) for v, g in zip(directions, gradients))

    co_fixed = jax.tree.map(jnp.negative, jax.grad(bent)(fixed)) if fixed else fixed
    return co_part, co_fixed, co_factors

  def forward(part, fixed, factors):
    solution, path = descend(part, fixed, factors)
    return solution, (path, fixed, factors)

  adapt = jax.custom_vjp(lambda part, fixed, factors: descend(part, fixed, factors)[0])
  adapt.defvjp(forward, back)
  if derivative == "first_order":  # A_T(w) = w + a constant
    solution = [w + jax.lax.stop_gradient(v - w) for w, v in zip(part, descend(part, fixed, factors)[0])]
  else:
    solution = adapt(part, fixed, factors)
  for i, leaf in zip(moving, solution):
    leaves[i] = leaf
  return jax.tree.unflatten(structure, leaves)


def _check_derivative(derivative):
  if derivative not in DERIVATIVES:
    raise ValueError(f"derivative must be one of {', '.join(DERIVATIVES)}, got {derivative!r}.")

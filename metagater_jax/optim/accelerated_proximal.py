"""Accelerated proximal gradient descent as an optax transformation (Algorithm 1's server update).

It stands on its own: anything that has a gradient and a penalty with a proximal operator can use it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagater_jax.optim.penalties import Penalty

__all__ = ["GAMMA_SCHEDULES", "AcceleratedProximalState", "accelerated_proximal",
           "accelerated_proximal_eval_params"]

# γ_t from (t, β_t, α_t), t = 1, 2, …
GAMMA_SCHEDULES: dict[str, Callable] = {
    "ghadimi_lan": lambda t, beta, alpha: t * beta / 2,
    "nesterov": lambda t, beta, alpha: beta / alpha,
    "plain": lambda t, beta, alpha: beta,
}


class AcceleratedProximalState(NamedTuple):
  """`count` (updates done so far, t − 1), and the sequences `x` and `ag` (the model to evaluate)."""

  count: jax.Array
  x: Any
  ag: Any


def accelerated_proximal(
    penalty: Penalty,
    beta: optax.ScalarOrSchedule,
    *,
    penalty_weight: optax.ScalarOrSchedule = 1.0,
    alpha: optax.ScalarOrSchedule | None = None,
    gamma: str | optax.ScalarOrSchedule = "ghadimi_lan",
) -> optax.GradientTransformationExtraArgs:
  """Accelerated proximal gradient descent on f(w) + μ R(w).

  The parameters that a training loop carries are `md`, the point at which gradients d = ∇f(md) are to be taken; the state
  holds the other two sequences. Update t = 1, 2, …:

      x  ← prox_{γ_t μ R}(x  − γ_t d)
      ag ← prox_{β_t μ R}(md − β_t d)
      md ← (1 − α_{t+1}) ag + α_{t+1} x          with x = ag = md = w⁰ at the start

  The model to evaluate is `ag` (`accelerated_proximal_eval_params`): its proximal step makes exact zeros, which `md`, a
  mixture, need not have. As `optax.contrib.schedule_free`, it consumes gradients, not steps, so it comes last in an
  `optax.chain` (for instance after clipping).

  Args:
    penalty: R, with its proximal operator (`metagater_jax.optim.penalties`).
    beta: β_t, the step of the `ag` sequence: at most 1/L for an L-smooth f with "nesterov" or "plain", at most 1/(2L)
      with "ghadimi_lan". A schedule is called with t − 1 = 0, 1, …, like all of optax's.
    penalty_weight: μ_t.
    alpha: α_t, the weight of `x` in `md`; None is 2/(t + 1).
    gamma: γ_t, the step of the `x` sequence: "ghadimi_lan" (t β_t/2), "nesterov" (β_t/α_t), "plain" (β_t: all three
      sequences coincide, proximal gradient descent without acceleration), or a number or schedule of its own.

  Returns:
    A transformation whose `update` needs `params` (the current `md`).

  Raises:
    ValueError: an unknown name of a γ schedule, a number that is not positive, or `update` without `params`.

  References:
    Ghadimi & Lan, "Accelerated gradient methods for nonconvex nonlinear and stochastic programming", Mathematical
    Programming 156, 2016, Algorithm 2 in its composite form.

  A lasso, ½‖Aw − b‖²/n + 0.1‖w‖₁, in five lines:

  >>> import jax, jax.numpy as jnp, optax
  >>> from metagater_jax.optim import accelerated_proximal, accelerated_proximal_eval_params, l1
  >>> A = jax.random.normal(jax.random.key(0), (50, 10)); b = A[:, 0] - 2 * A[:, 1]
  >>> L = jnp.linalg.norm(A, 2) ** 2 / 50
  >>> gradient = jax.grad(lambda w: jnp.mean((A @ w - b) ** 2) / 2)
  >>> solver = accelerated_proximal(l1(), 1 / L, penalty_weight=0.1, gamma="nesterov")
  >>> w = jnp.zeros(10); state = solver.init(w)
  >>> for _ in range(200):
  ...   updates, state = solver.update(gradient(w), state, w)
  ...   w = optax.apply_updates(w, updates)
  >>> jnp.nonzero(accelerated_proximal_eval_params(state))[0].tolist()
  [0, 1]
  """
  for name, rate in (("beta", beta), ("alpha", alpha), ("gamma", gamma)):
    # Tracers and concrete arrays are left to the mathematics: reading them would break under jit.
    if isinstance(rate, (int, float)) and not rate > 0:
      raise ValueError(f"accelerated_proximal: {name} must be positive, got {rate}.")
  if isinstance(penalty_weight, (int, float)) and penalty_weight < 0:
    raise ValueError(f"accelerated_proximal: penalty_weight must not be negative, got {penalty_weight}.")
  if isinstance(gamma, str) and gamma not in GAMMA_SCHEDULES:
    raise ValueError(f"accelerated_proximal: gamma is '{gamma}'; known schedules are {sorted(GAMMA_SCHEDULES)}, or give a "
                     "number or an optax schedule.")

  def alpha_at(count):
    return 2 / (count + 2) if alpha is None else _rate(alpha, count)

  def gamma_at(count, beta_t):
    if isinstance(gamma, str):
      return GAMMA_SCHEDULES[gamma](count + 1, beta_t, alpha_at(count))
    return _rate(gamma, count)

  def init(params):
    # Copies, so that a caller may donate parameters and state to a jitted step: no buffer is in both.
    copy = lambda: jax.tree.map(jnp.array, params)
    return AcceleratedProximalState(jnp.zeros((), jnp.int32), copy(), copy())

  def update(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError("accelerated_proximal: update needs the current parameters: update(gradients, state, params).")
    beta_t = _rate(beta, state.count)
    gamma_t = gamma_at(state.count, beta_t)
    mu = _rate(penalty_weight, state.count)
    x = penalty.prox(_axpy(-gamma_t, updates, state.x), gamma_t * mu)  # Algorithm 1, line 4
    ag = penalty.prox(_axpy(-beta_t, updates, params), beta_t * mu)  # line 5
    count = optax.safe_increment(state.count)
    alpha_next = alpha_at(count)
    step = jax.tree.map(lambda ag, x, md: (1 - alpha_next) * ag + alpha_next * x - md, ag, x, params)  # line 1
    return step, AcceleratedProximalState(count, x, ag)

  return optax.GradientTransformationExtraArgs(init, update)


def accelerated_proximal_eval_params(state: Any) -> Any:
  """The model to evaluate and deploy, `ag`, from the state of `accelerated_proximal` or of a chain that holds one.

  Args:
    state: of the optimizer.

  Returns:
    ag, a pytree like the parameters.

  Raises:
    ValueError: a state without `accelerated_proximal` in it.
  """
  ag = optax.tree.get(state, "ag")
  if ag is None:
    raise ValueError("accelerated_proximal_eval_params: this optimizer state holds no accelerated_proximal.")
  return ag


def _rate(value, count):
  return value(count) if callable(value) else value


def _axpy(scale, d, w):
  return jax.tree.map(lambda d, w: w + scale * d, d, w)

"""`accelerated_proximal` against jaxopt's accelerated `ProximalGradient` at the same fixed step size, on one lasso."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagater_jax as mg
from benchmarks.measure import medians, row

__all__ = ["lasso"]


def lasso(repeats: int, quick: bool, steps: int = 1000) -> list[dict[str, Any]]:
  """Objective above the optimum and time per step on a lasso with correlated columns, at the step size 1/L."""
  try:
    import jaxopt
  except ImportError:
    print("jaxopt is not installed: no comparison of proximal gradient descent.")
    return []
  rng = np.random.default_rng(0)
  factor = rng.normal(size=(500, 60)) @ rng.normal(size=(60, 400)) / 8 + rng.normal(size=(500, 400))
  a = jnp.asarray(factor, jnp.float32)
  b = a @ jnp.asarray(rng.normal(size=400) * (rng.random(400) < 0.05), jnp.float32) + 0.1
  mu = 0.02
  smoothness = float(jnp.linalg.norm(a, 2) ** 2 / len(b))
  smooth = lambda w: 0.5 * jnp.mean((a @ w - b) ** 2)
  transform = mg.accelerated_proximal(mg.l1(), 1 / smoothness, penalty_weight=mu, gamma="nesterov")

  def ours(steps):
    def step(_, carry):
      w, state = carry
      updates, state = transform.update(jax.grad(smooth)(w), state, w)
      return optax.apply_updates(w, updates), state

    w = jnp.zeros(a.shape[1])
    return mg.accelerated_proximal_eval_params(jax.lax.fori_loop(0, steps, step, (w, transform.init(w)))[1])

  def theirs(steps):
    solver = jaxopt.ProximalGradient(
      smooth, prox=jaxopt.prox.prox_lasso, stepsize=1 / smoothness, maxiter=steps, tol=0.0, acceleration=True, implicit_diff=False, jit=True
    )
    return solver.run(jnp.zeros(a.shape[1]), mu).params

  def objective(w):  # in float64
    w = np.asarray(w, np.float64)
    return 0.5 * np.mean((np.asarray(a, np.float64) @ w - np.asarray(b, np.float64)) ** 2) + mu * np.abs(w).sum()

  seconds = medians(repeats, {f.__name__: jax.jit(partial(f, steps)) for f in (ours, theirs)})
  from sklearn.linear_model import Lasso

  optimum = objective(
    Lasso(alpha=mu, fit_intercept=False, tol=1e-13, max_iter=1_000_000).fit(np.asarray(a, np.float64), np.asarray(b, np.float64)).coef_
  )
  rows = []
  for count in (30, 100) if quick else (30, 100, 300, steps):
    for name, solve in (("ours", ours), ("jaxopt", theirs)):
      rows.append(row(f"lasso after {count} steps: above the optimum, {name}", objective(jax.jit(partial(solve, count))()) - optimum, "objective"))
  return [*rows, row("lasso: time per step, ours / jaxopt", seconds["ours"] / seconds["theirs"], "ratio", key="lasso")]

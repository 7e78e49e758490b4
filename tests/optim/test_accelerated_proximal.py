"""Algorithm 1's server update against a float64 re-derivation, and what an optimizer is for: reaching the optimum."""

import chex
import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import pytest
from sklearn.linear_model import Lasso

import metagater_jax as mg

GAMMA = {"ghadimi_lan": lambda t, beta, alpha: t * beta / 2, "nesterov": lambda t, beta, alpha: beta / alpha, "plain": lambda t, beta, alpha: beta}


def soft(x, step):
  return np.sign(x) * np.maximum(np.abs(x) - step, 0)


def algorithm_1(w, gradients, beta, gamma, mu, alpha=lambda t: 2 / (t + 1)):
  """The box of Algorithm 1, line by line, in NumPy; returns md and ag of every step."""
  x, ag, seen = w.copy(), w.copy(), []
  for t, gradient in enumerate(gradients, 1):
    md = (1 - alpha(t)) * ag + alpha(t) * x
    d = gradient(md)
    x = soft(x - gamma(t, beta(t), alpha(t)) * d, gamma(t, beta(t), alpha(t)) * mu)
    ag = soft(md - beta(t) * d, beta(t) * mu)
    seen.append((md, ag))
  return seen


@pytest.mark.parametrize("gamma", [*GAMMA, "number", "schedule"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_twenty_noisy_steps_of_algorithm_1(gamma, scheduled):
  rng = np.random.default_rng(0)
  a, w0, noise = rng.normal(size=(6, 6)), rng.normal(size=6), 0.3 * rng.normal(size=(20, 6))
  hessian = a @ a.T / 6
  gradients = [lambda w, n=n: hessian @ (w - 1) + n for n in noise]
  beta = (lambda t: 0.2 / np.sqrt(t)) if scheduled else (lambda t: 0.1)
  gamma_rule = {**GAMMA, "number": lambda t, *_: 0.15, "schedule": lambda t, *_: 0.05 * t}[gamma]
  expected = algorithm_1(w0, gradients, beta, gamma_rule, mu=0.3)

  transform = mg.accelerated_proximal(
    mg.l1(),
    (lambda count: 0.2 / jnp.sqrt(count + 1)) if scheduled else 0.1,
    penalty_weight=0.3,
    gamma={"number": 0.15, "schedule": lambda count: 0.05 * (count + 1)}.get(gamma, gamma),
  )
  md = jnp.asarray(w0, jnp.float32)
  state = transform.init(md)
  step = jax.jit(transform.update)
  for gradient, (md_expected, ag_expected) in zip(gradients, expected):
    np.testing.assert_allclose(md, md_expected, rtol=2e-4, atol=2e-5)
    updates, state = step(jnp.asarray(gradient(np.asarray(md, np.float64)), jnp.float32), state, md)
    md = optax.apply_updates(md, updates)
    np.testing.assert_allclose(mg.accelerated_proximal_eval_params(state), ag_expected, rtol=2e-4, atol=2e-5)


def test_plain_schedule_is_proximal_gradient_descent():
  target = jnp.array([2.0, -0.4, 1.0])
  transform = mg.accelerated_proximal(mg.l1(), 0.3, penalty_weight=0.5, gamma="plain")
  w = md = jnp.zeros(3)
  state = transform.init(md)
  for _ in range(5):
    updates, state = transform.update(md - target, state, md)
    md = optax.apply_updates(md, updates)
    w = jnp.asarray(soft(np.asarray(w - 0.3 * (w - target)), 0.15))
    np.testing.assert_allclose(mg.accelerated_proximal_eval_params(state), w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.x, w, rtol=1e-5, atol=1e-6)


def lasso_problem():
  rng = np.random.default_rng(1)
  # Correlated columns: an ill-conditioned problem, on which acceleration matters.
  a = rng.normal(size=(60, 40)) @ np.diag(np.logspace(0, -1.5, 40)) @ np.linalg.qr(rng.normal(size=(40, 40)))[0]
  b = a @ (rng.normal(size=40) * (rng.random(40) < 0.3)) + 0.05 * rng.normal(size=60)
  return a, b, 0.002


def objective(a, b, mu, w):
  return 0.5 * np.mean((a @ w - b) ** 2) + mu * np.abs(w).sum()


def solve(a, b, mu, steps, gamma):
  smoothness = np.linalg.norm(a, 2) ** 2 / len(b)
  transform = mg.accelerated_proximal(mg.l1(), (0.5 if gamma == "ghadimi_lan" else 1.0) / smoothness, penalty_weight=mu, gamma=gamma)
  gradient = jax.grad(lambda w: 0.5 * jnp.mean((a @ w - b) ** 2))

  @jax.jit
  def run(w):
    def step(carry, _):
      w, state = carry
      updates, state = transform.update(gradient(w), state, w)
      return (optax.apply_updates(w, updates), state), None

    return mg.accelerated_proximal_eval_params(jax.lax.scan(step, (w, transform.init(w)), length=steps)[0][1])

  return np.asarray(run(jnp.zeros(a.shape[1])), np.float64)


def test_reaches_the_optimum_of_a_lasso_faster_than_without_acceleration():
  a, b, mu = lasso_problem()
  best = Lasso(alpha=mu, fit_intercept=False, tol=1e-12, max_iter=1_000_000).fit(a, b).coef_
  optimum = objective(a, b, mu, best)
  gap = {gamma: objective(a, b, mu, solve(a, b, mu, 300, gamma)) - optimum for gamma in GAMMA}
  assert gap["nesterov"] < 0.1 * gap["plain"] and gap["ghadimi_lan"] < 0.1 * gap["plain"], gap
  solution = solve(a, b, mu, 5000, "nesterov")
  np.testing.assert_allclose(solution, best, atol=2e-3)
  # Exact zeros where the optimum has them by a margin.
  residual = np.abs(a.T @ (a @ best - b)) / len(b)
  assert (solution[residual < 0.9 * mu] == 0).all() and (residual < 0.9 * mu).sum() > 5


def test_as_accurate_as_jaxopt_at_the_same_step_size():
  a, b, mu = lasso_problem()
  smoothness = np.linalg.norm(a, 2) ** 2 / len(b)
  reference = jaxopt.ProximalGradient(
    lambda w: 0.5 * jnp.mean((a @ w - b) ** 2), prox=jaxopt.prox.prox_lasso, stepsize=1 / smoothness, maxiter=300, tol=0, acceleration=True
  )
  theirs = np.asarray(reference.run(jnp.zeros(40), mu).params, np.float64)
  optimum = objective(a, b, mu, Lasso(alpha=mu, fit_intercept=False, tol=1e-12, max_iter=1_000_000).fit(a, b).coef_)
  ours = objective(a, b, mu, solve(a, b, mu, 300, "nesterov"))
  # Both at float32 accuracy: a few units in the last place of the objective.
  assert ours - optimum <= 1.1 * (objective(a, b, mu, theirs) - optimum) + 1e-6


def test_composes_with_clipping_and_gives_the_model_from_a_chain():
  transform = optax.chain(
    optax.clip_by_global_norm(1.0), mg.accelerated_proximal(mg.on_part(mg.l1(), "gate"), 0.5, penalty_weight=0.2, gamma="plain")
  )
  params = {"backbone": jnp.array([1.0]), "gate": jnp.array([1.0])}
  state = transform.init(params)
  updates, state = transform.update({"backbone": jnp.array([30.0]), "gate": jnp.array([40.0])}, state, params)
  model = mg.accelerated_proximal_eval_params(state)
  np.testing.assert_allclose(model["backbone"], [1 - 0.5 * 0.6], rtol=1e-6)
  np.testing.assert_allclose(model["gate"], [1 - 0.5 * 0.8 - 0.1], rtol=1e-6)
  chex.assert_trees_all_close(optax.apply_updates(params, updates), model, rtol=1e-6)


def test_errors():
  with pytest.raises(ValueError, match="beta must be positive, got 0"):
    mg.accelerated_proximal(mg.l1(), 0)
  with pytest.raises(ValueError, match="'fista'.*ghadimi_lan.*nesterov.*plain"):
    mg.accelerated_proximal(mg.l1(), 0.1, gamma="fista")
  with pytest.raises(ValueError, match="penalty_weight must not be negative"):
    mg.accelerated_proximal(mg.l1(), 0.1, penalty_weight=-1.0)
  transform = mg.accelerated_proximal(mg.l1(), 0.1)
  with pytest.raises(ValueError, match="needs the current parameters"):
    transform.update(jnp.ones(1), transform.init(jnp.ones(1)))
  with pytest.raises(ValueError, match="holds no accelerated_proximal"):
    mg.accelerated_proximal_eval_params(optax.sgd(0.1).init(jnp.ones(1)))


def test_a_float64_problem_is_solved_to_float64():
  """Its sequences' weights α_t, too: in float32 the solution would stall at 1e-8."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(30, 6))
    b, hessian = a @ rng.normal(size=6), a.T @ a / 30
    smooth = np.linalg.eigvalsh(hessian)[-1]
    solver = mg.accelerated_proximal(mg.group_lasso(size_weighted=True), 0.5 / smooth, penalty_weight=0.0)
    w = jnp.zeros(6)

    def step(carry, _):
      w, state = carry
      updates, state = solver.update(jnp.asarray(hessian) @ w - jnp.asarray(a.T @ b / 30), state, w)
      return (optax.apply_updates(w, updates), state), None

    (_, state), _ = jax.lax.scan(step, (w, solver.init(w)), length=4000)
    found = mg.accelerated_proximal_eval_params(state)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, np.linalg.solve(hessian, a.T @ b / 30), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
  "wrap",
  [
    lambda o: optax.chain(optax.clip_by_global_norm(9.0), o),
    lambda o: optax.multi_transform({"all": o}, "all"),
    lambda o: optax.MultiSteps(o, 1),
    lambda o: optax.apply_if_finite(o, 2),
    lambda o: optax.masked(o, True),
  ],
  ids=["chain", "multi_transform", "MultiSteps", "apply_if_finite", "masked"],
)
def test_the_model_is_found_in_what_wraps_the_transform(wrap):
  params = {"ag": jnp.array([1.0, -2.0]), "x": {"ag": jnp.array(3.0)}}  # names that its own state has, too
  plain, wrapped = mg.accelerated_proximal(mg.l1(), 0.1, penalty_weight=0.5), wrap(mg.accelerated_proximal(mg.l1(), 0.1, penalty_weight=0.5))
  expected, state = plain.init(params), wrapped.init(params)
  for _ in range(2):
    _, expected = plain.update(params, expected, params)
    _, state = wrapped.update(params, state, params)
  found = mg.accelerated_proximal_eval_params(state)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected.ag)


def test_parts_with_transforms_of_their_own_are_put_together():
  params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
  make = lambda weight: mg.accelerated_proximal(mg.l1(), 0.1, penalty_weight=weight)
  both = optax.multi_transform({"one": make(0.5), "two": make(2.0)}, {"a": "one", "b": "two"})
  _, state = both.update(params, both.init(params), params)
  found = mg.accelerated_proximal_eval_params(state)
  np.testing.assert_allclose(found["a"], [0.85, -1.75], rtol=1e-6)  # w − βg − βμ, towards 0
  np.testing.assert_allclose(found["b"], 2.5, rtol=1e-6)
  chained = optax.chain(make(0.5), make(0.5))
  with pytest.raises(ValueError, match="several accelerated_proximal for the same parameters"):
    mg.accelerated_proximal_eval_params(chained.init(params))


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(alpha=2), r"alpha must lie in \(0, 1\], got 2"),
    (dict(gamma=None), "gamma must be a number, got None"),
    (dict(beta="0.1"), "beta must be a number, got '0.1'"),
    (dict(penalty_weight=float("nan")), "penalty_weight must not be negative, got nan"),
    (dict(beta=np.float32(-1)), "beta must be positive, got -1"),
    (dict(alpha=np.float32(0)), "alpha must be positive"),
  ],
)
def test_rates_that_are_none(options, message):
  with pytest.raises(ValueError, match=f"accelerated_proximal: {message}"):
    mg.accelerated_proximal(mg.l1(), **{"beta": 0.1, **options})

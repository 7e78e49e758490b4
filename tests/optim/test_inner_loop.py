"""Gradient descent that can be differentiated, on losses that are not quadratic, against finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import numpy_tanh_gradient, numpy_tanh_loss, tanh_loss

import metagater_jax as mg

START = {"W": np.array([[0.4, -0.3], [0.2, 0.5], [-0.6, 0.1]]), "a": np.array([0.7, -0.9]), "b": np.array([0.1, -0.2])}


@pytest.fixture(scope="module")
def problem():
  """Three minibatches, and samples that the result is measured on."""
  rng = np.random.default_rng(0)
  return [(rng.normal(size=(8, 3)), rng.normal(size=8)) for _ in range(4)]


def batch(x, y):
  return mg.data.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), jnp.ones(len(y)))


def solution(w, batches, rate):
  for x, y in batches:
    w = {name: w[name] - rate * g for name, g in numpy_tanh_gradient(w, x, y).items()}
  return w


def objective_of(problem, **options):
  """ours: w ↦ L(A(w)) and A itself, on a minibatch of its own in each step."""
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *(batch(*own) for own in problem[:3]))
  draw = lambda i: (jax.tree.map(lambda x: x[i], stacked), None)
  adapt = lambda w: mg.optim.descend(tanh_loss, w, draw, rates=0.3, steps=3, **options)
  return (lambda w: tanh_loss(adapt(w), batch(*problem[3]), None)), adapt


def params():
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)


@pytest.mark.parametrize("derivative, atol", [("exact", 1e-4), ("hessian_free", 2e-3)])
def test_the_derivative_is_that_through_all_steps(problem, derivative, atol):
  objective, adapt = objective_of(problem, derivative=derivative)
  expected = solution(START, problem[:3], 0.3)
  got = adapt(params())
  gradient = jax.jit(jax.grad(objective))(params())
  value = lambda w: numpy_tanh_loss(solution(w, problem[:3], 0.3), *problem[3])
  for name in START:
    np.testing.assert_allclose(got[name], expected[name], atol=1e-5)
    for index in np.ndindex(START[name].shape):
      moved = [
        {
          **START,
          name: START[name]
          + sign * 1e-6 * (np.arange(START[name].size).reshape(START[name].shape) == np.ravel_multi_index(index, START[name].shape)),
        }
        for sign in (1, -1)
      ]
      assert float(gradient[name][index]) == pytest.approx((value(moved[0]) - value(moved[1])) / 2e-6, abs=atol)


def test_first_order_is_the_gradient_at_the_solution_and_the_solution_exact(problem):
  objective, adapt = objective_of(problem, derivative="first_order")
  expected = numpy_tanh_gradient(solution(START, problem[:3], 0.3), *problem[3])
  gradient, exact = jax.grad(objective)(params()), objective_of(problem)[1](params())
  for name in START:
    np.testing.assert_allclose(gradient[name], expected[name], atol=1e-5)
    np.testing.assert_array_equal(adapt(params())[name], exact[name])


def test_rates_may_be_traced_numbers(problem):
  """As where they are tuned by `vmap`."""
  run = lambda rate: mg.optim.descend(tanh_loss, params(), lambda i: (batch(*problem[0]), None), rates=rate, steps=1)
  many = jax.vmap(run)(jnp.array([0.1, 0.3]))
  for i, rate in enumerate((0.1, 0.3)):
    np.testing.assert_allclose(many["W"][i], solution(START, problem[:1], rate)["W"], atol=1e-6)


def test_keys_reach_the_loss():
  """What is random in a step is that of the key which the draw gives."""
  loss = lambda w, batch, key: jnp.vdot(w, jax.random.normal(key, w.shape))
  keys = jax.random.split(jax.random.key(1), 3)
  got = mg.optim.descend(loss, jnp.ones(4), lambda i: (None, keys[i]), rates=0.1, steps=3)
  np.testing.assert_allclose(got, 1 - 0.1 * sum(np.asarray(jax.random.normal(key, (4,))) for key in keys), rtol=1e-5)


def test_bad_options(problem):
  with pytest.raises(ValueError, match="unknown derivative 'exakt'. Did you mean 'exact'"):
    objective_of(problem, derivative="exakt")[0](params())


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "microbatched"])
def test_gradients_reach_the_data_and_what_the_loss_refers_to(wrap, cut):
  """Data that is learned (distillation), or a weight of the loss, against finite differences in float64 of the loop written out."""
  rng = np.random.default_rng(0)
  w = {"W": rng.normal(size=(3, 4)), "a": rng.normal(size=4), "b": rng.normal(size=4)}
  x, y = rng.normal(size=(6, 3)), rng.normal(size=6)
  params, f32 = jax.tree.map(jnp.float32, w), jnp.float32

  def meta(x, weight):
    loss = lambda p, batch, key=None: weight * tanh_loss(p, batch, key)
    loss = mg.data.microbatched(loss, 2) if cut else loss
    batch = mg.data.Batch(x, f32(y), jnp.ones(6))
    end = mg.optim.descend(loss, params, lambda i: (batch, None), rates=0.1, steps=2)
    return tanh_loss(end, mg.data.Batch(f32(x0), f32(y), jnp.ones(6)), None)

  def by_hand(x, weight):
    v = w
    for _ in range(2):
      v = {name: v[name] - 0.1 * weight * g for name, g in numpy_tanh_gradient(v, x, y).items()}
    return numpy_tanh_loss(v, x0, y)

  x0 = x
  of_x, of_weight = jax.grad(wrap(meta), (0, 1))(f32(x), f32(0.7))
  for place in ((0, 0), (3, 2), (5, 1)):
    e = np.zeros_like(x)
    e[place] = 1e-5
    np.testing.assert_allclose(of_x[place], (by_hand(x + e, 0.7) - by_hand(x - e, 0.7)) / 2e-5, rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(of_weight, (by_hand(x, 0.7 + 1e-5) - by_hand(x, 0.7 - 1e-5)) / 2e-5, rtol=1e-3)


@pytest.mark.parametrize("derivative", ["exact", "first_order"])
def test_rates_are_learned_whatever_the_derivative(derivative):
  """With constant gradients w_K = w_0 − α Σ g, so ∂L/∂α = −⟨∇L(w_K), Σ g⟩: first-order Meta-SGD. By hand in float64."""
  rng = np.random.default_rng(1)
  w = {"W": rng.normal(size=(3, 4)), "a": rng.normal(size=4), "b": rng.normal(size=4)}
  x, y = rng.normal(size=(6, 3)), rng.normal(size=6)
  batch = mg.data.Batch(jnp.float32(x), jnp.float32(y), jnp.ones(6))
  end = lambda rate: mg.optim.descend(tanh_loss, jax.tree.map(jnp.float32, w), lambda i: (batch, None), rates=rate, steps=3, derivative=derivative)
  found = jax.grad(lambda rate: tanh_loss(end(rate), batch, None))(jnp.float32(0.1))

  def loop(rate, constants=None):
    v, gradients = w, []
    for t in range(3):
      gradients.append(numpy_tanh_gradient(v, x, y) if constants is None else constants[t])
      v = {name: v[name] - rate * g for name, g in gradients[-1].items()}
    return v, gradients

  constants = None if derivative == "exact" else loop(0.1)[1]
  value = lambda rate: numpy_tanh_loss(loop(rate, constants)[0], x, y)
  assert float(found) == pytest.approx((value(0.1 + 1e-5) - value(0.1 - 1e-5)) / 2e-5, rel=1e-3)

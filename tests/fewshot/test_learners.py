"""Meta-learners against closed forms of quadratic tasks, finite differences, and a regression that must be learned."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

import metagater_jax as mg


def squared_loss(params, batch, key):
  """½ mean (x·w + b − y)², labels being real numbers."""
  del key
  return 0.5 * jnp.mean((batch.images @ params["w"] + params["b"] - batch.labels) ** 2)


@pytest.fixture(scope="module")
def quadratic():
  """(parameters, episode, float64 pieces): with x̃ = (x, 1) the loss is ½ mean (x̃·v − y)²."""
  rng = np.random.default_rng(1)
  parts = [(rng.normal(size=(n, 3)), rng.normal(size=n)) for n in (6, 9)]
  batches = [mg.data.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), jnp.ones(len(y))) for x, y in parts]
  v = rng.normal(size=4)
  return {"w": jnp.asarray(v[:3], jnp.float32), "b": jnp.float32(v[3])}, mg.data.Episode(*batches), (v, *parts)


def gradient_and_hessian(v, x, y):
  extended = np.column_stack([x, np.ones(len(y))])
  return extended.T @ (extended @ v - y) / len(y), extended.T @ extended / len(y)


def adapted(v, x, y, rate, steps):
  for _ in range(steps):
    v = v - rate * gradient_and_hessian(v, x, y)[0]
  return v


def flat(params):
  return np.append(params["w"], params["b"])


@jax.custom_vjp
def with_custom_vjp(x):
  return x


with_custom_vjp.defvjp(lambda x: (x, None), lambda _, g: (g,))


def reverse_only_loss(params, batch, key):
  """The same loss for a library that has defined a reverse derivative, as straight-through gates have."""
  return squared_loss(with_custom_vjp(params), batch, key)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
  "derivative, loss", [("exact", squared_loss), ("exact", reverse_only_loss), ("first_order", squared_loss), ("hessian_free", squared_loss)]
)
def test_maml_is_the_derivative_of_its_definition(quadratic, steps, derivative, loss):
  params, episode, (v, support, query) = quadratic
  learner = mg.maml(loss, inner_lr=0.1, inner_steps=steps, derivative=derivative)
  value, gradient = learner.meta_gradient(params, episode)
  solution = adapted(v, *support, 0.1, steps)
  expected = gradient_and_hessian(solution, *query)[0]
  if derivative != "first_order":  # of a quadratic, differences of gradients are exact
    expected = np.linalg.matrix_power(np.eye(4) - 0.1 * gradient_and_hessian(v, *support)[1], steps) @ expected
  np.testing.assert_allclose(flat(learner.adapt(params, episode.support)), solution, atol=1e-5)
  np.testing.assert_allclose(value, 0.5 * np.mean((query[0] @ solution[:3] + solution[3] - query[1]) ** 2), rtol=1e-5)
  np.testing.assert_allclose(flat(gradient), expected, atol=1e-4 if derivative == "hessian_free" else 1e-5)


def test_learned_rates_get_their_own_gradient(quadratic):
  params, episode, (v, support, query) = quadratic
  learner = mg.maml(squared_loss, inner_lr=0.1, inner_steps=2, learn_rates=True)
  meta_params = learner.init(params)
  gradient = learner.meta_gradient(meta_params, episode)[1]["inner_lr"]

  def loss_at(rate_w, rate_b):
    solution = adapted(v, *support, np.array([rate_w] * 3 + [rate_b]), 2)
    return 0.5 * np.mean((query[0] @ solution[:3] + solution[3] - query[1]) ** 2)

  step = 1e-5
  np.testing.assert_allclose(gradient["w"], (loss_at(0.1 + step, 0.1) - loss_at(0.1 - step, 0.1)) / (2 * step), rtol=1e-4)
  np.testing.assert_allclose(gradient["b"], (loss_at(0.1, 0.1 + step) - loss_at(0.1, 0.1 - step)) / (2 * step), rtol=1e-4)
  model, rates = learner.deploy(meta_params)
  assert model.params is params and rates is meta_params["inner_lr"]


def test_reptile_goes_to_where_different_minibatches_lead(quadratic):
  params, episode, (v, support, query) = quadratic
  x, y = (np.concatenate(parts) for parts in zip(support, query))
  solution = v
  for i in range(5):  # 15 samples: three in each minibatch
    solution = solution - 0.1 * gradient_and_hessian(solution, x[i::5], y[i::5])[0]
  _, gradient = mg.fewshot.meta_reptile(squared_loss, inner_lr=0.1, inner_steps=5).meta_gradient(params, episode)
  np.testing.assert_allclose(flat(gradient), (v - solution) / 0.1, rtol=1e-4, atol=1e-5)


def test_anil_adapts_its_head_only(quadratic):
  params, episode, _ = quadratic
  learner = mg.fewshot.anil(squared_loss, head="w", inner_lr=0.1, inner_steps=3)
  after = learner.adapt(params, episode.support)
  assert after["b"] == params["b"]
  assert (after["w"] != params["w"]).all()
  with pytest.raises(ValueError, match="adapts none of the parameters; there are b, w"):
    mg.fewshot.anil(squared_loss, head="output", inner_lr=0.1).adapt(params, episode.support)
  with pytest.raises(ValueError, match="'hessian_free' needs an inner loop that adapts all parameters"):
    mg.fewshot.anil(squared_loss, head="w", inner_lr=0.1, derivative="hessian_free").meta_loss(params, episode)


@pytest.mark.parametrize("loss", [squared_loss, reverse_only_loss])
def test_anil_trains_all_through_its_heads_inner_loop(quadratic, loss):
  params, episode, (v, support, query) = quadratic
  gradient = mg.fewshot.anil(loss, head="w", inner_lr=0.1, inner_steps=3).meta_gradient(params, episode)[1]
  step = lambda v: np.diag([0.1, 0.1, 0.1, 0]) @ gradient_and_hessian(v, *support)[0]
  solution = v
  for _ in range(3):
    solution = solution - step(solution)
  jacobian = np.eye(4) - np.diag([0.1, 0.1, 0.1, 0]) @ gradient_and_hessian(v, *support)[1]
  expected = np.linalg.matrix_power(jacobian, 3).T @ gradient_and_hessian(solution, *query)[0]
  np.testing.assert_allclose(flat(gradient), expected, atol=1e-5)


def operations(jaxpr, name):
  """How often a program runs a primitive, if no compiler finds out that it could less often."""
  return sum(
    (equation.primitive.name == name)
    + equation.params.get("length", 1) * sum(operations(inner, name) for inner in core.jaxprs_in_params(equation.params))
    for equation in jaxpr.eqns
  )


@pytest.mark.parametrize("steps, call", [(1, lambda f: f), (5, lambda f: f), (5, jax.jit)])
def test_anil_computes_its_body_once_per_image(steps, call):
  @call
  def loss(params, batch, key):
    # The body has a loop, as networks that take images in blocks have: compilers leave the like alone in loops.
    features = jax.lax.map(lambda x: jnp.tanh(x @ params["body"]), batch.images)
    return squared_loss({"w": params["output"], "b": 0.0}, batch._replace(images=features), key)

  rng = np.random.default_rng(2)
  episode = mg.data.Episode(*(mg.data.Batch(jnp.asarray(rng.normal(size=(n, 3)), jnp.float32), jnp.ones(n), jnp.ones(n)) for n in (4, 6)))
  params = {"body": jnp.ones((3, 2)), "output": jnp.ones(2)}
  learner = mg.fewshot.anil(loss, head="output", inner_lr=0.1, inner_steps=steps)
  assert operations(jax.make_jaxpr(learner.meta_gradient)(params, episode).jaxpr, "tanh") == 4 + 6
  assert operations(jax.make_jaxpr(learner.adapt)(params, episode.support).jaxpr, "tanh") == 4


def test_a_mask_holds_through_the_inner_loop(quadratic):
  params, episode, _ = quadratic
  mask = {"w": jnp.array([1.0, 0.0, 1.0]), "b": jnp.float32(1)}
  for learner in (mg.maml(squared_loss, inner_lr=0.1, inner_steps=3), mg.fewshot.anil(squared_loss, head="w", inner_lr=0.1)):
    after = learner.adapt(params, episode.support, mask)
    assert after["w"][1] == 0
    assert after["w"][0] != params["w"][0]
  # It is the loop of the problem that never had the feature.
  without = lambda batch: batch._replace(images=batch.images.at[:, 1].set(0))
  learner = mg.maml(squared_loss, inner_lr=0.1, inner_steps=3)
  same = learner.meta_loss(params, mg.data.Episode(*map(without, episode)))
  np.testing.assert_allclose(learner.meta_loss(params, episode, mask), same, rtol=1e-5)


def test_bad_settings(quadratic):
  with pytest.raises(ValueError, match="inner_lr must be positive, got -1"):
    mg.maml(squared_loss, inner_lr=-1.0)
  with pytest.raises(ValueError, match="inner_steps must be a whole number of at least 1, got 0"):
    mg.maml(squared_loss, inner_lr=0.1, inner_steps=0)
  with pytest.raises(ValueError, match="unknown derivative 'second'. .*Known: exact, first_order, hessian_free"):
    mg.maml(squared_loss, inner_lr=0.1, derivative="second")
  with pytest.raises(ValueError, match="15 samples of an episode are not enough for 16 inner steps"):
    mg.fewshot.meta_reptile(squared_loss, inner_lr=0.1, inner_steps=16).meta_gradient(*quadratic[:2])


def sinusoid(key, _=None):
  """Ten points to adapt on and ten to be measured on, of a sine with its own amplitude and phase (Finn et al. 2017)."""
  keys = jax.random.split(key, 3)
  amplitude, phase = jax.random.uniform(keys[0], (), minval=0.1, maxval=5), jax.random.uniform(keys[1], (), maxval=np.pi)
  x = jax.random.uniform(keys[2], (20, 1), minval=-5, maxval=5)
  y = amplitude * jnp.sin(x[:, 0] + phase)
  return mg.data.Episode(*(mg.data.Batch(x[i], y[i], jnp.ones(10)) for i in (slice(10), slice(10, 20))))


def test_sinusoids_are_learned_in_one_step():
  def loss(params, batch, key):
    del key
    h = batch.images
    for layer in params[:-1]:
      h = jnp.tanh(h @ layer["kernel"] + layer["bias"])
    return jnp.mean(((h @ params[-1]["kernel"] + params[-1]["bias"])[:, 0] - batch.labels) ** 2)

  sizes = (1, 40, 40, 1)
  params = [
    {"kernel": jax.random.normal(key, (a, b)) / np.sqrt(a), "bias": jnp.zeros(b)}
    for key, a, b in zip(jax.random.split(jax.random.key(0), 3), sizes, sizes[1:])
  ]
  learner, optimizer = mg.maml(loss, inner_lr=0.02), optax.adam(2e-3)
  train = jax.jit(partial(mg.fewshot.run_meta_steps, learner, optimizer, sinusoid, steps=3000, episodes=25, task_axis="vmap"))
  state, _ = train(mg.fewshot.meta_init(learner, optimizer, params, jax.random.key(1)))
  tests = jax.vmap(sinusoid)(jax.random.split(jax.random.key(2), 500))
  losses = jax.jit(jax.vmap(learner.meta_loss, (None, 0)))
  untrained, trained = losses(params, tests).mean(), losses(state.params, tests).mean()
  before = jax.vmap(lambda episode: loss(state.params, episode.query, None))(tests).mean()
  assert trained < 0.35 * untrained  # the meta-training learned
  assert trained < 0.4 * before  # and one step is what makes the difference

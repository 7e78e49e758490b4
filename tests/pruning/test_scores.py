"""Scores against their definitions, against removing weights one by one, and in every setting that uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss, numpy_tanh_gradient, numpy_tanh_loss, tanh_loss
from scipy.stats import spearmanr

import metagater_jax as mg


@pytest.fixture(scope="module")
def problem():
  """A tiny network with data that it fits nearly, and the same in float64."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 4))
  w = {"W": rng.normal(size=(4, 5)) / 2, "a": rng.normal(size=5), "b": rng.normal(size=5) / 2}
  y = np.tanh(x @ w["W"] + w["b"]) @ w["a"] + rng.normal(size=200)
  start = {name: value + 0.3 * rng.normal(size=value.shape) for name, value in w.items()}
  params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), start)
  return params, mg.data.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), jnp.ones(200)), start, x, y


def test_snip_is_the_derivative_by_a_mask(problem):
  params, batch, w, x, y = problem
  score = mg.pruning.snip(tanh_loss).on_task(params, batch)
  for name in w:  # by hand, and by moving the mask
    np.testing.assert_allclose(score[name], np.abs(w[name] * numpy_tanh_gradient(w, x, y)[name]), rtol=1e-4, atol=1e-6)
    for index in np.ndindex(w[name].shape):

      def at(c, name=name, index=index):
        masked = w[name].copy()
        masked[index] *= c
        return numpy_tanh_loss({**w, name: masked}, x, y)

      assert float(score[name][index]) == pytest.approx(abs(at(1 + 1e-5) - at(1 - 1e-5)) / 2e-5, rel=1e-3, abs=1e-6)


def test_snip_ranks_weights_as_leaving_them_out_does(problem):
  params, batch, w, x, y = problem
  score, left_out, first_order, magnitude = mg.pruning.snip(tanh_loss).on_task(params, batch), [], [], []
  for name in sorted(w):
    for index in np.ndindex(w[name].shape):
      without = w[name].copy()
      without[index] = 0
      left_out.append(abs(numpy_tanh_loss({**w, name: without}, x, y) - numpy_tanh_loss(w, x, y)))
      first_order.append(float(score[name][index]))
      magnitude.append(abs(w[name][index]))
  rank = lambda other: spearmanr(left_out, other).statistic
  by_chance = [rank(np.random.default_rng(seed).permutation(first_order)) for seed in range(200)]
  assert rank(first_order) > max(0.6, rank(magnitude), *by_chance)


def test_magnitude_and_random(problem, key):
  params = problem[0]
  np.testing.assert_array_equal(mg.pruning.magnitude()(params)["W"], np.abs(params["W"]))
  one, again, other = (mg.pruning.random()(params, key=k) for k in (key, key, jax.random.key(8)))
  assert (one["W"] == again["W"]).all() and (one["W"] != other["W"]).any() and (one["W"] != one["a"]).any()
  with pytest.raises(ValueError, match="needs a key"):
    mg.pruning.random()(params)


def test_snip_takes_all_samples_of_any_task(linear_problem):
  """A batch, a task of a population and an episode of the same samples have the same score; an episode's query alone another."""
  population, tasks = linear_problem
  params = {"w": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array(0.3)}
  data, (x, y) = population.train(1), tasks[1]
  batch = data.rows(jnp.arange(len(y)))
  episode = mg.data.Episode(*(jax.tree.map(lambda leaf: leaf[part], batch) for part in (slice(3), slice(3, None))))
  error = x @ np.asarray(params["w"], np.float64) + 0.3 - y
  expected = np.abs(np.asarray(params["w"]) * (x.T @ error) / len(y))
  score = mg.pruning.snip(linear_loss)
  for task in (batch, data, episode):
    np.testing.assert_allclose(score.on_task(params, task)["w"], expected, rtol=1e-4, atol=1e-5)
  query = mg.pruning.snip(linear_loss, samples=lambda episode: episode.query).on_task(params, episode)["w"]
  assert not np.allclose(query, expected, rtol=0.05)


@pytest.mark.parametrize("average", mg.pruning.AVERAGES)
def test_a_score_on_tasks_is_the_finished_mean_of_their_contributions(linear_problem, average):
  """So it may be computed at the clients and finished at a server."""
  population, _ = linear_problem
  params = {"w": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array(0.3)}
  score = mg.pruning.snip(linear_loss, average=average)
  batches = [population.train(i).rows(jnp.arange(9)) for i in range(5)]
  together = score(params, jax.tree.map(lambda *x: jnp.stack(x), *batches))
  contributions = [score.contribution(params, batch, None, None) for batch in batches]
  finished = score.finish(params, jax.tree.map(lambda *x: sum(x) / 5, *contributions), None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), together, finished)


def test_an_unknown_average_names_the_nearest():
  for make in (lambda: mg.pruning.snip(linear_loss, average="absolut"), lambda: mg.pruning.anp(None, average="absolut")):
    with pytest.raises(ValueError, match="unknown average 'absolut'. Did you mean 'absolute'"):
      make()


def test_contribution_of_a_filter_is_the_gradient_that_its_gate_gets(small_network, small_population):
  """−w ⊙ ∇L, summed over a filter and its bias, is −∂L/∂m of a mask on its channel: against central differences of the loss."""
  params = small_network.init(jax.random.key(0), (8, 8, 1))
  plain = mg.GatedNetwork(small_network.backbone)
  params = {"backbone": params["backbone"] | {"conv3": params["backbone"]["conv3"] | {"bias": 0.1 + params["backbone"]["conv3"]["bias"]}}, "gate": {}}
  loss, data = mg.classification_loss(plain), small_population.train(1)
  score = mg.pruning.contribution(loss).on_task(params, data)["backbone"]["conv3"]
  found = np.asarray(score["kernel"]).sum((0, 1, 2)) + np.asarray(score["bias"])
  batch = data.rows(jnp.arange(int(data.count)))

  def at(channel, m):  # relu(m z) = m relu(z)
    scaled = jax.tree.map(lambda x: x.at[..., channel].multiply(m), params["backbone"]["conv3"])
    return float(loss({"backbone": params["backbone"] | {"conv3": scaled}, "gate": {}}, batch))

  expected = [-(at(c, 1.02) - at(c, 0.98)) / 0.04 for c in range(6)]
  np.testing.assert_allclose(found, expected, rtol=0.02, atol=2e-3)
  assert min(expected) < 0 < max(expected)

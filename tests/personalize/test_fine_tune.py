"""Fine-tuning: gradient descent on all of a task's data, after whatever made the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss, numpy_tanh_gradient, tanh_loss

import metagater_jax as mg

START = {"W": np.array([[0.4, -0.3], [0.2, 0.5], [-0.6, 0.1]]), "a": np.array([0.7, -0.9]), "b": np.array([0.1, -0.2])}


@pytest.mark.parametrize("steps, chunk", [(1, 64), (2, 64), (1, 2)])
def test_it_is_gradient_descent_on_all_of_the_tasks_data(linear_problem, steps, chunk):
  population, tasks = linear_problem
  start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
  expected = START
  for _ in range(steps):
    gradient = numpy_tanh_gradient(expected, *tasks[3])
    expected = {name: expected[name] - 0.1 * gradient[name] for name in expected}
  personalizer = mg.fine_tune(tanh_loss, lr=0.1, steps=steps, chunk=chunk)
  data = population.train(3)
  for task in (data, data.rows(jnp.arange(int(data.count)))):  # as indices into a pool, and as a batch of all samples
    adapted = personalizer.adapt(mg.Model(start), task, personalizer.calibrate(mg.Model(start), population, jnp.arange(2)))
    for leaf in expected:
      np.testing.assert_allclose(adapted.params[leaf], expected[leaf], rtol=1e-5, atol=1e-6)


def test_a_masked_model_moves_only_where_it_is_kept(linear_problem):
  population, tasks = linear_problem
  w, mask = np.array([0.5, 0.0, 0.2]), np.array([1.0, 0.0, 1.0])
  model = mg.Model({"w": jnp.asarray(w, jnp.float32), "b": jnp.array(0.3)}, {"w": jnp.asarray(mask, jnp.float32), "b": jnp.array(1.0)})
  adapted = mg.fine_tune(linear_loss, lr=0.1).adapt(model, population.train(1))
  x, y = tasks[1]
  error = x @ w + 0.3 - y
  np.testing.assert_allclose(adapted.params["w"], mask * (w - 0.1 * x.T @ error / len(y)), rtol=1e-4, atol=1e-5)
  assert adapted.params["w"][1] == 0 and adapted.mask is model.mask


def test_bad_options_are_named():
  with pytest.raises(ValueError, match="lr must be positive, got -1"):
    mg.fine_tune(linear_loss, lr=-1)
  with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
    mg.fine_tune(linear_loss, steps=0)

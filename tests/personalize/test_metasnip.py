"""MetaSNIP: what is removed stays removed, and the step on the rest is the gradient step of the pruned network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg


@pytest.fixture(scope="module")
def problem(small_population):
  network = mg.GatedNetwork(mg.ConvNet4(classes=4, widths=(4, 5, 6)))
  return network, mg.classification_loss(network), network.init(jax.random.key(0), (8, 8, 1)), small_population.train(1)


def whole(data):
  return data.rows(jnp.arange(int(data.count)))


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_it_is_a_gradient_step_of_the_pruned_network(problem, granularity):
  _, loss, params, data = problem
  prunable = lambda path, leaf: leaf.ndim == 4
  adapted, mask = mg.metasnip(loss, sparsity=0.4, lr=0.2, granularity=granularity, prunable=prunable, chunk=7).adapt(mg.Model(params), data)
  gradient = jax.grad(loss)(params, whole(data), None)
  expected = mg.make_mask(jax.tree.map(lambda w, g: jnp.abs(w * g), params, gradient), 0.4, granularity=granularity, prunable=prunable)
  jax.tree.map(np.testing.assert_array_equal, mask, expected)
  pruned = jax.tree.map(jnp.multiply, params, mask)
  step = jax.grad(loss)(pruned, whole(data), None)
  jax.tree.map(lambda a, w, g, c: np.testing.assert_allclose(a, c * (w - 0.2 * g), rtol=1e-3, atol=1e-5), adapted, pruned, step, mask)
  assert float(mg.pruning.mask_sparsity(mask, prunable)) == pytest.approx(0.4, abs=0.05)


def test_removed_channels_are_zero_for_every_input(problem):
  network, loss, params, data = problem
  adapted, mask = mg.metasnip(loss, sparsity=0.5, lr=0.2, granularity="channel", prunable=lambda name, leaf: name == "backbone/conv3/kernel").adapt(
    mg.Model(params), data
  )
  gone = np.asarray(mask["backbone"]["conv3"]["bias"]) == 0
  assert gone.sum() == 3
  images = 10 * jax.random.normal(jax.random.key(1), (50, 8, 8, 1))
  out, _ = network.apply(adapted, images)
  kernel = np.asarray(adapted["backbone"]["output"]["kernel"]).copy()
  kernel[np.tile(gone, len(kernel) // 6)] = 1e6  # whatever reads those channels: nothing comes from them
  other = {**adapted, "backbone": {**adapted["backbone"], "output": {**adapted["backbone"]["output"], "kernel": jnp.asarray(kernel)}}}
  np.testing.assert_allclose(network.apply(other, images)[0], out, rtol=1e-5, atol=1e-5)


def test_sparsity_may_differ_between_tasks_under_one_compilation(problem, small_population):
  _, loss, params, _ = problem
  personalizer = mg.metasnip(loss, sparsity=0.9, lr=0.1)  # a calibration takes the place of its own
  run = jax.jit(lambda task, s: personalizer.adapt(mg.Model(params), small_population.train(task), s).mask)
  for task, sparsity in ((0, 0.2), (3, 0.6)):
    assert float(mg.pruning.mask_sparsity(run(task, sparsity))) == pytest.approx(sparsity, abs=1e-3)


def test_a_model_that_is_pruned_keeps_what_it_lacks(problem):
  """ANP, then MetaSNIP: the target's mask is inside the meta-model's, and has the whole sparsity."""
  _, loss, params, data = problem
  mask = mg.make_mask(mg.pruning.magnitude()(params), 0.3)
  model = mg.Model(mg.pruning.apply_mask(params, mask), mask)
  personalizer = mg.metasnip(loss, sparsity=0.6, lr=0.1)
  adapted = personalizer.adapt(model, data, personalizer.calibrate(model))
  assert float(mg.pruning.mask_sparsity(adapted.mask)) == pytest.approx(0.6, abs=1e-3)
  jax.tree.map(lambda new, old: np.testing.assert_array_less(np.asarray(new), np.asarray(old) + 0.5), adapted.mask, mask)
  jax.tree.map(lambda w, c: np.testing.assert_array_equal(np.asarray(w)[np.asarray(c) == 0], 0), adapted.params, adapted.mask)

"""Metrics of tasks against plain loops over their samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg


@pytest.mark.parametrize("chunk", [3, 64])
def test_task_metrics_are_means_over_the_samples(small_network, small_population, chunk):
  params = small_network.init(jax.random.key(3), (8, 8, 1))
  params["gate"]["conv3"]["b2"] = jnp.array([0.2, -0.1, 0.0, 0.1, -9.0, 9.0])  # some masks depend on the input
  data = small_population.test(4)
  got = mg.evaluate_task(small_network, mg.Model(params), data, chunk=chunk)
  layers = small_network.layers((8, 8, 1))
  accuracy, sparsity, macs, used = [], [], [], np.zeros(6, bool)
  for i in np.asarray(data.index[: int(data.count)]):
    logits, masks = small_network.apply(params, data.images[i][None])
    accuracy.append(int(logits[0].argmax()) == int(data.labels[i]))
    mask = np.asarray(masks["conv3"][0])
    sparsity.append(1 - mask.mean())
    conv1, conv2, conv3, output = (layer.macs for layer in layers)
    macs.append(conv1 + conv2 + (conv3 + output) * mask.mean() + 5 * 16 + 16 * 6)
    used |= mask > 0
  np.testing.assert_allclose(got.accuracy, np.mean(accuracy), rtol=1e-5)
  np.testing.assert_allclose(got.sparsity, np.mean(sparsity), rtol=1e-5)
  np.testing.assert_allclose(got.macs, np.mean(macs), rtol=1e-5)
  # conv1 1→4, conv2 4→5, conv3 5→used, output used→4, each 3×3 with bias; the gate has 5·16+16+16·6+6.
  kept = used.sum()
  np.testing.assert_allclose(got.parameters, (9 * 4 + 4) + (36 * 5 + 5) + (45 * kept + kept) + (kept * 4 + 4) + 198)


def test_targets_are_evaluated_before_and_after_their_own_adaptation(small_network, small_population):
  model = mg.Model(small_network.init(jax.random.key(3), (8, 8, 1)))
  personalizer = mg.two_stage(mg.classification_loss(small_network), gate_lr=0.1, lr=0.03)
  before, after = jax.jit(lambda p: mg.evaluate_targets(small_network, personalizer, p, small_population, jnp.array([5, 2])))(model)
  for i, task in enumerate((5, 2)):
    adapted = personalizer.adapt(model, small_population.train(task))
    np.testing.assert_allclose(after.loss[i], mg.evaluate_task(small_network, adapted, small_population.test(task)).loss, rtol=1e-3)
    np.testing.assert_allclose(before.accuracy[i], mg.evaluate_task(small_network, model, small_population.test(task)).accuracy, rtol=1e-5)
  assert (after.loss < before.loss).all()


def test_each_task_may_have_a_calibration_of_its_own_and_masks_are_told(small_population):
  network = mg.GatedNetwork(mg.ConvNet4(classes=4, widths=(4, 5, 6)))
  model = mg.Model(network.init(jax.random.key(3), (8, 8, 1)))
  layer = lambda name, leaf: name == "backbone/conv3/kernel"
  personalizer = mg.metasnip(mg.classification_loss(network), sparsity=0.0, granularity="channel", prunable=layer)
  before, after = mg.evaluate_targets(network, personalizer, model, small_population, jnp.array([5, 2]), jnp.array([0.5, 1 / 6]), by_task=True)
  np.testing.assert_allclose(after.removed, [3 / 6, 1 / 6], rtol=1e-5)
  assert (after.kept["conv3"] > 0).sum(1).tolist() == [3, 5] and list(after.kept) == ["conv3"]
  assert before.removed.tolist() == [0, 0] and not before.kept

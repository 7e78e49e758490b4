"""What gates do, against scikit-learn's mutual information, NumPy's correlation, and counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

import metagater_jax as mg
from metagater_jax.personalize.gate_statistics import BINS, gate_measures


@pytest.fixture(scope="module")
def batch():
  """Logits, masks and labels of 300 samples; channel 0 is the class, 1 is noise, 2 is on for all, 3 off for all but one in a hundred."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 300)
  masks = np.stack([labels == 1, rng.random(300) < 0.4, np.ones(300), np.arange(300) % 100 == 0], axis=1).astype(np.float32)
  return rng.normal(size=(300, 3)).astype(np.float32) * 3, {"first": masks[:, :2], "second": masks[:, 2:]}, labels


def means(batch):
  logits, masks, labels = batch
  return jax.tree.map(lambda x: x.mean(0), gate_measures(jnp.asarray(logits), jax.tree.map(jnp.asarray, masks), jnp.asarray(labels)))


def test_what_the_class_explains(batch):
  _, masks, labels = batch
  found = means(batch)
  for layer in masks:
    information, entropy = mg.personalize.explained_by_class(found.joint[layer], found.classes)
    for c in range(2):
      own = masks[layer][:, c]
      assert float(information[c]) == pytest.approx(mutual_info_score(labels, own) / np.log(2), abs=1e-5)
      assert float(entropy[c]) == pytest.approx(mutual_info_score(own, own) / np.log(2), abs=1e-5)
  information, entropy = mg.personalize.explained_by_class(found.joint["first"], found.classes)
  assert float(information[0]) == pytest.approx(float(entropy[0]), abs=1e-6) and information[1] < 0.05 * entropy[1]


def test_confidence_and_sparsity(batch):
  logits, masks, _ = batch
  found = means(batch)
  confidence = np.exp(logits).max(1) / np.exp(logits).sum(1)
  sparsity = 1 - np.concatenate(list(masks.values()), 1).mean(1)
  assert float(mg.personalize.confidence_correlation(found.moments)) == pytest.approx(np.corrcoef(confidence, sparsity)[0, 1], abs=1e-3)
  for i in range(BINS):
    inside = (confidence >= i / BINS) & (confidence < (i + 1) / BINS)
    assert float(found.bins[i, 0]) == pytest.approx(inside.mean(), abs=1e-6)
    assert float(found.bins[i, 1]) == pytest.approx((inside * sparsity).mean(), abs=1e-6)
  same = means((logits, {"one": np.ones((300, 2), np.float32)}, batch[2]))
  assert float(mg.personalize.confidence_correlation(same.moments)) == 0


def test_conditional_counts_channels_that_vary():
  rate = {"a": jnp.array([[0.0, 0.5, 1.0], [0.01, 0.03, 0.985]]), "b": jnp.array([[0.97], [0.02]])}
  assert mg.personalize.conditional(rate).tolist() == [0.5, 0.25]
  assert mg.personalize.conditional(rate, tolerance=0.0).tolist() == [0.5, 1.0]


def test_an_evaluation_has_them(small_network, small_population):
  params = small_network.init(jax.random.key(0), (8, 8, 1))
  data = small_population.test(0)
  found = mg.evaluate_task(small_network, mg.Model(params), data, chunk=7)
  whole = data.rows(jnp.arange(int(data.count)))
  logits, masks = small_network.apply(params, whole.images)
  expected = jax.tree.map(lambda x: x.mean(0), gate_measures(logits, masks, whole.labels))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found.gates, expected)
  plain = mg.GatedNetwork(mg.MLP(classes=4, widths=(5,)))
  assert mg.evaluate_task(plain, mg.Model(plain.init(jax.random.key(0), (8, 8, 1))), data).gates is None

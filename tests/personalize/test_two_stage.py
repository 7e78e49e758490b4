"""Two-stage adaptation: what each stage changes, what it leaves, and that the threshold sets the sparsity."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg


@pytest.fixture(scope="module")
def problem(small_network, small_population):
  params = small_network.init(jax.random.key(0), (8, 8, 1))
  return small_network, mg.classification_loss(small_network), params, small_population


def whole(data):
  return data.rows(jnp.arange(int(data.count)))


def test_stage_one_is_a_gradient_step_of_the_gate_alone(problem):
  network, loss, params, population = problem
  data = population.train(1)
  adapted = mg.personalize.adapt_gate(loss, params, data, lr=3.0, chunk=5)
  gradient = jax.grad(lambda gate: loss({**params, "gate": gate}, whole(data), None))(params["gate"])
  chex.assert_trees_all_equal(adapted["backbone"], params["backbone"])
  chex.assert_trees_all_close(adapted["gate"], jax.tree.map(lambda w, g: w - 3.0 * g, params["gate"], gradient), rtol=1e-4, atol=1e-6)
  assert not np.allclose(adapted["gate"]["conv3"]["b2"], params["gate"]["conv3"]["b2"])


def test_stage_two_leaves_the_weights_of_channels_that_are_off_untouched(problem):
  network, loss, params, population = problem
  gate = params["gate"]["conv3"]
  off = np.array([False, True, False, True, True, False])
  params = {**params, "gate": {"conv3": {**gate, "b2": jnp.where(off, -50.0, 50.0)}}}
  before = params["backbone"]
  after = mg.personalize.adapt_backbone(loss, params, population.train(0), lr=0.5)
  chex.assert_trees_all_equal(after["gate"], params["gate"])
  after = after["backbone"]
  assert (after["conv3"]["kernel"][..., off] == before["conv3"]["kernel"][..., off]).all()
  assert (after["conv3"]["bias"][off] == before["conv3"]["bias"][off]).all()
  assert (after["conv3"]["kernel"][..., ~off] != before["conv3"]["kernel"][..., ~off]).any((0, 1, 2)).all()
  # The next layer's weights that read those channels have nothing to learn from either.
  rows = np.tile(off, before["output"]["kernel"].shape[0] // len(off))
  assert (after["output"]["kernel"][rows] == before["output"]["kernel"][rows]).all()
  assert (after["output"]["kernel"][~rows] != before["output"]["kernel"][~rows]).any()


def test_both_stages_in_order_and_repeated(problem):
  network, loss, params, population = problem
  data = population.train(3)
  batch = whole(data)
  expected = params
  for part, lr in (("gate", 2.0), ("gate", 2.0), ("backbone", 0.1), ("backbone", 0.1)):
    gradient = jax.grad(lambda p: loss({**expected, part: p}, batch, None))(expected[part])
    expected = {**expected, part: jax.tree.map(lambda w, g: w - lr * g, expected[part], gradient)}
  adapted = jax.jit(mg.two_stage(loss, gate_lr=2.0, lr=0.1, steps=2).adapt)(mg.Model(params), data).params
  chex.assert_trees_all_close(adapted, expected, rtol=1e-3, atol=1e-5)


def test_a_model_without_gates_is_refused(problem):
  _, _, _, population = problem
  network = mg.GatedNetwork(mg.MLP(classes=4, widths=(5,)))
  model = mg.Model(network.init(jax.random.key(0), (8, 8, 1)))
  personalizer = mg.two_stage(mg.classification_loss(network))
  for call in (lambda: personalizer.adapt(model, population.train(0)), lambda: personalizer.calibrate(model, population, jnp.arange(2))):
    with pytest.raises(ValueError, match="this model has none; use fine_tune or metasnip"):
      call()


def test_threshold_switches_off_groups_for_every_input(problem):
  network, loss, params, population = problem
  data = population.train(2)
  free = mg.personalize.adapt_gate(loss, params, data, lr=1.0)
  norms = np.asarray(mg.optim.group_norms(mg.gate_groups, free["gate"])["conv3"])
  kappa = (np.sort(norms)[2] + np.sort(norms)[3]) / 2
  adapted = mg.personalize.adapt_gate(loss, params, data, lr=1.0, threshold=kappa)
  gone = norms <= kappa
  assert gone.sum() == 3
  assert (adapted["gate"]["conv3"]["W2"][:, gone] == 0).all() and (adapted["gate"]["conv3"]["b2"][gone] == 0).all()
  images = 50 * jax.random.normal(jax.random.key(5), (200, 8, 8, 1))
  masks, free_masks = (network.apply(p, images)[1]["conv3"] for p in (adapted, free))
  assert (masks[:, gone] == 0).all()
  chex.assert_trees_all_equal(masks[:, ~gone], free_masks[:, ~gone])  # shrinking a group changes no mask


@pytest.mark.parametrize("wanted", [0.0, 0.3, 0.7, 0.95])
def test_calibration_sets_the_mean_sparsity(wanted, small_population):
  network = mg.GatedNetwork(mg.ConvNet4(classes=4, widths=(4, 8, 40)), ("conv2", "conv3"), initial_log_odds=1.0)
  loss, params = mg.classification_loss(network), network.init(jax.random.key(0), (8, 8, 1))
  tasks = jnp.arange(6)

  stage_one = lambda params, data, kappa=0.0: mg.personalize.adapt_gate(loss, params, data, lr=5.0, threshold=kappa)
  kappa = jax.jit(lambda: mg.personalize.calibrate_threshold(network, params, stage_one, small_population.train, tasks, wanted))()

  def mean_sparsity(kappa):  # what these tasks have, measured by running them
    run = jax.jit(
      lambda task: mg.nn.sparsity(
        network.apply(stage_one(params, small_population.train(task), kappa), small_population.train(task).rows(jnp.arange(64)).images)[1]
      )
    )
    return np.mean([np.mean(run(task)[: small_population.train_count[task]]) for task in range(6)])

  at_zero = mean_sparsity(0.0)
  if wanted <= at_zero:
    assert kappa == 0
  else:
    assert wanted <= mean_sparsity(kappa) + 1e-6
    assert mean_sparsity(kappa) < wanted + 0.03  # a channel of one task is 1/288; in conv2 it changes masks of conv3


def test_what_is_pruned_stays_pruned(problem):
  """A meta-model that ANP has pruned, adapted in two stages."""
  network, loss, params, population = problem
  mask = mg.make_mask(mg.pruning.magnitude()(params), 0.5, prunable=lambda name, leaf: name.startswith("backbone") and leaf.ndim == 4)
  model = mg.Model(mg.pruning.apply_mask(params, mask), mask)
  adapted = mg.two_stage(loss, lr=0.3).adapt(model, population.train(1))
  gone = np.asarray(mask["backbone"]["conv2"]["kernel"]) == 0
  assert gone.any() and (np.asarray(adapted.params["backbone"]["conv2"]["kernel"])[gone] == 0).all()
  assert (np.asarray(adapted.params["backbone"]["conv2"]["kernel"])[~gone] != np.asarray(params["backbone"]["conv2"]["kernel"])[~gone]).any()


def test_calibration_of_the_personalizer_and_its_errors(problem):
  network, loss, params, population = problem
  personalizer, model = mg.two_stage(loss, target_sparsity=0.9, sparsity_by="group_norm", network=network), mg.Model(params)
  kappa = personalizer.calibrate(model, population, jnp.arange(6))
  adapted = personalizer.adapt(model, population.train(0), kappa)
  zero_groups = (mg.optim.group_norms(mg.gate_groups, adapted.params["gate"])["conv3"] == 0).mean()
  assert kappa > 0 and zero_groups > 0
  assert mg.two_stage(loss).calibrate(model, population, jnp.arange(6)) is None
  with pytest.raises(ValueError, match="target_sparsity must lie in .0, 1. and needs the network"):
    mg.two_stage(loss, target_sparsity=1.0, network=network)

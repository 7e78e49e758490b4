"""Schedules and masks while training, and the ANP score against finite differences of the mask."""

import inspect
import operator
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metagater_jax as mg


def score_of(meta_loss, average="signed", **options):
  """ANP's score as one program: operation by operation it would be compiled hundreds of times."""
  return jax.jit(mg.pruning.anp(meta_loss, average=average, **options), static_argnames="task_axis")


SAMPLE = {"ways": 3, "shots": 2, "queries": 3}


@pytest.fixture(scope="module")
def few_shot():
  """(learner maker, parameters, pool): a small few-shot network on images whose brightness pattern tells the class."""
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(6), 8)
  images = (rng.normal(size=(6, 8, 8, 1))[labels] + 0.3 * rng.normal(size=(48, 8, 8, 1))).astype(np.float32)
  network = mg.GatedNetwork(mg.nn.FewShotConvNet(classes=3, widths=(3, 4)))
  learner = partial(mg.maml, mg.classification_loss(network))
  return learner, network.init(jax.random.key(0), (8, 8, 1)), mg.fewshot.make_class_pool(images, labels)


@pytest.mark.parametrize("mask_in", ["inner_loop", "start"])
@pytest.mark.parametrize("derivative", ["exact", "first_order"])
def test_anp_is_the_sensitivity_of_the_meta_objective_to_the_mask(derivative, mask_in):
  """Against central differences in float64 of M(w; c), and of each task's part of it: tanh network, squared loss, two inner
  steps. The mask multiplies the start and every step, or the start alone."""
  rng = np.random.default_rng(3)
  shapes = {"first": (2, 4), "second": (4, 1)}
  w = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  tasks = [[(rng.normal(size=(5, 2)), rng.normal(size=5)) for _ in range(2)] for _ in range(3)]

  def loss(params, x, y):
    return np.mean((np.tanh(x @ params["first"]) @ params["second"] - y[:, None]) ** 2)

  def gradient(params, x, y):
    h = np.tanh(x @ params["first"])
    residual = 2 * (h @ params["second"] - y[:, None]) / len(y)
    return {"first": x.T @ (residual @ params["second"].T * (1 - h**2)), "second": h.T @ residual}

  def adapt(params, support, c=None):
    gradients = []
    for _ in range(2):
      gradients.append(gradient(params, *support))
      params = {name: params[name] - 0.1 * (1 if c is None else c[name]) * g for name, g in gradients[-1].items()}
    return params, gradients

  def sensitivities(name, place):
    """By task, with its sign."""
    step = np.zeros(shapes[name])
    step[place] = 1e-6

    def shifted(sign, support, query):
      c = {other: np.ones(shape) for other, shape in shapes.items()}
      c[name] = c[name] + sign * step
      start = {other: c[other] * w[other] for other in w}
      if derivative == "first_order":  # the inner gradients are constants
        _, gradients = adapt(w, support)
        steps = {other: -0.1 * sum(g[other] for g in gradients) for other in w}
        return loss({other: start[other] + (c[other] if mask_in == "inner_loop" else 1) * steps[other] for other in w}, *query)
      return loss(adapt(start, support, c if mask_in == "inner_loop" else None)[0], *query)

    return [(shifted(1, *task) - shifted(-1, *task)) / 2e-6 for task in tasks]

  def jax_loss(params, batch, key):
    del key
    return jnp.mean(((jnp.tanh(batch.images @ params["first"]) @ params["second"])[:, 0] - batch.labels) ** 2)

  stacked = mg.data.Episode(
    *(mg.data.Batch(*(jnp.asarray(np.stack(part), jnp.float32) for part in zip(*side)), jnp.ones((3, 5))) for side in zip(*tasks))
  )
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), w)
  learner = mg.maml(jax_loss, inner_lr=0.1, inner_steps=2)
  for options, task_axis in (
    ({}, "map"),
    ({"by_layer": True}, "map"),
    ({}, "vmap"),
    ({"average": "absolute"}, "map"),
    ({"average": "absolute", "by_layer": True}, "map"),
  ):
    score = score_of(learner.meta_loss, derivative=derivative, mask_in=mask_in, **options)(params, stacked, task_axis=task_axis)
    absolute = "average" in options
    for name, shape in shapes.items():
      expected = [np.mean(np.abs(s)) if absolute else np.abs(np.mean(s)) for s in (sensitivities(name, place) for place in np.ndindex(shape))]
      np.testing.assert_allclose(score[name].ravel(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.slow
def test_by_layer_takes_a_gradient_per_layer(few_shot):
  """A kernel and its bias are one layer: as many gradients as layers, and the score is that of all at once."""
  make, params, pool = few_shot
  learner, gradients = make(inner_lr=0.1, inner_steps=1), []
  episodes = mg.fewshot.sample_episodes(jax.random.key(1), pool, 2, **SAMPLE)

  def meta_loss(*args, **options):
    gradients.append(args)
    return learner.meta_loss(*args, **options)

  score = score_of(meta_loss, by_layer=True)(params, episodes, task_axis="vmap")
  assert len(gradients) == len(params["backbone"]) < len(jax.tree.leaves(params))
  chex.assert_trees_all_close(score, score_of(learner.meta_loss)(params, episodes), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_first_order_is_exact_without_inner_steps_of_any_length(few_shot):
  make, params, pool = few_shot
  episodes = mg.fewshot.sample_episodes(jax.random.key(1), pool, 4, **SAMPLE)
  scores = {
    (rate, derivative): score_of(make(inner_lr=rate, inner_steps=2).meta_loss, derivative=derivative)(params, episodes)
    for rate in (1e-7, 0.1)
    for derivative in ("exact", "first_order")
  }
  chex.assert_trees_all_close(scores[1e-7, "exact"], scores[1e-7, "first_order"], rtol=1e-4, atol=1e-6)
  kernel = lambda score: np.asarray(score["backbone"]["conv1"]["kernel"])
  assert not np.allclose(kernel(scores[0.1, "exact"]), kernel(scores[0.1, "first_order"]), rtol=0.02)


@pytest.mark.slow
def test_a_score_with_a_mask_is_that_of_the_smaller_network(few_shot):
  """What is gone must not move in the inner loop of the next score: against a loss that cannot see it."""
  make, params, pool = few_shot
  episodes = mg.fewshot.sample_episodes(jax.random.key(1), pool, 2, **SAMPLE)
  mask = mg.make_mask(mg.pruning.magnitude()(params), 0.5)
  params, learner = mg.pruning.apply_mask(params, mask), make(inner_lr=0.5, inner_steps=3)
  loss = lambda w, batch, key: make.args[0](mg.pruning.apply_mask(w, mask), batch, key)
  score = score_of(learner.meta_loss)(params, episodes, mask=mask)
  expected = score_of(mg.maml(loss, inner_lr=0.5, inner_steps=3).meta_loss)(params, episodes)
  chex.assert_trees_all_close(score, expected, rtol=1e-3, atol=1e-5)
  unmasked = score_of(learner.meta_loss)(params, episodes)
  assert not np.allclose(score["backbone"]["conv2"]["kernel"], unmasked["backbone"]["conv2"]["kernel"], rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("granularity", [pytest.param("weight", marks=pytest.mark.slow), "channel"])
def test_masks_hold_while_training_and_grow(few_shot, granularity):
  make, params, pool = few_shot
  learner = make(inner_lr=0.1, inner_steps=2)
  optimizer = mg.gradual_pruning(
    optax.adam(1e-2),
    mg.pruning.sparsity_schedule("cubic", 0.6, begin=2, end=10, every=4),
    granularity=granularity,
    prunable=lambda path, leaf: mg.pruning.is_kernel(path, leaf) and "output" not in path,
  )
  score = mg.pruning.anp(learner.meta_loss, average="signed")
  step = jax.jit(
    partial(
      mg.fewshot.run_meta_steps,
      learner,
      optimizer,
      lambda key, pool: mg.fewshot.sample_episode(key, pool, **SAMPLE),
      steps=1,
      episodes=2,
      score=score,
      score_episodes=4,
    )
  )
  state, masks = mg.fewshot.meta_init(learner, optimizer, params, jax.random.key(5)), []
  for _ in range(12):
    state, _ = step(state, pool)
    masks.append(mg.pruning.pruning_mask(state.optimizer))
    for tree in (state.params, *(s for s in state.optimizer.inner[0] if jax.tree.structure(s) == jax.tree.structure(params))):
      jax.tree.map(lambda w, c: np.testing.assert_array_equal(np.asarray(w)[np.asarray(c) == 0], 0), tree, masks[-1])
  adapted = learner.adapt(state.params, mg.fewshot.sample_episode(jax.random.key(9), pool, **SAMPLE).support, masks[-1])
  jax.tree.map(lambda w, c: np.testing.assert_array_equal(np.asarray(w)[np.asarray(c) == 0], 0), adapted, masks[-1])
  for before, after in zip(masks, masks[1:]):
    jax.tree.map(lambda b, a: np.testing.assert_array_less(np.asarray(a), np.asarray(b) + 0.5), before, after)
  sparsities = [float(mg.pruning.mask_sparsity(mask, lambda path, leaf: "conv" in path and mg.pruning.is_kernel(path, leaf))) for mask in masks]
  assert sparsities[1] == sparsities[2] == 0
  assert 0.3 < sparsities[6] < 0.6 and abs(sparsities[10] - 0.6) < (0.02 if granularity == "weight" else 0.2)
  assert sparsities[11] == sparsities[10]
  kernel = np.asarray(state.params["backbone"]["conv1"]["kernel"])
  assert (kernel != 0).any()
  if granularity == "channel":
    off = (kernel == 0).all((0, 1, 2))
    assert off.any() and (np.asarray(state.params["backbone"]["conv1"]["bias"])[off] == 0).all()


def test_pruned_training_is_training_of_the_smaller_network():
  """Two of four features pruned at the first step: from there on it is Adam on the other two alone."""
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.normal(size=(30, 4))), jnp.asarray(rng.normal(size=30))
  loss = lambda w, x: jnp.mean((x @ w["w"][:, 0] - y) ** 2)
  w = {"w": jnp.asarray(rng.normal(size=(4, 1)))}
  kept = np.sort(np.argsort(np.abs(np.asarray(w["w"][:, 0])))[2:])  # the score is |w| where none is given
  optimizer, plain = mg.gradual_pruning(optax.adam(0.1), mg.pruning.sparsity_schedule("one_shot", 0.5)), optax.adam(0.1)
  updates, state = optimizer.update(jax.grad(loss)(w, x), optimizer.init(w), w)
  w = optax.apply_updates(w, updates)
  small, plain_state = jax.tree.map(lambda s: s[kept] if np.shape(s) == (4, 1) else s, (w, state.inner))
  for _ in range(20):
    updates, state = optimizer.update(jax.grad(loss)(w, x), state, w)
    w = optax.apply_updates(w, updates)
    updates, plain_state = plain.update(jax.grad(loss)(small, x[:, kept]), plain_state, small)
    small = optax.apply_updates(small, updates)
  np.testing.assert_allclose(w["w"][kept], small["w"], rtol=1e-5)
  assert np.count_nonzero(w["w"]) == 2


def test_it_works_inside_a_chain_and_in_any_loop():
  w = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4), "bias": jnp.zeros(4)}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), mg.gradual_pruning(optax.sgd(0.1), mg.pruning.sparsity_schedule("one_shot", 0.5)))
  score = jax.tree.map(lambda x: -x + 100, w)  # the largest weights are the least important
  updates, state = jax.jit(lambda g, s, w: optimizer.update(g, s, w, score=lambda: score))(w, optimizer.init(w), w)
  assert (np.asarray(optax.apply_updates(w, updates)["kernel"])[1] == 0).all()
  assert mg.pruning.pruning_mask(state)["kernel"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
  with pytest.raises(ValueError, match="no gradual_pruning"):
    mg.pruning.pruning_mask(optax.adam(0.1).init(w))
  with pytest.raises(ValueError, match="not a pytree like the parameters"):
    optimizer.update(w, optimizer.init(w), w, score={"kernel": w["kernel"]})
  with pytest.raises(ValueError, match="needs the parameters"):
    optimizer.update(w, optimizer.init(w))


@pytest.mark.slow
def test_episodes_over_a_mesh_are_the_same_training(few_shot):
  make, params, pool = few_shot
  learner = make(inner_lr=0.1)
  optimizer = mg.gradual_pruning(optax.sgd(0.1), mg.pruning.sparsity_schedule("one_shot", 0.5, begin=1))
  score = mg.pruning.anp(learner.meta_loss, average="signed")
  results = []
  for mesh in (None, mg.core.task_mesh(jax.devices()[:2])):
    step = jax.jit(
      partial(
        mg.fewshot.run_meta_steps,
        learner,
        optimizer,
        lambda key, pool: mg.fewshot.sample_episode(key, pool, **SAMPLE),
        steps=4,
        episodes=4,
        score=score,
        score_episodes=2,
        mesh=mesh,
      )
    )
    results.append(step(mg.fewshot.meta_init(learner, optimizer, params, jax.random.key(5)), pool))
  (one, one_metrics), (spread, spread_metrics) = jax.device_get(results[0][:2]), jax.device_get(results[1][:2])
  chex.assert_trees_all_close(one.params, spread.params, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_equal(mg.pruning.pruning_mask(one.optimizer), mg.pruning.pruning_mask(spread.optimizer))
  np.testing.assert_allclose(one_metrics["loss"], spread_metrics["loss"], rtol=1e-4)
  with pytest.raises(ValueError, match="3 tasks cannot be spread evenly over 2 devices"):
    mg.fewshot.run_meta_steps(
      learner,
      optimizer,
      lambda key, pool: mg.fewshot.sample_episode(key, pool, **SAMPLE),
      one,
      pool,
      steps=1,
      episodes=3,
      mesh=mg.core.task_mesh(jax.devices()[:2]),
    )


def _optax_exports():
  """By name, every optimizer and transformation of optax that can be made from a rate, from nothing or from another optimizer."""
  found = {}
  for name in [*dir(optax), *(f"contrib.{name}" for name in dir(optax.contrib))]:
    make = operator.attrgetter(name)(optax)
    if name.split(".")[-1].startswith("_") or not callable(make) or inspect.isclass(make):
      continue
    for arguments in ((0.1,), (), (optax.adam(0.1),)):
      try:
        made = make(*arguments)
      except Exception:
        continue
      if isinstance(made, optax.GradientTransformation):
        found[name] = made
        break
  return found | {
    "masked": optax.masked(optax.adam(0.1), {"bias": False, "kernel": True}),
    "inject": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "multi_transform": optax.multi_transform({"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}, {"kernel": "adam", "bias": "sgd"}),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 2),
    "accelerated_proximal": mg.accelerated_proximal(mg.l1(), 0.1),
  }


# What cannot be made as it is meant to be from one rate, or wants arguments of its own in `update`.
UNUSABLE = {
  "scale_by_schedule",
  "stateless",
  "stateless_with_tree_map",
  "contrib.hutchinson_estimator_diag_hessian",
  "contrib.scale_by_muon",
  "contrib.split_real_and_imaginary",
  "contrib.sophia",
}
# These make further zeros.
ZEROS = {"keep_params_nonnegative", "accelerated_proximal"}
OPTAX = _optax_exports()
# What many use, and what once failed; the others are run by `make slow-test`.
COMMON = {
  "adam",
  "adamw",
  "sgd",
  "lion",
  "adafactor",
  "novograd",
  "sm3",
  "lbfgs",
  "flatten",
  "contrib.galore",
  "contrib.muon",
  "masked",
  "inject",
  "multi_transform",
  "MultiSteps",
  "apply_if_finite",
  "accelerated_proximal",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in COMMON else pytest.mark.slow) for name in sorted(set(OPTAX) - UNUSABLE)])
def test_any_optimizer_of_optax_can_be_wrapped(name):
  """Large enough for Adafactor to factor. What works alone works here, prunes to the weight, and brings nothing back."""
  params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(130, 140)) / 10, jnp.float32), "bias": jnp.zeros(140)}
  loss = lambda p: jnp.mean((jnp.tanh(jnp.ones((1, 130)) @ p["kernel"]) + p["bias"] - 1) ** 2)
  optimizer = mg.gradual_pruning(OPTAX[name], mg.pruning.sparsity_schedule("one_shot", 0.5, begin=1))
  state, masks = optimizer.init(params), []
  for _ in range(4):
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
    params = optax.apply_updates(params, updates)
    masks.append(np.asarray(state.mask["kernel"]))
  zeros = float((params["kernel"] == 0).mean())
  assert zeros == 0.5 or (name in ZEROS and zeros > 0.5)
  assert masks[0].all() and all((mask == masks[1]).all() for mask in masks[2:])
  assert (np.asarray(params["kernel"])[masks[-1] == 0] == 0).all()


def test_a_score_of_nan_is_seen_in_the_loss():
  """Not in a network that is silently pruned to nothing."""
  params = {"w": jnp.ones((4, 4))}
  optimizer = mg.gradual_pruning(optax.adam(0.1), mg.pruning.sparsity_schedule("one_shot", 0.5, begin=1))
  state = optimizer.init(params)
  for _ in range(2):
    updates, state = jax.jit(optimizer.update)(params, state, params, score={"w": jnp.full((4, 4), jnp.nan)})
    params = optax.apply_updates(params, updates)
  assert np.isnan(params["w"]).all()

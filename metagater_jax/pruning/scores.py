"""How important each weight is: ANP, SNIP, magnitude and random, in one protocol.

A score is a pytree like the parameters, with one non-negative number per weight. What a mask may remove is the mask maker's argument, not the
score's. Nothing in here knows of networks: parameters are any pytree.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metagater_jax.core.checks import check_counts, check_one_of
from metagater_jax.core.tasks import sum_over_tasks
from metagater_jax.core.trees import Params, like, precision_of
from metagater_jax.data.batching import Loss, full_batch_gradient
from metagater_jax.data.population import Batch, TaskData

__all__ = ["AVERAGES", "PLACES", "Score", "anp", "contribution", "magnitude", "random", "snip"]

# How a score on several tasks is averaged: before or after its magnitude is taken.
AVERAGES = ("signed", "absolute")
# Where the mask acts of which ANP's score is the derivative: in the inner loop too, as it does when weights are pruned, or at its start only.
PLACES = ("inner_loop", "start")


@dataclasses.dataclass(frozen=True, eq=False)  # not a tuple, which `jax.jit(score)` could not take
class Score:
  """A pruning score, as pure functions of pytrees: `score(params, tasks, key, mask) -> tree`.

  It is made of what a task contributes and what becomes of the mean of that, so that clients can send their contributions and a server
  finish them, and that a single task can be scored on its own.

  Attributes:
    finish: `(params, mean contribution, key) -> score`. Without contributions the mean is None.
    contribution: `(params, task, key, mask) -> tree` like the parameters; None: the score needs no data. What a task is (a `Batch`,
      an `Episode`, a `TaskData`) is the score's own business; the key is for randomness inside the model, None for none; the mask is what
      is pruned already.
  """

  finish: Callable[[Params, Params | None, jax.Array | None], Params]
  contribution: Callable[[Params, Any, jax.Array | None, Params | None], Params] | None = None

  def __call__(
    self,
    params: Params,
    tasks: Any = None,
    key: jax.Array | None = None,
    mask: Params | None = None,
    *,
    task_axis: str | int = "auto",
    axis_name: str | None = None,
  ) -> Params:
    """The score of all weights on several tasks.

    Args:
      params: w, where weights are scored.
      tasks: a pytree with a leading task axis, such as `fewshot.sample_episodes` makes; None where the score needs no data.
      key: for randomness in the score or the model.
      mask: a pytree like `params`, what is pruned already.
      task_axis: see `core.map_tasks`.
      axis_name: of a mesh over which the tasks are spread evenly; each device has its part of `tasks`.

    Returns:
      A pytree like `params` of non-negative numbers.
    """
    if self.contribution is None:
      return self.finish(params, None, key)
    count = jax.tree.leaves(tasks)[0].shape[0]
    keys = None if key is None else jax.random.split(key, count)
    contribution: Callable[..., Params] = self.contribution
    mean = sum_over_tasks(lambda own: contribution(params, *own, mask), (tasks, keys), jnp.full(count, 1 / count), task_axis)
    return self.finish(params, mean if axis_name is None else jax.lax.pmean(mean, axis_name), key)

  def on_task(self, params: Params, task: Any, key: jax.Array | None = None, mask: Params | None = None) -> Params:
    """The score of all weights on a single task, without a leading axis."""
    mean = None if self.contribution is None else self.contribution(params, task, key, mask)
    return self.finish(params, mean, key)


def magnitude() -> Score:
  """|w|. Needs no data.

  Returns:
    The score.
  """
  return Score(lambda params, mean, key: jax.tree.map(jnp.abs, params))


def random() -> Score:
  """Uniform numbers in [0, 1): the control that every other score must beat. Needs a key and no data.

  Returns:
    The score.

  Raises:
    ValueError: from the score, a missing key.
  """

  def finish(params, mean, key):
    del mean
    if key is None:
      raise ValueError("the random score needs a key: score(params, key=jax.random.key(0)).")
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return like(jax.tree.unflatten(structure, [jax.random.uniform(k, jnp.shape(w), precision_of(w)) for k, w in zip(keys, leaves)]), params)

  return Score(finish)


def snip(loss: Loss, *, average: str = "absolute", samples: Callable[[Any], Batch | TaskData] | None = None, chunk: int = 64) -> Score:
  """Connection sensitivity on the ordinary loss (Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity").

  |∂L(c ⊙ w)/∂c| at c = 1, which is |w ⊙ ∇L(w)|: to first order the change of the loss when a weight is removed. The paper divides by the
  sum, which changes no order.

  Args:
    loss: L, `(params, batch, key) -> scalar`.
    average: over tasks, see `anp`.
    samples: `task -> ` its samples that the loss is taken on, a `Batch` or `TaskData`; None: all, those of the support and of the query
      of an episode.
    chunk: samples of a `TaskData` at a time.

  Returns:
    The score.

  Raises:
    ValueError: an unknown `average`.
  """
  samples = _all_samples if samples is None else samples

  check_counts(chunk=chunk)

  def contribution(params, task, key, mask):
    del mask  # what is pruned is 0 in the parameters, and so is its sensitivity
    _, gradient = full_batch_gradient(loss, params, samples(task), chunk, key)
    return _sensitivity(params, gradient, average)

  return _sensitivity_score(contribution, average)


def contribution(loss: Loss, *, chunk: int = 64) -> Score:
  """What weights do for the ordinary loss, with its sign: −w ⊙ ∇L(w), to first order by how much the loss grows when a weight is removed.

  Where SNIP keeps what matters in either direction, this keeps what helps and removes what harms. Summed over a filter and its bias that is
  −∂L/∂m of a mask m on a channel of relu(conv(z)): the gradient that a gate gets. Not for `prune_further`, whose scores are not negative.

  Args:
    loss: L, `(params, batch, key) -> scalar`.
    chunk: samples of a `TaskData` at a time.

  Returns:
    The score.

  Raises:
    ValueError: a chunk that is not a whole number of at least 1.
  """
  check_counts(chunk=chunk)

  def of_task(params, task, key, mask):
    del mask
    _, gradient = full_batch_gradient(loss, params, _all_samples(task), chunk, key)
    return jax.tree.map(lambda w, g: -w * g, params, gradient)

  return Score(lambda params, mean, key: mean, of_task)


def anp(
  meta_loss: Callable[..., jax.Array], *, derivative: str = "exact", average: str = "absolute", mask_in: str = "inner_loop", by_layer: bool = False
) -> Score:
  """Adaptation-aware importance (ANP, Gao et al. 2021): how sensitive the meta-objective is to removing a weight.

  |∂M(w; c)/∂c| at c = 1 of M(w; c) = mean over tasks of L_query(A_T(w; c)): a weight is important if the network adapts worse without it,
  whatever its own loss on anything is. c multiplies w and every step of the inner loop A_T, as the mask does that pruning makes: what is
  removed does not come back by adapting.

  Args:
    meta_loss: `(params, task, mask=…, derivative=…) -> scalar`, as the `meta_loss` of a `fewshot.MetaLearner`; it must heed the mask.
    derivative: see `optim.descend`; "exact" differentiates through the inner loop; "first_order" takes the inner loop's gradients as
      constants, |w_T ⊙ ∇L_query(w_T)| at the adapted weights w_T, which needs no second derivatives.
    average: over the tasks: "absolute", the mean of the tasks' own scores |w ⊙ ∇L_query(A_T(w))|; "signed", the score of the mean
      objective M as above: near a minimum of M the tasks' gradients cancel, and what is left is ranked by chance.
    mask_in: "inner_loop", c as above; or "start", c on w alone, which is |w ⊙ ∇M(w)|: a weight may come back by adapting. Where the inner loop
      does not change what is pruned (ANIL's head alone adapts) both are the same.
    by_layer: one gradient after the other, each of one layer only: the same score for more time, and less memory where gradients
      are what fills it (of our networks on a CPU they are not: `python -m benchmarks --only=anp`). A layer is the leaves with one
      parent in the tree; a leaf at its top is a layer of its own.

  The mask of what is pruned already holds in the inner loop too, or weights that are gone would move in it.

  Returns:
    The score.

  Raises:
    ValueError: an unknown `average` or place of the mask.
  """
  check_one_of("mask_in", mask_in, PLACES)
  gradient_of = _gradient_by_layer if by_layer else lambda objective, at: jax.grad(objective)(at)

  def contribution(params, task, key, mask):
    del key
    if mask_in == "start":
      return _sensitivity(params, gradient_of(lambda w: meta_loss(w, task, mask=mask, derivative=derivative), params), average)
    kept = jax.tree.map(jnp.ones_like, params) if mask is None else like(mask, params)
    return _sensitivity(kept, gradient_of(lambda c: meta_loss(params, task, mask=c, derivative=derivative), kept), average)

  return _sensitivity_score(contribution, average)


def _sensitivity_score(contribution, average):
  check_one_of("average", average, AVERAGES)
  return Score(lambda params, mean, key: jax.tree.map(jnp.abs, mean), contribution)


def _sensitivity(weights, gradient, average):
  """What a task adds to a mean of scores: w ⊙ ∇L, or its magnitude."""
  sensitivity = jax.tree.map(jnp.multiply, weights, gradient)
  return sensitivity if average == "signed" else jax.tree.map(jnp.abs, sensitivity)


def _all_samples(task):
  """The samples of a task: itself, or all of the batches that it consists of."""
  parts = jax.tree.leaves(task, is_leaf=lambda part: isinstance(part, Batch | TaskData))
  return parts[0] if len(parts) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)


def _gradient_by_layer(objective, params):
  paths, structure = jax.tree_util.tree_flatten_with_path(params)
  leaves = [leaf for _, leaf in paths]
  layers: dict[Any, list[int]] = {}
  for i, (path, _) in enumerate(paths):
    layers.setdefault(path[:-1] or path, []).append(i)
  gradients: dict[int, jax.Array] = {}
  for layer in layers.values():
    # Behind a barrier, or the compiler would make one program with all gradients out of it again.
    fixed, _ = jax.lax.optimization_barrier((leaves, gradients))

    def objective_of_layer(own, layer=layer, fixed=fixed):
      changed = list(fixed)
      for i, leaf in zip(layer, own):
        changed[i] = leaf
      return objective(jax.tree.unflatten(structure, changed))

    gradients |= dict(zip(layer, jax.grad(objective_of_layer)([fixed[i] for i in layer])))
  return jax.tree.unflatten(structure, [gradients[i] for i in range(len(leaves))])

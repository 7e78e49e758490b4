"""Fast adaptation at a target task in two stages (Section 3.3): the gate first, then the filters that it kept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metagater_jax.data.population import TaskData
from metagater_jax.evaluation import mean_over_task
from metagater_jax.gates import gate_groups, sparsity as sparsity_of
from metagater_jax.local import Loss, full_batch_gradient
from metagater_jax.network import GatedNetwork
from metagater_jax.penalties import group_lasso, group_norms
from metagater_jax.tasks import map_tasks

__all__ = ["adapt_backbone", "adapt_gate", "calibrate_threshold", "fine_tune", "two_stage_adaptation"]

Params = dict[str, Any]

_group_lasso = group_lasso(gate_groups)


def adapt_gate(loss: Loss, params: Params, data: TaskData, *, lr: float, steps: int = 1,
               threshold: float | jax.Array = 0.0, chunk: int = 64) -> Params:
  """Stage I: φ_i = prox_{κR}(φ − η_φ ∇_φ L_i(θ, φ)), with the backbone θ as it is and no gate noise.

  At w = the meta-model the pull λ of Eq. (3) has zero gradient, so it does not show in one step. The gradient needs no
  backward pass below the lowest gate. R is the Group Lasso: the proximal step switches off every channel whose group has a
  norm of at most κ, for every input, so that it can be cut out of this task's network; the other groups shrink, which
  changes no mask. κ is what sets the sparsity (`calibrate_threshold` finds it): neither the weight of the penalty in
  meta-training nor η_φ does, since a mask is a threshold at zero, which no scale of the log-odds moves.

  Args:
    loss: L_i.
    params: the meta-model.
    data: the target task's train data, all of which each step uses.
    lr: η_φ.
    steps: gradient steps; one proximal step follows the last.
    threshold: κ ≥ 0.
    chunk: see `full_batch_gradient`.
  """
  if not params["gate"]:
    return params

  def gate_loss(gate, batch, key):
    return loss({"backbone": params["backbone"], "gate": gate}, batch, key)

  gate = fine_tune(gate_loss, params["gate"], data, lr=lr, steps=steps, chunk=chunk)
  return {**params, "gate": _group_lasso.prox(gate, threshold)}


def fine_tune(loss: Loss, params: Any, data: TaskData, *, lr: float, steps: int = 1, chunk: int = 64) -> Any:
  """w_i = w − η ∇L_i(w) on all of a task's train data, repeated: how the baselines adapt. `params` may be any pytree.

  Other arguments as in `adapt_gate`.
  """
  for _ in range(steps):
    _, gradient = full_batch_gradient(lambda w, batch: loss(w, batch, None), params, data, chunk)
    params = jax.tree.map(lambda w, g: w - lr * g, params, gradient)
  return params


def adapt_backbone(loss: Loss, params: Params, data: TaskData, *, lr: float, steps: int = 1, chunk: int = 64) -> Params:
  """Stage II: θ_i = θ − η_θ ∇_θ L_i(θ, φ_i), with the gate as it is.

  Only filters that the gate switches on get a gradient: a channel that is off for all of the task's samples keeps its
  weights to the bit. Arguments as in `adapt_gate`.
  """
  def backbone_loss(backbone, batch, key):
    return loss({"backbone": backbone, "gate": params["gate"]}, batch, key)

  return {**params, "backbone": fine_tune(backbone_loss, params["backbone"], data, lr=lr, steps=steps, chunk=chunk)}


def two_stage_adaptation(loss: Loss, params: Params, data: TaskData, *, gate_lr: float, backbone_lr: float, steps: int = 1,
                         threshold: float | jax.Array = 0.0, chunk: int = 64) -> Params:
  """Both stages, from the meta-model to the model of a target task; see `adapt_gate` and `adapt_backbone`."""
  params = adapt_gate(loss, params, data, lr=gate_lr, steps=steps, threshold=threshold, chunk=chunk)
  return adapt_backbone(loss, params, data, lr=backbone_lr, steps=steps, chunk=chunk)


def calibrate_threshold(network: GatedNetwork, params: Params, stage_one: Callable[[Params, TaskData], Params],
                        train_data: Callable[[jax.Array], TaskData], tasks: jax.Array, sparsity: float, *,
                        samples: int = 64, task_axis: str | int = "auto", weight: jax.Array | None = None,
                        axis_name: str | None = None) -> jax.Array:
  """The κ ≥ 0 of stage I at which tasks have a given sparsity on average.

  Each task runs stage I with κ = 0 once; then the server proposes κ, each task answers with its sparsity under it, and
  bisection over the norms of the tasks' groups finds the smallest κ that reaches the wanted mean. No data leaves a task.
  Use training tasks, never targets: a single number goes to the targets with the meta-model, and each target has the
  sparsity that its own stage I leads to.

  Args:
    network: whose gates these are.
    params: the meta-model.
    stage_one: `(params, task data) -> params` with κ = 0.
    train_data: number of a task to its train data (`population.train`).
    tasks: (tasks,) numbers of the tasks that answer.
    sparsity: wanted mean fraction of gated channels that are off, in [0, 1). Where more are off at κ = 0, κ is 0.
    samples: at most so many of a task's train samples are looked at for an answer.
    task_axis: see `map_tasks`.
    weight: (tasks,) of the tasks in the mean, 0 for tasks that are padding; None: all the same.
    axis_name: mesh axis over which the tasks are spread, inside `shard_map`; None: they are all here.

  Returns:
    κ, a scalar.
  """
  weight = jnp.ones(tasks.shape) if weight is None else weight
  everywhere = (lambda x: x) if axis_name is None else lambda x: jax.lax.psum(x, axis_name)
  gates = map_tasks(lambda task: stage_one(params, train_data(task))["gate"], tasks, task_axis)
  norms = jnp.concatenate([n.ravel() for n in jax.vmap(lambda gate: group_norms(gate_groups, gate))(gates).values()])
  if axis_name is not None:
    norms = jax.lax.all_gather(norms, axis_name, tiled=True)
  kappas = jnp.concatenate([jnp.zeros(1), jnp.sort(norms)])

  def mean_sparsity(kappa):
    def answer(task_and_gate):
      task, gate = task_and_gate
      data = train_data(task)
      data = data._replace(index=data.index[:samples], count=jnp.minimum(data.count, samples))
      adapted = {**params, "gate": _group_lasso.prox(gate, kappa)}
      return mean_over_task(lambda batch: sparsity_of(network.apply(adapted, batch.images)[1]), data, samples)
    return everywhere(jnp.dot(weight, map_tasks(answer, (tasks, gates), task_axis))) / everywhere(weight.sum())

  def halve(_, bounds):
    low, high = bounds  # kappas[high] reaches the wanted sparsity, nothing below `low` does
    middle = (low + high) // 2
    enough = mean_sparsity(kappas[middle]) >= sparsity
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  last = kappas.shape[0] - 1
  _, rank = jax.lax.fori_loop(0, last.bit_length() + 1, halve, (jnp.array(0), jnp.array(last)))
  return kappas[rank]

"""Fast adaptation at a target task in two stages (Section 3.3): the gate first, then the filters that it kept."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagater_jax.core.checks import check_counts, check_positive
from metagater_jax.core.tasks import map_tasks
from metagater_jax.core.trees import Params
from metagater_jax.data.batching import Loss, mean_over_task
from metagater_jax.data.population import Batch, TaskData
from metagater_jax.nn.gated import GatedNetwork
from metagater_jax.nn.gates import gate_groups
from metagater_jax.nn.gates import sparsity as sparsity_of
from metagater_jax.optim.penalties import group_lasso, group_norms
from metagater_jax.personalize.fine_tune import gradient_steps
from metagater_jax.personalize.personalizer import Personalizer
from metagater_jax.pruning.masks import masked_loss

__all__ = ["adapt_backbone", "adapt_gate", "calibrate_threshold", "two_stage"]

_group_lasso = group_lasso(gate_groups)


def two_stage(loss: Loss, *, gate_lr: float = 10.0, lr: float = 0.05, steps: int = 1, target_sparsity: float | None = None,
              network: GatedNetwork | None = None, chunk: int = 64, task_axis: str | int = "auto") -> Personalizer:
  """MetaGater's adaptation: stage I `adapt_gate`, stage II `adapt_backbone`, from the meta-model to the model of a target task.

  Args:
    loss: L_i, `(params, batch, key) -> scalar`, on parameters with the parts "backbone" and "gate"; the key is None here.
    gate_lr, lr: η_φ and η_θ.
    steps: of each stage.
    target_sparsity: mean sparsity that adapted tasks shall have; `calibrate` then finds κ of stage I on training tasks.
      None: κ = 0, the gate's gradient step alone decides.
    network: whose gates these are; needed for `target_sparsity`.
    chunk: samples at a time.
    task_axis: see `core.map_tasks`, for the calibration.

  Returns:
    The personalizer.

  Raises:
    ValueError: a rate or number of steps that is not positive, or a target sparsity outside [0, 1) or without a network; from `adapt` and
      `calibrate`, a model without gates.
  """
  check_positive(gate_lr=gate_lr, lr=lr)
  check_counts(steps=steps, chunk=chunk)
  if target_sparsity is not None and (network is None or not (isinstance(target_sparsity, jax.core.Tracer) or 0 <= target_sparsity < 1)):
    raise ValueError("two_stage: target_sparsity must lie in [0, 1) and needs the network, got "
                     f"target_sparsity={target_sparsity}, network={network}.")

  def calibrate(model, population, tasks, share=None, axis_name=None):
    _check_gates(model.params)
    if target_sparsity is None:
      return jnp.zeros(())
    own = masked_loss(loss, model.mask)
    stage_one = lambda params, data: adapt_gate(own, params, data, lr=gate_lr, steps=steps, chunk=chunk)
    return calibrate_threshold(network, model.params, stage_one, population.train, tasks, target_sparsity, samples=chunk,
                               task_axis=task_axis, share=share, axis_name=axis_name)

  def adapt(model, data, threshold=None):
    _check_gates(model.params)
    own = masked_loss(loss, model.mask)
    params = adapt_gate(own, model.params, data, lr=gate_lr, steps=steps, threshold=0.0 if threshold is None else threshold, chunk=chunk)
    return model._replace(params=adapt_backbone(own, params, data, lr=lr, steps=steps, chunk=chunk))

  return Personalizer(calibrate, adapt)


def adapt_gate(loss: Loss, params: Params, data: TaskData | Batch, *, lr: float, steps: int = 1,
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

  Returns:
    Parameters with the adapted gate.
  """
  def gate_loss(gate, batch, key):
    return loss({"backbone": params["backbone"], "gate": gate}, batch, key)

  gate = gradient_steps(gate_loss, params["gate"], data, lr=lr, steps=steps, chunk=chunk)
  return {**params, "gate": _group_lasso.prox(gate, threshold)}


def adapt_backbone(loss: Loss, params: Params, data: TaskData | Batch, *, lr: float, steps: int = 1, chunk: int = 64) -> Params:
  """Stage II: θ_i = θ − η_θ ∇_θ L_i(θ, φ_i), with the gate as it is.

  Only filters that the gate switches on get a gradient: a channel that is off for all of the task's samples keeps its
  weights to the bit. Arguments as in `adapt_gate`.

  Args:
    loss, params, data, lr, steps, chunk: as in `adapt_gate`.

  Returns:
    Parameters with the adapted backbone.
  """
  def backbone_loss(backbone, batch, key):
    return loss({"backbone": backbone, "gate": params["gate"]}, batch, key)

  return {**params, "backbone": gradient_steps(backbone_loss, params["backbone"], data, lr=lr, steps=steps, chunk=chunk)}


def calibrate_threshold(network: GatedNetwork, params: Params, stage_one: Callable[[Params, TaskData], Params],
                        train_data: Callable[[jax.Array], TaskData], tasks: jax.Array, sparsity: float, *, samples: int = 64,
                        task_axis: str | int = "auto", share: jax.Array | None = None, axis_name: str | None = None) -> jax.Array:
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
    share: (tasks,) their parts in the mean, 0 for tasks that are padding; None: all the same.
    axis_name: mesh axis over which the tasks are spread, inside `shard_map`; None: they are all here.

  Returns:
    κ, a scalar.
  """
  share = jnp.ones(tasks.shape) if share is None else share
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
    return everywhere(jnp.dot(share, map_tasks(answer, (tasks, gates), task_axis))) / everywhere(share.sum())

  def halve(_, bounds):
    low, high = bounds  # kappas[high] reaches the wanted sparsity, nothing below `low` does
    middle = (low + high) // 2
    enough = mean_sparsity(kappas[middle]) >= sparsity
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  last = kappas.shape[0] - 1
  _, rank = jax.lax.fori_loop(0, last.bit_length() + 1, halve, (jnp.array(0), jnp.array(last)))
  return kappas[rank]


def _check_gates(params):
  if not (isinstance(params, dict) and params.get("gate")):
    raise ValueError("two_stage adapts gates, but this model has none; use fine_tune or metasnip, or a GatedNetwork with gated_layers.")

"""Fast adaptation at a target task in two stages (Section 3.3): the gate first, then the filters that it kept."""

from typing import Any

import jax

from metagater_jax.data.population import TaskData
from metagater_jax.local import Loss, full_batch_gradient
from metagater_jax.penalties import Penalty

__all__ = ["adapt_backbone", "adapt_gate", "two_stage_adaptation"]

Params = dict[str, Any]


def adapt_gate(loss: Loss, params: Params, data: TaskData, *, lr: float, steps: int = 1, penalty: Penalty | None = None,
               threshold: float | jax.Array = 0.0, chunk: int = 64) -> Params:
  """Stage I: φ_i = prox_{κR}(φ − η_φ ∇_φ L_i(θ, φ)), with the backbone θ as it is and no gate noise.

  At w = the meta-model the pull λ of Eq. (3) has zero gradient, so it does not show in one step. The gradient needs no
  backward pass below the lowest gate. With the Group Lasso as R, the proximal step switches off every channel whose
  group has a norm of at most κ: for every input, so it can be cut out of this task's network. κ is what sets the
  sparsity; without it, one gradient step merely moves channels across ℓ = 0.

  Args:
    loss: L_i.
    params: the meta-model.
    data: the target task's train data, all of which each step uses.
    lr: η_φ.
    steps: gradient steps; the proximal step follows each.
    penalty: R on the parameters; None: no proximal step.
    threshold: κ, shared out evenly over the steps.
    chunk: see `full_batch_gradient`.
  """
  if not params["gate"]:
    return params

  def gate_loss(gate, batch):
    return loss({"backbone": params["backbone"], "gate": gate}, batch, None)

  gate = params["gate"]
  for _ in range(steps):
    _, gradient = full_batch_gradient(gate_loss, gate, data, chunk)
    gate = jax.tree.map(lambda w, g: w - lr * g, gate, gradient)
    if penalty is not None:
      gate = penalty.prox({**params, "gate": gate}, threshold / steps)["gate"]
  return {**params, "gate": gate}


def adapt_backbone(loss: Loss, params: Params, data: TaskData, *, lr: float, steps: int = 1, chunk: int = 64) -> Params:
  """Stage II: θ_i = θ − η_θ ∇_θ L_i(θ, φ_i), with the gate as it is.

  Only filters that the gate switches on get a gradient: a channel that is off for all of the task's samples keeps its
  weights to the bit. Arguments as in `adapt_gate`.
  """
  def backbone_loss(backbone, batch):
    return loss({"backbone": backbone, "gate": params["gate"]}, batch, None)

  backbone = params["backbone"]
  for _ in range(steps):
    _, gradient = full_batch_gradient(backbone_loss, backbone, data, chunk)
    backbone = jax.tree.map(lambda w, g: w - lr * g, backbone, gradient)
  return {**params, "backbone": backbone}


def two_stage_adaptation(loss: Loss, params: Params, data: TaskData, *, gate_lr: float, backbone_lr: float, steps: int = 1,
                         penalty: Penalty | None = None, threshold: float | jax.Array = 0.0, chunk: int = 64) -> Params:
  """Both stages, from the meta-model to the model of a target task; see `adapt_gate` and `adapt_backbone`."""
  params = adapt_gate(loss, params, data, lr=gate_lr, steps=steps, penalty=penalty, threshold=threshold, chunk=chunk)
  return adapt_backbone(loss, params, data, lr=backbone_lr, steps=steps, chunk=chunk)

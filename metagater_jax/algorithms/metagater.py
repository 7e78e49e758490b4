"""MetaGater (Algorithm 1): federated meta-learning of backbone and gates by accelerated proximal gradient descent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagater_jax.accelerated_proximal import accelerated_proximal, accelerated_proximal_eval_params
from metagater_jax.adaptation import adapt_gate, calibrate_threshold, two_stage_adaptation
from metagater_jax.checks import check_positive
from metagater_jax.federated import Algorithm, ClientUpdate
from metagater_jax.local import Loss, local_solve
from metagater_jax.network import GatedNetwork
from metagater_jax.penalties import Penalty, no_penalty

__all__ = ["MetaGaterState", "default_beta", "metagater"]


class MetaGaterState(NamedTuple):
  """`md`, where the nodes start, and the optimizer's state with `x` and `ag`."""

  md: Any
  optimizer: Any


def default_beta(prox_weight: float) -> float:
  """β = 0.3/λ: above about 0.5/λ the growing γ_t diverges within a few hundred rounds, 0.1/λ is slow."""
  return 0.3 / prox_weight


def metagater(
    loss: Loss,
    *,
    local_lr: float,
    prox_weight: float = 15.0,
    local_steps: int = 1,
    beta: optax.ScalarOrSchedule | None = None,
    gamma: str | optax.ScalarOrSchedule = "ghadimi_lan",
    penalty: Penalty | None = None,
    penalty_weight: optax.ScalarOrSchedule = 0.0,
    adapt_lr: float = 0.05,
    gate_adapt_lr: float = 10.0,
    adapt_steps: int = 1,
    target_sparsity: float | None = None,
    network: GatedNetwork | None = None,
    chunk: int = 64,
    task_axis: str | int = "auto",
    before_server: optax.GradientTransformation | None = None,
) -> Algorithm:
  """Algorithm 1 on parameters w = (θ, φ); with an empty gate it is MetaGater without gating.

      md = (1 − α_t) ag + α_t x
      each i in the cohort:  w_i ≈ argmin_v L_i(v) + (λ/2)‖v − md‖²,  K steps of gradient descent from md
      d = λ · mean_i (md − w_i)
      x  = prox_{γ_t μ R}(x  − γ_t d)
      ag = prox_{β_t μ R}(md − β_t d)

  Args:
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    local_lr: η.
    prox_weight: λ.
    local_steps: K.
    beta: β_t; None is `default_beta`.
    gamma: γ_t, see `accelerated_proximal`.
    penalty: R on the parameters (`on_part(group_lasso(gate_groups), "gate")`); None: no penalty.
    penalty_weight: μ.
    adapt_lr, gate_adapt_lr, adapt_steps: η_θ, η_φ and steps of each stage of the adaptation.
    target_sparsity: mean sparsity that adapted tasks shall have; `calibrate` then finds κ of stage I on training tasks.
      None: κ = 0, the gate's gradient step alone decides.
    network: needed for `target_sparsity`.
    chunk: samples at a time in the adaptation.
    task_axis: see `map_tasks`, for the calibration.
    before_server: an optax transformation of d in front of the server's update, clipping for instance.

  Returns:
    An `Algorithm`; its meta-model is `ag`.
  """
  check_positive(local_lr=local_lr, prox_weight=prox_weight, local_steps=local_steps)
  if target_sparsity is not None and (network is None or not 0 <= target_sparsity < 1):
    raise ValueError("metagater: target_sparsity must lie in [0, 1) and needs the network, got "
                     f"target_sparsity={target_sparsity}, network={network}.")
  server = accelerated_proximal(
      penalty or no_penalty(), default_beta(prox_weight) if beta is None else beta, penalty_weight=penalty_weight,
      gamma=gamma)
  if before_server is not None:
    server = optax.chain(before_server, server)
  sgd = optax.sgd(local_lr)

  def init(params):
    return MetaGaterState(params, server.init(params))

  def client_update(md, draw):
    w_i, value = local_solve(loss, md, draw, prox_weight=prox_weight, steps=local_steps, optimizer=sgd)
    return ClientUpdate(jax.tree.map(lambda md, w: prox_weight * (md - w), md, w_i), {"loss": value})

  def server_update(state, d):
    updates, optimizer = server.update(d, state.optimizer, state.md)
    return MetaGaterState(optax.apply_updates(state.md, updates), optimizer)

  def calibrate(params, population, tasks, weight=None, axis_name=None):
    if target_sparsity is None or not params["gate"]:
      return jnp.zeros(())

    def stage_one(params, data):
      return adapt_gate(loss, params, data, lr=gate_adapt_lr, steps=adapt_steps, chunk=chunk)
    return calibrate_threshold(network, params, stage_one, population.train, tasks, target_sparsity, samples=chunk,
                               task_axis=task_axis, weight=weight, axis_name=axis_name)

  def adapt(params, data, threshold=0.0):
    return two_stage_adaptation(loss, params, data, gate_lr=gate_adapt_lr, backbone_lr=adapt_lr, steps=adapt_steps,
                                threshold=threshold, chunk=chunk)

  return Algorithm(
      init=init, broadcast=lambda state: state.md, client_update=client_update, server_update=server_update,
      deploy=lambda state: accelerated_proximal_eval_params(state.optimizer),
      calibrate=calibrate, adapt=adapt, draws=local_steps, mergeable=local_steps == 1)

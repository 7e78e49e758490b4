"""MetaGater (Algorithm 1): federated meta-learning of backbone and gates by accelerated proximal gradient descent."""

from typing import NamedTuple

import jax
import optax

from metagater_jax.core.checks import check_counts, check_positive
from metagater_jax.core.trees import Model, Params, like
from metagater_jax.data.batching import Loss, is_rowwise
from metagater_jax.federated.algorithm import ClientUpdate, FederatedAlgorithm
from metagater_jax.optim.accelerated_proximal import accelerated_proximal, accelerated_proximal_eval_params
from metagater_jax.optim.local_solver import local_solve
from metagater_jax.optim.metric import Rates, check_rates, in_metric
from metagater_jax.optim.penalties import Penalty, no_penalty

__all__ = ["MetaGaterState", "default_beta", "metagater"]


class MetaGaterState(NamedTuple):
  """`md`, where the clients start, and the optimizer's state with `x` and `ag`."""

  md: Params
  optimizer: optax.OptState


def default_beta(prox_weight: float) -> float:
  """β = 0.3/λ: above about 0.5/λ the growing γ_t diverges within a few hundred rounds, 0.1/λ is slow.

  Args:
    prox_weight: λ.

  Returns:
    β.
  """
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
  rates: Rates | None = None,
  before_server: optax.GradientTransformation | None = None,
) -> FederatedAlgorithm:
  """Algorithm 1 on parameters w = (θ, φ); with an empty gate it is MetaGater without gating. For rounds t = 1, 2, …

      (1)  md  = (1 − α_t) ag + α_t x
      (2)  w_i ≈ argmin_v L_i(v) + (λ/2)‖v − md‖²,  each i in the cohort: K steps of gradient descent from md
      (3)  d   = λ · mean_i (md − w_i)
      (4)  x   = prox_{γ_t μ R}(x  − γ_t d)
      (5)  ag  = prox_{β_t μ R}(md − β_t d)

  Lines 2 and 3 are the clients', lines 4, 5 and 1 the server's. Line 1 stands at the end there: the round that it opens begins with the
  broadcast of md, so the server computes md as soon as it has x and ag, and keeps it. Before the first round x = ag = md = w⁰.
  The meta-model is ag, whose proximal step makes exact zeros; a target task adapts it with `personalize.two_stage`.

  Args:
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    local_lr: η.
    prox_weight: λ.
    local_steps: K.
    beta: β_t; None is `default_beta`.
    gamma: γ_t, see `optim.accelerated_proximal`.
    penalty: R on the parameters (`optim.on_part(optim.group_lasso(nn.gate_groups), "gate")`); None: no penalty.
    penalty_weight: μ.
    rates: ρ by part of the parameters, {"gate": 30.0}: line 2 then measures ‖·‖² in the metric D⁻¹, and lines 4 and 5 take the prox in it, see
      `optim.metric`. A gate's gradient is small beside its backbone's, so that at a common rate it hardly moves. 1 is no change at all.
    before_server: an optax transformation of d in front of the server's update, clipping for instance.

  Returns:
    The algorithm; its server state is a `MetaGaterState`.

  Raises:
    ValueError: a rate, weight or number of steps that is not positive, or what `accelerated_proximal` refuses.
  """
  check_positive(local_lr=local_lr, prox_weight=prox_weight)
  check_counts(local_steps=local_steps)
  check_rates(rates)
  beta = default_beta(prox_weight) if beta is None else beta
  server = accelerated_proximal(in_metric(penalty or no_penalty(), rates), beta, penalty_weight=penalty_weight, gamma=gamma)
  if before_server is not None:
    server = optax.chain(before_server, server)
  sgd = optax.sgd(local_lr)

  def init(w):
    return MetaGaterState(md=w, optimizer=server.init(w))

  def client_update(md, draw):
    # (2)
    w_i, value = local_solve(loss, md, draw, optimizer=sgd, steps=local_steps, prox_weight=prox_weight, rates=rates)
    # (3), of which the round takes the mean over the cohort
    d_i = like(jax.tree.map(lambda md, w: prox_weight * (md - w), md, w_i), md)
    return ClientUpdate(d_i, {"loss": value})

  def server_update(state, d):
    # (4) and (5), and (1) of the next round as a step from this round's md
    step, optimizer = server.update(d, state.optimizer, state.md)
    return MetaGaterState(optax.apply_updates(state.md, step), optimizer)

  def deploy(state):
    return Model(accelerated_proximal_eval_params(state.optimizer))

  return FederatedAlgorithm(
    init=init,
    broadcast=lambda state: state.md,
    client_update=client_update,
    server_update=server_update,
    deploy=deploy,
    draws=local_steps,
    mergeable=local_steps == 1 and is_rowwise(loss),
  )

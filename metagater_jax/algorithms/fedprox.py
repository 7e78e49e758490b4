"""FedProx (Li et al. 2020): FedAvg with a pull of the local models to the global one."""

from metagater_jax.algorithms.averaging import averaging, local_training
from metagater_jax.checks import check_positive
from metagater_jax.federated import Algorithm
from metagater_jax.local import Loss

__all__ = ["fedprox"]


def fedprox(loss: Loss, *, local_lr: float, prox_weight: float = 0.1, local_steps: int = 1, adapt_lr: float = 0.1,
            adapt_steps: int = 1, chunk: int = 64) -> Algorithm:
  """w_i ≈ argmin_v L_i(v) + (μ/2)‖v − w‖², K gradient steps from w;  w ← mean_i w_i.

  "Federated Optimization in Heterogeneous Networks", MLSys 2020. The pull has no gradient at w, so with one local step it
  is FedAvg to the bit.

  Args:
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    local_lr, local_steps: η and K.
    prox_weight: μ of the reference (λ of MetaGater's local problem).
    adapt_lr, adapt_steps: of the gradient descent at a target task, on all of its train data.
    chunk: samples at a time in the adaptation.
  """
  check_positive(local_lr=local_lr, local_steps=local_steps, prox_weight=prox_weight)
  train = local_training(loss, lr=local_lr, steps=local_steps, prox_weight=prox_weight)
  return averaging(loss, train, draws=local_steps, mergeable=local_steps == 1, server_lr=1.0, adapt_lr=adapt_lr,
                   adapt_steps=adapt_steps, chunk=chunk)

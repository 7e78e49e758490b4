"""FedProx (Li et al. 2020): FedAvg with a pull of the local models to the global one."""

from metagater_jax.core.checks import check_positive
from metagater_jax.data.batching import Loss, is_rowwise
from metagater_jax.federated.algorithm import FederatedAlgorithm
from metagater_jax.federated.averaging import averaging, local_training

__all__ = ["fedprox"]


def fedprox(loss: Loss, *, local_lr: float, prox_weight: float = 0.1, local_steps: int = 1) -> FederatedAlgorithm:
  """w_i ≈ argmin_v L_i(v) + (μ/2)‖v − w‖², K gradient steps from w;  w ← mean_i w_i.

  "Federated Optimization in Heterogeneous Networks", MLSys 2020. The pull has no gradient at w, so with one local step it
  is FedAvg to the bit.

  Args:
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    local_lr, local_steps: η and K.
    prox_weight: μ of the reference (λ of MetaGater's local problem).

  Returns:
    The algorithm.

  Raises:
    ValueError: a rate, weight or number of steps that is not positive.
  """
  check_positive(prox_weight=prox_weight)
  train = local_training(loss, lr=local_lr, steps=local_steps, prox_weight=prox_weight)
  return averaging(train, draws=local_steps, mergeable=local_steps == 1 and is_rowwise(loss))

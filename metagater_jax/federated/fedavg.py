"""FedAvg (McMahan et al. 2017): local gradient descent, average."""

from metagater_jax.data.batching import Loss, is_rowwise
from metagater_jax.federated.algorithm import FederatedAlgorithm
from metagater_jax.federated.averaging import averaging, local_training

__all__ = ["fedavg"]


def fedavg(loss: Loss, *, local_lr: float, local_steps: int = 1) -> FederatedAlgorithm:
  """w_i = w after K steps v ← v − η ∇L_i(v; B) on fresh minibatches B;  w ← mean_i w_i.

  "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017. As in the MetaGater paper, a
  target task gets one gradient step from w before it is tested (`personalize.fine_tune`).

  Args:
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    local_lr, local_steps: η and K.

  Returns:
    The algorithm.

  Raises:
    ValueError: a rate or number of steps that is not positive.
  """
  return averaging(local_training(loss, lr=local_lr, steps=local_steps), draws=local_steps, mergeable=local_steps == 1 and is_rowwise(loss))

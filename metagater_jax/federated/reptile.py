"""Reptile (Nichol et al. 2018): move a part of the way to where local training leads."""

from metagater_jax.data.batching import Loss, is_rowwise
from metagater_jax.federated.algorithm import FederatedAlgorithm
from metagater_jax.federated.averaging import averaging, local_training

__all__ = ["reptile"]


def reptile(loss: Loss, *, local_lr: float, server_lr: float = 0.5, local_steps: int = 5) -> FederatedAlgorithm:
  """w_i = w after K steps of gradient descent on task i;  w ← w + ε mean_i (w_i − w).

  "On First-Order Meta-Learning Algorithms", arXiv 1803.02999, in its batched form. What makes it meta-learning is K > 1:
  with K = 1 it is FedAvg at the rate ε η. On few-shot episodes it is `fewshot.meta_reptile`.

  Args:
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    local_lr, local_steps: η and K.
    server_lr: ε.

  Returns:
    The algorithm.

  Raises:
    ValueError: a rate or number of steps that is not positive.
  """
  train = local_training(loss, lr=local_lr, steps=local_steps)
  return averaging(train, draws=local_steps, mergeable=local_steps == 1 and is_rowwise(loss), server_lr=server_lr)

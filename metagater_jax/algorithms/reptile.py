"""Reptile (Nichol et al. 2018): move a part of the way to where local training leads."""

from metagater_jax.algorithms.averaging import averaging, local_training
from metagater_jax.checks import check_positive
from metagater_jax.federated import Algorithm
from metagater_jax.local import Loss

__all__ = ["reptile"]


def reptile(loss: Loss, *, local_lr: float, server_lr: float = 0.5, local_steps: int = 5, adapt_lr: float = 0.1,
            adapt_steps: int = 1, chunk: int = 64) -> Algorithm:
  """w_i = w after K steps of gradient descent on task i;  w ← w + ε mean_i (w_i − w).

  "On First-Order Meta-Learning Algorithms", arXiv 1803.02999, in its batched form. What makes it meta-learning is K > 1:
  with K = 1 it is FedAvg at the rate ε η.

  Args:
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    local_lr, local_steps: η and K.
    server_lr: ε.
    adapt_lr, adapt_steps: of the gradient descent at a target task, on all of its train data.
    chunk: samples at a time in the adaptation.
  """
  check_positive(local_lr=local_lr, local_steps=local_steps)
  train = local_training(loss, lr=local_lr, steps=local_steps)
  return averaging(loss, train, draws=local_steps, mergeable=local_steps == 1, server_lr=server_lr, adapt_lr=adapt_lr,
                   adapt_steps=adapt_steps, chunk=chunk)

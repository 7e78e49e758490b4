"""FedAvg (McMahan et al. 2017): local gradient descent, average."""

from metagater_jax.algorithms.averaging import averaging, local_training
from metagater_jax.checks import check_positive
from metagater_jax.federated import Algorithm
from metagater_jax.local import Loss

__all__ = ["fedavg"]


def fedavg(loss: Loss, *, local_lr: float, local_steps: int = 1, adapt_lr: float = 0.1, adapt_steps: int = 1,
           chunk: int = 64) -> Algorithm:
  """w_i = w after K steps v ← v − η ∇L_i(v; B) on fresh minibatches B;  w ← mean_i w_i.

  "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017. As in the MetaGater paper, a
  target task gets one gradient step from w before it is tested.

  Args:
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    local_lr, local_steps: η and K.
    adapt_lr, adapt_steps: of the gradient descent at a target task, on all of its train data.
    chunk: samples at a time in the adaptation.
  """
  check_positive(local_lr=local_lr, local_steps=local_steps)
  train = local_training(loss, lr=local_lr, steps=local_steps)
  return averaging(loss, train, draws=local_steps, mergeable=local_steps == 1, server_lr=1.0, adapt_lr=adapt_lr,
                   adapt_steps=adapt_steps, chunk=chunk)

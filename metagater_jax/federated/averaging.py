"""What FedAvg, FedProx, Per-FedAvg, pFedMe and Reptile share: the server moves by the clients' mean change."""

from collections.abc import Callable

import jax
import optax

from metagater_jax.core.checks import check_counts, check_positive
from metagater_jax.core.trees import Model, like
from metagater_jax.data.batching import Loss
from metagater_jax.federated.algorithm import ClientUpdate, FederatedAlgorithm
from metagater_jax.optim.local_solver import local_solve

__all__ = ["averaging", "local_training"]


def averaging(client_update: Callable[..., ClientUpdate], *, draws: int, server_lr: float = 1.0, mergeable: bool = False) -> FederatedAlgorithm:
  """w ← w + ε mean_i (w_i − w) over the cohort.

  Args:
    client_update: `(w, draw) -> ClientUpdate` whose delta is w_i − w.
    draws, mergeable: see `FederatedAlgorithm`.
    server_lr: ε; 1 puts the average of the clients' models in the place of w.

  Returns:
    The algorithm.

  Raises:
    ValueError: a rate that is not positive.
  """
  check_positive(server_lr=server_lr)

  def server_update(w, mean_delta):
    return like(jax.tree.map(lambda w, d: w + server_lr * d, w, mean_delta), w)

  return FederatedAlgorithm(
    init=lambda w: w, broadcast=lambda w: w, client_update=client_update, server_update=server_update, deploy=Model, draws=draws, mergeable=mergeable
  )


def local_training(loss: Loss, *, lr: float, steps: int, prox_weight: float = 0.0) -> Callable[..., ClientUpdate]:
  """A client update whose delta is w_i − w, with w_i from `steps` steps of gradient descent on L_i(v) + (λ/2)‖v − w‖².

  Args:
    loss: L_i, `(params, batch, key) -> scalar`.
    lr, steps: of the gradient descent.
    prox_weight: λ.

  Returns:
    `(w, draw) -> ClientUpdate`.

  Raises:
    ValueError: a rate or number of steps that is not positive.
  """
  check_positive(local_lr=lr)
  check_counts(local_steps=steps)
  sgd = optax.sgd(lr)

  def client_update(w, draw):
    w_i, value = local_solve(loss, w, draw, optimizer=sgd, steps=steps, prox_weight=prox_weight)
    return ClientUpdate(jax.tree.map(lambda a, b: a - b, w_i, w), {"loss": value})

  return client_update

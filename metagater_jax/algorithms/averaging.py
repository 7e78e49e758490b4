"""What FedAvg, FedProx, Per-FedAvg, pFedMe and Reptile share: the server moves by the nodes' mean change."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from metagater_jax.adaptation import fine_tune
from metagater_jax.checks import check_positive
from metagater_jax.federated import Algorithm, ClientUpdate
from metagater_jax.local import Loss, local_solve

__all__ = ["averaging", "local_training"]


def averaging(loss: Loss, client_update: Callable[..., ClientUpdate], *, draws: int, server_lr: float, adapt_lr: float,
              adapt_steps: int, chunk: int, mergeable: bool = False) -> Algorithm:
  """w ← w + ε mean_i (w_i − w) over the cohort; a target task starts from w with gradient descent (`fine_tune`).

  Args:
    loss: L_i, for the adaptation.
    client_update: `(w, draw) -> ClientUpdate` whose delta is w_i − w.
    draws, mergeable: see `Algorithm`.
    server_lr: ε; 1 puts the average of the nodes' models in the place of w.
    adapt_lr, adapt_steps, chunk: of the adaptation, see `fine_tune`.
  """
  check_positive(server_lr=server_lr, adapt_lr=adapt_lr, adapt_steps=adapt_steps)

  def server_update(w, mean_delta):
    return jax.tree.map(lambda w, d: w + server_lr * d, w, mean_delta)

  def adapt(w, data, calibration=None):
    del calibration  # these methods need nothing but the model
    return fine_tune(loss, w, data, lr=adapt_lr, steps=adapt_steps, chunk=chunk)

  return Algorithm(init=lambda w: w, broadcast=lambda w: w, client_update=client_update, server_update=server_update,
                   deploy=lambda w: w, calibrate=lambda *arguments: jnp.zeros(()), adapt=adapt, draws=draws,
                   mergeable=mergeable)


def local_training(loss: Loss, *, lr: float, steps: int, prox_weight: float = 0.0) -> Callable[..., ClientUpdate]:
  """A client update whose delta is w_i − w, with w_i from `steps` steps of gradient descent on L_i(v) + (λ/2)‖v − w‖²."""
  sgd = optax.sgd(lr)

  def client_update(w, draw):
    w_i, value = local_solve(loss, w, draw, prox_weight=prox_weight, steps=steps, optimizer=sgd)
    return ClientUpdate(jax.tree.map(lambda a, b: a - b, w_i, w), {"loss": value})
  return client_update

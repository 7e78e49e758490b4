"""pFedMe (Dinh et al. 2020): Moreau envelopes without acceleration, with its own loop of local rounds."""

import jax
import jax.numpy as jnp
import optax

from metagater_jax.core.checks import check_counts, check_positive
from metagater_jax.core.trees import like
from metagater_jax.data.batching import Loss
from metagater_jax.federated.algorithm import ClientUpdate, FederatedAlgorithm
from metagater_jax.federated.averaging import averaging
from metagater_jax.optim.local_solver import local_solve

__all__ = ["pfedme"]


def pfedme(
  loss: Loss, *, local_lr: float, personal_lr: float, prox_weight: float = 15.0, local_steps: int = 1, inner_steps: int = 5, server_lr: float = 1.0
) -> FederatedAlgorithm:
  """R local rounds, each on a fresh minibatch B:  θ ≈ argmin_v L_i(v; B) + (λ/2)‖v − w_i‖²,  w_i ← w_i − η λ (w_i − θ).

  Then w ← (1 − β) w + β mean_i w_i. "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020, Algorithm 1; θ is
  found by K gradient steps on the round's one minibatch, from the θ of the local round before (the first: from w), as in
  the authors' code. At a target task the personalized model starts from w, where the pull has no gradient: with one step it is the
  gradient step of the other methods (`personalize.fine_tune`).

  Args:
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    local_lr, local_steps: η and R.
    personal_lr, inner_steps: rate and number K of the gradient steps for θ.
    prox_weight: λ.
    server_lr: β.

  Returns:
    The algorithm.

  Raises:
    ValueError: a rate, weight or number of steps that is not positive.
  """
  check_positive(local_lr=local_lr, personal_lr=personal_lr, prox_weight=prox_weight)
  check_counts(local_steps=local_steps, inner_steps=inner_steps)
  sgd = optax.sgd(personal_lr)

  def client_update(w, draw):
    def local_round(carry, i):
      w_i, theta = carry
      batch, key = draw(i)
      theta, value = local_solve(
        loss, w_i, lambda k: (batch, jax.random.fold_in(key, k)), optimizer=sgd, steps=inner_steps, prox_weight=prox_weight, start=theta
      )
      return (like(jax.tree.map(lambda w, theta: w - local_lr * prox_weight * (w - theta), w_i, theta), w_i), theta), value

    (w_i, _), values = jax.lax.scan(local_round, (w, w), jnp.arange(local_steps))
    return ClientUpdate(jax.tree.map(lambda a, b: a - b, w_i, w), {"loss": values.mean()})

  return averaging(client_update, draws=local_steps, server_lr=server_lr)

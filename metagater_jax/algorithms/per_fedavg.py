"""Per-FedAvg (Fallah et al. 2020): federated MAML, in three ways to treat the Hessian."""

import jax
import jax.numpy as jnp
import optax

from metagater_jax.algorithms.averaging import averaging
from metagater_jax.checks import check_positive
from metagater_jax.federated import Algorithm, ClientUpdate
from metagater_jax.local import Loss

__all__ = ["META_GRADIENTS", "per_fedavg"]

META_GRADIENTS = ("first_order", "hessian_free", "exact")


def per_fedavg(loss: Loss, *, local_lr: float, inner_lr: float, meta_gradient: str = "first_order", local_steps: int = 1,
               adapt_lr: float = 0.1, adapt_steps: int = 1, hessian_step: float = 1e-2, chunk: int = 64) -> Algorithm:
  """K local meta-steps w_i ← w_i − β ∇_w L_i(w − α ∇L_i(w; B₁); B₂) on fresh minibatches B₁, B₂;  w ← mean_i w_i.

  "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning Approach", NeurIPS 2020. With
  w̃ = w − α ∇L_i(w; B₁) and g = ∇L_i(w̃; B₂) the meta-gradient is (I − α ∇²L_i(w; B₁)) g, and

  * `first_order` takes g: two gradients per step;
  * `hessian_free` replaces ∇²L_i(w) g by [∇L_i(w + δg) − ∇L_i(w − δg)] / 2δ: four gradients per step;
  * `exact` differentiates through the inner step.

  Args:
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    local_lr, local_steps: β and K.
    inner_lr: α, the rate of the adaptation that is learned for; usually `adapt_lr`.
    meta_gradient: one of the above.
    adapt_lr, adapt_steps: of the gradient descent at a target task, on all of its train data.
    hessian_step: length ‖δg‖ of the difference in `hessian_free`, relative to 1 + ‖w‖: float32 gradients are no good for
      much shorter ones.
    chunk: samples at a time in the adaptation.
  """
  check_positive(local_lr=local_lr, local_steps=local_steps, inner_lr=inner_lr, hessian_step=hessian_step)
  if meta_gradient not in META_GRADIENTS:
    raise ValueError(f"per_fedavg: meta_gradient must be one of {', '.join(META_GRADIENTS)}, got {meta_gradient!r}.")
  gradient = jax.grad(loss)

  def value_and_meta_gradient(w, inner, outer):
    """Of w ↦ L(w − α∇L(w; B₁); B₂), and its value; `inner` and `outer` are (batch, key)."""
    def adapted_loss(w):
      w_tilde = jax.tree.map(lambda w, g: w - inner_lr * g, w, gradient(w, *inner))
      return loss(w_tilde, *outer)

    if meta_gradient == "exact":
      return jax.value_and_grad(adapted_loss)(w)
    w_tilde = jax.tree.map(lambda w, g: w - inner_lr * g, w, gradient(w, *inner))
    value, g = jax.value_and_grad(loss)(w_tilde, *outer)
    if meta_gradient == "hessian_free":
      norm = optax.tree.norm(g)
      delta = jnp.where(norm > 0, hessian_step * (1 + optax.tree.norm(w)) / jnp.where(norm > 0, norm, 1), 1)
      ahead, behind = (gradient(jax.tree.map(lambda w, g: w + sign * delta * g, w, g), *inner) for sign in (1, -1))
      g = jax.tree.map(lambda g, a, b: g - inner_lr * (a - b) / (2 * delta), g, ahead, behind)
    return value, g

  def client_update(w, draw):
    def step(w_i, i):
      value, g = value_and_meta_gradient(w_i, draw(2 * i), draw(2 * i + 1))
      return jax.tree.map(lambda w, g: w - local_lr * g, w_i, g), value

    w_i, values = jax.lax.scan(step, w, jnp.arange(local_steps))
    return ClientUpdate(jax.tree.map(lambda a, b: a - b, w_i, w), {"loss": values.mean()})

  return averaging(loss, client_update, draws=2 * local_steps, server_lr=1.0, adapt_lr=adapt_lr, adapt_steps=adapt_steps,
                   chunk=chunk)

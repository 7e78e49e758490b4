"""Per-FedAvg (Fallah et al. 2020): federated MAML, in three ways to treat the Hessian."""

import jax
import jax.numpy as jnp

from metagater_jax.core.checks import check_counts, check_one_of, check_positive
from metagater_jax.core.trees import like
from metagater_jax.data.batching import Loss
from metagater_jax.federated.algorithm import ClientUpdate, FederatedAlgorithm
from metagater_jax.federated.averaging import averaging
from metagater_jax.optim.inner_loop import DERIVATIVES, descend

__all__ = ["per_fedavg"]


def per_fedavg(
  loss: Loss, *, local_lr: float, inner_lr: float, derivative: str = "first_order", local_steps: int = 1, hessian_step: float = 1e-2
) -> FederatedAlgorithm:
  """K local meta-steps w_i ← w_i − β ∇_w L_i(w − α ∇L_i(w; B₁); B₂) on fresh minibatches B₁, B₂;  w ← mean_i w_i.

  "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning Approach", NeurIPS 2020. With
  w̃ = w − α ∇L_i(w; B₁) and g = ∇L_i(w̃; B₂) the meta-gradient is (I − α ∇²L_i(w; B₁)) g, and

  * `first_order` takes g: two gradients per step;
  * `hessian_free` replaces ∇²L_i(w) g by [∇L_i(w + δg) − ∇L_i(w − δg)] / 2δ: four gradients per step;
  * `exact` differentiates through the inner step.

  Args:
    loss: L_i on a minibatch, `(params, batch, key) -> scalar`.
    local_lr, local_steps: β and K.
    inner_lr: α, the rate of the adaptation that is learned for; usually that of the targets.
    derivative: one of the above, see `optim.descend`.
    hessian_step: length ‖δg‖ of the difference in `hessian_free`, relative to 1 + ‖w‖.

  Returns:
    The algorithm.

  Raises:
    ValueError: a rate or number of steps that is not positive, or an unknown derivative.
  """
  check_positive(local_lr=local_lr, inner_lr=inner_lr, hessian_step=hessian_step)
  check_counts(local_steps=local_steps)
  check_one_of("derivative", derivative, DERIVATIVES)

  def meta_objective(w, inner, outer):
    """M_i(w) = L_i(w − α ∇L_i(w; B₁); B₂); `inner` and `outer` are (batch, key)."""
    adapted = descend(loss, w, lambda _: inner, rates=inner_lr, derivative=derivative, hessian_step=hessian_step)
    return loss(adapted, *outer)

  def client_update(w, draw):
    def step(w_i, i):
      value, gradient = jax.value_and_grad(meta_objective)(w_i, draw(2 * i), draw(2 * i + 1))
      return like(jax.tree.map(lambda w, g: w - local_lr * g, w_i, gradient), w_i), value

    w_i, values = jax.lax.scan(step, w, jnp.arange(local_steps))
    return ClientUpdate(jax.tree.map(lambda a, b: a - b, w_i, w), {"loss": values.mean()})

  return averaging(client_update, draws=2 * local_steps)

"""Fine-tuning: gradient descent on a target task's data, how the baselines adapt."""

import jax

from metagater_jax.core.checks import check_counts, check_positive
from metagater_jax.core.trees import Params, like
from metagater_jax.data.batching import Loss, full_batch_gradient
from metagater_jax.data.population import Batch, TaskData
from metagater_jax.personalize.personalizer import Personalizer, no_calibration
from metagater_jax.pruning.masks import masked_loss

__all__ = ["fine_tune", "gradient_steps"]


def fine_tune(loss: Loss, *, lr: float = 0.1, steps: int = 1, chunk: int = 64) -> Personalizer:
  """w_i = w − η ∇L_i(w) on all of a task's train data, repeated.

  Args:
    loss: L_i, `(params, batch, key) -> scalar`; the key is None here.
    lr, steps: η and how often.
    chunk: samples at a time.

  Returns:
    The personalizer.

  Raises:
    ValueError: a rate or number of steps that is not positive.
  """
  check_positive(lr=lr)
  check_counts(steps=steps, chunk=chunk)

  def adapt(model, data, calibration=None):
    del calibration
    return model._replace(params=gradient_steps(masked_loss(loss, model.mask), model.params, data, lr=lr, steps=steps, chunk=chunk))

  return Personalizer(no_calibration, adapt)


def gradient_steps(loss: Loss, params: Params, data: TaskData | Batch, *, lr: float, steps: int = 1, chunk: int = 64) -> Params:
  """w − η ∇L(w) on all of the data, `steps` times; `params` may be any pytree, other arguments are those of `fine_tune`.

  Args:
    loss, lr, steps, chunk: as in `fine_tune`.
    params: where the steps start.
    data: of the task.

  Returns:
    A pytree like `params`.
  """
  for _ in range(steps):
    _, gradient = full_batch_gradient(loss, params, data, chunk)
    params = like(jax.tree.map(lambda w, g: w - lr * g, params, gradient), params)
  return params

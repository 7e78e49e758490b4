"""Few-shot meta-learners in one interface: MAML, first-order MAML, ANIL and Reptile.

All of them know a network only by its loss, as everything in this library does, and parameters are any pytree. A mask on the
parameters (`metagater_jax.pruning`) holds through the inner loop: what it removes stays exactly 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagater_jax.core.checks import check_counts, check_one_of, check_positive
from metagater_jax.core.trees import Model, Params, like, precision_of
from metagater_jax.data.batching import Loss
from metagater_jax.optim.inner_loop import DERIVATIVES, descend
from metagater_jax.optim.local_solver import local_solve
from metagater_jax.personalize.personalizer import Personalizer, no_calibration
from metagater_jax.pruning.masks import apply_mask, masked_loss

__all__ = ["MetaLearner", "anil", "maml", "meta_reptile"]


class MetaLearner(NamedTuple):
  """A meta-learner as pure functions of pytrees.

  Attributes:
    init: `params -> meta-parameters`: the parameters themselves, or with what else is learned beside them.
    meta_loss: `(meta-parameters, episode, mask=None, derivative=None) -> scalar` L_query(A_T(w)), to be differentiated;
      `derivative`, one of `metagater_jax.optim.DERIVATIVES`, says how (None: as the learner itself does).
    meta_gradient: `(meta-parameters, episode, mask=None) -> (query loss, gradient)`, what the outer optimizer gets.
    deploy: `(meta-parameters, mask=None) -> (Model, calibration)` that a new task starts from; the calibration holds what is learned
      beside the network, as inner rates.
    personalizer: how a new task adapts: the inner loop A_T on its support, a `Batch`.
  """

  init: Callable[[Params], Params]
  meta_loss: Callable[..., jax.Array]
  meta_gradient: Callable[..., tuple[jax.Array, Params]]
  deploy: Callable[..., tuple[Model, Any]]
  personalizer: Personalizer

  def adapt(self, meta_params: Params, support: Any, mask: Params | None = None) -> Params:
    """The network's parameters adapted to a task's support, a `Batch`."""
    model, rates = self.deploy(meta_params, mask)
    return self.personalizer.adapt(model, support, rates).params


def maml(
  loss: Loss,
  *,
  inner_lr: float,
  inner_steps: int = 1,
  derivative: str = "exact",
  learn_rates: bool = False,
  adapted: Callable[[str], bool] | None = None,
) -> MetaLearner:
  """Model-agnostic meta-learning (Finn et al. 2017): A_T(w) = w − α ∇L_support(w), `inner_steps` times;  min_w E_T L_query(A_T(w)).

  Args:
    loss: `(params, batch, key) -> scalar`; the key is None here.
    inner_lr: α, or where it starts if it is learned.
    inner_steps: of gradient descent on the whole support set.
    derivative: "exact" (through the inner loop) or "first_order" (the gradient at the adapted weights, FOMAML); see `optim.descend`.
    learn_rates: one α per leaf of the parameters, learned with them (Meta-SGD by layers). Meta-parameters are then
      {"weights": params, "inner_lr": one scalar per leaf}.
    adapted: `name -> bool`, which leaves the inner loop changes; None: all. Names are like "backbone/conv1/kernel".

  Returns:
    The learner.

  Raises:
    ValueError: a rate or number of steps that is not positive, or an unknown derivative.
  """
  check_positive(inner_lr=inner_lr)
  check_counts(inner_steps=inner_steps)
  check_one_of("derivative", derivative, DERIVATIVES)
  own_derivative = derivative

  def init(params):
    if not learn_rates:
      return params
    return {"weights": params, "inner_lr": jax.tree.map(lambda w: jnp.asarray(inner_lr, precision_of(w)), params)}

  def deploy(meta_params, mask=None):
    if not learn_rates:
      return Model(meta_params, mask), None
    return Model(meta_params["weights"], None if mask is None else mask["weights"]), meta_params["inner_lr"]

  def inner_loop(model, rates, support, derivative="exact"):
    return descend(
      loss,
      model.params,
      lambda _: (support, None),
      rates=inner_lr if rates is None else rates,
      steps=inner_steps,
      derivative=derivative,
      mask=model.mask,
      adapted=adapted,
    )

  def meta_loss(meta_params, episode, mask=None, derivative=None):
    solution = inner_loop(*deploy(meta_params, mask), episode.support, derivative or own_derivative)
    return loss(solution, episode.query, None)

  def adapt(model, support, rates=None):
    return model._replace(params=inner_loop(model, rates, support))

  return MetaLearner(init, meta_loss, jax.value_and_grad(meta_loss), deploy, Personalizer(no_calibration, adapt))


def anil(loss: Loss, *, head: str, **options: Any) -> MetaLearner:
  """Almost no inner loop (Raghu et al. 2020): MAML whose inner loop changes the last layer only.

  Args:
    loss: `(params, batch, key) -> scalar`.
    head: name of the last layer, a part of its leaves' names; `nn.head_of(backbone, image_shape)` knows it.
    **options: of `maml`.

  Returns:
    The learner.

  Raises:
    ValueError: as `maml`; from the inner loop, a head that no leaf is part of.
  """
  return maml(loss, adapted=lambda name: head in name.split("/"), **options)


def meta_reptile(loss: Loss, *, inner_lr: float, inner_steps: int = 5) -> MetaLearner:
  """Reptile (Nichol et al. 2018) on episodes: the outer optimizer follows (w − w_T) / α, w_T after local training on a task.

  It is `metagater_jax.federated.reptile` whose clients are episodes and whose server is the outer optimizer. In meta-training step i of the
  local training has every `inner_steps`-th sample of support and query together, so that the minibatches of a task differ, as Reptile needs
  it; adaptation to a new task has its support alone. `meta_loss` is the query loss after that, which a pruning score may differentiate;
  Reptile itself never does.

  Args:
    loss: `(params, batch, key) -> scalar`.
    inner_lr: α.
    inner_steps: of gradient descent.

  Returns:
    The learner.

  Raises:
    ValueError: a rate that is not positive; from `meta_gradient`, fewer samples in an episode than steps.
  """
  check_counts(inner_steps=inner_steps)
  plain = maml(loss, inner_lr=inner_lr, inner_steps=inner_steps, derivative="first_order")

  def meta_gradient(params, episode, mask=None):
    samples = jax.tree.map(lambda *parts: jnp.concatenate(parts), *episode)
    count = samples.labels.shape[0] // inner_steps
    if not count:
      raise ValueError(f"{samples.labels.shape[0]} samples of an episode are not enough for {inner_steps} inner steps.")
    deal = lambda i: (jax.tree.map(lambda x: x[i + inner_steps * jnp.arange(count)], samples), None)
    start = params if mask is None else apply_mask(params, mask)
    solution, _ = local_solve(masked_loss(loss, mask), start, deal, optimizer=optax.sgd(inner_lr), steps=inner_steps)
    return loss(solution, episode.query, None), like(jax.tree.map(lambda w, v: (w - v) / inner_lr, params, solution), params)

  return plain._replace(meta_gradient=meta_gradient)

"""The two stages on a device that has room for a number of channels: stage two computes and differentiates only what the gate kept."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagater_jax.core.trees import Params
from metagater_jax.data.batching import Loss, mean_over_task
from metagater_jax.data.population import Batch, TaskData
from metagater_jax.deploy.compact import Cutting
from metagater_jax.nn.gated import GatedNetwork, classification_loss
from metagater_jax.personalize.fine_tune import gradient_steps
from metagater_jax.personalize.two_stage import adapt_gate
from metagater_jax.pruning.masks import highest_first

__all__ = ["BudgetAdaptation", "within_budget"]


class BudgetAdaptation(NamedTuple):
  """Adaptation to a network of a fixed size.

  Attributes:
    network: the small one, without gates.
    adapt: `(meta-parameters, data) -> (its parameters, numbers of the channels that are kept by group)`, under `jit` or not.
    cutting: how one comes from the other.
  """

  network: GatedNetwork
  adapt: Callable[[Params, TaskData | Batch], tuple[Params, dict[str, jax.Array]]]
  cutting: Cutting


def within_budget(
  network: GatedNetwork,
  image_shape: tuple[int, ...],
  keep: Mapping[str, int],
  *,
  gate_lr: float = 10.0,
  lr: float = 0.05,
  steps: int = 1,
  gate_steps: int = 1,
  loss_of: Callable[[GatedNetwork], Loss] = classification_loss,
  chunk: int = 64,
) -> BudgetAdaptation:
  """`two_stage(keep=…)` whose second stage runs on the kept channels alone.

  Stage I takes a step of the gates; of each layer the channels of the highest mean log-odds on the task's data are kept, always on; stage II
  descends on the network of these. Its result is what `two_stage` gives, without the weights of channels that are off, for the work of the small
  network. What lies below the first gate is the same in both stages, and a compiler computes it once where the data is one `Batch`.

  Args:
    network: the meta-model's, with gates.
    image_shape: of one image, without the batch axis.
    keep: how many channels, by gated layer.
    gate_lr, lr: η_φ and η_θ.
    steps, gate_steps: of stage II and of stage I.
    loss_of: network to loss; on devices `device_loss`.
    chunk: samples at a time.

  Returns:
    The small network, and how parameters come to be its.

  Raises:
    ValueError: `keep` that does not name the gated layers, or numbers that they cannot have.
  """
  if set(keep) != set(network.gated_layers):
    raise ValueError(f"within_budget: keep must say how many channels each gated layer keeps ({', '.join(network.gated_layers)}), got {dict(keep)}.")
  layers = network.layers(image_shape)
  maker = {gate: next(layer.name for layer in layers if gate in layer.modules) for gate in network.gated_layers}
  cutting = Cutting(network, image_shape, {maker[gate]: count for gate, count in keep.items()}, network.gated_layers)
  small_loss = loss_of(cutting.network)

  def adapt(params, data):
    params = adapt_gate(loss_of(network), params, data, lr=gate_lr, steps=gate_steps, chunk=chunk)
    log_odds = mean_over_task(lambda batch: network.outputs(params, batch.images).log_odds, data, chunk)
    index = {
      cutting.groups[maker[gate]]: _numbers(highest_first(log_odds[gate]) < keep[gate], keep[gate])
      for gate in network.gated_layers
      if maker[gate] in cutting.groups
    }
    small = cutting.take(params, index)
    loss = lambda backbone, batch, key: small_loss({**small, "backbone": backbone}, batch, key)
    return {**small, "backbone": gradient_steps(loss, small["backbone"], data, lr=lr, steps=steps, chunk=chunk)}, index

  return BudgetAdaptation(cutting.network, adapt, cutting)


def _numbers(kept, count):
  """The numbers of the `count` entries that are True, in their order; by comparisons and sums, which every runtime has."""
  numbers = jnp.arange(kept.shape[0])
  place = (kept[None] & (numbers[None] < numbers[:, None])).sum(1, dtype=jnp.int32)
  return jnp.where((place[None] == jnp.arange(count)[:, None]) & kept[None], numbers[None], 0).sum(1, dtype=jnp.int32)

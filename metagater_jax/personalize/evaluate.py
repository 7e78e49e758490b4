"""How good a model is on a task's test data, and over all target tasks before and after adaptation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagater_jax.core.tasks import map_tasks
from metagater_jax.core.trees import Model, named_leaves
from metagater_jax.data.batching import mean_over_task
from metagater_jax.data.population import Population, TaskData
from metagater_jax.nn.cost import gate_cost, gated_macs, gated_parameters
from metagater_jax.nn.gated import GatedNetwork
from metagater_jax.nn.gates import sparsity
from metagater_jax.personalize.gate_statistics import GateStatistics, gate_measures
from metagater_jax.personalize.personalizer import Personalizer
from metagater_jax.pruning.masks import mask_sparsity

__all__ = ["TaskMetrics", "evaluate_targets", "evaluate_task"]


class TaskMetrics(NamedTuple):
  """Means over the test samples of one task (or arrays of them over tasks).

  Attributes:
    accuracy: fraction classified correctly, among all classes of the network.
    loss: cross-entropy.
    sparsity: fraction of gated channels that are off; 0 without gates.
    macs: multiply-accumulates per sample, gates included, of the channels that are on.
    parameters: that remain when channels are cut out which no test sample uses, gates included.
    on_rate: (channels,) by gated layer: fraction of the samples that switch each channel on.
    removed: fraction of the prunable weights that the model's mask removes; 0 without a mask, or where nothing is said to be prunable.
    kept: (channels,) by pruned layer: fraction of each output channel's weights that the mask keeps; empty without a mask.
    gates: what the gates do; None without gates.
  """

  accuracy: jax.Array
  loss: jax.Array
  sparsity: jax.Array
  macs: jax.Array
  parameters: jax.Array
  on_rate: dict[str, jax.Array]
  removed: jax.Array
  kept: dict[str, jax.Array]
  gates: GateStatistics | None = None


def evaluate_task(network: GatedNetwork, model: Model, data: TaskData, *, chunk: int = 64, prunable: Any = None) -> TaskMetrics:
  """A model on one task's samples, `chunk` at a time.

  Args:
    network: whose parameters `model.params` are.
    model: before or after adaptation.
    data: the samples.
    chunk: samples at a time.
    prunable: `(name, leaf) -> bool`, which leaves of the mask `removed` is about (`Personalizer.prunable`); None: it is 0.

  Returns:
    The metrics, without a task axis.
  """
  layers = network.layers(data.images.shape[1:])

  def measure(batch):
    logits, masks = network.apply(model.params, batch.images)
    samples = batch.labels.shape
    return {
      "accuracy": (logits.argmax(-1) == batch.labels).astype(jnp.float32),
      "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels),
      "sparsity": sparsity(masks) if masks else jnp.zeros(samples),
      "macs": jnp.broadcast_to(gated_macs(layers, masks), samples),
      "on_rate": masks,
      "gates": gate_measures(logits, masks, batch.labels) if masks else None,
    }

  mean = mean_over_task(measure, data, chunk)
  gate_macs, gate_parameters = gate_cost(layers, network.gated_layers, network.hidden)
  used = {name: rate > 0 for name, rate in mean["on_rate"].items()}
  removed, kept = jnp.zeros(()), {}
  if model.mask is not None and prunable is not None:
    removed = mask_sparsity(model.mask, prunable)
    kept = {
      name.removeprefix("backbone/").removesuffix("/kernel"): leaf.reshape(-1, leaf.shape[-1]).mean(0)
      for name, leaf in named_leaves(model.mask).items()
      if prunable(name, leaf)
    }
  return TaskMetrics(
    mean["accuracy"],
    mean["loss"],
    mean["sparsity"],
    mean["macs"] + gate_macs,
    gated_parameters(layers, used) + gate_parameters,
    mean["on_rate"],
    removed,
    kept,
    mean["gates"],
  )


def evaluate_targets(
  network: GatedNetwork,
  personalizer: Personalizer,
  model: Model,
  population: Population,
  targets: jax.Array,
  calibration: Any = None,
  *,
  by_task: bool = False,
  chunk: int = 64,
  task_axis: str | int = "auto",
) -> tuple[TaskMetrics, TaskMetrics]:
  """Metrics of the meta-model on each target task, before and after adaptation to its train data.

  Args:
    network: whose parameters these are.
    personalizer: how a task adapts the model.
    model: the meta-model.
    population: holds the target tasks.
    targets: (targets,) their numbers in it.
    calibration: of the personalizer.
    by_task: whether the calibration has a leading axis (targets,), one for each.
    chunk: samples at a time.
    task_axis: see `core.map_tasks`.

  Returns:
    Before and after, with leading axis (targets,).
  """

  def one(task, own):
    test = population.test(task)
    adapted = personalizer.adapt(model, population.train(task), own)
    return (evaluate_task(network, model, test, chunk=chunk), evaluate_task(network, adapted, test, chunk=chunk, prunable=personalizer.prunable))

  if by_task:
    return map_tasks(lambda task_and_own: one(*task_and_own), (targets, calibration), task_axis)
  return map_tasks(lambda task: one(task, calibration), targets, task_axis)

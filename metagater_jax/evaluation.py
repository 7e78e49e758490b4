"""How good a model is on a task's test data, and over all target tasks before and after adaptation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagater_jax.accounting import gate_cost, gated_macs, gated_parameters
from metagater_jax.data.population import Batch, Population, TaskData
from metagater_jax.gates import sparsity
from metagater_jax.network import GatedNetwork
from metagater_jax.tasks import map_tasks

__all__ = ["TaskMetrics", "evaluate_targets", "evaluate_task", "mean_over_task"]


class TaskMetrics(NamedTuple):
  """Means over the test samples of one task (or arrays of them over tasks).

  Attributes:
    accuracy: fraction classified correctly, among all classes of the network.
    loss: cross-entropy.
    sparsity: fraction of gated channels that are off; 0 without gates.
    macs: multiply-accumulates per sample, gates included, of the channels that are on.
    parameters: that remain when channels are cut out which no test sample uses, gates included.
    on_rate: (channels,) by gated layer: fraction of the samples that switch each channel on.
  """

  accuracy: jax.Array
  loss: jax.Array
  sparsity: jax.Array
  macs: jax.Array
  parameters: jax.Array
  on_rate: dict[str, jax.Array]


def mean_over_task(measure: Callable[[Batch], Any], data: TaskData, chunk: int = 64) -> Any:
  """The mean over all samples of a task of what `measure` gives per sample, `chunk` samples at a time.

  Args:
    measure: batch to a pytree of arrays with a leading sample axis.
    data: the samples.
    chunk: rows at a time; chunks that are all padding are skipped.
  """
  chunk = min(chunk, data.index.shape[0])
  first = jnp.arange(chunk)

  def sums(i):
    batch = data.rows(i * chunk + first)
    return jax.tree.map(lambda x: jnp.tensordot(batch.weight, x, axes=1), measure(batch))

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, 0))
  total = jax.lax.fori_loop(0, (data.count + chunk - 1) // chunk,
                            lambda i, total: jax.tree.map(jnp.add, total, sums(i)), zeros)
  return jax.tree.map(lambda x: x / data.count, total)


def evaluate_task(network: GatedNetwork, params: Any, data: TaskData, chunk: int = 64) -> TaskMetrics:
  """A network on one task's samples, `chunk` at a time."""
  layers = network.layers(data.images.shape[1:])

  def measure(batch):
    logits, masks = network.apply(params, batch.images)
    samples = batch.labels.shape
    return {
        "accuracy": (logits.argmax(-1) == batch.labels).astype(jnp.float32),
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels),
        "sparsity": sparsity(masks) if masks else jnp.zeros(samples),
        "macs": jnp.broadcast_to(gated_macs(layers, masks), samples),
        "on_rate": masks,
    }

  mean = mean_over_task(measure, data, chunk)
  gate_macs, gate_parameters = gate_cost(layers, network.gated_layers, network.hidden)
  used = {name: rate > 0 for name, rate in mean["on_rate"].items()}
  return TaskMetrics(mean["accuracy"], mean["loss"], mean["sparsity"], mean["macs"] + gate_macs,
                     gated_parameters(layers, used) + gate_parameters, mean["on_rate"])


def evaluate_targets(network: GatedNetwork, adapt: Callable, params: Any, population: Population, targets: jax.Array, *,
                     chunk: int = 64, task_axis: str | int = "auto") -> tuple[TaskMetrics, TaskMetrics]:
  """Metrics of the meta-model on each target task, before and after adaptation to its train data.

  Args:
    network: whose parameters these are.
    adapt: `(params, task data) -> params`.
    params: the meta-model.
    population: holds the target tasks.
    targets: (targets,) their numbers in it.
    chunk: samples at a time.
    task_axis: see `map_tasks`.

  Returns:
    Before and after, with leading axis (targets,).
  """
  def one(task):
    test = population.test(task)
    adapted = adapt(params, population.train(task))
    return evaluate_task(network, params, test, chunk), evaluate_task(network, adapted, test, chunk)
  return map_tasks(one, targets, task_axis)

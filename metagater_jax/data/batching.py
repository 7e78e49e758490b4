"""Reductions over a task's samples in chunks, so that memory stays bounded: a loss's gradient, and means of anything per sample."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metagater_jax.core.random import row_keys
from metagater_jax.core.trees import Params
from metagater_jax.data.population import Batch, TaskData

__all__ = ["DrawBatch", "Loss", "full_batch_gradient", "mean_over_task", "microbatched"]

# loss(params, batch, key) -> scalar: the mean over the batch's rows with their weights. The key is for randomness inside
# the model (gate noise); None asks for the deterministic model.
Loss = Callable[[Params, Batch, jax.Array | None], jax.Array]
# draw(i) -> (Batch, key): the i-th minibatch of a client's train data in a round, with a key for the randomness inside the
# model on it.
DrawBatch = Callable[[jax.Array | int], tuple[Batch, jax.Array | None]]


def microbatched(loss: Loss, rows: int) -> Loss:
  """The same loss, whose gradient with respect to the parameters is added up over parts of the batch.

  A part's intermediates then fit in a core's cache (or a batch's in a small device's memory). The result is that of the whole
  batch, noise of gates included. No gradient flows to the batch itself.

  Args:
    loss: on minibatches.
    rows: at most so many rows in a part; parts are equal, so it is the largest divisor of the batch's rows.

  Returns:
    A loss of the same value and gradient.
  """
  def value_and_gradient(params, batch, key):
    count = batch.labels.shape[0]
    size = max(divisor for divisor in range(1, min(rows, count) + 1) if count % divisor == 0)
    if size == count:
      return jax.value_and_grad(loss)(params, batch, key)
    if key is not None and key.ndim == 0:
      key = row_keys(key, count)
    parts = jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), (batch, key))
    whole = jnp.maximum(batch.weight.sum(), jnp.finfo(jnp.float32).tiny)

    def add(total, part):
      batch, key = part
      weight = batch.weight.sum()  # the part is weighted to 1: a loss may divide by its weight
      weighted = batch._replace(weight=jnp.where(weight > 0, batch.weight / weight, 1 / size))
      new = jax.value_and_grad(loss)(params, weighted, key)
      return jax.tree.map(lambda total, x: total + weight / whole * x, total, new), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, parts)[0]

  @jax.custom_vjp
  def whole_batch(params, batch, key):
    return loss(params, batch, key)

  whole_batch.defvjp(value_and_gradient, lambda gradient, g: (jax.tree.map(lambda x: g * x, gradient), None, None))
  return lambda params, batch, key=None: whole_batch(params, batch, key)


def full_batch_gradient(loss: Loss, params: Params, data: TaskData | Batch, chunk: int = 64, key: jax.Array | None = None
                        ) -> tuple[jax.Array, Params]:
  """The loss over all of a task's samples and its gradient, summed over chunks so that memory stays bounded.

  Args:
    loss: `(params, batch, key) -> ` weighted mean over the batch's rows.
    params: what to differentiate with respect to, any pytree.
    data: the task's samples; chunks that are all padding are skipped. A `Batch` is taken as a whole.
    chunk: rows at a time.
    key: for randomness inside the model; None asks for the deterministic one.

  Returns:
    The loss, and its gradient, a pytree like `params`.
  """
  if isinstance(data, Batch):
    return jax.value_and_grad(loss)(params, data, key)
  chunk = min(chunk, data.index.shape[0])

  def add(i, sums):
    batch = data.rows(i * chunk + jnp.arange(chunk))
    new = jax.value_and_grad(loss)(params, batch, key)
    share = batch.weight.sum() / data.count
    return jax.tree.map(lambda total, part: total + share * part, sums, new)

  zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  return jax.lax.fori_loop(0, (data.count + chunk - 1) // chunk, add, zeros)


def mean_over_task(measure: Callable[[Batch], Any], data: TaskData, chunk: int = 64) -> Any:
  """The mean over all samples of a task of what `measure` gives per sample, `chunk` samples at a time.

  Args:
    measure: batch to a pytree of arrays with a leading sample axis.
    data: the samples.
    chunk: rows at a time; chunks that are all padding are skipped.

  Returns:
    A pytree like what `measure` gives, without the sample axis.
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

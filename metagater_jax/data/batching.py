"""Reductions over a task's samples in chunks, so that memory stays bounded: a loss's gradient, and means of anything per sample."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metagater_jax.core.checks import check_counts
from metagater_jax.core.closures import lift
from metagater_jax.core.random import row_keys
from metagater_jax.core.trees import Params
from metagater_jax.data.population import Batch, TaskData

__all__ = ["DrawBatch", "Loss", "full_batch_gradient", "is_rowwise", "mean_over_task", "microbatched"]

# loss(params, batch, key) -> scalar: the mean over the batch's rows with their weights. The key is for randomness inside
# the model (gate noise); None asks for the deterministic model.
Loss = Callable[[Params, Batch, jax.Array | None], jax.Array]
# draw(i) -> (Batch, key): the i-th minibatch of a client's train data in a round, with a key for the randomness inside the
# model on it.
DrawBatch = Callable[[jax.Array | int], tuple[Batch, jax.Array | None]]


def is_rowwise(loss: Loss) -> bool:
  """Whether a loss says that a row's part in it does not depend on the batch's other rows (its attribute `rowwise`). Only then may a batch
  be taken in parts, or several tasks' batches as one: batch normalization would see other statistics.

  Args:
    loss: as `nn.classification_loss` makes it. What wraps a loss keeps this with `functools.wraps`.

  Returns:
    What it says; one that says nothing is not.
  """
  return getattr(loss, "rowwise", False)


def microbatched(loss: Loss, rows: int) -> Loss:
  """The same loss, whose gradient with respect to the parameters is added up over parts of the batch.

  A part's intermediates then fit in a core's cache (or a batch's in a small device's memory). The result is that of the whole
  batch, noise of gates included, if a row's part in the loss does not depend on the other rows (`is_rowwise`).

  Args:
    loss: on minibatches.
    rows: at most so many rows in a part; parts are equal, so it is the largest divisor of the batch's rows.

  Returns:
    A loss of the same value and gradients.

  Raises:
    ValueError: `rows` that is not a whole number of at least 1.
  """
  check_counts(rows=rows)

  @functools.wraps(loss)
  def whole_batch(params, batch, key=None):
    count = batch.labels.shape[0]
    size = max(divisor for divisor in range(1, min(rows, count) + 1) if count % divisor == 0)
    if size == count:
      return loss(params, batch, key)
    keys = row_keys(key, count) if key is not None and key.ndim == 0 else key
    first = jax.tree.map(lambda x: x[:size], (batch, keys))
    lifted, captured = lift(loss, params, *first)  # a derivative of its own must not capture what is traced

    def parts_of(batch, keys):
      """The parts, each weighted to 1 (a loss may divide by its weight), and their shares of the whole."""
      parts, keys = jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), (batch, keys))
      weight = parts.weight.sum(1, keepdims=True)
      parts = parts._replace(weight=jnp.where(weight > 0, parts.weight / weight, 1 / size))
      return parts, keys, weight[:, 0] / jnp.maximum(batch.weight.sum(), jnp.finfo(batch.weight.dtype).tiny)

    def summed(function, parts):
      """Σ share · function(part), in the types of what the function gives."""
      like = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], parts[:2]))
      add = lambda total, part: (jax.tree.map(lambda s, x: s + (part[2] * x).astype(s.dtype), total, function(*part[:2])), None)
      return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), parts)[0]

    def forward(*arguments):
      is_primal = lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
      params, batch, keys, captured = jax.tree.map(lambda x: x.value, arguments, is_leaf=is_primal)
      if any(x.perturbed for x in jax.tree.leaves(arguments[1:], is_leaf=is_primal)):  # a gradient to the batch or to what the loss captures
        value, pull = jax.vjp(
          lambda params, batch, captured: summed(lambda batch, keys: lifted(captured, params, batch, keys), parts_of(batch, keys)),
          params,
          batch,
          captured,
        )
        return value, {"pull": pull}
      value, gradient = summed(lambda *part: jax.value_and_grad(lifted, 1)(captured, params, *part), parts_of(batch, keys))
      return value, {"gradient": gradient}

    def back(saved, cotangent):
      if "pull" in saved:
        of_params, of_batch, of_captured = saved["pull"](cotangent)
        return of_params, of_batch, None, of_captured
      return jax.tree.map(lambda x: (cotangent * x).astype(x.dtype), saved["gradient"]), None, None, None

    value = jax.custom_vjp(lambda params, batch, keys, captured: summed(lambda *part: lifted(captured, params, *part), parts_of(batch, keys)))
    value.defvjp(forward, back, symbolic_zeros=True)
    return value(params, batch, keys, captured)

  return whole_batch


def full_batch_gradient(
  loss: Loss, params: Params, data: TaskData | Batch, chunk: int = 64, key: jax.Array | None = None
) -> tuple[jax.Array, Params]:
  """The loss over all of a task's samples and its gradient, summed over chunks so that memory stays bounded.

  Args:
    loss: `(params, batch, key) -> ` weighted mean over the batch's rows.
    params: what to differentiate with respect to, any pytree.
    data: the task's samples; chunks that are all padding are skipped. A `Batch` is taken as a whole.
    chunk: rows at a time; where a loss has batch normalization, each chunk is normalized by itself.
    key: for randomness inside the model; None asks for the deterministic one.

  Returns:
    The loss, and its gradient, a pytree like `params`.

  Raises:
    ValueError: a chunk that is not a whole number of at least 1.
  """
  check_counts(chunk=chunk)
  if isinstance(data, Batch):
    return jax.value_and_grad(loss)(params, data, key)
  chunk = min(chunk, data.index.shape[0])
  rows = lambda i: data.rows(i * chunk + jnp.arange(chunk, dtype=jnp.int32))

  def add(i, sums):
    batch = rows(i)
    new = jax.value_and_grad(loss)(params, batch, key)
    share = batch.weight.sum() / data.count
    return jax.tree.map(lambda total, part: total + (share * part).astype(total.dtype), sums, new)

  shapes = jax.eval_shape(lambda: jax.value_and_grad(loss)(params, rows(0), key))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.fori_loop(0, (data.count + chunk - 1) // chunk, add, zeros)


def mean_over_task(measure: Callable[[Batch], Any], data: TaskData | Batch, chunk: int = 64) -> Any:
  """The mean over all samples of a task of what `measure` gives per sample, `chunk` samples at a time.

  Args:
    measure: batch to a pytree of arrays with a leading sample axis.
    data: the samples. A `Batch` is taken as a whole.
    chunk: rows at a time; chunks that are all padding are skipped.

  Returns:
    A pytree like what `measure` gives, without the sample axis.

  Raises:
    ValueError: a chunk that is not a whole number of at least 1.
  """
  check_counts(chunk=chunk)
  if isinstance(data, Batch):
    return jax.tree.map(lambda x: jnp.tensordot(data.weight, x, axes=1) / data.weight.sum(), measure(data))
  chunk = min(chunk, data.index.shape[0])
  first = jnp.arange(chunk, dtype=jnp.int32)

  def sums(i):
    batch = data.rows(i * chunk + first)
    return jax.tree.map(lambda x: jnp.tensordot(batch.weight, x, axes=1), measure(batch))

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, 0))
  total = jax.lax.fori_loop(0, (data.count + chunk - 1) // chunk, lambda i, total: jax.tree.map(jnp.add, total, sums(i)), zeros)
  return jax.tree.map(lambda x: x / data.count, total)

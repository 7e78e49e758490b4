"""What one node computes: losses on its data and the inexact local solution of Eq. (5)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metagater_jax.data.population import Batch, TaskData
from metagater_jax.network import GatedNetwork, row_keys

__all__ = ["DrawBatch", "Loss", "classification_loss", "full_batch_gradient", "local_solve", "microbatched"]

Params = Any
# loss(params, batch, key) -> scalar: the mean over the batch's rows with their weights. The key is for randomness inside
# the model (gate noise); None asks for the deterministic model.
Loss = Callable[[Params, Batch, jax.Array | None], jax.Array]
# draw(i) -> (Batch, key): the i-th minibatch of the node's train data in a round, with a key for the randomness inside the
# model on it.
DrawBatch = Callable[[jax.Array | int], tuple[Batch, jax.Array | None]]


def classification_loss(network: GatedNetwork) -> Loss:
  """Mean cross-entropy of a network over the rows of a batch, with their weights (Eq. 2)."""
  def loss(params, batch, key=None):
    logits, _ = network.apply(params, batch.images, key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.sum(losses * batch.weight) / jnp.maximum(batch.weight.sum(), 1)
  return loss


def microbatched(loss: Loss, rows: int) -> Loss:
  """The same loss, whose gradient with respect to the parameters is added up over parts of the batch.

  A part's intermediates then fit in a core's cache (or a batch's in a small device's memory). The result is that of the whole
  batch, noise of gates included. No gradient flows to the batch itself.

  Args:
    loss: on minibatches.
    rows: at most so many rows in a part; parts are equal, so it is the largest divisor of the batch's rows.
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


def local_solve(loss: Loss, center: Params, draw: DrawBatch, *, prox_weight: float, steps: int,
                optimizer: optax.GradientTransformation, start: Params | None = None) -> tuple[Params, jax.Array]:
  """w_i ≈ argmin_v L_i(v) + (λ/2)‖v − md‖² (Eq. 5), by `steps` steps of gradient descent from md.

  Args:
    loss: L_i, on minibatches.
    center: md, what the solution is pulled to, and where the steps start.
    draw: gives the minibatch of step i = 0 … K − 1, with a key for the randomness inside the model on it.
    prox_weight: λ; 0 is plain local training.
    steps: K.
    optimizer: how a step is made from the gradient; `optax.sgd(η)` is the paper's.
    start: where the steps start instead.

  Returns:
    w_i and the mean of the losses L_i met on the way (without the pull).
  """
  def step(carry, i):
    v, optimizer_state = carry
    value, gradient = jax.value_and_grad(loss)(v, *draw(i))
    gradient = jax.tree.map(lambda g, v, md: g + prox_weight * (v - md), gradient, v, center)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, v)
    return (optax.apply_updates(v, updates), optimizer_state), value

  start = center if start is None else start
  (solution, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(steps))
  return solution, losses.mean()


def full_batch_gradient(loss: Callable[[Params, Batch], jax.Array], params: Params, data: TaskData,
                        chunk: int = 64) -> tuple[jax.Array, Params]:
  """The loss over all of a task's samples and its gradient, summed over chunks so that memory stays bounded.

  Args:
    loss: `(params, batch) -> ` weighted mean over the batch's rows.
    params: what to differentiate with respect to.
    data: the task's samples; chunks that are all padding are skipped.
    chunk: rows at a time.
  """
  chunk = min(chunk, data.index.shape[0])

  def add(i, sums):
    batch = data.rows(i * chunk + jnp.arange(chunk))
    new = jax.value_and_grad(loss)(params, batch)
    share = batch.weight.sum() / data.count
    return jax.tree.map(lambda total, part: total + share * part, sums, new)

  zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  return jax.lax.fori_loop(0, (data.count + chunk - 1) // chunk, add, zeros)

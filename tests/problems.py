"""Losses whose gradients a test can write down by hand."""

import jax.numpy as jnp
import numpy as np


def linear_loss(params, batch, key):
  """Weighted mean squared error of a linear model, for tests that re-derive gradients by hand."""
  del key
  errors = batch.images @ params["w"] + params["b"] - batch.labels
  return jnp.sum(0.5 * errors**2 * batch.weight) / batch.weight.sum()


linear_loss.rowwise = True  # a row's part does not depend on the others, so that clients' batches may be merged


def tanh_loss(params, batch, key):
  """The same for a network with one hidden layer: ½ (a·tanh(W'x + b) − y)². Its Hessian is not constant."""
  del key
  errors = jnp.tanh(batch.images @ params["W"] + params["b"]) @ params["a"] - batch.labels
  return jnp.sum(0.5 * errors**2 * batch.weight) / batch.weight.sum()


def numpy_tanh_gradient(w, x, y):
  """Gradient of `tanh_loss` by hand, in float64; w is a dict like the parameters."""
  hidden = np.tanh(x @ w["W"] + w["b"])
  error = (hidden @ w["a"] - y) / len(y)
  back = np.outer(error, w["a"]) * (1 - hidden**2)
  return {"W": x.T @ back, "a": hidden.T @ error, "b": back.sum(0)}


def numpy_tanh_loss(w, x, y):
  return 0.5 * np.mean((np.tanh(x @ w["W"] + w["b"]) @ w["a"] - y) ** 2)

"""Convolution and pooling written so that mapping them over tasks stays fast.

Tasks have their own weights, so `vmap` turns `lax.conv_general_dilated` into a grouped convolution and `lax.map` puts it
into a loop body; XLA compiles both badly on a CPU (jax issue 12868). Patches times a matrix become ordinary (batched)
matrix products under either. Pooling is reshape and reduce, because the gradient of `lax.reduce_window` is a
select-and-scatter.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["average_pool", "conv_as_matmul", "in_blocks", "max_pool", "native_operators"]

_NATIVE = contextvars.ContextVar("native operators", default=frozenset())


@contextlib.contextmanager
def native_operators(pooling: bool = True) -> Iterator[None]:
  """What is traced in here has convolutions and poolings as one operator each, as runtimes on devices want them (`deploy`), instead of products
  and selections. Trace inside of it: a function that is compiled already stays as it is.

  Args:
    pooling: poolings, too; not where gradients are taken through a maximum and a runtime has no operator for them.

  Returns:
    A context manager.

  >>> import jax, jax.numpy as jnp
  >>> with native_operators():
  ...   program = str(jax.make_jaxpr(lambda x: max_pool(x))(jnp.ones((1, 4, 4, 1))))
  >>> "reduce_window_max" in program
  True
  """
  token = _NATIVE.set(frozenset({"convolution", "pooling"} if pooling else {"convolution"}))
  try:
    yield
  finally:
    _NATIVE.reset(token)


# Floats of a block's patches and results that stay in a core's cache of 1-2 MB beside what else is there.
_BLOCK = 400_000

_NHWC = ("NHWC", "HWIO", "NHWC")


def conv_as_matmul(
  inputs,
  kernel,
  window_strides,
  padding,
  lhs_dilation=None,
  rhs_dilation=None,
  dimension_numbers=None,
  feature_group_count=1,
  batch_group_count=1,
  precision=None,
  preferred_element_type=None,
):
  """`lax.conv_general_dilated` for two spatial dimensions, channels last, as patches times a matrix.

  Same arguments and result, so that it can be given to any flax convolution:
  `nn.Conv(…, conv_general_dilated=conv_as_matmul)`. Grouped or input-dilated convolutions, and other layouts, go to lax.

  Args:
    inputs: (batch, height, width, C_in).
    kernel: (kernel height, kernel width, C_in, C_out).
    window_strides, padding, lhs_dilation, rhs_dilation: as lax takes them.
    dimension_numbers, feature_group_count, batch_group_count: as lax takes them.
    precision, preferred_element_type: as lax takes them.

  Returns:
    (batch, height', width', C_out).
  """
  strides, dilation = tuple(window_strides), tuple(rhs_dilation or (1, 1))
  plain = (
    inputs.ndim == 4
    and feature_group_count == batch_group_count == 1
    and tuple(lhs_dilation or (1, 1)) == (1, 1)
    and "convolution" not in _NATIVE.get()
    and (dimension_numbers is None or _is_nhwc(dimension_numbers, inputs, kernel))
  )
  if not plain:
    return lax.conv_general_dilated(
      inputs,
      kernel,
      window_strides,
      padding,
      lhs_dilation,
      rhs_dilation,
      dimension_numbers or _NHWC,
      feature_group_count,
      batch_group_count,
      precision,
      preferred_element_type,
    )
  height, width, channels, features = kernel.shape
  if isinstance(padding, str):
    window = tuple((k - 1) * d + 1 for k, d in zip((height, width), dilation))
    padding = lax.padtype_to_pads(inputs.shape[1:3], window, strides, padding)
  padded = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
  out = tuple((size - (k - 1) * d - 1) // s + 1 for size, k, d, s in zip(padded.shape[1:3], (height, width), dilation, strides))
  taps = []
  for i in range(height):
    for j in range(width):
      top, left = i * dilation[0], j * dilation[1]
      taps.append(padded[:, top : top + (out[0] - 1) * strides[0] + 1 : strides[0], left : left + (out[1] - 1) * strides[1] + 1 : strides[1]])
  patches = taps[0] if len(taps) == 1 else jnp.concatenate(taps, axis=-1)
  rows = inputs.shape[0] * out[0] * out[1]
  product = jnp.dot(
    patches.reshape(rows, height * width * channels), kernel.reshape(-1, features), precision=precision, preferred_element_type=preferred_element_type
  )
  return product.reshape(inputs.shape[0], *out, features)


def _is_nhwc(numbers, inputs, kernel):
  expected = lax.conv_dimension_numbers(inputs.shape, kernel.shape, _NHWC)
  return lax.conv_dimension_numbers(inputs.shape, kernel.shape, numbers) == expected


def in_blocks(function, images: jax.Array, floats_per_image: int):
  """`function(images) -> (sums, rows)` computed on a few images at a time, so that its intermediates stay in a core's cache.

  They are computed again in the backward pass instead of being written to memory and read back. On other backends than a CPU,
  where one large product is faster, it is one call.

  Args:
    function: gives what is to be added up over the images, and what has a row per image.
    images: (batch, …).
    floats_per_image: size of the intermediates. As many images are taken together as fit, at least one; blocks are equal, so
      it is a divisor of the batch.
  """
  count = images.shape[0]
  if jax.default_backend() != "cpu" or _NATIVE.get():
    return function(images)
  together = max(d for d in range(1, count + 1) if count % d == 0 and (d == 1 or d * floats_per_image <= _BLOCK))
  if together == count:
    return function(images)
  sums, rows = lax.map(jax.checkpoint(function), images.reshape(count // together, together, *images.shape[1:]))
  return jax.tree.map(lambda x: x.sum(0), sums), jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), rows)


def max_pool(features: jax.Array, window: int | tuple[int, int] = 2) -> jax.Array:
  """Non-overlapping max pooling of (batch, height, width, channels); rows and columns left over are dropped.

  Where several elements share the maximum, the first of them gets the gradient.

  Args:
    features: (batch, height, width, channels).
    window: in pixels, in both directions or each.

  Returns:
    (batch, height // window, width // window, channels), with the window's own height and width.

  Raises:
    ValueError: a window larger than the features.
  """
  if "pooling" in _NATIVE.get():
    return _pooled(features, window, -jnp.inf, lax.max)
  return _fold_max(_fold_max(_windows(features, window), 2), 4)[:, :, 0, :, 0]


def _fold_max(x, axis):
  # Selections instead of a reduction: their gradient is a selection too, where that of `max` counts ties in a second pass.
  # `split` instead of slices: its transpose writes every element once.
  first, *rest = lax.split(x, (1,) * x.shape[axis], axis)
  for other in rest:
    if _NATIVE.get():  # by products: a selection's gradient has zeros of the features' shape, which would stand in a file
      later = (first < other).astype(x.dtype)
      first = first * (1 - later) + other * later
    else:
      first = jnp.where(first < other, other, first)
  return first


def average_pool(features: jax.Array, window: int | tuple[int, int] = 2) -> jax.Array:
  """Non-overlapping average pooling of (batch, height, width, channels); rows and columns left over are dropped.

  Args:
    features: (batch, height, width, channels).
    window: in pixels, in both directions or each.

  Returns:
    (batch, height // window, width // window, channels), with the window's own height and width.

  Raises:
    ValueError: a window larger than the features.
  """
  if "pooling" in _NATIVE.get():
    return _pooled(features, window, 0.0, lax.add) / math.prod(_window_of(features, window))
  return _windows(features, window).mean(axis=(2, 4))


def _pooled(features, window, start, fold):
  shape = (1, *_window_of(features, window), 1)
  return lax.reduce_window(features, np.asarray(start, features.dtype), fold, shape, shape, "VALID")


def _windows(features, window):
  batch, height, width, channels = features.shape
  high, wide = _window_of(features, window)
  rows, columns = height // high, width // wide
  features = features[:, : rows * high, : columns * wide]
  return features.reshape(batch, rows, high, columns, wide, channels)


def _window_of(features, window):
  _, height, width, _ = features.shape
  high, wide = (window, window) if isinstance(window, int) else window
  if height < high or width < wide:
    raise ValueError(f"pooling: a {high}×{wide} window does not fit into {height}×{width} features; the images are too small for this network.")
  return high, wide

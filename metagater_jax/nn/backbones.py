"""Backbone networks of the paper as flax.linen modules: images of shape (batch, …) in, logits (batch, classes) out.

Modules are named, so that a gate can be put on any layer by its name. They know nothing of gates. `head` names the layer that makes the logits;
`rowwise` that an image's logits do not depend on the other images of a batch, so that batches may be cut and joined; `small` that a task is so
little work for a CPU that loops over tasks or samples cost more than they save.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from metagater_jax.nn.convolution import average_pool, conv_as_matmul, in_blocks, max_pool

__all__ = ["MLP", "ConvNet4", "ConvNet7", "ConvUnit", "FewShotConvNet", "NormalizedConv", "ResNet12", "SensorNet"]

_he = nn.initializers.he_normal()


class ConvUnit(nn.Module):
  """pool(relu(conv(z))): the unit that a gate multiplies. 'Same' padding, with a bias.

  A mask is one number per channel and not negative, so pool(relu(conv(z)) ⊙ m) (Eq. 1) = pool(relu(conv(z))) ⊙ m. Relu
  and pooling belong inside all the same: relu has no gradient at 0 and a maximum of zeros has no argument, so with a mask
  in front of them a channel that is off would never hear what it could contribute.

  Attributes:
    features: C_out.
    pool: "max", "average" or None.
    size: of the kernel.
    window: of the pooling.
  """

  features: int
  pool: str | None = None
  size: tuple[int, int] = (3, 3)
  window: tuple[int, int] = (2, 2)

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    kernel = self.param("kernel", _he, (*self.size, z.shape[-1], self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    h = conv_as_matmul(z, kernel, (1, 1), "SAME")
    if self.pool == "max":  # relu and a bias per channel are monotone: after the maximum there is less work
      return jax.nn.relu(max_pool(h, self.window) + bias)
    h = jax.nn.relu(h + bias)
    return average_pool(h, self.window) if self.pool == "average" else h

  @nn.nowrap
  def positions(self, z: jax.Array) -> int:
    """Places per example at which the kernel is applied, for MAC accounting: the output does not show them."""
    return z.shape[1] * z.shape[2]


class MLP(nn.Module):
  """Fully connected network; the paper's MNIST model is 784-100-10.

  Layers: `hidden1`, `hidden2`, …, `output`.

  Attributes:
    classes: logits.
    widths: of the hidden layers.
  """

  classes: int
  widths: tuple[int, ...] = (100,)
  head: ClassVar[str] = "output"
  rowwise: ClassVar[bool] = True
  small: ClassVar[bool] = True

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = images.reshape(images.shape[0], -1)
    for i, width in enumerate(self.widths, 1):
      x = jax.nn.relu(nn.Dense(width, kernel_init=_he, name=f"hidden{i}")(x))
    return nn.Dense(self.classes, name="output")(x)


class ConvNet4(nn.Module):
  """Three 3×3 convolutions, each with relu and 2×2 max pooling, and a fully connected layer.

  For 32×32 images the fully connected layer is 2048-classes, as in the paper. Layers: `conv1`, `conv2`, `conv3`, `output`.

  Attributes:
    classes: logits.
    widths: channels of the convolutions.
  """

  classes: int
  widths: tuple[int, ...] = (32, 64, 128)
  head: ClassVar[str] = "output"
  rowwise: ClassVar[bool] = True

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = _check_images(self, images)
    for i, width in enumerate(self.widths, 1):
      x = ConvUnit(width, "max", name=f"conv{i}")(x)
    return nn.Dense(self.classes, name="output")(x.reshape(x.shape[0], -1))


class ConvNet7(nn.Module):
  """Six 3×3 convolutions with relu and a fully connected layer (Appendix E).

  After the second and fourth convolution 2×2 max pooling, after the sixth 2×2 average pooling. The paper gives no widths;
  these end in the 2048 features that its four-layer network has. Layers: `conv1` … `conv6`, `output`.

  Attributes:
    classes: logits.
    widths: channels of the six convolutions.
  """

  classes: int
  widths: tuple[int, ...] = (32, 32, 64, 64, 128, 128)
  head: ClassVar[str] = "output"
  rowwise: ClassVar[bool] = True

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = _check_images(self, images)
    for i, width in enumerate(self.widths, 1):
      x = ConvUnit(width, {2: "max", 4: "max", 6: "average"}.get(i), name=f"conv{i}")(x)
    return nn.Dense(self.classes, name="output")(x.reshape(x.shape[0], -1))


class SensorNet(nn.Module):
  """Convolutions over time, each with relu and max pooling by 2, and a fully connected layer, for windows of a few sensors' samples.

  They are `ConvUnit`s whose kernels and windows are one wide in the second direction. Layers: `conv1`, `conv2`, `conv3`, `output`.

  Attributes:
    classes: logits.
    widths: channels of the convolutions.
    size: of their kernels, in samples.
  """

  classes: int
  widths: tuple[int, ...] = (32, 64, 64)
  size: int = 5
  head: ClassVar[str] = "output"
  rowwise: ClassVar[bool] = True

  @nn.compact
  def __call__(self, windows: jax.Array) -> jax.Array:
    if windows.ndim != 3:
      raise ValueError(f"SensorNet expects windows (batch, time, sensors), got shape {windows.shape}.")
    x = windows[:, :, None]
    for i, width in enumerate(self.widths, 1):
      x = ConvUnit(width, "max", (self.size, 1), (2, 1), name=f"conv{i}")(x)
    return nn.Dense(self.classes, name="output")(x.reshape(x.shape[0], -1))


class NormalizedConv(nn.Module):
  """Convolution without bias, batch normalization with the batch's own statistics, and a scale and bias per channel.

  There are no running averages: a batch is normalized by itself in training, adaptation and evaluation alike, the mode in
  which few-shot results are usually reported (transductive: the queries of an episode share their statistics).

  Attributes:
    features: C_out.
    size: of the kernel, in both directions; 'same' padding.
    pool: 2×2 maximum afterwards, and relu (the few-shot networks' block), as one unit.
    epsilon: added to the variance.
  """

  features: int
  size: int = 3
  pool: bool = False
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    kernel = self.param("kernel", _he, (self.size, self.size, z.shape[-1], self.features))
    scale = self.param("scale", nn.initializers.ones, (self.features,))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    # Normalization is increasing or decreasing, by the sign of the scale, and relu is monotone: what is needed of the
    # convolution is its moments and its maximum (or minimum) in each window, so that it need never be held as a whole.
    sign = jnp.where(scale < 0, -1.0, 1.0) if self.pool else 1.0

    def convolve(z):
      h = conv_as_matmul(z, kernel, (1, 1), "SAME")
      return (h.sum((0, 1, 2)), jnp.square(h).sum((0, 1, 2))), max_pool(sign * h) if self.pool else h

    count = z.shape[0] * self.positions(z)
    (total, squares), h = in_blocks(convolve, z, self.positions(z) * (kernel.size // self.features + self.features))
    mean = total / count
    variance = jnp.maximum(squares / count - mean**2, 0)
    scale = scale * jax.lax.rsqrt(variance + self.epsilon)
    h = sign * scale * h + (bias - mean * scale)
    return jax.nn.relu(h) if self.pool else h

  @nn.nowrap
  def positions(self, z: jax.Array) -> int:
    """Places per example at which the kernel is applied."""
    return z.shape[1] * z.shape[2]


class FewShotConvNet(nn.Module):
  """Conv-4, the usual few-shot network (Vinyals et al. 2016): blocks of 3×3 convolution, batch normalization, relu and 2×2
  max pooling, and a fully connected layer.

  Layers: `conv1` … `conv4`, `output`.

  Attributes:
    classes: logits, the ways of an episode.
    widths: channels of the blocks, one block each.
  """

  classes: int
  widths: tuple[int, ...] = (32, 32, 32, 32)
  head: ClassVar[str] = "output"

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = _check_images(self, images)
    for i, width in enumerate(self.widths, 1):
      x = NormalizedConv(width, pool=True, name=f"conv{i}")(x)
    return nn.Dense(self.classes, name="output")(x.reshape(x.shape[0], -1))


class ResNet12(nn.Module):
  """ResNet-12, the few-shot residual network (Oreshkin et al. 2018; no DropBlock): blocks of three 3×3 convolutions, each with
  batch normalization, the first two with leaky relu; a normalized 1×1 convolution beside them; leaky relu and 2×2 max pooling
  of the sum. The mean over places feeds a fully connected layer.

  Layers: `block1/conv1` … `block4/conv3`, `block1/shortcut` …, `output`.

  Attributes:
    classes: logits, the ways of an episode.
    widths: channels of the blocks, one block each.
  """

  classes: int
  widths: tuple[int, ...] = (64, 128, 256, 512)
  head: ClassVar[str] = "output"

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = _check_images(self, images)
    for i, width in enumerate(self.widths, 1):
      x = _ResidualBlock(width, name=f"block{i}")(x)
    return nn.Dense(self.classes, name="output")(x.mean((1, 2)))


class _ResidualBlock(nn.Module):
  features: int

  @nn.compact
  def __call__(self, z):
    h = _leaky(NormalizedConv(self.features, name="conv1")(z))
    h = _leaky(NormalizedConv(self.features, name="conv2")(h))
    h = NormalizedConv(self.features, name="conv3")(h) + NormalizedConv(self.features, size=1, name="shortcut")(z)
    return _leaky(max_pool(h))  # monotone, so that it may follow the maximum


def _leaky(x):
  return jax.nn.leaky_relu(x, 0.1)


def _check_images(model, images):
  if images.ndim != 4:
    raise ValueError(f"{type(model).__name__} expects images (batch, height, width, channels), got shape {images.shape}.")
  return images

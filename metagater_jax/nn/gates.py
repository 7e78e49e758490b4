"""Channel gates: small networks that switch a convolution's filters on and off per input (Eq. 1, Appendix F).

This module holds the gate itself: its binarization, its parameters, what a group of them is and how sparse its masks
are. Where gates sit in a network, and how masks multiply features, is `metagater_jax.nn.gated`'s business.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from metagater_jax.core.checks import check_positive
from metagater_jax.core.trees import precision_of

__all__ = ["ChannelGate", "binarize", "gate_groups", "logistic_noise", "sparsity"]


def binarize(log_odds: jax.Array, temperature: float | jax.Array | None = 1.0) -> jax.Array:
  """Hard threshold forward, smooth backward: m = 1[ℓ > 0].

  Args:
    log_odds: ℓ, any shape. Add `logistic_noise` to it for a binary Gumbel-softmax sample (the difference of two Gumbel
      variables is a Logistic one), subtract a threshold from it to keep fewer channels.
    temperature: τ of the soft gate σ(ℓ/τ) whose derivative σ'(ℓ/τ)/τ the backward pass uses (the paper: 1). It may be traced, to be
      annealed from step to step or mapped over. `None` is the plain straight-through estimator: the incoming gradient passes unchanged.

  Returns:
    Zeros and ones of `log_odds`' shape and dtype. ℓ = 0 gives 0, so that a gate whose parameters vanish is off.

  Raises:
    ValueError: a temperature that is not positive.

  >>> import jax, jax.numpy as jnp
  >>> binarize(jnp.array([-1.0, 0.0, 2.0])).tolist()
  [0.0, 0.0, 1.0]
  >>> jax.grad(lambda l: binarize(l).sum())(jnp.array([0.0])).tolist()
  [0.25]
  """
  if temperature is None:
    return _straight_through(log_odds)
  check_positive(**{"binarize: temperature": temperature})
  return _soft_backward(log_odds, jnp.asarray(temperature, precision_of(log_odds)))


@jax.custom_vjp
def _soft_backward(log_odds, temperature):
  del temperature  # the threshold does not depend on it, so its own derivative is 0
  return (log_odds > 0).astype(log_odds.dtype)


def _soft_gradient(saved, gradient):
  log_odds, temperature = saved
  soft = jax.nn.sigmoid(log_odds / temperature)
  return (gradient * soft * (1 - soft) / temperature).astype(log_odds.dtype), jnp.zeros_like(temperature)


_soft_backward.defvjp(lambda log_odds, temperature: (_soft_backward(log_odds, temperature), (log_odds, temperature)), _soft_gradient)


@jax.custom_vjp
def _straight_through(log_odds):
  return (log_odds > 0).astype(log_odds.dtype)


_straight_through.defvjp(lambda log_odds: (_straight_through(log_odds), None), lambda _, gradient: (gradient,))


def logistic_noise(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """The difference of two independent Gumbel variables, drawn as one Logistic(0, 1) variable.

  Args:
    key: that the draw is a function of.
    shape, dtype: of the result.

  Returns:
    Samples of Logistic(0, 1).
  """
  return jax.random.logistic(key, shape, dtype)


class ChannelGate(nn.Module):
  """Log-odds that each output channel of a convolution is on, from that convolution's input (Appendix F).

  s = global average pool of z;  ℓ = W₂ᵀ relu(W₁ᵀ s + b₁) + b₂.

  Attributes:
    channels: C_out, how many channels the gate switches.
    hidden: units of the hidden layer (the paper: 16).
    initial_log_odds: b₂ at the start. Near 0 the gate starts undecided, where its gradient is largest; at 2 a channel is on with probability 0.88
      in training, and a gate that learns slowly is little more than channel dropout.
    logit_scale: of W₂ at the start, relative to LeCun's initialization.
    normalize: s over its channels to mean 0 and variance 1, for each input by itself. How large ℓ and its gradient are does then not depend on
      which layer is gated, nor on how far the backbone's features have grown.
    absent: how many more channels z had that are always 0 and were cut out (`deploy.compact`). Their part in the normalization stays; W₁ has a last
      row for all of them, the sum of theirs.
  """

  channels: int
  hidden: int = 16
  initial_log_odds: float = 0.5
  logit_scale: float = 1.0
  normalize: bool = True
  absent: int = 0

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Features z of shape (batch, …, C_in) to log-odds ℓ of shape (batch, C_out)."""
    # Four plain parameters instead of two Dense layers: their names are those of the equation, and a gate that runs
    # inside another module's call brings no submodules of its own that could be mistaken for the backbone's.
    inputs = features.shape[-1] + (self.absent > 0)
    lecun = nn.initializers.lecun_normal()
    w1 = self.param("W1", nn.initializers.he_normal(), (inputs, self.hidden))
    b1 = self.param("b1", nn.initializers.zeros, (self.hidden,))
    w2 = self.param("W2", lambda *args: self.logit_scale * lecun(*args), (self.hidden, self.channels))
    b2 = self.param("b2", nn.initializers.constant(self.initial_log_odds), (self.channels,))
    pooled = features.mean(axis=tuple(range(1, features.ndim - 1)))
    mean = lambda x: x.mean(-1, keepdims=True)
    if self.absent:
      pooled = jnp.pad(pooled, ((0, 0), (0, 1)))
      share = jnp.asarray([1] * (inputs - 1) + [self.absent], pooled.dtype) / (inputs - 1 + self.absent)
      mean = lambda x: (x * share).sum(-1, keepdims=True)
    if self.normalize:
      pooled = pooled - mean(pooled)
      pooled = pooled * jax.lax.rsqrt(mean(jnp.square(pooled)) + 1e-6)
    return jax.nn.relu(pooled @ w1 + b1) @ w2 + b2


def gate_groups(path: str, leaf: jax.Array) -> tuple[str, int] | None:
  """Groups of a gate's parameters for `group_lasso`: everything that produces one channel's log-odds.

  The group of channel c is column c of W₂ together with b₂[c]: when both vanish, ℓ_c = 0 for every input, and the channel
  is structurally off. W₁ and b₁ are shared by all channels, so they belong to no group.

  Args:
    path: name of a leaf of a gate's parameters, "conv3/W2".
    leaf: its value.

  Returns:
    (layer, axis of the channels), or None for a leaf that belongs to no group.
  """
  del leaf
  layer, _, name = path.rpartition("/")
  return {"W2": (layer, 1), "b2": (layer, 0)}.get(name)


def sparsity(masks: Mapping[str, jax.Array]) -> jax.Array:
  """Fraction of gated channels that are off, per example: (batch,), from masks of shape (batch, channels) by layer.

  Args:
    masks: (batch, channels) by gated layer.

  Returns:
    (batch,) floats in [0, 1].

  Raises:
    ValueError: no masks.
  """
  if not masks:
    raise ValueError("sparsity: there are no masks; this network has no gated layer.")
  channels = sum(mask.shape[-1] for mask in masks.values())
  return 1 - sum(mask.sum(-1) for mask in masks.values()) / channels  # type: ignore[return-value]

"""What a task's gates do: whether a channel depends on the input, how much of it the class explains, and whether easy inputs use fewer channels."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagater_jax.nn.gates import sparsity

__all__ = ["BINS", "GateStatistics", "conditional", "confidence_correlation", "explained_by_class", "gate_measures"]

# Of the network's confidence, from 0 to 1.
BINS = 10


class GateStatistics(NamedTuple):
  """Means over the samples of one task (or arrays of them over tasks).

  Attributes:
    joint: (classes, channels) by gated layer: the fraction of the samples that are of a class and switch a channel on.
    classes: (classes,) the fraction of the samples that are of a class.
    bins: (BINS, 2) by the network's confidence, its largest probability: the fraction of the samples in a bin, and the sum of their sparsities
      divided by the number of all samples.
    moments: (5,) of confidence c and an image's sparsity s: means of c, s, c², s², c·s.
  """

  joint: dict[str, jax.Array]
  classes: jax.Array
  bins: jax.Array
  moments: jax.Array


def gate_measures(logits: jax.Array, masks: Mapping[str, jax.Array], labels: jax.Array) -> GateStatistics:
  """The terms of `GateStatistics` per sample, of which a task's statistics are the means (`data.mean_over_task`).

  Args:
    logits: (batch, classes).
    masks: (batch, channels) by gated layer, at least one.
    labels: (batch,).

  Returns:
    The statistics with a leading axis (batch,).
  """
  of_class = jax.nn.one_hot(labels, logits.shape[-1])
  c, s = jax.nn.softmax(logits).max(-1), sparsity(masks)
  in_bin = jax.nn.one_hot(jnp.clip((c * BINS).astype(jnp.int32), 0, BINS - 1), BINS)
  return GateStatistics(
    {layer: of_class[:, :, None] * mask[:, None] for layer, mask in masks.items()},
    of_class,
    jnp.stack([in_bin, in_bin * s[:, None]], axis=-1),
    jnp.stack([c, s, c * c, s * s, c * s], axis=-1),
  )


def conditional(on_rate: Mapping[str, jax.Array], tolerance: float = 0.02) -> jax.Array:
  """The fraction of gated channels that are neither on nor off for all inputs: those that look at them.

  Args:
    on_rate: (…, channels) by gated layer: for which fraction of a task's samples each channel is on.
    tolerance: a channel that is on for at most this part of the samples, or off for at most this part, does not count.

  Returns:
    (…) floats in [0, 1].
  """
  varies = [(rate > tolerance) & (rate < 1 - tolerance) for rate in on_rate.values()]
  return sum(v.sum(-1) for v in varies) / sum(v.shape[-1] for v in varies)  # type: ignore[return-value]


def explained_by_class(joint: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
  """How much of a layer's mask the class explains, channel by channel, in bits.

  I(m; y) = H(m) − H(m | y) of a channel's state m and the class y over a task's samples. The estimate from n samples of k classes is about
  (k − 1)/(2n ln 2) too high where nothing is explained.

  Args:
    joint: (…, classes, channels), see `GateStatistics`.
    classes: (…, classes).

  Returns:
    The mutual information I(m; y) and the entropy H(m), (…, channels).
  """
  entropy = lambda p: -(jax.scipy.special.xlogy(p, p) + jax.scipy.special.xlogy(1 - p, 1 - p)) / jnp.log(2.0)
  marginal = entropy(jnp.clip(joint.sum(-2), 0, 1))
  share = classes[..., None]
  given = jnp.clip(joint / jnp.where(share > 0, share, 1), 0, 1)
  return jnp.maximum(marginal - (share * entropy(given)).sum(-2), 0), marginal


def confidence_correlation(moments: jax.Array) -> jax.Array:
  """Pearson's correlation of the network's confidence and an image's sparsity over a task's samples; 0 where either is the same for all.

  Args:
    moments: (…, 5), see `GateStatistics`.

  Returns:
    (…) floats in [−1, 1]. Positive: images that the network is sure of use fewer channels.
  """
  c, s, cc, ss, cs = jnp.moveaxis(moments, -1, 0)
  spread = jnp.maximum(cc - c * c, 0) * jnp.maximum(ss - s * s, 0)
  return jnp.where(spread > 1e-12, (cs - c * s) / jnp.sqrt(jnp.where(spread > 1e-12, spread, 1)), 0)

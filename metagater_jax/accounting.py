"""What a network costs, dense, gated and pruned: multiply-accumulates per example and parameters that must be kept."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from metagater_jax.network import Layer

__all__ = ["dense_cost", "gate_cost", "gated_macs", "gated_parameters", "masked_macs"]


def dense_cost(layers: Sequence[Layer]) -> tuple[int, int]:
  """(MACs per example, parameters) of the backbone without gates."""
  return sum(layer.macs for layer in layers), sum(layer.parameters for layer in layers)


def gate_cost(layers: Sequence[Layer], gated_layers: Sequence[str], hidden: int = 16) -> tuple[int, int]:
  """(MACs per example, parameters) that the gates themselves add; pooling is additions only and not counted."""
  names = _by_layer(layers, dict.fromkeys(gated_layers))
  gated = [layer for layer in layers if layer.name in names]
  macs = sum(layer.inputs * hidden + hidden * layer.outputs for layer in gated)
  return macs, macs + sum(hidden + layer.outputs for layer in gated)


def gated_macs(layers: Sequence[Layer], masks: Mapping[str, jax.Array]) -> jax.Array:
  """MACs of the backbone per example, (batch,), when channels that are off are neither computed nor read.

  A layer costs its dense MACs times the fraction of its own channels that are on times that of the layer it reads.
  Add `gate_cost` for the network as a whole.

  Args:
    layers: see `network_layers`.
    masks: (batch, channels) by gated layer.
  """
  on = _by_layer(layers, {name: mask.mean(-1) for name, mask in masks.items()})
  return sum(layer.macs * on.get(layer.name, 1.0) * on.get(layer.source, 1.0) for layer in layers) + jnp.zeros(())


def gated_parameters(layers: Sequence[Layer], used: Mapping[str, jax.Array]) -> jax.Array:
  """Parameters of the backbone that remain when channels which no input uses are cut out.

  Args:
    layers: see `network_layers`.
    used: (channels,) booleans by gated layer: whether any input switches the channel on.
  """
  kept = _by_layer(layers, {name: mask.astype(jnp.float32).mean(-1) for name, mask in used.items()})
  total = jnp.zeros(())
  for layer in layers:
    own, source = kept.get(layer.name, 1.0), kept.get(layer.source, 1.0)
    total += ((layer.parameters - layer.per_channel) * source + layer.per_channel) * own
  return total


def masked_macs(layers: Sequence[Layer], mask: Mapping[str, Any]) -> jax.Array:
  """MACs of the backbone per example, of the weights that a mask keeps.

  With the `effective_mask` of whole filters that is what a network without them costs; where single weights go, the least that
  hardware pays which skips each of the others.

  Args:
    layers: see `network_layers`.
    mask: of the backbone's parameters, as `make_mask` or `effective_mask` makes it.

  >>> import jax.numpy as jnp
  >>> layers = (Layer("conv", "conv", 2, 4, macs=7200, parameters=72, per_channel=0, input_shape=(10, 10, 2), source=None),)
  >>> float(masked_macs(layers, {"conv": {"kernel": jnp.ones((3, 3, 2, 4)).at[..., 1:].set(0)}}))
  1800.0
  """
  kernel = lambda layer: reduce(lambda tree, name: tree[name], layer.name.split("/"), mask)["kernel"]
  return sum(layer.macs * kernel(layer).mean() for layer in layers) + jnp.zeros(())


def _by_layer(layers, by_gate):
  """A gate on a module that holds several layers (convolution and normalization, say) masks what the last one makes."""
  names = [layer.name for layer in layers]
  return {[name for name in names if name == gate or name.startswith(f"{gate}/")][-1]: value
          for gate, value in by_gate.items()}

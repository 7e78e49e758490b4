"""What a network costs, dense and gated: multiply-accumulates per example and parameters that must be kept."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from metagater_jax.network import Layer

__all__ = ["dense_cost", "gate_cost", "gated_macs", "gated_parameters"]


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


def _by_layer(layers, by_gate):
  """A gate on a module that holds several layers (convolution and normalization, say) masks what the last one makes."""
  names = [layer.name for layer in layers]
  return {[name for name in names if name == gate or name.startswith(f"{gate}/")][-1]: value
          for gate, value in by_gate.items()}

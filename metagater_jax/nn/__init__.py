"""Networks: channel gates, the backbones of the papers, and what they cost."""

from metagater_jax.nn.backbones import MLP, ConvNet4, ConvNet7, ConvUnit, FewShotConvNet, NormalizedConv, ResNet12, SensorNet
from metagater_jax.nn.convolution import average_pool, conv_as_matmul, max_pool, native_operators
from metagater_jax.nn.cost import (
  ChannelCosts,
  Layer,
  added_layers,
  channel_costs,
  dense_cost,
  gate_cost,
  gated_macs,
  gated_parameters,
  head_of,
  masked_macs,
  network_layers,
)
from metagater_jax.nn.dropout import drop, drop_entries, without_dropout
from metagater_jax.nn.gated import GatedNetwork, GatedOutputs, classification_loss
from metagater_jax.nn.gates import ChannelGate, binarize, gate_groups, logistic_noise, sparsity
from metagater_jax.nn.resized import Resized

__all__ = [
  "MLP",
  "ChannelCosts",
  "ChannelGate",
  "ConvNet4",
  "ConvNet7",
  "ConvUnit",
  "FewShotConvNet",
  "GatedNetwork",
  "GatedOutputs",
  "Layer",
  "NormalizedConv",
  "ResNet12",
  "Resized",
  "SensorNet",
  "added_layers",
  "average_pool",
  "binarize",
  "channel_costs",
  "classification_loss",
  "conv_as_matmul",
  "dense_cost",
  "drop",
  "drop_entries",
  "gate_cost",
  "gate_groups",
  "gated_macs",
  "gated_parameters",
  "head_of",
  "logistic_noise",
  "masked_macs",
  "max_pool",
  "native_operators",
  "network_layers",
  "sparsity",
  "without_dropout",
]

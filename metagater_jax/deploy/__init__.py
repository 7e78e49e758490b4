"""Adapted networks on devices: smaller networks, files that run there, and adaptation there.

What writes files needs the extra "deploy" (`pip install 'metagater_jax[deploy]'`); the rest does not.
"""

from metagater_jax.deploy.budget import BudgetAdaptation, within_budget
from metagater_jax.deploy.compact import Compact, Cutting, compact, kept_channels
from metagater_jax.deploy.onnx import to_onnx
from metagater_jax.deploy.signature import Signature, adaptation, device_loss, inference
from metagater_jax.deploy.tflite import quantize_tflite, to_stablehlo, to_tflite

__all__ = [
  "BudgetAdaptation",
  "Compact",
  "Cutting",
  "Signature",
  "adaptation",
  "compact",
  "device_loss",
  "inference",
  "kept_channels",
  "quantize_tflite",
  "to_onnx",
  "to_stablehlo",
  "to_tflite",
  "within_budget",
]

"""LiteRT (.tflite) files: StableHLO, as `jax.export` writes it, through LiteRT's own converter; no TensorFlow. And plain StableHLO."""

import contextlib
import io
import warnings
from collections.abc import Mapping

import jax
import numpy as np

from metagater_jax.deploy.signature import Signature, needs
from metagater_jax.nn.convolution import native_operators

__all__ = ["quantize_tflite", "to_stablehlo", "to_tflite"]


def to_stablehlo(signature: Signature) -> bytes:
  """A function as portable StableHLO: `jax.export.deserialize` reads it anywhere, and so do IREE and XLA.

  Args:
    signature: the function, its inputs and outputs. A symbolic batch size stays one.

  Returns:
    The file's content.
  """
  return bytes(_exported(signature, ("cpu", "cuda", "tpu")).serialize())


def to_tflite(signatures: Mapping[str, Signature]) -> bytes:
  """Functions as the signatures of one .tflite file.

  Args:
    signatures: by the name that a device calls them by. Sizes are fixed.

  Returns:
    The file's content.

  Raises:
    ImportError: without litert-converter.
    NotImplementedError: an operator that LiteRT lacks; the message is the converter's, which names the place.

  >>> import jax, jax.numpy as jnp
  >>> double = Signature(lambda x: (2 * x,), {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, ("y",))
  >>> len(to_tflite({"double": double})) > 0
  True
  """
  api, ir, passes = (needs(f"litert_converter{name}") for name in (".converter_api_ext", ".mlir.ir", ".mlir.passmanager"))
  context = ir.Context()
  api.prepare_mlir_context(context)
  with context:
    modules = []
    for name, signature in signatures.items():
      module = ir.Module.parse(_exported(signature, ("cpu",)).mlir_module())
      main = next(operation for operation in module.body.operations if operation.attributes["sym_name"].value == "main")
      api.set_signature(main.operation, name, list(signature.inputs), list(signature.outputs))
      main.attributes["sym_name"] = ir.StringAttr.get("main" if len(signatures) == 1 else name)
      modules.append(module)
    module = modules[0] if len(modules) == 1 else api.merge_modules(modules)
    try:
      api.run_convert_to_tfl_passes(module, passes.PassManager(), api.ConvertToTFLConfig())
      return api.export_flatbuffer_to_bytes(module.operation)
    except (ValueError, RuntimeError) as error:
      said = " ".join(line.strip() for line in str(error).splitlines()[:3])
      raise NotImplementedError(
        f"to_tflite: LiteRT's converter cannot write this: {said}. Export StableHLO or ONNX, or write what it names with other operators."
      ) from error


def quantize_tflite(content: bytes, calibration: Mapping[str, np.ndarray], signature: str = "infer") -> bytes:
  """The same network in 8-bit integers, weights by channel, and activations by the whole ranges that they have on calibration data.

  Args:
    content: of a .tflite file with float32 weights inside.
    calibration: arrays by name of the signature's inputs, with a leading axis of examples, each as the signature takes it (samples, batch, …).
    signature: its name.

  Returns:
    The quantized file's content. Inputs and outputs stay float32.

  Raises:
    ImportError: without litert-quantizer.
    ValueError: no examples.
  """
  package = needs("litert_quantizer")
  count = {len(values) for values in calibration.values()}
  if len(count) != 1 or 0 in count:
    raise ValueError(f"quantize_tflite needs the same number of calibration examples, at least 1, for each input, got {sorted(count)}.")
  recipe = package.recipe_manager.RecipeManager()
  recipe.add_static_config(".*", package.qtyping.TFLOperationName.ALL_SUPPORTED, 8, 8)
  for end in (package.qtyping.TFLOperationName.INPUT, package.qtyping.TFLOperationName.OUTPUT):
    recipe.add_quantization_config(".*", end, algorithm_key=package.algorithm_manager.AlgorithmName.NO_QUANTIZE)
  quantizer = package.Quantizer(content, recipe.get_quantization_recipe())
  examples = [{name: np.asarray(values[i]) for name, values in calibration.items()} for i in range(count.pop())]
  with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # it shows a bar, and warns of its own way of looking at a network
    warnings.simplefilter("ignore")
    # The quantizer's own ranges are moving averages over examples, which cut off what only some inputs reach; these are the whole ranges.
    calibrator = package.calibrator.Calibrator(content, num_threads=1, qsv_update_func=package.calibrator.qsv_utils.min_max_update)
    calibrator.calibrate({signature: examples}, recipe)
    return bytes(quantizer.quantize(calibrator.get_model_qsvs(), enable_progress_report=False).quantized_model)


def _exported(signature, platforms):
  with native_operators(pooling=not signature.differentiates):
    return jax.export.export(jax.jit(lambda *inputs: tuple(signature.function(*inputs))), platforms=platforms)(*signature.inputs.values())

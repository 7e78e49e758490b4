"""The runtimes that files are verified and timed with, one thread each."""

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

__all__ = ["READERS", "RUNTIMES", "Exported", "LiteRT", "OnnxRuntime", "interleaved", "versions_of"]


class LiteRT:
  """A .tflite file."""

  label: ClassVar[str] = "litert"
  packages: ClassVar[tuple[str, ...]] = ("litert_converter", "ai_edge_litert", "litert_quantizer")

  def __init__(self, content: bytes):
    from ai_edge_litert.interpreter import Interpreter

    self._model = Interpreter(model_content=content, num_threads=1)
    self._model.allocate_tensors()
    self._in, self._out = self._model.get_input_details()[0]["index"], self._model.get_output_details()[0]["index"]

  def call(self, images: np.ndarray) -> Callable[[], None]:
    """What is timed: the network alone, with its input in place."""
    self._model.set_tensor(self._in, images)
    return self._model.invoke

  def logits(self, images: np.ndarray, batch: int) -> np.ndarray:
    """(n, classes), `batch` at a time."""

    def one(rows):
      self._model.set_tensor(self._in, rows)
      self._model.invoke()
      return self._model.get_tensor(self._out)

    return _in_batches(one, images, batch)


class OnnxRuntime:
  """An .onnx file."""

  label: ClassVar[str] = "onnxruntime"
  packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")

  def __init__(self, content: bytes):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

  def call(self, images: np.ndarray) -> Callable[[], Any]:
    """What is timed, with arrays bound once."""
    binding = self._session.io_binding()
    binding.bind_cpu_input("images", images)
    binding.bind_output("logits")
    return lambda: self._session.run_with_iobinding(binding)

  def logits(self, images: np.ndarray, batch: int) -> np.ndarray:
    """(n, classes), `batch` at a time."""
    return _in_batches(lambda rows: self._session.run(None, {"images": rows})[0], images, batch)


class Exported:
  """StableHLO as `jax.export` wrote it, read back and run by JAX itself: verified, not timed, since no device runs it as it is."""

  def __init__(self, content: bytes):
    import jax

    self._call = jax.jit(jax.export.deserialize(bytearray(content)).call)

  def logits(self, images: np.ndarray, batch: int) -> np.ndarray:
    """(n, classes), `batch` at a time."""
    return _in_batches(lambda rows: np.asarray(self._call(rows)[0]), images, batch)


RUNTIMES = {"tflite": LiteRT, "onnx": OnnxRuntime}
READERS = RUNTIMES | {"stablehlo": Exported}


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 20) -> dict[str, dict[str, float]]:
  """Microseconds of functions that are called by turns, so that what disturbs a machine disturbs all of them alike.

  Args:
    calls: by name.
    repeats: of each.
    warm_up: calls before any counts.

  Returns:
    By name the median, and the 10 and 90 % quantiles.
  """
  times: dict[str, list[float]] = {name: [] for name in calls}
  for i in range(warm_up + repeats):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      if i >= warm_up:
        times[name].append(1e6 * (time.perf_counter() - start))
  return {name: dict(zip(("median", "low", "high"), map(float, np.quantile(values, (0.5, 0.1, 0.9))))) for name, values in times.items()}


def versions_of(formats: Sequence[str]) -> dict[str, str]:
  """Of the packages that wrote and ran files of these formats."""
  names = {package.replace("_", "-") for form in formats if form in RUNTIMES for package in RUNTIMES[form].packages}
  return {name: importlib.metadata.version(name) for name in sorted(names)}


def _in_batches(function, images, batch):
  count = -(-len(images) // batch) * batch
  padded = np.concatenate([images, np.zeros((count - len(images), *images.shape[1:]), images.dtype)])
  return np.concatenate([function(np.ascontiguousarray(padded[start : start + batch])) for start in range(0, count, batch)])[: len(images)]

"""A device: loads a .tflite file that adapts, adapts it to a few samples, and shows what that changes.

    python adapt.py model.tflite data.npz

It needs numpy and ai-edge-litert, and neither JAX nor metagater_jax. The data has `images` (n, …) float32, as the model card says that they are
scaled, `labels` (n,) whole numbers, and `test_images`, `test_labels`. The last line it prints is JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def accuracy(infer, params, images, labels):
  """Of what `infer` says of each image, one at a time."""
  size = infer.get_input_details()["images"]["shape"][0]
  right = 0
  for start in range(0, len(images), size):
    batch = images[start : start + size]
    padded = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), np.float32)])
    right += int((infer(**params, images=padded)["logits"].argmax(-1)[: len(batch)] == labels[start : start + size]).sum())
  return right / len(images)


def memory(what):
  """Megabytes of this process, as Linux counts them: VmRSS now, VmHWM at the peak."""
  status = Path("/proc/self/status")
  return int(status.read_text().split(f"{what}:")[1].split()[0]) / 1024 if status.exists() else float("nan")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("model", help="a .tflite file with the signatures initial, adapt and infer")
  parser.add_argument("data", help="an .npz file")
  parser.add_argument("--repeats", type=int, default=10, help="how often adaptation is timed; default: 10")
  parser.add_argument("--save", help="where the adapted parameters go, as .npz")
  options = parser.parse_args()
  data = dict(np.load(options.data))
  before_loading = memory("VmRSS")
  if Path("/proc/self/clear_refs").exists():
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
  model = Interpreter(options.model, num_threads=1)
  initial, adapt, infer = (model.get_signature_runner(name) for name in ("initial", "adapt", "infer"))
  params = initial()

  rows = adapt.get_input_details()["images"]["shape"][0]  # so many samples fit; fewer are filled up with rows of weight 0
  count = int(min(rows, len(data["images"])))
  images = np.zeros((rows, *data["images"].shape[1:]), np.float32)
  labels, weight = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
  images[:count], labels[:count], weight[:count] = data["images"][:count], data["labels"][:count], 1

  seconds = []
  for _ in range(options.repeats):
    start = time.perf_counter()
    adapted = adapt(**params, images=images, labels=labels, weight=weight)
    seconds.append(time.perf_counter() - start)
  adapted = {name: np.array(value) for name, value in adapted.items()}
  peak = memory("VmHWM") - before_loading
  same_shapes = all(name in params and params[name].shape == value.shape for name, value in adapted.items())
  before = accuracy(infer, params, data["test_images"], data["test_labels"]) if same_shapes else None  # a smaller network has no state before it
  after = accuracy(infer, adapted, data["test_images"], data["test_labels"])
  print(
    f"adapted to {count} samples in {1e3 * statistics.median(seconds):.1f} ms; accuracy on {len(data['test_images'])} others: "
    + (f"{100 * before:.1f} % before, " if before is not None else "")
    + f"{100 * after:.1f} % after; {peak:.0f} MB more memory at the peak"
  )
  if options.save:
    np.savez(options.save, **adapted)
  print(json.dumps({"samples": count, "ms": 1e3 * statistics.median(seconds), "peak_mb": peak, "accuracy_before": before, "accuracy": after}))


if __name__ == "__main__":
  main()

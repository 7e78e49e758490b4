"""`python -m benchmarks.bfloat16 --data_dir=DIR`: what computing in bfloat16 does to accuracy, on CIFAR-10 with gates.

MetaGater with the settings and rounds of configs/cifar10.py in float32 and in bfloat16, the same seeds and so the same tasks and
draws: the difference is that of the number format alone.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from configs import cifar10
from experiments.runs import placement
from experiments.runs.federated import run_seeds
from experiments.studies.study import parse_seeds

__all__ = ["main"]


def main() -> None:
  """Prints accuracies by seed and, with --out, writes them as JSON."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.bfloat16", description=__doc__.split("\n")[0])
  parser.add_argument("--seeds", type=parse_seeds, default=(1, 2, 3), help="4, 1-3 or 1,4-6; default: 1-3")
  parser.add_argument("--data_dir")
  parser.add_argument("--out", type=Path)
  options = parser.parse_args()
  accuracy = {}
  for dtype in ("float32", "bfloat16"):
    config = cifar10.get_config()
    config.update(compute_dtype=dtype, data_dir=options.data_dir, eval_every=config.rounds)
    placement.use_cores(config)
    with tempfile.TemporaryDirectory() as folder:
      results = run_seeds(config, {seed: Path(folder) / str(seed) for seed in options.seeds}, quiet=True)
    for result in results.values():
      if isinstance(result, Exception):
        raise result
    accuracy[dtype] = [result["accuracy"]["mean"] for result in results.values()]
    print(dtype, ", ".join(f"{100 * value:.2f} %" for value in accuracy[dtype]), flush=True)
  difference = np.subtract(accuracy["bfloat16"], accuracy["float32"])
  print(f"bfloat16 - float32: {100 * difference.mean():+.2f} points, by seed {np.round(100 * difference, 2).tolist()}")
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"accuracy": accuracy, "rounds": config.rounds}, indent=1) + "\n")


if __name__ == "__main__":
  main()

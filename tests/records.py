"""Records of runs with chosen numbers, for tests of what is made from them."""

import json

import numpy as np


def spread(values):
  return {"mean": float(np.mean(values)), "std": float(np.std(values)), "per_task": list(values)}


def record(workdir, row, seed, accuracy, sparsity=None, on_rate=None, curve=(0.5,), train_loss=0.5):
  """What a finished run of `experiments.tables` leaves, with chosen numbers."""
  folder = workdir / f"{row.protocol}-{row.method}-k{row.local_steps}" / f"seed-{seed}"
  folder.mkdir(parents=True)
  (folder / "result.json").write_text(
    json.dumps(
      {
        "accuracy": spread([accuracy - 0.1, accuracy + 0.1]),
        "accuracy_before_adaptation": spread([0.2, 0.3]),
        "sparsity": spread(sparsity) if sparsity else None,
        "on_rate": on_rate or {},
        "target_labels": [[0, 1], [2, 3]],
        "macs": {"dense": 100, "gated": 80.0 if sparsity else None},
        "parameters": {"dense": 10, "gated": 5.0 if sparsity else None},
        "learning_seconds": 0.5 if row.method == "metagater" else 0.4,
        "round_ms": 125.0 + seed,
        "rounds": 100,
      }
    )
  )
  (folder / "metrics.jsonl").write_text(
    "".join(json.dumps({"round": 10 * (i + 1), "accuracy_mean": value, "train_loss": train_loss}) + "\n" for i, value in enumerate(curve))
  )

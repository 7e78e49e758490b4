"""What bounds a round: its arithmetic and its bytes against what the device attains; and a whole row of Table 1."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import CASES, ROUNDS, flop_per_round, matrix_rate, medians, population, program, row

__all__ = ["roofline", "table1_row"]


def roofline(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """Achieved and attainable FLOP/s and bytes/s of the CIFAR-10 round, with the tasks mapped as `auto` does and under vmap.

  Bytes are those that XLA counts for the program's operations, fused as they are; what stays in a cache is among them, which on a
  CPU is most of it. The
  attainable rates are measured: a large matrix product, and a copy of an array that no cache holds.
  """
  rows = []
  product, product_flop = matrix_rate()
  size = (1 << 26) if jax.default_backend() == "cpu" else (1 << 29)
  # Many passes in one program, over buffers that are there already: a fresh one would cost its page faults.
  array, passes = jnp.ones(size, jnp.float32), 10
  copy = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda i, x: x + 1, x))
  for name in ("cifar10",) if quick else ("mnist", "cifar10", "cifar10_gated", "cifar100"):
    case = CASES[name]
    tasks = population(40 if case.cohort > 5 else 20, 200, case.shape, case.classes)
    hows = ("auto",) if jax.default_backend() == "cpu" else ("merged", "vmap", "map", 5)
    for how in hows:
      ready = program(case, tasks, task_axis=how, default=jax.default_backend() == "cpu")
      counted = program(case, tasks, task_axis="vmap", rounds=1)  # no loop, so that XLA counts every operation once
      seconds = medians(repeats, {"product": product, "copy": lambda: copy(array), "round": ready.run})
      flops, bandwidth = product_flop / seconds["product"], passes * 2 * 4 * size / seconds["copy"]
      each = seconds["round"] / ROUNDS
      achieved, moved = flop_per_round(case) / each, counted.cost.get("bytes accessed", 0.0) / each
      bound = "arithmetic" if achieved / flops > moved / bandwidth else "bytes"
      if max(achieved / flops, moved / bandwidth) < 0.2:
        bound = "neither (the number of small operations)"
      if jax.default_backend() == "cpu":
        bound = "unknown (most of these bytes stay in caches)"
      rows.append(
        row(
          f"{case.name}, task_axis {how}: {100 * achieved / flops:.0f} % of {flops / 1e9:,.0f} GFLOP/s, "
          f"{100 * moved / bandwidth:.0f} % of {bandwidth / 1e9:,.0f} GB/s; bound by {bound}",
          1000 * each,
          "ms",
          key=f"roofline-{name}-{how}",
          of_flops=achieved / flops,
          of_bandwidth=moved / bandwidth,
          bound=bound,
        )
      )
  return rows


def table1_row(repeats: int, quick: bool, data_dir: str | None = None) -> list[dict[str, Any]]:
  """The CIFAR-10 row "w/ gating, K = 1" of Table 1: 100 rounds with evaluation every 10, after compilation.

  Without `data_dir` on random images: the same work. On a CPU it is left out, `experiments.tables` has it.
  """
  del repeats
  if quick or jax.default_backend() == "cpu":
    return []
  from configs import cifar10
  from experiments.run import run
  from metagater_jax.data.datasets import Dataset

  config = cifar10.get_config()
  config.update(eval_every=10, data_dir=data_dir)
  data = None
  if data_dir is None:
    rng = np.random.default_rng(0)
    data = Dataset("random", rng.integers(0, 256, (60_000, 32, 32, 3), np.uint8), np.arange(60_000, dtype=np.int32) % 10, 10)
  with tempfile.TemporaryDirectory() as folder:
    seconds = run(config, Path(folder) / "run", data, quiet=True)["seconds"]
  return [
    row(
      "Table 1, CIFAR-10 with gates, K = 1: 100 rounds, evaluation every 10, after compilation",
      seconds["train"] + seconds["evaluate"],
      "s",
      key="table1",
      compile_seconds=seconds["compile"],
    )
  ]

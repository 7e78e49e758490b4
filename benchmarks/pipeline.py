"""What surrounds the rounds: adaptation and evaluation of a target task, data loading, and the command as a whole."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metagater_jax as mg
from benchmarks.measure import CASES, compiled, medians, network_of, population, row
from metagater_jax.data.datasets import load_dataset

__all__ = ["command", "loading", "target_tasks"]

_ROOT = Path(__file__).resolve().parent.parent


def target_tasks(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """Both stages of the adaptation, and evaluation before and after it, per target task of 375 train and 125 test samples."""
  rows = []
  for name in ("cifar10_gated",) if quick else ("mnist", "cifar10", "cifar10_gated", "cifar100"):
    case = CASES[name]
    network = network_of(case)
    tasks = population(10, 500, case.shape, case.classes)
    tasks = tasks._replace(train_count=jnp.full(10, 375), test_count=jnp.full(10, 125))
    personalizer = (mg.two_stage if case.gated else mg.fine_tune)(mg.classification_loss(network))
    model = mg.Model(network.init(jax.random.key(0), case.shape))
    adapt = compiled(lambda model, tasks: personalizer.adapt(model, tasks.train(3)), model, tasks)
    both = compiled(lambda model, tasks, targets: mg.evaluate_targets(network, personalizer, model, tasks, targets), model, tasks, jnp.arange(10))
    seconds = medians(repeats, {"adapt": adapt.run, "both": both.run})
    rows += [
      row(
        f"{case.name.replace(' round', '')}: adaptation of a target task",
        1000 * seconds["adapt"],
        "ms",
        compile_seconds=adapt.compile_seconds,
        peak_mb=adapt.peak_bytes / 2**20,
      ),
      row(
        f"{case.name.replace(' round', '')}: adaptation and evaluation, per target task",
        100 * seconds["both"],
        "ms",
        compile_seconds=both.compile_seconds,
        peak_mb=both.peak_bytes / 2**20,
      ),
    ]
  return rows


def loading(repeats: int, quick: bool, data_dir: str | None = None) -> list[dict[str, Any]]:
  """Decoding a data set once, and mapping it from the cache, to arrays on the device."""
  rows = []
  for name in ("mnist",) if quick else ("mnist", "cifar10"):
    with tempfile.TemporaryDirectory() as folder:
      cache = os.environ.get("METAGATER_CACHE")
      os.environ["METAGATER_CACHE"] = folder
      try:
        times = []
        for _ in range(repeats + 1):
          start = time.perf_counter()
          data = load_dataset(name, data_dir)
          jax.block_until_ready(jnp.asarray(np.asarray(data.images)))
          times.append(time.perf_counter() - start)
      except ValueError as error:
        print(f"loading is not measured: {str(error).splitlines()[0]}")
        return rows
      finally:
        os.environ.pop("METAGATER_CACHE")
        if cache is not None:
          os.environ["METAGATER_CACHE"] = cache
    rows += [
      row(f"{name}: decoded once", times[0], "s"),
      row(f"{name}: from the cache to the device", float(np.median(times[1:])), "s", key=f"cache-{name}"),
    ]
  return rows


def command(repeats: int, quick: bool, data_dir: str | None = None) -> list[dict[str, Any]]:
  """`python -m experiments.run` with one round: seconds from the command to its end without compilation (an upper bound of
  the time to the first round), and what each paper configuration takes to compile."""
  rows = []
  for name in ("digits",) if quick or data_dir is None else ("digits", "mnist", "cifar10", "cifar10_moderate", "cifar10_small", "cifar100"):
    with tempfile.TemporaryDirectory() as folder:
      flags = [f"--config=configs/{name}.py", "--config.rounds=1", f"--workdir={folder}/run"]
      if name != "digits":
        flags.append(f"--config.data_dir={Path(data_dir).resolve()}")
      start = time.perf_counter()
      done = subprocess.run([sys.executable, "-m", "experiments.run", *flags], cwd=_ROOT, capture_output=True, text=True)
      seconds = time.perf_counter() - start
      if done.returncode:
        print(f"configs/{name}.py did not run: {done.stderr.strip().splitlines()[-1]}")
        continue
      result = json.loads((Path(folder) / "run" / "result.json").read_text())
    compile_seconds = result["seconds"]["compile"]
    after_first = result["seconds"]["evaluate"]
    rows.append(
      row(
        f"configs/{name}.py: command to the end of the first round, without compilation",
        seconds - compile_seconds - after_first,
        "s",
        key=f"command-{name}",
        compile_seconds=compile_seconds,
      )
    )
  return rows

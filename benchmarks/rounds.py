"""What a round costs, as ratios against a matrix product, a plain PyTorch loop and FedJAX in the same run."""

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import jax

import metagater_jax as mg
from benchmarks.measure import CASES, ROUNDS, flop_per_round, matrix_rate, medians, population, program, row
from benchmarks.torch_loops import torch_rounds

__all__ = ["FEDJAX_PYTHON", "against_others", "compilers", "dtypes", "on_cores", "rounds", "task_axes"]

FEDJAX_PYTHON = Path(__file__).resolve().parent.parent / ".venv-fedjax" / "bin" / "python"

# (case, local steps); seven layers also as the configs have them, with the widths of the paper's tables on two cores.
_ROUNDS = [
  ("mnist", 1),
  ("mnist", 10),
  ("cifar10", 1),
  ("cifar10", 10),
  ("cifar10_gated", 1),
  ("cifar10_gated", 10),
  ("cifar100", 1),
  ("cifar100", 10),
]


def _tasks(case):
  return population(40 if case.cohort > 5 else 20, 200 if case.cohort > 5 else 2500, case.shape, case.classes)


def rounds(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """Round times of the paper's networks, and the fraction of the machine's matrix-product rate that they reach."""
  rows = []
  product, product_flop = matrix_rate()
  for group in (("mnist",), ("cifar10", "cifar10_gated"), ("cifar100",)):
    tasks = _tasks(CASES[group[0]])
    count = lambda name, steps: 2 if steps > 1 or name == "cifar100" else ROUNDS  # these take seconds each
    programs = {
      (name, steps): program(CASES[name], tasks, steps=steps, rounds=count(name, steps), default=True)
      for name, steps in _ROUNDS
      if name in group and not (quick and (steps > 1 or name == "cifar100"))
    }
    seconds = medians(repeats, {"product": product, **{key: p.run for key, p in programs.items()}})
    peak = product_flop / seconds["product"]
    if not rows:
      rows.append(row("matrix product, float32", peak / 1e9, "GFLOP/s"))
    for (name, steps), p in programs.items():
      rate = flop_per_round(CASES[name], steps) * count(name, steps) / seconds[name, steps]
      rows.append(
        row(
          f"{CASES[name].name}, K = {steps}",
          1000 * seconds[name, steps] / count(name, steps),
          "ms",
          key=f"{name}-{steps}",
          compile_seconds=p.compile_seconds,
          peak_mb=p.peak_bytes / 2**20,
          gflop_per_second=rate / 1e9,
          of_matrix_rate=rate / peak,
        )
      )
    if ("cifar10_gated", 1) in programs:
      rows.append(row("CIFAR-10 round, K = 1: gated / not gated", seconds["cifar10_gated", 1] / seconds["cifar10", 1], "ratio", key="gated"))
  return rows


def task_axes(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """The same round with its tasks mapped in every way; `auto` should be the fastest of its backend."""
  rows = []
  for name in ("mnist", "cifar10"):
    case, tasks = CASES[name], _tasks(CASES[name])
    hows = ["merged", "vmap", "map"] + ([] if quick or name == "mnist" else [2, 5])
    programs = {how: program(case, tasks, task_axis=how) for how in hows}
    if len(jax.devices()) > 1:
      programs["map over a mesh"] = program(case, tasks, task_axis="map", mesh=mg.core.task_mesh())
    seconds = medians(repeats, {how: p.run for how, p in programs.items()})
    rows += [
      row(
        f"{case.name}, K = 1, task_axis {how}",
        1000 * seconds[how] / ROUNDS,
        "ms",
        key=f"axis-{name}-{how}",
        compile_seconds=p.compile_seconds,
        peak_mb=p.peak_bytes / 2**20,
      )
      for how, p in programs.items()
    ]
  return rows


def on_cores(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """One device of all cores against a device per core, with whole batches and with parts that fit in a core's cache."""
  if jax.default_backend() != "cpu" or len(jax.devices()) < 2:
    return []
  rows = []
  for name in ("cifar10",) if quick else ("cifar10", "cifar10_gated", "cifar100"):
    case, tasks = CASES[name], _tasks(CASES[name])
    settings = [(mesh, part) for mesh in (None, mg.core.task_mesh()) for part in (0, 2, 5)]
    programs = {(mesh is not None, part): program(case, tasks, task_axis="map", mesh=mesh, microbatch=part, rounds=2) for mesh, part in settings}
    seconds = medians(repeats, {key: p.run for key, p in programs.items()})
    rows += [
      row(
        f"{case.name}, K = 1, {len(jax.devices()) if spread else 1} devices, microbatch {part or 'whole'}",
        1000 * seconds[spread, part] / 2,
        "ms",
        key=f"cores-{name}-{spread}-{part}",
        peak_mb=p.peak_bytes / 2**20,
      )
      for (spread, part), p in programs.items()
    ]
  return rows


def compilers(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """Rounds compiled with XLA's own options and with those of `experiments.runs.programs`."""
  rows = []
  for name in ("cifar10",) if quick or jax.default_backend() != "cpu" else ("mnist", "cifar10", "cifar10_gated", "cifar100"):
    case, tasks = CASES[name], _tasks(CASES[name])
    ours = {"xla_cpu_use_fusion_emitters": False} if jax.default_backend() == "cpu" else {}
    programs = {label: program(case, tasks, default=True, options=options) for label, options in (("default", {}), ("ours", ours))}
    seconds = medians(repeats, {label: p.run for label, p in programs.items()})
    rows += [
      row(f"{case.name}, K = 1, compiled with {label} options", 1000 * seconds[label] / ROUNDS, "ms", compile_seconds=p.compile_seconds)
      for label, p in programs.items()
    ]
  return rows


def dtypes(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """float32 against bfloat16 compute. (Its effect on accuracy: `python -m benchmarks.bfloat16`.)"""
  del quick
  case = CASES["cifar10"]
  tasks = _tasks(case)
  programs = {dtype: program(case, tasks, compute_dtype=dtype) for dtype in ("float32", "bfloat16")}
  seconds = medians(repeats, {dtype: p.run for dtype, p in programs.items()})
  return [
    row(
      "CIFAR-10 round, K = 1: bfloat16 / float32",
      seconds["bfloat16"] / seconds["float32"],
      "ratio",
      key="bfloat16",
      compile_seconds=programs["bfloat16"].compile_seconds,
      peak_mb=programs["bfloat16"].peak_bytes / 2**20,
    )
  ]


def against_others(repeats: int, quick: bool, fedjax_python: Path = FEDJAX_PYTHON) -> list[dict[str, Any]]:
  """The same work in a plain PyTorch loop and in FedJAX, as ratios of medians that were taken in turn."""
  rows = []
  for name, steps in (("mnist", 1), ("mnist", 10), ("cifar10", 1), ("cifar10", 10), ("cifar100", 1)):
    case = CASES[name]._replace(gated=())
    if quick and (name, steps) not in (("mnist", 1), ("cifar10", 1)):
      continue
    tasks = _tasks(case)
    count = ROUNDS if steps == 1 and name == "mnist" else 2  # of the slower loop's rounds
    try:
      torch = torch_rounds(case, tasks, steps, count)
    except ImportError as error:
      print(f"PyTorch cannot be imported ({error}): pip install -e '.[benchmark]' for the comparison with its loop.")
      break
    ours = program(case, tasks, steps=steps, rounds=count, default=True)
    seconds = medians(repeats * (3 if name == "mnist" else 1), {"ours": ours.run, "torch": torch}, pause=0.5)
    rows.append(row(f"{case.name}, not gated, K = {steps}: PyTorch loop", 1000 * seconds["torch"] / count, "ms"))
    rows.append(
      row(f"{case.name}, not gated, K = {steps}: ours / PyTorch loop", seconds["ours"] / seconds["torch"], "ratio", key=f"torch-{name}-{steps}")
    )
  for name in ("mnist", "cifar10"):
    case = CASES[name]._replace(gated=())
    ours = program(case, _tasks(case), make=partial(mg.fedavg, local_lr=0.05), default=True)
    before = medians(repeats, {"ours": ours.run})["ours"]
    try:
      theirs = _fedjax(fedjax_python, name, 5 * repeats if name == "mnist" else repeats)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
      print(f"FedJAX cannot run ({error}): `make .venv-fedjax/ready` makes its environment.")
      break
    after = medians(repeats, {"ours": ours.run})["ours"]
    seconds = (before + after) / 2  # the other process ran in between
    rows.append(row(f"FedAvg, {case.name}, K = 1: FedJAX's (jax {theirs['jax']})", theirs["round_ms"], "ms"))
    rows.append(
      row(f"FedAvg, {case.name}, K = 1: FedJAX's time / ours", theirs["round_ms"] / (1000 * seconds / ROUNDS), "ratio", key=f"fedjax-{name}")
    )
  return rows


def _fedjax(python, name, repeats):
  if not Path(python).is_file():
    raise FileNotFoundError(f"there is no {python}")
  script = Path(__file__).with_name("fedjax_rounds.py")
  done = subprocess.run([str(python), str(script), name, "1", str(repeats)], capture_output=True, text=True, timeout=600)
  if done.returncode:
    raise subprocess.SubprocessError(done.stderr.strip().splitlines()[-1])
  return json.loads(done.stdout.strip().splitlines()[-1])

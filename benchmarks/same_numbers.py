"""`python -m benchmarks.same_numbers --out=a.json [--tree=OTHER_CHECKOUT]`: the numbers of a fixed set of short runs.

For changes that must not change results: record the set with the code as it was (`--tree` names a checkout of it), then with the code as
it is, and compare:

    python -m benchmarks.same_numbers --tree=../before --out=before.json
    python -m benchmarks.same_numbers --out=after.json --against=before.json

Every algorithm runs on digits, MNIST and CIFAR-10, gated and not, resident, streamed, over a mesh and in two processes; few-shot learners run
with every pruning score; studies run in small. Numbers are those of all JSON records and parameter files that a run leaves, without times.
On one machine equal arithmetic gives equal bits.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["compare", "main", "read_numbers"]

_ROOT = Path(__file__).resolve().parent.parent

# What a record says of time, machine and code, and not of results.
_VOLATILE = {
  "seconds",
  "round_ms",
  "learning_seconds",
  "compile_seconds",
  "episodes_per_second",
  "versions",
  "devices",
  "temporary_mb",
  "train_seconds",
  "seconds_per_step",
}

_SMALL_FEWSHOT = (
  "--config.ways=3 --config.queries=4 --config.train_queries=4 --config.widths=(4,4,4,4) --config.steps=12 --config.eval_every=6 "
  "--config.validation_episodes=8 --config.test_episodes=16 --config.inner_steps=2 --config.test_inner_steps=3 "
  "--config.steps_per_dispatch=6 --config.episodes=2 --config.prune.episodes=4 --config.mesh=none"
)


def _commands(data: str, new: bool) -> Iterator[tuple[str, list[list[str]]]]:
  """Name of a run to its commands, in which WORKDIR stands for its folder; several commands start together. `new`: of the tree as it is now."""
  run = lambda config, text, workdir="WORKDIR": [
    "-m",
    "experiments.run",
    f"--config=configs/{config}.py",
    f"--workdir={workdir}",
    f"--config.data_dir={data}",
    *text.split(),
  ]
  for algorithm in ("metagater", "fedavg", "fedprox", "per_fedavg", "pfedme", "reptile"):
    short = f"--config.algorithm={algorithm} --config.rounds=6 --config.eval_every=3"
    yield f"digits {algorithm}", [run("digits", f"{short} --config.gated=True")]
    yield f"digits {algorithm}, K = 2, not gated", [run("digits", f"{short} --config.gated=False --config.local_steps=2")]
    yield f"mnist {algorithm}", [run("mnist", short)]
  for algorithm, gated, rates in (
    ("metagater", True, ""),
    ("metagater", False, ""),
    ("fedavg", False, ""),
    ("per_fedavg", False, ""),
    ("pfedme", False, "--config.local_lr=0.01 --config.personal_lr=0.02"),
  ):
    yield (
      f"cifar10_small {algorithm}{' gated' * gated}{', own rates' * bool(rates)}",
      [
        run(
          "cifar10_small",
          (
            f"{rates} --config.algorithm={algorithm} --config.gated={gated} --config.rounds=2 --config.eval_every=2 --config.cohort=4 --config.tasks=24 "
            "--config.target_tasks=4 --config.validation_tasks=2 --config.widths=(8,8,8,8,8,8)"
          ),
        )
      ],
    )
  yield (
    "cifar10 metagater gated",
    [
      run(
        "cifar10", "--config.rounds=2 --config.eval_every=2 --config.cohort=4 --config.tasks=24 --config.target_tasks=4 --config.validation_tasks=2"
      )
    ],
  )
  for gradient in ("exact", "hessian_free"):
    yield f"digits per_fedavg {gradient}", [run("digits", f"--config.algorithm=per_fedavg --config.DERIVATIVE={gradient} --config.rounds=6")]
  short = "--config.rounds=6 --config.eval_every=3"
  yield "digits streamed", [run("digits", f"{short} --config.memory_mb=8")]
  yield "digits meshed", [run("digits", f"{short} --config.mesh=auto")]
  yield (
    "digits dirichlet, vmap",
    [run("digits", f"{short} --config.partition=dirichlet --config.tasks=8 --config.target_tasks=3 --config.task_axis=vmap")],
  )
  with socket.socket() as probe:
    probe.bind(("", 0))
    port = probe.getsockname()[1]
  yield (
    "digits in two processes",
    [run("digits", f"{short} --coordinator=localhost:{port} --num_processes=2 --process_id={i}", f"WORKDIR/{i}") for i in range(2)],
  )
  for prune in (
    "--config.prune.score=anp",
    "--config.prune.score=anp --config.prune.average=signed",
    "--config.prune.score=snip",
    "--config.prune.score=magnitude",
    "--config.prune.score=magnitude --config.prune.granularity=channel",
  ):
    yield f"digits pruned {prune}", [run("digits", f"{short} --config.prune.sparsity=0.8 --config.prune.every=1 {prune}")]
  fewshot = lambda text: [
    [
      "-m",
      "experiments.fewshot",
      "--config=configs/cifarfs_maml.py",
      "--workdir=WORKDIR",
      f"--config.data_dir={data}",
      *_SMALL_FEWSHOT.split(),
      *text.split(),
    ]
  ]
  for learner in ("maml", "anil", "reptile"):
    for score in ("none", "anp", "snip", "magnitude", "random"):
      prune = "" if score == "none" else f"--config.prune.score={score} --config.prune.sparsity=0.6 --config.prune.every=1"
      yield f"fewshot {learner} {score}", fewshot(f"--config.learner={learner} {prune}")
  yield "fewshot maml first order", fewshot("--config.derivative=first_order")
  yield "fewshot maml learned rates", fewshot("--config.learn_rates=True")
  yield (
    "fewshot resnet12",
    fewshot(
      "--config.model=resnet12 --config.learner=anil --config.prune.score=anp --config.prune.sparsity=0.6 "
      "--config.prune.every=1 --config.prune.granularity=channel"
    ),
  )
  yield (
    "tables",
    [
      [
        "-m",
        "experiments.tables",
        "--tables=1,2",
        f"--seeds={'1-' if new else ''}2",
        "--rounds=2",
        "--protocols=mnist,cifar10",
        "--workdir=WORKDIR",
        f"--data_dir={data}",
      ]
    ],
  )
  for protocol, methods in (("mnist", "fedavg,per_fedavg"), ("digits", "metagater_ungated,metagater")):
    yield (
      f"tune {protocol}",
      [
        [
          "-m",
          "experiments.tune",
          f"--protocols={protocol}",
          f"--methods={methods}",
          "--trials=2",
          "--rates=3",
          "--rounds=3",
          "--out=WORKDIR",
          f"--data_dir={data}",
          *(["--workdir=WORKDIR/trials"] if new else []),
        ]
      ],
    )
  yield "anp", [["-c", _ANP]]
  yield "pruned rounds", [["-c", _PRUNED_ROUNDS]]
  yield "sparsity curve", [["-c", _CURVE]]


# Programs for studies whose command line has no small form; each begins with the imports of the tree that it runs in.
_NEW = "from experiments import run as training\nfrom experiments.studies import anp, pruned_rounds, sparsity_curve\n"
_OLD = "from experiments import anp_tables as anp, pruned_rounds, sparsity_curve, training\n"
_ANP = """
from fewshot_problem import small, small_splits
fields = {k: v for k, v in small().items() if k not in ("steps", "eval_every", "shots", "model", "prune", "data_dir", "seed", "name")}
anp.reproduce("WORKDIR", cases=("conv4-1", "conv4-1-filters"), seeds=(1,), scores=("none", "anp", "anp_first_order", "anp_layer", "snip",
              "magnitude", "random"), steps=12, level_steps=(4,), splits=small_splits(), fields=fields, log=print)
"""
_PRUNED_ROUNDS = """
from configs import digits
config = digits.get_config()
config.update(rounds=4, tasks=8, target_tasks=3)
config.prune.update(score="anp", sparsity=0.8, every=1)
pruned_rounds.reproduce("WORKDIR", scores=("none", "anp", "snip", "magnitude"), seeds=(1, 2), config=config)
"""
_CURVE = """
import json, pathlib
from configs import digits
config = digits.get_config()
config.update(rounds=6, eval_every=6)
training.run(config, "WORKDIR/run", quiet=True)
curve = sparsity_curve.curve_of_run("WORKDIR/run", [0.0, 0.3, 0.6])
pathlib.Path("WORKDIR/curve.json").write_text(json.dumps(curve))
"""


def read_numbers(folder: Path) -> dict[str, Any]:
  """All numbers of the records below a folder, by file and key; of parameters a digest, and their sum for an idea of a difference."""
  numbers = {}
  for path in sorted(folder.rglob("*")):
    name = str(path.relative_to(folder))
    if path.suffix == ".json" and "config" not in path.name:
      _flatten(json.loads(path.read_text()), name, numbers)
    elif path.suffix == ".jsonl":
      for i, line in enumerate(path.read_text().splitlines()):
        _flatten(json.loads(line), f"{name}:{i}", numbers)
    elif path.suffix == ".npz":
      with np.load(path) as archive:
        for leaf, values in archive.items():
          numbers[f"{name}:{leaf}"] = [
            hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest(),
            float(np.abs(values).sum(dtype=np.float64)),
          ]
  return numbers


def _flatten(value, name, into):
  if isinstance(value, dict):
    for key, part in value.items():
      if key not in _VOLATILE:
        _flatten(part, f"{name}/{key}", into)
  elif isinstance(value, list):
    for i, part in enumerate(value):
      _flatten(part, f"{name}/{i}", into)
  else:
    into[name] = value


def _run(name, commands, tree):
  """The numbers of one run, or what it said when it failed."""
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}"}
    new = (tree / "experiments" / "studies").is_dir()
    imports, names = (_NEW, {}) if new else (_OLD, {"DERIVATIVE": "meta_gradient", "fewshot_conv4": "conv4"})
    names = {"WORKDIR": folder, "DERIVATIVE": "derivative"} | names
    processes = []
    for command in commands:
      command = [imports + part if "\n" in part else part for part in command]
      for old, value in names.items():
        command = [part.replace(old, value) for part in command]
      processes.append(
        subprocess.Popen([sys.executable, *command], cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
      )
    said = [process.communicate()[0] for process in processes]
    failed = [text[-2000:] for process, text in zip(processes, said) if process.returncode]
    numbers = {"failed": failed[0]} if failed else read_numbers(Path(folder))
  print(f"{name}: {'FAILED' if failed else f'{len(numbers)} numbers'}, {time.perf_counter() - start:.0f} s", flush=True)
  return numbers


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
  """A line for each run in which a number of `before` is missing in `after` or differs, with the largest difference."""
  lines = []
  for run, old in before.items():
    new = after.get(run)
    if new is None or "failed" in old or "failed" in new:
      lines.append(f"{run}: {'not run' if new is None else 'failed'}")
      continue
    missing = sorted(name for name in old if name not in new)
    differing = {name: (old[name], new[name]) for name in old if name in new and old[name] != new[name]}
    if missing:
      lines.append(f"{run}: {len(missing)} of {len(old)} numbers are missing, as {missing[0]}")
    if differing:
      value = lambda x: x[1] if isinstance(x, list) else x
      size = {
        name: abs(value(a) - value(b)) if all(isinstance(value(x), int | float) for x in (a, b)) else float("inf")
        for name, (a, b) in differing.items()
      }
      worst = max(size, key=size.get)
      lines.append(
        f"{run}: {len(differing)} of {len(old)} numbers differ, most {worst}: {value(differing[worst][0])} and {value(differing[worst][1])}"
      )
  return lines


def main() -> None:
  """The command; exit status 1 where numbers differ."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.same_numbers", description=__doc__.split("\n")[0])
  parser.add_argument("--tree", type=Path, default=_ROOT, help="the checkout whose code runs; default: this one")
  parser.add_argument("--data_dir", required=True, help="where mnist, cifar10 and cifar100 are")
  parser.add_argument("--out", type=Path, required=True, help="a JSON file for the numbers; what it holds is not run again")
  parser.add_argument("--against", type=Path, help="a file of another call, to compare with")
  parser.add_argument("--only", default="", help="runs whose name contains this")
  parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default: 2")
  options = parser.parse_args()
  numbers = json.loads(options.out.read_text()) if options.out.is_file() else {}
  data = str(Path(options.data_dir).resolve())
  todo = [
    (name, commands)
    for name, commands in _commands(data, (options.tree / "experiments" / "studies").is_dir())
    if options.only in name and name not in numbers
  ]
  with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
    futures = {pool.submit(_run, name, commands, options.tree.resolve()): name for name, commands in todo}
    for future in concurrent.futures.as_completed(futures):
      numbers[futures[future]] = future.result()
      options.out.write_text(json.dumps(numbers))
  if options.against:
    lines = compare({name: run for name, run in json.loads(options.against.read_text()).items() if options.only in name}, numbers)
    print("\n".join(lines) or "All numbers are the same, to the bit.")
    sys.exit(bool(lines))


if __name__ == "__main__":
  main()

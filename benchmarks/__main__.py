"""`python -m benchmarks`: everything that is measured about speed, as a table and as JSON with facts about the machine.

`--quick` measures few cases, and begins no section when its minute is over: what is left out is said. `--only=rounds,cohorts` picks sections and
leaves the others' rows in the file as they are. With `--backend=gpu` JAX must see a GPU; nothing needs a
network, TensorFlow or a data set (loading and the paper's commands are measured where `--data_dir` has them). PyTorch and
FedJAX are optional: `pip install -e '.[benchmark]'`, and `make .venv-fedjax/ready`, an environment of its own.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax

from benchmarks import devices, fewshot, lasso, pipeline, roofline, rounds, scaling
from benchmarks.measure import cores, machine

# Seconds after which `--quick` begins nothing more. A section takes some ten seconds of compiling and as many of measuring.
MINUTE = 40


def _sections(options):
  return {
    "rounds": rounds.rounds,
    "task_axes": rounds.task_axes,
    "cores": rounds.on_cores,
    "compilers": rounds.compilers,
    "others": partial(rounds.against_others, fedjax_python=options.fedjax_python),
    "bfloat16": rounds.dtypes,
    "roofline": roofline.roofline,
    "targets": pipeline.target_tasks,
    "loading": partial(pipeline.loading, data_dir=options.data_dir),
    "command": partial(pipeline.command, data_dir=options.data_dir),
    "populations": scaling.populations,
    "cohorts": scaling.cohorts,
    "steps": scaling.steps_and_widths,
    "memory": scaling.larger_than_memory,
    "table1": partial(roofline.table1_row, data_dir=options.data_dir),
    "lasso": lasso.lasso,
    "maml": fewshot.meta_steps,
    "anp": fewshot.scores,
    "compact": devices.compact,
    "dynamic": devices.dynamic,
  }


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
  parser.add_argument("--quick", action="store_true", help="few cases, and no section is begun when a minute is over")
  parser.add_argument("--only", type=lambda text: text.split(","), help="sections, separated by commas; default: all")
  parser.add_argument("--repeats", type=int, help="of each measurement; default: 7, or 3 with --quick")
  parser.add_argument("--backend", choices=["cpu", "gpu", "tpu"], help="fail if JAX runs on another one")
  parser.add_argument("--devices", type=int, help="of the CPU (default: one per core, for the comparison of task axes)")
  parser.add_argument("--data_dir", help="where MNIST and the CIFAR sets are")
  parser.add_argument("--fedjax_python", type=Path, default=rounds.FEDJAX_PYTHON, help="of FedJAX's own environment")
  parser.add_argument("--out", type=Path, help="a JSON file to write")
  options = parser.parse_args()
  sections = _sections(options)
  unknown = sorted(set(options.only or ()) - set(sections))
  if unknown:
    parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(sections)}.")
  jax.config.update("jax_num_cpu_devices", options.devices or cores())
  if options.backend not in (None, jax.default_backend()):
    parser.error(f"--backend={options.backend}, but JAX runs on {jax.default_backend()} here.")
  repeats = options.repeats or (3 if options.quick else 7)
  facts = machine()
  print(", ".join(f"{name} {value}" for name, value in facts.items()))
  rows = _kept(options, facts)
  begin, left_out = time.perf_counter(), []
  for name, section in sections.items():
    if options.only is not None and name not in options.only:
      continue
    start = time.perf_counter()
    if options.quick and options.only is None and start - begin > MINUTE:
      left_out.append(name)
      continue
    for found in section(repeats, options.quick):
      rows.append({"section": name, "date": facts["date"], **found})
      print(_line(rows[-1]), flush=True)
    print(f"  ({name}: {time.perf_counter() - start:.0f} s)", flush=True)
    if options.out:  # after each section, so that what is measured is kept
      options.out.parent.mkdir(parents=True, exist_ok=True)
      options.out.write_text(json.dumps({"machine": facts, "quick": options.quick, "repeats": repeats, "rows": rows}, indent=1) + "\n")
  if left_out:
    print(f"left out, because the minute is over: {', '.join(left_out)}; --only={left_out[0]} measures one, and without --quick all are.")


def _kept(options, facts):
  """With --only, the rows of the other sections that the file has from the same machine and versions."""
  if not (options.only and options.out and options.out.is_file()):
    return []
  record = json.loads(options.out.read_text())
  same = all(record["machine"].get(name) == value for name, value in facts.items() if name != "date")
  return [row for row in record["rows"] if row["section"] not in options.only] if same else []


def _line(row):
  notes = [f"compiled in {row['compile_seconds']:.1f} s"] if "compile_seconds" in row else []
  notes += [f"{row['peak_mb']:.0f} MB"] if "peak_mb" in row else []
  notes += [f"{row['gflop_per_second']:.0f} GFLOP/s, {100 * row['of_matrix_rate']:.0f} % of a matrix product's"] if "of_matrix_rate" in row else []
  return f"{row['what']:<82} {row['value']:>10.4g} {row['unit']:<8} {'; '.join(notes)}"


if __name__ == "__main__":
  main()

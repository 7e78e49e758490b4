"""The benchmark command, and what its figures are computed from."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command_of
from benchmarks import devices, measure, rounds, scaling
from experiments.reports.benchmarks import section_table
from experiments.runs.runtimes import OnnxRuntime

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments):
  return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=300)


def test_operations_of_a_round_by_hand():
  # Forward and two products backward of every layer but the first, which needs no gradient of its input.
  first, second, third, last = 32 * 32 * 27 * 32, 16 * 16 * 288 * 64, 8 * 8 * 576 * 128, 2048 * 10
  assert measure.flop_per_round(measure.CASES["cifar10"]) == 20 * 20 * 2 * (2 * first + 3 * (second + third + last))
  assert measure.flop_per_round(measure.CASES["mnist"], steps=10) == 5 * 20 * 10 * 2 * (2 * 784 * 100 + 3 * 100 * 10)


def test_medians_take_turns_and_leave_the_first_out():
  calls = []
  medians = measure.medians(3, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
  assert calls == ["a", "b"] * 4 and set(medians) == {"a", "b"}


def test_the_command_writes_its_table_with_facts_about_the_machine(tmp_path):
  done = command("--quick", "--only=lasso", f"--out={tmp_path / 'out.json'}")
  assert done.returncode == 0, done.stderr
  record = json.loads((tmp_path / "out.json").read_text())
  assert {"processor", "cores", "backend", "jax", "date"} <= set(record["machine"]) and record["quick"]
  assert all({"section", "what", "value", "unit"} <= set(row) and np.isfinite(row["value"]) for row in record["rows"])
  assert all(row["what"] in done.stdout for row in record["rows"])
  assert "lasso: time per step" in section_table(record, "others")


@pytest.mark.parametrize(
  "argument, message", [("--only=lassoo", "unknown section lassoo; there are rounds, "), ("--backend=gpu", "--backend=gpu, but JAX runs on cpu here")]
)
def test_bad_arguments(argument, message):
  done = command(argument)
  assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_what_cannot_run_is_said_and_the_rest_goes_on(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  monkeypatch.setattr(rounds, "program", lambda *_, **__: measure.Program(lambda: np.zeros(()), 0.0, 0))
  assert rounds.against_others(1, True, fedjax_python=Path("no/such/python")) == []
  said = capsys.readouterr().out
  assert "PyTorch cannot be imported" in said and "FedJAX cannot run (there is no no/such/python)" in said


def test_a_synthetic_file_is_what_numpy_loads_and_is_gone_afterwards():
  with scaling.synthetic_file(21) as path:
    images, labels, partition = scaling._tasks_of(path, 21)
    assert images.shape == (21 * 500, 32, 32, 3) and len(partition) == 21 and len(labels) == len(images)
    assert np.asarray(images[:500]).std() > 50
    np.testing.assert_array_equal(images[20 * 500], images[0])  # the block comes again
  assert not path.exists()


def test_quick_begins_nothing_after_its_minute(capsys, monkeypatch):
  begun, now = [], [0.0]

  def section(name):
    def measure(repeats, quick):
      begun.append(name)
      now[0] += 25
      return []

    return measure

  monkeypatch.setattr(command_of, "_sections", lambda options: {name: section(name) for name in ("a", "b", "c", "d")})
  monkeypatch.setattr(command_of.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--devices=8"])
  command_of.main()
  assert begun == ["a", "b"] and "left out, because the minute is over: c, d; --only=c" in capsys.readouterr().out


def test_gathered_filters_give_what_masked_ones_give():
  import onnx

  dense, gathered = devices._gathering(6, 3, 8)
  mask = np.arange(8) % 3 == 0
  model = onnx.load_from_string(dense)
  for constant in model.graph.initializer:  # zeros in the place of what the mask leaves out
    if constant.name in ("k1", "b1"):
      values = onnx.numpy_helper.to_array(constant) * mask.reshape(-1, *[1] * (len(constant.dims) - 1))
      constant.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), constant.name))
  images = np.random.default_rng(1).normal(size=(1, 3, 6, 6)).astype(np.float32)
  expected = OnnxRuntime(model.SerializeToString())._session.run(None, {"images": images})[0]
  found = OnnxRuntime(gathered)._session.run(None, {"images": images, "mask": mask})[0]
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_what_compact_files_are_compared_with():
  rows = list(devices.compact(1, True))
  assert [row["key"].split()[-1] for row in rows[:2]] == ["litert", "onnxruntime"] and len(rows) == 8
  # Half of conv2 and conv3: conv1 whole, conv2 half, conv3 a quarter, the dense layer half; of a window of 128 samples, kernels of 5.
  dense = 128 * 5 * 6 * 32 + 64 * 5 * 32 * 64 + 32 * 5 * 64 * 64 + 16 * 64 * 6
  half = 128 * 5 * 6 * 32 + 64 * 5 * 32 * 32 + 32 * 5 * 32 * 32 + 16 * 32 * 6
  assert rows[0]["ideal"] == pytest.approx(dense / half) and all(row["value"] > 0 for row in rows)

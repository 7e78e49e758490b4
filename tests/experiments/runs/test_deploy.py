"""From a run to files: what deploy.json says, what the files do, and what is refused."""

import base64
import json

import numpy as np
import pytest
from commands import call

from configs import digits
from experiments.deploy import main
from experiments.run import run
from experiments.runs import deploy as deploy_module
from experiments.runs.deploy import deploy_run
from experiments.runs.records import read_result
from experiments.runs.runtimes import LiteRT, OnnxRuntime, interleaved


def small(**fields):
  c = digits.get_config()
  c.update(rounds=4, widths=(8, 8, 16), eval_every=4, tuned=None, **fields)
  return c


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
  """(workdir, deploy.json) of a run with a budget, two tasks."""
  workdir = tmp_path_factory.mktemp("gated") / "run"
  result = run(small(keep="conv3=8"), workdir, quiet=True)
  return workdir, deploy_run(workdir, result["target_tasks"][:2], batches=[1], repeats=3, samples=32, log=lambda line: None), result


def test_deploy_json_has_what_a_reader_looks_for(gated):
  workdir, content, result = gated
  assert json.loads((workdir / "deploy.json").read_text()) == json.loads(json.dumps(content))
  for own in [*content["tasks"].values(), content["mean"]]:
    assert own["accuracy"].keys() >= {"dense", "compact", "int8"} and own["macs"].keys() == {"dense", "compact"}
    assert own["latency_us"].keys() == {"litert", "onnxruntime"}
    assert all(times["dense"] > 0 and times["compact"] > 0 for times in own["latency_us"].values())
    assert own["bytes"]["int8"] < own["bytes"]["compact"] < own["bytes"]["dense"]
    assert own["bytes"] == own["bytes_by_format"]["tflite"] and own["bytes_by_format"].keys() == {"tflite", "onnx"}
    assert own["adapt"]["ms"] > 0 and own["adapt"]["max_difference"] < 1e-5
    assert own["adapt"]["restricted"]["accuracy"] == pytest.approx(own["adapt"]["dense"]["accuracy"], abs=0.02)
  # The network that is cut out is the run's own, and costs what the run's accounting says without the gate.
  for task, own in content["tasks"].items():
    place = result["target_tasks"].index(int(task))
    assert [own["accuracy"][name] for name in ("gated", "compact")] == pytest.approx([result["accuracy"]["per_task"][place]] * 2, abs=1e-6)
    assert own["kept"] == {"conv3": 8} and not own["failed"]
  layers = {"conv1": 64 * 9 * 8, "conv2": 16 * 72 * 8, "conv3": 4 * 72 * 8, "output": 8 * 10}
  assert content["mean"]["macs"]["compact"] == sum(layers.values())


@pytest.mark.slow
def test_dense_networks_may_be_those_of_a_run_that_was_tuned_for_itself(gated, tmp_path):
  workdir, before, _ = gated
  plain = run(small(algorithm="fedavg", gated=False, adapt_steps=2, adapt_lr=0.02), tmp_path / "plain", quiet=True)
  task = int(next(iter(before["tasks"])))
  own = deploy_run(workdir, [task], formats=["tflite"], batches=[1], repeats=3, samples=0, dense=tmp_path / "plain", log=lambda line: None)
  found = own["tasks"][str(task)]
  assert own["dense"] == "fedavg, 2 steps" and "adapt" not in found
  assert found["accuracy"]["dense"] == pytest.approx(plain["accuracy"]["per_task"][plain["target_tasks"].index(task)], abs=1e-6)
  assert found["accuracy"]["compact"] == pytest.approx(before["tasks"][str(task)]["accuracy"]["compact"], abs=1e-6)
  run(small(seed=1, algorithm="fedavg", gated=False), tmp_path / "others", quiet=True)
  for dense, message in ((tmp_path / "others", "a run of other tasks: seed is 1 there and 0 here"), (workdir, "must be a run without gates")):
    outcome = call(main, f"--workdir={workdir}", f"--task={task}", f"--dense={dense}")
    assert outcome.status == 2 and message in outcome.err


def test_a_card_travels_with_each_file(gated):
  workdir, content, _ = gated
  task, own = next(iter(content["tasks"].items()))
  assert len(own["files"]) == 6
  for name in own["files"].values():
    card = json.loads((workdir / "deploy" / f"{name}.json").read_text())
    assert card["task"] == int(task) and len(card["classes"]) == 2 and card["bytes"] == (workdir / "deploy" / name).stat().st_size
    assert card["verified"]["largest_difference_relative"] < (0.5 if "int8" in name else 1e-4)
    assert ("onnxruntime" if name.endswith("onnx") else "ai-edge-litert") in card["versions"]


def test_the_files_are_the_tasks_networks(gated):
  workdir, content, result = gated
  task, own = next(iter(content["tasks"].items()))
  run_data = deploy_module._Run(workdir, _config_of(workdir))
  images, labels = deploy_module._rows(run_data.population.test(int(task)))
  for runtime, form in ((LiteRT, "tflite"), (OnnxRuntime, "onnx")):
    model = runtime((workdir / "deploy" / f"task-{task}-compact.{form}").read_bytes())
    assert (model.logits(images, 1).argmax(-1) == labels).mean() == pytest.approx(own["accuracy"]["compact"])


def _config_of(workdir):
  from experiments.config import base_config
  from experiments.runs.records import read_config

  config = base_config()
  config.update(read_config(workdir))
  return config


@pytest.mark.slow
def test_channels_chosen_without_gates(tmp_path, gated):
  """Masks are cut out as gates are, of another personalizer on a finished run's meta-model."""
  dense = run(small(gated=False), tmp_path / "dense", quiet=True)
  run(small(gated=False, personalizer="static_channels", keep="conv3=8", meta_model=str(tmp_path / "dense")), tmp_path / "static", quiet=True)
  content = deploy_run(tmp_path / "static", dense["target_tasks"][:1], formats=["tflite"], batches=[1], repeats=2, log=lambda line: None)
  own = next(iter(content["tasks"].values()))
  assert own["kept"] == {"conv3": 8} and own["accuracy"]["masked"] == pytest.approx(own["accuracy"]["compact"], abs=1e-6)
  place = read_result(tmp_path / "dense")["target_tasks"].index(int(next(iter(content["tasks"]))))
  assert own["accuracy"]["dense"] == pytest.approx(dense["accuracy"]["per_task"][place], abs=1e-6)  # the same model, fine-tuned
  assert own["adapt"]["ms"] > 0 and own["adapt"]["dense"]["max_difference"] < 1e-5 and "restricted" not in own["adapt"]


def test_a_file_that_is_not_what_jax_computes_is_not_left(gated, tmp_path, monkeypatch):
  workdir, content, _ = gated
  task = int(next(iter(content["tasks"])))
  real = LiteRT.logits
  monkeypatch.setattr(LiteRT, "logits", lambda self, images, batch: real(self, images, batch) + 1)
  run_data = deploy_module._Run(workdir, _config_of(workdir))
  own = run_data.task(task, tmp_path, {"threshold": 0.0, "always_on": False, "batches": [1], "repeats": 2, "samples": 8, "formats": ["tflite"]})
  assert own["failed"].keys() == {f"task-{task}-dense.tflite", f"task-{task}-compact.tflite"} and not own["latency_us"]
  assert "differs from JAX" in own["failed"][f"task-{task}-dense.tflite"] and not (tmp_path / f"task-{task}-dense.tflite").exists()


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--task=99"], "task 99 is no target task of this run; they are"),
    (["--all", "--format=tflit"], "unknown format 'tflit'. Did you mean 'tflite'"),
    (["--all", "--repeats=0"], "repeats, multiple and batches must be at least 1"),
    (["--all", "--samples=0", "--page"], "samples of the file which adapts must be at least 1, or 0"),
  ],
)
def test_bad_input(gated, arguments, message):
  outcome = call(main, f"--workdir={gated[0]}", *arguments)
  assert outcome.status == 2 and message in outcome.err


def test_runs_in_which_nothing_can_be_cut(tmp_path):
  outcome = call(main, f"--workdir={tmp_path}", "--all")
  assert outcome.status == 2 and "holds no finished run" in outcome.err
  run(small(gated=False), tmp_path / "plain", quiet=True)
  outcome = call(main, f"--workdir={tmp_path / 'plain'}", "--all")
  assert outcome.status == 2 and "has no gates, and its personalizer 'fine_tune' makes no masks" in outcome.err
  run(small(gated=False, personalizer="metasnip_weight", target_sparsity=0.5, meta_model=str(tmp_path / "plain")), tmp_path / "weights", quiet=True)
  outcome = call(main, f"--workdir={tmp_path / 'weights'}", "--all")
  assert outcome.status == 2 and "removes single weights" in outcome.err


def test_the_command_prints_a_table_and_draws_a_figure(gated):
  workdir, content, _ = gated
  task = next(iter(content["tasks"]))
  outcome = call(
    main, f"--workdir={workdir}", f"--task={task}", "--batches=1,4", "--repeats=2", "--samples=8", "--threshold=0.1", "--always_on", "--page"
  )
  assert outcome.status == 0, outcome.err
  for words in ("compact is", "µs, onnxruntime, batch 4", "adapting on the device, restricted", "deploy.png"):
    assert words in outcome.out
  assert (workdir / "deploy.png").stat().st_size > 10_000
  page = workdir / "deploy" / f"page-{task}"
  assert {path.name for path in page.iterdir()} == {"index.html", "page.js", "package.json", "model.tflite", "data.json"}
  data = json.loads((page / "data.json").read_text())
  images = np.frombuffer(base64.b64decode(data["train"]["images"]), "<f4").reshape(-1, *data["shape"])
  assert len(images) == len(data["train"]["labels"]) == data["samples"] == 8
  assert (page / "model.tflite").read_bytes() == (workdir / "deploy" / f"task-{task}-adapt.tflite").read_bytes()


def test_calls_are_timed_by_turns():
  order = []
  times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warm_up=1)
  assert order == ["a", "b"] * 4 and all(own["low"] <= own["median"] <= own["high"] for own in times.values())


def test_batches_are_filled_up():
  images = np.arange(5, dtype=np.float32)[:, None]
  assert deploy_module._batches(images, 2)[..., 0].tolist() == [[0, 1], [2, 3]]
  assert deploy_module._batches(images, 8)[..., 0].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]


def test_stablehlo_is_compared_with_jax_though_nothing_times_it(gated):
  workdir, content, _ = gated
  task = next(iter(content["tasks"]))
  (workdir / "deploy.png").unlink(missing_ok=True)
  outcome = call(main, f"--workdir={workdir}", f"--task={task}", "--format=stablehlo", "--batches=1", "--repeats=1")
  assert outcome.status == 0, outcome.err
  card = json.loads((workdir / "deploy" / f"task-{task}-compact.stablehlo.json").read_text())
  assert card["verified"]["largest_difference_relative"] < 1e-5
  assert not (workdir / "deploy.png").exists() and "figure" not in outcome.out

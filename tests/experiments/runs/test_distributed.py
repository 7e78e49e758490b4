"""Runs on several devices and processes: the same metrics as on one, and errors that name what is missing."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import metagater_jax as mg
from configs import digits, mnist
from experiments.config import ConfigError, registry
from experiments.config.federated import check_config
from experiments.run import run
from experiments.runs import distributed, placement
from experiments.runs import federated as training
from experiments.runs.federated import run_seeds
from experiments.runs.records import load_parameters

ROOT = Path(__file__).resolve().parents[3]
SHORT = ["--config.rounds=6", "--config.eval_every=3", "--config.rounds_per_dispatch=2", "--config.seed=3"]


def free_port():
  with socket.create_server(("", 0)) as listener:
    return listener.getsockname()[1]


def start(*arguments, **environment):
  return subprocess.Popen(
    [sys.executable, "-m", "experiments.run", *arguments],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env={**os.environ, **environment},
  )


def finish(processes):
  outputs = [process.communicate(timeout=400) for process in processes]
  for process, (_, errors) in zip(processes, outputs):
    assert process.returncode == 0, errors
  return outputs


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("one") / "w"
  finish([start(f"--workdir={workdir}", *SHORT)])
  return workdir


def same_run(workdir, expected):
  """Metrics to float32 round-off: a sample whose logits tie may be decided otherwise, one of a few dozen in a task."""
  lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (workdir, expected)]
  assert len(lines[0]) == len(lines[1]) == 2
  for ours, theirs in zip(*lines):
    assert ours["round"] == theirs["round"]
    np.testing.assert_allclose(ours["train_loss"], theirs["train_loss"], rtol=1e-4)
    for name in ("accuracy_mean", "accuracy_before_mean", "sparsity_mean"):
      np.testing.assert_allclose(ours[name], theirs[name], atol=0.01)
  for name in ("config.json", "partition.json"):
    held = [json.loads((folder / name).read_text()) for folder in (workdir, expected)]
    assert all(held[0][key] == held[1][key] for key in held[0] if key not in ("mesh", "memory_mb", "microbatch"))
  ours, theirs = (jax.tree.leaves(load_parameters(folder / "meta_model.npz")[0]) for folder in (workdir, expected))
  for a, b in zip(ours, theirs):
    np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_are_one(processes, one_device, tmp_path):
  flags = [f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}", "--timeout=120", *SHORT]
  outputs = finish([start(f"--workdir={tmp_path / f'w{i}'}", f"--process_id={i}", *flags) for i in range(processes)])
  same_run(tmp_path / "w0", one_device)
  assert "accuracy after adaptation" in outputs[0][0]
  for i in range(1, processes):  # only process 0 writes
    assert outputs[i][0].replace("[Gloo]", "").count("accuracy") == 0 and not (tmp_path / f"w{i}").exists()
  result = json.loads((tmp_path / "w0" / "result.json").read_text())
  assert result["versions"]["processes"] == result["versions"]["devices"] == processes


@pytest.mark.slow
def test_eight_devices_are_one(one_device, tmp_path):
  finish([start(f"--workdir={tmp_path / 'w'}", "--config.mesh=auto", *SHORT, XLA_FLAGS="--xla_force_host_platform_device_count=8")])
  same_run(tmp_path / "w", one_device)
  assert json.loads((tmp_path / "w" / "result.json").read_text())["versions"]["devices"] == 8


def small_config(**fields):
  config = digits.get_config()
  config.update(rounds=4, eval_every=2, widths=(4, 5, 6), seed=1, target_sparsity=0.5, sparsity_by="group_norm", **fields)
  return config


@pytest.fixture(scope="module")
def on_the_device(tmp_path_factory):
  folder = tmp_path_factory.mktemp("device") / "w"
  return folder, run(small_config(), folder, quiet=True)


@pytest.mark.parametrize("fields", [{"memory_mb": 4}, pytest.param({"mesh": "3", "microbatch": 5}, marks=pytest.mark.slow)])
def test_tasks_on_the_host_or_over_devices_are_the_same_run(fields, on_the_device, tmp_path):
  folder, expected = on_the_device
  result = run(small_config(**fields), tmp_path / "host", quiet=True)
  same_run(tmp_path / "host", folder)
  np.testing.assert_allclose(result["gate_threshold"], expected["gate_threshold"], rtol=1e-3)
  assert result["on_rate"].keys() == expected["on_rate"].keys()
  np.testing.assert_allclose(result["sparsity"]["per_task"], expected["sparsity"]["per_task"], atol=0.03)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"mesh": "9"}, "mesh is 9, but there are 8 cpu devices in 1 process; use mesh=auto"),
    ({"mesh": "all"}, "mesh must be 'none', 'auto' or a number of devices, got 'all'"),
    ({"mesh": "0"}, "mesh must be 'none', 'auto' or a number of devices, got '0'"),
    ({"memory_mb": 0}, "memory_mb must be at least 1, got 0"),
    ({"memory_mb": 1, "local_steps": 2000}, "memory_mb is 1: 1.0 MB of memory are too little: the minibatches of one cohort are"),
    ({"memory_mb": 50, "cohort": 99}, "cohort is 99, but there are 15 training tasks"),
    ({"mesh": "2", "task_axis": "merged", "local_steps": 2}, "task_axis 'merged' needs an algorithm"),
    ({"task_axis": "pmap"}, "unknown task_axis 'pmap'.*Known: auto, map, merged, vmap"),
    ({"task_axis": "0"}, "unknown task_axis '0'"),
    ({"compute_dtype": "float16"}, "unknown compute_dtype 'float16'"),
  ],
)
def test_what_cannot_be_is_said_before_anything_is_compiled(fields, message, tmp_path, monkeypatch):
  config = digits.get_config()
  config.update(fields)
  monkeypatch.setattr(training.Compiled, "__call__", lambda *_, **__: pytest.fail("a program was to be compiled"))
  with pytest.raises(ConfigError, match=message):
    run(config, tmp_path / "w", quiet=True)
  assert not (tmp_path / "w").exists()


def test_defaults_follow_the_devices():
  config = check_config(digits.get_config())
  mesh = placement.make_mesh(check_config(small_config(mesh="auto")))
  assert mesh.size == 8 and placement.make_mesh(config) is None
  assert placement.make_mesh(check_config(small_config(mesh="2"))).size == 2
  convolutions, mlp_network = (registry.make_network(c, 10) for c in (config, check_config(mnist.get_config())))
  assert placement.microbatch(config, convolutions, mesh) == 2 and placement.microbatch(config, convolutions, None) == 0
  assert placement.microbatch(check_config(mnist.get_config()), mlp_network, mesh) == 0
  assert placement.microbatch(check_config(small_config(microbatch=7)), convolutions, mesh) == 7
  one_step, two_steps = (mg.fedavg(mg.classification_loss(mlp_network), local_lr=0.1, local_steps=k) for k in (1, 2))
  mlp = check_config(mnist.get_config())
  assert [registry.train_axis(mlp, mlp_network, algorithm) for algorithm in (one_step, two_steps)] == ["merged", "vmap"]
  assert (registry.train_axis(config, convolutions, one_step), registry.evaluation_axis(mlp, mlp_network)) == ("auto", "vmap")


def test_several_seeds_at_once_need_one_device(tmp_path):
  config = digits.get_config()
  config.update(seed_axis="vmap", memory_mb=50)
  with pytest.raises(ConfigError, match="seed_axis is 'vmap', which needs all tasks on one device"):
    run_seeds(config, {1: tmp_path / "1", 2: tmp_path / "2"}, quiet=True)
  assert check_config(config).memory_mb == 50


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"process_id": 1}, "needs --coordinator, --num_processes and --process_id; --coordinator, --num_processes are missing"),
    ({"coordinator": "localhost:1", "num_processes": 2, "process_id": 2}, "must lie in 0 ... num_processes - 1, got process_id=2"),
    ({"coordinator": "localhost", "num_processes": 2, "process_id": 1}, "must be host:port, got 'localhost'"),
    ({"environment": True, "process_id": 1}, "give either that or these flags"),
    ({"environment": True}, "found no TPU pod, SLURM or MPI environment"),
    ({"coordinator": "no.such.host.invalid:4000", "num_processes": 2, "process_id": 1, "timeout": 2}, "is not known here|did not get"),
  ],
)
def test_arguments_that_cannot_work(arguments, message):
  with pytest.raises(ConfigError, match=message):
    distributed.join(**arguments)


def test_who_does_not_come_is_named():
  coordinator = f"localhost:{free_port()}"
  caught = {}

  def call(number, timeout):
    try:
      distributed.roll_call(coordinator, 4, number, timeout)
    except ConfigError as error:
      caught[number] = str(error)

  threads = [threading.Thread(target=call, args=arguments) for arguments in ((0, 3), (2, 6))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert "2 of 4 processes came within 3 s; missing: process_id 1, 3." in caught[0]
  assert "process 2 did not get a go from the coordinator" in caught[2]


def test_everybody_is_let_go_when_all_are_there():
  coordinator = f"localhost:{free_port()}"
  done = []
  threads = [threading.Thread(target=lambda n=n: (distributed.roll_call(coordinator, 3, n, 30), done.append(n))) for n in (2, 0, 1)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(done) == [0, 1, 2]


def test_a_port_that_is_taken_and_a_count_that_differs():
  with socket.create_server(("", 0)) as listener:
    with pytest.raises(ConfigError, match="cannot listen on port .* Choose a port that is free"):
      distributed.roll_call(f"localhost:{listener.getsockname()[1]}", 2, 0, 1)
  coordinator = f"localhost:{free_port()}"
  caught = []

  def call(number, count):
    try:
      distributed.roll_call(coordinator, count, number, 10)
    except ConfigError as error:
      caught.append(str(error))

  threads = [threading.Thread(target=call, args=arguments) for arguments in ((0, 2), (1, 3))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert caught == ["process 1 says num_processes is 3, here it is 2."] * 2


def test_cores_that_cannot_be_used_any_more_are_said():
  code = (
    "import jax; jax.random.key(0)\nfrom configs import cifarfs_maml\nfrom experiments.runs import placement\n"
    "placement.use_cores(cifarfs_maml.get_config())"
  )
  process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert "JAX is in use already, with 1 device(s)" in process.stderr

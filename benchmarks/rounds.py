"""`python -m benchmarks.rounds`: what a round costs, as ratios against something named in the same process.

* CIFAR-10 round (20 tasks × batch 20 × 1 step, 32-64-128 network): the fraction it reaches of this machine's rate on a
  2048² float32 matrix product, and gated against not gated.
* MNIST round (5 tasks × batch 20, MLP): against a plain PyTorch loop over the same tasks (PyTorch is the extra
  `benchmark`; without it that line is left out).
* `accelerated_proximal` against jaxopt's accelerated `ProximalGradient` at the same fixed step size on one lasso.

Data is random: a round costs the same on any images. Medians over alternating repeats, after compilation.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagater_jax as mg

__all__ = ["main"]

ROUNDS = 10  # per dispatch, as the configs have it


def main() -> None:
  """Prints a table and, with --out, writes the figures as JSON."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--out", type=Path)
  options = parser.parse_args()
  figures = {"machine": {"processor": platform.machine(), "cores": jax.local_device_count() if jax.default_backend() != "cpu"
                         else _cores(), "backend": jax.default_backend(), "jax": jax.__version__}}
  figures |= _cifar(options.repeats) | _mnist(options.repeats) | _lasso(options.repeats)
  for name, value in figures.items():
    if name != "machine":
      print(f"{name:<58} {value:.3f}" if isinstance(value, float) else f"{name:<58} {value}")
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


def _cores():
  import os
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _medians(repeats: int, **functions: Callable[[], Any]) -> dict[str, float]:
  """Median seconds of each function; they take turns, so that a busy minute hits all of them."""
  seconds = {name: [] for name in functions}
  for _ in range(repeats + 1):
    for name, function in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first is a warm-up


def _population(tasks, samples, shape, classes):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (tasks * samples, *shape)).astype(np.uint8)
  parts = tuple(np.split(np.arange(tasks * samples), tasks))
  return mg.make_population(images, rng.integers(0, classes, len(images)), mg.Partition(parts, parts))


def _rounds(network, shape, population, tasks, cohort, task_axis="auto"):
  """(compile seconds, a function that runs ROUNDS rounds) of MetaGater on a network."""
  penalty = mg.on_part(mg.group_lasso(mg.gate_groups), "gate") if network.gated_layers else None
  algorithm = mg.metagater(mg.classification_loss(network), local_lr=0.1, penalty=penalty, penalty_weight=0.001)
  state = mg.federated_init(algorithm, network.init(jax.random.key(0), shape), jax.random.key(1))
  start = time.perf_counter()
  program = jax.jit(partial(mg.run_rounds, algorithm, rounds=ROUNDS, cohort=cohort, batch_size=20, task_axis=task_axis)).lower(
      state, population, jnp.arange(tasks)).compile()
  return time.perf_counter() - start, lambda: program(state, population, jnp.arange(tasks))


def _cifar(repeats):
  shape, tasks = (32, 32, 3), 40
  population = _population(tasks, 200, shape, 10)
  plain = mg.GatedNetwork(mg.ConvNet4(classes=10))
  compile_plain, run_plain = _rounds(plain, shape, population, tasks, 20)
  compile_gated, run_gated = _rounds(mg.GatedNetwork(mg.ConvNet4(classes=10), ("conv3",)), shape, population, tasks, 20)
  matrix = jnp.ones((2048, 2048))
  product = jax.jit(lambda a: a @ a)
  product(matrix).block_until_ready()
  seconds = _medians(repeats, product=lambda: product(matrix), plain=run_plain, gated=run_gated)
  macs, _ = mg.dense_cost(plain.layers(shape))
  first = plain.layers(shape)[0].macs  # forward, and two products backward; no gradient is needed for the images
  flop = 20 * 20 * 2 * (3 * macs - first)
  rate, peak = flop * ROUNDS / seconds["plain"] / 1e9, 2 * 2048 ** 3 / seconds["product"] / 1e9
  return {
      "CIFAR-10 round, not gated: ms": 1000 * seconds["plain"] / ROUNDS,
      "CIFAR-10 round, not gated: GFLOP": flop / 1e9,
      "CIFAR-10 round, not gated: GFLOP/s": rate,
      "2048² float32 matrix product: GFLOP/s": peak,
      "CIFAR-10 round: fraction of the matrix-product rate": rate / peak,
      "CIFAR-10 round: gated / not gated": seconds["gated"] / seconds["plain"],
      "CIFAR-10 round: compile seconds, not gated": compile_plain,
      "CIFAR-10 round: compile seconds, gated": compile_gated,
  }


def _mnist(repeats):
  shape, tasks, cohort = (28, 28, 1), 20, 5
  population = _population(tasks, 2500, shape, 10)
  _, run = _rounds(mg.GatedNetwork(mg.MLP(classes=10)), shape, population, tasks, cohort, "vmap")  # as configs/mnist.py
  functions = {"ours": run}
  try:
    functions["torch"] = _torch_rounds(population, tasks, cohort)
  except ImportError:
    print("PyTorch is not installed (pip install -e '.[benchmark]'): no comparison of the MNIST round.")
  seconds = _medians(5 * repeats, **functions)
  figures = {"MNIST round: ms": 1000 * seconds["ours"] / ROUNDS}
  if "torch" in seconds:
    figures |= {"MNIST round, PyTorch loop: ms": 1000 * seconds["torch"] / ROUNDS,
                "MNIST round: ours / PyTorch loop": seconds["ours"] / seconds["torch"]}
  return figures


def _torch_rounds(population, tasks, cohort):
  """The same round as a plain PyTorch loop: per task a copy of the model, one SGD step; then the accelerated update."""
  import torch
  images = torch.tensor(np.array(population.images)).float().reshape(-1, 784) / 127.5 - 1
  labels = torch.tensor(np.array(population.labels)).long()
  index = torch.tensor(np.array(population.train_index)).long()
  model = torch.nn.Sequential(torch.nn.Linear(784, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
  parameters = list(model.parameters())
  generator, lr, prox_weight, beta = torch.Generator().manual_seed(0), 0.1, 15.0, 0.02

  def rounds():
    x = ag = [p.detach().clone() for p in parameters]
    for t in range(1, ROUNDS + 1):
      alpha, gamma = 2 / (t + 1), t * beta / 2
      md = [(1 - alpha) * a + alpha * b for a, b in zip(ag, x)]
      d = [torch.zeros_like(p) for p in md]
      for task in torch.randperm(tasks, generator=generator)[:cohort]:
        chosen = index[task][torch.randperm(index.shape[1], generator=generator)[:20]]
        with torch.no_grad():
          for p, start in zip(parameters, md):
            p.copy_(start)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        with torch.no_grad():
          for p, start, total in zip(parameters, md, d):
            p -= lr * p.grad
            total += prox_weight * (start - p) / cohort
      x = [a - gamma * b for a, b in zip(x, d)]
      ag = [a - beta * b for a, b in zip(md, d)]
  return rounds


def _lasso(repeats, steps=1000):
  """Objective above the optimum and time per step on a lasso with correlated columns, at the step size 1/L."""
  try:
    import jaxopt
  except ImportError:
    print("jaxopt is not installed: no comparison of proximal gradient descent.")
    return {}
  rng = np.random.default_rng(0)
  factor = rng.normal(size=(500, 60)) @ rng.normal(size=(60, 400)) / 8 + rng.normal(size=(500, 400))
  a = jnp.asarray(factor, jnp.float32)
  b = a @ jnp.asarray(rng.normal(size=400) * (rng.random(400) < 0.05), jnp.float32) + 0.1
  mu = 0.02
  smoothness = float(jnp.linalg.norm(a, 2) ** 2 / len(b))
  smooth = lambda w: 0.5 * jnp.mean((a @ w - b) ** 2)
  transform = mg.accelerated_proximal(mg.l1(), 1 / smoothness, penalty_weight=mu, gamma="nesterov")

  def ours(steps):
    def step(_, carry):
      w, state = carry
      updates, state = transform.update(jax.grad(smooth)(w), state, w)
      return optax.apply_updates(w, updates), state
    w = jnp.zeros(a.shape[1])
    return mg.accelerated_proximal_eval_params(jax.lax.fori_loop(0, steps, step, (w, transform.init(w)))[1])

  def theirs(steps):
    solver = jaxopt.ProximalGradient(smooth, prox=jaxopt.prox.prox_lasso, stepsize=1 / smoothness, maxiter=steps, tol=0.0,
                                     acceleration=True, implicit_diff=False, jit=True)
    return solver.run(jnp.zeros(a.shape[1]), mu).params

  def objective(w):  # in float64
    w = np.asarray(w, np.float64)
    return 0.5 * np.mean((np.asarray(a, np.float64) @ w - np.asarray(b, np.float64)) ** 2) + mu * np.abs(w).sum()

  our_program, their_program = (jax.jit(partial(f, steps)) for f in (ours, theirs))
  seconds = _medians(repeats, ours=our_program, theirs=their_program)
  from sklearn.linear_model import Lasso
  optimum = objective(Lasso(alpha=mu, fit_intercept=False, tol=1e-13, max_iter=1_000_000).fit(
      np.asarray(a, np.float64), np.asarray(b, np.float64)).coef_)
  figures = {}
  for count in (30, 100, 300, steps):
    gaps = [objective(jax.jit(partial(f, count))()) - optimum for f in (ours, theirs)]
    figures |= {f"lasso after {count} steps: above the optimum, ours": f"{gaps[0]:.2e}",
                f"lasso after {count} steps: above the optimum, jaxopt": f"{gaps[1]:.2e}"}
  return figures | {"lasso: time per step, ours / jaxopt": seconds["ours"] / seconds["theirs"]}


if __name__ == "__main__":
  main()

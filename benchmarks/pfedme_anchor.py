"""`python -m benchmarks.pfedme_anchor --data_dir=DIR`: FedAvg and Per-FedAvg on MNIST against a plain PyTorch loop.

The loop does what the public code of pFedMe (Dinh et al. 2020) does: PyTorch's own initialization, minibatches taken in turn
from a shuffled pass over a client's data, Per-FedAvg as two steps on two batches of which the second is applied to the
model before the first, clients averaged by their numbers of samples. Partition, model, batch size, local steps, rates, rounds
and the one-step adaptation before testing are those of configs/mnist.py in both. PyTorch is the extra `benchmark`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import metagater_jax as mg
from configs import mnist
from experiments.config import registry
from experiments.config.federated import check_config
from experiments.runs.federated import load, make_tasks
from experiments.studies.study import parse_seeds

__all__ = ["main", "torch_run"]


def main() -> None:
  """Prints a table and, with --out, writes the figures as JSON."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--seeds", type=parse_seeds, default=(1, 2, 3, 4, 5), help="4, 1-3 or 1,4-6; default: 1-5")
  parser.add_argument("--data_dir")
  parser.add_argument("--out", type=Path)
  options = parser.parse_args()
  figures: dict[str, Any] = {"seeds": list(options.seeds), "machine": {"jax": jax.__version__}}
  for algorithm in ("fedavg", "per_fedavg"):
    ours, theirs = [], []
    for seed in figures["seeds"]:
      config = mnist.get_config()
      config.update(algorithm=algorithm, seed=seed, weighted=True, data_dir=options.data_dir)
      config = check_config(config)
      data = load(config)
      tasks = make_tasks(config, data)
      ours.append(_ours(config, data, tasks))
      theirs.append(torch_run(config, data, tasks))
      print(f"{algorithm} seed {seed}: ours {100 * ours[-1]:.2f} %, PyTorch {100 * theirs[-1]:.2f} %", flush=True)
    figures[algorithm] = {
      "ours": ours,
      "pytorch": theirs,
      "rounds": config.rounds,
      "local_steps": config.local_steps,
      "batch_size": config.batch_size,
      "local_lr": config.local_lr,
      "inner_lr": config.inner_lr,
      "adapt_lr": config.adapt_lr,
    }
    print(
      f"{algorithm}: ours {100 * np.mean(ours):.2f} %, PyTorch {100 * np.mean(theirs):.2f} %, difference "
      f"{100 * (np.mean(ours) - np.mean(theirs)):+.2f} points"
    )
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


def _ours(config, data, tasks):
  network = registry.make_network(config, data.classes)
  algorithm, personalizer = registry.make_algorithm(config, network), registry.make_personalizer(config, network)
  population = mg.make_population(data.images, np.asarray(data.labels), tasks.partition, (config.pixel_mean, config.pixel_std), classes=data.classes)

  @jax.jit
  def run(key, population, training, targets):
    init_key, run_key = jax.random.split(key)
    state = mg.federated_init(algorithm, network.init(init_key, data.images.shape[1:]), run_key)
    state, _ = mg.run_rounds(
      algorithm,
      state,
      population,
      training,
      rounds=config.rounds,
      cohort=config.cohort,
      batch_size=config.batch_size,
      weighted=config.weighted,
      task_axis=config.task_axis,
    )
    return mg.evaluate_targets(network, personalizer, algorithm.deploy(state.server), population, targets)[1].accuracy

  return float(run(jax.random.key(config.seed), population, tasks.training, tasks.target).mean())


def torch_run(config, data, tasks) -> float:
  """Mean accuracy of the target tasks after one step, of the plain loop."""
  import torch

  rng = np.random.default_rng(config.seed)
  torch.manual_seed(config.seed)
  torch.set_num_threads(1)  # steps this small only wait for more of them
  images = (torch.tensor(np.asarray(data.images)).reshape(len(data.labels), -1).float() / 255 - config.pixel_mean) / config.pixel_std
  labels = torch.tensor(np.asarray(data.labels)).long()
  model = torch.nn.Sequential(torch.nn.Linear(images.shape[1], 100), torch.nn.ReLU(), torch.nn.Linear(100, data.classes))
  parameters = list(model.parameters())

  def batches(samples):
    while True:
      order = rng.permutation(samples)
      for start in range(0, len(order), config.batch_size):
        yield order[start : start + config.batch_size]

  def load_model(values):
    with torch.no_grad():
      for p, value in zip(parameters, values):
        p.copy_(value)

  def step(samples, lr, on=None):
    """One gradient step on these samples, of the current model or (`on`) of another one."""
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(images[samples]), labels[samples]).backward()
    if on is not None:
      load_model(on)
    with torch.no_grad():
      for p in parameters:
        p -= lr * p.grad

  copy = lambda: [p.detach().clone() for p in parameters]
  streams = {task: batches(tasks.partition.train[task]) for task in tasks.training}
  server = copy()
  for _ in range(config.rounds):
    chosen = rng.choice(tasks.training, config.cohort, replace=False)
    sizes = [len(tasks.partition.train[task]) for task in chosen]
    mean = [torch.zeros_like(p) for p in server]
    for task, size in zip(chosen, sizes):
      load_model(server)
      for _ in range(config.local_steps):
        before = copy()
        if config.algorithm == "per_fedavg":
          step(next(streams[task]), config.inner_lr)
          step(next(streams[task]), config.local_lr, on=before)
        else:
          step(next(streams[task]), config.local_lr)
      for total, p in zip(mean, copy()):
        total += size / sum(sizes) * p
    server = mean
  accuracies = []
  for task in tasks.target:
    load_model(server)
    step(tasks.partition.train[task], config.adapt_lr)
    test = tasks.partition.test[task]
    with torch.no_grad():
      accuracies.append((model(images[test]).argmax(1) == labels[test]).float().mean().item())
  return float(np.mean(accuracies))


if __name__ == "__main__":
  main()

"""The rounds of `benchmarks.measure` as a plain PyTorch loop: per task a copy of the model and SGD steps; then the mean."""

from collections.abc import Callable

import numpy as np

from benchmarks.measure import ROUNDS, Case

__all__ = ["torch_rounds"]


def torch_rounds(case: Case, tasks, steps: int = 1, rounds: int = ROUNDS) -> Callable[[], None]:
  """A function that runs `rounds` rounds of MetaGater's update without gates on the tasks of a population.

  Raises:
    ImportError: PyTorch is not installed.
  """
  import torch
  from torch import nn

  convolutional = case.model != "mlp"
  images = torch.tensor(np.array(tasks.images)).float() / 127.5 - 1
  images = images.permute(0, 3, 1, 2).contiguous() if convolutional else images.reshape(len(images), -1)
  labels = torch.tensor(np.array(tasks.labels)).long()
  index = torch.tensor(np.array(tasks.train_index)).long()
  if case.model == "mlp":
    model = nn.Sequential(nn.Linear(images.shape[1], 100), nn.ReLU(), nn.Linear(100, case.classes))
  elif case.model == "conv4":
    layers, channels = [], case.shape[-1]
    for width in (32, 64, 128):
      layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
      channels = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, case.classes))
  else:
    layers, channels = [], case.shape[-1]
    for i, width in enumerate((32, 32, 64, 64, 128, 128), 1):
      layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
      layers += {2: [nn.MaxPool2d(2)], 4: [nn.MaxPool2d(2)], 6: [nn.AvgPool2d(2)]}.get(i, [])
      channels = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, case.classes))
  parameters = list(model.parameters())
  generator, lr, prox_weight, beta = torch.Generator().manual_seed(0), 0.05, 15.0, 0.02

  def run():
    x = ag = [p.detach().clone() for p in parameters]
    for t in range(1, rounds + 1):
      alpha, gamma = 2 / (t + 1), t * beta / 2
      md = [(1 - alpha) * a + alpha * b for a, b in zip(ag, x)]
      d = [torch.zeros_like(p) for p in md]
      for task in torch.randperm(len(index), generator=generator)[: case.cohort]:
        with torch.no_grad():
          for p, start in zip(parameters, md):
            p.copy_(start)
        for _ in range(steps):
          chosen = index[task][torch.randperm(index.shape[1], generator=generator)[:20]]
          model.zero_grad()
          nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
          with torch.no_grad():
            for p, start in zip(parameters, md):
              p -= lr * (p.grad + prox_weight * (p - start)) if steps > 1 else lr * p.grad
        with torch.no_grad():
          for p, start, total in zip(parameters, md, d):
            total += prox_weight * (start - p) / case.cohort
      x = [a - gamma * b for a, b in zip(x, d)]
      ag = [a - beta * b for a, b in zip(md, d)]

  return run

"""The figures of the report on the paper's tables."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["plot_channels", "plot_curves", "plot_task_sparsity", "pyplot"]


def plot_curves(path: Path, panels: Mapping[str, Mapping[str, tuple[Sequence[int], np.ndarray]]]) -> None:
  """Figure 4: accuracy after adaptation over rounds, mean over seeds with a band of ± one standard deviation.

  Args:
    path: where the figure goes.
    panels: by title of a panel, by label of a method: rounds, and accuracies (seeds, rounds).
  """
  plt = pyplot()
  figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), layout="constrained", squeeze=False)
  for axis, (title, curves) in zip(axes[0], panels.items()):
    for style, (label, (rounds, accuracies)) in zip(("o-", "s-", "^-", "D-"), curves.items()):
      mean, std = accuracies.mean(0), accuracies.std(0, ddof=1) if len(accuracies) > 1 else np.zeros(len(rounds))
      (line,) = axis.plot(rounds, 100 * mean, style, label=label, markersize=4)
      axis.fill_between(rounds, 100 * (mean - std), 100 * np.minimum(mean + std, 1), color=line.get_color(), alpha=0.15)
    axis.set(title=title, xlabel="communication round", ylabel="accuracy of target tasks after adaptation (%)")
    axis.grid(alpha=0.3)
    axis.legend(loc="best", fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def plot_task_sparsity(path: Path, panels: Mapping[str, np.ndarray]) -> None:
  """Sparsity that each target task reached, sorted within each seed; panels: (seeds, tasks) by title."""
  plt = pyplot()
  figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.4), layout="constrained", squeeze=False)
  for axis, (title, values) in zip(axes[0], panels.items()):
    ordered = 100 * np.sort(values, axis=1)
    for i, row in enumerate(ordered):
      axis.plot(range(1, len(row) + 1), row, "o", markersize=3, alpha=0.5, label=f"{i + 1}. seed")
    axis.bar(range(1, ordered.shape[1] + 1), ordered.mean(0), color="tab:green", alpha=0.25)
    axis.axhline(100 * values.mean(), color="black", linewidth=1, linestyle="--")
    axis.set(title=title, xlabel="target task, from least to most sparse", ylabel="gated channels off (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def plot_channels(path: Path, panels: Mapping[str, np.ndarray], labels: Mapping[str, Sequence[Any]]) -> None:
  """Which channels each target task keeps: how often its test samples switch each one on, (tasks, channels) by title.

  Channels are sorted by how many tasks use them, so that what tasks share is on the left and what they differ in is where
  rows differ. `labels` names the rows of each panel.
  """
  plt = pyplot()
  figure, axes = plt.subplots(len(panels), 1, figsize=(10, 3.2 * len(panels)), layout="constrained", squeeze=False)
  for axis, (title, rate) in zip(axes[:, 0], panels.items()):
    image = axis.imshow(rate[:, np.argsort(-rate.mean(0), kind="stable")], aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axis.set(title=title, xlabel="channel, sorted by use", ylabel="target task (its labels)")
    axis.set_yticks(range(len(rate)), labels[title], fontsize=6)
  figure.colorbar(image, ax=axes[:, 0], label="fraction of samples with it on")
  figure.savefig(path, dpi=110)
  plt.close(figure)


def pyplot() -> "_Figures":
  """What figures are made with: as `matplotlib.pyplot`, but without a display, and without a change of the backend that a notebook uses."""
  backend = os.environ.pop("MPLBACKEND", None)  # one that is not there would end the import
  try:
    import matplotlib.figure  # noqa: F401
  finally:
    if backend is not None:
      os.environ["MPLBACKEND"] = backend
  return _Figures()


class _Figures:
  def subplots(self, rows=1, columns=1, *, figsize, layout, **options):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)

  def close(self, figure):
    """Nothing keeps a figure that was not made by pyplot itself."""

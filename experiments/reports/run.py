"""What a reader sees of one run: its table and its figures, from its records."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reports.figures import pyplot
from experiments.runs.records import read_metrics, read_result

__all__ = [
  "curves_by",
  "fewshot_table",
  "plot_accuracy",
  "plot_fewshot",
  "plot_gates",
  "plot_sparsity_curve",
  "plot_tasks",
  "report_fewshot",
  "report_run",
  "result_table",
]


def report_run(workdir: str | Path) -> str:
  """Draws `accuracy.png`, `tasks.png` and, of one with gates, `gates.png` of a finished federated run beside its records; the text for a
  terminal."""
  workdir = Path(workdir)
  result = read_result(workdir)
  names = ["accuracy.png", "tasks.png"] + (["gates.png"] if result.get("gates") else [])
  drawn = _drawn(
    lambda: plot_accuracy(
      workdir / "accuracy.png", read_metrics(workdir), f"{result['name']}: mean ± standard deviation over {len(result['target_tasks'])} target tasks"
    ),
    lambda: plot_tasks(workdir / "tasks.png", result),
    *([lambda: plot_gates(workdir / "gates.png", result)] if result.get("gates") else []),
  )
  figures = f"figures: {', '.join(str(workdir / name) for name in names)}" if drawn is None else drawn
  return f"{result_table(result)}\n{figures}; everything else is in {workdir}"


def report_fewshot(workdir: str | Path) -> str:
  """Draws `accuracy.png` of a finished few-shot run beside its records; the text for a terminal."""
  workdir = Path(workdir)
  result = read_result(workdir)
  drawn = _drawn(
    lambda: plot_fewshot(
      workdir / "accuracy.png", read_metrics(workdir), f"{result['name']}: {result['ways']}-way {result['shots']}-shot, {result['learner']}"
    )
  )
  figure = f"figure: {workdir / 'accuracy.png'}" if drawn is None else drawn
  return f"{fewshot_table(result)}\n{figure}; everything else is in {workdir}"


def _drawn(*figures: Callable[[], None]) -> str | None:
  """Draws figures; None, or why one could not be: the run itself is finished and recorded, and no figure shall end it."""
  try:
    for figure in figures:
      figure()
  except Exception as error:
    return f"a figure could not be drawn ({type(error).__name__}: {error})"


def result_table(result: dict[str, Any]) -> str:
  """The result of a run as lines for a terminal."""
  tasks = len(result["accuracy"]["per_task"])
  share = lambda s: f"{100 * s['mean']:.1f} %" + ("" if s["std"] is None else f" ± {100 * s['std']:.1f}")
  cost = lambda c: f"{c['dense']:,} dense" + ("" if c["gated"] is None else f", {c['gated']:,.0f} gated ({100 * c['gated'] / c['dense']:.0f} %)")
  seconds = result["seconds"]
  rows = [
    ("accuracy before adaptation", share(result["accuracy_before_adaptation"])),
    ("accuracy after adaptation", share(result["accuracy"])),
    (
      "sparsity of gated layers" if result["gated"] or not result["sparsity"] else "removed by each task",
      share(result["sparsity"]) if result["sparsity"] else "no gates",
    ),
    *([("channels that depend on the input", share(result["conditional"]))] if result.get("conditional") else []),
    *([("pruned", f"{100 * result['pruned']:.1f} % of what may be")] if result["pruned"] is not None else []),
    (
      "multiply-accumulates per image",
      cost(result["macs"])
      + (
        f", {result['macs']['effective']:,} of effective weights{', all gates on' if result['gated'] else ''}" if result["pruned"] is not None else ""
      ),
    ),
    (
      "parameters",
      cost(result["parameters"])
      + (
        f", {result['parameters_kept']:,} left by pruning, {result['parameters_effective']:,} of them effective"
        if result["pruned"] is not None
        else ""
      ),
    ),
    *([("one round", f"{result['round_ms']:.1f} ms (median)")] if result["round_ms"] is not None else []),
    ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())),
  ]
  trained = f"{result['rounds']} rounds" + ("" if result["meta_model"] is None else f" (meta-model of {result['meta_model']})")
  title = (
    f"{result['name']}: {result['algorithm']}{', gated' if result['gated'] else ''}, {trained}, {result['personalizer']}, "
    f"seed {result['seed']}; mean ± standard deviation over {tasks} target tasks"
  )
  width = max(len(name) for name, _ in rows)
  return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def fewshot_table(result: dict[str, Any]) -> str:
  """The result of a few-shot run as lines for a terminal."""
  share = lambda a: f"{100 * a['mean']:.1f} % ± {100 * a['ci95']:.1f}"
  kept, what = result["parameters"], {"weight": "weights", "channel": "filters"}[result["prune"]["granularity"]]
  rows = [
    ("accuracy before adaptation", share(result["accuracy_before_adaptation"])),
    ("accuracy after adaptation", share(result["accuracy"])),
    ("sparsity", f"{100 * result['sparsity']:.1f} % of the {what} that may be pruned" if result["sparsity"] else "not pruned"),
    ("parameters", f"{kept['all']:,}" + (f", {kept['kept']:,} kept, {kept['effective']:,} of them effective" if result["sparsity"] else "")),
    (
      "multiply-accumulates per image",
      f"{result['macs']['dense']:,}" + (f", {result['macs']['effective']:,} of effective weights" if result["sparsity"] else ""),
    ),
    ("meta-training", f"{result['episodes_per_second']:.1f} episodes per second"),
    ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())),
  ]
  title = (
    f"{result['name']}: {result['learner']}, {result['model']}, {result['ways']}-way {result['shots']}-shot, "
    f"{result['steps']} steps, seed {result['seed']}; mean ± 95 % interval over {result['accuracy']['episodes']} test "
    "episodes"
  )
  width = max(len(name) for name, _ in rows)
  return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def plot_fewshot(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
  """Accuracy on validation episodes before and after adaptation, and sparsity where there is any, over steps."""
  plt = pyplot()
  figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
  steps = [row["step"] for row in rows]
  axis.plot(steps, [row["accuracy"] for row in rows], "o-", markersize=4, label="accuracy after adaptation")
  axis.plot(steps, [row["accuracy_before"] for row in rows], "s--", markersize=4, label="accuracy before adaptation")
  if any(row["sparsity"] for row in rows):
    axis.plot(steps, [row["sparsity"] for row in rows], "^:", color="tab:green", markersize=4, label="pruned, of what may be")
  axis.set(xlabel="meta-training step", ylabel="fraction", xlim=(0, None), ylim=(0, 1.02), title=f"{title}, validation classes")
  axis.grid(alpha=0.3)
  axis.legend(loc="best")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def plot_accuracy(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
  """Accuracy before and after adaptation, sparsity where there are gates, and what is pruned where that is, over rounds."""
  plt = pyplot()
  figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
  rounds = [row["round"] for row in rows]
  for prefix, label, style in (("accuracy", "accuracy after adaptation", "o-"), ("accuracy_before", "accuracy before adaptation", "s--")):
    mean = np.array([row[f"{prefix}_mean"] for row in rows])
    std = np.array([row[f"{prefix}_std"] or 0 for row in rows])
    (line,) = axis.plot(rounds, mean, style, label=label, markersize=4)
    axis.fill_between(rounds, mean - std, np.minimum(mean + std, 1), color=line.get_color(), alpha=0.15)
  if rows and rows[0]["sparsity_mean"] is not None:
    axis.plot(rounds, [row["sparsity_mean"] for row in rows], "^:", color="tab:green", markersize=4, label="sparsity of gated layers")
  if rows and rows[0]["pruned"] is not None:
    axis.plot(rounds, [row["pruned"] for row in rows], "v-.", color="tab:red", markersize=4, label="pruned, of what may be")
  axis.set(xlabel="communication round", ylabel="fraction", xlim=(0, None), ylim=(0, 1.02), title=title)
  axis.grid(alpha=0.3)
  axis.legend(loc="best")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def plot_tasks(path: Path, result: dict[str, Any]) -> None:
  """Accuracy and sparsity of each target task as bars, with its number, labels and train samples."""
  plt = pyplot()
  order = np.argsort(result["accuracy"]["per_task"])[::-1]
  names = [
    f"task {result['target_tasks'][i]}\nlabels {', '.join(map(str, result['target_labels'][i]))}\n{result['target_train_samples'][i]} train"
    for i in order
  ]
  gated = result["sparsity"] is not None
  figure, axes = plt.subplots(
    1 + gated, 1, figsize=(max(6, 0.62 * len(names) + 1.5), 3.2 + 2.4 * gated), sharex=True, layout="constrained", squeeze=False
  )
  panels = [("accuracy", "accuracy after adaptation", "tab:blue")]
  if gated:
    panels.append(("sparsity", "sparsity of gated layers" if result["gated"] else "share that the task removed", "tab:green"))
  for axis, (key, label, color) in zip(axes[:, 0], panels):
    values = np.array(result[key]["per_task"])[order]
    axis.bar(range(len(values)), values, color=color, width=0.7)
    axis.axhline(result[key]["mean"], color="black", linewidth=1, linestyle="--")
    axis.set(ylabel=label, ylim=(0, 1.02))
    axis.set_title(f"mean {result[key]['mean']:.3f} ± {result[key]['std'] or 0:.3f} over tasks (dashed)", fontsize=9, loc="left")
    axis.grid(axis="y", alpha=0.3)
  axes[-1, 0].set_xticks(range(len(names)), names, fontsize=6.5, rotation=0 if len(names) <= 10 else 90)
  figure.suptitle(f"{result['name']}: target tasks after one-step adaptation")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def plot_gates(path: Path, result: dict[str, Any]) -> None:
  """What the gates do before and after stage I: channels that vary over a task's images and how much of the masks the class explains, by layer;
  sparsity of images by the network's confidence; and how often each target task switches each channel on."""
  plt = pyplot()
  figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
  (shares, confidence), (classes, rates) = axes
  before, after = result["gates"]["before"], result["gates"]["after"]
  layers = list(after["layers"])
  for axis, key, title in (
    (shares, "conditional", "channels that vary over a task's images"),
    (classes, "explained_by_class", "part of the masks' entropy that the class explains"),
  ):
    for i, (gates, label, color) in enumerate(((before, "meta-gate", "tab:gray"), (after, "adapted", "tab:blue"))):
      axis.bar(np.arange(len(layers)) + 0.4 * i - 0.2, [gates["layers"][layer][key] or 0 for layer in layers], 0.36, label=label, color=color)
    axis.set_xticks(range(len(layers)), layers)
    axis.set(ylim=(0, 1.02), ylabel="fraction")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)
  for gates, label, color in ((before, "meta-gate", "tab:gray"), (after, "adapted", "tab:blue")):
    rows = np.array(gates["by_confidence"])
    confidence.plot(rows[:, 0] + 0.05, rows[:, 2], "-", color=color, alpha=0.5)
    confidence.scatter(rows[:, 0] + 0.05, rows[:, 2], 10 + 300 * rows[:, 1], color=color, label=label)
  correlation = after["confidence_correlation"]
  confidence.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="network's confidence in an image", ylabel="gated channels off")
  confidence.set_title(f"do easy images use fewer channels? (area: images; adapted: correlation {correlation['mean']:+.2f})", fontsize=10)
  confidence.legend(fontsize=8)
  rate = np.concatenate([np.asarray(result["on_rate"][layer]) for layer in layers], axis=1)
  image = rates.imshow(rate[:, np.argsort(-rate.mean(0), kind="stable")], aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
  rates.set(xlabel="channel, sorted by use", ylabel="target task")
  rates.set_title(f"how often a channel is on (two tasks differ in {100 * after['task_difference']:.0f} % of them)", fontsize=10)
  figure.colorbar(image, ax=rates)
  figure.suptitle(f"{result['name']}: what the gates do on target tasks' test images")
  figure.savefig(path, dpi=110)
  plt.close(figure)


def plot_sparsity_curve(path: Path, curves: Sequence[Sequence[dict[str, Any]]], title: str) -> None:
  """Accuracy against reached sparsity, mean over runs with their spread, and wanted against reached sparsity; a line for each way to reach it."""
  plt = pyplot()
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
  for (by, own), style in zip(curves_by(curves).items(), ("o-", "s-", "^-")):
    values = lambda key, own=own: np.array([[point[key]["mean"] for point in curve] for curve in own])
    sparsity, accuracy = values("sparsity"), values("accuracy")
    spread = np.array([[point["sparsity"]["std"] or 0 for point in curve] for curve in own]).mean(0)
    wanted = [point["wanted"] for point in own[0]]
    left.errorbar(sparsity.mean(0), accuracy.mean(0), yerr=accuracy.std(0, ddof=1) if len(accuracy) > 1 else None, fmt=style, capsize=3, label=by)
    right.errorbar(wanted, sparsity.mean(0), yerr=spread, fmt=style, capsize=3, label=by)
    right.plot([0, max(wanted)], [0, max(wanted)], color="black", linewidth=0.8, linestyle="--")
  left.set(xlabel="sparsity of gated layers after adaptation", ylabel="accuracy after adaptation", title="bars: standard deviation over seeds")
  right.set(xlabel="target_sparsity", ylabel="sparsity reached on target tasks", title="bars: spread over tasks")
  for axis in (left, right):
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, title="sparsity_by", title_fontsize=8)
  figure.suptitle(title)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def curves_by(curves: Sequence[Sequence[dict[str, Any]]]) -> dict[str, list[Sequence[dict[str, Any]]]]:
  """Curves of several runs by how the sparsity is reached; records of earlier versions know one way, by the norm of groups."""
  found: dict[str, list] = {}
  for curve in curves:
    found.setdefault(curve[0].get("by", "group_norm"), []).append(curve)
  return found

"""Several runs, also of different algorithms, side by side on one web page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.config import ConfigError
from experiments.reports.page import cards, figure, page, rows_table
from experiments.runs.measures import mask_difference
from experiments.runs.records import read_config, read_metrics, read_result

__all__ = ["comparison"]

_COLORS = ("#1f77b4", "#e07b00", "#2ca02c", "#d64a8b", "#8a63d2", "#17a2b8", "#8c564b", "#7f7f7f")


class _Run(NamedTuple):
  """A finished run: what it is called here, its colour, and its records."""

  label: str
  color: str
  result: dict[str, Any]
  rows: list[dict[str, Any]]
  settings: dict[str, Any]

  @property
  def few_shot(self):
    return "learner" in self.result


def comparison(workdirs: Sequence[str | Path]) -> str:
  """The page of some finished runs.

  Args:
    workdirs: their folders, federated runs and few-shot runs alike.

  Returns:
    HTML that needs no other file.

  Raises:
    ConfigError: no runs, or a folder that holds no finished run.
  """
  if not workdirs:
    raise ConfigError("name at least one folder of a finished run: python -m experiments.report RUN…")
  results = [read_result(Path(workdir)) for workdir in workdirs]
  labels = _labels(results, workdirs)
  runs = [
    _Run(label, _COLORS[i % len(_COLORS)], result, read_metrics(Path(workdir)), read_config(Path(workdir)))
    for i, (workdir, label, result) in enumerate(zip(workdirs, labels, results))
  ]
  percent = lambda run, key: f"{100 * run.result[key]['mean']:.1f} %"
  parts = [
    cards([(percent(run, "accuracy"), f"{run.label}: {percent(run, 'accuracy_before_adaptation')} before", run.color) for run in runs]),
    "<h2>Accuracy over rounds</h2>",
    figure(lambda axes: _curves(axes[0], runs), "After adaptation (lines) and before it (dashed); bands: one standard deviation over target tasks."),
    *_task_parts([run for run in runs if not run.few_shot]),
    "<h2>Cost</h2>",
    figure(lambda axes: _costs(axes, runs), "Of an adapted network, and of the run.", panels=3, height=1.2 + 0.42 * len(runs)),
    "<h2>Settings that differ</h2>",
    rows_table(["setting", *labels], _differences(runs)),
    "<h2>Versions</h2>",
    rows_table(["run", "folder", "versions"], [[run.label, workdir, _versions(run)] for run, workdir in zip(runs, workdirs)]),
  ]
  return page("Comparison of " + (f"{len(runs)} runs" if len(runs) > 1 else labels[0]), parts)


def _task_parts(runs):
  """What only federated runs have: target tasks, channels that they keep, and what adaptation changed in gates."""
  if not runs:
    return []
  caption = "Each target task, the hardest first; a small mark is the same task before adaptation."
  parts = ["<h2>Target tasks</h2>", figure(lambda axes: _tasks(axes[0], runs, "accuracy", "accuracy after adaptation"), caption)]
  masked = [run for run in runs if run.result["sparsity"]]
  if masked:
    parts.append(figure(lambda axes: _tasks(axes[0], masked, "sparsity", "channels or weights off"), "What each target task switches off."))
  gated = [run for run in runs if run.result.get("on_rate")]
  if gated:
    parts += [
      "<h2>Channels that tasks keep</h2>",
      "<p>How often a channel is on for a task's test images: a row is a target task, a column a channel, sorted by how many tasks use it. "
      "Where rows differ, tasks have networks of their own.</p>",
    ]
    for run in gated:
      caption = f"{run.label}: two tasks differ in {100 * mask_difference(run.result['on_rate']):.0f} % of these channels."
      parts.append(figure(lambda axes, run=run: _channels(axes[0], run), caption, height=2.6))
  changed = [run for run in gated if run.result.get("gates")]
  if changed:
    caption = "Channels that are on for some of a task's images and off for others, and the share that is off. Pale: the meta-gate; full: adapted."
    parts += ["<h2>What adaptation changed in the gates</h2>", figure(lambda axes: _gates(axes, changed), caption, panels=2)]
  return parts


def _versions(run):
  return ", ".join(f"{name} {value}" for name, value in run.result["versions"].items() if not isinstance(value, list | dict))


def _labels(results, workdirs):
  """What each run is called: what it does; with its seed or folder where that says no difference."""

  def first(result):
    if "learner" in result:
      return f"{result['name']}, {result['learner']}{', pruned' if result['sparsity'] else ''}"
    return f"{result['name']}, {result['algorithm']}{', gated' if result['gated'] else ''}, {result['personalizer']}"

  labels = [first(result) for result in results]
  for more in (lambda i: f", seed {results[i]['seed']}", lambda i: f" ({Path(workdirs[i]).name})", lambda i: f" ({i + 1})"):
    labels = [label + more(i) if labels.count(label) > 1 else label for i, label in enumerate(labels)]
  return labels


def _curves(axis, runs):
  for run in runs:
    at = [row["step" if run.few_shot else "round"] for row in run.rows]
    after = np.array([row["accuracy" if run.few_shot else "accuracy_mean"] for row in run.rows], float)
    before = np.array([row["accuracy_before" if run.few_shot else "accuracy_before_mean"] for row in run.rows], float)
    axis.plot(at, 100 * after, "o-", markersize=3, color=run.color, label=run.label)
    axis.plot(at, 100 * before, ".--", markersize=3, linewidth=1, color=run.color, alpha=0.8)
    if not run.few_shot:
      spread = np.array([row["accuracy_std"] or 0 for row in run.rows], float)
      axis.fill_between(at, 100 * (after - spread), 100 * np.minimum(after + spread, 1), color=run.color, alpha=0.13, linewidth=0)
  axis.set(
    xlabel={(True,): "step", (False,): "communication round"}.get(tuple({run.few_shot for run in runs}), "communication round or step"),
    ylabel="accuracy (%)",
    xlim=(0, None),
  )
  axis.grid(alpha=0.25)
  axis.legend(loc="lower right", fontsize=9)


def _tasks(axis, runs, key, label):
  same = len({tuple(run.result["target_tasks"]) for run in runs}) == 1
  order = np.argsort(np.mean([run.result["accuracy"]["per_task"] for run in runs], axis=0)) if same else None
  for i, run in enumerate(runs):
    values = 100 * np.array(run.result[key]["per_task"])
    own = order if same else np.argsort(run.result["accuracy"]["per_task"])
    x = np.arange(len(values)) + (i - (len(runs) - 1) / 2) * 0.8 / len(runs)
    axis.plot(x, values[own], "o", markersize=5, color=run.color, label=run.label)
    if key == "accuracy":
      axis.plot(x, 100 * np.array(run.result["accuracy_before_adaptation"]["per_task"])[own], "_", markersize=6, color=run.color, alpha=0.7)
    axis.axhline(values.mean(), color=run.color, linewidth=1, linestyle=":")
  axis.set(ylabel=f"{label} (%)", xlabel="target task", ylim=(None, 103 if key == "accuracy" else None))
  if same:
    axis.set_xticks(range(len(order)), [runs[0].result["target_tasks"][j] for j in order], fontsize=8, rotation=0 if len(order) < 16 else 90)
  axis.grid(axis="y", alpha=0.25)
  axis.legend(fontsize=9)


def _channels(axis, run):
  rate = np.concatenate([np.asarray(own) for own in run.result["on_rate"].values()], axis=1)
  image = axis.imshow(rate[:, np.argsort(-rate.mean(0), kind="stable")], aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
  axis.set(xlabel=f"channel of {', '.join(run.result['on_rate'])}", ylabel="target task")
  axis.figure.colorbar(image, ax=axis, label="on")


def _gates(axes, runs):
  for axis, key, label in ((axes[0], "conditional", "channels that vary (%)"), (axes[1], "sparsity", "channels off (%)")):
    for i, run in enumerate(runs):
      gates = run.result["gates"]
      if key == "conditional":
        pair = [np.mean([own["conditional"] for own in gates[when]["layers"].values()]) for when in ("before", "after")]
      else:
        pair = [run.result["sparsity_before_adaptation"]["mean"], run.result["sparsity"]["mean"]]
      for k, value in enumerate(pair):
        axis.bar(i + 0.38 * k - 0.19, 100 * value, 0.34, color=run.color, alpha=(0.4, 1.0)[k])
        axis.text(i + 0.38 * k - 0.19, 100 * value, f"{100 * value:.0f}", ha="center", va="bottom", fontsize=9)
    axis.set_xticks(range(len(runs)), [_broken(run.label) for run in runs], fontsize=8)
    axis.set(ylabel=label)
    axis.margins(y=0.12)


def _broken(label):
  return label.replace(", ", ",\n").replace(" (", "\n(")


def _costs(axes, runs):
  def of(run, part):
    own = run.result[part]
    left = {"macs": ("gated", "effective", "dense"), "parameters": ("gated", "effective", "kept", "dense", "all")}[part]
    return next(own[name] for name in left if own.get(name) is not None)

  panels = (
    ("MACs per image", lambda run: of(run, "macs")),
    ("parameters", lambda run: of(run, "parameters")),
    ("seconds, not compiling", lambda run: run.result["seconds"]["total"] - run.result["seconds"].get("compile", 0)),
  )
  for k, (axis, (label, value)) in enumerate(zip(axes, panels)):
    values = [value(run) for run in runs]
    axis.barh(range(len(runs)), values, color=[run.color for run in runs], height=0.6)
    for i, own in enumerate(values):
      axis.text(own, i, f" {own:,.0f}", va="center", fontsize=9)
    axis.set_yticks(range(len(runs)), [run.label for run in runs] if k == 0 else [""] * len(runs), fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.3)
    axis.set_xticks([])
    axis.set_title(label, fontsize=10)


def _differences(runs):
  names = sorted(set().union(*(run.settings for run in runs)))
  rows = [[name, *(run.settings.get(name, "") for run in runs)] for name in names]
  rows = [row for row in rows if len({str(value) for value in row[1:]}) > 1]
  return [[name, *("default" if value is None else value for value in values)] for name, *values in rows] or [["none", *[""] * len(runs)]]

"""Tables of few-shot runs, from results/fewshot.json."""

import itertools
import json
from typing import Any

import numpy as np

from experiments.config.fewshot import base_config
from experiments.config.registry import NETWORKS
from experiments.reports.markdown import table
from experiments.runs.fewshot import SETTINGS
from experiments.runs.measures import interval
from experiments.runs.records import model_name

__all__ = ["complete", "pairs_table", "runs_table"]


def complete(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Entries with the settings that are newer than they are, at their defaults, and today's names of networks."""
  defaults = {name: value for name, value in json.loads(base_config().to_json_best_effort()).items() if name in SETTINGS}
  return [defaults | entry | {"model": model_name(entry["model"])} for entry in entries]


def runs_table(entries: list[dict[str, Any]]) -> str:
  """What each run reached."""
  share = lambda a: f"{100 * a['mean']:.1f} ± {100 * a['ci95']:.1f}"
  rows = []
  for e in complete(entries):
    rate = f"{e['inner_lr']:g}{' at first, learned' if e['learn_rates'] else ''}"
    rows.append(
      [
        f"{e['name']}, {e['ways']}-way {e['shots']}-shot",
        f"{_network(e)}, {e['learner']}",
        f"{e['inner_steps']} steps of {rate}; {e['test_inner_steps']} in test",
        f"{e['steps']:,} steps, {e['train_queries']} queries{', augmented' if e['augment'] else ''}, {e['seconds']['train'] / 60:.0f} min",
        e["seed"],
        "no" if e["prune"] is None else _pruned(e),
        share(e["accuracy_before_adaptation"]),
        f"{share(e['accuracy'])} ({e['accuracy']['episodes']:,})",
      ]
    )
  return table(
    [
      "benchmark",
      "network, learner",
      "inner loop",
      "meta-training",
      "seed",
      "pruned",
      "before adaptation (%)",
      "accuracy (%), ± 95 % interval over test episodes",
    ],
    rows,
  )


def pairs_table(entries: list[dict[str, Any]]) -> str:
  """Runs that differ in settings of training only, episode by episode; those of different seeds are not compared."""
  rows = []
  tested = ("dataset", "alphabets", "ways", "shots", "queries", "seed")
  for a, b in itertools.combinations([e for e in complete(entries) if "accuracies" in e], 2):  # the oldest lack them
    if any(a[name] != b[name] for name in tested) or len(a["accuracies"]) != len(b["accuracies"]):
      continue
    differing = [name for name in SETTINGS if a[name] != b[name]]
    a, b = sorted((a, b), key=lambda e: -e["accuracy"]["mean"])
    difference = interval(100 * (np.array(a["accuracies"]) - np.array(b["accuracies"])))
    rows.append(
      [
        f"{a['name']}, {a['ways']}-way {a['shots']}-shot, {a['seed']}",
        _told_apart(a, differing),
        _told_apart(b, differing),
        f"{difference['mean']:+.1f} ± {difference['ci95']:.1f} ({difference['episodes']:,})",
      ]
    )
  return table(["benchmark, seed", "run", "compared with", "difference (points), ± 95 % interval over test episodes"], rows)


def _network(entry):
  return f"{NETWORKS[entry['model']].label} ({'-'.join(map(str, entry['widths']))}; {entry['parameters']['all']:,} parameters)"


def _told_apart(entry, differing):
  """A run's network and pruning, what else of it is not as in another, and how many of its parameters are left."""
  others = [f"{name} {entry[name]}" for name in differing if name not in ("model", "widths", "prune")]
  return ", ".join([_network(entry), _pruned(entry), *others, f"{entry['parameters']['kept']:,} parameters kept"])


def _pruned(e):
  return (
    "not pruned"
    if e["prune"] is None
    else (
      f"{100 * e['sparsity']:.0f} % by {e['prune']['score']}, steps {e['prune']['begin'] * e['steps']:,.0f} to {e['prune']['end'] * e['steps']:,.0f}"
    )
  )

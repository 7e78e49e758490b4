"""The report on pruning in communication rounds, from records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.reports.markdown import table
from experiments.reports.statistics import paired_difference
from experiments.runs.records import read_result
from experiments.studies.anp_cases import SCORES

__all__ = ["make_report", "markdown"]


def _accuracy(folder):
  return read_result(folder)["accuracy"]["mean"]


def make_report(workdir: Path, scores: Sequence[str], seeds: Sequence[int], config: ConfigDict) -> dict[str, Any]:
  """Sparsity, rounds, seeds and, by score, accuracies by seed, kept parameters, and differences over seeds, from the records."""
  report = {
    "name": config.name,
    "rounds": config.rounds,
    "sparsity": config.prune.sparsity,
    "head": config.prune.head,
    "seeds": list(seeds),
    "scores": {},
  }
  accuracy = {score: {seed: _accuracy(workdir / f"{score}-seed-{seed}") for seed in seeds} for score in scores}
  for score in scores:
    results = [read_result(workdir / f"{score}-seed-{seed}") for seed in seeds]
    entry = {
      "accuracy": list(accuracy[score].values()),
      "pruned": results[0]["pruned"] or 0.0,
      "parameters_kept": results[0]["parameters_kept"] or results[0]["parameters"]["dense"],
      "gate_sparsity": float(np.mean([result["sparsity"]["mean"] for result in results])),
      "seconds": float(np.median([result["seconds"]["train"] for result in results])),
      "differences": {},
    }
    for other in scores:
      if score.startswith("anp") and not other.startswith("anp"):
        entry["differences"][other] = paired_difference(accuracy[score], accuracy[other])._asdict()
    report["scores"][score] = entry
  return report


def markdown(report: dict[str, Any]) -> str:
  """The report as a table."""
  others = [score for score in report["scores"] if not score.startswith("anp")]
  rows = []
  for score, entry in report["scores"].items():
    parts = [entry["differences"].get(other) for other in others]
    rows.append(
      [
        SCORES[score].label,
        ", ".join(f"{100 * value:.1f}" for value in entry["accuracy"]),
        f"{100 * np.mean(entry['accuracy']):.1f}",
        f"{entry['parameters_kept']:,}",
        *(_difference(part) if part else "" for part in parts),
      ]
    )
  header = ["score", "accuracy of target tasks by seed (%)", "mean (%)", "parameters kept", *(f"minus {SCORES[other].label}" for other in others)]
  return (
    f"{report['name']}: {report['rounds']} rounds, {100 * report['sparsity']:.0f} % of the "
    f"{'kernels' if report['head'] else 'convolutions’ kernels'} pruned, seeds {', '.join(map(str, report['seeds']))}; differences "
    f"in points with their 95 % interval over seeds (paired, Student's t).\n\n{table(header, rows)}"
  )


def _difference(part):
  if part["low"] is None:
    return f"{100 * part['mean']:+.1f}"
  return f"{100 * part['mean']:+.1f} ({100 * part['low']:+.1f} to {100 * part['high']:+.1f})"

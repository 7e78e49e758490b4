"""What the quickstart shows over several seeds, from the record of `experiments.quickstart --seeds`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.reports.markdown import table
from experiments.reports.statistics import paired_difference
from experiments.runs.measures import spread

__all__ = ["seeds_table"]


def seeds_table(found: Mapping[str, Any]) -> str:
  """Over seeds: accuracy before and after the step, what the step changes, in how many seeds it helps, where it costs most, and the accuracy after it
  beside the first method's."""
  rows, (first, *_) = [], found["methods"]
  for name, own in found["methods"].items():
    before, after = (100 * np.array(list(own[when].values())) for when in ("before", "after"))
    gain, seeds = after - before, list(own["before"])
    worst = int(np.argmin(gain))
    rows.append(
      [
        name,
        *(f"{values.mean():.1f} ± {spread(values) or 0:.1f}" for values in (before, after, gain)),
        f"{(gain > 0).sum()} of {len(seeds)}",
        f"{gain[worst]:+.1f} (seed {seeds[worst]})",
        "" if name == first else paired_difference(own["after"], found["methods"][first]["after"]).points,
      ]
    )
  return table(
    ["method", "before the step (%)", "after it (%)", "change (points)", "it helps in", "least change", f"after it, minus {first} (points)"], rows
  )

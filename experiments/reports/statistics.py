"""Paired comparisons over seeds, single and together."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

__all__ = ["Difference", "holm", "paired_difference"]


class Difference(NamedTuple):
  """Mean of a − b over the seeds that both have, with its 95 % interval (Student's t).

  Attributes:
    seeds: how many pairs there are.
    mean: of the differences.
    low, high: ends of the interval; None with fewer than two pairs.
    effect: mean divided by the standard deviation of the differences (Cohen's d of paired samples).
    p: of the two-sided paired t-test of a = b − margin.
  """

  seeds: int
  mean: float
  low: float | None
  high: float | None
  effect: float | None
  p: float | None

  @property
  def points(self) -> str:
    """Of two fractions, in percentage points.

    >>> Difference(3, 0.01, -0.002, 0.022, None, None).points
    '+1.0 (-0.2 … +2.2)'
    """
    return f"{100 * self.mean:+.1f}" + ("" if self.low is None or self.high is None else f" ({100 * self.low:+.1f} … {100 * self.high:+.1f})")

  def verdict(self, margin: float = 0.0) -> str:
    """Whether the interval says a > b − margin: "confirmed", "refuted" (it says a < b − margin), "not confirmed", "untested"."""
    if self.low is None:
      return "untested"
    return "confirmed" if self.low > -margin else "refuted" if self.high < -margin else "not confirmed"


def holm(ps: Sequence[float | None]) -> list[float | None]:
  """p values of comparisons that are read together, corrected so that the chance of even one false finding among them is what is said of it
  (Holm 1979, "A simple sequentially rejective multiple test procedure"). None, of what was not tested, stays None.

  >>> holm([0.01, 0.04, None, 0.03])
  [0.03, 0.06, None, 0.06]
  """
  tested = sorted((p, i) for i, p in enumerate(ps) if p is not None)
  corrected: list[float | None] = [None] * len(ps)
  highest = 0.0
  for rank, (p, i) in enumerate(tested):
    highest = max(highest, min(1.0, (len(tested) - rank) * p))
    corrected[i] = highest
  return corrected


def paired_difference(a: Mapping[int, float], b: Mapping[int, float], margin: float = 0.0) -> Difference | None:
  """a − b by seed, and whether it differs from −margin; None if they have no seed in common."""
  common = sorted(a.keys() & b.keys())
  if not common:
    return None
  d = np.array([a[seed] - b[seed] for seed in common])
  if len(d) < 2:
    return Difference(len(d), float(d.mean()), None, None, None, None)
  std = d.std(ddof=1)
  half = stats.t.ppf(0.975, len(d) - 1) * std / np.sqrt(len(d))
  effect = float(d.mean() / std) if std > 0 else None
  p = float(stats.ttest_1samp(d, -margin).pvalue) if std > 0 else None
  return Difference(len(d), float(d.mean()), float(d.mean() - half), float(d.mean() + half), effect, p)

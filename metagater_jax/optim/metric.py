"""Rates of their own for parts of the parameters, as a change of the metric and not of the method.

Let D be the diagonal matrix that is ρ_p on the coordinates of part p of the parameters (1 where nothing is said). Written in the coordinates
ψ = D^(−1/2) w, gradient descent, a pull to a centre and a proximal operator are in terms of w

    ψ − η ∇_ψ L                        w − η D ∇L(w)
    (λ/2)‖ψ − ψ_md‖²                   (λ/2)(w − md)ᵀ D⁻¹ (w − md), whose step is −ηλ (w − md): D cancels
    prox_{sR} in ψ                     argmin_v  s R(v) + ½(v − w)ᵀ D⁻¹ (v − w), which on part p is prox_{s ρ_p R}

So any method that is made of these stays that method, with all that is proved about it: its objective is measured with another ruler. The
smoothness constant is that of D^(1/2) ∇²L D^(1/2), which is why a part whose gradient is small can have a large ρ.
"""

from collections.abc import Mapping
from typing import Any

import jax

from metagater_jax.core.checks import check_positive
from metagater_jax.optim.penalties import Penalty

__all__ = ["Rates", "check_rates", "in_metric", "scale_parts"]

Tree = Any
# ρ by part: a key of the parameter dictionary, as "gate". Parts that are not named have 1.
Rates = Mapping[str, Any]


def check_rates(rates: Rates | None) -> None:
  """Raises a ValueError that names a part whose rate is not positive.

  Args:
    rates: ρ by part, or None.

  Returns:
    None.

  Raises:
    ValueError: that.
  """
  check_positive(**{f"rate of part '{part}'": rate for part, rate in (rates or {}).items()})


def scale_parts(gradient: Tree, rates: Rates | None) -> Tree:
  """D · gradient.

  Args:
    gradient: a dictionary with the parts of the parameters.
    rates: ρ by part; None: D = 1.

  Returns:
    A tree like the gradient.

  Raises:
    ValueError: a part that the gradient does not have.
  """
  if not rates:
    return gradient
  _check_parts(gradient, rates)
  return {part: jax.tree.map(lambda g, part=part: (rates[part] * g).astype(g.dtype), own) if part in rates else own for part, own in gradient.items()}


def in_metric(penalty: Penalty, rates: Rates | None) -> Penalty:
  """The same penalty, whose prox is that of the metric D⁻¹: argmin_v step·R(v) + ½(v − w)ᵀ D⁻¹ (v − w).

  Args:
    penalty: R, a sum of functions of one part each (a group lasso whose groups lie within parts). Otherwise the result is not this minimizer.
    rates: ρ by part; None: the penalty itself.

  Returns:
    The penalty.
  """
  if not rates:
    return penalty

  def prox(w, step):
    _check_parts(w, rates)
    moved = penalty.prox(w, step)
    return {part: penalty.prox(w, step * rates[part])[part] if part in rates else moved[part] for part in w}

  return Penalty(penalty.value, prox)


def _check_parts(tree, rates):
  if missing := [part for part in rates if not isinstance(tree, Mapping) or part not in tree]:
    there = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
    raise ValueError(f"rates are given for {', '.join(missing)}, which is no part of these parameters; they have {there}.")

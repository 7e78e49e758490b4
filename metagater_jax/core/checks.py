"""Checks of arguments that several modules share."""

import difflib
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

__all__ = ["check_counts", "check_not_negative", "check_one_of", "check_positive", "check_sparsity", "unknown"]


def check_positive(**options: Any) -> None:
  """Raises a ValueError that names an option that is not a positive, finite number. Traced values (a rate under `vmap`) pass."""
  _check(options, "be positive", lambda value: value > 0)


def check_not_negative(**options: Any) -> None:
  """The same for options that may be 0."""
  _check(options, "not be negative", lambda value: value >= 0)


def check_counts(**options: Any) -> None:
  """Raises a ValueError that names an option that is not a whole number of at least 1."""
  for name, value in options.items():
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
      raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


def check_sparsity(**options: Any) -> None:
  """Raises a ValueError that names an option that is not a number in [0, 1). Traced values pass."""
  check_not_negative(**options)
  for name, value in options.items():
    if not isinstance(value, jax.core.Tracer) and not np.asarray(value) < 1:
      raise ValueError(f"{name} must lie in [0, 1), got {value}.")


def _check(options: dict[str, Any], what: str, holds: Callable[[Any], bool]) -> None:
  for name, value in options.items():
    if isinstance(value, jax.core.Tracer):
      continue
    if not _is_real(value):
      raise ValueError(f"{name} must be a number, got {value!r}.")
    if not holds(np.asarray(value)):  # not as a JAX array: inside of `jit` its comparison would be traced
      raise ValueError(f"{name} must {what}, got {value}.")
    if not math.isfinite(value):
      raise ValueError(f"{name} must be finite, got {value}.")


def _is_real(value):
  """Whether a value is one real number: Python's, NumPy's, or an array without axes."""
  if isinstance(value, jax.Array | np.ndarray | np.generic):
    return value.ndim == 0 and (np.issubdtype(value.dtype, np.integer) or jax.numpy.issubdtype(value.dtype, np.floating))
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_one_of(what: str, value: str, known: Iterable[str]) -> None:
  """Raises a ValueError for a name that is not known, with the nearest that is (see `unknown`).

  Args:
    what: the option, for the message.
    value: what came.
    known: the names there are.

  Returns:
    Nothing.

  Raises:
    ValueError: a value that is not known.
  """
  known = list(known)
  if value not in known:
    raise ValueError(unknown(what, value, known))


def unknown(what: str, value: object, known: Iterable[str]) -> str:
  """A message about an unknown name that gives the nearest known one, and all of them.

  >>> unknown("score", "amp", ["anp", "snip"])
  "unknown score 'amp'. Did you mean 'anp'? Known: anp, snip."
  """
  known = sorted(known)
  nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
  hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
  return f"unknown {what} '{value}'.{hint} Known: {', '.join(known)}."

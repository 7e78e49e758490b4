"""Checks of arguments that several modules share."""

import difflib
from collections.abc import Iterable

import jax

__all__ = ["check_not_negative", "check_one_of", "check_positive", "unknown"]


def check_positive(**options: float) -> None:
  """Raises a ValueError that names an option that is not positive. Traced values (a rate under `vmap`) pass."""
  for name, value in options.items():
    if not isinstance(value, jax.core.Tracer) and not value > 0:
      raise ValueError(f"{name} must be positive, got {value}.")


def check_not_negative(**options: float) -> None:
  """The same for options that may be 0."""
  for name, value in options.items():
    if not isinstance(value, jax.core.Tracer) and not value >= 0:
      raise ValueError(f"{name} must not be negative, got {value}.")


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

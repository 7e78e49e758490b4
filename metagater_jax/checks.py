"""Checks of arguments that several modules share."""

import jax

__all__ = ["check_not_negative", "check_positive"]


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

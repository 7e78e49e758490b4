"""Functions and what they capture, apart."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

__all__ = ["lift"]


def lift(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], list[jax.Array]]:
  """`lifted` and `captured` such that `lifted(captured, *arguments)` is `function(*arguments)`, and nothing traced is hidden in `lifted`.

  A function with a derivative of its own (`jax.custom_vjp`) must not capture traced values: those of its backward pass would be of a trace that
  has ended, and no gradient would reach what they depend on.

  Args:
    function: of pytrees of arrays.
    *arguments: of the shapes and types that it will be called with.

  Returns:
    lifted: `(captured, *arguments) -> ` what `function` gives.
    captured: the traced arrays that the function refers to.
  """
  closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
  traced = [isinstance(value, jax.core.Tracer) for value in closed.consts]

  def lifted(captured, *arguments):
    captured = iter(captured)
    values = [next(captured) if own else value for own, value in zip(traced, closed.consts)]
    results = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, values))(*jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shape), results)

  return lifted, [value for own, value in zip(traced, closed.consts) if own]

"""Splits a function into what a loop need not compute again and the rest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

__all__ = ["hoist"]


def hoist(function: Callable[[Any, Any], Any], moving: Any, fixed: Any) -> tuple[Callable[[Any, list[jax.Array]], Any], list[jax.Array]]:
  """`rest` and `known` such that `rest(moving, known)` is `function(moving, fixed)`, and `known` depends on `fixed` alone.

  A compiler would find this only where it sees all steps of a loop side by side, and not in loops within loops. What the function
  calls through its own `jax.jit`, and what depends on `moving` in any part, is not looked into and stays in `rest`.

  Args:
    function: `(moving, fixed) -> pytree`; what it captures counts as fixed.
    moving, fixed: pytrees of arrays; of `moving` only shapes and types matter.

  Returns:
    rest: `(moving, known) -> pytree`, differentiable in both.
    known: floating-point arrays, differentiable in `fixed`; what is known of other types stays inside `rest`.

  >>> rest, known = hoist(lambda w, v: w * jnp.exp(v).sum(), 2.0, jnp.zeros(3))
  >>> [x.shape for x in known], float(rest(2.0, known)), float(rest(5.0, known))
  ([()], 6.0, 15.0)
  """
  closed, shape = jax.make_jaxpr(function, return_shape=True)(moving, fixed)
  jaxpr, count = closed.jaxpr, len(jax.tree.leaves(moving))
  variables = lambda atoms: [atom for atom in atoms if not isinstance(atom, core.Literal)]
  changing, before, after = set(jaxpr.invars[:count]), [], []
  for equation in jaxpr.eqns:
    if changing.isdisjoint(variables(equation.invars)):
      before.append(equation)
    else:
      after.append(equation)
      changing.update(equation.outvars)
  needed = [v for v in dict.fromkeys(variables([x for equation in after for x in equation.invars] + jaxpr.outvars))
            if v not in changing]
  first = core.ClosedJaxpr(jaxpr.replace(invars=jaxpr.invars[count:], outvars=needed, eqns=before), closed.consts)
  second = core.ClosedJaxpr(jaxpr.replace(constvars=[], invars=jaxpr.invars[:count] + needed, eqns=after), [])
  values = core.jaxpr_as_fun(first)(*jax.tree.leaves(fixed))
  is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in values]

  def rest(moving, known):
    known = iter(known)
    given = [next(known) if own else value for own, value in zip(is_float, values)]
    return jax.tree.unflatten(jax.tree.structure(shape), core.jaxpr_as_fun(second)(*jax.tree.leaves(moving), *given))

  return rest, [value for own, value in zip(is_float, values) if own]

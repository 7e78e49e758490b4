"""What is hoisted out of a function, and the rest, are the function."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from metagater_jax.optim.hoisting import hoist


def test_what_is_hoisted_and_the_rest_are_the_function():
  weights = jnp.array([0.5, -2.0])

  def function(moving, fixed):
    """Fixed alone, moving alone, both, integers, and a call that is compiled by itself."""
    order = jnp.argsort(fixed["x"])
    of_both = jax.jit(lambda w, x: jnp.sin(w * x).sum())(moving[0], fixed["x"][order])
    return {"both": of_both * jnp.exp(fixed["y"]), "fixed": jnp.cos(fixed["x"]) @ weights, "moving": moving[1] ** 2}

  def by_parts(moving, fixed):
    rest, known = hoist(function, jax.tree.map(jnp.zeros_like, moving), fixed)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in known)
    return rest(moving, known)

  moving, fixed = (jnp.array([1.0, 2.0]), jnp.float32(3.0)), {"x": jnp.array([0.3, 0.1]), "y": jnp.float32(0.7)}
  same = lambda one, other: jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), one, other)
  same(by_parts(moving, fixed), function(moving, fixed))
  total = lambda f: lambda moving, fixed: sum(jax.tree.leaves(f(moving, fixed)))
  same(jax.jit(jax.grad(total(by_parts), (0, 1)))(moving, fixed), jax.grad(total(function), (0, 1))(moving, fixed))
  many = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), (moving, fixed))
  same(jax.vmap(by_parts)(*many), jax.vmap(function)(*many))

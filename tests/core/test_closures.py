"""What a function captures, as its argument."""

import jax
import jax.numpy as jnp
import pytest

import metagater_jax as mg


def test_lifted_is_the_function_and_what_it_captured_is_an_argument():
  known = jnp.array([1.0, 2.0])

  def outer(x, n):
    lifted, captured = mg.core.lift(lambda w: (known * x).sum() * w + n, 3.0)
    assert len(captured) == 2  # what is no tracer is a constant
    doubled = lifted([2 * c for c in captured], 3.0)
    return lifted(captured, 3.0), doubled

  plain, doubled = jax.jit(outer)(2.0, 5)
  assert (plain, doubled) == (3 * 2 * 3 + 5, 4 * 3 * 3 + 10)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_derivative_of_its_own_may_then_be_differentiated_by_what_is_captured(wrap):
  def squared(scale, w):
    lifted, captured = mg.core.lift(lambda w: scale * w**2, w)
    call = jax.custom_vjp(lambda captured, w: lifted(captured, w))
    call.defvjp(lambda captured, w: jax.vjp(lifted, captured, w), lambda pull, g: pull(g))
    return call(captured, w)

  gradient = jax.grad(wrap(squared), (0, 1))(3.0, 2.0)
  assert gradient == (4, 12)

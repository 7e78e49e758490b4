"""Checks name the option, what it may be and what it is; traced values pass."""

import jax
import pytest

from metagater_jax.core.checks import check_not_negative, check_one_of, check_positive


def test_numbers_are_named_and_traced_values_pass():
  with pytest.raises(ValueError, match="local_lr must be positive, got 0"):
    check_positive(local_steps=1, local_lr=0)
  with pytest.raises(ValueError, match="local_lr must be positive, got nan"):
    check_positive(local_lr=float("nan"))
  with pytest.raises(ValueError, match="weight must not be negative, got -1"):
    check_not_negative(rate=0, weight=-1)

  @jax.jit
  def traced(x):
    check_positive(x=x)
    check_not_negative(x=x)
    return x
  assert traced(-1.0) == -1


def test_an_unknown_name_gets_the_nearest():
  check_one_of("score", "anp", ("anp", "snip"))
  with pytest.raises(ValueError, match="unknown score 'snap'. Did you mean 'snip'. Known: anp, snip."):
    check_one_of("score", "snap", ("snip", "anp"))
  with pytest.raises(ValueError, match="unknown score 'zzz'. Known: anp, snip."):
    check_one_of("score", "zzz", ("anp", "snip"))

"""Checks name the option, what it may be and what it is; traced values pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagater_jax.core.checks import check_counts, check_not_negative, check_one_of, check_positive, check_sparsity


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


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, "3", None, np.float32(2), float("nan")])
def test_what_is_no_count_is_refused(value):
  with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got"):
    check_counts(steps=value)
  check_counts(steps=3, chunk=np.int64(2))


@pytest.mark.parametrize(
  "value, message",
  [
    ("0.1", "must be a number, got '0.1'"),
    (None, "must be a number, got None"),
    (True, "must be a number"),
    (np.float32(-1), "positive, got -1"),
    (np.zeros(2), "must be a number"),
    (float("inf"), "must be finite, got inf"),
    (jnp.float32(0), "positive, got 0"),
  ],
)
def test_what_is_no_positive_number_is_refused(value, message):
  with pytest.raises(ValueError, match=f"lr.* {message}"):
    check_positive(lr=value)
  check_positive(lr=np.float32(0.5), other=jnp.bfloat16(1), third=2)


def test_sparsities():
  check_sparsity(sparsity=0.0, other=np.float32(0.9))
  for value in (1.0, -0.1, float("nan"), "0.5"):
    with pytest.raises(ValueError, match="sparsity must"):
      check_sparsity(sparsity=value)

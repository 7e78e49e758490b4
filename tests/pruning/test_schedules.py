"""Schedules prune when and as far as they say."""

import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg


@pytest.mark.parametrize(
  "kind, expected", [("linear", [0, 0.2, 0.4, 0.6, 0.8, 0.8]), ("one_shot", [0.8] * 6), ("cubic", [0, 0.4625, 0.7, 0.7875, 0.8, 0.8])]
)
def test_schedules(kind, expected):
  schedule = mg.pruning.sparsity_schedule(kind, 0.8, begin=10, end=50, every=10)
  np.testing.assert_allclose([schedule.sparsity(jnp.array(step)) for step in (10, 20, 30, 40, 50, 60)], expected, atol=1e-6)
  due = [step for step in range(100) if schedule.due(jnp.array(step))]
  assert due == ([10] if kind == "one_shot" else [10, 20, 30, 40, 50])


def test_a_schedule_ends_at_its_sparsity_whatever_divides():
  schedule = mg.pruning.sparsity_schedule("linear", 0.9, begin=0, end=25, every=10, start=0.5)
  assert [step for step in range(100) if schedule.due(jnp.array(step))] == [0, 10, 20, 25]
  np.testing.assert_allclose(schedule.sparsity(jnp.array(25)), 0.9, rtol=1e-6)


def test_stages_reach_their_levels_and_rest():
  schedule = mg.pruning.staged_schedule((0.5, 0.9), 100, every=20)
  due = [step for step in range(250) if schedule.due(jnp.array(step))]
  assert due == [0, 20, 40, 50, 100, 120, 140, 150]
  np.testing.assert_allclose(
    [schedule.sparsity(jnp.array(step)) for step in (0, 25, 50, 99, 100, 125, 150, 199, 230)],
    [0, 0.4375, 0.5, 0.5, 0.5, 0.85, 0.9, 0.9, 0.9],
    atol=1e-6,
  )
  with pytest.raises(ValueError, match=r"must increase and lie in \[0, 1\), got \(0.9, 0.5\)"):
    mg.pruning.staged_schedule((0.9, 0.5), 100)
  with pytest.raises(ValueError, match="leave a step of 1 to recover"):
    mg.pruning.staged_schedule((0.5, 0.9), 1)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("linear", 1.0), r"sparsity must lie in \[0, 1\), got 1.0"),
    (("linear", -0.1), "got -0.1"),
    (("quadratic", 0.5), "unknown pruning schedule 'quadratic'"),
    (("linear", 0.5), "begin 0, end 0 and every 1"),
  ],
)
def test_impossible_schedules(arguments, message):
  with pytest.raises(ValueError, match=message):
    mg.pruning.sparsity_schedule(*arguments)
  with pytest.raises(ValueError, match="from 0.9 down to 0.5"):
    mg.pruning.sparsity_schedule("one_shot", 0.5, start=0.9)

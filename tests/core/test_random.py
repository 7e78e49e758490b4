"""Samples drawn without replacement: different, even, and in every order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg


def test_minibatches_are_drawn_without_replacement_and_evenly():
  data = mg.data.make_task(np.arange(9, dtype=np.float32)[:, None], np.arange(9))._replace(count=jnp.array(7))
  draw = jax.jit(jax.vmap(lambda k: mg.data.sample_batch(k, data, 3).labels))
  drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 7000)))
  assert all(len(set(row)) == 3 for row in drawn[:500])
  counts = np.bincount(drawn.ravel(), minlength=9)
  assert counts[7] == counts[8] == 0  # padding is never drawn
  assert np.abs(counts[:7] - 3000).max() < 5 * np.sqrt(3000 * 4 / 7)


def test_positions_are_uniform_over_ordered_draws():
  draws = np.asarray(jax.vmap(lambda k: mg.core.sample_positions(k, jnp.array(4), 3))(jax.random.split(jax.random.key(0), 24_000)))
  counts = np.bincount(draws @ [16, 4, 1], minlength=64)
  assert (counts > 0).sum() == 24  # 4·3·2 ordered draws without repetition, and no other
  assert np.abs(counts[counts > 0] - 1000).max() < 5 * np.sqrt(1000)


def test_positions_of_a_large_task_beyond_the_unrolled_steps():
  drawn = np.asarray(mg.core.sample_positions(jax.random.key(1), jnp.array(100), 100))
  assert sorted(drawn) == list(range(100)) and (drawn != np.arange(100)).any()


@pytest.mark.parametrize("count", [2**20, 2**24 + 3, 2**26, 2**30])
def test_every_sample_of_a_large_task_can_be_drawn(count):
  """A float32 has 23 bits: times 2²⁶ it would be a multiple of eight."""
  drawn = np.asarray(jax.jit(jax.vmap(lambda key: mg.core.sample_positions(key, jnp.array(count), 2)))(jax.random.split(jax.random.key(2), 4000)))
  assert drawn.min() >= 0 and drawn.max() < count and (drawn[:, 0] != drawn[:, 1]).all()
  for parts in (np.bincount(drawn.ravel() % 8, minlength=8), np.histogram(drawn, 8, (0, count))[0]):
    assert np.abs(parts - 1000).max() < 5 * np.sqrt(1000)

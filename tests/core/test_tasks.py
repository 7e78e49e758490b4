"""Tasks side by side, one after the other or some at a time: the same results."""

import jax.numpy as jnp
import numpy as np
import pytest

import metagater_jax as mg


def test_unknown_task_axis():
  with pytest.raises(ValueError, match="'auto', 'vmap', 'map', 'merged' or a positive number.*'pmap'"):
    mg.core.map_tasks(lambda x: x, jnp.arange(3), "pmap")


@pytest.mark.parametrize("how", ["vmap", "map", 1, 2, 3, 10, "2"])
def test_sums_and_maps_are_loops_over_tasks(how):
  """Also where a number of tasks at a time leaves some over."""
  rng = np.random.default_rng(0)
  x, share = rng.normal(size=(7, 3)), rng.uniform(size=7)
  function = lambda x: {"square": x**2, "sum": x.sum()}
  total = mg.core.sum_over_tasks(function, jnp.asarray(x), jnp.asarray(share), how)
  np.testing.assert_allclose(total["square"], share @ x**2, rtol=1e-5)
  np.testing.assert_allclose(total["sum"], share @ x.sum(1), rtol=1e-5)
  np.testing.assert_allclose(mg.core.map_tasks(function, jnp.asarray(x), how)["sum"], x.sum(1), rtol=1e-5)

"""Names of leaves, which configs and saved models rely on, and models as pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import metagater_jax as mg


def test_names_are_flax_paths_in_the_trees_order():
  network = mg.GatedNetwork(mg.nn.ResNet12(classes=2, widths=(2, 2)), ("block1/conv2",))
  params = network.init(jax.random.key(0), (8, 8, 1))
  names = mg.core.named_leaves(params)
  assert set(names) == set(flatten_dict(params, sep="/"))
  for leaf, expected in zip(names.values(), jax.tree.leaves(params), strict=True):
    assert leaf is expected


def test_a_model_goes_through_jit_with_and_without_a_mask():
  double = jax.jit(lambda model: model._replace(params=jax.tree.map(lambda w: 2 * w, model.params)))
  w = {"w": jnp.arange(3.0)}
  assert double(mg.Model(w)).mask is None
  masked = double(mg.Model(w, {"w": jnp.array([1.0, 0.0, 1.0])}))
  np.testing.assert_array_equal(masked.params["w"], [0, 2, 4])
  np.testing.assert_array_equal(masked.mask["w"], [1, 0, 1])

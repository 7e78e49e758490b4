"""Proximal operators against what they claim: argmin_v step·R(v) + ½‖v − w‖²."""

import chex
import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import pytest
import scipy.optimize

import metagater_jax as mg


def numerical_prox(value, w, step):
  """Minimizes step·R(v) + ½‖v − w‖² as a smooth problem with R's kinks rounded off, ever less (float64 NumPy)."""
  v = w.copy()
  for eps in (1e-2, 1e-4, 1e-6, 1e-9, 1e-12):
    objective = lambda v: step * value(v, eps) + 0.5 * np.sum((v - w) ** 2)
    v = scipy.optimize.minimize(objective, v, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000}).x
  return v


GROUPS = [[0, 3], [1], [2, 4, 5]]
smooth_l1 = lambda v, eps: np.sum(np.sqrt(v**2 + eps))
smooth_group = lambda v, eps: sum(np.sqrt(np.sum(v[g] ** 2) + eps) for g in GROUPS)
smooth_weighted = lambda v, eps: sum(np.sqrt(len(g)) * np.sqrt(np.sum(v[g] ** 2) + eps) for g in GROUPS)
NUMBERS = jnp.array([0, 1, 2, 0, 2, 2])


@pytest.mark.parametrize(
  "penalty, value", [(mg.l1(), smooth_l1), (mg.group_lasso(NUMBERS), smooth_group), (mg.group_lasso(NUMBERS, size_weighted=True), smooth_weighted)]
)
@pytest.mark.parametrize("step", [0.1, 0.6, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_prox_is_the_minimizer_of_its_problem(penalty, value, step, seed):
  w = np.random.default_rng(seed).normal(size=6)
  ours = np.asarray(jax.jit(penalty.prox)(jnp.asarray(w), step), np.float64)
  reference = numerical_prox(value, w, step)
  np.testing.assert_allclose(ours, reference, atol=3e-4)
  np.testing.assert_allclose(penalty.value(jnp.asarray(w)), value(w, 0.0), rtol=1e-5)
  # And no better point: the objective of ours is not above the reference's.
  objective = lambda v: step * value(v, 0.0) + 0.5 * np.sum((v - w) ** 2)
  assert objective(ours) <= objective(reference) + 1e-6


def test_against_jaxopt():
  w = jax.random.normal(jax.random.key(0), (7, 5))
  chex.assert_trees_all_close(mg.l1().prox(w, 0.4), jaxopt.prox.prox_lasso(w, 0.4), rtol=1e-6, atol=1e-7)
  rows = jax.vmap(lambda row: jaxopt.prox.prox_group_lasso(row, 1.3))(w)
  chex.assert_trees_all_close(mg.group_lasso(0).prox(w, 1.3), rows, rtol=1e-5)


def test_groups_that_span_leaves_shrink_together_and_others_stay():
  gate = {"conv3": {"W1": jnp.ones((2, 3)), "b1": jnp.ones(3), "W2": jnp.array([[3.0, 0.1], [0.0, 0.1], [0.0, 0.1]]), "b2": jnp.array([4.0, 0.1])}}
  moved = mg.group_lasso(mg.gate_groups).prox(gate, 1.0)["conv3"]
  np.testing.assert_allclose(moved["W2"][:, 0], [2.4, 0, 0], rtol=1e-6)  # norm 5 becomes 4
  np.testing.assert_allclose(moved["b2"], [3.2, 0.0], rtol=1e-6)
  assert (moved["W2"][:, 1] == 0).all()  # norm 0.2 vanishes, exactly
  chex.assert_trees_all_equal(moved["W1"], gate["conv3"]["W1"])
  np.testing.assert_allclose(mg.group_lasso(mg.gate_groups).value(gate), 5.2, rtol=1e-6)


@pytest.mark.parametrize("penalty", [mg.l1(), mg.group_lasso(0), mg.group_lasso(None)])
def test_zero_stays_zero_and_a_zero_step_is_the_identity(penalty):
  w = {"a": jnp.zeros((3, 2)), "b": jnp.array([[1.0, -2.0]])}
  chex.assert_trees_all_equal(penalty.prox(w, 0.0), w)
  assert (penalty.prox(w, 1.0)["a"] == 0).all()
  chex.assert_tree_all_finite(penalty.prox(w, 1.0))


def test_on_part_by_key_and_by_function():
  w = {"backbone": {"kernel": jnp.array([0.5, 2.0])}, "gate": {"W2": jnp.array([0.5, 2.0]), "W1": jnp.array([0.5])}}
  by_key = mg.on_part(mg.l1(), "gate")
  moved = by_key.prox(w, 1.0)
  chex.assert_trees_all_equal(moved["backbone"], w["backbone"])
  np.testing.assert_allclose(moved["gate"]["W2"], [0, 1])
  np.testing.assert_allclose(by_key.value(w), 3.0)
  by_function = mg.on_part(mg.l1(), lambda path, leaf: path == "gate/W2")
  moved = by_function.prox(w, 1.0)
  np.testing.assert_allclose(moved["gate"]["W2"], [0, 1])
  chex.assert_trees_all_equal((moved["backbone"], moved["gate"]["W1"]), (w["backbone"], w["gate"]["W1"]))
  np.testing.assert_allclose(by_function.value(w), 2.5)


def test_errors_name_what_is_wrong():
  with pytest.raises(ValueError, match="no part 'gates'.*'backbone', 'gate'"):
    mg.on_part(mg.l1(), "gates").prox({"gate": jnp.ones(1), "backbone": jnp.ones(1)}, 1.0)
  with pytest.raises(ValueError, match=r"shape \(2,\), the parameters \(3,\)"):
    mg.group_lasso(jnp.array([0, 1])).prox(jnp.ones(3), 1.0)
  with pytest.raises(ValueError, match="nothing is penalized"):
    mg.group_lasso(lambda path, leaf: None).prox({"a": jnp.ones(3)}, 1.0)
  with pytest.raises(ValueError, match="must have the same groups"):
    mg.group_lasso(lambda path, leaf: ("one", 0)).prox({"a": jnp.ones(3), "b": jnp.ones(4)}, 1.0)


def test_an_empty_gate_has_no_penalty():
  penalty = mg.on_part(mg.group_lasso(mg.gate_groups), "gate")
  w = {"backbone": jnp.ones(2), "gate": {}}
  assert penalty.value(w) == 0
  chex.assert_trees_all_equal(penalty.prox(w, 1.0), w)


@pytest.mark.parametrize("step", [0.5, 0.0])
def test_derivatives_where_a_group_is_zero(step):
  """Of the value 0, a subgradient; of the prox 0 inside the ball and, without a ball, the identity's. At other groups by finite differences."""
  w = jnp.array([[0.0, 3.0, 0.1], [0.0, 4.0, 0.2]])
  penalty = mg.group_lasso(1)
  np.testing.assert_allclose(jax.grad(penalty.value)(w), [[0, 0.6, 0.1 / np.sqrt(0.05)], [0, 0.8, 0.2 / np.sqrt(0.05)]], rtol=1e-5)
  norms = jax.jacobian(lambda w: mg.optim.group_norms(1, w)[""])(w)
  assert np.isfinite(norms).all() and (norms[0] == 0).all()
  for prox in (lambda w: penalty.prox(w, step), lambda w: mg.optim.block_soft_threshold(w, step, axis=0)):
    jacobian = np.asarray(jax.jacobian(prox)(w))
    assert np.isfinite(jacobian).all()
    np.testing.assert_array_equal(jacobian[:, 0, :, 0], np.eye(2) * (step == 0))
    numeric = (np.asarray(prox(w.at[0, 1].add(1e-2)), np.float64) - np.asarray(prox(w.at[0, 1].add(-1e-2)), np.float64)) / 2e-2
    np.testing.assert_allclose(jacobian[:, :, 0, 1], numeric, atol=2e-3)
  assert np.isfinite(jax.grad(lambda s: penalty.prox(w, s).sum())(step))

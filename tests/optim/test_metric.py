"""Rates of their own for parts of the parameters: Algorithm 1 in a block metric, against float64 in other coordinates, and at rate 1 to the bit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import metagater_jax as mg
from metagater_jax.federated.rounds import federated_round

RATES = {"gate": 7.0, "backbone": 0.5}
MU = 0.05
PENALTY = mg.on_part(mg.group_lasso(0), "gate")


def quadratics():
  """Tasks L_i(w) = ½ ‖A_i w − b_i‖², w = (backbone (3,), gate (4, 2) as 8 numbers), as float64."""
  rng = np.random.default_rng(0)
  return [(rng.normal(size=(6, 11)) / 3, rng.normal(size=6)) for _ in range(4)]


def block_shrink(gate, step):
  norms = np.linalg.norm(gate, axis=1, keepdims=True)
  return gate * np.maximum(1 - step / np.maximum(norms, 1e-300), 0)


def in_scaled_coordinates(tasks, w0, scale, *, rounds, steps, lr, prox_weight, beta, mu):
  """Algorithm 1 as the paper writes it, on ψ = D^(−1/2) w, with the penalty μ R(D^(1/2) ψ), whose prox is block soft-thresholding because R is
  homogeneous and D is one number on the gate; returns w of ag."""
  root = np.sqrt(scale)
  x = ag = w0 / root
  rho = root[-1]
  for t in range(1, rounds + 1):
    alpha, gamma = 2 / (t + 1), t * beta / 2
    md = (1 - alpha) * ag + alpha * x
    found = []
    for a, b in tasks:
      v = md.copy()
      for _ in range(steps):
        v = v - lr * (root * (a.T @ (a @ (root * v) - b)) + prox_weight * (v - md))
      found.append(v)
    d = prox_weight * (md - np.mean(found, 0))

    def prox(psi, step):
      return np.concatenate([psi[:3], block_shrink(psi[3:].reshape(4, 2), step * mu * rho).ravel()])

    x, ag = prox(x - gamma * d, gamma), prox(md - beta * d, beta)
  return ag * root


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_block_metric_is_algorithm_1_in_scaled_coordinates(steps):
  tasks = quadratics()
  w0 = np.random.default_rng(1).normal(size=11)
  scale = np.r_[np.full(3, 0.5), np.full(8, 7.0)]
  settings = dict(prox_weight=2.0, beta=0.15)
  expected = in_scaled_coordinates(tasks, w0, scale, rounds=12, steps=steps, lr=0.05, mu=MU, **settings)

  with jax.enable_x64(True):
    a, b = (jnp.asarray(np.stack(part)) for part in zip(*tasks))

    def loss(params, batch, key=None):
      task = batch.labels[0]
      w = jnp.concatenate([params["backbone"], params["gate"].ravel()])
      return 0.5 * jnp.sum((a[task] @ w - b[task]) ** 2)

    algorithm = mg.metagater(loss, local_lr=0.05, local_steps=steps, penalty=PENALTY, penalty_weight=MU, rates=RATES, **settings)
    one = lambda i: (np.array([i]),) * 2
    population = mg.make_population(np.zeros((4, 1)), np.arange(4), mg.data.Partition(*zip(*(one(i) for i in range(4)))))
    state = mg.federated_init(algorithm, {"backbone": jnp.asarray(w0[:3]), "gate": jnp.asarray(w0[3:].reshape(4, 2))}, jax.random.key(0))
    for _ in range(12):
      state, _ = federated_round(algorithm, state, population, jnp.arange(4), cohort=4, batch_size=1)
    ag = algorithm.deploy(state.server).params
  found = np.concatenate([np.asarray(ag["backbone"]), np.asarray(ag["gate"]).ravel()])
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
  assert 0 < (expected == 0).sum() < 8  # the penalty's threshold is at work


def test_rate_1_is_no_change_to_the_bit(small_network, small_population):
  loss = mg.classification_loss(small_network)
  params = small_network.init(jax.random.key(0), (8, 8, 1))
  penalty = mg.on_part(mg.group_lasso(mg.gate_groups), "gate")
  results = []
  for rates in (None, {"gate": 1.0}, {"gate": 1.0, "backbone": 1.0}, {"gate": 30.0}):
    algorithm = mg.metagater(loss, local_lr=0.1, local_steps=2, penalty=penalty, penalty_weight=0.01, rates=rates)
    state, _ = mg.run_rounds(
      algorithm, mg.federated_init(algorithm, params, jax.random.key(1)), small_population, jnp.arange(6), rounds=4, cohort=3, batch_size=8
    )
    results.append(state.server)
  chex.assert_trees_all_equal(results[0], results[1], results[2])
  assert not np.allclose(results[0].md["gate"]["conv3"]["b2"], results[3].md["gate"]["conv3"]["b2"])


def test_the_prox_in_the_metric_is_its_minimizer():
  rng = np.random.default_rng(2)
  w, step = {"backbone": rng.normal(size=2), "gate": rng.normal(size=(4, 2))}, 0.2
  found = mg.optim.in_metric(PENALTY, RATES).prox(jax.tree.map(jnp.asarray, w), step)
  scale = np.r_[np.full(2, 0.5), np.full(8, 7.0)]
  flat = np.concatenate([w["backbone"], w["gate"].ravel()])

  def objective(v):
    return step * np.sqrt((v[2:].reshape(4, 2) ** 2).sum(1) + 1e-14).sum() + 0.5 * ((v - flat) ** 2 / scale).sum()

  best = minimize(objective, flat, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000}).x
  np.testing.assert_allclose(np.concatenate([found["backbone"], np.ravel(found["gate"])]), best, atol=2e-4)


def test_traced_rates():
  """Settings are tuned by one program for all of their values."""
  gradient = {"backbone": jnp.ones(2), "gate": jnp.ones(2)}
  scaled = jax.jit(lambda rate: mg.optim.scale_parts(gradient, {"gate": rate}))(3.0)
  assert scaled["gate"].tolist() == [3.0, 3.0] and scaled["backbone"].tolist() == [1.0, 1.0]


def test_errors(small_network):
  loss = mg.classification_loss(small_network)
  with pytest.raises(ValueError, match="rate of part 'gate'"):
    mg.metagater(loss, local_lr=0.1, rates={"gate": 0.0})
  with pytest.raises(ValueError, match="rates are given for gates, which is no part of these parameters; they have .'backbone', 'gate'."):
    mg.optim.scale_parts({"backbone": jnp.ones(2), "gate": jnp.ones(2)}, {"gates": 2.0})
  with pytest.raises(ValueError, match="which is no part of these parameters; they have ArrayImpl"):
    mg.optim.scale_parts(jnp.ones(2), {"gate": 2.0})

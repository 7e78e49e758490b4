"""FedAvg rounds in FedJAX (Ro et al. 2021), for an environment of its own: `make .venv-fedjax/ready`.

`python fedjax_rounds.py mnist 1 7` prints the median milliseconds of a round (5 tasks, one local step, 7 repeats) as JSON. It
imports nothing of this project: FedJAX's released version needs an older JAX.
"""

import json
import statistics
import sys
import time

import fedjax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms import fed_avg


def mlp(images):
  return hk.Sequential([hk.Flatten(), hk.Linear(100), jax.nn.relu, hk.Linear(10)])(images)


def conv4(images):
  layers = []
  for width in (32, 64, 128):
    layers += [hk.Conv2D(width, 3), jax.nn.relu, hk.MaxPool(2, 2, "VALID")]
  return hk.Sequential([*layers, hk.Flatten(), hk.Linear(10)])(images)


CASES = {"mnist": (mlp, (28, 28, 1), 5, 20), "cifar10": (conv4, (32, 32, 3), 20, 40)}


def main():
  name, steps, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  network, shape, cohort, tasks = CASES[name]
  model = hk.without_apply_rng(hk.transform(network))
  rng = np.random.default_rng(0)
  data = {
    b"%d" % i: fedjax.ClientDataset({"x": rng.normal(size=(200, *shape)).astype(np.float32), "y": rng.integers(0, 10, 200)}) for i in range(tasks)
  }

  def loss(params, batch, key):
    log_likelihood = jax.nn.log_softmax(model.apply(params, batch["x"]))
    return -jnp.mean(jnp.take_along_axis(log_likelihood, batch["y"][:, None], 1))

  algorithm = fed_avg.federated_averaging(
    jax.grad(loss),
    fedjax.optimizers.sgd(0.05),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(batch_size=20, num_epochs=None, num_steps=steps, drop_remainder=True),
  )
  state = algorithm.init(model.init(jax.random.PRNGKey(0), jnp.zeros((1, *shape))))
  seconds = []
  for i in range(repeats + 2):
    chosen = rng.choice(tasks, cohort, replace=False)
    keys = jax.random.split(jax.random.PRNGKey(i), cohort)
    clients = [(b"%d" % task, data[b"%d" % task], key) for task, key in zip(chosen, keys)]
    jax.block_until_ready(keys)
    start = time.perf_counter()
    state, _ = algorithm.apply(state, clients)
    jax.block_until_ready(state.params)
    seconds.append(time.perf_counter() - start)
  print(json.dumps({"round_ms": 1000 * statistics.median(seconds[2:]), "jax": jax.__version__}))


if __name__ == "__main__":
  main()

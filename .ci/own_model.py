"""What a user of the wheel does: data and a flax model of their own, meta-training, adaptation, and with --file a file for a device."""

import importlib.metadata
import sys
import time

start = time.perf_counter()
import metagater_jax as mg

seconds = time.perf_counter() - start
heavy = ("matplotlib", "ml_collections", "tensorflow_datasets", "sklearn", "scipy.stats", "onnx", "experiments")
loaded = [name for name in heavy if name in sys.modules]
assert not loaded, f"import metagater_jax loads {loaded}"
assert any(str(path).endswith("py.typed") for path in importlib.metadata.files("metagater_jax")), "py.typed is not in the wheel"

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Mine(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(8, (3, 3), conv_general_dilated=mg.nn.conv_as_matmul, name="stem")(x))
    return nn.Dense(2, name="head")(x.mean((1, 2)))


rng = np.random.default_rng(0)
labels = np.arange(400) % 2
images = rng.normal(size=(400, 6, 6, 1)).astype(np.float32) + labels[:, None, None, None].astype(np.float32)
devices = np.arange(400) // 40  # ten devices with 40 samples each
partition = mg.data.Partition(
  tuple(np.flatnonzero(devices == device)[:30] for device in range(10)), tuple(np.flatnonzero(devices == device)[30:] for device in range(10))
)
population = mg.make_population(images, labels, partition)
network = mg.GatedNetwork(Mine(), gated_layers=("stem",))
loss = mg.classification_loss(network)
algorithm = mg.metagater(loss, local_lr=0.1, rates={"gate": 30.0})
state = mg.federated_init(algorithm, network.init(jax.random.key(0), images.shape[1:]), jax.random.key(1))
state, _ = jax.jit(partial(mg.run_rounds, algorithm, rounds=40, cohort=4, batch_size=10), donate_argnums=0)(state, population, jnp.arange(8))
model = algorithm.deploy(state.server)
adapted = mg.two_stage(loss, network=network, lr=0.1, keep={"stem": 4}).adapt(model, population.train(9))
metrics = mg.evaluate_task(network, adapted, population.test(9))
assert float(metrics.accuracy) > 0.8, float(metrics.accuracy)
small = mg.deploy.compact(network, adapted, images.shape[1:])
assert small.params["backbone"]["stem"]["kernel"].shape == (3, 3, 1, 4)
versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("metagater_jax", "jax", "flax", "optax"))
print(f"Python {sys.version.split()[0]}, {versions}: imported in {seconds:.1f} s; accuracy {float(metrics.accuracy):.2f} with half of the filters")
if "--file" in sys.argv:
  plain = dataclasses.replace(small.network, gated_layers=())
  content = mg.deploy.to_tflite({"infer": mg.deploy.inference(plain, small.params, images.shape[1:])})
  from ai_edge_litert.interpreter import Interpreter

  infer = Interpreter(model_content=content, num_threads=1).get_signature_runner("infer")
  expected = np.asarray(network.apply(adapted.params, jnp.asarray(images[:1]))[0])
  np.testing.assert_allclose(infer(images=images[:1])["logits"], expected, atol=1e-5)
  print(f"a .tflite file of {len(content):,} bytes gives what JAX gives")

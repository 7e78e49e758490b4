"""Files for devices: what they compute is what JAX computes, run by the runtimes themselves."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter

import metagater_jax as mg
from metagater_jax.deploy import (
  Signature,
  adaptation,
  compact,
  device_loss,
  inference,
  quantize_tflite,
  signature,
  to_onnx,
  to_stablehlo,
  to_tflite,
  within_budget,
)
from metagater_jax.personalize import constant_gate

NETWORKS = {
  "conv4, gated": (mg.GatedNetwork(mg.ConvNet4(5, widths=(4, 6, 8)), ("conv2", "conv3")), (16, 16, 3)),
  "conv7": (mg.GatedNetwork(mg.nn.ConvNet7(5, widths=(4, 4, 6, 6, 8, 8))), (20, 20, 3)),
  "sensor, gated": (mg.GatedNetwork(mg.nn.SensorNet(6, widths=(4, 6, 8)), ("conv1", "conv3")), (32, 3)),
  "mlp, gated": (mg.GatedNetwork(mg.MLP(5, widths=(7, 6)), ("hidden2",)), (8, 8, 1)),
  "fewshot": (mg.GatedNetwork(mg.nn.FewShotConvNet(5, widths=(4, 4, 4, 4))), (16, 16, 3)),
  "resnet": (mg.GatedNetwork(mg.nn.ResNet12(5, widths=(4, 4, 6, 6))), (16, 16, 3)),
}


def made(name, batch):
  network, shape = NETWORKS[name]
  params = network.init(jax.random.key(0), shape)
  images = np.asarray(jax.random.normal(jax.random.key(1), (batch, *shape)))
  return network, params, shape, images, np.asarray(network.apply(params, images)[0])


def litert(content, signature="infer"):
  return Interpreter(model_content=content, num_threads=1).get_signature_runner(signature)


def close(found, expected, tolerance=1e-5):
  np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "resnet" else name for name in NETWORKS])
def test_every_format_gives_what_jax_gives(name):
  batch = 1 if NETWORKS[name][0].rowwise else 4  # one that normalizes over the batch needs a batch
  network, params, shape, images, logits = made(name, batch)
  fixed = inference(network, params, shape, batch)
  close(litert(to_tflite({"infer": fixed}))(images=images)["logits"], logits)
  close(onnxruntime.InferenceSession(to_onnx(fixed)).run(None, {"images": images})[0], logits)
  close(jax.export.deserialize(bytearray(to_stablehlo(fixed))).call(images)[0], logits)


@pytest.mark.parametrize("name", [name for name, (network, _) in NETWORKS.items() if network.rowwise])
def test_the_batch_is_dynamic_where_the_format_can(name):
  network, params, shape, images, logits = made(name, 7)
  any_size = inference(network, params, shape, None)
  session, program = onnxruntime.InferenceSession(to_onnx(any_size)), jax.export.deserialize(bytearray(to_stablehlo(any_size)))
  for rows in (images, images[:1], images[:3]):
    close(session.run(None, {"images": rows})[0], logits[: len(rows)])
    close(program.call(rows)[0], logits[: len(rows)])


def test_a_file_has_the_convolutions_themselves():
  """And not their form as products, which is for training many tasks at once."""
  network, params, shape, *_ = made("conv4, gated", 1)
  import onnx

  operators = [node.op_type for node in onnx.load_from_string(to_onnx(inference(network, params, shape))).graph.node]
  assert operators.count("Conv") == 3 and operators.count("MaxPool") == 3 and "Concat" not in operators


def test_integers_of_eight_bits():
  network, params, shape, images, logits = made("conv7", 60)
  content = to_tflite({"infer": inference(network, params, shape)})
  small = quantize_tflite(content, {"images": images[:, None]})
  run = litert(small)
  found = np.concatenate([run(images=image[None])["logits"] for image in images])
  assert found.dtype == np.float32 and len(small) < len(content)
  assert np.corrcoef(found.ravel(), logits.ravel())[0, 1] > 0.99 and np.abs(found - logits).max() < 0.1 * np.abs(logits).max()
  with pytest.raises(ValueError, match="at least 1"):
    quantize_tflite(content, {"images": images[:0, None]})


@pytest.fixture(scope="module")
def device(tmp_path_factory):
  """(network, parameters, shape, data of a task, .tflite that adapts the whole network, one that adapts to a budget), at one learning rate."""
  network, shape = NETWORKS["conv4, gated"]
  params = network.init(jax.random.key(3), shape)
  rows = (np.asarray(jax.random.normal(jax.random.key(4), (10, *shape))), np.arange(10, dtype=np.int32) % 5, np.float32([1] * 8 + [0] * 2))
  keep, rates = {"conv2": 3, "conv3": 4}, {"gate_lr": 3.0, "lr": 0.1}
  whole = mg.two_stage(device_loss(network), network=network, keep=keep, **rates)
  budget = within_budget(network, shape, keep, loss_of=device_loss, **rates)
  files = (
    to_tflite(adaptation(network, lambda w, data: whole.adapt(mg.Model(w), data).params, params, shape, samples=10)),
    to_tflite(adaptation(network, lambda w, data: budget.adapt(w, data)[0], params, shape, samples=10, served=budget.network)),
  )
  reference = mg.two_stage(mg.classification_loss(network), network=network, keep=keep, **rates)
  return network, params, shape, rows, files, reference, budget


def test_a_file_adapts_as_jax_does_and_serves_what_it_adapted(device):
  network, params, shape, rows, (whole, small), reference, budget = device
  adapted = reference.adapt(mg.Model(params), mg.data.Batch(*rows))
  expected = mg.core.trees.named_leaves(adapted.params)
  initial = litert(whole, "initial")()
  jax.tree.map(np.testing.assert_array_equal, initial, {name: np.asarray(leaf) for name, leaf in mg.core.trees.named_leaves(params).items()})
  found = litert(whole, "adapt")(**initial, images=rows[0], labels=rows[1], weight=rows[2])
  assert found.keys() == expected.keys()
  places = [detail["index"] for detail in litert(whole, "adapt").get_output_details().values()]
  assert len(set(places)) == len(places)  # W₂ of both gates is 0 now: one tensor with two names would have one of them in LiteRT.js
  for name, leaf in expected.items():
    np.testing.assert_allclose(found[name], leaf, atol=1e-5, err_msg=name)
  logits = np.asarray(network.apply(adapted.params, rows[0][:1])[0])
  close(litert(whole)(**found, images=rows[0][:1])["logits"], logits)
  # The restricted one: the same network without what is off.
  little = litert(small, "adapt")(**litert(small, "initial")(), images=rows[0], labels=rows[1], weight=rows[2])
  cut = compact(network, adapted, shape)
  for name, leaf in mg.core.trees.named_leaves(cut.params).items():
    np.testing.assert_allclose(little[name], leaf, atol=1e-5, err_msg=name)
  close(litert(small)(**little, images=rows[0][:1])["logits"], logits)
  # No activations stand in a file: four times the data changes little.
  larger = adaptation(network, lambda w, data: budget.adapt(w, data)[0], params, shape, samples=40, served=budget.network)
  assert len(small) < len(whole) and abs(len(to_tflite(larger)) - len(small)) < 4000


def test_a_device_needs_neither_jax_nor_this_package(device, tmp_path):
  """A process of its own, with the runtime alone."""
  *_, rows, (_, small), _, _ = device
  (tmp_path / "model.tflite").write_bytes(small)
  np.savez(tmp_path / "rows.npz", images=rows[0], labels=rows[1], weight=rows[2])
  script = """
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
model = Interpreter("model.tflite")
rows = dict(np.load("rows.npz"))
params = model.get_signature_runner("adapt")(**model.get_signature_runner("initial")(), **rows)
infer = model.get_signature_runner("infer")
logits = np.concatenate([infer(**params, images=image[None])["logits"] for image in rows["images"]])
assert not {"jax", "flax", "metagater_jax", "tensorflow"} & set(sys.modules), sorted(sys.modules)
print((logits.argmax(-1) == rows["labels"]).mean())
"""
  done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
  assert 0 <= float(done.stdout) <= 1


def test_constant_gates_cost_nothing_in_a_file():
  network, params, shape, images, _ = made("conv4, gated", 1)
  params = {**params, "gate": constant_gate(params["gate"], {"conv2": jnp.arange(6) < 3, "conv3": jnp.arange(8) < 4})}
  small = compact(network, mg.Model(params), shape)
  contents = [to_tflite({"infer": inference(*one, shape)}) for one in ((network, params), (small.network, small.params))]
  assert len(contents[1]) < 0.6 * len(contents[0])
  close(litert(contents[1])(images=images)["logits"], litert(contents[0])(images=images)["logits"])


def test_what_a_format_lacks_is_named(monkeypatch):
  network, params, shape, *_ = made("conv4, gated", 1)
  spec = {"x": jax.ShapeDtypeStruct((4,), jnp.float32)}

  def with_sort(x):
    with jax.named_scope("conv9"):
      return (jnp.sort(x),)

  with pytest.raises(NotImplementedError, match="no operator for 'sort', which stands in conv9"):
    to_onnx(Signature(with_sort, spec, ("y",)))
  with pytest.raises(NotImplementedError, match="LiteRT's converter cannot write this"):
    to_tflite({"infer": Signature(lambda x: (jnp.fft.fft(x).real,), spec, ("y",))})
  monkeypatch.setitem(sys.modules, "onnx", None)
  with pytest.raises(ImportError, match=r"onnx is missing.*metagater_jax\[deploy\]"):
    signature.needs("onnx")

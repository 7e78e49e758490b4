"""What cutting channels out saves on a device's runtimes, beside what the multiply-accumulates promise; and what skipping them per input would."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metagater_jax as mg
from experiments.runs.runtimes import LiteRT, OnnxRuntime, interleaved

__all__ = ["compact", "dynamic"]

# Name, network, shape of an image, layers that lose channels.
NETWORKS = (
  ("SensorNet", mg.nn.SensorNet(6), (128, 6), ("conv2", "conv3")),
  ("ConvNet4", mg.nn.ConvNet4(10), (32, 32, 3), ("conv2", "conv3")),
  ("ConvNet7, widths of the tables", mg.nn.ConvNet7(10, (16, 32, 32, 64, 64, 128)), (32, 32, 3), tuple(f"conv{i}" for i in range(2, 7))),
  ("ConvNet7, full width", mg.nn.ConvNet7(10), (32, 32, 3), tuple(f"conv{i}" for i in range(2, 7))),
  ("ResNet-12", mg.nn.ResNet12(5), (32, 32, 3), tuple(f"block{i}/conv{j}" for i in range(1, 5) for j in (1, 2))),
)


def compact(repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
  """Half and a quarter of the channels: how much faster the file is, and how much smaller its work."""
  for name, backbone, shape, gated in NETWORKS[:2] if quick else NETWORKS:
    for fraction in (0.5, 0.25):
      network = mg.GatedNetwork(backbone, gated)
      params = network.init(jax.random.key(0), shape)
      masks = {layer: jnp.arange(own["b2"].shape[0]) < fraction * own["b2"].shape[0] for layer, own in params["gate"].items()}
      small = mg.deploy.compact(network, mg.Model({**params, "gate": mg.personalize.constant_gate(params["gate"], masks)}), shape)
      whole = mg.GatedNetwork(backbone), {**params, "gate": {}}
      ideal = mg.nn.dense_cost(whole[0].layers(shape))[0] / mg.nn.dense_cost(small.network.layers(shape))[0]
      images = np.zeros((1, *shape), np.float32)
      for runtime, write in ((LiteRT, lambda signature: mg.deploy.to_tflite({"infer": signature})), (OnnxRuntime, mg.deploy.to_onnx)):
        calls = {
          key: runtime(write(mg.deploy.inference(*own, shape))).call(images)
          for key, own in (("dense", whole), ("compact", (small.network, small.params)))
        }
        times = {key: own["median"] for key, own in interleaved(calls, 30 * repeats).items()}
        what = f"{name}, {fraction:g} of the channels, {runtime.label}: {times['dense']:.0f} → {times['compact']:.0f} µs (work: {ideal:.2f} × less)"
        yield {
          "what": what,
          "value": times["dense"] / times["compact"],
          "unit": "× faster",
          "key": f"compact {name} {fraction:g} {runtime.label}",
          "ideal": ideal,
          "microseconds": times,
        }


def dynamic(repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
  """A convolution whose filters are gathered per input, as a gate would choose them, and the next one's inputs with them: ONNX Runtime, batch 1."""
  for name, (places, channels, features) in (
    ("ConvNet4's conv3", (16, 64, 128)),
    ("ConvNet7's conv5 and conv6", (8, 64, 128)),
    ("a wide one", (8, 256, 512)),
  )[: 1 if quick else None]:
    model = _gathering(places, channels, features)
    session = OnnxRuntime(model[0])._session, OnnxRuntime(model[1])._session
    images = np.random.default_rng(0).normal(size=(1, channels, places, places)).astype(np.float32)
    for off in (0.0, 0.5, 0.75, 0.9):
      mask = np.arange(features) >= off * features
      times = interleaved(
        {"dense": lambda: session[0].run(None, {"images": images}), "gathered": lambda: session[1].run(None, {"images": images, "mask": mask})},
        30 * repeats,
      )
      yield {
        "what": f"{name}, {off:.0%} of the filters off for an input: gathering them, against dense",
        "unit": "× faster",
        "value": times["dense"]["median"] / times["gathered"]["median"],
        "key": f"dynamic {name} {off:g}",
      }


def _gathering(places, channels, features):
  """Two convolutions with relus and a mean, dense, and with the first one's filters chosen by a mask."""
  import onnx
  from onnx import TensorProto, helper

  rng = np.random.default_rng(0)
  weights = {"k1": (features, channels, 3, 3), "b1": (features,), "k2": (channels, features, 3, 3)}
  constants = [onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name) for name, shape in weights.items()]
  image = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, channels, places, places])
  out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, channels, places, places])
  node, pads = helper.make_node, {"pads": [1, 1, 1, 1]}
  tail = lambda k1, b1, k2: [node("Conv", ["images", k1, b1], ["h"], **pads), node("Relu", ["h"], ["r"]), node("Conv", ["r", k2], ["out"], **pads)]
  choose = [
    node("NonZero", ["mask"], ["places"]),
    node("Squeeze", ["places", "first"], ["numbers"]),
    node("Gather", ["k1", "numbers"], ["g1"]),
    node("Gather", ["b1", "numbers"], ["c1"]),
    node("Gather", ["k2", "numbers"], ["g2"], axis=1),
  ]
  first = onnx.numpy_helper.from_array(np.array([0], np.int64), "first")
  mask = helper.make_tensor_value_info("mask", TensorProto.BOOL, [features])
  graphs = (
    helper.make_graph(tail("k1", "b1", "k2"), "dense", [image], [out], constants),
    helper.make_graph([*choose, *tail("g1", "c1", "g2")], "gathered", [image, mask], [out], [*constants, first]),
  )
  return [helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString() for graph in graphs]

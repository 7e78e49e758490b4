"""What a file for a device computes: functions with named inputs and outputs, as the formats want them."""

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from metagater_jax.core.trees import Params
from metagater_jax.data.batching import Loss
from metagater_jax.data.population import Batch
from metagater_jax.nn.gated import GatedNetwork

__all__ = ["Signature", "adaptation", "device_loss", "inference", "needs"]


class Signature(NamedTuple):
  """A function of arrays with names.

  Attributes:
    function: takes the inputs in their order, and gives the outputs, a tuple of arrays, in theirs.
    inputs: shapes and types by name.
    outputs: names.
    differentiates: whether the function takes gradients through the network, so that poolings stay in the form whose gradient formats know.
  """

  function: Callable[..., tuple[jax.Array, ...]]
  inputs: Mapping[str, jax.ShapeDtypeStruct]
  outputs: tuple[str, ...]
  differentiates: bool = False


def inference(network: GatedNetwork, params: Params, image_shape: tuple[int, ...], batch: int | Any = 1) -> Signature:
  """Images to logits, with the parameters inside.

  Args:
    network: compact or not.
    params: its parameters.
    image_shape: of one image, without the batch axis.
    batch: images at a time; None: any number, where the format can.

  Returns:
    The signature: "images" to "logits".
  """
  size = jax.export.symbolic_shape("batch")[0] if batch is None else batch
  images = jax.ShapeDtypeStruct((size, *image_shape), jnp.float32)
  return Signature(lambda images: (network.apply(params, images)[0],), {"images": images}, ("logits",))


def adaptation(
  network: GatedNetwork,
  adapt: Callable[[Params, Batch], Params],
  params: Params,
  image_shape: tuple[int, ...],
  *,
  samples: int,
  batch: int = 1,
  served: GatedNetwork | None = None,
) -> dict[str, Signature]:
  """A model that adapts where it runs, as three functions: a device calls `initial` for the meta-parameters, `adapt` with them and its own data, and
  `infer` with what comes out.

  Args:
    network: the meta-model's.
    adapt: `(meta-parameters, data) -> parameters`. With `loss = device_loss(network)`, for the whole network
      `lambda params, data: two_stage(loss).adapt(Model(params), data).params`; for a small one `within_budget(…, loss_of=device_loss).adapt`, of
      whose results the first.
    params: the meta-parameters.
    image_shape: of one image, without the batch axis.
    samples: rows of the device's data, all of which each step uses; a row of weight 0 does not count.
    batch: images that `infer` takes at a time.
    served: the network of the adapted parameters; None: `network`.

  Returns:
    "initial": () to the parameters by name; "adapt": parameters, "images" (samples, …), "labels" (samples,) int32 and "weight" (samples,) to the
    adapted ones; "infer": adapted parameters and "images" (batch, …) to "logits".

  >>> import jax, metagater_jax as mg
  >>> network = mg.GatedNetwork(mg.ConvNet4(classes=4, widths=(4, 8, 8)), ("conv3",))
  >>> params = network.init(jax.random.key(0), (16, 16, 3))
  >>> personalizer = mg.two_stage(device_loss(network))
  >>> found = adaptation(network, lambda w, data: personalizer.adapt(mg.Model(w), data).params, params, (16, 16, 3), samples=20)
  >>> {name: (len(s.inputs), len(s.outputs)) for name, s in found.items()}
  {'initial': (0, 12), 'adapt': (15, 12), 'infer': (13, 1)}
  """
  served = network if served is None else served
  spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
  data = {"images": spec(samples, *image_shape), "labels": spec(samples, dtype=jnp.int32), "weight": spec(samples)}
  before = _flat(params)
  after = _flat(jax.eval_shape(lambda params, *rows: adapt(params, Batch(*rows)), params, *data.values()))
  shapes = lambda flat: {name: spec(*leaf.shape, dtype=leaf.dtype) for name, leaf in flat.items()}

  def adapted(*arrays):
    found = _flat(adapt(_nested(before, arrays[:-3]), Batch(*arrays[-3:])))
    # What does not depend on the inputs (W₂ of gates that became constant) would be a constant of the file, equal ones the same one, and LiteRT.js
    # then knows only one of their names.
    tied = dict(zip(before, arrays))
    return tuple(
      leaf + jnp.minimum(jnp.abs(tied[name]), 0) if name in tied and tied[name].shape == leaf.shape else leaf for name, leaf in found.items()
    )

  def infer(*arrays):
    return (served.apply(_nested(after, arrays[:-1]), arrays[-1])[0],)

  return {
    "initial": Signature(lambda: tuple(jnp.asarray(leaf) for leaf in before.values()), {}, tuple(before)),
    "adapt": Signature(adapted, {**shapes(before), **data}, tuple(after), differentiates=True),
    "infer": Signature(infer, {**shapes(after), "images": spec(batch, *image_shape)}, ("logits",)),
  }


def device_loss(network: GatedNetwork) -> Loss:
  """`classification_loss` without gathering and scattering, which runtimes on devices lack: the same mean cross-entropy, by one-hot labels.

  Args:
    network: a `GatedNetwork`.

  Returns:
    The loss.
  """

  def loss(params, batch, key=None):
    logits, _ = network.apply(params, batch.images, key)
    losses = -(jax.nn.one_hot(batch.labels, logits.shape[-1]) * jax.nn.log_softmax(logits)).sum(-1)
    return jnp.sum(losses * batch.weight) / jnp.maximum(batch.weight.sum(), 1)

  loss.rowwise = network.rowwise  # type: ignore[attr-defined]
  return loss


def needs(package: str) -> ModuleType:
  """A package that only exporting needs.

  Args:
    package: as it is imported.

  Returns:
    The module.

  Raises:
    ImportError: if it is missing; the message says how to get it.
  """
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise ImportError(
      f"{package.partition('.')[0]} is missing, which files for devices need: pip install 'metagater_jax[deploy]', or "
      f"-r requirements-deploy.txt ({error})"
    ) from error


def _flat(params):
  flat = traverse_util.flatten_dict(params, sep="/")
  return {name: flat[name] for name in sorted(flat)}


def _nested(names, arrays):
  return {"backbone": {}, "gate": {}} | traverse_util.unflatten_dict(dict(zip(names, arrays, strict=True)), sep="/")

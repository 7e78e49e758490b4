"""Networks without the channels that a task does not use: smaller arrays instead of masks.

`Cutting` says, once for a network, what goes when channels of some layers go: their filters, biases and normalization entries, what the next
layers read of them (also through a flattening, a sum or a concatenation), and their parts of gates. Its sizes are static and its numbers arrays, so
that a device can cut under `jit`, by what its own gate keeps. `compact` is the same for a model whose channels are known.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from metagater_jax.core.checks import check_counts
from metagater_jax.core.trees import Model, Params
from metagater_jax.data.batching import mean_over_task
from metagater_jax.data.population import Batch, TaskData
from metagater_jax.nn.cost import Layer, added_layers
from metagater_jax.nn.gated import GatedNetwork
from metagater_jax.nn.resized import Resized

__all__ = ["Compact", "Cutting", "compact", "kept_channels"]


class Compact(NamedTuple):
  """A network without the channels that a task does not use.

  Attributes:
    network: with the widths that are left; gates that would be constant are gone.
    params: its parameters.
    kept: numbers of the channels that are left, by layer that lost some.
  """

  network: GatedNetwork
  params: Params
  kept: dict[str, np.ndarray]


def kept_channels(
  network: GatedNetwork, model: Model, image_shape: tuple[int, ...], data: TaskData | Batch | None = None, *, threshold: float = 0.0, chunk: int = 64
) -> dict[str, np.ndarray]:
  """Which channels of each layer an adapted model can use.

  Off is a channel whose gate is off for every input (W₂'s column is zero and b₂ ≤ 0), whose filter and biases a mask removes, or, where
  data is given, whose gate is on for no more than a part `threshold` of it.

  Args:
    network: the model's.
    model: adapted, with gates or a mask or both.
    image_shape: of one image, without the batch axis.
    data: calibration data of the task; None: only what is off for every possible input.
    threshold: fraction of the data, in [0, 1).
    chunk: samples at a time.

  Returns:
    (channels,) booleans by layer with a kernel (a gate on a block of layers is one of each of them), for the layers where a channel is off.

  Raises:
    ValueError: a model with neither gates nor a mask, or calibration data of another shape than the network's images.
  """
  gate = model.params.get("gate", {}) if isinstance(model.params, Mapping) else {}
  if not gate and model.mask is None:
    raise ValueError(
      "kept_channels: this model has neither gates nor a mask, so there is nothing to cut out. Adapt a gated network with two_stage, "
      "or prune one by channel with metasnip."
    )
  if not 0 <= threshold < 1:
    raise ValueError(f"kept_channels: threshold must lie in [0, 1), got {threshold}.")
  on = {layer: np.asarray((own["W2"] != 0).any(0) | (own["b2"] > 0)) for layer, own in gate.items()}
  if gate and data is not None:
    found = data.images.shape[1:]
    if tuple(found) != tuple(image_shape):
      raise ValueError(f"kept_channels: the calibration data has images of shape {tuple(found)}, but the network is for {tuple(image_shape)}.")
    rates = jax.jit(lambda params: mean_over_task(lambda batch: network.apply(params, batch.images)[1], data, chunk))(model.params)
    on = {layer: on[layer] & (np.asarray(rate) > threshold) for layer, rate in rates.items()}
  kept = {}
  for layer in network.layers(image_shape):
    own = [on[name] for name in on if name in layer.modules]
    if model.mask is not None:
      leaves = _module(model.mask["backbone"], layer.name).values()
      own.append(np.any([np.asarray(leaf).reshape(-1, leaf.shape[-1]).any(0) for leaf in leaves], axis=0))
    used = np.all(own, axis=0) if own else np.ones(layer.outputs, bool)
    if not used.all():
      kept[layer.name] = used
  return kept


class Cutting:
  """What goes when a network's layers keep fewer channels.

  Args:
    network: whose layers are cut.
    image_shape: of one image, without the batch axis.
    counts: how many channels are left, by layer with a kernel. Layers whose outputs are added keep the same channels; name any of them.
    drop_gates: gated layers whose gates go: what is left of them is always on.

  Attributes:
    network: the smaller one.
    groups: for each layer that is cut, the name under which `take` expects its channels: layers that keep the same ones share it.

  Raises:
    ValueError: an unknown layer, a number of channels that it cannot have, or two for layers whose outputs are added.
  """

  def __init__(self, network: GatedNetwork, image_shape: tuple[int, ...], counts: Mapping[str, int], drop_gates: tuple[str, ...] = ()):
    layers = network.layers(image_shape)
    self._layers = {layer.name: layer for layer in layers}
    joined = added_layers(layers)
    widths: dict[str, int] = {}
    for name, count in counts.items():
      if name not in self._layers:
        raise ValueError(f"compact: there is no layer '{name}'; those with channels are {', '.join(self._layers)}.")
      if not 1 <= count <= self._layers[name].outputs:
        raise ValueError(f"compact: {name} has {self._layers[name].outputs} channels and must keep at least 1 of them, got {count}.")
      if widths.setdefault(joined[name], count) != count:
        raise ValueError(
          f"compact: the outputs of {name} are added to another layer's, so both keep the same channels, but one is to keep "
          f"{widths[joined[name]]} and the other {count}."
        )
    self.groups = {name: joined[name] for name in self._layers if widths.get(joined[name], self._layers[name].outputs) < self._layers[name].outputs}
    self._widths = {group: widths[group] for group in set(self.groups.values())}
    gates = tuple(layer for layer in network.gated_layers if layer not in drop_gates)
    self._reader = {gate: next(layer for layer in layers if layer.name == gate or layer.name.startswith(f"{gate}/")) for gate in gates}
    self._maker = {gate: next(layer for layer in layers if gate in layer.modules) for gate in gates}
    lost = lambda source: self._layers[source].outputs - self._widths[self.groups[source]] if source in self.groups else 0
    absent = {gate: sum(map(lost, self._own_sources(reader))) for gate, reader in self._reader.items()}
    before = network.backbone
    whole, sizes = (before.backbone, dict(before.features)) if isinstance(before, Resized) else (before, {})
    sizes |= {name: self._widths[group] for name, group in self.groups.items()}
    self.network = dataclasses.replace(
      network,
      backbone=Resized(whole, tuple(sizes.items())) if sizes else whole,
      gated_layers=gates,
      absent=tuple((gate, count + dict(network.absent).get(gate, 0)) for gate, count in absent.items() if count or gate in dict(network.absent)),
    )

  def take(self, params: Params, index: Mapping[str, jax.Array]) -> Params:
    """The smaller network's parameters.

    Args:
      params: of the network that is cut.
      index: numbers of the channels that are kept, by name of their group, as many as were said. They may be traced.

    Returns:
      Parameters of `network`.
    """
    backbone = traverse_util.flatten_dict(params["backbone"], sep="/")
    for name, layer in self._layers.items():
      own = {leaf: value for leaf, value in backbone.items() if leaf.rpartition("/")[0] == name}
      kernel, width = own[f"{name}/kernel"], layer.outputs
      reads = self._reads(layer, kernel.shape[0 if layer.kind == "dense" else -2], index)
      for leaf, value in own.items():
        if reads is not None and leaf == f"{name}/kernel":
          value = jnp.take(value, reads, axis=0 if layer.kind == "dense" else value.ndim - 2)
        if name in self.groups and value.shape[-1:] == (width,):
          value = jnp.take(value, index[self.groups[name]], axis=-1)
        backbone[leaf] = value
    gate = {}
    for layer in self.network.gated_layers:
      own, reader, maker = params["gate"][layer], self._reader[layer], self._maker[layer].name
      reads = self._reads(reader, reader.input_shape[-1], index)
      if reads is not None:
        channels = jnp.arange(reader.input_shape[-1])
        gone = ~(channels[:, None] == reads[None]).any(1)
        old = own["W1"][len(channels) :].sum(0)  # what was cut out before
        own = {**own, "W1": jnp.concatenate([jnp.take(own["W1"], reads, axis=0), (gone @ own["W1"][: len(channels)] + old)[None]])}
      if maker in self.groups:
        kept = index[self.groups[maker]]
        own = {**own, "W2": jnp.take(own["W2"], kept, axis=1), "b2": jnp.take(own["b2"], kept)}
      gate[layer] = own
    return {**params, "backbone": traverse_util.unflatten_dict(backbone, sep="/"), "gate": gate}

  def put(self, params: Params, index: Mapping[str, jax.Array], into: Params) -> Params:
    """The whole network's parameters with the smaller one's in their places: the reverse of `take`.

    Args:
      params: of `network`.
      index: as `take` had it.
      into: parameters of the network that was cut; what is not in `network` stays as it is here.

    Returns:
      A pytree like `into`.
    """
    places, pull = jax.vjp(lambda whole: self.take(whole, index)["backbone"], into)
    there = pull(jax.tree.map(jnp.ones_like, places))[0]["backbone"]
    values = pull(params["backbone"])[0]["backbone"]
    return {**into, "backbone": jax.tree.map(lambda old, value, is_there: jnp.where(is_there > 0, value, old), into["backbone"], values, there)}

  def _own_sources(self, layer: Layer) -> tuple[str, ...]:
    """The layers whose channels a layer reads, one of those that are added."""
    widths = [self._layers[source].outputs for source in layer.sources]
    added = len(widths) > 1 and sum(widths) != layer.input_shape[-1] and len(set(widths)) == 1
    return layer.sources[:1] if added else layer.sources

  def _reads(self, layer, inputs, index):
    """What is left of a kernel's inputs, or None where all are."""
    sources = self._own_sources(layer)
    if not any(source in self.groups for source in sources):
      return None
    parts, start = [], 0
    for source in sources:
      width = self._layers[source].outputs
      parts.append(start + (index[self.groups[source]] if source in self.groups else jnp.arange(width)))
      start += width
    channels = jnp.concatenate(parts)
    if inputs % start:
      raise ValueError(
        f"compact: '{layer.name}' reads {inputs} numbers, which are no whole number of times the {start} channels of "
        f"{', '.join(sources)}; something between them changes channels."
      )
    return (jnp.arange(inputs // start)[:, None] * start + channels).ravel()  # flattened: the channels of each place after each other


def compact(
  network: GatedNetwork,
  model: Model,
  image_shape: tuple[int, ...],
  kept: Mapping[str, np.ndarray] | None = None,
  *,
  drop_gates: bool = False,
  multiple: int = 1,
) -> Compact:
  """A model without the channels that a task does not use.

  The outputs are the model's, to round-off, for every input whose masks lie in what is kept. That what lies between the layers lets channels be cut
  (a normalization over them would not) is tried on random images.

  Args:
    network: the model's.
    model: adapted.
    image_shape: of one image, without the batch axis.
    kept: (channels,) booleans by layer, see `kept_channels`; None: what it says without data.
    drop_gates: whether channels that are kept are always on, so that no gate is left. Without, gates that depend on the input stay, and only those
      go that are on for every input.
    multiple: numbers of channels are rounded up to multiples of this by channels of zeros, as far as a layer has so many. Runtimes compute several
      channels at a time: ONNX Runtime takes longer for 45 channels than for 64.

  Returns:
    The smaller network with its parameters. Where all channels of a layer are off, one of them stays as zeros, with a warning.

  Raises:
    ValueError: as `kept_channels` and `Cutting`, or a network in which channels cannot be cut out.

  >>> import jax, metagater_jax as mg
  >>> network = mg.GatedNetwork(mg.ConvNet4(classes=4, widths=(4, 8, 8)), ("conv3",))
  >>> params = network.init(jax.random.key(0), (16, 16, 3))
  >>> gate = mg.personalize.constant_gate(params["gate"], {"conv3": jax.numpy.arange(8) < 3})
  >>> small = compact(network, mg.Model({**params, "gate": gate}), (16, 16, 3))
  >>> small.network.gated_layers, small.params["backbone"]["conv3"]["kernel"].shape, small.kept["conv3"].tolist()
  ((), (3, 3, 8, 3), [0, 1, 2])
  """
  check_counts(multiple=multiple)
  image_shape = tuple(image_shape)
  kept = kept_channels(network, model, image_shape) if kept is None else {name: np.asarray(used, bool) for name, used in kept.items()}
  layers = network.layers(image_shape)
  joined = added_layers(layers)
  params = model.params if model.mask is None else jax.tree.map(jnp.multiply, model.params, model.mask)
  params = {"backbone": params["backbone"], "gate": dict(params.get("gate", {}))}
  together: dict[str, np.ndarray] = {}
  for layer in layers:
    used = kept.get(layer.name, np.ones(layer.outputs, bool))
    if used.shape != (layer.outputs,):
      raise ValueError(f"compact: {layer.name} has {layer.outputs} channels, but what is kept of it has shape {used.shape}.")
    params["backbone"] = _zeroed(params["backbone"], layer, used)
    group = joined[layer.name]
    together[group] = together.get(group, np.zeros(layer.outputs, bool)) | used
  for group, used in together.items():
    if not used.any():
      warnings.warn(f"compact: every channel of {group} is off; one is kept, as zeros, so that the network stays connected.", stacklevel=2)
      used[0] = True
    if not used.all() and multiple > 1:
      used[np.flatnonzero(~used)[: -used.sum() % multiple]] = True
  index = {group: np.flatnonzero(used) for group, used in together.items()}
  counts = {layer.name: len(index[joined[layer.name]]) for layer in layers if layer.name != layers[-1].name or layer.name in kept}
  gone = []
  for gate in network.gated_layers:
    own = params["gate"][gate]
    maker = next(layer for layer in layers if gate in layer.modules).name
    used = kept.get(maker, np.ones(own["b2"].shape, bool))
    if drop_gates or bool(((own["W2"] == 0).all(0) & (own["b2"] > 0))[used].all()):
      gone.append(gate)
  cutting = Cutting(network, image_shape, counts, tuple(gone))
  found = Compact(
    cutting.network,
    cutting.take(params, {group: jnp.asarray(own) for group, own in index.items()}),
    {name: index[group] for name, group in cutting.groups.items()},
  )
  _check(network, params, found, image_shape, tuple(gone))
  return found


def _check(network, params, found, image_shape, gone):
  """That the network with zeros in the place of what is cut gives what the small one gives. Gates act on both."""
  images = jax.random.normal(jax.random.key(0), (3, *image_shape))
  whole = dataclasses.replace(network, gated_layers=tuple(layer for layer in network.gated_layers if layer not in gone))
  problem = None
  try:
    expected, actual = (
      jax.jit(lambda params, own=own: own.apply(params, images)[0])(own_params)
      for own, own_params in ((whole, params), (found.network, found.params))
    )
    scale = float(jnp.abs(expected).max()) + 1e-6
    if expected.shape != actual.shape or not float(jnp.abs(expected - actual).max()) < 1e-3 * scale:
      problem = "their outputs differ"
  except (ValueError, TypeError) as error:
    problem = str(error).partition("\n")[0]
  if problem:
    raise ValueError(
      f"compact: channels of {', '.join(found.kept)} cannot be cut out of {type(network.backbone).__name__}: something beside "
      f"convolutions and dense layers, as a normalization over channels, depends on how many there are ({problem})."
    )


def _module(tree, path):
  for name in path.split("/"):
    tree = tree[name]
  return tree


def _zeroed(backbone, layer, used):
  """The parameters with 0 for all that makes channels that are not used, so that these are 0 whatever the input."""
  if used.all():
    return backbone
  flat = traverse_util.flatten_dict(backbone, sep="/")
  for name, value in flat.items():
    if name.rpartition("/")[0] == layer.name and value.shape[-1:] == used.shape:
      flat[name] = jnp.where(used, value, 0)
  return traverse_util.unflatten_dict(flat, sep="/")

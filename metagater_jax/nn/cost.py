"""What a network consists of and costs, dense, gated and pruned: multiply-accumulates per example and parameters that must be kept."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from metagater_jax.nn.dropout import without_dropout

__all__ = [
  "ChannelCosts",
  "Layer",
  "added_layers",
  "channel_costs",
  "dense_cost",
  "gate_cost",
  "gated_macs",
  "gated_parameters",
  "head_of",
  "masked_macs",
  "network_layers",
]


@dataclasses.dataclass(frozen=True)
class Layer:
  """One call of a convolution or dense layer, as one pass over one example meets it.

  Attributes:
    name: the module's path in the network ("conv3", "block1/conv2").
    kind: "conv" or "dense".
    inputs, outputs: channels (features) in and out.
    macs: multiply-accumulate operations per example.
    parameters: of the kernel, and `per_channel`; 0 where the module was called before.
    per_channel: those beside the kernel, as many for each channel out: a bias, or a normalization's scale and bias.
    input_shape: of one example, without the batch axis.
    sources: names of the layers whose channels this one reads, several where their outputs are added or concatenated; none where
      the image itself is (part of) what it reads.
    modules: paths of the modules whose output are this layer's channels, itself among them: a gate on one of these masks them.
  """

  name: str
  kind: str
  inputs: int
  outputs: int
  macs: int
  parameters: int
  per_channel: int
  input_shape: tuple[int, ...]
  sources: tuple[str, ...] = ()
  modules: tuple[str, ...] = ()


def network_layers(backbone: nn.Module, image_shape: Sequence[int]) -> tuple[Layer, ...]:
  """The convolutions and dense layers of a flax module in the order in which they are called: what has a `kernel`, the projections of attention
  (`nn.DenseGeneral`) among them. Products of activations with each other, as of queries with keys, are not layers.

  Nothing is computed: the module is traced on shapes. Which layer reads which is followed through the traced program, so that it is true of
  residual connections, too.

  Args:
    backbone: any flax module that takes images (batch, …).
    image_shape: of one image, without the batch axis.

  Returns:
    A layer per call; a module that is called twice is there twice.
  """
  layers, marks = [], []

  def mark(kind, name, x):
    marks.append((kind, name))
    return jax.tree.map(lambda x: checkpoint_name(x, f"metagater {len(marks) - 1}"), x)

  def record(next_function, args, kwargs, context):
    module, path = context.module, "/".join(context.module.path)
    if context.method_name != "__call__" or not path or not args:
      return next_function(*args, **kwargs)
    number, place = len(layers), len(marks)
    out = without_dropout(next_function, (mark("in", number, args[0]), *args[1:]), kwargs, context)
    own = module.variables.get("params", {})
    if "kernel" not in own or len(layers) != number:
      marks[place] = ("none", number)  # a module of layers: what it reads is theirs to say
      return mark("module", path, out)
    kernel = own["kernel"]  # nn.Conv, nn.Dense, ConvUnit and other people's
    split = _contracted_axes(module, args[0].shape, kernel.shape, out.shape)
    dense = split is not None
    split = split or kernel.ndim - 1
    features = kernel.shape[split:]
    per_channel = sum(leaf.size for name, leaf in own.items() if name != "kernel" and getattr(leaf, "shape", None) == features)
    positions = module.positions(args[0]) if hasattr(module, "positions") else out.size // out.shape[0] // math.prod(features)
    again = any(layer.name == path for layer in layers)
    layers.append(
      Layer(
        name=path,
        kind="dense" if dense or kernel.ndim == 2 else "conv",
        outputs=math.prod(features),
        inputs=math.prod(kernel.shape[:split]) if dense else args[0].shape[-1],
        macs=positions * kernel.size,
        parameters=0 if again else kernel.size + per_channel,
        per_channel=0 if again else per_channel,
        input_shape=tuple(args[0].shape[1:]),
      )
    )
    return mark("module", path, mark("out", number, out))

  with nn.intercept_methods(record):
    program = jax.make_jaxpr(backbone.init_with_output)(jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)).jaxpr
  reads: dict[int, set] = {}
  made: dict[str, set] = {}
  _follow(program, [set(), {_IMAGE}], marks, reads, made)
  return tuple(
    dataclasses.replace(
      layer,
      sources=() if _IMAGE in reads[i] else tuple(dict.fromkeys(layers[j].name for j in sorted(reads[i]))),
      modules=tuple(path for path, by in made.items() if i in by),
    )
    for i, layer in enumerate(layers)
  )


def _contracted_axes(module, inputs, kernel, outputs):
  """How many of a kernel's axes a dense layer sums over; the others are its outputs. Its kernel is (inputs …, outputs …), several of each in
  `nn.DenseGeneral`, and its other axes are the same in and out. None: it is a convolution, whose outputs are the last axis."""
  if not hasattr(module, "positions") and not isinstance(module, nn.Conv | nn.ConvLocal | nn.ConvTranspose):
    for split in range(len(kernel) - 1, 0, -1):
      rest = len(kernel) - split
      if inputs[-split:] == kernel[:split] and outputs[-rest:] == kernel[split:] and inputs[:-split] == outputs[:-rest]:
        return split
  return None


_IMAGE = -1


def _follow(program, inputs, marks, reads, made):
  """Which layers' outputs (by number), or the image, each result of a traced program depends on, without another layer between; what reaches
  the marks is noted in `reads` by number of the layer, and in `made` by path of the module."""
  known = dict(zip(program.invars, inputs, strict=True))
  of = lambda atom: set() if isinstance(atom, core.Literal) else known.get(atom, set())
  for equation in program.eqns:
    reached = set().union(*map(of, equation.invars))
    results = [reached] * len(equation.outvars)
    if equation.primitive.name == "name" and equation.params["name"].startswith("metagater "):
      kind, name = marks[int(equation.params["name"].split()[1])]
      if kind == "out":
        results = [{name}]
      elif kind != "none":
        (reads if kind == "in" else made).setdefault(name, set()).update(reached)
    for inner in _inner_programs(equation):
      exact = len(inner.invars) == len(equation.invars) and equation.primitive.name not in ("scan", "while", "cond")
      found = _follow(inner, [of(x) for x in equation.invars] if exact else [reached] * len(inner.invars), marks, reads, made)
      results = found if exact and len(found) == len(results) else [set().union(*results, *found)] * len(results)
    known.update(zip(equation.outvars, results))
  return [of(x) for x in program.outvars]


def _inner_programs(equation):
  parts = [part for value in equation.params.values() for part in (value if isinstance(value, tuple | list) else [value])]
  return [part.jaxpr if hasattr(part, "consts") else part for part in parts if hasattr(part, "eqns")]


def head_of(backbone: nn.Module, image_shape: Sequence[int]) -> str:
  """The name of the layer that makes the logits: what the network says itself (its attribute `head`), or the last layer that is called.

  Args:
    backbone: a flax module.
    image_shape: of one image, without the batch axis.

  Returns:
    Its path in the network.
  """
  return getattr(backbone, "head", None) or network_layers(backbone, image_shape)[-1].name


def added_layers(layers: Sequence[Layer]) -> dict[str, str]:
  """Which layers keep the same channels, because some layer reads the sum of their outputs.

  Args:
    layers: see `network_layers`.

  Returns:
    For each layer the first of those that it is added to, or itself.
  """
  first = {layer.name: layer.name for layer in layers}
  width = {layer.name: layer.outputs for layer in layers}

  def root(name):
    return name if first[name] == name else root(first[name])

  for layer in layers:
    sources = layer.sources
    if len(sources) > 1 and len({width[source] for source in sources}) == 1 and math.prod(layer.input_shape[-1:]) == width[sources[0]]:
      for source in sources[1:]:
        a, b = sorted((root(sources[0]), root(source)), key=list(first).index)
        first[b] = a
  return {name: root(name) for name in first}


@dataclasses.dataclass(frozen=True)
class ChannelCosts:
  """What a network costs by how many channels its layers keep.

  Attributes:
    groups: layers that keep the same channels (their outputs are added), by the name of the first; the last layer, whose channels are the
      logits, is in none.
    widths: how many channels each group has.
    terms: for each layer its MACs, its group (None: all of its channels stay), and what it reads, as (channels, group) each.
  """

  groups: dict[str, tuple[str, ...]]
  widths: dict[str, int]
  terms: tuple[tuple[int, str | None, tuple[tuple[int, str | None], ...]], ...]

  def macs(self, kept: Mapping[str, Any]) -> Any:
    """MACs per example of the network that keeps so many channels.

    Args:
      kept: a number by group, possibly traced.

    Returns:
      A number.
    """
    part = {group: kept[group] / width for group, width in self.widths.items()} | {None: 1.0}
    read = lambda sources: sum(width * part[group] for width, group in sources) / sum(width for width, _ in sources) if sources else 1.0
    return sum(macs * part[own] * read(sources) for macs, own, sources in self.terms)


def channel_costs(layers: Sequence[Layer], head: str | None = None) -> ChannelCosts:
  """What a network costs by how many channels its layers keep.

  Args:
    layers: see `network_layers`.
    head: the layer that makes the logits, whose channels all stay; None: the last.

  Returns:
    The costs.

  >>> import metagater_jax as mg
  >>> layers = mg.nn.network_layers(mg.ConvNet4(classes=10, widths=(4, 8, 8)), (32, 32, 3))
  >>> costs = channel_costs(layers)
  >>> costs.macs(costs.widths) == dense_cost(layers)[0]
  True
  """
  head, joined, width = head or layers[-1].name, added_layers(layers), {layer.name: layer.outputs for layer in layers}
  group_of = lambda name: None if joined[name] == joined[head] else joined[name]
  groups: dict[str, tuple[str, ...]] = {}
  for layer in layers:
    if group_of(layer.name) is not None and layer.name not in groups.get(joined[layer.name], ()):
      groups[joined[layer.name]] = (*groups.get(joined[layer.name], ()), layer.name)

  def sources(layer):
    added = len(layer.sources) > 1 and len({joined[source] for source in layer.sources}) == 1
    return tuple((width[source], group_of(source)) for source in (layer.sources[:1] if added else layer.sources))

  return ChannelCosts(
    groups, {group: width[group] for group in groups}, tuple((layer.macs, group_of(layer.name), sources(layer)) for layer in layers)
  )


def dense_cost(layers: Sequence[Layer]) -> tuple[int, int]:
  """(MACs per example, parameters) of the backbone without gates.

  Args:
    layers: see `network_layers`.

  Returns:
    Both, as integers.
  """
  return sum(layer.macs for layer in layers), sum(layer.parameters for layer in layers)


def gate_cost(layers: Sequence[Layer], gated_layers: Sequence[str], hidden: int = 16) -> tuple[int, int]:
  """(MACs per example, parameters) that the gates themselves add; pooling is additions only and not counted.

  Args:
    layers: see `network_layers`.
    gated_layers: paths of the modules that have a gate.
    hidden: units of each gate's hidden layer.

  Returns:
    Both, as integers.
  """
  macs = parameters = 0
  for gate in gated_layers:
    inputs = next(layer for layer in layers if layer.name == gate or layer.name.startswith(f"{gate}/")).inputs  # the first reads what the gate reads
    outputs = next(layer for layer in layers if gate in layer.modules).outputs
    macs += inputs * hidden + hidden * outputs
    parameters += inputs * hidden + hidden * outputs + hidden + outputs
  return macs, parameters


def gated_macs(layers: Sequence[Layer], masks: Mapping[str, jax.Array]) -> jax.Array:
  """MACs of the backbone per example, (batch,), when channels that are off are neither computed nor read.

  A layer costs its dense MACs times the fraction of its own channels that are on times that of the channels it reads: of a sum of layers
  those that are on in any of them. Add `gate_cost` for the network as a whole.

  Args:
    layers: see `network_layers`.
    masks: (batch, channels) by gated layer.

  Returns:
    (batch,) floats.
  """
  on = _by_layer(layers, masks)
  return sum(layer.macs * _mean(on.get(layer.name)) * _read(layer, layers, on) for layer in layers) + jnp.zeros(())


def gated_parameters(layers: Sequence[Layer], used: Mapping[str, jax.Array]) -> jax.Array:
  """Parameters of the backbone that remain when channels which no input uses are cut out.

  Args:
    layers: see `network_layers`.
    used: (channels,) booleans by gated layer: whether any input switches the channel on.

  Returns:
    A scalar float.
  """
  kept = _by_layer(layers, {name: mask.astype(jnp.float32) for name, mask in used.items()})
  total = jnp.zeros(())
  for layer in layers:
    own, source = _mean(kept.get(layer.name)), _read(layer, layers, kept)
    total += ((layer.parameters - layer.per_channel) * source + layer.per_channel) * own
  return total


def masked_macs(layers: Sequence[Layer], mask: Mapping[str, Any]) -> jax.Array:
  """MACs of the backbone per example, of the weights that a mask keeps.

  With the `effective_mask` of whole filters that is what a network without them costs; where single weights go, the least that
  hardware pays which skips each of the others.

  Args:
    layers: see `network_layers`.
    mask: of the backbone's parameters, as `make_mask` or `effective_mask` makes it.

  Returns:
    A scalar float.

  >>> import jax.numpy as jnp
  >>> layers = (Layer("conv", "conv", 2, 4, macs=7200, parameters=72, per_channel=0, input_shape=(10, 10, 2)),)
  >>> float(masked_macs(layers, {"conv": {"kernel": jnp.ones((3, 3, 2, 4)).at[..., 1:].set(0)}}))
  1800.0
  """
  kernel = lambda layer: reduce(lambda tree, name: tree[name], layer.name.split("/"), mask)["kernel"]
  return sum(layer.macs * kernel(layer).mean() for layer in layers) + jnp.zeros(())


def _by_layer(layers, masks):
  """(…, channels) by layer that is masked by some gate: its own, or one on a module whose output its channels are."""
  found = {}
  for layer in layers:
    own = [mask for gate, mask in masks.items() if gate in layer.modules]
    if own:
      found[layer.name] = reduce(jnp.multiply, own)
  return found


def _mean(mask):
  return 1.0 if mask is None else mask.mean(-1)


def _read(layer, layers, on):
  """The fraction of the channels that a layer reads which are on."""
  if not layer.sources or not any(source in on for source in layer.sources):
    return 1.0
  if len(layer.sources) == 1:
    return _mean(on[layer.sources[0]])
  width = {other.name: other.outputs for other in layers}
  masks = [on.get(source, jnp.ones(width[source])) for source in layer.sources]
  if all(width[source] == layer.inputs for source in layer.sources):  # a sum
    return 1 - reduce(jnp.multiply, [1 - mask for mask in masks]).mean(-1)
  return sum(width[source] * mask.mean(-1) for source, mask in zip(layer.sources, masks)) / sum(width[source] for source in layer.sources)

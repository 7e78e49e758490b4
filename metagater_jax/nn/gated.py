"""A backbone with gates on some of its layers: parameters w = (θ, φ) and the pure functions that use them."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from metagater_jax.core.random import row_keys
from metagater_jax.core.trees import Params, precision_of
from metagater_jax.data.batching import Loss
from metagater_jax.nn.cost import Layer, network_layers
from metagater_jax.nn.dropout import drop, drop_entries, without_dropout
from metagater_jax.nn.gates import ChannelGate, binarize, logistic_noise

__all__ = ["GatedNetwork", "GatedOutputs", "classification_loss"]


class GatedOutputs(NamedTuple):
  """What a gated network gives for a batch.

  Attributes:
    logits: (batch, classes).
    masks: (batch, channels) zeros and ones by gated layer.
    log_odds: (batch, channels) ℓ by gated layer, without noise.
  """

  logits: jax.Array
  masks: dict[str, jax.Array]
  log_odds: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class GatedNetwork:
  """Any flax backbone with channel gates on the layers named in `gated_layers` (none: the plain backbone).

  The gate of layer l reads l's input z and multiplies l's output with its mask. The layer is any module that takes one
  array (batch, …, C_in) and returns (batch, …, C_out), also inside `nn.remat`. Name one that ends in its nonlinearity, as `ConvUnit` does (Eq. 1), or
  a block of convolution, normalization and relu: on a bare convolution the network's output is the same, but relu's zero
  gradient at 0 then keeps channels that are off from being switched on again.

  Parameters are `{"backbone": θ, "gate": {layer: φ_l}}`; without gates `gate` is empty, and every algorithm stays the same. A model is its
  parameters: backbones that keep something beside them, as the running averages of `nn.BatchNorm`, are refused. `nn.Dropout` is off where there
  is no key (inference and adaptation), and drops by it in training.

  Attributes:
    backbone: a flax module, images (batch, …) to logits (batch, classes).
    gated_layers: paths of modules in it, as "conv3" or "block1/conv2".
    hidden: hidden units of each gate.
    temperature: τ of the binary Gumbel-softmax gate; None is the plain straight-through gate: identity gradient and no
      noise, in training too. To anneal it, `dataclasses.replace(network, temperature=τ_t)` inside of the loss, where τ_t may be traced.
    initial_log_odds, logit_scale, normalize: see `ChannelGate`.
    noise: scale of the logistic noise of training masks; 1 is the binary Gumbel-softmax sample, 0 trains with the masks of inference.
    dropped_layers, dropout: channel dropout, as the noise of an untrained gate is: in training each channel of these layers' outputs is 0 with
      probability `dropout`, by image, and what is left is divided by 1 − dropout. Needs no parameters, and may stand beside gates.
    absent: (layer, channels) where channels that a gate's layer reads were cut out, see `ChannelGate`.
    compute_dtype: what the backbone computes in, forward and backward. Parameters and gradients stay as they are, float32, and
      so do gates, whose thresholds rounding would move, and logits.

  >>> import jax, jax.numpy as jnp
  >>> from metagater_jax.nn import ConvNet4
  >>> network = GatedNetwork(ConvNet4(classes=10), gated_layers=("conv3",))
  >>> params = network.init(jax.random.key(0), (32, 32, 3))
  >>> logits, masks = network.apply(params, jnp.ones((2, 32, 32, 3)))
  >>> logits.shape, masks["conv3"].shape
  ((2, 10), (2, 128))
  """

  backbone: nn.Module
  gated_layers: tuple[str, ...] = ()
  hidden: int = 16
  temperature: float | None = 1.0
  initial_log_odds: float = 0.5
  logit_scale: float = 1.0
  normalize: bool = True
  noise: float = 1.0
  dropped_layers: tuple[str, ...] = ()
  dropout: float = 0.0
  absent: tuple[tuple[str, int], ...] = ()
  compute_dtype: str = "float32"

  def init(self, key: jax.Array, image_shape: Sequence[int]) -> Params:
    """Parameters for images of shape `image_shape` (without the batch axis).

    Raises:
      ValueError: a gated layer that the backbone does not have (the message lists the layers), or a backbone with other variables than
        parameters.
    """
    # Compiled as one program: run operation by operation it would take longer than many a training.
    return jax.jit(lambda key: self._init(key, tuple(image_shape)))(key)

  def _init(self, key, image_shape):
    shapes = {}

    def watch(next_function, args, kwargs, context):
      out = without_dropout(next_function, args, kwargs, context)
      if context.method_name == "__call__" and context.module.path:
        shapes["/".join(context.module.path)] = (args[0].shape, out.shape)
      return out

    backbone_key, gate_key = jax.random.split(key)
    with nn.intercept_methods(watch):
      variables = self.backbone.init(backbone_key, jnp.zeros((1, *image_shape)))
    if beside := sorted(set(variables) - {"params", "intermediates"}):
      raise ValueError(
        f"{type(self.backbone).__name__} keeps {', '.join(beside)} beside its parameters, as nn.BatchNorm does for running averages. A model is "
        "its parameters here: devices average and adapt them, and what one device's data left beside them is wrong for another. Use "
        "nn.GroupNorm or nn.LayerNorm, or metagater_jax.nn.NormalizedConv, which normalizes a batch by itself."
      )
    backbone = variables["params"]
    gate = {}
    for what, layer in (*(("gated", layer) for layer in self.gated_layers), *(("dropped", layer) for layer in self.dropped_layers)):
      if layer not in shapes:
        raise ValueError(f"{what} layer '{layer}' does not exist; the layers of {type(self.backbone).__name__} are {', '.join(shapes)}.")
    for i, layer in enumerate(self.gated_layers):
      inputs, outputs = shapes[layer]
      gate[layer] = self._gate(layer, outputs[-1]).init(jax.random.fold_in(gate_key, i), jnp.zeros(inputs))["params"]
    return {"backbone": backbone, "gate": gate}

  def apply(self, params: Params, images: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits (batch, classes) and the masks (batch, channels) by gated layer: `outputs` without the log-odds.

    Args:
      params, images, key: as in `outputs`.

    Returns:
      Both.

    Raises:
      ValueError: as in `outputs`.
    """
    return self.outputs(params, images, key)[:2]

  def outputs(self, params: Params, images: jax.Array, key: jax.Array | None = None) -> GatedOutputs:
    """Logits, masks, and the log-odds that the masks come from.

    Args:
      params: as `init` makes them.
      images: (batch, …) floats.
      key: for the noise of training masks, or (batch,) keys, one per image (`row_keys`); None (inference and adaptation):
        m = 1[ℓ > 0] without noise.

    Returns:
      All three.

    Raises:
      ValueError: images of a shape that these parameters are not made for, parameters without a gate of these layers, or a gated layer
        inside a module that hands nothing out.
    """
    if missing := [layer for layer in self.gated_layers if layer not in params.get("gate", {})]:
      raise ValueError(
        f"these parameters have no gate for {', '.join(missing)}: they are of a network with other gated_layers. Make them with this network's init."
      )
    keys = None if key is None else _by_row(key, images.shape[0])
    drops = itertools.count(len(self.gated_layers) + len(self.dropped_layers))

    def gate(next_function, args, kwargs, context):
      if isinstance(context.module, nn.Dropout) and context.method_name == "__call__" and keys is not None:
        number = next(drops)
        return drop(context.module, args[0], jax.vmap(lambda key: jax.random.fold_in(key, number))(keys))
      out = without_dropout(next_function, args, kwargs, context)
      layer = "/".join(context.module.path)
      if context.method_name != "__call__":
        return out
      if keys is not None and layer in self.dropped_layers:
        number = len(self.gated_layers) + self.dropped_layers.index(layer)
        own = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        out = drop_entries(out, self.dropout, own, broadcast_dims=range(1, out.ndim - 1))
      if layer not in self.gated_layers:
        return out
      clean = log_odds = self._gate(layer, out.shape[-1]).apply({"params": params["gate"][layer]}, _at_least_float32(args[0]))
      if keys is not None and self.temperature is not None:
        log_odds = log_odds + self.noise * _noise(keys, self.gated_layers.index(layer), log_odds)
      mask = binarize(log_odds, self.temperature)
      context.module.sow(_MASKS, "log_odds", clean)
      context.module.sow(_MASKS, "mask", mask)  # not kept in a list: inside `nn.remat` that would be another trace's
      return out * jnp.expand_dims(mask.astype(out.dtype), tuple(range(1, out.ndim - 1)))

    backbone, images = jax.tree.map(
      lambda x: x.astype(self.compute_dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, (params["backbone"], images)
    )
    try:
      with nn.intercept_methods(gate):
        logits, sown = self.backbone.apply({"params": backbone}, images, mutable=[_MASKS])
    except flax.errors.ScopeParamShapeError as error:
      raise ValueError(f"images of shape {images.shape[1:]} do not fit these parameters of {type(self.backbone).__name__}: {error}") from error
    sown = flax.traverse_util.flatten_dict(sown.get(_MASKS, {}), sep="/")
    if missing := [layer for layer in self.gated_layers if f"{layer}/mask" not in sown]:
      raise ValueError(
        f"the masks of {', '.join(missing)} do not come out of the module around it (nn.scan or nn.vmap); gate a layer outside "
        f"of it, or let it hand out the variables '{_MASKS}'."
      )
    of_gates = lambda what: {layer: sown[f"{layer}/{what}"][-1] for layer in self.gated_layers}
    return GatedOutputs(_at_least_float32(logits), of_gates("mask"), of_gates("log_odds"))

  def layers(self, image_shape: Sequence[int]) -> tuple[Layer, ...]:
    """The backbone's layers, see `network_layers`."""
    return network_layers(self.backbone, image_shape)

  @property
  def rowwise(self) -> bool:
    """Whether the backbone says that an image's logits do not depend on the other images of a batch (its attribute `rowwise`)."""
    return getattr(self.backbone, "rowwise", False)

  @property
  def small(self) -> bool:
    """Whether the backbone says that a task is so little work for a CPU that loops cost more than they save (its attribute `small`)."""
    return getattr(self.backbone, "small", False)

  def _gate(self, layer, channels):
    return ChannelGate(channels, self.hidden, self.initial_log_odds, self.logit_scale, self.normalize, dict(self.absent).get(layer, 0))


def classification_loss(network: GatedNetwork) -> Loss:
  """Mean cross-entropy of a network over the rows of a batch, with their weights (Eq. 2): `(params, batch, key=None) -> scalar`.

  Args:
    network: a `GatedNetwork`, or anything with `apply(params, images, key) -> (logits, masks)`.

  Returns:
    The loss; its attribute `rowwise` is the network's (see `data.is_rowwise`).
  """

  def loss(params, batch, key=None):
    logits, _ = network.apply(params, batch.images, key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.sum(losses * batch.weight) / jnp.maximum(batch.weight.sum(), 1)

  loss.rowwise = getattr(network, "rowwise", False)  # type: ignore[attr-defined]
  return loss


# The collection in which masks leave the backbone.
_MASKS = "masks"


def _at_least_float32(x):
  return x.astype(precision_of(x))


def _by_row(key, rows):
  several = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1
  return key if several else row_keys(key, rows)


def _noise(keys, number, like):
  return jax.vmap(lambda key: logistic_noise(jax.random.fold_in(key, number), like.shape[1:], like.dtype))(keys)

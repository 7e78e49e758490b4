"""A backbone whose layers have other numbers of channels than it was written with: what is left when channels are cut out."""

from typing import Any

import flax.linen as nn
import jax

__all__ = ["Resized"]


class Resized(nn.Module):
  """A backbone with other widths, layer by layer, also where its own options cannot say so (the convolutions of a residual block).

  Paths of modules and names of parameters are the backbone's. What it says of itself (`head`, `rowwise`, `small`) holds as before.

  Attributes:
    backbone: a flax module whose layers have an attribute `features`.
    features: (path of a layer, its channels), for the layers that differ.

  >>> import jax, jax.numpy as jnp
  >>> from metagater_jax.nn import ConvNet4
  >>> small = Resized(ConvNet4(classes=10), (("conv2", 5),))
  >>> shapes = jax.eval_shape(small.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))["params"]
  >>> shapes["conv2"]["kernel"].shape, shapes["conv3"]["kernel"].shape
  ((3, 3, 32, 5), (3, 3, 5, 128))
  """

  backbone: nn.Module
  features: tuple[tuple[str, int], ...]

  def setup(self):
    nn.share_scope(self, self.backbone)

  def __call__(self, images: jax.Array) -> jax.Array:
    widths = dict(self.features)

    def resize(next_function, args, kwargs, context):
      width = widths.get("/".join(context.module.path))
      if width is not None and context.method_name == "__call__":
        object.__setattr__(context.module, "features", width)  # a module is made anew for every call of the network, so it is this one's alone
      return next_function(*args, **kwargs)

    with nn.intercept_methods(resize):
      return self.backbone(images)

  def __getattr__(self, name: str) -> Any:
    if name in ("head", "rowwise", "small"):
      return getattr(self.backbone, name)
    return super().__getattr__(name)

"""Measures that several kinds of runs report."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metagater_jax as mg

__all__ = ["interval", "spread", "what_is_left"]


def spread(values: np.ndarray) -> float | None:
  """The sample standard deviation, with n − 1 in the denominator: the one that every ± here is. None of a single value."""
  values = np.asarray(values, np.float64)
  return float(values.std(ddof=1)) if values.size > 1 else None


def interval(values: np.ndarray) -> dict[str, float]:
  """Mean over episodes, the half width of its 95 % confidence interval, and the number of episodes."""
  return {"mean": float(values.mean()), "ci95": float(1.96 * values.std(ddof=1) / np.sqrt(len(values))), "episodes": len(values)}


def what_is_left(network: mg.GatedNetwork, mask: Mapping[str, Any], image_shape: Sequence[int]) -> dict[str, int]:
  """How many of the backbone's parameters a mask keeps, how many of these are effective (`metagater_jax.pruning.effective_mask`), and the
  multiply-accumulates per image of those."""
  plain = dataclasses.replace(network, gated_layers=())
  apply = lambda backbone, images: plain.apply({"backbone": backbone, "gate": {}}, images)[0]
  backbone = mask["backbone"]
  count = lambda tree: int(sum(leaf.sum() for leaf in jax.tree.leaves(tree)))
  effective = mg.pruning.effective_mask(apply, backbone, jnp.ones((8, *image_shape)))
  return {"kept": count(backbone), "effective": count(effective),
          "macs": round(float(mg.nn.masked_macs(network.layers(image_shape), effective)))}

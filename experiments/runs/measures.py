"""Measures that several kinds of runs report."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metagater_jax as mg

__all__ = ["gates_of", "interval", "mask_difference", "spread", "what_is_left"]


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
  return {"kept": count(backbone), "effective": count(effective), "macs": round(float(mg.nn.masked_macs(network.layers(image_shape), effective)))}


def mask_difference(on_rate: Mapping[str, Any]) -> float:
  """Mean over pairs of tasks of the fraction of channels that one of the two keeps for most of its inputs and the other does not; `on_rate` (tasks,
  channels) by layer."""
  kept = np.concatenate([np.asarray(rate) >= 0.5 for rate in on_rate.values()], axis=1)
  pairs = [np.mean(a != b) for i, a in enumerate(kept) for b in kept[:i]]
  return float(np.mean(pairs)) if pairs else 0.0


def gates_of(metrics: mg.personalize.TaskMetrics) -> dict[str, Any]:
  """What the gates of adapted (or not yet adapted) tasks do, for result.json: means over the tasks of `metrics`, which has gates.

  `layers` has by gated layer the fraction of channels that vary over a task's images, a channel's entropy in bits, and which part of it the class
  explains; `sparsity_over_images` is the standard deviation over a task's images. `by_confidence` has rows (lower end of the bin, fraction of the
  images, their sparsity), `confidence_correlation` is that of an image's sparsity with the network's confidence, by task. `task_difference` is the
  part of the channels in which two tasks differ.
  """
  statistics, layers = metrics.gates, {}
  for layer, rate in metrics.on_rate.items():
    information, entropy = map(np.asarray, mg.personalize.explained_by_class(statistics.joint[layer], statistics.classes))
    layers[layer] = {
      "conditional": float(np.mean(mg.personalize.conditional({layer: rate}))),
      "entropy": float(entropy.mean()),
      "explained_by_class": float(information.sum() / entropy.sum()) if entropy.sum() > 0 else None,
    }
  share, total = np.moveaxis(np.asarray(statistics.bins, np.float64).mean(0), -1, 0)
  correlation = np.asarray(mg.personalize.confidence_correlation(statistics.moments), np.float64)
  mean, square = np.asarray(statistics.moments, np.float64)[..., [1, 3]].T
  return {
    "layers": layers,
    "sparsity_over_images": float(np.sqrt(np.maximum(square - mean**2, 0)).mean()),
    "task_difference": mask_difference(metrics.on_rate),
    "by_confidence": [[i / len(share), float(share[i]), float(total[i] / share[i])] for i in range(len(share)) if share[i] > 0],
    "confidence_correlation": {"mean": float(correlation.mean()), "std": spread(correlation), "per_task": correlation.tolist()},
  }

"""Whole output channels (filters) as what is scored and pruned: one sensitivity for each, and masks that spare a network's work.

costs = nn.channel_costs(network.layers(image_shape))
score = channel_sensitivity(anp(meta_loss, average="signed"), costs.groups)
optimizer = gradual_pruning(optax.adam(1e-3), schedule, scope=by_macs(costs))     # the schedule is in MACs
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from metagater_jax.core.checks import check_counts, check_one_of
from metagater_jax.core.trees import Params, like, named_leaves
from metagater_jax.nn.cost import ChannelCosts
from metagater_jax.pruning.masks import highest_first
from metagater_jax.pruning.scores import AVERAGES, Score

__all__ = ["by_macs", "channel_sensitivity"]

Groups = Mapping[str, Sequence[str]]


def channel_sensitivity(score: Score, groups: Groups, average: str = "absolute") -> Score:
  """How sensitive an objective is to removing a whole channel, as one number: |Σ w · ∂L/∂w| over all that makes the channel.

  With a factor m on the channel's filter, bias, and normalization scale and bias, that is |∂L/∂m| at m = 1: after a convolution the criterion of
  Molchanov et al. 2017 ("Pruning Convolutional Neural Networks for Resource Efficient Inference"). It is not the sum of the weights' own
  sensitivities Σ |w · ∂L/∂w|. Where a normalization follows, a factor on the filter alone changes nothing, so Σ w · ∂L/∂w over the filter is 0
  (Euler) and the sum of magnitudes measures what cancels; what counts is the normalization's scale and bias.

  Args:
    score: whose contributions have their sign, w ⊙ ∇L of each task: `anp(meta_loss, average="signed")`, `snip(loss, average="signed")`.
    groups: modules by name of the group whose channels go together (`nn.ChannelCosts.groups`); a module is a path in the network.
    average: over tasks: "absolute", the mean of the tasks' own; or "signed", that of the mean objective.

  Returns:
    A score, spread evenly over each channel's weights so that their sum over the modules of a group is the channel's. What belongs to no
    group has 0.

  Raises:
    ValueError: an unknown average, or a score without contributions of tasks (magnitudes have no sign).
  """
  check_one_of("average", average, AVERAGES)
  if score.contribution is None:
    raise ValueError(
      "channel_sensitivity: this score has no contributions of tasks; use anp or snip with average='signed'. Magnitudes are summed by "
      "the mask maker itself."
    )

  def contribution(params, task, key, mask):
    leaves = named_leaves(score.contribution(params, task, key, mask))
    totals = {group: sum(leaf.reshape(-1, leaf.shape[-1]).sum(0) for _, leaf in own) for group, own in _by_group(leaves, groups).items()}
    return totals if average == "signed" else jax.tree.map(jnp.abs, totals)

  def finish(params, mean, key):
    del key
    leaves, found = named_leaves(params), {}
    for group, own in _by_group(leaves, groups).items():
      for name, leaf in own:
        found[name] = jnp.broadcast_to(jnp.abs(mean[group]) * leaf.shape[-1] / (leaf.size * len(groups[group])), leaf.shape)
    return like(jax.tree.unflatten(jax.tree.structure(params), [found.get(name, jnp.zeros_like(leaf)) for name, leaf in leaves.items()]), params)

  return Score(finish, contribution)


def by_macs(costs: ChannelCosts, *, multiple: int = 1, least: float = 0.0) -> Callable[[Params, float | jax.Array], Params]:
  """A `scope` for `make_mask`, `gradual_pruning` and `federated_pruning` in which a sparsity is a fraction of the network's MACs.

  From the whole network channels are removed, always those of the lowest score in their layer, from the layer where the score lost per MAC saved is
  least, until so much of the work is gone. What a channel saves (its own filter and what the next layers read of it) shrinks with what is gone
  already, and is computed anew each time. Blocks that fit once the last has gone come back, the most important first.

  Args:
    costs: of the network, see `nn.channel_costs`.
    multiple: channels go in blocks of so many, so that widths stay multiples of it: runtimes compute 8 or 16 channels at a time.
    least: the fraction of its channels that every layer keeps (at least one block).

  Returns:
    `(score, sparsity) -> mask`. The MACs removed are at least the sparsity, as far as `least` lets them; scores are summed over each channel's
    kernels.

  Raises:
    ValueError: `least` outside [0, 1), or a `multiple` below 1.
  """
  check_counts(multiple=multiple)
  if not 0 <= least < 1:
    raise ValueError(f"by_macs: least is a fraction of the channels that each layer keeps, in [0, 1); got {least}.")
  names, total = list(costs.groups), costs.macs(costs.widths)
  fewest = {group: min(width, max(multiple, -(-round(least * width) // multiple) * multiple)) for group, width in costs.widths.items()}

  def mask_of(score, sparsity):
    leaves = named_leaves(score)
    makers = _by_group(leaves, costs.groups)
    of = {group: sum(leaf.reshape(-1, leaf.shape[-1]).sum(0) for _, leaf in own if leaf.ndim > 1) for group, own in makers.items()}
    lowest_first = {group: jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.sort(own))]) for group, own in of.items()}  # sums of the n lowest

    enough = (1 - sparsity) * total * (1 + 1e-6)
    block = lambda group, gone: lowest_first[group][jnp.minimum(gone + multiple, costs.widths[group])] - lowest_first[group][gone]
    changed = lambda kept, group, by: {**kept, group: kept[group] + by}

    def removable(kept):
      """The score per MAC of the next block of each group, infinite where it has none to give."""
      lost = [block(group, costs.widths[group] - kept[group]) / (costs.macs(kept) - costs.macs(changed(kept, group, -multiple))) for group in names]
      return jnp.stack([jnp.where(kept[group] - multiple < fewest[group], jnp.inf, own) for group, own in zip(names, lost)])

    def returnable(kept):
      """The score of the last block that each group gave, −1 where it gave none or there is no room for it, or where it was gone before."""
      fits = [(costs.widths[group] - kept[group] >= multiple) & (costs.macs(changed(kept, group, multiple)) <= enough) for group in names]
      return jnp.stack(
        [jnp.where(fit, block(group, jnp.maximum(costs.widths[group] - kept[group] - multiple, 0)), -1.0) for group, fit in zip(names, fits)]
      )

    def move(kept, which, by):
      return {group: kept[group] + by * (which == i) for i, group in enumerate(names)}

    kept = {group: jnp.asarray(width, jnp.int32) for group, width in costs.widths.items()}
    kept = jax.lax.while_loop(
      lambda kept: (costs.macs(kept) > enough) & jnp.isfinite(removable(kept)).any(),
      lambda kept: move(kept, jnp.argmin(removable(kept)), -multiple),
      kept,
    )
    kept = jax.lax.while_loop(lambda kept: (returnable(kept) >= 0).any(), lambda kept: move(kept, jnp.argmax(returnable(kept)), multiple), kept)
    found = {}
    for group, own in makers.items():
      stays = highest_first(of[group]) < kept[group]
      for name, leaf in own:
        found[name] = jnp.broadcast_to(stays, leaf.shape).astype(leaf.dtype)
    return jax.tree.unflatten(jax.tree.structure(score), [found.get(name, jnp.ones_like(leaf)) for name, leaf in leaves.items()])

  return mask_of


def _by_group(leaves: Mapping[str, jax.Array], groups: Groups) -> dict[str, list[tuple[str, jax.Array]]]:
  """The leaves that make each group's channels: kernels, biases, normalization entries. Modules are named as in the network, which stands somewhere
  in the parameters: where all of them have a kernel (a gate that is named like a layer has none, and a learned rate of a kernel is a number)."""
  kernels = [name for name, leaf in leaves.items() if name.endswith("/kernel") and jnp.ndim(leaf) > 1]
  modules = [module for group in groups.values() for module in group]
  start = [name.removesuffix(f"{modules[0]}/kernel") for name in kernels if f"/{name}".endswith(f"/{modules[0]}/kernel")]
  found = [prefix for prefix in start if all(f"{prefix}{module}/kernel" in kernels for module in modules)]
  if len(found) != 1:
    raise ValueError(f"the kernels of {', '.join(modules)} stand {len(found)} times in these parameters, not once: {', '.join(leaves)}.")
  own = lambda module: [(name, leaf) for name, leaf in leaves.items() if name.rpartition("/")[0] == f"{found[0]}{module}" and jnp.ndim(leaf) > 0]
  return {group: [leaf for module in names for leaf in own(module)] for group, names in groups.items()}

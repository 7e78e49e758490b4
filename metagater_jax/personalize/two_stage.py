"""Fast adaptation at a target task in two stages (Section 3.3): the gate first, then the filters that it kept."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from metagater_jax.core.checks import check_counts, check_one_of, check_positive
from metagater_jax.core.tasks import map_tasks
from metagater_jax.core.trees import Params
from metagater_jax.data.batching import Loss, mean_over_task
from metagater_jax.data.population import Batch, TaskData
from metagater_jax.nn.gated import GatedNetwork
from metagater_jax.nn.gates import gate_groups
from metagater_jax.nn.gates import sparsity as sparsity_of
from metagater_jax.optim.penalties import group_lasso, group_norms
from metagater_jax.personalize.fine_tune import gradient_steps
from metagater_jax.personalize.personalizer import Personalizer
from metagater_jax.pruning.masks import highest_first, masked_loss

__all__ = [
  "SPARSITY_BY",
  "adapt_backbone",
  "adapt_gate",
  "calibrate_threshold",
  "constant_gate",
  "freeze_gate",
  "keep_channels",
  "log_odds_quantile",
  "shift_gate",
  "two_stage",
]

SPARSITY_BY = ("log_odds", "group_norm", "budget")

_group_lasso = group_lasso(gate_groups)


def two_stage(
  loss: Loss,
  *,
  gate_lr: float = 10.0,
  lr: float = 0.05,
  steps: int = 1,
  gate_steps: int | None = None,
  target_sparsity: float | None = None,
  sparsity_by: str = "log_odds",
  keep: Mapping[str, int] | None = None,
  frozen: bool = False,
  network: GatedNetwork | None = None,
  gate_loss: Loss | None = None,
  chunk: int = 64,
  task_axis: str | int = "auto",
) -> Personalizer:
  """MetaGater's adaptation: stage I `adapt_gate`, stage II `adapt_backbone`, from the meta-model to the model of a target task.

  Args:
    loss: L_i, `(params, batch, key) -> scalar`, on parameters with the parts "backbone" and "gate"; the key is None here.
    gate_lr, lr: η_φ and η_θ.
    steps: of each stage.
    gate_steps: of stage I, where they are other than those of stage II.
    target_sparsity: mean sparsity that adapted tasks shall have. None is the paper's way: the meta-gate, sparse by its penalty, and the gradient
      step alone decide.
    sparsity_by: how it is reached, between the stages.
      "log_odds": m = 1[ℓ > δ], where a task's δ is the quantile of the log-odds of all gated channels on its train data. Gates stay as conditional
      as they are, and nothing is calibrated on other tasks. δ is found again after stage II, which moves what the gates look at.
      "group_norm": a proximal step with κ switches off the channels whose group has a norm of at most κ, for all inputs of a task. `calibrate`
      finds κ.
      "budget": every task keeps the same number of channels of each layer, those of the highest mean log-odds on its data, always on. A device
      that has room for so many needs no calibration.
    keep: how many channels a task keeps, always on, by gated layer, in the place of `target_sparsity`: a budget for each layer.
    frozen: what stage I leads to is fixed for the task: a channel is always on if it is on for at least half of the train data, or else always off.
    network: whose gates these are; needed for `target_sparsity`, `keep` and `frozen`.
    gate_loss: L_i in stage I; None: `loss`. The same loss of a network with another gradient through the threshold, say: with `temperature=None`,
      plain straight-through, a step also moves channels that the meta-gate is sure of, for which the soft gate's gradient vanishes. Where the
      meta-gate has learned much that is more harm than help.
    chunk: samples at a time.
    task_axis: see `core.map_tasks`, for the calibration.

  Returns:
    The personalizer.

  Raises:
    ValueError: a rate or number of steps that is not positive, an unknown `sparsity_by`, or a target sparsity outside [0, 1) or without a network;
      from `adapt` and `calibrate`, a model without gates.
  """
  check_positive(gate_lr=gate_lr, lr=lr)
  gate_steps = steps if gate_steps is None else gate_steps
  check_counts(steps=steps, gate_steps=gate_steps, chunk=chunk)
  if keep is not None and (target_sparsity is not None or network is None or set(keep) != set(network.gated_layers)):
    raise ValueError(
      "two_stage: keep says how many channels each gated layer has, in the place of target_sparsity, and needs the network; got "
      f"keep={dict(keep)}, target_sparsity={target_sparsity}, gated layers {None if network is None else network.gated_layers}."
    )
  check_one_of("sparsity_by", sparsity_by, SPARSITY_BY)
  if target_sparsity is not None and (network is None or not (isinstance(target_sparsity, jax.core.Tracer) or 0 <= target_sparsity < 1)):
    raise ValueError(
      f"two_stage: target_sparsity must lie in [0, 1) and needs the network, got target_sparsity={target_sparsity}, network={network}."
    )
  if frozen and network is None:
    raise ValueError("two_stage: frozen gates need the network.")
  calibrated = target_sparsity is not None and sparsity_by == "group_norm"
  gate_loss = loss if gate_loss is None else gate_loss

  def calibrate(model, population, tasks, share=None, axis_name=None):
    _check_gates(model.params)
    if not calibrated:
      return None
    own = masked_loss(gate_loss, model.mask)
    stage_one = lambda params, data: adapt_gate(own, params, data, lr=gate_lr, steps=gate_steps, chunk=chunk)
    return calibrate_threshold(
      network, model.params, stage_one, population.train, tasks, target_sparsity, samples=chunk, task_axis=task_axis, share=share, axis_name=axis_name
    )

  def adapt(model, data, calibration=None):
    _check_gates(model.params)
    own = masked_loss(loss, model.mask)
    params = adapt_gate(
      masked_loss(gate_loss, model.mask),
      model.params,
      data,
      lr=gate_lr,
      steps=gate_steps,
      threshold=0.0 if calibration is None or not calibrated else calibration,
      chunk=chunk,
    )
    by, free = "budget" if keep is not None else None if target_sparsity is None else sparsity_by, params["gate"]

    def at_the_quantile(params):
      shift = log_odds_quantile(network, {**params, "gate": free}, data, target_sparsity, frozen=frozen)
      return {**params, "gate": shift_gate(free, shift)}

    if by == "budget":
      params = {**params, "gate": keep_channels(network, params, data, target_sparsity if keep is None else keep, chunk=chunk)}
    elif by == "log_odds":
      params = at_the_quantile(params)
    if frozen and by != "budget":
      params = {**params, "gate": freeze_gate(network, params, data, chunk=chunk)}
    params = adapt_backbone(own, params, data, lr=lr, steps=steps, chunk=chunk)
    if by == "log_odds" and not frozen:  # stage II moves what the gates look at
      params = at_the_quantile(params)
    return model._replace(params=params)

  return Personalizer(calibrate, adapt)


def adapt_gate(
  loss: Loss, params: Params, data: TaskData | Batch, *, lr: float, steps: int = 1, threshold: float | jax.Array = 0.0, chunk: int = 64
) -> Params:
  """Stage I: φ_i = prox_{κR}(φ − η_φ ∇_φ L_i(θ, φ)), with the backbone θ as it is and no gate noise.

  At w = the meta-model the pull λ of Eq. (3) has zero gradient, so it does not show in one step. The gradient needs no
  backward pass below the lowest gate. R is the Group Lasso: the proximal step switches off every channel whose group has a
  norm of at most κ, for every input, so that it can be cut out of this task's network; the other groups shrink, which
  changes no mask. κ is what sets the sparsity (`calibrate_threshold` finds it): neither the weight of the penalty in
  meta-training nor η_φ does, since a mask is a threshold at zero, which no scale of the log-odds moves.

  Args:
    loss: L_i.
    params: the meta-model.
    data: the target task's train data, all of which each step uses.
    lr: η_φ.
    steps: gradient steps; one proximal step follows the last.
    threshold: κ ≥ 0.
    chunk: see `full_batch_gradient`.

  Returns:
    Parameters with the adapted gate.
  """

  def gate_loss(gate, batch, key):
    return loss({"backbone": params["backbone"], "gate": gate}, batch, key)

  gate = gradient_steps(gate_loss, params["gate"], data, lr=lr, steps=steps, chunk=chunk)
  return {**params, "gate": _group_lasso.prox(gate, threshold)}


def adapt_backbone(loss: Loss, params: Params, data: TaskData | Batch, *, lr: float, steps: int = 1, chunk: int = 64) -> Params:
  """Stage II: θ_i = θ − η_θ ∇_θ L_i(θ, φ_i), with the gate as it is.

  Only filters that the gate switches on get a gradient: a channel that is off for all of the task's samples keeps its
  weights to the bit. Arguments as in `adapt_gate`.

  Args:
    loss, params, data, lr, steps, chunk: as in `adapt_gate`.

  Returns:
    Parameters with the adapted backbone.
  """

  def backbone_loss(backbone, batch, key):
    return loss({"backbone": backbone, "gate": params["gate"]}, batch, key)

  return {**params, "backbone": gradient_steps(backbone_loss, params["backbone"], data, lr=lr, steps=steps, chunk=chunk)}


def calibrate_threshold(
  network: GatedNetwork,
  params: Params,
  stage_one: Callable[[Params, TaskData], Params],
  train_data: Callable[[jax.Array], TaskData],
  tasks: jax.Array,
  sparsity: float,
  *,
  samples: int = 64,
  task_axis: str | int = "auto",
  share: jax.Array | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The κ ≥ 0 of stage I at which tasks have a given sparsity on average.

  Each task runs stage I with κ = 0 once; then the server proposes κ, each task answers with its sparsity under it, and
  bisection over the norms of the tasks' groups finds the smallest κ that reaches the wanted mean. No data leaves a task.
  Use training tasks, never targets: a single number goes to the targets with the meta-model, and each target has the
  sparsity that its own stage I leads to.

  Args:
    network: whose gates these are.
    params: the meta-model.
    stage_one: `(params, task data) -> params` with κ = 0.
    train_data: number of a task to its train data (`population.train`).
    tasks: (tasks,) numbers of the tasks that answer.
    sparsity: wanted mean fraction of gated channels that are off, in [0, 1). Where more are off at κ = 0, κ is 0.
    samples: at most so many of a task's train samples are looked at for an answer.
    task_axis: see `map_tasks`.
    share: (tasks,) their parts in the mean, 0 for tasks that are padding; None: all the same.
    axis_name: mesh axis over which the tasks are spread, inside `shard_map`; None: they are all here.

  Returns:
    κ, a scalar.
  """
  share = jnp.ones(tasks.shape) if share is None else share
  everywhere = (lambda x: x) if axis_name is None else lambda x: jax.lax.psum(x, axis_name)
  gates = map_tasks(lambda task: stage_one(params, train_data(task))["gate"], tasks, task_axis)
  norms = jnp.concatenate([n.ravel() for n in jax.vmap(lambda gate: group_norms(gate_groups, gate))(gates).values()])
  if axis_name is not None:
    norms = jax.lax.all_gather(norms, axis_name, tiled=True)
  kappas = jnp.concatenate([jnp.zeros(1), jnp.sort(norms)])

  def mean_sparsity(kappa):
    def answer(task_and_gate):
      task, gate = task_and_gate
      data = train_data(task)
      data = data._replace(index=data.index[:samples], count=jnp.minimum(data.count, samples))
      adapted = {**params, "gate": _group_lasso.prox(gate, kappa)}
      return mean_over_task(lambda batch: sparsity_of(network.apply(adapted, batch.images)[1]), data, samples)

    return everywhere(jnp.dot(share, map_tasks(answer, (tasks, gates), task_axis))) / everywhere(share.sum())

  def halve(_, bounds):
    low, high = bounds  # kappas[high] reaches the wanted sparsity, nothing below `low` does
    middle = (low + high) // 2
    enough = mean_sparsity(kappas[middle]) >= sparsity
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  last = kappas.shape[0] - 1
  _, rank = jax.lax.fori_loop(0, last.bit_length() + 1, halve, (jnp.array(0), jnp.array(last)))
  return kappas[rank]


def shift_gate(gate: Params, shift: float | jax.Array) -> Params:
  """ℓ − δ in the place of ℓ for every channel, by its b₂. A channel whose group is zero stays structurally off.

  Args:
    gate: parameters of the gates, by layer.
    shift: δ.

  Returns:
    A pytree like `gate`.
  """

  def one(own):
    return {**own, "b2": jnp.where(_alive(own), own["b2"] - shift, own["b2"]).astype(own["b2"].dtype)}

  return {layer: one(own) for layer, own in gate.items()}


def constant_gate(gate: Params, masks: Mapping[str, jax.Array]) -> Params:
  """Gates that give one mask whatever the input: W₂ = 0, b₂ = ±1.

  Args:
    gate: parameters of the gates, by layer.
    masks: (channels,) by layer: more than 0.5 is on.

  Returns:
    A pytree like `gate`.
  """
  return {
    layer: {**own, "W2": jnp.zeros_like(own["W2"]), "b2": jnp.where(masks[layer] > 0.5, 1, -1).astype(own["b2"].dtype)} for layer, own in gate.items()
  }


def freeze_gate(network: GatedNetwork, params: Params, data: TaskData | Batch, *, chunk: int = 64) -> Params:
  """Gates that keep, for every input, the channels that are on for at least half of a task's data: what could be cut out of the network.

  Args:
    network: whose gates these are.
    params: with the task's own gate.
    data: the task's train data.
    chunk: samples at a time.

  Returns:
    The gate, a pytree like `params["gate"]`.
  """
  on_rate = mean_over_task(lambda batch: network.apply(params, batch.images)[1], data, chunk)
  return constant_gate(params["gate"], {layer: rate >= 0.5 for layer, rate in on_rate.items()})


def keep_channels(
  network: GatedNetwork, params: Params, data: TaskData | Batch, sparsity: float | jax.Array | Mapping[str, int], *, chunk: int = 64
) -> Params:
  """Gates that keep, for every input, a fixed number of channels of each layer: those of the highest mean log-odds on a task's data.

  Args:
    network: whose gates these are.
    params: with the task's own gate.
    data: the task's train data.
    sparsity: fraction of each layer's channels that are off, at least one is kept; or how many are kept, by layer.
    chunk: samples at a time.

  Returns:
    The gate, a pytree like `params["gate"]`.
  """
  log_odds = mean_over_task(lambda batch: network.outputs(params, batch.images).log_odds, data, chunk)

  def highest(layer, values):
    kept = sparsity[layer] if isinstance(sparsity, Mapping) else jnp.maximum(jnp.round((1 - sparsity) * values.shape[0]), 1)
    return highest_first(values) < kept

  return constant_gate(params["gate"], {layer: highest(layer, values) for layer, values in log_odds.items()})


def log_odds_quantile(
  network: GatedNetwork, params: Params, data: TaskData | Batch, sparsity: float | jax.Array, *, frozen: bool = False, samples: int = 256
) -> jax.Array:
  """The δ at which m = 1[ℓ > δ] has a given sparsity on a task's data: the smallest at which as large a part of the log-odds is not above it.

  With several gated layers δ changes the masks of one, and with them the log-odds of the next: it is then found again a few times. Channels whose
  group is zero are off at any δ.

  Args:
    network: whose gates these are.
    params: with the task's own gate.
    data: the task's train data.
    sparsity: wanted fraction of gated channels that are off, mean over the data.
    frozen: whether gates will be frozen afterwards (`freeze_gate`): a channel then counts as off where it is off for more than half of the data.
    samples: at most so many of the data are looked at.

  Returns:
    δ, a scalar.
  """
  batch = data if isinstance(data, Batch) else data.rows(jnp.arange(min(samples, data.index.shape[0]), dtype=jnp.int32))
  alive = {layer: _alive(own) for layer, own in params["gate"].items()}

  def quantile(shift):
    """Of the log-odds as they are when `shift` is taken from them."""
    found = network.outputs({**params, "gate": shift_gate(params["gate"], shift)}, batch.images).log_odds
    values = jnp.concatenate([jnp.where(alive[layer], found[layer] + shift, -jnp.inf) for layer in found], axis=-1)
    weight = batch.weight
    if frozen:  # on for at least half of the data: where the ⌈n/2⌉-th highest is above δ
      highest = -jnp.sort(jnp.where(weight[:, None] > 0, -values, jnp.inf), axis=0)
      values, weight = highest[(weight.sum().astype(jnp.int32) + 1) // 2 - 1][None], jnp.ones(1)
    order = jnp.argsort(values.ravel())
    below = jnp.cumsum(jnp.broadcast_to(weight[:, None], values.shape).ravel()[order])
    rank = jnp.searchsorted(below, sparsity * below[-1] * (1 - 1e-6))  # the first δ that reaches it
    found = values.ravel()[order][jnp.clip(rank, 0, below.shape[0] - 1)]
    lowest = jnp.where(jnp.isfinite(values), values, jnp.inf).min()
    none_off = jnp.where(jnp.isfinite(lowest), lowest - 1, 0)
    return jnp.where((sparsity > 0) & jnp.isfinite(found), found, none_off)

  passes = 1 if len(network.gated_layers) == 1 else 4
  return jax.lax.fori_loop(0, passes, lambda _, shift: quantile(shift), jnp.zeros(()))


def _alive(gate):
  """(channels,) whether a channel's group is not zero."""
  return (gate["b2"] != 0) | (gate["W2"] != 0).any(0)


def _check_gates(params):
  if not (isinstance(params, dict) and params.get("gate")):
    raise ValueError("two_stage adapts gates, but this model has none; use fine_tune or metasnip, or a GatedNetwork with gated_layers.")

"""Meta-training on few-shot episodes, pruned while it trains or not, and accuracy on episodes of classes that it never saw."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

import metagater_jax as mg
from experiments.config import ConfigError, registry
from experiments.config.fewshot import INNER_LOOP, check_config, make_learner, make_network
from experiments.runs import placement, records
from experiments.runs.live import Progress, Writers, check_log
from experiments.runs.measures import interval, what_is_left
from experiments.runs.programs import Clock, Compiled, compiler_options, dispatches
from experiments.runs.records import DivergedError, check_workdir
from metagater_jax.core.trees import named_leaves

__all__ = ["SETTINGS", "FewShot", "load_splits", "run"]

# Fields on which the numbers of a run depend; they are in its result, and tell runs apart where several are recorded.
SETTINGS = (
  "name",
  "dataset",
  "alphabets",
  "learner",
  "derivative",
  "model",
  "widths",
  "ways",
  "shots",
  "queries",
  "train_queries",
  "augment",
  "inner_lr",
  "inner_steps",
  "learn_rates",
  "test_inner_steps",
  "outer_lr",
  "episodes",
  "steps",
  "seed",
  "prune",
  "personalizer",
  "gated_layers",
  "gate_hidden",
  "gate_temperature",
  "gate_initial_log_odds",
  "gate_logit_scale",
  "gate_noise",
  "gate_normalize",
  "compute_dtype",
  "adapt_lr",
  "adapt_steps",
  "gate_adapt_lr",
  "gate_adapt_temperature",
  "target_sparsity",
  "sparsity_by",
  "gate_frozen",
)

Splits = dict[str, mg.fewshot.ClassPool]


def run(config: ConfigDict, workdir: str | Path, splits: Splits | None = None, quiet: bool = False) -> dict[str, Any]:
  """Meta-trains on episodes of the train classes and evaluates on those of the test classes; writes everything into `workdir`.

  Args:
    config: as the few-shot files in configs/ make it; its fields are in `experiments.config.fewshot`.
    workdir: a folder that holds no other run; it is made if it is missing.
    splits: pools "train", "validation" and "test" of your own instead of those that `config.dataset` names.
    quiet: no progress line.

  Returns:
    What `result.json` holds.

  Raises:
    ConfigError: before any long work.
    DivergedError: the loss is no longer finite; metrics until then are kept.
  """
  start, workdir = time.perf_counter(), Path(workdir)
  config = check_config(config)
  check_log(config.log)
  check_workdir(workdir, config)
  with records.claim(workdir):
    return _run(config, workdir, splits, quiet, start)


def _run(config, workdir, splits, quiet, start):
  experiment = FewShot(config, splits)
  records.write_json(workdir / "config.json", config.to_dict())
  writer = Writers(workdir, config)
  progress = Progress(config.steps, quiet, "step", experiment.clock, f"{config.name}: {config.learner}, seed {config.seed}")

  def evaluated(state, loss):
    before, after = experiment.evaluate(state, "validation", config.validation_episodes)
    row = {
      "step": int(state.step),
      "train_loss": loss,
      "accuracy_before": float(before.mean()),
      "accuracy": float(after.mean()),
      "sparsity": experiment.sparsity(state),
    }
    writer.write(row)
    progress.show(
      loss=loss, accuracy_before=row["accuracy_before"], accuracy=row["accuracy"], sparsity=row["sparsity"] if config.prune.sparsity else None
    )

  try:
    state = experiment.train(experiment.init(), config.steps, evaluated, progress.advance)
  except DivergedError as error:
    raise DivergedError(f"{error} What was computed until then is in {workdir}.") from None
  finally:
    progress.close()
    writer.close()
  before, after = experiment.evaluate(state, "test", config.test_episodes)
  seconds = experiment.clock.seconds | {"total": time.perf_counter() - start}
  settings = config.to_dict() | {
    "widths": list(experiment.network.backbone.widths),
    "alphabets": list(config.alphabets),
    "gated_layers": list(config.gated_layers),
  }
  result = {name: settings[name] for name in SETTINGS}
  result |= {
    "accuracy": interval(after),
    "accuracy_before_adaptation": interval(before),
    "sparsity": experiment.sparsity(state),
    "sparsity_by_layer": experiment.sparsity_by_layer(state),
    **experiment.cost(state),
    "episodes_per_second": experiment.episodes_per_second(),
    "compile_seconds": seconds["compile"],
    "seconds": seconds,
    "versions": records.versions(),
    "devices": [device.device_kind for device in jax.devices()],
  }
  pruning = mg.pruning.find_pruning(state.optimizer)
  records.save_run(
    workdir, mg.Model(state.params, None if pruning is None else pruning.mask), result, episodes={"accuracy_before": before, "accuracy": after}
  )  # of the same episodes in each run: what another run is paired with
  return result


class FewShot:
  """The data and compiled functions of a checked config; training may be taken up from any state."""

  def __init__(self, config: ConfigDict, splits: Splits | None = None):
    self.config = config
    self.clock = Clock("load", "compile", "train", "evaluate")
    with self.clock("load"):
      self.splits = load_splits(config) if splits is None else splits
    for pool in self.splits.values():
      try:
        mg.fewshot.check_episodes(pool, ways=config.ways, shots=config.shots, queries=max(config.queries, config.train_queries))
      except ValueError as error:
        raise ConfigError(
          f"ways={config.ways}, shots={config.shots}, queries={config.queries}, train_queries={config.train_queries}: {error}"
        ) from error
    self.mesh = placement.make_mesh(config)
    self.network = make_network(config)
    self.image_shape = self.splits["train"].images.shape[1:]
    loss = mg.classification_loss(self.network)
    self.learner = make_learner(config, loss, self.network)
    self.score = self.make_score(config.prune) if config.prune.score != "none" else None
    self.prunable = registry.prunable_of(config.prune, self.network)
    numbers = {"ways": config.ways, "shots": config.shots}
    self.sample = partial(_sample, augmented=config.augment, queries=config.train_queries, **numbers)
    tested = partial(_sample, augmented=False, queries=config.queries, **numbers)
    own = config.personalizer == INNER_LOOP
    personalizer = (
      make_learner(config, loss, self.network, config.test_inner_steps).personalizer if own else registry.make_personalizer(config, self.network)
    )
    self._options = {"compiler_options": compiler_options(self.network.small)}
    logits = lambda params, images: self.network.apply(params, images)[0]

    def evaluate(meta_params, key, pool, mask, episodes):
      model, rates = self.learner.deploy(meta_params, mask)
      return mg.fewshot.evaluate_episodes(
        personalizer,
        logits,
        tested,
        model,
        key,
        pool,
        episodes=episodes,
        calibration=rates if own else personalizer.calibrate(model, None, None),
        task_axis=config.task_axis,
        mesh=self.mesh,
      )

    self._evaluate = Compiled(self.clock, "evaluate", evaluate, **self._options)
    self._trained = 0

  def optimizer(self, steps: int, schedule: mg.pruning.PruningSchedule | None = None) -> optax.GradientTransformation:
    """Adam along a cosine of so many steps, with the pruning of the config or another schedule (None, and no pruning: none)."""
    config, prune = self.config, self.config.prune
    optimizer = optax.adam(optax.cosine_decay_schedule(config.outer_lr, steps))
    if schedule is None and prune.sparsity:
      schedule = registry.pruning_schedule(prune, steps)
    if schedule is None:
      return optimizer
    return mg.gradual_pruning(optimizer, schedule, **registry.pruning_options(prune, self.network, self.image_shape))

  def init(self, optimizer: optax.GradientTransformation | None = None) -> mg.fewshot.MetaState:
    """The state before training."""
    init_key, run_key = jax.random.split(jax.random.key(self.config.seed))
    return mg.fewshot.meta_init(self.learner, optimizer or self.optimizer(self.config.steps), self.network.init(init_key, self.image_shape), run_key)

  def train(
    self,
    state: mg.fewshot.MetaState,
    steps: int,
    evaluated: Callable[[mg.fewshot.MetaState, float], None] = lambda *_: None,
    advanced: Callable[[int, bool], None] = lambda *_: None,
    optimizer: optax.GradientTransformation | None = None,
  ) -> mg.fewshot.MetaState:
    """So many more steps; `evaluated(state, loss)` every `eval_every` and at the end, `advanced(steps, evaluated)` after each
    dispatch.

    Raises:
      DivergedError: the loss is no longer finite.
    """
    config = self.config
    scored = mg.pruning.find_pruning(state.optimizer) is not None and self.score is not None
    step = Compiled(
      self.clock,
      "train",
      partial(
        mg.fewshot.run_meta_steps,
        self.learner,
        optimizer or self.optimizer(config.steps),
        self.sample,
        episodes=self.episodes(config.episodes),
        score=self.score if scored else None,
        score_episodes=self.episodes(config.prune.episodes) if scored else 0,
        task_axis=config.task_axis,
        mesh=self.mesh,
      ),
      donate_argnums=0,
      **self._options,
    )
    if self.mesh is not None:
      state = jax.device_put(state, jax.NamedSharding(self.mesh, jax.P()))
    done, losses = 0, []
    for count in dispatches(steps, config.eval_every, config.steps_per_dispatch):
      state, metrics = step(state, self.splits["train"], steps=count)
      done += count
      self._trained += count
      losses += np.asarray(metrics["loss"]).tolist()
      if not np.isfinite(losses[-count:]).all():
        raise DivergedError(
          f"the loss is {losses[-1]} after step {done}: meta-training diverged. Lower outer_lr (now "
          f"{config.outer_lr:g}) or inner_lr (now {config.inner_lr:g})."
        )
      now = done % config.eval_every == 0 or done == steps
      if now:
        evaluated(state, float(np.mean(losses)))
        losses = []
      advanced(count, now)
    return state

  def evaluate(self, state: mg.fewshot.MetaState, split: str, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy before and after adaptation on episodes of a split: the same episodes for every state and every config of
    the same ways, shots and queries."""
    pruning = mg.pruning.find_pruning(state.optimizer)
    key = jax.random.fold_in(jax.random.key(2**20), ("train", "validation", "test").index(split))
    mask = None if pruning is None else pruning.mask
    before, after = self._evaluate(state.params, key, self.splits[split], mask, episodes=self.episodes(episodes))
    return np.asarray(before)[:episodes], np.asarray(after)[:episodes]

  def episodes(self, count: int) -> int:
    """So many, or the next number that the devices divide."""
    return count + (-count % (1 if self.mesh is None else self.mesh.size))

  def sparsity(self, state: mg.fewshot.MetaState) -> float:
    """The fraction of the weights, or filters, that may be pruned which are."""
    pruning, granularity = mg.pruning.find_pruning(state.optimizer), self.config.prune.granularity
    return 0.0 if pruning is None else float(mg.pruning.mask_sparsity(pruning.mask, self.prunable, granularity=granularity))

  def sparsity_by_layer(self, state: mg.fewshot.MetaState) -> dict[str, float]:
    """The same for each kernel."""
    pruning = mg.pruning.find_pruning(state.optimizer)
    if pruning is None:
      return {}
    return {name: 1 - float(leaf.mean()) for name, leaf in named_leaves(pruning.mask).items() if mg.pruning.is_kernel(name, leaf)}

  def cost(self, state: mg.fewshot.MetaState) -> dict[str, dict[str, int]]:
    """Parameters: how many there are, are kept, and of these are effective (`metagater_jax.pruning.effective_mask`). Multiply-accumulates
    per image: of the network as it was, and of its effective weights."""
    pruning = mg.pruning.find_pruning(state.optimizer)
    model, _ = self.learner.deploy(state.params, None if pruning is None else pruning.mask)
    count, macs = sum(leaf.size for leaf in jax.tree.leaves(model.params)), mg.nn.dense_cost(self.network.layers(self.image_shape))[0]
    left = {"kept": count, "effective": count, "macs": macs} if model.mask is None else what_is_left(self.network, model.mask, self.image_shape)
    return {"parameters": {"all": count, "kept": left["kept"], "effective": left["effective"]}, "macs": {"dense": macs, "effective": left["macs"]}}

  def episodes_per_second(self) -> float:
    """Of meta-training, without compilation."""
    return self._trained * self.episodes(self.config.episodes) / max(self.clock.seconds["train"], 1e-9)

  def make_score(self, prune: ConfigDict) -> mg.pruning.Score:
    """The score that a part `prune` of a config names, of meta-parameters on episodes."""
    plain = mg.classification_loss(self.network)
    loss = lambda meta_params, batch, key: plain(self.learner.deploy(meta_params)[0].params, batch, key)
    return registry.make_score(prune, self.network, self.image_shape, loss, self.learner.meta_loss)


def _sample(key, pool, augmented, **numbers):
  if not augmented:
    return mg.fewshot.sample_episode(key, pool, **numbers)
  episode_key, *keys = jax.random.split(key, 3)
  episode = mg.fewshot.sample_episode(episode_key, pool, **numbers)
  return mg.data.Episode(*(part._replace(images=mg.fewshot.augment_images(k, part.images)) for k, part in zip(keys, episode)))


def load_splits(config: ConfigDict) -> Splits:
  """Pools of the train, validation and test classes of a config; no class is in two of them.

  Raises:
    ConfigError: data that is not there, or names that it does not have.
  """
  try:
    return registry.DATASETS[config.dataset].splits(config)
  except ValueError as error:  # of the data set, whose messages say what to do
    raise ConfigError(str(error)) from error

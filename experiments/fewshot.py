"""`python -m experiments.fewshot --config=configs/cifarfs_maml.py`: meta-training on few-shot episodes, pruned while it trains or
not, and accuracy on episodes of classes that it never saw.

Fields are overridden with --config.field=value, as --config.prune.score=anp --config.prune.sparsity=0.85.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import metagater_jax as mg
from experiments import placement, registry, reporting
from experiments.command import launch
from experiments.config import ConfigError
from experiments.fewshot_config import base_config, check_config, make_learner, make_network
from experiments.programs import Clock, Compiled, compiler_options, dispatches
from experiments.reporting import DivergedError
from experiments.training import check_workdir, save_parameters, what_is_left
from metagater_jax.data.datasets import DatasetError, load_dataset, load_omniglot
from metagater_jax.data.fewshot import cifar_fs_classes, split_classes

__all__ = ["SETTINGS", "FewShot", "load_splits", "main", "make_score", "run"]

# Fields on which the numbers of a run depend; they are in its result, and tell runs apart where several are recorded.
SETTINGS = ("name", "dataset", "alphabets", "learner", "derivative", "model", "widths", "ways", "shots", "queries", "train_queries",
            "augment", "inner_lr", "inner_steps", "learn_rates", "test_inner_steps", "outer_lr", "episodes", "steps", "seed", "prune")

Splits = dict[str, mg.ClassPool]


def run(config: ConfigDict, workdir: str | Path, splits: Splits | None = None, quiet: bool = False) -> dict[str, Any]:
  """Meta-trains on episodes of the train classes and evaluates on those of the test classes; writes everything into `workdir`.

  Args:
    config: as the few-shot files in configs/ make it; its fields are in `experiments.fewshot_config`.
    workdir: a folder that holds no other run; it is made if it is missing.
    splits: pools "train", "validation" and "test" of your own instead of those that `config.dataset` names.
    quiet: no progress line and no table.

  Returns:
    What `result.json` holds.

  Raises:
    ConfigError: before any long work.
    DivergedError: the loss is no longer finite; metrics until then are kept.
  """
  start, workdir = time.perf_counter(), Path(workdir)
  config = check_config(config)
  check_workdir(workdir)
  experiment = FewShot(config, splits)
  workdir.mkdir(parents=True, exist_ok=True)
  reporting.write_json(workdir / "config.json", config.to_dict())
  writer, rows = reporting.MetricsWriter(workdir), []
  progress = reporting.Progress(config.steps, quiet, "step", experiment.clock)

  def evaluated(state, loss):
    before, after = experiment.evaluate(state, "validation", config.validation_episodes)
    rows.append({"step": int(state.step), "train_loss": loss, "accuracy_before": float(before.mean()),
                 "accuracy": float(after.mean()), "sparsity": experiment.sparsity(state)})
    writer.write(rows[-1])
    progress.show(loss=loss, accuracy=rows[-1]["accuracy"], sparsity=rows[-1]["sparsity"] if config.prune.sparsity else None)

  try:
    state = experiment.train(experiment.init(), config.steps, evaluated, progress.advance)
  except DivergedError as error:
    raise DivergedError(f"{error} What was computed until then is in {workdir}.") from None
  finally:
    progress.close()
  before, after = experiment.evaluate(state, "test", config.test_episodes)
  np.savetxt(workdir / "test_episodes.csv", np.stack([before, after], 1), "%.6f", delimiter=",", comments="",
             header="accuracy_before,accuracy")  # of the same episodes in each run: what another run is paired with
  seconds = experiment.clock.seconds | {"total": time.perf_counter() - start}
  settings = config.to_dict() | {"widths": list(experiment.network.backbone.widths), "alphabets": list(config.alphabets)}
  result = {name: settings[name] for name in SETTINGS}
  result |= {"accuracy": interval(after), "accuracy_before_adaptation": interval(before),
             "sparsity": experiment.sparsity(state), "sparsity_by_layer": experiment.sparsity_by_layer(state),
             **experiment.cost(state), "episodes_per_second": experiment.episodes_per_second(),
             "compile_seconds": seconds["compile"], "seconds": seconds, "versions": {"jax": jax.__version__},
             "devices": [device.device_kind for device in jax.devices()]}
  save_parameters(workdir / "meta_model.npz", state.params)
  if config.prune.sparsity:
    save_parameters(workdir / "mask.npz", mg.pruning_mask(state.optimizer))
  reporting.plot_fewshot(workdir / "accuracy.png", rows, f"{config.name}: {config.ways}-way {config.shots}-shot, {config.learner}")
  reporting.write_json(workdir / "result.json", result)  # last: a folder that has it is a finished run
  if not quiet:
    print(reporting.fewshot_table(result))
    print(f"figure: {workdir / 'accuracy.png'}; everything else is in {workdir}")
  return result


def interval(accuracy: np.ndarray) -> dict[str, float]:
  """Mean over episodes, the half width of its 95 % confidence interval, and the number of episodes."""
  return {"mean": float(accuracy.mean()), "ci95": float(1.96 * accuracy.std(ddof=1) / np.sqrt(len(accuracy))),
          "episodes": len(accuracy)}


class FewShot:
  """The data and compiled functions of a checked config; training may be taken up from any state."""

  def __init__(self, config: ConfigDict, splits: Splits | None = None):
    self.config = config
    self.clock = Clock("load", "compile", "train", "evaluate")
    with self.clock("load"):
      self.splits = load_splits(config) if splits is None else splits
    for pool in self.splits.values():
      try:
        mg.check_episodes(pool, ways=config.ways, shots=config.shots, queries=max(config.queries, config.train_queries))
      except ValueError as error:
        raise ConfigError(f"ways={config.ways}, shots={config.shots}, queries={config.queries}, train_queries={config.train_queries}: "
                          f"{error}") from error
    self.mesh = placement.make_mesh(config)
    self.network = make_network(config)
    self.image_shape = self.splits["train"].images.shape[1:]
    loss = mg.classification_loss(self.network)
    self.learner = make_learner(config, loss)
    self.score = make_score(config, self.learner, loss)
    self.prunable = partial(registry.is_pruned, config.prune)
    numbers = {"ways": config.ways, "shots": config.shots}
    self.sample = partial(_sample, augmented=config.augment, queries=config.train_queries, **numbers)
    tested = partial(_sample, augmented=False, queries=config.queries, **numbers)
    self._tester = make_learner(config, loss, config.test_inner_steps)
    self._options = {"compiler_options": compiler_options(convolutions=True)}
    logits = lambda params, images: self.network.apply(params, images)[0]

    def evaluate(params, key, pool, mask, episodes):
      return mg.evaluate_episodes(self._tester, logits, tested, params, key, pool, episodes=episodes, mask=mask,
                                  task_axis=config.task_axis, mesh=self.mesh)
    self._evaluate = Compiled(self.clock, "evaluate", evaluate, **self._options)
    self._trained = 0

  def optimizer(self, steps: int, schedule: mg.PruningSchedule | None = None) -> optax.GradientTransformation:
    """Adam along a cosine of so many steps, with the pruning of the config or another schedule (None, and no pruning: none)."""
    config, prune = self.config, self.config.prune
    optimizer = optax.adam(optax.cosine_decay_schedule(config.outer_lr, steps))
    if schedule is None and prune.sparsity:
      schedule = registry.pruning_schedule(prune, steps)
    if schedule is None:
      return optimizer
    return mg.gradual_pruning(optimizer, schedule, scope=prune.scope, granularity=prune.granularity,
                              prunable=self.prunable)

  def init(self, optimizer: optax.GradientTransformation | None = None) -> mg.MetaState:
    """The state before training."""
    init_key, run_key = jax.random.split(jax.random.key(self.config.seed))
    return mg.meta_init(self.learner, optimizer or self.optimizer(self.config.steps),
                        self.network.init(init_key, self.image_shape), run_key)

  def train(self, state: mg.MetaState, steps: int, evaluated: Callable[[mg.MetaState, float], None] = lambda *_: None,
            advanced: Callable[[int, bool], None] = lambda *_: None, optimizer: optax.GradientTransformation | None = None
            ) -> mg.MetaState:
    """So many more steps; `evaluated(state, loss)` every `eval_every` and at the end, `advanced(steps, evaluated)` after each
    dispatch.

    Raises:
      DivergedError: the loss is no longer finite.
    """
    config = self.config
    pruned = mg.find_pruning(state.optimizer) is not None
    scored = pruned and self.score is not None
    step = Compiled(self.clock, "train", partial(
        mg.run_meta_steps, self.learner, optimizer or self.optimizer(config.steps), self.sample, episodes=self.episodes(config.episodes),
        score=self.score if scored else None, score_episodes=self.episodes(config.prune.episodes) if scored else 0,
        task_axis=config.task_axis, mesh=self.mesh), donate_argnums=0, **self._options)
    if self.mesh is not None:
      state = jax.device_put(state, jax.NamedSharding(self.mesh, jax.P()))
    done, losses = 0, []
    for count in dispatches(steps, config.eval_every, config.steps_per_dispatch):
      state, metrics = step(state, self.splits["train"], steps=count)
      done += count
      self._trained += count
      losses += np.asarray(metrics["loss"]).tolist()
      if not np.isfinite(losses[-count:]).all():
        raise DivergedError(f"the loss is {losses[-1]} after step {done}: meta-training diverged. Lower outer_lr (now "
                            f"{config.outer_lr:g}) or inner_lr (now {config.inner_lr:g}).")
      now = done % config.eval_every == 0 or done == steps
      if now:
        evaluated(state, float(np.mean(losses)))
        losses = []
      advanced(count, now)
    return state

  def evaluate(self, state: mg.MetaState, split: str, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy before and after adaptation on episodes of a split: the same episodes for every state and every config of
    the same ways, shots and queries."""
    pruning = mg.find_pruning(state.optimizer)
    key = jax.random.fold_in(jax.random.key(2**20), ("train", "validation", "test").index(split))
    mask = None if pruning is None else pruning.mask
    before, after = self._evaluate(state.params, key, self.splits[split], mask, episodes=self.episodes(episodes))
    return np.asarray(before)[:episodes], np.asarray(after)[:episodes]

  def episodes(self, count: int) -> int:
    """So many, or the next number that the devices divide."""
    return count + (-count % (1 if self.mesh is None else self.mesh.size))

  def sparsity(self, state: mg.MetaState) -> float:
    """The fraction of the weights, or filters, that may be pruned which are."""
    pruning, granularity = mg.find_pruning(state.optimizer), self.config.prune.granularity
    return 0.0 if pruning is None else float(mg.mask_sparsity(pruning.mask, self.prunable, granularity=granularity))

  def sparsity_by_layer(self, state: mg.MetaState) -> dict[str, float]:
    """The same for each kernel."""
    pruning = mg.find_pruning(state.optimizer)
    if pruning is None:
      return {}
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
             for path, leaf in jax.tree_util.tree_leaves_with_path(pruning.mask)}
    return {name: 1 - float(leaf.mean()) for name, leaf in named.items() if mg.is_kernel(name, leaf)}

  def cost(self, state: mg.MetaState) -> dict[str, dict[str, int]]:
    """Parameters: how many there are, are kept, and of these are effective (`metagater_jax.effective_mask`). Multiply-accumulates
    per image: of the network as it was, and of its effective weights."""
    params, pruning = self.learner.params(state.params), mg.find_pruning(state.optimizer)
    count, macs = sum(leaf.size for leaf in jax.tree.leaves(params)), mg.dense_cost(self.network.layers(self.image_shape))[0]
    left = {"kept": count, "effective": count, "macs": macs} if pruning is None else what_is_left(
        self.network, self.learner.params(pruning.mask), self.image_shape)
    return {"parameters": {"all": count, "kept": left["kept"], "effective": left["effective"]},
            "macs": {"dense": macs, "effective": left["macs"]}}

  def episodes_per_second(self) -> float:
    """Of meta-training, without compilation."""
    return self._trained * self.episodes(self.config.episodes) / max(self.clock.seconds["train"], 1e-9)


def _sample(key, pool, augmented, **numbers):
  if not augmented:
    return mg.sample_episode(key, pool, **numbers)
  episode_key, *keys = jax.random.split(key, 3)
  episode = mg.sample_episode(episode_key, pool, **numbers)
  return mg.Episode(*(part._replace(images=mg.augment_images(k, part.images)) for k, part in zip(keys, episode)))


def make_score(config: ConfigDict, learner: mg.MetaLearner, loss: mg.Loss):
  """`(meta-parameters, episodes, key, mask, axis_name) -> score` of a config; None where it needs no episodes and no key."""
  prune = config.prune
  options = {"average": prune.average, "task_axis": config.task_axis}
  if prune.score == "anp":
    return lambda params, episodes, key, mask, axis_name: mg.anp_score(
        params, learner.meta_loss, episodes, prune.derivative, mask=mask, axis_name=axis_name, **options)
  if prune.score == "snip":  # of the ordinary loss: the network as it is, without adaptation
    ordinary = lambda params, episode, mask, derivative: loss(learner.params(params), jax.tree.map(
        lambda *parts: jnp.concatenate(parts), *episode), None)
    return lambda params, episodes, key, mask, axis_name: mg.anp_score(
        params, ordinary, episodes, axis_name=axis_name, **options)
  if prune.score == "random":
    return lambda params, episodes, key, mask, axis_name: mg.random_score(params, key=key)
  return None  # magnitude, which is gradual_pruning's own


def load_splits(config: ConfigDict) -> Splits:
  """Pools of the train, validation and test classes of a config; no class is in two of them.

  Raises:
    ConfigError: data that is not there, or names that it does not have.
  """
  try:
    if config.dataset == "cifarfs":
      data = load_dataset("cifar100", config.data_dir)
      return {split: mg.make_class_pool(data.images, data.labels, own) for split, own in cifar_fs_classes().items()}
    if config.dataset == "omniglot":
      images, labels, alphabets, names = load_omniglot(config.data_dir)
      there = sorted({names[i] for i in np.unique(alphabets)})
      if unknown := sorted(set(config.alphabets) - set(there)):
        raise ConfigError(f"alphabets: {', '.join(unknown)} not in this Omniglot, which has {', '.join(there)}.")
      wanted = [names.index(name) for name in config.alphabets or there]
      characters = np.unique(labels[np.isin(alphabets, wanted)])
      return {split: mg.make_class_pool(*mg.with_rotations(*(x[np.isin(labels, own)] for x in (images, labels))))
              for split, own in split_classes(characters, seed=0).items()}
  except DatasetError as error:
    raise ConfigError(str(error)) from error
  raise ConfigError(f"dataset must be 'cifarfs' or 'omniglot', got '{config.dataset}'.")


def main() -> None:
  """The command."""
  def body(config, workdir):
    placement.use_cores(config)
    run(config, workdir)
  launch("experiments.fewshot", "cifarfs_maml", base_config(), body)


if __name__ == "__main__":
  main()

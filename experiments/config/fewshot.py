"""The fields of a few-shot experiment, their defaults, and the checks that run before any long work."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import metagater_jax as mg
from experiments.config import fields, registry
from experiments.config.fields import ConfigError, check_known, gate_fields, pruning_fields

__all__ = ["INNER_LOOP", "base_config", "check_config", "make_learner", "make_network"]

# Name of the adaptation that is the learner's own.
INNER_LOOP = "inner_loop"


def base_config() -> ConfigDict:
  """All fields with their defaults. Files in configs/ set what a benchmark needs; a locked ConfigDict takes no others."""
  config = fields.Config(type_safe=True)
  config.name = "cifarfs_maml"
  # Data
  config.dataset = "cifarfs"  # or "omniglot"
  config.data_dir = placeholder(str)  # None: TFDS's own default
  config.alphabets = ()  # Omniglot: whose characters; empty: all
  config.seed = 0
  # Episodes
  config.ways = 5
  config.shots = 1
  config.queries = 15  # per way
  config.train_queries = placeholder(int)  # per way in meta-training; None: as many
  config.augment = False  # mirror and move the images of training episodes at random
  # Network
  config.model = "fewshot_conv4"  # or "resnet12"
  config.widths = ()  # of the four blocks; empty: the model's own
  config.gated_layers = ()  # with gates on these layers
  gate_fields(config)
  config.compute_dtype = "float32"  # or "bfloat16": of the backbone's forward and backward pass
  # Meta-training
  config.learner = "maml"  # or "anil", "reptile"
  config.derivative = "exact"  # of MAML and ANIL; or "first_order", of MAML "hessian_free"
  config.inner_lr = 0.1
  config.inner_steps = 5
  config.learn_rates = False  # MAML, ANIL: one inner rate per leaf, learned
  config.outer_lr = 3e-3  # of Adam; falls to zero along a cosine
  config.episodes = 4  # per outer step
  config.steps = 10_000
  # Adaptation to the episodes of validation and test
  config.personalizer = "inner_loop"  # the learner's own; or "fine_tune", "two_stage" (gates), "metasnip_weight", "metasnip_channel"
  config.test_inner_steps = 10  # of the learner's own
  config.adapt_lr = 0.1  # of the others, and their steps
  config.adapt_steps = 10
  config.gate_adapt_lr = 10.0  # of two stages
  config.target_sparsity = placeholder(float)  # of MetaSNIP, and of two stages with sparsity_by="budget"
  config.chunk = 64
  # Evaluation
  config.eval_every = 1000
  config.validation_episodes = 200
  config.test_episodes = 1000
  # Pruning while training
  config.prune = pruning_fields()
  # How it is computed
  config.mesh = "auto"  # or "none", or how many devices episodes are spread over
  config.task_axis = "auto"
  config.steps_per_dispatch = 100
  config.log = "none"  # beside metrics.csv and .jsonl: "tensorboard", or a writer of your own (docs/extending.md); several with commas
  return config


def check_config(config: ConfigDict) -> ConfigDict:
  """A copy with every field resolved, or a ConfigError that names the field, what it may be, and what it is."""
  config = config.copy_and_resolve_references()
  fields.check_name(config.name)
  fields.check_seed(config.seed)
  if config.train_queries is None:
    config.train_queries = config.queries
  datasets = [name for name, row in registry.DATASETS.items() if row.splits]
  for field, known in (
    ("model", registry.NETWORKS),
    ("learner", registry.LEARNERS),
    ("derivative", mg.optim.DERIVATIVES),
    ("dataset", datasets),
    ("compute_dtype", ("float32", "bfloat16")),
  ):
    check_known(field, config[field], known)
  fields.check_counts(
    config,
    (
      "ways",
      "shots",
      "queries",
      "train_queries",
      "inner_steps",
      "test_inner_steps",
      "episodes",
      "steps",
      "eval_every",
      "validation_episodes",
      "test_episodes",
      "steps_per_dispatch",
      "adapt_steps",
      "chunk",
      "gate_hidden",
    ),
  )
  fields.check_positive(config, ("inner_lr", "outer_lr", "adapt_lr", "gate_adapt_lr"))
  if config.test_episodes < 2:
    raise ConfigError(f"test_episodes must be at least 2, got {config.test_episodes}: of one there is no confidence interval.")
  if config.ways < 2:
    raise ConfigError(f"ways must be at least 2, got {config.ways}: with one class there is nothing to tell apart.")
  learner = registry.LEARNERS[config.learner]
  if config.learn_rates and not learner.learns_rates:
    others = [name for name, row in registry.LEARNERS.items() if row.learns_rates]
    raise ConfigError(f"learn_rates is for {' and '.join(others)}; {config.learner} never differentiates its inner loop.")
  if config.derivative not in learner.derivatives:
    raise ConfigError(f"{config.learner} has no derivative '{config.derivative}'; use {' or '.join(learner.derivatives)}.")
  if config.personalizer != INNER_LOOP:
    check_known("personalizer", config.personalizer, (INNER_LOOP, *registry.PERSONALIZERS))
    fields.check_personalizer(config, bool(config.gated_layers))
    budget = registry.PERSONALIZERS[config.personalizer].needs_gates and config.sparsity_by == "budget"
    if config.target_sparsity is not None and not registry.PERSONALIZERS[config.personalizer].prunes and not budget:
      raise ConfigError(
        f"target_sparsity is {config.target_sparsity}, but personalizer '{config.personalizer}' sets no sparsity here: what it "
        "would need is learned on the tasks of a federated run. Leave target_sparsity out."
      )
  fields.check_pruning(config.prune)
  fields.check_devices(config)
  fields.check_widths(config)
  fields.check_network(config, make_network(config), registry.DATASETS[config.dataset].image_shape, config.personalizer != INNER_LOOP)
  return config


def make_network(config: ConfigDict) -> mg.GatedNetwork:
  """The network of a config, with gates where it names layers for them."""
  return registry.make_network(registry.with_changes(config, gated=bool(config.gated_layers)), config.ways)


def make_learner(config: ConfigDict, loss: mg.data.Loss, network: mg.GatedNetwork, inner_steps: int | None = None) -> mg.fewshot.MetaLearner:
  """The meta-learner of a config, with its own number of inner steps or another."""
  return registry.LEARNERS[config.learner].make(config, loss, network, inner_steps or config.inner_steps)

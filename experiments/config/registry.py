"""What the names in a config stand for: one row per algorithm, personalizer, few-shot learner, score, network and data set.

A row says how the thing is made, what a reader sees of it, its defaults and, where it is tuned, its search space. To add one, put a row into
the table; a config file may do so for things of its own (docs/extending.md). Nothing else in `experiments` knows a name.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

import metagater_jax as mg
from metagater_jax.data.datasets import Dataset, load_dataset, load_omniglot
from metagater_jax.data.hapt import load_hapt

__all__ = [
  "ALGORITHMS",
  "DATASETS",
  "LEARNERS",
  "NETWORKS",
  "PARTITIONS",
  "PENALTIES",
  "PERSONALIZERS",
  "SCORES",
  "AlgorithmRow",
  "DatasetRow",
  "LearnerRow",
  "Method",
  "NetworkRow",
  "PersonalizerRow",
  "ScoreRow",
  "default_personalizer",
  "evaluation_axis",
  "make_algorithm",
  "make_network",
  "make_partition",
  "make_penalty",
  "make_personalizer",
  "make_score",
  "methods",
  "prunable_of",
  "pruning_options",
  "pruning_schedule",
  "train_axis",
  "with_changes",
]


# --- networks


class NetworkRow(NamedTuple):
  """`make(classes=…, widths=…)` gives a flax module from images to logits; without `widths` it has its own."""

  make: Callable[..., nn.Module]
  label: str


NETWORKS: dict[str, NetworkRow] = {
  "mlp": NetworkRow(mg.nn.MLP, "MLP"),
  "conv4": NetworkRow(mg.nn.ConvNet4, "three convolutions and a dense layer"),
  "conv7": NetworkRow(mg.nn.ConvNet7, "six convolutions and a dense layer"),
  "sensor": NetworkRow(mg.nn.SensorNet, "three convolutions over time and a dense layer"),
  "fewshot_conv4": NetworkRow(mg.nn.FewShotConvNet, "Conv-4"),
  "resnet12": NetworkRow(mg.nn.ResNet12, "ResNet-12"),
}


def make_network(config: ConfigDict, classes: int) -> mg.GatedNetwork:
  """The backbone of a config with its gates (none if it is not gated)."""
  options = {"widths": tuple(config.widths)} if config.widths else {}
  return mg.GatedNetwork(
    NETWORKS[config.model].make(classes=classes, **options),
    tuple(config.gated_layers) if config.gated else (),
    hidden=config.gate_hidden,
    temperature=config.gate_temperature or None,
    initial_log_odds=config.gate_initial_log_odds,
    logit_scale=config.gate_logit_scale,
    normalize=config.gate_normalize,
    noise=config.gate_noise,
    compute_dtype=config.compute_dtype,
    **_dropout(config),
  )


def _dropout(config):
  rate = getattr(config, "channel_dropout", None)  # few-shot configs have none
  return {} if rate is None else {"dropped_layers": tuple(config.gated_layers), "dropout": rate}


# --- federated algorithms


class AlgorithmRow(NamedTuple):
  """A federated algorithm.

  Attributes:
    make: `(config, loss) -> FederatedAlgorithm`.
    label: what a reader sees.
    settings: values of the fields that a config leaves open and nobody tuned, or functions of the config that give them.
    space: smallest and largest value of each setting that `experiments.tune` searches, evenly in its logarithm.
    gates: whether its networks have gates, where a config names gated layers and does not say.
    personalizer: how its target tasks adapt, where a config does not say: with gates, and without.
    ungated_label: of the method without gates, where the algorithm is known in both ways.
    several_steps: what is searched beside `space`, or over another range, with more than one local step.
  """

  make: Callable[[ConfigDict, mg.data.Loss], mg.federated.FederatedAlgorithm]
  label: str
  settings: Mapping[str, Any]
  space: Mapping[str, tuple[float, float]]
  gates: bool = False
  personalizer: tuple[str, str] = ("fine_tune", "fine_tune")
  ungated_label: str | None = None
  several_steps: Mapping[str, tuple[float, float]] = {}


PENALTIES: dict[str, Callable[[], mg.optim.Penalty]] = {"group_lasso": lambda: mg.group_lasso(mg.gate_groups), "l1": mg.l1}
# Settings that mean nothing without gates, and are not searched then.
_OF_GATES = ("penalty_weight", "gate_rate", "gate_adapt_lr")
_RATE = {"local_lr": (0.02, 0.4)}


def _local(c: ConfigDict) -> dict[str, Any]:
  return {"local_lr": c.local_lr, "local_steps": c.local_steps}


_METAGATER = {
  "local_lr": 0.1,
  "prox_weight": 15.0,
  "gamma": "ghadimi_lan",
  "adapt_lr": 0.05,
  "beta": lambda c: mg.federated.default_beta(c.prox_weight),
}


ALGORITHMS: dict[str, AlgorithmRow] = {
  "fedavg": AlgorithmRow(lambda c, loss: mg.fedavg(loss, **_local(c)), "FedAvg", {"local_lr": 0.1, "adapt_lr": 0.1}, _RATE),
  "per_fedavg": AlgorithmRow(
    lambda c, loss: mg.per_fedavg(loss, inner_lr=c.inner_lr, derivative=c.derivative, **_local(c)),
    "Per-FedAvg",
    {"local_lr": 0.1, "adapt_lr": 0.05, "inner_lr": lambda c: c.adapt_lr},
    _RATE | {"inner_lr": (0.005, 0.2)},
  ),
  # With one local step the gradients' part of a round is the product of rate, λ and β (β alone scales the penalty's prox), so λ is not searched.
  "metagater": AlgorithmRow(
    lambda c, loss: mg.metagater(
      loss,
      prox_weight=c.prox_weight,
      beta=c.beta,
      gamma=c.gamma,
      penalty=make_penalty(c),
      penalty_weight=c.penalty_weight,
      rates={"gate": c.gate_rate},
      **_local(c),
    ),
    "MetaGater w/ gating",
    _METAGATER | {"penalty_weight": 0.0002, "gate_rate": 30.0, "gate_adapt_lr": 10.0},
    _RATE | {"beta": (0.005, 0.03), "penalty_weight": (0.00001, 0.001), "gate_rate": (10.0, 100.0)},
    gates=True,
    personalizer=("two_stage", "fine_tune"),
    ungated_label="MetaGater w/o gating",
    several_steps={"prox_weight": (2.0, 15.0), "beta": (0.005, 0.03)},
  ),
  # What a gate that has learned nothing is: noise on the channels of the layers that it would switch.
  "metagater_dropout": AlgorithmRow(
    lambda c, loss: mg.metagater(loss, prox_weight=c.prox_weight, beta=c.beta, gamma=c.gamma, **_local(c)),
    "MetaGater w/o gating, channel dropout",
    _METAGATER | {"channel_dropout": 0.2},
    _RATE | {"beta": (0.005, 0.03), "channel_dropout": (0.05, 0.6)},
  ),
  "fedprox": AlgorithmRow(
    lambda c, loss: mg.federated.fedprox(loss, prox_weight=c.prox_weight, **_local(c)),
    "FedProx",
    {"local_lr": 0.1, "prox_weight": 0.1, "adapt_lr": 0.1},
    _RATE | {"prox_weight": (0.01, 3.0)},
  ),
  "reptile": AlgorithmRow(
    lambda c, loss: mg.federated.reptile(loss, server_lr=c.server_lr, **_local(c)),
    "Reptile",
    {"local_lr": 0.1, "server_lr": 0.5, "adapt_lr": 0.1},
    _RATE | {"server_lr": (0.3, 1.5)},
  ),
  "pfedme": AlgorithmRow(
    lambda c, loss: mg.federated.pfedme(
      loss, prox_weight=c.prox_weight, personal_lr=c.personal_lr, inner_steps=c.inner_steps, server_lr=c.server_lr, **_local(c)
    ),
    "pFedMe",
    {"local_lr": 0.05, "personal_lr": 0.1, "prox_weight": 15.0, "server_lr": 1.0, "adapt_lr": 0.1},
    _RATE | {"personal_lr": (0.01, 0.06), "prox_weight": (5.0, 30.0)},
  ),
}


def make_penalty(config: ConfigDict) -> mg.optim.Penalty | None:
  """R on the gate's parameters; None without gates."""
  return mg.on_part(PENALTIES[config.penalty](), "gate") if config.gated else None


def make_algorithm(config: ConfigDict, network: mg.GatedNetwork) -> mg.federated.FederatedAlgorithm:
  """The federated algorithm of a config, pruned in rounds if `config.prune` says so."""
  loss, prune = mg.classification_loss(network), ConfigDict(config.prune)

  def make(loss):
    return ALGORITHMS[config.algorithm].make(config, mg.data.microbatched(loss, config.microbatch) if config.microbatch else loss)

  if not prune.sparsity:
    return make(loss)
  # A client's own meta-objective has the rate of adaptation; the ordinary loss is on the second of its two minibatches, as ANP's queries.
  image_shape = DATASETS[config.dataset].image_shape if config.dataset in DATASETS else ANY_IMAGE
  score = make_score(prune, network, image_shape, loss, mg.maml(loss, inner_lr=config.adapt_lr).meta_loss, lambda episode: episode.query)
  return mg.federated.federated_pruning(make, loss, pruning_schedule(prune, config.rounds), score, **pruning_options(prune, network, image_shape))


# --- personalizers


class PersonalizerRow(NamedTuple):
  """How target tasks adapt a meta-model.

  Attributes:
    make: `(config, loss, network) -> Personalizer`.
    label: what a reader sees.
    settings: values of the fields that a config leaves open and nobody tuned, where it is not the algorithm's usual personalizer.
    needs_gates: whether it can only follow a model with gates.
    prunes: whether it prunes, to `target_sparsity`, so that a config must have one.
    follows: the algorithm whose model without gates it prunes where it is a method of the tables.
    grid: values of a setting of its own, beside the rate, that are tried on every meta-model where it is tuned.
  """

  make: Callable[[ConfigDict, mg.data.Loss, mg.GatedNetwork], mg.personalize.Personalizer]
  label: str
  settings: Mapping[str, Any]
  needs_gates: bool = False
  prunes: bool = False
  follows: str = "metagater"
  grid: tuple[str, tuple[float, ...]] | None = None


def _adaptation(c: ConfigDict) -> dict[str, Any]:
  return {"lr": c.adapt_lr, "steps": c.adapt_steps, "chunk": c.chunk}


def _random_score(params, task, key, mask):
  """Numbers that are a function of the task, so that each removes others."""
  del key, mask
  own = task.index[0] if isinstance(task, mg.data.TaskData) else task.labels.sum()
  return mg.pruning.random()(params, key=jax.random.fold_in(jax.random.key(0), own))


_RANDOM = mg.pruning.Score(lambda params, mean, key: mean, _random_score)


def _metasnip(granularity: str, score: Callable[[mg.data.Loss], mg.pruning.Score] | None = None, scope: str = "global") -> Callable:
  def make(c, loss, network):
    # All kernels by weight, as SNIP does; by channel the layers that a gate could switch, so that it is compared on what the gate decides about.
    layers = tuple(f"backbone/{layer}/kernel" for layer in c.gated_layers)
    prunable = mg.pruning.is_kernel if granularity == "weight" else lambda name, leaf: name in layers
    sparsity, counts = 0.0 if c.target_sparsity is None else c.target_sparsity, kept_counts(c, network)
    if counts is not None:
      if granularity != "channel":
        raise ValueError("keep is how many channels are kept, and this personalizer removes single weights; use target_sparsity, or one by channel.")
      sparsity = {f"backbone/{layer}/kernel": 1 - count / _outputs(network, c)[layer] for layer, count in counts.items()}
    return mg.metasnip(
      loss,
      sparsity=sparsity,
      granularity=granularity,
      prunable=prunable,
      scope="layer" if counts else scope,
      score=None if score is None else score(loss),
      **_adaptation(c),
    )

  return make


def kept_counts(config: ConfigDict, network: mg.GatedNetwork) -> dict[str, int] | None:
  """How many channels a task keeps of each gated layer, from `config.keep`: "conv2=32,conv3=0.25". Fractions are rounded to a multiple of 8, which
  runtimes on devices want; whole numbers are taken as they are. None: nothing is said."""
  text = getattr(config, "keep", None)
  if not text:
    return None
  widths, found = _outputs(network, config), {}
  for part in str(text).split(","):
    layer, _, value = (word.strip() for word in part.partition("="))
    if layer not in config.gated_layers:
      raise ValueError(f"keep names '{layer}', which is none of the gated_layers {', '.join(config.gated_layers)}.")
    try:
      count = max(8, 8 * round(widths[layer] * float(value) / 8)) if "." in value else int(value)
    except ValueError:
      raise ValueError(f"keep must be like 'conv2=32,conv3=0.25', got '{part.strip()}'.") from None
    if not 1 <= count <= widths[layer]:
      raise ValueError(f"keep: {layer} has {widths[layer]} channels, so from 1 to {widths[layer]} of them can be kept, got {value}.")
    found[layer] = count
  if missing := [layer for layer in config.gated_layers if layer not in found]:
    raise ValueError(f"keep says nothing of {', '.join(missing)}; name every gated layer.")
  return found


def _outputs(network, config):
  shape = DATASETS[config.dataset].image_shape if config.dataset in DATASETS else ANY_IMAGE
  return {gate: layer.outputs for layer in network.layers(shape) for gate in layer.modules}


PERSONALIZERS: dict[str, PersonalizerRow] = {
  "fine_tune": PersonalizerRow(lambda c, loss, network: mg.fine_tune(loss, **_adaptation(c)), "fine-tuning", {"adapt_lr": 0.05}),
  "two_stage": PersonalizerRow(
    lambda c, loss, network: mg.two_stage(
      loss,
      gate_lr=c.gate_adapt_lr,
      target_sparsity=c.target_sparsity,
      sparsity_by=c.sparsity_by,
      keep=kept_counts(c, network),
      frozen=c.gate_frozen,
      network=network,
      gate_steps=getattr(c, "gate_adapt_steps", None),
      gate_loss=_loss(c, dataclasses.replace(network, temperature=c.gate_adapt_temperature or None)),
      task_axis=evaluation_axis(c, network),
      **_adaptation(c),
    ),
    "two stages",
    {"adapt_lr": 0.05, "gate_adapt_lr": 10.0},
    needs_gates=True,
    grid=("gate_adapt_lr", (1.0, 10.0, 100.0)),
  ),
  "metasnip_weight": PersonalizerRow(_metasnip("weight"), "MetaSNIP", {"adapt_lr": 0.05}, prunes=True),
  "metasnip_channel": PersonalizerRow(_metasnip("channel"), "MetaSNIP, by channel", {"adapt_lr": 0.05}, prunes=True),
  # Channels of a network without gates that a task keeps for all its inputs: chosen by one gradient, or at random, in each layer as many. Ranked
  # over layers, sums over the kernels would choose layers first: one of two went nearly as a whole.
  "static_channels": PersonalizerRow(
    _metasnip("channel", mg.pruning.contribution, "layer"), "static channels", {"adapt_lr": 0.05}, prunes=True, follows="metagater_dropout"
  ),
  "random_channels": PersonalizerRow(
    _metasnip("channel", lambda loss: _RANDOM, "layer"), "random channels", {"adapt_lr": 0.05}, prunes=True, follows="metagater_dropout"
  ),
}


def default_personalizer(algorithm: str, gated: bool) -> str:
  """How the target tasks of an algorithm adapt, where a config does not say."""
  return ALGORITHMS[algorithm].personalizer[0 if gated else 1]


def make_personalizer(config: ConfigDict, network: mg.GatedNetwork, **changes: Any) -> mg.personalize.Personalizer:
  """The personalizer of a config, with other values of some of its fields, which may be traced. `loss_of` is one more: network to loss."""
  config = with_changes(config, **changes)
  return PERSONALIZERS[config.personalizer].make(config, _loss(config, network), network)


def _loss(config, network):
  """The loss of a network, in the parts that a config wants a gradient to be taken in."""
  loss, microbatch = getattr(config, "loss_of", mg.classification_loss)(network), getattr(config, "microbatch", None)
  return mg.data.microbatched(loss, microbatch) if microbatch else loss


def with_changes(config: ConfigDict, **changes: Any) -> "_Changed":
  """A config with other values of some fields, or more of them; values may be traced."""
  return _Changed(config, changes)


class _Changed:
  def __init__(self, config, changes):
    self._config, self._changes = config, changes

  def __getattr__(self, name):
    return self._changes[name] if name in self._changes else getattr(self._config, name)


# --- methods: what tables tell apart


class Method(NamedTuple):
  """An algorithm with or without gates, and how its targets adapt; `space` is what is tuned, empty where another method's model is taken."""

  algorithm: str
  gated: bool
  personalizer: str
  label: str
  space: Mapping[str, tuple[float, float]]


def methods() -> dict[str, Method]:
  """All methods by name: each algorithm, the gated ones without gates, too ("NAME_ungated"), and what prunes a model of these at a target."""
  found = {}
  for name, row in ALGORITHMS.items():
    ungated = {field: limits for field, limits in row.space.items() if field not in _OF_GATES}
    found[name] = Method(name, row.gates, row.personalizer[0 if row.gates else 1], row.label, row.space if row.gates else ungated)
    if row.gates:
      found[f"{name}_ungated"] = Method(name, False, row.personalizer[1], row.ungated_label or f"{row.label} w/o gates", ungated)
  for name, row in PERSONALIZERS.items():
    if row.prunes:
      found[name] = Method(row.follows, False, name, row.label, {})
  return found


# --- few-shot learners


class LearnerRow(NamedTuple):
  """A few-shot meta-learner.

  Attributes:
    make: `(config, loss, network, inner steps) -> MetaLearner`.
    label: what a reader sees.
    derivatives: of its meta-objective that it offers.
    learns_rates: whether it can learn its inner rates.
  """

  make: Callable[..., mg.fewshot.MetaLearner]
  label: str
  derivatives: tuple[str, ...] = mg.optim.DERIVATIVES
  learns_rates: bool = False


def _inner_loop(c: ConfigDict, steps: int) -> dict[str, Any]:
  return {"inner_lr": c.inner_lr, "inner_steps": steps}


LEARNERS: dict[str, LearnerRow] = {
  "maml": LearnerRow(
    lambda c, loss, network, steps: mg.maml(loss, derivative=c.derivative, learn_rates=c.learn_rates, **_inner_loop(c, steps)),
    "MAML",
    learns_rates=True,
  ),
  "anil": LearnerRow(
    lambda c, loss, network, steps: mg.fewshot.anil(
      loss, head=mg.nn.head_of(network.backbone, ANY_IMAGE), derivative=c.derivative, learn_rates=c.learn_rates, **_inner_loop(c, steps)
    ),
    "ANIL",
    ("exact", "first_order"),
    learns_rates=True,
  ),  # differences need an inner loop that adapts everything
  "reptile": LearnerRow(lambda c, loss, network, steps: mg.fewshot.meta_reptile(loss, **_inner_loop(c, steps)), "Reptile"),
}


# --- scores


class ScoreRow(NamedTuple):
  """A pruning score: `make(prune, loss, meta_loss, samples) -> Score`, with the part `prune` of a config; `samples` says which samples of a
  task the ordinary loss is taken on (None: all)."""

  make: Callable[..., mg.pruning.Score]
  label: str


SCORES: dict[str, ScoreRow] = {
  "anp": ScoreRow(
    lambda prune, loss, meta_loss, samples: mg.pruning.anp(meta_loss, derivative=prune.derivative, average=prune.average, mask_in=prune.mask_in),
    "ANP",
  ),
  "snip": ScoreRow(
    lambda prune, loss, meta_loss, samples: mg.pruning.snip(loss, average=prune.average, samples=samples), "SNIP / Taylor on the ordinary loss"
  ),
  "magnitude": ScoreRow(lambda *_: mg.pruning.magnitude(), "magnitude"),
  "random": ScoreRow(lambda *_: mg.pruning.random(), "random"),
}


def make_score(
  prune: ConfigDict, network: mg.GatedNetwork, image_shape: Sequence[int], loss: mg.data.Loss, meta_loss: Callable, samples: Callable | None = None
) -> mg.pruning.Score:
  """The score that the part `prune` of a config names, of weights or of whole channels."""
  make = lambda prune: SCORES[prune.score].make(prune, loss, meta_loss, samples)
  if prune.granularity == "weight" or prune.channel_score == "sum" or make(prune).contribution is None:
    return make(prune)
  return mg.pruning.channel_sensitivity(make(with_changes(prune, average="signed")), channel_costs(network, image_shape).groups, prune.average)


def channel_costs(network: mg.GatedNetwork, image_shape: Sequence[int]) -> mg.nn.ChannelCosts:
  """The work of a network by how many channels its layers keep."""
  return mg.nn.channel_costs(network.layers(image_shape), mg.nn.head_of(network.backbone, image_shape))


def pruning_options(prune: ConfigDict, network: mg.GatedNetwork, image_shape: Sequence[int]) -> dict[str, Any]:
  """Which weights a part `prune` of a config removes by their scores: arguments of `make_mask` and of what uses it."""
  scope = prune.scope
  if scope == "macs":
    scope = mg.pruning.by_macs(channel_costs(network, image_shape), multiple=prune.multiple, least=prune.least)
  return {"scope": scope, "granularity": prune.granularity, "prunable": prunable_of(prune, network)}


def pruning_schedule(prune: ConfigDict, steps: int) -> mg.pruning.PruningSchedule:
  """When a training of so many rounds or steps is pruned, and how far; without `prune.every`, in ten parts."""
  begin = int(prune.begin * steps)
  end = max(int(prune.end * steps), begin + 1)
  return mg.pruning.sparsity_schedule(prune.schedule, prune.sparsity, begin=begin, end=end, every=prune.every or max(1, (end - begin) // 10))


def prunable_of(prune: ConfigDict, network: mg.GatedNetwork) -> Callable[[str, jax.Array], bool]:
  """`(name, leaf) -> bool`, what pruning may remove of a network: the backbone's kernels, the last layer's only with `prune.head` and not by
  channel, as its channels are the classes. Gates are no part of it: their own penalty prunes them."""
  head = None if prune.head and prune.granularity == "weight" else mg.nn.head_of(network.backbone, ANY_IMAGE)

  def prunable(name, leaf):
    return "gate" not in name.split("/") and mg.pruning.is_kernel(name, leaf) and (head is None or f"/{head}/" not in f"/{name}")

  return prunable


# --- data

# Images on which a network is tried before the data is there: names of layers do not depend on them.
ANY_IMAGE = (32, 32, 3)


class DatasetRow(NamedTuple):
  """A data set: `load(data_dir) -> Dataset` of all its samples, for tasks; `splits(config) -> {"train", "validation", "test": ClassPool}` for
  few-shot episodes. One of them may be missing. Names that have no row are TFDS's. `image_shape` is that of an image, where networks are tried
  before the data is there."""

  load: Callable[[str | None], Dataset] | None = None
  splits: Callable[[ConfigDict], dict[str, mg.fewshot.ClassPool]] | None = None
  image_shape: tuple[int, ...] = ANY_IMAGE


def _cifar_fs(config):
  data = load_dataset("cifar100", config.data_dir)
  return {split: mg.fewshot.make_class_pool(data.images, data.labels, own) for split, own in mg.fewshot.cifar_fs_classes().items()}


def _omniglot(config):
  images, labels, alphabets, names = load_omniglot(config.data_dir)
  there = sorted({names[i] for i in np.unique(alphabets)})
  if unknown := sorted(set(config.alphabets) - set(there)):
    raise ValueError(f"alphabets: {', '.join(unknown)} not in this Omniglot, which has {', '.join(there)}.")
  wanted = [names.index(name) for name in config.alphabets or there]
  characters = np.unique(labels[np.isin(alphabets, wanted)])
  return {
    split: mg.fewshot.make_class_pool(*mg.fewshot.with_rotations(*(x[np.isin(labels, own)] for x in (images, labels))))
    for split, own in mg.fewshot.split_classes(characters, seed=0).items()
  }


DATASETS: dict[str, DatasetRow] = {
  **{name: DatasetRow(load=partial(load_dataset, name)) for name in ("digits", "mnist", "cifar10", "cifar100")},
  "har": DatasetRow(load=load_hapt, image_shape=(128, 6)),
  "cifarfs": DatasetRow(splits=_cifar_fs),
  "omniglot": DatasetRow(splits=_omniglot, image_shape=(28, 28, 1)),
}

# `(config, dataset) -> Partition`; the data set may be a selection of samples.
PARTITIONS: dict[str, Callable[[ConfigDict, Dataset], mg.data.Partition]] = {
  "labels": lambda c, data: mg.partition_by_label(
    data.labels,
    tasks=c.tasks,
    labels_per_task=c.labels_per_task,
    size_range=tuple(c.size_range),
    seed=c.seed,
    test_fraction=c.test_fraction,
    fill=c.fill,
    cyclic=c.cyclic_labels,
  ),
  "dirichlet": lambda c, data: mg.data.partition_by_dirichlet(
    data.labels, tasks=c.tasks, concentration=c.concentration, seed=c.seed, test_fraction=c.test_fraction
  ),
  "groups": lambda c, data: mg.data.partition_by_group(_groups_of(data), data.labels, data.spans, test_fraction=c.test_fraction),
}
# Partitions whose tasks are those of the data: how many there are does not depend on the config, and none is cut.
_NATURAL = ("groups",)


def make_partition(config: ConfigDict, dataset: Dataset, tuning: bool = False) -> mg.data.Partition:
  """How the labelled samples are distributed over the tasks of a config: those that runs are made of or, with `tuning`, those on which settings
  are chosen. Where tasks take all the data there is (`fill`), those for tuning are smaller by `tuning_fraction`, and as many; natural tasks are
  the one or the other as a whole."""
  labels, natural = np.asarray(dataset.labels), config.partition in _NATURAL
  split = mg.data.split_groups(_groups_of(dataset), config.tuning_fraction) if natural else mg.data.split_samples(labels, config.tuning_fraction)
  samples = split[1 if tuning else 0]
  if tuning and config.fill and not natural:
    low, high = config.size_range
    config = with_changes(
      config,
      size_range=(
        max(round(low * config.tuning_fraction), config.labels_per_task),
        max(round(high * config.tuning_fraction), config.labels_per_task),
      ),
    )
  of = lambda values: None if values is None else np.asarray(values)[samples]
  selected = dataset._replace(images=None, labels=labels[samples], groups=of(dataset.groups), spans=of(dataset.spans))
  partition = PARTITIONS[config.partition](config, selected).of(samples)
  if natural and not tuning and len(partition) != config.tasks:
    raise ValueError(
      f"tasks is {config.tasks}, but with partition '{config.partition}' and tuning_fraction={config.tuning_fraction} {dataset.name} "
      f"has {len(partition)} tasks; set tasks={len(partition)}."
    )
  return partition


def _groups_of(data):
  if data.groups is None:
    raise ValueError(f"partition is 'groups', but {data.name} does not say whom its samples are of; use 'labels' or 'dirichlet'.")
  return np.asarray(data.groups)


# --- how tasks are mapped


def train_axis(config: ConfigDict, network: mg.GatedNetwork, algorithm: mg.federated.FederatedAlgorithm) -> str:
  """`config.task_axis` of meta-training; "auto" knows what was measured on CPUs: `python -m benchmarks --only=task_axes`."""
  if config.task_axis != "auto" or not _small_on_cpu(network):
    return config.task_axis
  return "merged" if algorithm.mergeable else "vmap"


def evaluation_axis(config: ConfigDict, network: mg.GatedNetwork) -> str:
  """The same for adaptation and evaluation, where tasks have parameters of their own and cannot be merged."""
  if config.task_axis == "merged" or config.task_axis == "auto":
    return "vmap" if _small_on_cpu(network) else "auto"
  return config.task_axis


def _small_on_cpu(network):
  return network.small and jax.default_backend() == "cpu"  # a task is too little work for a loop

"""MetaGater in JAX: small networks that adapt to a new device's task in one gradient step, learned across devices.

Pure functions of pytrees; everything works under jit, vmap and grad. What most users need is here; the rest is in the wings:

* `nn`: gates, backbones, gated networks, what they cost;
* `optim`: proximal operators, the accelerated proximal transform, the local solver, gradient descent that can be differentiated;
* `federated`: algorithms and communication rounds;
* `personalize`: how a target task adapts a meta-model;
* `pruning`: scores, masks, schedules, the optax wrapper that prunes while training;
* `fewshot`: episodes and meta-learners;
* `deploy`: adapted networks without what they do not use, and as files for devices;
* `data`: partitions and arrays of many tasks (data sets on disk: `metagater_jax.data.datasets`, which nothing in here imports);
* `core`: what all of these stand on.

Arguments come in one order: first what a function computes with (network, loss, algorithm), which can be bound with `functools.partial`; then
the parameters, model or state; then data, key and mask; options are keywords.
"""

from metagater_jax import core, data, deploy, federated, fewshot, nn, optim, personalize, pruning
from metagater_jax.core import Model
from metagater_jax.data import make_population, partition_by_label
from metagater_jax.federated import fedavg, federated_init, metagater, per_fedavg, run_rounds
from metagater_jax.fewshot import maml
from metagater_jax.nn import MLP, ChannelGate, ConvNet4, GatedNetwork, binarize, classification_loss, gate_groups
from metagater_jax.optim import accelerated_proximal, accelerated_proximal_eval_params, group_lasso, l1, on_part
from metagater_jax.personalize import evaluate_targets, evaluate_task, fine_tune, metasnip, two_stage
from metagater_jax.pruning import gradual_pruning, make_mask

__version__ = "0.1.0"

__all__ = [
  "MLP",
  "ChannelGate",
  "ConvNet4",
  "GatedNetwork",
  "Model",
  "accelerated_proximal",
  "accelerated_proximal_eval_params",
  "binarize",
  "classification_loss",
  "core",
  "data",
  "deploy",
  "evaluate_targets",
  "evaluate_task",
  "fedavg",
  "federated",
  "federated_init",
  "fewshot",
  "fine_tune",
  "gate_groups",
  "gradual_pruning",
  "group_lasso",
  "l1",
  "make_mask",
  "make_population",
  "maml",
  "metagater",
  "metasnip",
  "nn",
  "on_part",
  "optim",
  "partition_by_label",
  "per_fedavg",
  "personalize",
  "pruning",
  "run_rounds",
  "two_stage",
]

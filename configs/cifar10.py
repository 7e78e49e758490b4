"""CIFAR-10 as in the paper: 100 tasks of two labels, 221-2792 train samples each, four-layer network, gate on conv3."""

from experiments.config import base_config


def get_config():
  config = base_config()
  config.name = "cifar10"
  config.dataset = "cifar10"
  config.tasks = 100
  config.target_tasks = 20
  config.validation_tasks = 10
  config.tuning_fraction = 0.25
  config.tuned = "cifar10"
  config.cohort = 20
  config.size_range = (221, 2792)
  config.model = "conv4"
  config.gated_layers = ("conv3",)
  config.mesh = "auto"
  config.eval_every = 50
  return config

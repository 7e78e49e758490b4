"""MNIST as in the paper: 20 tasks of two labels, 1165-3834 train samples each, MLP 784-100-10 without gates."""

from experiments.config import base_config


def get_config():
  config = base_config()
  config.name = "mnist"
  config.dataset = "mnist"
  config.size_range = (1165, 3834)
  config.model = "mlp"
  config.gated = False
  config.gated_layers = ()
  config.rounds = 200
  config.eval_every = 20
  return config

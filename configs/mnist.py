"""MNIST as in the paper: 20 tasks of two labels, 1165-3834 train samples each, MLP 784-100-10 without gates.

The paper's setting is that of pFedMe's data generator, whose task i holds the labels i and i + 1.
"""

from experiments.config import base_config


def get_config():
  config = base_config()
  config.name = "mnist"
  config.dataset = "mnist"
  config.pixel_mean, config.pixel_std = 0.1307, 0.3081
  config.cyclic_labels = True
  config.size_range = (1165, 3834)
  config.model = "mlp"
  config.gated_layers = ()
  config.tuning_fraction = 0.25
  config.tuned = "mnist"
  config.eval_every = 20
  config.rounds_per_dispatch = 20
  return config

"""Scikit-learn's handwritten digits (embedded, 8×8): 20 tasks of two labels. The default config."""

from experiments.config import base_config


def get_config():
  config = base_config()
  config.name = "digits"
  config.dataset = "digits"
  config.model = "conv4"
  config.widths = (16, 32, 64)
  config.rounds = 60
  config.eval_every = 10
  return config

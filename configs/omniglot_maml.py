"""Omniglot: characters and their turns by 90° as classes, Conv-4 with 64 filters, MAML."""

from experiments.fewshot_config import base_config


def get_config():
  config = base_config()
  config.name = "omniglot_maml"
  config.dataset = "omniglot"
  config.alphabets = ()
  config.widths = (64, 64, 64, 64)
  return config

"""Omniglot: characters and their turns by 90° as classes, Conv-4 with 64 filters, MAML."""

from experiments.config.fewshot import base_config


def get_config():
  config = base_config()
  config.name = "omniglot_maml"
  config.dataset = "omniglot"
  config.alphabets = ("0", "1", "2", "3", "4", "5", "6", "7")  # of small1 and small2, by TFDS's numbers; empty: all there are
  config.widths = (64, 64, 64, 64)
  return config

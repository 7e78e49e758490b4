"""CIFAR-10 as in configs/cifar10.py, with the backbone pruned to 85 % by the nodes' own ANP scores while it is trained."""

from configs import cifar10


def get_config():
  config = cifar10.get_config()
  config.name = "cifar10_anp"
  config.prune.score = "anp"
  config.prune.sparsity = 0.85
  return config

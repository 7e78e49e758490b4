"""CIFAR-10 as in configs/cifar10.py, with 85 % of the convolutions' kernels pruned by the clients' own ANP scores while they train."""

from configs import cifar10


def get_config():
  config = cifar10.get_config()
  config.name = "cifar10_anp"
  config.prune.score = "anp"
  config.prune.sparsity = 0.85
  return config

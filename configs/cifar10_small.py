"""CIFAR-10 with small local data (Appendix E.3): 20-100 train samples per task, the seven-layer network."""

from configs import cifar10_moderate


def get_config():
  config = cifar10_moderate.get_config()
  config.name = config.tuned = "cifar10_small"
  config.size_range = (20, 100)
  config.fill = False
  config.eval_every = 25
  return config

"""CIFAR-100 with small local data (Appendix E.3): five labels per task, the seven-layer network."""

from configs import cifar10_small


def get_config():
  config = cifar10_small.get_config()
  config.name = "cifar100"  # tuned: as cifar10_small, the same network and sizes; not tuned by itself
  config.dataset = "cifar100"
  config.labels_per_task = 5
  return config

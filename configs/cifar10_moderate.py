"""CIFAR-10 with moderate local data (Appendix E.2): the seven-layer network, gates on conv5 and conv6."""

from configs import cifar10


def get_config():
  config = cifar10.get_config()
  config.name = "cifar10_moderate"
  config.tuned = "cifar10_small"  # the same network; not tuned by itself
  config.model = "conv7"
  config.widths = (16, 32, 32, 64, 64, 128)
  config.eval_every = 25
  config.gated_layers = ("conv5", "conv6")
  return config

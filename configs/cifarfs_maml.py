"""CIFAR-FS (CIFAR-100's classes, 64/16/20): 5-way episodes, Conv-4, MAML. The default few-shot config."""

from experiments.fewshot_config import base_config


def get_config():
  return base_config()

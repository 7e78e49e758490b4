"""CIFAR-FS (CIFAR-100's classes, 64/16/20): 5-way episodes, Conv-4, MAML. The default few-shot config."""

from experiments.fewshot_config import base_config


def get_config():
  config = base_config()
  config.train_queries = 5  # a third of the queries in two thirds of the time, for more episodes
  return config

"""Configs: their fields and checks (`federated`, `fewshot`), and what the names in them stand for (`registry`)."""

from experiments.config.federated import base_config
from experiments.config.fields import ConfigError

__all__ = ["ConfigError", "base_config"]

"""Human activity (UCI HAPT): six activities from a phone's accelerometer and gyroscope; each task is a person, targets are people never seen.

`--config.data_dir` names the folder with `hapt.npz` or the original files.
"""

from experiments.config import base_config


def get_config():
  config = base_config()
  config.name = config.dataset = config.tuned = "har"
  config.partition = "groups"
  config.tuning_fraction = 1 / 3  # ten of the thirty people
  config.tasks = 20
  config.target_tasks = 5
  config.validation_tasks = 3
  config.cohort = 5
  config.model = "sensor"
  config.gated_layers = ("conv2", "conv3")
  config.eval_every = 25
  return config

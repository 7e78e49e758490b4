"""Fields are checked before any long work, and every config file passes."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import digits
from experiments.config import ConfigError, registry
from experiments.config.federated import check_config
from experiments.config.fewshot import check_config as check_fewshot
from experiments.config.fewshot import make_network as make_fewshot_network
from experiments.config.fields import CONFIGS
from experiments.config.registry import make_network
from experiments.run import run


def test_checking_a_config_leaves_it_as_it_was():
  config = digits.get_config()
  before = config.to_dict()
  assert check_config(config).local_lr == 0.1 and config.to_dict() == before


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(cohort=16), "cohort is 16, but there are 15 training tasks"),
    (dict(labels_per_task=11), "labels_per_task is 11, but digits has 10 classes"),
    (dict(size_range=(100, 300)), r"cannot fill size_range=\(100, 300\)"),
    (dict(size_range=(9, 3)), "1 <= smallest <= largest"),
    (dict(local_lr=0.0), "local_lr must be positive, got 0.0"),
    (dict(adapt_lr=-1.0), "adapt_lr must be positive, got -1.0"),
    (dict(prox_weight=0.0), "prox_weight must be positive"),
    (dict(beta=-0.1), "beta must be positive, got -0.1"),
    (dict(penalty_weight=-1.0), "penalty_weight must not be negative"),
    (dict(rounds=0), "rounds must be at least 1"),
    (dict(target_sparsity=1.0), r"target_sparsity must lie in \[0, 1\), got 1.0"),
    (dict(target_tasks=20), "at least one must be left for meta-training"),
    (dict(gated_layers=("conv9",)), "'conv9' does not exist; the layers of ConvNet4 are conv1, conv2, conv3, output"),
    (dict(gated=True, gated_layers=()), "gated_layers is empty"),
    (dict(model="conv5"), "unknown model 'conv5'. Did you mean 'conv"),
    (
      dict(algorithm="metagator"),
      "unknown algorithm 'metagator'. Did you mean 'metagater'.? Known: fedavg, fedprox, metagater, metagater_dropout, per_fedavg, pfedme, reptile",
    ),
    (dict(derivative="second_order"), "Did you mean 'first_order'"),
    (dict(personalizer="two_stag"), "unknown personalizer 'two_stag'. Did you mean 'two_stage'"),
    (dict(personalizer="two_stage", gated=False), "adapts gates, but this model has none; use fine_tune or metasnip_weight"),
    (dict(algorithm="fedavg", personalizer="two_stage"), "adapts gates, but this model has none"),
    (dict(personalizer="metasnip_weight", target_sparsity=None), "prunes to target_sparsity, which is None"),
    (dict(personalizer="metasnip_channel", target_sparsity=0.3, gated_layers=(), gated=False), "none of the leaves is prunable"),
    (dict(sparsity_of="tests"), "sparsity_of is given, but personalizer 'two_stage' does not prune; use metasnip_weight or metasnip_channel"),
    (dict(meta_model="tests"), "meta_model is tests, which holds no finished run"),
    (dict(tuned="mnits"), "unknown tuned 'mnits'. Did you mean 'mnist'"),
    (dict(validation_tasks=15), "validation_tasks 15, but there are 20 tasks"),
    (dict(server_lr=0.0), "server_lr must be positive, got 0.0"),
    (dict(penalty="group_laso"), "Did you mean 'group_lasso'"),
    (dict(gamma="nestrov"), "Did you mean 'nesterov'"),
    (dict(widths=(16, 0, 3)), "widths must be positive"),
    (dict(widths=(True, 2, 3)), "widths must be positive whole numbers"),
    (dict(seed=2**32), r"seed must lie in 0 … 2\^32 − 1, got 4294967296"),
    (dict(seed=-1), "seed must lie in"),
    (dict(name="../up"), "name must be the plain name of a folder.*got '../up'"),
    (dict(name=".."), "plain name"),
    (dict(name=""), "plain name"),
    (dict(tuning_fraction=1.0), r"tuning_fraction must lie in \[0, 1\), got 1.0"),
    (dict(penalty_weight=float("nan")), "penalty_weight must not"),
    (dict(model="resnet12", widths=(4, 4), gated_layers=(), microbatch=2), r"microbatch is 2, but model 'resnet12' does not say \(rowwise"),
    (dict(test_fraction=0.0), "test_fraction must lie between 0 and 1"),
  ],
)
def test_bad_fields_are_named_before_anything_is_written(change, message, tmp_path):
  config = digits.get_config()
  for field, value in change.items():
    config[field] = value
  with pytest.raises(ConfigError, match=message):
    run(config, tmp_path / "w", quiet=True)
  assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("_")])
def test_every_config_file_can_run(name):
  """Its fields pass, it names no folder of its own, and its network has the gates that it names, on images of its data set."""
  config = importlib.import_module(f"configs.{name}").get_config()
  shape = registry.DATASETS[config.dataset].image_shape
  assert config.data_dir is None
  if "learner" in config:
    config = check_fewshot(config)
    network, layers = make_fewshot_network(config), config.gated_layers
  else:
    config = check_config(config)
    network, layers = make_network(config, 10), config.gated_layers if config.gated else ()
  assert set(jax.eval_shape(lambda key: network.init(key, shape), jax.random.key(0))["gate"]) == set(layers)


def test_fields_take_what_has_one_meaning():
  """NumPy's numbers, paths, lists and arrays; and a number where a field is text that may be one."""
  config = digits.get_config()
  config.tasks, config.local_lr, config.weighted = np.int64(20), np.float32(0.5), np.bool_(True)
  config.widths, config.size_range, config.gated_layers = [np.int32(8), 8, 8], np.array([20, 30]), ["conv3"]
  config.data_dir, config.mesh, config.task_axis, config.adapt_lr = Path("data"), 1, np.int64(4), 1
  config.prune.episodes = np.int16(3)
  found = json.loads(check_config(config).to_json())
  wanted = {
    "tasks": 20,
    "local_lr": 0.5,
    "weighted": True,
    "widths": [8, 8, 8],
    "size_range": [20, 30],
    "gated_layers": ["conv3"],
    "data_dir": "data",
    "mesh": "1",
    "task_axis": "4",
    "adapt_lr": 1.0,
  }
  assert {name: found[name] for name in wanted} == wanted and found["prune"]["episodes"] == 3


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("tasks", 2.5, "tasks must be a whole number, got 2.5"),
    ("tasks", True, "must be a whole number, got True"),
    ("local_lr", "0.1", "local_lr must be a number, got '0.1'"),
    ("widths", 3, "widths must be a tuple"),
    ("gated", 1, "gated must be True or False"),
    ("model", 3.0, "model must be text"),
  ],
)
def test_fields_of_another_type_name_the_remedy(field, value, message):
  with pytest.raises(ConfigError, match=message):
    digits.get_config()[field] = value

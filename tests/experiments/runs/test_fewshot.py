"""The few-shot command on small pools: what it writes, pruning through it, splits, and errors before any long work."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fewshot_problem import small, small_splits

import metagater_jax as mg
from configs import omniglot_maml
from experiments.config import ConfigError, registry
from experiments.config.fewshot import check_config
from experiments.config.fields import pruning_fields
from experiments.fewshot import run
from experiments.runs import fewshot
from experiments.runs.programs import Compiled


@pytest.fixture(scope="module")
def splits():
  return small_splits()


@pytest.fixture(scope="module")
def pruned(splits, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("fewshot") / "run"
  return workdir, run(small(prune={"score": "anp", "sparsity": 0.6}), workdir, splits, quiet=True)


def test_a_run_writes_everything(pruned):
  workdir, result = pruned
  assert result == json.loads((workdir / "result.json").read_text())
  for name in ("config.json", "metrics.jsonl", "metrics.csv", "accuracy.png", "meta_model.npz", "mask.npz"):
    assert (workdir / name).stat().st_size > 0
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [20, 40]
  assert rows[0]["sparsity"] < rows[1]["sparsity"] == pytest.approx(0.6, abs=0.01)
  assert result["accuracy"]["mean"] > result["accuracy_before_adaptation"]["mean"] + 0.1
  assert result["accuracy"]["episodes"] == 30
  assert result["episodes_per_second"] > 0
  before, after = np.loadtxt(workdir / "test_episodes.csv", delimiter=",", skiprows=1).T
  assert [len(after), before.mean(), after.mean()] == pytest.approx(
    [30, result["accuracy_before_adaptation"]["mean"], result["accuracy"]["mean"]], abs=1e-5
  )


def test_runs_are_told_apart_by_every_field_that_changes_their_numbers():
  free = {"data_dir", "eval_every", "validation_episodes", "test_episodes", "mesh", "task_axis", "steps_per_dispatch", "chunk", "log"}
  assert set(omniglot_maml.get_config()) == set(fewshot.SETTINGS) | free


def test_the_saved_model_is_pruned(pruned):
  workdir, result = pruned
  with np.load(workdir / "meta_model.npz") as model, np.load(workdir / "mask.npz") as mask:
    kernels = [name for name in mask if name.endswith("kernel")]
    for name in kernels:
      assert not model[name][mask[name] == 0].any()
      assert result["sparsity_by_layer"][name] == pytest.approx(1 - mask[name].mean(), abs=1e-6)
    head = "backbone/output/kernel"
    assert mask[head].all()  # 0.6 of the other kernels
    removed = 1 - sum(mask[name].sum() for name in kernels if name != head) / sum(mask[name].size for name in kernels if name != head)
  assert removed == pytest.approx(result["sparsity"], abs=1e-6)
  assert result["parameters"]["effective"] <= result["parameters"]["kept"] < result["parameters"]["all"]


_slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  "fields",
  [
    _slow({"learner": "anil", "train_queries": 6}),
    {"learner": "reptile", "prune": {"score": "magnitude", "sparsity": 0.25, "scope": "layer", "granularity": "channel"}},
    _slow(
      {
        "learner": "anil",
        "train_queries": 6,
        "gated_layers": ("conv3",),
        "personalizer": "two_stage",
        "adapt_steps": 3,
        "gate_adapt_lr": 1.0,
        "prune": {"score": "anp", "sparsity": 0.3},
      }
    ),
    _slow({"personalizer": "metasnip_weight", "target_sparsity": 0.3, "adapt_steps": 3}),
    _slow({"derivative": "first_order"}),
    _slow({"learn_rates": True, "prune": {"score": "snip", "sparsity": 0.3, "granularity": "channel"}}),
    _slow({"prune": {"score": "magnitude", "sparsity": 0.3, "schedule": "one_shot", "head": True}}),
    _slow({"prune": {"score": "random", "sparsity": 0.3, "schedule": "linear"}}),
  ],
)
def test_learners_and_scores(splits, tmp_path, fields):
  result = run(small(**{"steps": 20, **fields}), tmp_path / "run", splits, quiet=True)
  assert result["accuracy"]["mean"] > result["accuracy_before_adaptation"]["mean"] + 0.05
  assert (result["sparsity"] > 0.1) == ("prune" in fields)
  if fields.get("prune", {}).get("scope") == "layer":  # of four filters one goes, and with it all that reads it
    left = jax.eval_shape(mg.nn.FewShotConvNet(3, (3, 3, 3, 3)).init, jax.random.key(0), jnp.ones((1, 16, 16, 1)))
    assert result["sparsity"] == 0.25
    assert result["parameters"]["effective"] == sum(x.size for x in jax.tree.leaves(left)) < result["parameters"]["kept"]
    macs = [mg.nn.dense_cost(mg.nn.network_layers(mg.nn.FewShotConvNet(3, (width,) * 4), (16, 16, 1)))[0] for width in (4, 3)]
    assert result["macs"] == {"dense": macs[0], "effective": macs[1]}


def test_evaluation_is_compiled_once_for_all_masks(splits):
  """A mask is an argument of the program, not a constant in it."""
  experiment = fewshot.FewShot(check_config(small(prune={"score": "magnitude", "sparsity": 0.5})), splits)
  state, accuracies = experiment.init(), []
  for sparsity in (0.0, 0.9):
    mask = mg.make_mask(mg.pruning.magnitude()(state.params), sparsity)
    pruned = state._replace(params=mg.pruning.apply_mask(state.params, mask), optimizer=state.optimizer._replace(mask=mask))
    compiled = experiment.clock.seconds["compile"]
    accuracies.append(experiment.evaluate(pruned, "test", 20)[1].mean())
  assert experiment.clock.seconds["compile"] == compiled > 0
  assert accuracies[0] != accuracies[1]
  with pytest.raises(TypeError, match="unhashable"):
    Compiled(experiment.clock, "train", lambda x: x)(x=jnp.ones(2))


@pytest.mark.slow
def test_test_classes_are_never_seen_in_training(splits, tmp_path, monkeypatch):
  """Training gets the train pool and nothing else: with NaN in all other images it is the same training."""
  poisoned = {split: pool if split == "train" else pool._replace(images=pool.images * np.nan) for split, pool in splits.items()}
  results = []
  for i, pools in enumerate((splits, poisoned)):
    run(small(steps=20), tmp_path / str(i), pools, quiet=True)
    with np.load(tmp_path / str(i) / "meta_model.npz") as model:
      results.append(dict(model))
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_omniglot_is_split_by_character(tmp_path, monkeypatch):
  """A character's turns are all in its split."""
  images = np.random.default_rng(0).integers(0, 256, (80, 28, 28, 1), np.uint8)
  labels, alphabets = np.repeat(np.arange(40), 2), np.repeat([0, 1], 40)
  monkeypatch.setattr(registry, "load_omniglot", lambda data_dir: (images, labels, alphabets, ["Greek", "Latin"]))
  config = omniglot_maml.get_config()
  config.alphabets = ()
  pools = fewshot.load_splits(config)
  assert {split: pool.count.shape[0] for split, pool in pools.items()} == {"train": 104, "validation": 16, "test": 40}
  bytes_of = lambda pool: {np.asarray(image).tobytes() for image in pool.images}
  turned = lambda pool: set().union(*(bytes_of(pool._replace(images=np.rot90(pool.images, r, (1, 2)))) for r in range(4)))
  assert not turned(pools["train"]) & bytes_of(pools["test"])
  config.alphabets = ("Greek",)
  assert fewshot.load_splits(config)["train"].count.shape[0] == 52
  config.alphabets = ("Klingon",)
  with pytest.raises(ConfigError, match="Klingon not in this Omniglot, which has Greek, Latin"):
    fewshot.load_splits(config)


@pytest.mark.parametrize("steps", [40, 200, 10_000])
def test_pruning_is_gradual_however_short_the_training(steps):
  prune = pruning_fields()
  prune.update(score="anp", sparsity=0.85)
  schedule = registry.pruning_schedule(prune, steps)
  due = [step for step in range(steps) if schedule.due(step)]
  assert due[0] == steps // 2 and due[-1] == 3 * steps // 4 and 10 <= len(due) <= 12
  levels = [float(schedule.sparsity(step)) for step in due]
  assert np.diff(levels).max() < 0.3 and levels[-1] == pytest.approx(0.85)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"ways": 9}, "ways=9.*9 ways are more than the 8 classes"),
    ({"shots": 7}, "shots=7 and queries=4 need 11 samples of each class, but a class has 10"),
    ({"train_queries": 12}, "train_queries=12: shots=1 and queries=12 need 13 samples"),
    ({"prune": {"average": "mean"}}, "unknown prune.average 'mean'"),
    ({"prune": {"score": "anp", "sparsity": 1.0}}, r"prune.sparsity must lie in \[0, 1\), got 1.0"),
    ({"prune": {"sparsity": 0.5}}, "prune.score is none"),
    ({"prune": {"score": "amp", "sparsity": 0.5}}, "unknown prune.score 'amp'. Did you mean 'anp'"),
    ({"learner": "mmal"}, "unknown learner 'mmal'. Did you mean 'maml'"),
    ({"prune": {"begin": 0.9, "end": 0.5}}, "0 <= begin < end <= 1, got 0.9 and 0.5"),
    ({"learner": "reptile", "learn_rates": True}, "learn_rates is for maml and anil"),
    ({"model": "resnet"}, "unknown model 'resnet'. Did you mean 'resnet12'"),
    ({"personalizer": "two_stag"}, "unknown personalizer 'two_stag'. Did you mean 'two_stage'"),
    ({"personalizer": "two_stage"}, "adapts gates, but this model has none"),
    ({"personalizer": "metasnip_channel", "target_sparsity": 0.5}, "none of the leaves is prunable"),
    ({"dataset": "cifar"}, "unknown dataset 'cifar'. Did you mean 'cifarfs'"),
  ],
)
def test_bad_input(splits, tmp_path, fields, message):
  config = small()
  config.prune.update(fields.pop("prune", {}))
  config.update(fields)
  with pytest.raises(ConfigError, match=message):
    run(config, tmp_path / "run", splits, quiet=True)
  assert not (tmp_path / "run").exists()

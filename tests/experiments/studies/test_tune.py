"""Tuning: its points, its budget, what it measures on, and that configs read what it wrote."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import call

import metagater_jax as mg
from configs import digits
from experiments.config import ConfigError, registry
from experiments.config import federated as config_module
from experiments.config.federated import check_config
from experiments.config.fields import TUNED
from experiments.runs.federated import load, make_tasks
from experiments.studies import tune
from experiments.tune import main


@pytest.mark.parametrize("count", [1, 4, 7])
def test_points_fill_the_space_evenly(count):
  space = {"a": (0.01, 1.0), "b": (2.0, 8.0)}
  chosen = tune.points(space, count)
  assert len(chosen) == count and chosen == tune.points(space, count)
  assert all(0.0099 <= p["a"] <= 1.01 and 1.99 <= p["b"] <= 8.01 for p in chosen)
  if count == 4:  # one in each quarter of every setting's logarithm
    for name, (low, high) in space.items():
      quarter = [int(4 * np.log(p[name] / low) / np.log(high / low)) for p in chosen]
      assert sorted(quarter) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def small_config():
  c = digits.get_config()
  c.tuning_fraction = 0.5
  c.update(model="mlp", widths=(8,), gated_layers=(), rounds=8, validation_tasks=3, algorithm="fedavg")
  return c


@pytest.mark.slow
def test_a_trial_is_a_training_at_these_settings_measured_on_validation_tasks(small_config):
  c = check_config(small_config)
  tuner = tune.Tuner(c, [7])
  settings = {"local_lr": 0.3}
  (quarter, *_), (half, *_), (rounds, models, accuracies, own) = tuner.trial(settings)
  assert (quarter, half, rounds, own) == (2, 4, 8, {})
  # The same by hand: train at these settings, adapt each validation task at one of the rates, test.
  c.seed, c.local_lr, c.adapt_lr = 7, 0.3, tuner.rates[5]
  data = load(c)
  tasks = make_tasks(c, data, tuning=True)
  assert not set(tasks.validation) & (set(tasks.training) | set(tasks.target)) and len(tasks.validation) == 3
  network = registry.make_network(c, data.classes)
  algorithm = registry.make_algorithm(c, network)
  population = mg.make_population(data.images, data.labels, tasks.partition, (c.pixel_mean, c.pixel_std))
  init_key, run_key = jax.random.split(jax.random.key(7))
  state = mg.federated_init(algorithm, network.init(init_key, (8, 8, 1)), run_key)
  state, _ = mg.run_rounds(algorithm, state, population, jnp.asarray(tasks.training), rounds=8, cohort=5, batch_size=20)
  model = algorithm.deploy(state.server)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), models[0].params, model.params)
  expected = np.mean(
    [
      float(mg.evaluate_task(network, registry.make_personalizer(c, network).adapt(model, population.train(task)), population.test(task)).accuracy)
      for task in tasks.validation
    ]
  )
  assert float(accuracies[5]) == pytest.approx(expected, abs=0.02)
  assert accuracies.shape == (len(tuner.rates),)
  # No image of it is in any task of a run of any seed.
  images = lambda partition: set(np.concatenate([*partition.train, *partition.test]))
  for seed in (0, 7, 11):
    c.seed = seed
    assert not images(tasks.partition) & images(make_tasks(c, data).partition)


def test_every_method_gets_the_same_budget(small_config):
  names = ["fedavg", "per_fedavg", "metagater_ungated"]
  entries = [
    tune.tune_method(small_config, name, local_steps=1, seeds=[7], trials=5, rates=tune.adaptation_rates(4), report=lambda line: None)[0]
    for name in names
  ]
  assert [entry["algorithm"] for entry in entries] == ["fedavg", "per_fedavg", "metagater"]
  assert {(e["meta_trainings"], e["adaptation_rates"], e["rounds"], e["validation_tasks"]) for e in entries} == {(5, 4, 8, 3)}
  for name, entry in zip(names, entries):
    assert len(entry["trials"]) == 5
    best = max(entry["trials"], key=lambda trial: trial["accuracy"])
    assert entry["validation_accuracy"] == best["accuracy"]
    assert entry["settings"] == {key: value for key, value in best.items() if key not in ("accuracy", "accuracies")}
    for trial in entry["trials"]:  # the first look that is within half a point of the best
      looks = {int(rounds): accuracy for rounds, accuracy in trial["accuracies"].items()}
      assert list(looks) == [2, 4, 8][: len(looks)] and trial["accuracy"] == looks[trial["rounds"]]
      assert trial["rounds"] == next(rounds for rounds, accuracy in looks.items() if accuracy >= max(looks.values()) - 0.005)
    for part, going_on in ((2, 3), (4, 2)):  # after each look the better half
      at = {
        number: max(accuracy for rounds, accuracy in trial["accuracies"].items() if int(rounds) <= part)
        for number, trial in enumerate(entry["trials"])
        if str(part) in trial["accuracies"]
      }
      on = {number for number in at if str(2 * part) in entry["trials"][number]["accuracies"]}
      assert len(on) == going_on and min(at[number] for number in on) >= max(at[number] for number in at if number not in on)
    for name, (low, high) in registry.methods()[name].space.items():
      assert all(0.99 * low <= trial[name] <= 1.01 * high for trial in entry["trials"])


def test_configs_read_what_was_tuned(tmp_path, monkeypatch):
  monkeypatch.setattr(config_module, "TUNED", tmp_path)
  entry = lambda algorithm, gated, steps, **settings: {"algorithm": algorithm, "gated": gated, "local_steps": steps, "settings": settings}
  tune.merge(tmp_path / "mine.json", "mine", [entry("fedavg", False, 1, local_lr=0.7), entry("metagater", True, 1, beta=0.011)])
  tune.merge(tmp_path / "mine.json", "mine", [entry("fedavg", False, 4, local_lr=0.4), entry("metagater", True, 1, beta=0.012)])
  assert len(json.loads((tmp_path / "mine.json").read_text())["methods"]) == 3
  c = digits.get_config()
  c.tuning_fraction = 0.5
  c.tuned = "mine"
  checked = check_config(c)
  assert checked.beta == 0.012 and checked.local_lr == registry.ALGORITHMS["metagater"].settings["local_lr"]  # the rest: defaults
  c.update(algorithm="fedavg")
  assert check_config(c).gated is False
  assert [settings_of_steps(c, k) for k in (1, 2, 3, 9)] == [0.7, 0.7, 0.4, 0.4]  # the nearest number of local steps
  c.update(local_lr=0.01)
  assert check_config(c).local_lr == 0.01  # what the user says wins
  c.update(tuned="mime")
  with pytest.raises(ConfigError, match="unknown tuned 'mime'. Did you mean 'mine'"):
    check_config(c)


def settings_of_steps(c, steps):
  c = c.copy_and_resolve_references()
  c.update(local_steps=steps)
  return check_config(c).local_lr


def test_committed_settings_are_of_equal_budget():
  for path in TUNED.glob("*.json"):
    methods = json.loads(path.read_text())["methods"]
    for steps in {entry["local_steps"] for entry in methods}:
      budgets = {
        (e["meta_trainings"], e["adaptation_rates"], e["rounds"], e["validation_tasks"], tuple(e["seeds"]))
        for e in methods
        if e["local_steps"] == steps
      }
      assert len(budgets) == 1, (path.name, steps, budgets)
      assert not {*range(1, 6), *range(11, 16), *range(21, 41)} & {seed for budget in budgets for seed in budget[-1]}  # the seeds of the tables


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--protocols=cifar11"], "unknown protocol 'cifar11'. Did you mean 'cifar10"),
    (["--methods=fedavrg"], "unknown method 'fedavrg'. Did you mean 'fedavg'"),
    (["--trials=0"], "trials must be at least 1, got 0"),
    (["--protocols=mnist", "--data_dir=tests"], "'mnist' is not in the data directory tests"),
  ],
)
def test_bad_input(arguments, message):
  outcome = call(main, *arguments)
  assert outcome.status == 2 and message in outcome.err and outcome.err.startswith("experiments.tune: ")


def test_what_is_tuned_is_not_tuned_again(small_config, tmp_path):
  lines = []
  call_it = lambda **changes: tune.reproduce(
    tmp_path / "w",
    tmp_path / "out",
    {"digits": small_config},
    **(dict(methods=["fedavg"], seeds=[7], trials=1, rates=(0.1,), log=lines.append) | changes),
  )
  call_it()
  first, text = len(lines), (tmp_path / "out" / "digits.json").read_text()
  (tmp_path / "out" / "digits.json").unlink()
  call_it()
  assert len(lines) == first > 0 and (tmp_path / "out" / "digits.json").read_text() == text
  with pytest.raises(ConfigError, match="digits-fedavg-k1.json holds a run of another configuration: trials is 1 there and 2 here"):
    call_it(trials=2)


def test_a_gates_own_rate_is_chosen_on_every_meta_model(tmp_path):
  c = digits.get_config()
  c.tuning_fraction = 0.5
  c.update(widths=(4, 4, 8), rounds=2, validation_tasks=3)
  entries = tune.tune_method(c, "metagater", local_steps=1, seeds=[7], trials=1, rates=(0.02, 0.1), report=lambda line: None)
  name, values = registry.PERSONALIZERS["two_stage"].grid
  assert name == "gate_adapt_lr" and entries[0]["settings"][name] in values
  assert {"gate_rate", "penalty_weight", "rounds"} <= entries[0]["settings"].keys()


def test_several_local_steps_are_searched_with_the_pull():
  method = registry.methods()["metagater_ungated"]
  assert "prox_weight" not in tune.space_of(method, 1) and {"prox_weight", "beta", "local_lr"} == tune.space_of(method, 2).keys()

"""`python -m benchmarks.tuning --data_dir=DIR`: how `experiments.tune` should search: Optuna, or points fixed beforehand.

For methods of the MNIST protocol, each with the same number of meta-trainings: Optuna's TPE sampler, a Sobol sequence one
point after the other, and the same sequence as one `vmap`. What each finds is measured again on populations that the search
has not seen, and the seconds it took include compilation. Optuna is the extra `benchmark`.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import registry
from experiments.studies.protocols import protocol_config
from experiments.studies.tune import Tuner, method_config, points

__all__ = ["main"]

SEARCH, FRESH = (100, 101, 102), (200, 201, 202, 203, 204)
ROUNDS = 200


def main() -> None:
  """Prints a line per search and, with --out, writes the figures as JSON."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--methods", default="fedavg,per_fedavg,metagater_ungated,pfedme")
  parser.add_argument("--trials", type=int, default=16)
  parser.add_argument("--data_dir")
  parser.add_argument("--out", type=Path)
  options = parser.parse_args()
  figures = {"trials": options.trials, "machine": {"jax": jax.__version__, "backend": jax.default_backend()}}
  for name in options.methods.split(","):
    config = method_config(protocol_config("mnist", options.data_dir, ROUNDS), name, local_steps=1)
    space = registry.methods()[name].space
    fresh = Tuner(config, FRESH)
    figures[name] = {}
    for search in (_optuna, _sobol, _sobol_vmap):
      start = time.perf_counter()
      try:
        settings, rate, accuracy = search(Tuner(config, SEARCH), space, options.trials)
      except ImportError:
        print("Optuna is not installed (pip install -e '.[benchmark]'): it is left out.")
        continue
      seconds = time.perf_counter() - start
      unseen = float(_trial(fresh, settings)[rate])
      figures[name][search.__name__.strip("_")] = {
        "found": accuracy,
        "on unseen populations": unseen,
        "seconds": seconds,
        "settings": settings | {"adapt_lr": fresh.rates[rate]},
      }
      print(
        f"{name:<18} {search.__name__.strip('_'):<11} found {100 * accuracy:.2f} %, on unseen populations {100 * unseen:.2f} %, {seconds:.1f} s",
        flush=True,
      )
  if options.out:
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


def _best(trials):
  settings, accuracies = max(trials, key=lambda trial: trial[1].max())
  return settings, int(accuracies.argmax()), float(accuracies.max())


def _trial(tuner, settings):
  ((_, _, accuracies, _),) = tuner.trial(settings, looks=1)
  return accuracies


def _sobol(tuner, space, trials):
  return _best([(settings, _trial(tuner, settings)) for settings in points(space, trials)])


def _sobol_vmap(tuner, space, trials):
  chosen = points(space, trials)
  together = {name: jnp.array([settings[name] for settings in chosen]) for name in space}

  def one(settings, seed, population, training, validation):
    model = tuner._rounds(settings, tuner._init(settings, seed), population, training, tuner.config.rounds)[1]
    return tuner._accuracies(model, population, validation, settings, jnp.asarray(tuner.rates), tuner.config.personalizer)

  every = jax.jit(jax.vmap(one, in_axes=(0, None, None, None, None)))
  accuracies = np.mean(
    [
      np.asarray(every(together, jnp.asarray(seed), population, jnp.asarray(tasks.training), jnp.asarray(tasks.validation)))
      for (seed, tasks), population in zip(tuner.tasks, tuner.populations)
    ],
    axis=0,
  )
  return _best(list(zip(chosen, np.nan_to_num(accuracies))))


def _optuna(tuner, space, trials):
  import optuna

  optuna.logging.set_verbosity(optuna.logging.WARNING)
  done = []

  def objective(trial):
    settings = {name: trial.suggest_float(name, low, high, log=True) for name, (low, high) in space.items()}
    done.append((settings, _trial(tuner, settings)))
    return done[-1][1].max()

  optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0)).optimize(objective, n_trials=trials)
  return _best(done)


if __name__ == "__main__":
  main()

"""`python -m experiments.sparsity_curve --run=runs/mine`: accuracy against sparsity of one meta-model, by the knob.

The meta-model of a gated run is not trained again: for each wanted sparsity the threshold of stage I is calibrated on
training tasks, the target tasks adapt with it, and what they reach is measured. Several runs (seeds) become a mean.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import metagater_jax as mg
from experiments import registry, reporting
from experiments.config import ConfigError, base_config
from experiments.training import load, load_parameters, make_tasks

__all__ = ["curve_of_run", "main"]

_RUNS = flags.DEFINE_list("run", None, "Workdirs of gated runs of one config, separated by commas.")
_TARGETS = flags.DEFINE_list("sparsities", ["0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8"],
                             "Wanted mean sparsities.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data is, if not where the runs found it.")
_OUT = flags.DEFINE_string("out", "sparsity_curve", "Files to write: OUT.json and OUT.png.")


def curve_of_run(run: str | Path, sparsities: Sequence[float], data_dir: str | None = None) -> list[dict[str, Any]]:
  """Per wanted sparsity: κ, and accuracy, sparsity, MACs and parameters of the target tasks.

  Raises:
    ConfigError: a workdir that holds no finished run, or one without gates.
  """
  run = Path(run)
  if not (run / "result.json").is_file():
    raise ConfigError(f"{run} holds no finished run (there is no result.json).")
  config = base_config()
  config.update(json.loads((run / "config.json").read_text()))
  if not config.gated:
    raise ConfigError(f"the run in {run} has no gates, so there is no sparsity to set.")
  config.data_dir = data_dir or config.data_dir
  dataset = load(config)
  tasks = make_tasks(config, dataset)
  population = mg.make_population(dataset.images, np.asarray(dataset.labels), tasks.partition,
                                  (config.pixel_mean, config.pixel_std))
  network = registry.make_network(config, dataset.classes)
  params = jax.tree.map(jnp.asarray, load_parameters(run / "meta_model.npz")[0])
  loss = mg.classification_loss(network)
  calibration_tasks = jnp.asarray(tasks.calibration(config.calibration_tasks))
  rates = dict(steps=config.adapt_steps, chunk=config.chunk)

  def stage_one(params, data):
    return mg.adapt_gate(loss, params, data, lr=config.gate_adapt_lr, **rates)

  @jax.jit
  def measure(wanted, params, population, tasks, targets):
    kappa = mg.calibrate_threshold(network, params, stage_one, population.train, tasks, wanted, samples=config.chunk,
                                   task_axis=registry.evaluation_axis(config))
    adapt = lambda params, data: mg.two_stage_adaptation(
        loss, params, data, gate_lr=config.gate_adapt_lr, backbone_lr=config.adapt_lr, threshold=kappa, **rates)
    return kappa, mg.evaluate_targets(network, adapt, params, population, targets, chunk=config.chunk,
                                      task_axis=registry.evaluation_axis(config))[1]

  points = []
  for wanted in sparsities:
    kappa, after = jax.device_get(measure(wanted, params, population, calibration_tasks, jnp.asarray(tasks.target)))
    points.append({"wanted": wanted, "threshold": float(kappa), "seed": config.seed,
                   "accuracy": reporting.summary(after.accuracy), "sparsity": reporting.summary(after.sparsity),
                   "macs": float(after.macs.mean()), "parameters": float(after.parameters.mean())})
    print(f"{run}: wanted {wanted:.2f}, sparsity {after.sparsity.mean():.3f} ± {after.sparsity.std():.3f} over tasks, "
          f"accuracy {after.accuracy.mean():.4f}", flush=True)
  return points


def main(_) -> None:
  """The command."""
  logging.set_verbosity(logging.WARNING)
  try:
    sparsities = [float(value) for value in _TARGETS.value]
    if not all(0 <= value < 1 for value in sparsities):
      raise ConfigError(f"sparsities must lie in [0, 1), got {_TARGETS.value}.")
    curves = [curve_of_run(run, sparsities, _DATA_DIR.value) for run in _RUNS.value]
    name = json.loads((Path(_RUNS.value[0]) / "config.json").read_text())["name"]
  except (ConfigError, ValueError) as error:
    raise SystemExit(f"experiments.sparsity_curve: {error}") from error
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  reporting.write_json(out.with_suffix(".json"), curves)
  reporting.plot_sparsity_curve(out.with_suffix(".png"), curves,
                                f"{name}: {len(curves)} seed{'s' if len(curves) > 1 else ''}")
  print(f"{out.with_suffix('.json')}, {out.with_suffix('.png')}")


if __name__ == "__main__":
  flags.mark_flag_as_required("run")
  app.run(main)

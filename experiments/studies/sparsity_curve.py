"""Accuracy against sparsity of one meta-model, by the knob `target_sparsity`.

The meta-model of a gated run is not trained again: for each wanted sparsity the target tasks adapt with it, in one of the ways of
`personalize.two_stage` to reach it, and what they reach is measured.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metagater_jax as mg
from experiments.config import ConfigError, base_config, registry
from experiments.config.fields import check_known
from experiments.runs.federated import load, make_tasks
from experiments.runs.measures import spread
from experiments.runs.records import load_model, read_config, read_result, summary

__all__ = ["curve_of_run"]


def curve_of_run(
  run: str | Path, sparsities: Sequence[float], data_dir: str | None = None, log: Callable[[str], None] = print, *, by: str | None = None
) -> list[dict[str, Any]]:
  """Per wanted sparsity: accuracy, sparsity, MACs and parameters of the target tasks, and κ where there is one.

  Args:
    run: workdir of a finished run with gates.
    sparsities: wanted means, in [0, 1).
    data_dir: where the data is, if not where the run found it.
    log: gets a line per sparsity.
    by: how a sparsity is reached, one of `personalize.SPARSITY_BY`; None: as the run's config says.

  Raises:
    ConfigError: sparsities outside [0, 1), or a workdir that holds no finished run, or one without gates.
  """
  if not all(0 <= value < 1 for value in sparsities):
    raise ConfigError(f"sparsities must lie in [0, 1), got {', '.join(map(str, sparsities))}.")
  read_result(run)
  config = base_config()
  config.update(read_config(run))
  if not config.gated:
    raise ConfigError(f"the run in {run} has no gates, so there is no sparsity to set.")
  if config.personalizer is None:  # a record from before there was a choice
    config.personalizer = registry.default_personalizer(config.algorithm, config.gated)
  config.data_dir = data_dir or config.data_dir
  config.sparsity_by = by or config.sparsity_by
  check_known("sparsity_by", config.sparsity_by, mg.personalize.SPARSITY_BY)
  dataset = load(config)
  tasks = make_tasks(config, dataset)
  population = mg.make_population(
    dataset.images, np.asarray(dataset.labels), tasks.partition, (config.pixel_mean, config.pixel_std), classes=dataset.classes
  )
  network = registry.make_network(config, dataset.classes)
  model = jax.tree.map(jnp.asarray, load_model(run)[0])
  calibration_tasks = jnp.asarray(tasks.calibration(config.calibration_tasks))

  @jax.jit
  def measure(wanted, model, population, tasks, targets):
    personalizer = registry.make_personalizer(config, network, target_sparsity=wanted)
    kappa = personalizer.calibrate(model, population, tasks)
    return kappa, mg.evaluate_targets(
      network, personalizer, model, population, targets, kappa, chunk=config.chunk, task_axis=registry.evaluation_axis(config, network)
    )[1]

  points = []
  for wanted in sparsities:
    kappa, after = jax.device_get(measure(wanted, model, population, calibration_tasks, jnp.asarray(tasks.target)))
    points.append(
      {
        "wanted": wanted,
        "by": config.sparsity_by,
        "threshold": None if kappa is None else float(kappa),
        "seed": config.seed,
        "accuracy": summary(after.accuracy),
        "sparsity": summary(after.sparsity),
        "macs": float(after.macs.mean()),
        "parameters": float(after.parameters.mean()),
        "conditional": float(np.mean(mg.personalize.conditional(after.on_rate))),
      }
    )
    log(
      f"{run}: wanted {wanted:.2f} by {config.sparsity_by}, sparsity {after.sparsity.mean():.3f} ± {spread(after.sparsity) or 0:.3f} over tasks, "
      f"accuracy {after.accuracy.mean():.4f}"
    )
  return points

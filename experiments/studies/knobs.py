"""Which knob matters: how a new person's accuracy and sparsity answer to one setting of MetaGater at a time, all others as they were tuned.

On human activity, people as tasks: real data, and a training takes seconds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import har
from experiments.config import ConfigError, base_config
from experiments.config.federated import check_config
from experiments.config.fields import check_known, with_fields
from experiments.runs import placement
from experiments.runs.federated import load, run_seeds
from experiments.runs.records import DivergedError, make_folder, read_result
from experiments.studies.paper import accuracy_line
from experiments.studies.study import Part, carry_out, check_rounds, check_seeds
from metagater_jax.data.datasets import Dataset

__all__ = ["KNOBS", "reproduce"]


class Knob(NamedTuple):
  """A setting that is changed.

  Attributes:
    field: of the config.
    label: what a reader sees.
    factors: of the tuned value.
    values: instead, where there is no tuned one or it may be 0.
    scale: factors of other fields that it is changed with.
    fields: other fields that it is changed with.
  """

  field: str
  label: str
  factors: tuple[float, ...] = (0.125, 0.25, 0.5, 1, 2, 4, 8)
  values: tuple[Any, ...] = ()
  scale: Mapping[str, float] = {}
  fields: Mapping[str, Any] = {}


KNOBS = {
  "local_lr": Knob("local_lr", "local rate η"),
  "beta": Knob("beta", "server's step β"),
  # With one local step λ is the same knob as η: only their product counts. So it is changed with five steps, of a fifth of the rate.
  "prox_weight": Knob("prox_weight", "proximal weight λ, five local steps", scale={"local_lr": 0.2}, fields={"local_steps": 5}),
  "penalty_weight": Knob("penalty_weight", "weight of the Group Lasso", factors=(0.125, 0.25, 0.5, 1, 2, 4, 8, 64, 512)),
  "gate_initial_log_odds": Knob("gate_initial_log_odds", "gate's log-odds at the start", factors=(), values=(0.0, 0.5, 1.0, 2.0)),
  "gate_rate": Knob("gate_rate", "gate's rate, relative to the backbone's"),
  "adapt_lr": Knob("adapt_lr", "rate of the filters' step at a target"),
  "gate_adapt_lr": Knob("gate_adapt_lr", "rate of the gate's step at a target"),
  "target_sparsity": Knob("target_sparsity", "sparsity that is asked for", factors=(), values=(None, 0.1, 0.3, 0.5, 0.7, 0.9)),
}


def reproduce(
  workdir: str | Path,
  *,
  knobs: Sequence[str] = tuple(KNOBS),
  seeds: Sequence[int] = tuple(range(61, 66)),
  rounds: int | None = None,
  data_dir: str | None = None,
  dataset: Dataset | None = None,
  log=print,
) -> dict[str, Any]:
  """Runs what is not yet recorded.

  Args:
    workdir: holds the runs, a folder per setting and seed.
    knobs: names in `KNOBS`.
    seeds: of the partitions and runs; the same for all settings, so that differences are paired.
    rounds: instead of the tuned number.
    data_dir: where the data is.
    dataset: to use instead of it.
    log: gets a line per setting.

  Returns:
    `seeds`, `rounds`, and by knob its label and its settings, each with its value, its factor of the tuned one (None: values are given), whether it
    is that, and by seed accuracy and sparsity of the adapted targets (None where the run diverged).

  Raises:
    ConfigError: before anything runs: an unknown knob, no seeds, missing data, or runs of another configuration. At the end: runs that failed
      otherwise than by diverging.
  """
  for name in knobs:
    check_known("knob", name, KNOBS)
  check_seeds(seeds)
  check_rounds(rounds)
  workdir, base = Path(workdir), har.get_config()
  placement.use_cores(base)
  base.update(data_dir=data_dir, gated=True, rounds=rounds)
  tuned = check_config(base)
  tuned.eval_every = tuned.rounds
  settings = {name: _settings(name, tuned) for name in knobs}
  configs = {setting.folder: setting.config for own in settings.values() for setting in own}
  dataset = load(tuned) if dataset is None else dataset
  part = lambda folder, seed: Part(
    workdir / folder / f"seed-{seed}" / "result.json", with_fields(configs[folder], seed=seed), seed=seed, complete=_is_known
  )
  groups = {folder: [part(folder, seed) for seed in seeds] for folder in configs}

  def run(folder, parts):
    found = run_seeds(configs[folder], {part.seed: part.record.parent for part in parts}, dataset, quiet=True)
    return {part.record: found[part.seed] for part in parts}

  make_folder(workdir)
  carry_out(groups, run, defaults=base_config(), line=accuracy_line, log=log, keep_going=True)
  if failed := [part.record.parent for parts in groups.values() for part in parts if not part.finished]:
    raise ConfigError(
      f"{len(failed)} of the runs failed and did not diverge; why is in failure.json, first of {failed[0]}. The same command tries again."
    )
  found: dict[str, Any] = {"seeds": list(seeds), "rounds": tuned.rounds, "knobs": {}}
  for name, own in settings.items():
    rows = []
    for setting in own:
      results = {seed: _result(workdir / setting.folder / f"seed-{seed}") for seed in seeds}
      means = {what: {str(seed): result and result[what]["mean"] for seed, result in results.items()} for what in ("accuracy", "sparsity")}
      tuned_value = setting.factor == 1 or setting.folder == _TUNED
      rows.append({"factor": setting.factor, "value": setting.value, "tuned": tuned_value} | means)
    found["knobs"][name] = {"label": KNOBS[name].label, "rows": rows}
  return found


# The folder of the one setting that all knobs share.
_TUNED = "tuned"


class _Setting(NamedTuple):
  factor: float | None
  value: Any
  folder: str
  config: ConfigDict


def _settings(name: str, tuned: ConfigDict) -> list[_Setting]:
  """A knob's settings; that of the tuned value has one folder for all knobs."""
  knob, found = KNOBS[name], []
  others = {field: factor * tuned[field] for field, factor in knob.scale.items()} | dict(knob.fields)
  factors = {value: None for value in knob.values} or {factor * tuned[knob.field]: factor for factor in knob.factors}
  for value, factor in factors.items():
    folder = _TUNED if value == tuned[knob.field] and not others else f"{name}-{value:.4g}"
    found.append(_Setting(factor, value, folder, check_config(with_fields(tuned, **others, **{knob.field: value}))))
  return found


def _is_known(record: Path) -> bool:
  """Whether a run is finished, or is known to diverge: it would again."""
  failure = record.with_name("failure.json")
  return record.is_file() or (failure.is_file() and json.loads(failure.read_text(encoding="utf-8"))["error"].startswith(DivergedError.__name__))


def _result(folder: Path) -> dict[str, Any] | None:
  return read_result(folder) if (folder / "result.json").is_file() else None

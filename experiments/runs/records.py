"""What runs write and read back: records, metric files, models, progress. Everything that a report says comes from here."""

import csv
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments.config import ConfigError
from experiments.runs.measures import spread
from experiments.runs.programs import Clock
from metagater_jax.core.trees import Model, named_leaves

__all__ = ["DivergedError", "MetricsWriter", "Progress", "check_workdir", "load_model", "load_parameters", "model_name", "read_config", "read_metrics", "read_result",
           "save_model", "save_parameters", "summary", "versions", "write_json"]


class DivergedError(ArithmeticError):
  """Meta-training left the finite numbers. The message says what to lower and where the metrics until then are."""


def write_json(path: Path, content: Any, **long: Iterable[Any]) -> None:
  """Writes `content` as JSON, by way of a temporary file: a reader never sees half of it.

  Args:
    path: the file.
    content: a dictionary or list.
    long: more entries of the dictionary, lists that are written item by item and never held (a large partition).
  """
  partial = path.with_suffix(path.suffix + ".partial")
  text = json.dumps(content, indent=1)
  with partial.open("w") as file:
    file.write(text[:-2] if long else text + "\n")
    for name, items in long.items():
      file.write(f",\n {json.dumps(name)}: [")
      for i, item in enumerate(items):
        file.write(("," if i else "") + f"\n  {json.dumps(item)}")
      file.write("\n ]")
    if long:
      file.write("\n}\n")
  partial.replace(path)


def summary(values: np.ndarray) -> dict[str, Any]:
  """Mean, standard deviation over tasks (see `measures.spread`) and the values themselves."""
  values = np.asarray(values, np.float64)
  return {"mean": float(values.mean()), "std": spread(values), "per_task": values.tolist()}


class MetricsWriter:
  """One row per evaluation, to `metrics.jsonl` and `metrics.csv`; each row is on disk when `write` returns."""

  def __init__(self, workdir: Path):
    self._jsonl = workdir / "metrics.jsonl"
    self._csv = workdir / "metrics.csv"

  def write(self, row: dict[str, Any]) -> None:
    """Appends a row; all rows have the same keys."""
    with self._jsonl.open("a") as file:
      file.write(json.dumps(row) + "\n")
    new = not self._csv.exists()
    with self._csv.open("a", newline="") as file:
      writer = csv.DictWriter(file, list(row))
      if new:
        writer.writeheader()
      writer.writerow(row)


class Progress:
  """Rounds (or steps), loss, accuracy, sparsity, rate and time left, on standard error.

  One line that is rewritten on a terminal; elsewhere (a log file) a line per evaluation. The seconds that the clock has for
  compilation count for neither rate nor time left: a run of a few seconds would seem to last as long as its compilation.
  """

  def __init__(self, total: int, quiet: bool, unit: str, clock: Clock):
    self._shown, self._lines = {}, not quiet and not sys.stderr.isatty()
    self._clock, self._compiled = clock, clock.seconds["compile"]
    self._bar = tqdm(total=total, disable=quiet, unit=f" {unit}s", mininterval=0.2, dynamic_ncols=True,
                     file=open(os.devnull, "w") if self._lines else sys.stderr,
                     bar_format=unit + " {n_fmt}/{total_fmt}{postfix} | {rate_noinv_fmt} | {remaining} left")

  def show(self, **values: float | None) -> None:
    """Values to be shown from now on; None leaves one out."""
    self._shown |= {name: f"{value:.3f}" for name, value in values.items() if value is not None}
    self._bar.set_postfix(self._shown, refresh=False)

  def advance(self, count: int, evaluated: bool) -> None:
    """So many more are done; with an evaluation a log file gets its line."""
    compiled = self._clock.seconds["compile"]
    if not self._bar.disable:  # a disabled bar keeps no times
      self._bar.start_t += compiled - self._compiled
      self._bar.last_print_t += compiled - self._compiled
    self._compiled = compiled
    self._bar.update(count)
    if self._lines and evaluated:
      print(self._bar, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Ends the line."""
    self._bar.close()


def save_parameters(path: Path, params: Any, **scalars: Any) -> None:
  """A model as a NumPy archive: one array per parameter, named "gate/conv3/W2", and scalars beside them."""
  np.savez(path, **{name: np.asarray(leaf) for name, leaf in jax.device_get(named_leaves(params)).items()}, **scalars)


def load_parameters(path: str | Path) -> tuple[Any, dict[str, np.ndarray]]:
  """The inverse of `save_parameters`: the parameters, and the scalars."""
  params, scalars = {"backbone": {}, "gate": {}}, {}
  with np.load(path) as archive:
    for name, array in archive.items():
      *folders, last = name.split("/")
      if not folders:
        scalars[last] = array
        continue
      place = params
      for folder in folders:
        place = place.setdefault(folder, {})
      place[last] = array
  return params, scalars


def check_workdir(workdir: Path) -> None:
  """Raises a ConfigError where a run cannot go."""
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f"the workdir {workdir} is a file; give a folder.")
  held = [name for name in ("config.json", "metrics.jsonl", "result.json") if (workdir / name).exists()]
  if held:
    raise ConfigError(f"the workdir {workdir} already holds another run ({', '.join(held)}); give a new folder, or remove "
                      "this one.")


def versions() -> dict[str, Any]:
  """Of what computed a result, and where."""
  try:
    own = importlib.metadata.version("metagater_jax")
  except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
    own = None
  return {"python": platform.python_version(), "jax": jax.__version__, "backend": jax.default_backend(), "metagater_jax": own,
          "processes": jax.process_count()}


def save_model(workdir: Path, model: Model, **scalars: Any) -> None:
  """`meta_model.npz`, and `mask.npz` where the model is pruned."""
  if model.mask is not None:
    save_parameters(workdir / "mask.npz", model.mask)
  save_parameters(workdir / "meta_model.npz", model.params, **scalars)


def load_model(workdir: str | Path) -> tuple[Model, dict[str, np.ndarray]]:
  """The model that a run left, with its mask if it is pruned, and the scalars beside it."""
  workdir = Path(workdir)
  params, scalars = load_parameters(workdir / "meta_model.npz")
  mask = workdir / "mask.npz"
  return Model(params, load_parameters(mask)[0] if mask.is_file() else None), scalars


# Fields of configs by the names that they had in earlier versions.
_RENAMED = {"meta_gradient": "derivative"}


# Few-shot records of earlier versions call their network by the name that another one has.
_RENAMED_MODELS = {"conv4": "fewshot_conv4"}


def model_name(name: str) -> str:
  """Today's name of the network of a few-shot record.

  >>> model_name("conv4")
  'fewshot_conv4'
  """
  return _RENAMED_MODELS.get(name, name)


def read_config(workdir: str | Path) -> dict[str, Any]:
  """The config of a run, in today's names of fields."""
  return {_RENAMED.get(name, name): value for name, value in json.loads((Path(workdir) / "config.json").read_text()).items()}


def read_result(workdir: str | Path) -> dict[str, Any]:
  """The result of a finished run.

  Raises:
    ConfigError: there is none.
  """
  path = Path(workdir) / "result.json"
  if not path.is_file():
    raise ConfigError(f"{workdir} holds no finished run (there is no result.json).")
  return json.loads(path.read_text())


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
  """The rows of a run's metric file, one per evaluation."""
  return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]

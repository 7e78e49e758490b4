"""What runs write and read back: records, metric files, models, progress. Everything that a report says comes from here."""

import csv
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.config import ConfigError
from experiments.config.fields import FREE, check_same
from experiments.runs.measures import spread
from metagater_jax.core.trees import Model, named_leaves

__all__ = [
  "DivergedError",
  "MetricsWriter",
  "NotSavedError",
  "check_workdir",
  "claim",
  "load_model",
  "load_parameters",
  "make_folder",
  "model_name",
  "read_config",
  "read_metrics",
  "read_result",
  "save_model",
  "save_parameters",
  "save_run",
  "summary",
  "versions",
  "write_json",
]


class DivergedError(ArithmeticError):
  """Meta-training left the finite numbers. The message says what to lower and where the metrics until then are."""


class NotSavedError(OSError):
  """A finished run could not be written where it should be. The message says where it is instead."""


def write_json(path: Path, content: Any, **long: Iterable[Any]) -> None:
  """Writes `content` as JSON, by way of a temporary file: a reader never sees half of it.

  Args:
    path: the file.
    content: a dictionary or list.
    long: more entries of the dictionary, lists that are written item by item and never held (a large partition).
  """
  partial = path.with_suffix(path.suffix + ".partial")
  text = json.dumps(content, indent=1)
  try:
    with partial.open("w", encoding="utf-8") as file:
      file.write(text[:-2] if long else text + "\n")
      for name, items in long.items():
        file.write(f",\n {json.dumps(name)}: [")
        for i, item in enumerate(items):
          file.write(("," if i else "") + f"\n  {json.dumps(item)}")
        file.write("\n ]")
      if long:
        file.write("\n}\n")
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def summary(values: np.ndarray) -> dict[str, Any]:
  """Mean, standard deviation over tasks (see `measures.spread`) and the values themselves."""
  values = np.asarray(values, np.float64)
  return {"mean": float(values.mean()), "std": spread(values), "per_task": values.tolist()}


class MetricsWriter:
  """One row per evaluation, to `metrics.jsonl` and `metrics.csv`; each row is on disk when `write` returns, or if the disk is full waits for
  the next, so that training goes on."""

  def __init__(self, workdir: Path):
    self._jsonl = workdir / "metrics.jsonl"
    self._csv = workdir / "metrics.csv"
    self._waiting = {self._jsonl: [], self._csv: []}  # by file, so that none gets a row twice

  def write(self, row: dict[str, Any]) -> None:
    """Appends a row; all rows have the same keys."""
    for path, append in ((self._jsonl, self._append_json), (self._csv, self._append_csv)):
      waiting = self._waiting[path]
      waiting.append(row)
      try:
        while waiting:
          append(waiting[0])
          waiting.pop(0)
      except OSError as error:
        print(f"{path} cannot be written ({error.strerror}); the run goes on and tries again with the next row.", file=sys.stderr, flush=True)

  def _append_json(self, row):
    with self._jsonl.open("a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")

  def _append_csv(self, row):
    new = not self._csv.exists()
    with self._csv.open("a", newline="", encoding="utf-8") as file:
      writer = csv.DictWriter(file, list(row))
      if new:
        writer.writeheader()
      writer.writerow(row)


def save_parameters(path: Path, params: Any, **scalars: Any) -> None:
  """A model as a NumPy archive: one array per parameter, named "gate/conv3/W2", and scalars beside them."""
  partial = path.with_suffix(".partial.npz")
  try:
    np.savez(partial, **{name: np.asarray(leaf) for name, leaf in jax.device_get(named_leaves(params)).items()}, **scalars)
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)  # half of a model is none


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


def make_folder(folder: str | Path, option: str = "workdir") -> Path:
  """A folder that can be written, made if it is missing: before anything long runs.

  Raises:
    ConfigError: it is a file, or cannot be made or written; the message names the option that gives another.
  """
  folder = Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except FileExistsError as error:
    raise ConfigError(f"the {option} {folder} is a file; give a folder.") from error
  except OSError as error:
    raise ConfigError(f"the {option} {folder} cannot be written ({error.strerror}); give another with --{option}=FOLDER.") from error
  return folder


# What a run writes.
_FILES = ("config.json", "partition.json", "metrics.jsonl", "metrics.csv", "meta_model.npz", "mask.npz", "test_episodes.csv", "result.json")
# Says which process is writing into a workdir.
_RUNNING = "running.json"


def check_workdir(workdir: Path, config: ConfigDict | None = None) -> None:
  """Makes the folder of a run; what an interrupted run of the same configuration left in it is removed.

  Args:
    workdir: where a run shall go.
    config: the run's, checked; None: whether what is there is of the same configuration will be asked later.

  Raises:
    ConfigError: a folder that cannot be made or written, that another process is writing, or that holds a finished run or one of another
      configuration.
  """
  make_folder(workdir)
  if (workdir / "result.json").exists():
    raise ConfigError(f"the workdir {workdir} already holds another run (result.json); give a new folder, or remove this one.")
  if (workdir / _RUNNING).is_file():
    other = json.loads((workdir / _RUNNING).read_text(encoding="utf-8"))
    if other["host"] != platform.node() or _is_alive(other["process"]):
      raise ConfigError(
        f"process {other['process']} on {other['host']} is writing into the workdir {workdir}. If it has ended, remove "
        f"{workdir / _RUNNING}; or give a new folder."
      )
  if config is not None and (workdir / "config.json").exists():
    same = lambda fields: {name: value for name, value in fields.items() if name not in FREE}
    check_same(workdir, same(read_config(workdir)), same(json.loads(config.to_json_best_effort())))
    for name in _FILES:
      (workdir / name).unlink(missing_ok=True)


@contextmanager
def claim(*workdirs: Path) -> Iterator[None]:
  """Marks folders as being written by this process, as long as the context lasts."""
  marks = [workdir / _RUNNING for workdir in workdirs]
  try:
    for mark in marks:
      write_json(mark, {"process": os.getpid(), "host": platform.node()})
    yield
  finally:
    for mark in marks:
      mark.unlink(missing_ok=True)
      if mark.parent.is_dir() and not any(mark.parent.iterdir()):  # ended before it began: data that is missing, say
        mark.parent.rmdir()


def _is_alive(process):
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except OSError:  # it is somebody else's
    return True
  return process != os.getpid()


def save_run(workdir: Path, model: Model, result: dict[str, Any], episodes: Mapping[str, np.ndarray] | None = None, **scalars: Any) -> None:
  """The model and then the result of a finished run: a folder that has a result is a finished run. Between them, what was measured on each test
  episode, if it is given.

  Raises:
    NotSavedError: the folder cannot be written any more; the message says where both are instead.
  """

  def save(folder):
    save_model(folder, model, **scalars)
    if episodes is not None:
      np.savetxt(folder / "test_episodes.csv", np.stack(list(episodes.values()), 1), "%.6f", delimiter=",", comments="", header=",".join(episodes))
    write_json(folder / "result.json", result)

  try:
    save(workdir)
  except OSError as error:
    try:
      elsewhere = Path(tempfile.mkdtemp(prefix=f"{workdir.name}-"))
      save(elsewhere)
    except OSError as second:
      raise NotSavedError(
        f"the run has ended, but neither {workdir} ({error.strerror}) nor a temporary folder ({second.strerror}) can be written; its model is lost."
      ) from error
    raise NotSavedError(f"the run has ended, but {workdir} cannot be written ({error.strerror}); its model and result are in {elsewhere}.") from error


def versions() -> dict[str, Any]:
  """Of what computed a result, and where."""
  try:
    own = importlib.metadata.version("metagater_jax")
  except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
    own = None
  return {
    "python": platform.python_version(),
    "jax": jax.__version__,
    "backend": jax.default_backend(),
    "metagater_jax": own,
    "processes": jax.process_count(),
  }


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
# What runs with gates did before there were these fields, where their default is another.
_BEFORE = {"gate_normalize": False, "sparsity_by": "group_norm"}


# Few-shot records of earlier versions call their network by the name that another one has.
_RENAMED_MODELS = {"conv4": "fewshot_conv4"}


def model_name(name: str) -> str:
  """Today's name of the network of a few-shot record.

  >>> model_name("conv4")
  'fewshot_conv4'
  """
  return _RENAMED_MODELS.get(name, name)


def read_config(workdir: str | Path) -> dict[str, Any]:
  """The config of a run, in today's names of fields, with what it had in the place of newer fields whose default is another."""
  held = {_RENAMED.get(name, name): value for name, value in json.loads((Path(workdir) / "config.json").read_text(encoding="utf-8")).items()}
  return (_BEFORE if held.get("gated", held.get("gated_layers")) else {}) | held


def read_result(workdir: str | Path) -> dict[str, Any]:
  """The result of a finished run.

  Raises:
    ConfigError: there is none.
  """
  path = Path(workdir) / "result.json"
  if not path.is_file():
    raise ConfigError(f"{workdir} holds no finished run (there is no result.json).")
  return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
  """The rows of a run's metric file, one per evaluation."""
  return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

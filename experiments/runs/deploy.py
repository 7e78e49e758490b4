"""From a finished run to files for devices: adapt, cut out what a task does not use, export, verify, measure; one task or all."""

import base64
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metagater_jax as mg
from experiments.config import ConfigError, base_config, registry
from experiments.config.fields import check_known
from experiments.runs import records
from experiments.runs.federated import check_same_tasks, load, make_tasks
from experiments.runs.runtimes import READERS, RUNTIMES, interleaved, versions_of
from metagater_jax.core.trees import named_leaves

__all__ = ["FORMATS", "WRITERS", "deploy_run"]

FORMATS = ("tflite", "onnx", "stablehlo")
_DEVICE = Path(__file__).resolve().parents[2] / "examples" / "device"
_SHOWN = 100  # test images at most in a page
_VERIFIED = 256  # test images at most that a file is compared on
_CALIBRATION = 200  # train images at most that the ranges of integers come from
_ROUND_OFF = 1e-4  # of the largest logit


def deploy_run(
  workdir: str | Path,
  tasks: Sequence[int] | None = None,
  *,
  formats: Sequence[str] = ("tflite", "onnx"),
  threshold: float = 0.0,
  always_on: bool = False,
  multiple: int = 8,
  batches: Sequence[int] = (1, 32),
  repeats: int = 200,
  samples: int = 64,
  page: bool = False,
  dense: str | Path | None = None,
  data_dir: str | None = None,
  log: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Writes files and model cards to the folder `deploy` of a run, and `deploy.json` beside its other records.

  Args:
    workdir: of a finished run whose personalizer gives gates or a mask.
    tasks: target tasks by number; None: all.
    formats: some of `FORMATS`.
    threshold: a channel goes that is on for no more than this part of a task's train data.
    always_on: channels that are kept are always on, so that files have no gates.
    multiple: numbers of channels are rounded up to multiples of this.
    batches: sizes that are timed; files are of the first.
    repeats: of each measurement.
    samples: that the file which adapts takes; 0: there is none.
    page: whether each task gets a folder with a web page in which it adapts, with its samples.
    dense: a finished run of the same tasks without gates, whose model, adapted as that run does, the compact networks are compared with: one
      that was tuned for itself. None: the same meta-model fine-tuned at the same rate with all channels on, which was not tuned for that.
    data_dir: where the data is, if not where the run found it.
    log: gets a line per task.

  Returns:
    What deploy.json holds.

  Raises:
    ConfigError: before long work: a run without gates or masks, an unknown task or format, a package that is missing, a dense run of other tasks
      or one that has gates or prunes.
  """
  workdir = Path(workdir)
  records.read_result(workdir)
  for name in formats:
    check_known("format", name, FORMATS)
  if min(repeats, multiple, *batches, 1 if batches else 0) < 1:
    raise ConfigError(f"repeats, multiple and batches must be at least 1, got {repeats}, {multiple} and {list(batches)}.")
  if samples < (1 if page else 0):
    raise ConfigError(f"samples of the file which adapts must be at least 1, or 0 for no such file and no page; got {samples}.")
  config, held = base_config(), records.read_config(workdir)
  if "learner" in held:
    raise ConfigError(
      f"{workdir} is a few-shot run; its tasks are episodes, not devices. metagater_jax.deploy makes files of a network in your own code."
    )
  config.update(held)
  config.personalizer = config.personalizer or registry.default_personalizer(config.algorithm, config.gated)
  config.data_dir = data_dir or config.data_dir
  if not config.gated and not registry.PERSONALIZERS[config.personalizer].prunes:
    raise ConfigError(
      f"the run in {workdir} has no gates, and its personalizer '{config.personalizer}' makes no masks: there is nothing to cut out. "
      "Adapt its meta-model with one that prunes: experiments.run --config.meta_model=RUN --config.personalizer=static_channels "
      "--config.keep=conv3=0.5."
    )
  if registry.PERSONALIZERS[config.personalizer].prunes and "channel" not in config.personalizer:
    raise ConfigError(
      f"personalizer '{config.personalizer}' of the run in {workdir} removes single weights: no channel goes as a whole, so no file "
      "gets smaller or faster. Use one by channel."
    )
  try:
    for name in formats:
      for package in RUNTIMES[name].packages if name in RUNTIMES else ():
        mg.deploy.signature.needs(package)
  except ImportError as error:
    raise ConfigError(str(error)) from error
  dense_config = None if dense is None else _dense_config(config, dense)
  run = _Run(workdir, config, dense, dense_config)
  targets = [int(task) for task in run.tasks.target]
  for task in tasks or ():
    if task not in targets:
      raise ConfigError(f"task {task} is no target task of this run; they are {', '.join(map(str, targets))}.")
  folder = workdir / "deploy"
  folder.mkdir(exist_ok=True)
  options = {
    "threshold": threshold,
    "always_on": always_on,
    "multiple": multiple,
    "batches": list(batches),
    "repeats": repeats,
    "samples": samples,
    "formats": list(formats),
    "page": page,
  }
  found = {}
  for task in tasks or targets:
    start = time.perf_counter()
    found[str(task)] = run.task(task, folder, options)
    log(_line(task, found[str(task)], time.perf_counter() - start))
  content = {
    "run": run.name,
    "seed": config.seed,
    "personalizer": config.personalizer,
    "keep": config.keep,
    "adapt_steps": config.adapt_steps,
    "trained_by": f"{config.algorithm}{', gated' if config.gated else ''}",
    "dense": dense_config and f"{dense_config.algorithm}, {dense_config.adapt_steps} step{'s' if dense_config.adapt_steps > 1 else ''}",
    "options": options,
    "versions": records.versions() | versions_of(formats),
    "tasks": found,
    "mean": _mean(list(found.values())),
  }
  records.write_json(workdir / "deploy.json", content)
  return content


def _dense_config(config, run):
  """The config of the run that dense networks come from."""
  records.read_result(run)
  check_same_tasks(config, run, "dense")
  own = base_config()
  own.update(records.read_config(run))
  own.personalizer = own.personalizer or registry.default_personalizer(own.algorithm, own.gated)
  if own.gated or registry.PERSONALIZERS[own.personalizer].prunes or own.prune.sparsity:
    raise ConfigError(f"dense is {run}, whose networks are not dense: it must be a run without gates and pruning.")
  if (own.pixel_mean, own.pixel_std) != (config.pixel_mean, config.pixel_std):
    raise ConfigError(f"dense is {run}, whose images are scaled in another way than here (pixel_mean, pixel_std).")
  return own


class _Run:
  """A run's data, model and personalizer, and the model that is adapted densely."""

  def __init__(self, workdir, config, dense=None, dense_config=None):
    self.config, self.name = config, config.name
    self.dataset = load(config)
    self.tasks = make_tasks(config, self.dataset)
    self.population = mg.make_population(
      self.dataset.images, np.asarray(self.dataset.labels), self.tasks.partition, (config.pixel_mean, config.pixel_std), classes=self.dataset.classes
    )
    self.shape = tuple(self.dataset.images.shape[1:])
    self.network = registry.make_network(config, self.dataset.classes)
    self.model = jax.tree.map(jnp.asarray, records.load_model(workdir)[0])
    personalizer = registry.make_personalizer(config, self.network)
    self.calibration = jax.jit(personalizer.calibrate)(self.model, self.population, jnp.asarray(self.tasks.calibration(config.calibration_tasks)))
    if dense is None:
      self.plain = dataclasses.replace(self.network, gated_layers=())
      dense_personalizer = mg.fine_tune(mg.classification_loss(self.plain), lr=config.adapt_lr, steps=config.adapt_steps, chunk=config.chunk)
      dense_model = mg.Model({**self.model.params, "gate": {}}, None if self.model.mask is None else {**self.model.mask, "gate": {}})
    else:
      self.plain = registry.make_network(dense_config, self.dataset.classes)
      dense_personalizer = registry.make_personalizer(dense_config, self.plain)
      dense_model = jax.tree.map(jnp.asarray, records.load_model(dense)[0])
    self._adapt = jax.jit(
      lambda task, calibration: (
        personalizer.adapt(self.model, self.population.train(task), calibration),
        dense_personalizer.adapt(dense_model, self.population.train(task)),
      )
    )
    accuracy = lambda network: lambda model, task: mg.evaluate_task(network, model, self.population.test(task), chunk=config.chunk).accuracy
    self._accuracy_gated, self._accuracy_dense = jax.jit(accuracy(self.network)), jax.jit(accuracy(self.plain))

  def task(self, task, folder, options):
    adapted, dense = self._adapt(task, self.calibration)
    train, test = (_rows(data) for data in (self.population.train(task), self.population.test(task)))
    kept = mg.deploy.kept_channels(
      self.network,
      adapted,
      self.shape,
      self.population.train(task) if self.config.gated else None,
      threshold=options["threshold"],
      chunk=self.config.chunk,
    )
    small = mg.deploy.compact(self.network, adapted, self.shape, kept, drop_gates=options["always_on"], multiple=options.get("multiple", 1))
    networks = {"dense": (self.plain, {"backbone": dense.params["backbone"], "gate": {}}), "compact": (small.network, small.params)}
    own = {
      "accuracy": {
        "gated" if self.config.gated else "masked": float(self._accuracy_gated(adapted, task)),
        "dense": float(self._accuracy_dense(dense, task)),
        "compact": _accuracy(networks["compact"], test),
      },
      "macs": {name: self._macs(network) for name, (network, _) in networks.items()},
      "parameters": {name: sum(int(leaf.size) for leaf in jax.tree.leaves(params)) for name, (_, params) in networks.items()},
      "kept": {layer: len(numbers) for layer, numbers in small.kept.items()},
      "bytes_by_format": {},
      "latency_us": {},
      "files": {},
      "failed": {},
    }
    classes = sorted({int(label) for label in train[1]})
    for name, (network, params) in networks.items():
      for form in options["formats"]:
        self._file(own, task, folder, name, form, network, params, train, test, classes, options)
    own["bytes"] = next(iter(own["bytes_by_format"].values()), {})  # of the first format
    self._time(own, folder, networks, train, options)
    if "tflite" in options["formats"] and options["samples"]:
      own["adapt"] = self._adaptation(task, folder, train, test, options)
      if options.get("page") and "failed" not in own["adapt"]["dense"]:
        self._page(task, folder, train, test, classes, options)
    return own

  def _macs(self, network):
    layers = network.layers(self.shape)
    return mg.nn.dense_cost(layers)[0] + mg.nn.gate_cost(layers, network.gated_layers, network.hidden)[0]

  def _file(self, own, task, folder, name, form, network, params, train, test, classes, options):
    """Writes a file, and of .tflite one in integers; a file that does not give what JAX gives is not left."""
    batch = options["batches"][0]
    signature = mg.deploy.inference(network, params, self.shape, batch if form == "tflite" or not network.rowwise else None)
    expected = _logits(network, params, test[0][:_VERIFIED])
    contents = {name: (form, WRITERS[form](signature))}
    if form == "tflite":
      calibration = _batches(train[0][:_CALIBRATION], batch)
      contents[f"{name}_int8"] = form, mg.deploy.quantize_tflite(contents[name][1], {"images": calibration})
    for label, (form, content) in contents.items():
      path = folder / f"task-{task}-{label}.{form}"
      exact, difference = not label.endswith("int8"), None
      if form in READERS:
        run = READERS[form](content)
        found = run.logits(test[0][:_VERIFIED] if exact else test[0], batch)
        difference = float(np.abs(found[: len(expected)] - expected).max() / np.abs(expected).max())
        if exact and not difference < _ROUND_OFF:
          own["failed"][path.name] = f"differs from JAX by {difference:.1e} of the largest logit"
          path.unlink(missing_ok=True)
          continue
        if not exact:
          own["accuracy"]["int8" if name == "compact" else label] = float((found.argmax(-1) == test[1]).mean())
      path.write_bytes(content)
      own["files"][f"{label}.{form}"] = path.name
      own["bytes_by_format"].setdefault(form, {})["int8" if label == "compact_int8" else label] = len(content)
      records.write_json(
        path.with_name(path.name + ".json"),
        {
          "run": self.name,
          "seed": self.config.seed,
          "task": task,
          "classes": classes,
          "network": type(self.network.backbone).__name__,
          "input": {
            "images": [batch if form == "tflite" else "batch", *self.shape],
            "preprocessing": f"({'value / 255' if self.dataset.images.dtype == np.uint8 else 'value'} - {self.config.pixel_mean}) / "
            f"{self.config.pixel_std}",
          },
          "accuracy": own["accuracy"].get("int8" if label == "compact_int8" else label),
          "test_samples": len(test[0]),
          "train_samples": len(train[0]),
          "kept_channels": own["kept"] if name == "compact" else {},
          "macs": own["macs"][name],
          "parameters": own["parameters"][name],
          "bytes": len(content),
          "verified": None
          if difference is None
          else {"against": "JAX", "images": len(expected) if exact else len(test[0]), "largest_difference_relative": difference},
          "versions": records.versions() | versions_of([form]),
        },
      )

  def _time(self, own, folder, networks, train, options):
    """Dense, compact and, where there is one, the compact one in integers, by turns."""
    for form in options["formats"]:
      if form not in RUNTIMES or own["failed"]:
        continue
      for batch in options["batches"]:
        contents = {}
        for name, (network, params) in networks.items():
          signature = mg.deploy.inference(network, params, self.shape, batch)
          contents[name] = WRITERS[form](signature)
          if form == "tflite" and name == "compact":
            contents["int8"] = mg.deploy.quantize_tflite(contents[name], {"images": _batches(train[0][:_CALIBRATION], batch)})
        rows = _batches(train[0], batch)[0]
        found = interleaved({name: RUNTIMES[form](content).call(rows) for name, content in contents.items()}, options["repeats"])
        into = own["latency_us"] if batch == options["batches"][0] else own.setdefault(f"latency_us_batch_{batch}", {})
        into[RUNTIMES[form].label] = {name: times["median"] for name, times in found.items()}
        own.setdefault("latency_quantiles_us", {})[f"{RUNTIMES[form].label}, batch {batch}"] = found

  def _adaptation(self, task, folder, train, test, options):
    """The file that adapts, in a process that has the runtime alone: of the whole network and, with a budget, of what it keeps. None where the
    personalizer has operators that LiteRT lacks."""
    config, keep = self.config, registry.kept_counts(self.config, self.network)
    whole = registry.make_personalizer(config, self.network, loss_of=mg.deploy.device_loss, microbatch=None)
    ways = {"dense": (lambda params, data: whole.adapt(mg.Model(params, self.model.mask), data).params, None)}
    if keep and config.gated:
      budget = mg.deploy.within_budget(
        self.network,
        self.shape,
        keep,
        gate_lr=config.gate_adapt_lr,
        lr=config.adapt_lr,
        steps=config.adapt_steps,
        gate_steps=config.gate_adapt_steps or config.adapt_steps,
        loss_of=mg.deploy.device_loss,
        chunk=config.chunk,
      )
      ways["restricted"] = (lambda params, data: budget.adapt(params, data)[0], budget.network)
    found = {}
    count = min(options["samples"], len(train[0]))
    images = np.zeros((options["samples"], *self.shape), np.float32)
    labels, weight = np.zeros(options["samples"], np.int32), np.zeros(options["samples"], np.float32)
    images[:count], labels[:count], weight[:count] = train[0][:count], train[1][:count], 1
    for name, (adapt, served) in ways.items():
      path = folder / f"task-{task}-adapt{'' if name == 'dense' else '-restricted'}.tflite"
      try:
        signatures = mg.deploy.adaptation(self.network, adapt, self.model.params, self.shape, samples=options["samples"], served=served)
        content = mg.deploy.to_tflite(signatures)
        path.write_bytes(content)
        with tempfile.TemporaryDirectory() as scratch:
          np.savez(Path(scratch) / "data.npz", images=train[0][:count], labels=train[1][:count], test_images=test[0], test_labels=test[1])
          done = subprocess.run(
            [sys.executable, _DEVICE / "adapt.py", path, Path(scratch) / "data.npz", "--save", Path(scratch) / "adapted.npz"],
            capture_output=True,
            text=True,
            check=False,
          )
          if done.returncode:
            raise NotImplementedError(f"LiteRT cannot run it: {' '.join(done.stderr.strip().splitlines()[-2:])}")
          adapted = dict(np.load(Path(scratch) / "adapted.npz"))
      except NotImplementedError as error:
        path.unlink(missing_ok=True)
        found[name] = {"failed": str(error)[:400]}
        continue
      expected = named_leaves(jax.jit(adapt)(self.model.params, mg.data.Batch(jnp.asarray(images), jnp.asarray(labels), jnp.asarray(weight))))
      difference = max(float(np.abs(adapted[leaf] - value).max()) for leaf, value in expected.items())
      found[name] = json.loads(done.stdout.splitlines()[-1]) | {"max_difference": difference, "bytes": len(content)}
      if not difference < _ROUND_OFF:
        path.unlink()
        found[name]["failed"] = "differs from JAX"
    first = found.get("restricted", found["dense"])
    return {**({} if "failed" in first else {"ms": first["ms"], "max_difference": first["max_difference"]}), **found}

  def _page(self, task, folder, train, test, classes, options):
    """A folder that a web server shows: the page of examples/device/page, with this task's model and samples."""
    page = folder / f"page-{task}"
    shutil.copytree(_DEVICE / "page", page, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copyfile(folder / f"task-{task}-adapt.tflite", page / "model.tflite")
    part = lambda rows, count: {
      "images": base64.b64encode(np.ascontiguousarray(rows[0][:count], "<f4").tobytes()).decode(),
      "labels": rows[1][:count].tolist(),
    }
    records.write_json(
      page / "data.json",
      {
        "title": f"{self.name}, task {task}",
        "classes": classes,
        "shape": list(self.shape),
        "samples": options["samples"],
        "train": part(train, options["samples"]),
        "test": part(test, _SHOWN),
      },
    )


# Bytes of an inference, by format.
WRITERS = {
  "tflite": lambda signature: mg.deploy.to_tflite({"infer": signature}),
  "onnx": lambda signature: mg.deploy.to_onnx(signature),
  "stablehlo": lambda signature: mg.deploy.to_stablehlo(signature),
}


def _rows(data):
  """A task's images, scaled, and labels, without padding."""
  count = int(data.count)
  batch = data.rows(jnp.arange(count, dtype=jnp.int32))
  return np.asarray(batch.images, np.float32), np.asarray(batch.labels, np.int32)


def _batches(images, size):
  """(examples, size, …): the images in batches, the last filled up from the first."""
  count = max(1, len(images) // size)
  return np.resize(images, (count * size, *images.shape[1:])).reshape(count, size, *images.shape[1:])


def _logits(network, params, images):
  return np.asarray(jax.jit(lambda params, images: network.apply(params, images)[0])(params, images))


def _accuracy(network_and_params, test):
  network, params = network_and_params
  return float((_logits(network, params, test[0]).argmax(-1) == test[1]).mean())


def _mean(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Of every number that all tasks have, at the same place."""

  def mean(values):
    if all(isinstance(value, dict) for value in values):
      return {key: mean([value[key] for value in values]) for key in values[0] if all(key in value for value in values)}
    return float(np.mean(values)) if all(isinstance(value, int | float) for value in values) else None

  return {key: mean([task[key] for task in tasks]) for key in tasks[0] if key not in ("files", "failed") and all(key in task for task in tasks)}


def _line(task, own, seconds):
  accuracy = ", ".join(f"{name} {100 * value:.1f}" for name, value in own["accuracy"].items())
  return f"task {task}: accuracy (%) {accuracy}; MACs {own['macs']['compact'] / own['macs']['dense']:.2f} of dense ({seconds:.0f} s)"

"""`python -m experiments.tables`: Tables 1-6 and Figure 4 of the paper, from real data to a report; with --tables=anp those of
`experiments.anp_tables`.

Every run is recorded in a folder of its own below the workdir when it ends, so that an interrupted call goes on where it
stopped. A run that fails is recorded as failed and shown as such; it is tried again by the next call. The report
(`report.md`, `report.html`, `report.json`) is written anew from the records at the end of every call.
"""

import argparse
import json
import logging
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import metagater_jax as mg
from experiments import anp_tables, placement, registry, report, reporting
from experiments.config import ConfigError, base_config, check_config, check_same, closest, settings_of, with_fields
from experiments.protocols import CURVES, SNIP, TABLES, Row, rows_of
from experiments.training import load, load_parameters, make_tasks, run_seeds
from experiments.tune import METHODS, protocol_config
from metagater_jax.data.datasets import Dataset

__all__ = ["config_of", "folder_of", "main", "reproduce", "run_metasnip"]


def config_of(row: Row, *, rounds: int | None = None, data_dir: str | None = None) -> ConfigDict:
  """The checked config of a row. MetaSNIP's is that of the meta-model it starts from, with its own adaptation rate."""
  config = protocol_config(row.protocol, data_dir, rounds)
  method = METHODS["metagater_ungated" if row.method in SNIP else row.method]
  config.update(algorithm=method.algorithm, gated=method.gated, local_steps=row.local_steps)
  if row.local_steps > 1 or row.method not in CURVES.get(row.protocol, ()):
    config.eval_every = config.rounds  # only what Figure 4 shows is evaluated on the way
  if row.method in SNIP:
    config.adapt_lr = settings_of(config, row.method)["adapt_lr"]
  return check_config(config)


def folder_of(workdir: Path, row: Row, seed: int) -> Path:
  """Where the run of a row with a seed is recorded."""
  return workdir / f"{row.protocol}-{row.method}-k{row.local_steps}" / f"seed-{seed}"


def reproduce(workdir: str | Path, *, tables: Sequence[str] = tuple(TABLES), seeds: Sequence[int] = (1, 2, 3, 4, 5),
              rounds: int | None = None, data_dir: str | None = None, protocols: Sequence[str] | None = None,
              datasets: Mapping[str, Dataset] | None = None, log=print) -> dict[str, Any]:
  """Runs what is not yet recorded, and writes the report.

  Args:
    workdir: holds the records.
    tables: by number.
    seeds: of the partitions and runs; the same for all methods, so that differences are paired.
    rounds: instead of the configs'.
    data_dir: where data sets are.
    protocols: only the rows of these.
    datasets: by protocol, images and labels to use instead of the named data sets.
    log: gets a line per finished step.

  Returns:
    What `report.json` holds.

  Raises:
    ConfigError: before anything runs: an unknown table or protocol, no seeds, data that is missing, or a workdir whose
      runs have another configuration.
  """
  workdir, datasets = Path(workdir), dict(datasets or {})
  for table in tables:
    if table not in TABLES:
      raise ConfigError(closest("table", table, TABLES))
  if not seeds:
    raise ConfigError(f"seeds must be at least 1, got {len(seeds)}.")
  if rounds is not None and rounds < 1:
    raise ConfigError(f"rounds must be at least 1, got {rounds}.")
  rows = rows_of(tables)
  known = sorted({row.protocol for row in rows})
  for protocol in protocols or ():
    if protocol not in known:
      raise ConfigError(closest(f"protocol in table{'s' if len(tables) > 1 else ''} {', '.join(tables)}", protocol, known))
  rows = [row for row in rows if not protocols or row.protocol in protocols]
  for protocol in dict.fromkeys(row.protocol for row in rows):
    placement.use_cores(protocol_config(protocol))
  configs = {row: config_of(row, rounds=rounds, data_dir=data_dir) for row in rows}
  for row, config in configs.items():
    _check_records(workdir, row, seeds, config)
    if row.protocol not in datasets:
      datasets[row.protocol] = load(config)

  for row, config in configs.items():
    missing = [seed for seed in seeds if not (folder_of(workdir, row, seed) / "result.json").is_file()]
    if not missing:
      continue
    folders = {seed: folder_of(workdir, row, seed) for seed in missing}
    for folder in folders.values():
      shutil.rmtree(folder, ignore_errors=True)  # what an interrupted or failed call left
    start = time.perf_counter()
    try:
      if row.method in SNIP:
        outcomes = run_metasnip(config, row, workdir, missing, datasets[row.protocol])
      else:
        outcomes = run_seeds(config, folders, datasets[row.protocol], quiet=True)
    except Exception as error:  # the other rows are still wanted; the record says what happened
      log(traceback.format_exc())
      outcomes = {seed: error for seed in missing if not (folders[seed] / "result.json").is_file()}
    for seed, outcome in outcomes.items():
      if isinstance(outcome, Exception):
        folders[seed].mkdir(parents=True, exist_ok=True)
        reporting.write_json(folders[seed] / "failure.json", {"error": f"{type(outcome).__name__}: {outcome}"})
    log(_line(row, outcomes, time.perf_counter() - start))
  return report.write(workdir, [number for number in TABLES if number in tables], seeds, configs)


def run_metasnip(config: ConfigDict, row: Row, workdir: Path, seeds: Sequence[int], dataset: Dataset
                 ) -> dict[int, dict[str, Any] | Exception]:
  """MetaSNIP on the target tasks of finished runs: each task at the sparsity that its gate reached with the same seed.

  Args:
    config: of the meta-model without gates, with MetaSNIP's adaptation rate.
    row: whose method says what is pruned.
    workdir: holds the runs without and with gates.
    seeds: which of them.
    dataset: the protocol's.

  Returns:
    By seed, what is recorded in its result.json, or the error that says which run is missing.
  """
  network = registry.make_network(config, dataset.classes)
  loss, granularity = mg.classification_loss(network), SNIP[row.method]
  prunable = registry.snip_candidates(config, granularity)

  def adapt(params, population, task, sparsity):
    return mg.metasnip(loss, params, population.train(task), sparsity=sparsity, lr=config.adapt_lr, steps=config.adapt_steps,
                       granularity=granularity, prunable=prunable, chunk=config.chunk)

  def evaluate(params, population, targets, sparsities):
    def one(task_and_sparsity):
      task, sparsity = task_and_sparsity
      adapted, mask = adapt(params, population, task, sparsity)
      kept = {layer: mask["backbone"][layer]["kernel"].any((0, 1, 2)).astype(jnp.float32) for layer in config.gated_layers}
      return (mg.evaluate_task(network, adapted, population.test(task), config.chunk).accuracy,
              mg.mask_sparsity(mask, prunable), kept)
    return mg.map_tasks(one, (targets, sparsities), registry.evaluation_axis(config))

  compiled_adapt = compiled_evaluate = None
  results: dict[int, Any] = {}
  found = {}
  for seed in seeds:
    base, gated = (folder_of(workdir, row._replace(method=method), seed) for method in ("metagater_ungated", "metagater"))
    if not all((folder / "result.json").is_file() for folder in (base, gated)):
      results[seed] = FileNotFoundError(f"MetaSNIP needs the finished runs {base.name} of {base.parent.name} and of "
                                        f"{gated.parent.name}.")
    else:
      found[seed] = load_parameters(base / "meta_model.npz")[0], json.loads((gated / "result.json").read_text())
  if not found:
    return results
  tasks = {}
  for seed in found:
    tasks[seed] = make_tasks(with_fields(config, seed=seed), dataset)
  populations = mg.make_populations(dataset.images, np.asarray(dataset.labels), [t.partition for t in tasks.values()],
                                    (config.pixel_mean, config.pixel_std))
  for (seed, (params, gate)), population in zip(found.items(), populations):
    params = jax.tree.map(jnp.asarray, params)
    targets, sparsities = jnp.asarray(tasks[seed].target), jnp.asarray(gate["sparsity"]["per_task"], jnp.float32)
    if compiled_evaluate is None:
      compiled_evaluate = jax.jit(evaluate).lower(params, population, targets, sparsities).compile()
      compiled_adapt = jax.jit(adapt).lower(params, population, targets[0], sparsities[0]).compile()
    start = time.perf_counter()
    accuracy, sparsity, kept = jax.device_get(compiled_evaluate(params, population, targets, sparsities))
    seconds, learning = time.perf_counter() - start, []
    for task, s in list(zip(targets, sparsities))[:5]:
      start = time.perf_counter()
      jax.block_until_ready(compiled_adapt(params, population, task, s))
      learning.append(time.perf_counter() - start)
    folder = folder_of(workdir, row, seed)
    folder.mkdir(parents=True, exist_ok=True)
    reporting.write_json(folder / "config.json", json.loads(with_fields(config, seed=seed).to_json_best_effort()))
    results[seed] = {
        "name": config.name, "algorithm": row.method, "gated": False, "seed": seed, "rounds": config.rounds,
        "local_steps": config.local_steps, "accuracy": reporting.summary(accuracy), "sparsity": reporting.summary(sparsity),
        "on_rate": {layer: rate.tolist() for layer, rate in kept.items()}, "learning_seconds": float(np.median(learning)),
        "seconds": {"evaluate": seconds}}
    reporting.write_json(folder / "result.json", results[seed])
  return results


# Fields that may differ between the runs of one workdir: they do not change what is computed.
_FREE = {"seed", "data_dir", "task_axis", "seed_axis", "rounds_per_dispatch", "tuned", "mesh", "memory_mb", "microbatch"}


def _check_records(workdir, row, seeds, config):
  """Raises a ConfigError where a recorded run of this row has another configuration."""
  wanted, defaults = (json.loads(c.to_json_best_effort()) for c in (config, base_config()))
  for seed in seeds:
    folder = folder_of(workdir, row, seed)
    if not (folder / "result.json").is_file():
      continue
    held = defaults | json.loads((folder / "config.json").read_text())  # a field that is newer than the run had its default
    check_same(folder, *({field: value for field, value in c.items() if field not in _FREE} for c in (held, wanted)))


def _line(row, outcomes, seconds):
  good = [100 * outcome["accuracy"]["mean"] for outcome in outcomes.values() if not isinstance(outcome, Exception)]
  failed = [f"seed {seed} failed: {outcome}" for seed, outcome in outcomes.items() if isinstance(outcome, Exception)]
  figures = f"{np.mean(good):.1f} % over {len(good)} seeds" if good else ""
  return f"{row.protocol} {row.method} K={row.local_steps}: {'; '.join(filter(None, [figures, *failed]))} ({seconds:.0f} s)"


def _seeds(text):
  first, _, last = text.rpartition("-")
  return range(int(first or 1), int(last) + 1)


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.tables", description=__doc__.split("\n")[0],
                                   allow_abbrev=False)
  names = lambda text: text.split(",")
  parser.add_argument("--tables", type=names, default=list(TABLES),
                      help="by number, separated by commas, or anp; default: all with a number")
  parser.add_argument("--protocols", type=names, help="only the rows of these protocols, cifar10 for instance; of anp the cases")
  parser.add_argument("--scores", type=names, help="of anp: only these; default: all")
  parser.add_argument("--level_steps", type=lambda text: [int(count) for count in text.split(",")],
                      help="of anp: steps of meta-training at each sparsity; default: those of each case, in courses of their own")
  parser.add_argument("--seeds", type=_seeds, help="3: seeds 1 to 3; 2-3: these; default: 5, of anp 3")
  parser.add_argument("--rounds", type=int, help="of every run; default: what the protocols' configs say")
  parser.add_argument("--workdir", default="runs/tables", help="where runs are recorded and the report goes")
  parser.add_argument("--data_dir", help="where the data is; default: TFDS's own directory")
  options = parser.parse_args(arguments)
  logging.getLogger().setLevel(logging.WARNING)
  start = time.perf_counter()
  try:
    seeds = lambda default: range(1, default + 1) if options.seeds is None else options.seeds
    log = lambda line: print(line, flush=True)
    if numbered := [table for table in options.tables if table != "anp"]:
      reproduce(options.workdir, tables=numbered, seeds=seeds(5), rounds=options.rounds, data_dir=options.data_dir,
                protocols=options.protocols, log=log)
      print(f"{options.workdir}/report.md, report.html and report.json, after {time.perf_counter() - start:.0f} s")
    if "anp" in options.tables:
      report = anp_tables.reproduce(
          options.workdir, cases=options.protocols or tuple(anp_tables.CASES), seeds=seeds(3),
          scores=options.scores or tuple(anp_tables.SCORES), steps=options.rounds, level_steps=options.level_steps,
          data_dir=options.data_dir, log=log)
      print(anp_tables.overview(report))
      print(f"{options.workdir}/anp.md, anp.json and anp.png, after {time.perf_counter() - start:.0f} s")
  except ConfigError as error:
    reporting.fail("experiments.tables", error)


if __name__ == "__main__":
  main()

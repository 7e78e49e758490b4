"""`python -m experiments.quickstart`: what the library is for, in a minute, on handwritten digits that come with it.

Thirty devices with two kinds of digits each; twenty of them train together, ten come later. FedAvg trains one network. MetaGater trains, in as many
rounds, a network with channel gates: a new device takes one gradient step of the gates, which choose the filters that it keeps, and one of those
filters. Both networks then adapt to the ten new devices. Settings of both were looked for with the same effort, on other seeds.
"""

import argparse
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import digits
from experiments.command import study_command
from experiments.config import ConfigError, registry
from experiments.config.fields import check_seed, with_fields
from experiments.reports.figures import pyplot
from experiments.reports.quickstart import seeds_table
from experiments.runs.deploy import deploy_run
from experiments.runs.federated import run_seeds
from experiments.runs.measures import mask_difference
from experiments.runs.placement import use_cores
from experiments.runs.records import make_folder, write_json
from experiments.studies.study import check_seeds, parse_seeds
from metagater_jax.deploy.signature import needs

__all__ = ["main", "over_seeds", "quickstart"]

# Of both: tasks, network and rounds.
_SHARED = {"tasks": 30, "target_tasks": 10, "rounds": 60, "eval_every": 60, "widths": (32, 64, 128)}
# Rates are the best of the same twelve pairs for both, on seeds 100 to 102 and this network. How many filters are kept was chosen after looking at
# seeds 0 to 9, too: with a half of them off the step cost half a point in one of these.
METHODS: dict[str, dict[str, Any]] = {
  "FedAvg": {"algorithm": "fedavg", "gated": False, "local_lr": 0.06, "adapt_lr": 0.03},
  "MetaGater": {"gated_layers": ("conv2", "conv3"), "keep": "conv2=40,conv3=88", "local_lr": 0.1, "adapt_lr": 0.05},
}
_PACKAGES = ("litert_converter", "ai_edge_litert", "litert_quantizer")


def quickstart(workdir: str | Path, *, seed: int = 0, log=print) -> dict[str, Any]:
  """Trains, adapts, makes the files of one device and measures them; writes `quickstart.json` and `quickstart.png`.

  Args:
    workdir: a folder for it; runs of the same seed that are there are made anew.
    seed: of tasks, networks and draws.
    log: gets a line per part.

  Returns:
    By method `before` and `after`, the accuracy of each new device, and what the network costs: `macs`, `parameters`, and where the packages
    that make files are installed `bytes` and `microseconds`; `sparsity` is the share of gated filters that are off, `asked` what `keep` means, and
    `devices_differ` the share of them in which two devices differ on average.

  Raises:
    ConfigError: a seed that is none, or a workdir that cannot be written.
  """
  check_seed(seed)
  folder = make_folder(Path(workdir) / f"seed-{seed}")
  found: dict[str, Any] = {"seed": seed, "methods": {}}
  runs = {}
  for name in METHODS:
    config = _config(name)
    log(f"{name}: {config.rounds} rounds of {config.cohort} of {config.tasks - config.target_tasks} devices …")
    runs[name] = folder / name.lower()
    _clear(runs[name])
    result = run_seeds(with_fields(config, seed=seed), {seed: runs[name]}, None, True)[seed]
    if isinstance(result, Exception):
      raise result
    cost = lambda part, result=result: result[part]["gated"] or result[part]["dense"]
    found["methods"][name] = {
      "before": result["accuracy_before_adaptation"]["per_task"],
      "after": result["accuracy"]["per_task"],
      "macs": cost("macs"),
      "parameters": cost("parameters"),
    }
    if result["gated"]:
      kept, rates = registry.kept_counts(config, registry.make_network(config, 10)), result["on_rate"]
      found |= {
        "sparsity": result["sparsity"]["mean"],
        "asked": 1 - sum(kept.values()) / sum(len(rate[0]) for rate in rates.values()),
        "devices_differ": mask_difference(rates),
      }
      targets = result["target_tasks"]
  try:
    for package in _PACKAGES:
      needs(package)
  except ImportError as error:
    log(f"No files are made: {error}")
  else:
    log("One new device's network as a file …")
    own = deploy_run(runs["MetaGater"], targets[:1], formats=("tflite",), batches=(1,), samples=0, log=lambda line: None)["mean"]
    for name, which in (("FedAvg", "dense"), ("MetaGater", "compact")):
      found["methods"][name] |= {"bytes": own["bytes"][which], "microseconds": own["latency_us"]["litert"][which]}
  write_json(folder / "quickstart.json", found)
  draw(folder / "quickstart.png", found)
  return found | {"figure": str(folder / "quickstart.png")}


def over_seeds(workdir: str | Path, seeds: Sequence[int], *, log=print) -> dict[str, Any]:
  """The quickstart's accuracies with several seeds, without files and costs: whether what one seed shows is so in general.

  Args:
    workdir: a folder for the runs; those of the same seeds that are there are made anew.
    seeds: of tasks, networks and draws.
    log: gets a line per method.

  Returns:
    `methods`: by name and seed `before` and `after`, means over the new devices; `sparsity` of MetaGater by seed.

  Raises:
    ConfigError: no seeds, or a workdir that cannot be written.
  """
  check_seeds(seeds)
  folder, found = make_folder(Path(workdir)), {"methods": {}}
  for name in METHODS:
    runs = {seed: make_folder(folder / f"seed-{seed}") / name.lower() for seed in seeds}
    for run in runs.values():
      _clear(run)
    log(f"{name}: {len(seeds)} seeds …")
    results = run_seeds(_config(name), runs, None, True)
    for result in results.values():
      if isinstance(result, Exception):
        raise result
    mean = lambda part, results=results: {str(seed): result[part]["mean"] for seed, result in results.items()}
    found["methods"][name] = {"before": mean("accuracy_before_adaptation"), "after": mean("accuracy")}
  return found | {"sparsity": mean("sparsity")}


def _config(name: str) -> ConfigDict:
  config = with_fields(digits.get_config(), **_SHARED, **METHODS[name])
  use_cores(config)
  return config


@contextmanager
def _compiled_fast():
  """What is compiled here runs for three seconds; compiling it well would take half a minute longer."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    yield
  finally:
    jax.config.update("jax_disable_most_optimizations", before)


def _clear(run: Path):
  for path in run.glob("*"):
    if path.is_file():
      path.unlink()


# What a network costs: key, what a reader sees, and how to write it.
_COSTS = (
  ("macs", "multiply-accumulates per image", "{:,.0f}"),
  ("parameters", "parameters", "{:,.0f}"),
  ("bytes", "bytes of its file", "{:,.0f}"),
  ("microseconds", "µs per image (LiteRT, one thread)", "{:.1f}"),
)


def text(found: dict[str, Any]) -> str:
  """The result as lines for a terminal."""
  methods = found["methods"]
  rows = [
    ("accuracy before adaptation", [f"{100 * np.mean(own['before']):.1f} %" for own in methods.values()]),
    ("accuracy after one step", [f"{100 * np.mean(own['after']):.1f} %" for own in methods.values()]),
  ]
  rows += [(label, [form.format(own[key]) for own in methods.values()]) for key, label, form in _COSTS if all(key in own for own in methods.values())]
  width = max(len(label) for label, _ in rows)
  lines = [
    f"{'':<{width}}  {''.join(f'{name:>12}' for name in methods)}",
    *(f"{label:<{width}}  {''.join(f'{value:>12}' for value in values)}" for label, values in rows),
  ]
  return "\n".join(
    [
      *lines,
      f"Mean over {len(next(iter(methods.values()))['after'])} new devices, which took no part in the training. MetaGater's gates switched "
      f"{100 * found['sparsity']:.0f} % of their filters off ({100 * found['asked']:.0f} % asked); two devices differ in "
      f"{100 * found['devices_differ']:.0f} % of these filters. FedAvg's cost is that of all filters: both networks start alike.",
    ]
  )


def draw(path: Path, found: dict[str, Any]) -> None:
  """Each new device's accuracy before and after one step, and what the adapted network costs."""
  plt = pyplot()
  methods = found["methods"]
  colors = dict(zip(methods, ("tab:gray", "tab:blue")))
  costs = [(key, label) for key, label, _ in _COSTS if all(key in own for own in methods.values())]
  figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", width_ratios=(1, 1, 1.5))
  for axis, (name, own) in zip(axes, methods.items()):
    pairs = 100 * np.array([own["before"], own["after"]])
    axis.plot([0, 1], pairs, "o-", color=colors[name], alpha=0.35, markersize=4)
    axis.plot([0, 1], pairs.mean(1), "o-", color=colors[name], linewidth=3, markersize=9)
    for x, mean in enumerate(pairs.mean(1)):
      axis.annotate(
        f"{mean:.0f} %",
        (x, mean),
        textcoords="offset points",
        xytext=((-12, 12)[x], 0),
        ha=("right", "left")[x],
        va="center",
        fontsize=11,
        weight="bold",
      )
    low = min(min(other["before"]) for other in methods.values())
    axis.set(xlim=(-0.8, 1.8), ylim=(100 * low - 5, 103))
    axis.set_title(name, color=colors[name], weight="bold")
    axis.set_xticks([0, 1], ["as trained", "after one step"])
    axis.grid(axis="y", alpha=0.3)
  axes[0].set_ylabel("accuracy on new devices (%)")
  for i, (key, _) in enumerate(costs):
    for j, (name, own) in enumerate(methods.items()):
      share = own[key] / methods["FedAvg"][key]
      axes[2].barh(i + 0.38 * j - 0.19, 100 * share, 0.36, color=colors[name])
    axes[2].text(100 * share + 2, i + 0.19, f"{100 * share:.0f} %", va="center", fontsize=9)
  axes[2].set_yticks(range(len(costs)), [label.replace(" (", "\n(").replace(" per image", "\nper image") for _, label in costs], fontsize=8.5)
  axes[2].invert_yaxis()
  axes[2].set(xlim=(0, 122), xlabel="cost of an adapted network (%)", title="on the device")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.quickstart", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--seed", type=int, default=0, help="of tasks, networks and draws; default: 0")
  parser.add_argument("--seeds", help="compare the accuracies over these seeds instead, and nothing else: 1-3 or 1,4-6")
  parser.add_argument("--workdir", default="runs/quickstart", help="where its records and the figure go")
  parser.add_argument("--out", type=Path, help="with --seeds: a file for what was found, results/quickstart.json for the table in docs/")
  options = parser.parse_args(arguments)

  def body():
    if options.out and not options.seeds:
      raise ConfigError("--out is of what several seeds give; say which, as --seeds=0-9.")
    if options.seeds:
      several = over_seeds(options.workdir, parse_seeds(options.seeds), log=partial(print, flush=True))
      if options.out:
        make_folder(options.out.parent)
        write_json(options.out, several)
      print(seeds_table(several))
      return
    if options.seed < 0:
      raise ConfigError(f"seed must be a whole number of at least 0, got {options.seed}.")
    with _compiled_fast():
      found = quickstart(options.workdir, seed=options.seed, log=partial(print, flush=True))
    print(f"\n{text(found)}\nfigure: {found['figure']}; the runs are beside it. Go on: python -m experiments.run --help, README.md")

  study_command("experiments.quickstart", body)


if __name__ == "__main__":
  main()

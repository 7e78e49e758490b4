"""The report on accuracy against sparsity for every pruning score, from the records of `experiments.studies.anp`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config.fields import ConfigError
from experiments.config.registry import NETWORKS
from experiments.reports.figures import pyplot
from experiments.reports.markdown import table
from experiments.reports.statistics import paired_difference
from experiments.runs.records import model_name, write_json
from experiments.studies.anp_cases import AT_ONCE, CASES, LEVELS, MAIN, SCORES
from metagater_jax.nn import dense_cost, gated_parameters, network_layers

__all__ = ["claims", "differences", "make_report", "markdown", "merge_reports", "overview", "write_report"]


def make_report(workdir: Path) -> dict[str, Any]:
  """Everything that the records of a workdir say, as numbers: each a mean with what it is made of, seed by seed."""
  report = {"levels": list(LEVELS), "cases": {}}
  for name, case in CASES.items():
    bases = {int(path.stem.split("-")[1]): json.loads(path.read_text(encoding="utf-8")) for path in sorted((workdir / name).glob("seed-*-base.json"))}
    bases = {seed: record for seed, record in sorted(bases.items()) if "accuracy" in record}
    if not bases:
      continue
    entry = {
      "title": case.title,
      "steps": next(iter(bases.values()))["steps"],
      "base": _pool({seed: record["accuracy"] for seed, record in bases.items()}),
      "agreement": _agreements({seed: record.get("agreement", {}) for seed, record in bases.items()}),
      "courses": {},
    }
    records = {}
    for path in sorted((workdir / name).glob("seed-*-*-*.json")):
      _, seed, score, level_steps = path.stem.split("-")
      records.setdefault(int(level_steps), {}).setdefault(score, {})[int(seed)] = _read_levels(path)
    for level_steps, runs in sorted(records.items()):
      entry["courses"][str(level_steps)] = {score: _levels(score, runs, bases) for score in SCORES if score in runs}
    report["cases"][name] = entry
  return report


def _read_levels(path):
  """The levels of a recorded course. Where whole filters go, each with how many every layer has left, and the share of the
  network's parameters that is left once the others are cut out: with a filter go the next layer's weights that read it."""
  record = json.loads(path.read_text(encoding="utf-8"))
  config = record["config"]
  if config["prune"]["granularity"] == "channel":
    layers = network_layers(NETWORKS[model_name(config["model"])].make(classes=config["ways"], widths=tuple(config["widths"])), (32, 32, 3))
    convolutions = {layer.name: layer.outputs for layer in layers if layer.kind == "conv"}
    for level in record["levels"]:
      pruned = lambda name: level["by_layer"].get(f"backbone/{name}/kernel", 0.0)
      level["filters"] = {name: round(width * (1 - pruned(name))) for name, width in convolutions.items()}
      level["sparsity"] = 1 - sum(level["filters"].values()) / sum(convolutions.values())  # older records have that of weights
      used = {name: np.arange(width) < level["filters"][name] for name, width in convolutions.items()}
      level["parameters"] = float(gated_parameters(layers, used)) / dense_cost(layers)[1]
  return record["levels"]


def _levels(score, runs, bases):
  """At each sparsity: accuracy over seeds and episodes, and on the same episodes the differences from the network before pruning
  and from other scores."""
  levels = []
  for i in range(len(LEVELS)):
    own = {seed: record[i] for seed, record in sorted(runs[score].items())}
    level = {field: _pool({seed: x[field] for seed, x in own.items()}) for field in ("sparsity", "train_loss", "accuracy")}
    if all("filters" in x for x in own.values()):
      level["parameters"] = _pool({seed: x["parameters"] for seed, x in own.items()})
      level["filters"] = {layer: _pool({seed: x["filters"][layer] for seed, x in own.items()}) for layer in next(iter(own.values()))["filters"]}
    level["minus_base"] = _pool({seed: np.subtract(x["accuracy"], bases[seed]["accuracy"]) for seed, x in own.items()})
    for other in _COMPARED:
      both = {seed: np.subtract(x["accuracy"], runs[other][seed][i]["accuracy"]) for seed, x in own.items() if seed in runs.get(other, {})}
      if other != score and both:
        level[f"minus_{other}"] = _pool(both)
    levels.append(level)
  return levels


def _agreements(records):
  """The scores of the networks before pruning."""
  found = {}
  for score in (score for score in SCORES if any(score in record for record in records.values())):
    own = {seed: record[score] for seed, record in records.items() if score in record}
    fields = {
      field: {seed: values[field] for seed, values in own.items() if field in values}
      for field in ("seconds", "temporary_mb", "spearman", "kept_in_common", "removal")
    }
    found[score] = {field: _pool(by_seed) for field, by_seed in fields.items() if by_seed}
    at_once = lambda of: [_pool({seed: of(seed, i) for seed in own}) for i in range(len(AT_ONCE))]
    found[score]["at_once"] = at_once(lambda seed, i, own=own: own[seed]["at_once"][i])
    if score != "anp":
      found[score]["anp_minus"] = at_once(lambda seed, i, own=own: np.subtract(records[seed]["anp"]["at_once"][i], own[seed]["at_once"][i]))
  return found


# What the ANP scores are compared with, episode by episode.
_COMPARED = ("none", "magnitude", "magnitude_layer", "snip", "snip_signed")


def _pool(by_seed):
  """A statistic of numbers by seed, or of arrays over a seed's episodes."""
  parts = {}
  for seed, values in by_seed.items():
    values = np.atleast_1d(np.asarray(values, np.float64))
    parts[str(seed)] = {"mean": float(values.mean())}
    if len(values) > 1:
      parts[str(seed)] |= {"ci95": float(1.96 * values.std(ddof=1) / np.sqrt(len(values))), "episodes": len(values)}
  return _statistic(parts)


def _statistic(parts):
  """What is in the report for each quantity: by seed its mean, and half the 95 % interval over so many episodes; and both over the
  episodes of all seeds, as if they were computed from them together."""
  parts = dict(sorted(parts.items(), key=lambda part: int(part[0])))
  means = np.array([part["mean"] for part in parts.values()])
  if not all("ci95" in part for part in parts.values()):
    return {"mean": float(means.mean()), "by_seed": parts}
  count = np.array([part["episodes"] for part in parts.values()])
  within = np.array([part["ci95"] for part in parts.values()]) ** 2 * count * (count - 1) / 1.96**2
  mean = np.average(means, weights=count)
  squares = np.sum(within) + np.sum(count * (means - mean) ** 2)
  return {"mean": float(mean), "ci95": float(1.96 * np.sqrt(squares / (count.sum() - 1) / count.sum())), "by_seed": parts}


def merge_reports(held: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
  """The report of the seeds of both, so that seeds may be run on different machines.

  A seed that both have is the union of its courses if they start from the same network; if not, only `new` counts, since courses
  from different networks cannot be compared in pairs.

  Raises:
    ConfigError: the same case with other training or other levels.
  """
  if held["levels"] != new["levels"]:
    raise ConfigError(f"levels of sparsity are {held['levels']} in the recorded report and {new['levels']} in this.")
  cases = {}
  for name in (name for name in CASES if name in held["cases"] or name in new["cases"]):
    old, own = held["cases"].get(name), new["cases"].get(name)
    if old and own:
      for field in ("title", "steps"):
        if old[field] != own[field]:
          raise ConfigError(f"{name}: {field} is {old[field]} in the recorded report and {own[field]} in this.")
      bases = [case["base"]["by_seed"] for case in (old, own)]
      replaced = {seed for seed in bases[0] if seed in bases[1] and bases[0][seed] != bases[1][seed]}
      cases[name] = _merge(_without(old, replaced), own)
    else:
      cases[name] = old or own
    for level_steps, courses in cases[name]["courses"].items():  # in the order of the tables
      cases[name]["courses"][level_steps] = {score: courses[score] for score in SCORES if score in courses}
    cases[name]["courses"] = dict(sorted(cases[name]["courses"].items(), key=lambda course: int(course[0])))
    cases[name]["agreement"] = {score: cases[name]["agreement"][score] for score in SCORES if score in cases[name]["agreement"]}
  return {"levels": new["levels"], "cases": cases}


def _without(tree, seeds):
  """A report without some seeds; None where nothing is left."""
  if isinstance(tree, dict) and "by_seed" in tree:
    parts = {seed: part for seed, part in tree["by_seed"].items() if seed not in seeds}
    return _statistic(parts) if parts else None
  if isinstance(tree, dict):
    rest = {key: _without(value, seeds) for key, value in tree.items()}
    rest = {key: value for key, value in rest.items() if value is not None}
    return rest or None
  if isinstance(tree, list):
    rest = [_without(value, seeds) for value in tree]
    return rest if all(value is not None for value in rest) else None
  return tree


def _merge(held, new):
  if held is None or new is None:
    return held if new is None else new
  if isinstance(new, dict) and "by_seed" in new:
    return _statistic(held["by_seed"] | new["by_seed"])
  if isinstance(new, dict):
    return {key: _merge(held.get(key), new.get(key)) for key in dict.fromkeys([*held, *new])}
  if isinstance(new, list):
    return [_merge(*pair) for pair in zip(held, new, strict=True)]
  return new


def overview(report: dict[str, Any]) -> str:
  """Accuracy of all cases at the highest two sparsities."""
  rows = []
  for case, level_steps, scores, i in _highest(report):
    seeds = _seeds((scores["anp"] if "anp" in scores else next(iter(scores.values())))[i]["accuracy"])
    cell = lambda value, seeds=seeds: _percent(value) + ("" if _seeds(value) == seeds else f" ({_which_seeds(_seeds(value))} only)")
    before = _without(case["base"], set(_seeds(case["base"])) - set(seeds))
    left = _what_is_left({score: scores[score] for score in MAIN if score in scores}, i)
    rows.append(
      [
        f"{case['title']}; {_which_seeds(seeds)}",
        level_steps,
        _percent(before),
        f"{100 * report['levels'][i]:.0f} %{left}",
        *(cell(scores[score][i]["accuracy"]) if score in scores else "" for score in MAIN),
      ]
    )
  return table(["network and task", "steps per level", "before pruning", "sparsity", *(SCORES[score].label for score in MAIN)], rows)


def differences(report: dict[str, Any]) -> str:
  """ANP minus each other of the main scores, at the highest two sparsities."""
  others = ("base", *(score for score in MAIN if score != "anp"))
  rows = []
  for case, level_steps, scores, i in _highest(report):
    ours = scores.get("anp", ({},) * len(report["levels"]))[i]
    parts = [ours.get(f"minus_{other}") for other in others]
    rows.append([f"{case['title']}", level_steps, f"{100 * report['levels'][i]:.0f} %", *(_points(part) if part else "" for part in parts)])
  return table(
    ["network and task", "steps per level", "sparsity", "ANP minus before pruning", *(f"ANP minus {SCORES[score].label}" for score in others[1:])],
    rows,
  )


def _highest(report):
  """Every course at the highest two sparsities."""
  return [(case, level_steps, scores, i) for case in report["cases"].values() for level_steps, scores in case["courses"].items() for i in (-2, -1)]


# What ANP is expected to do: sparsity, how it is said, the score it is compared with, and by how much it may be behind.
_CLAIMS = (
  (-2, "within 1 point of not pruned", "none", 0.01),
  (-2, "ahead of SNIP", "snip", 0.0),
  (-2, "ahead of magnitude", "magnitude", 0.0),
  (-1, "ahead of SNIP", "snip", 0.0),
  (-1, "ahead of magnitude", "magnitude", 0.0),
)


def claims(report: dict[str, Any]) -> str:
  """A table of what ANP is expected to do at the highest two sparsities, and in which cases the intervals say that it does.

  The interval is that over the means of the seeds (Student's t); with one seed it is over test episodes, and the cell says so.
  """
  rows = []
  for case in report["cases"].values():
    for level_steps, scores in case["courses"].items():
      if "anp" in scores:
        rows.append(
          [f"{case['title']}, {level_steps}", *(_verdict(scores["anp"][i].get(f"minus_{other}"), margin) for i, _, other, margin in _CLAIMS)]
        )
  return table(["network and task, steps per level", *(f"{100 * report['levels'][i]:.0f} %: {what}" for i, what, _, _ in _CLAIMS)], rows)


def _verdict(value, margin):
  if value is None:
    return "not run"
  difference, seeds = _over_seeds(value), len(value["by_seed"])
  if seeds == 1:
    difference = difference._replace(low=value["mean"] - value["ci95"], high=value["mean"] + value["ci95"])
  return f"{difference.verdict(margin)} ({f'{seeds} seeds' if seeds > 1 else '1 seed, over its episodes'})"


def markdown(report: dict[str, Any]) -> str:
  """The report's tables as text."""
  lines = []
  for case in report["cases"].values():
    lines += [
      f"**{case['title']}, CIFAR-FS (300 per class)**: {case['steps']:,} steps of meta-training; before pruning "
      f"{_percent(case['base'])} %. {_which_seeds(_seeds(case['base'])).capitalize()}, {_episodes(case['base'])} test episodes; ± is "
      "half the 95 % interval over the episodes of all seeds; a difference's “seeds ±” that over the means of the seeds "
      "(Student's t).",
      "",
    ]
    for level_steps, scores in case["courses"].items():
      lines += [
        f"Accuracy (%) with {level_steps} steps of meta-training at each sparsity:",
        "",
        table(
          ["score", "seeds", *(f"{100 * level:.0f} %" for level in report["levels"])],
          [
            [
              SCORES[score].label,
              ", ".join(_seeds(levels[0]["accuracy"])),
              *(_percent(x["accuracy"]) + _what_is_left({score: levels}, i) for i, x in enumerate(levels)),
            ]
            for score, levels in scores.items()
          ],
        ),
      ]
      ours = [score for score in scores if score.startswith("anp")]
      if ours:
        compared = [other for other in _COMPARED if any(f"minus_{other}" in scores[score][0] for score in ours)]
        rows = []
        for score in ours:
          for i in (i for i, level in enumerate(report["levels"]) if level >= 0.85):
            parts = [scores[score][i].get(f"minus_{other}") for other in ("base", *compared)]
            rows.append([SCORES[score].label, f"{100 * report['levels'][i]:.0f} %", *(_points(part) if part else "" for part in parts)])
        lines += [
          "",
          "Differences on the same episodes, in points, and by seed:",
          "",
          table(["score", "sparsity", "minus before pruning", *(f"minus {SCORES[other].label}" for other in compared)], rows),
        ]
      lines.append("")
    lines += [*_agreement_tables(case["agreement"]), ""]
  return "\n".join(lines)


def _agreement_tables(agreement):
  # Seeds without times are those timed with code of other speed.
  timed = {
    score: {seed: part["mean"] for seed, part in values.get("seconds", {"by_seed": {}})["by_seed"].items()} for score, values in agreement.items()
  }
  costs, at_once = [], []
  for score, values in agreement.items():
    # Within a seed, whose scores were timed on one machine; the median, as machines are shared.
    cost = ["", ""]
    if seconds := timed[score]:
      ratio = np.median([own / timed["anp"][seed] for seed, own in seconds.items()])
      cost = [f"{ratio:.2f}" + (f" ({np.median(list(seconds.values())):.1f} s)" if score == "anp" else ""), f"{values['temporary_mb']['mean']:.0f}"]
    name = [SCORES[score].label, ", ".join(_seeds(values["spearman"]))]
    costs.append(
      [
        *name,
        f"{values['spearman']['mean']:.2f}",
        f"{100 * values['kept_in_common']['mean']:.0f} %",
        *cost,
        f"{values['removal']['mean']:.3f}" if "removal" in values else "",
      ]
    )
    cells = [_percent(part) for part in values["at_once"]]
    if "anp_minus" in values:
      cells = [f"{part} ({100 * d['mean']:+.1f} ± {100 * d['ci95']:.1f})" for part, d in zip(cells, values["anp_minus"])]
    at_once.append([*name, *cells])
  return [
    "How the scores rank the weights of the networks before pruning" + (f"; time and MB of {_which_seeds(timed['anp'])}:" if timed["anp"] else ":"),
    "",
    table(
      [
        "score",
        "seeds",
        "rank correlation with ANP",
        "kept in common at 85 %",
        "time (ANP: 1)",
        "MB",
        "rank correlation with removing weights one by one",
      ],
      costs,
    ),
    "",
    "Accuracy (%) on validation episodes after pruning at once, without any training, and in brackets how much better ANP's is, in points:",
    "",
    table(["score", "seeds", *(f"{100 * sparsity:.0f} % at once" for sparsity in AT_ONCE)], at_once),
  ]


def _percent(value):
  return f"{100 * value['mean']:.1f} ± {100 * value['ci95']:.1f}"


def _points(value):
  text = f"{100 * value['mean']:+.1f} ± {100 * value['ci95']:.1f}"
  over_seeds = _over_seeds(value)
  if over_seeds.high is None:
    return text
  by_seed = ", ".join(f"{100 * part['mean']:+.1f}" for part in value["by_seed"].values())
  return f"{text} ({by_seed}; seeds ± {50 * (over_seeds.high - over_seeds.low):.1f})"


def _over_seeds(value):
  means = {seed: part["mean"] for seed, part in value["by_seed"].items()}
  return paired_difference(means, dict.fromkeys(means, 0.0))


def _what_is_left(scores, i):
  """What is left at a level where whole filters go: of a given share of them, it depends on which."""
  parts = []
  for score, levels in scores.items():
    if score != "none" and "filters" in levels[i]:
      filters = "-".join(f"{layer['mean']:.0f}" for layer in levels[i]["filters"].values())
      name = f"{SCORES[score].label} " if len(scores) > 1 else ""
      parts.append(f"{name}{filters}, {100 * levels[i]['parameters']['mean']:.1f} % of the parameters")
  return f" (left: {'; '.join(parts)})" if parts else ""


def _which_seeds(seeds):
  return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def _seeds(value):
  return list(value["by_seed"])


def _episodes(value):
  return " or ".join(f"{count:,}" for count in sorted({part["episodes"] for part in value["by_seed"].values()}))


def write_report(report: dict[str, Any], folder: Path) -> None:
  """`anp.json`, `anp.md`, and `anp.png`: accuracy against sparsity, a panel per case and length of its courses. A panel's curves are
  means over the seeds that all of `MAIN` have there, if there are any: seeds differ more than scores do. Other scores' curves are
  over those of them that they have."""
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "anp.json", report)
  (folder / "anp.md").write_text(markdown(report), encoding="utf-8")
  panels = [(case, level_steps, scores) for case in report["cases"].values() for level_steps, scores in case["courses"].items()]
  if not panels:
    return
  plt = pyplot()
  columns = min(4, len(panels))
  rows = -(-len(panels) // columns)
  figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 4.2 * rows), layout="constrained", squeeze=False)
  for axis in axes.flat[len(panels) :]:
    axis.set_visible(False)
  for axis, (case, level_steps, scores) in zip(axes.flat, panels):
    own = {score: set(_seeds(levels[0]["accuracy"])) for score, levels in scores.items()}
    common = set.intersection(*([own[score] for score in MAIN if score in own] or own.values()))
    for score, levels in scores.items():
      unpruned, seeds = score == "none", common & own[score] or own[score]
      points = [_without(point, set(_seeds(point)) - seeds) for point in (case["base"], *(level["accuracy"] for level in levels))]
      axis.errorbar(
        [0, *(100 * level for level in report["levels"])],
        [100 * point["mean"] for point in points],
        yerr=[100 * point["ci95"] for point in points],
        fmt="--" if unpruned else "o-",
        color="k" if unpruned else f"C{list(SCORES).index(score) - 1}",
        markersize=4,
        capsize=2,
        label=f"{SCORES[score].label}{', same steps' if unpruned else ''} ({_which_seeds(sorted(seeds, key=int))})",
      )
    axis.set(xlabel="sparsity (%)", ylabel="accuracy (%)", title=f"{case['title']}\n{level_steps} steps per level")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)  # below: in many a panel curves are everywhere
  figure.savefig(folder / "anp.png", dpi=120)
  plt.close(figure)

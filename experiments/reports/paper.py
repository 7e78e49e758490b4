"""The report on the paper's tables, from recorded runs: numbers, tables, figures and what they say about the paper's claims.

`build` makes one structure of plain numbers from the records, which is also `report.json`; everything else is written from
that structure, so that the same words follow from the same numbers.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments.config import registry
from experiments.config.fields import TUNED
from experiments.reports import figures
from experiments.reports.markdown import table
from experiments.reports.page import from_markdown
from experiments.reports.statistics import holm, paired_difference
from experiments.runs.measures import mask_difference
from experiments.runs.records import read_metrics, read_result, write_json
from experiments.studies.protocols import CLASSES, CURVES, EXTRA, PROTOCOL_LABELS, TABLES, Row, is_pruning, label_of, rows_of
from experiments.studies.tune import adaptation_rates

__all__ = ["build", "claims_table", "explain", "merge", "overview", "protocol_table", "render", "seeds_as_text", "table_markdown", "text", "write"]

# "At most a slight accuracy drop": so many points, fixed before any run was looked at.
SLIGHT = 0.01


def write(workdir: Path, tables: Sequence[str], seeds: Sequence[int], configs: Mapping[Row, Any]) -> dict[str, Any]:
  """Reads the records of a workdir and writes report.json, report.md, report.html and figures/ beside them."""
  content = build(workdir, tables, seeds, configs)
  write_json(workdir / "report.json", content)
  render(content, workdir)
  return content


def render(content: dict[str, Any], folder: Path) -> None:
  """report.md, report.html (figures inside) and figures/ from the structure that report.json holds."""
  drawn = _draw(content, folder / "figures")
  page = text(content, drawn)
  (folder / "report.md").write_text(page, encoding="utf-8")
  (folder / "report.html").write_text(from_markdown(page, folder), encoding="utf-8")


# --- from records to numbers


def build(workdir: Path, tables: Sequence[str], seeds: Sequence[int], configs: Mapping[Row, Any]) -> dict[str, Any]:
  """Everything the report says, as numbers and short texts.

  Args:
    workdir: of `experiments.studies.paper`.
    tables: by number.
    seeds: that were asked for.
    configs: the config of each row; rows without one are left out.
  """
  wanted = {row[:3] for row in configs}
  runs = {row[:3]: _run(workdir, row, seeds) for row in rows_of(tables) if row[:3] in wanted}
  content = {
    "protocols": {
      row.protocol: {
        "seeds": list(seeds),
        "rounds": sorted({c.rounds for r, c in configs.items() if r.protocol == row.protocol}),
        "cohort": config.cohort,
        "batch_size": config.batch_size,
        "tasks": config.tasks,
        "target_tasks": config.target_tasks,
        "validation_tasks": config.validation_tasks,
        "model": config.model,
        "widths": list(config.widths),
        "tuned": config.tuned,
        "budget": _budget(config.tuned),
      }
      for row, config in configs.items()
    },
    "tables": {
      number: {
        "title": TABLES[number].title,
        "kind": TABLES[number].kind,
        "rows": [_row(row, runs[row[:3]]) for row in TABLES[number].rows if row[:3] in runs],
      }
      for number in tables
    },
    "settings": {"-".join(map(str, row[:3])): _settings(config, row) for row, config in configs.items()},
    "curves": {
      protocol: {method: runs[protocol, method, 1]["curves"] for method in methods if (protocol, method, 1) in runs}
      for protocol, methods in CURVES.items()
      if any(row.protocol == protocol for row in configs)
    },
    "channels": {protocol: _channels(workdir, protocol, seeds) for protocol in PROTOCOL_LABELS if (protocol, "metagater", 1) in runs},
  }
  content["claims"] = _claims(content)
  content["reasons"] = {
    f"settings of {tuned}": explain(tuned, _tuned_methods(tuned)) for tuned in dict.fromkeys(config.tuned for config in configs.values()) if tuned
  }
  content["reasons"] |= {f"losses of {protocol}": list(_undertrained(protocol, runs)) for protocol in content["protocols"]}
  return content


def merge(held: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
  """Two reports as one: protocols of both; what the new one says of a protocol takes the place of all that the held one does."""
  held = _of_today(held)
  own = set(new["protocols"])
  place = lambda protocol: list(PROTOCOL_LABELS).index(protocol)  # in the order of the paper, whichever was recorded last
  stays = lambda part: {protocol: value for protocol, value in held.get(part, {}).items() if protocol not in own}
  content = {part: dict(sorted((stays(part) | new[part]).items(), key=lambda item: place(item[0]))) for part in ("protocols", "curves", "channels")}
  content["tables"] = {}
  for number in TABLES:
    parts = [part["tables"].get(number) for part in (held, new)]
    if any(parts):
      old = [row for row in (parts[0] or {"rows": []})["rows"] if row["protocol"] not in own]
      content["tables"][number] = {
        **(parts[1] or parts[0]),
        "rows": sorted(old + (parts[1] or {"rows": []})["rows"], key=lambda row: place(row["protocol"])),
      }
  content["settings"] = {key: value for key, value in held["settings"].items() if key.split("-")[0] not in own} | new["settings"]
  used = {f"settings of {protocol['tuned']}" for protocol in content["protocols"].values()}
  content["reasons"] = {
    name: reasons for name, reasons in (held["reasons"] | new["reasons"]).items() if not name.startswith("settings of ") or name in used
  }
  content["claims"] = _claims(content)
  return content


def _of_today(content):
  """A report of an earlier version, in which all protocols had the same seeds and all methods of one the same rounds."""
  if "seeds" not in content:
    return content
  protocols = {name: {"seeds": content["seeds"], **protocol, "rounds": [protocol["rounds"]]} for name, protocol in content["protocols"].items()}
  return {**content, "protocols": protocols, "reasons": {"": content["reasons"]}}


def _run(workdir, row, seeds):
  """Numbers by seed of one row, and what failed."""
  folder = workdir / f"{row.protocol}-{row.method}-k{row.local_steps}"
  run = {
    name: {}
    for name in (
      "accuracy",
      "before",
      "sparsity",
      "sparsity_std",
      "mask_difference",
      "train_seconds",
      "learning_seconds",
      "macs",
      "parameters",
      "failures",
      "curves",
      "task_sparsity",
      "train_loss",
    )
  }
  for seed in seeds:
    path = folder / f"seed-{seed}"
    if not (path / "result.json").is_file():
      failure = path / "failure.json"
      run["failures"][seed] = json.loads(failure.read_text(encoding="utf-8"))["error"] if failure.is_file() else "not run"
      continue
    result = read_result(path)
    run["accuracy"][seed] = result["accuracy"]["mean"]
    run["learning_seconds"][seed] = result["learning_seconds"]
    if result["sparsity"]:
      run["sparsity"][seed], run["sparsity_std"][seed] = result["sparsity"]["mean"], result["sparsity"]["std"]
      run["task_sparsity"][seed] = result["sparsity"]["per_task"]
    if result["on_rate"] and row.method != "metasnip_weight":
      run["mask_difference"][seed] = mask_difference(result["on_rate"])
    if is_pruning(row.method):
      continue
    run["before"][seed] = result["accuracy_before_adaptation"]["mean"]
    run["train_seconds"][seed] = result["round_ms"] * result["rounds"] / 1000  # round_ms is the run's median
    for name in ("macs", "parameters"):
      if result[name]["gated"]:
        run[name][seed] = result[name]["gated"] / result[name]["dense"]
    lines = read_metrics(path)
    run["train_loss"][seed] = lines[-1]["train_loss"]
    run["curves"][seed] = {"rounds": [line["round"] for line in lines], "accuracy": [line["accuracy_mean"] for line in lines]}
  return run


def _row(row, run):
  statistic = lambda name: _mean_std(run[name])
  return {
    "protocol": row.protocol,
    "method": row.method,
    "local_steps": row.local_steps,
    "in_paper": row not in EXTRA and row.method not in ("metasnip_channel", "metagater_dropout"),
    "accuracy": statistic("accuracy"),
    "before_adaptation": statistic("before"),
    "sparsity": statistic("sparsity"),
    "sparsity_std_over_tasks": statistic("sparsity_std"),
    "mask_difference": statistic("mask_difference"),
    "train_seconds": statistic("train_seconds"),
    "learning_seconds": statistic("learning_seconds"),
    "macs": statistic("macs"),
    "parameters": statistic("parameters"),
    "paper_seconds": row.paper_seconds,
    "task_sparsity": run["task_sparsity"],
    "failures": run["failures"],
  }


def _mean_std(by_seed):
  """Mean and sample standard deviation over seeds (None with one seed), and the values; None without any."""
  if not by_seed:
    return None
  values = np.array(list(by_seed.values()))
  return {
    "mean": float(values.mean()),
    "std": float(values.std(ddof=1)) if len(values) > 1 else None,
    "by_seed": {str(seed): value for seed, value in by_seed.items()},
  }


def _settings(config, row):
  fields = (
    "rounds",
    "local_lr",
    "prox_weight",
    "beta",
    "gamma",
    "penalty_weight",
    "gate_rate",
    "inner_lr",
    "personal_lr",
    "server_lr",
    "adapt_lr",
    "gate_adapt_lr",
    "channel_dropout",
  )
  used = {f for f in fields if config[f] is not None} - (set() if config.gated else {"penalty_weight", "gate_rate", "gate_adapt_lr"})
  return {field: config[field] for field in fields if field in used}


def _tuned_methods(tuned):
  return json.loads((TUNED / f"{tuned}.json").read_text(encoding="utf-8"))["methods"] if tuned else []


def _budget(tuned):
  keys = (
    "algorithm",
    "gated",
    "local_steps",
    "meta_trainings",
    "adaptation_rates",
    "seeds",
    "rounds",
    "validation_tasks",
    "validation_accuracy",
    "seconds",
  )
  return [{key: entry[key] for key in keys} for entry in _tuned_methods(tuned)]


def _channels(workdir, protocol, seeds):
  """on_rate and labels of the target tasks of the first seed that has them."""
  for seed in seeds:
    folder = workdir / f"{protocol}-metagater-k1" / f"seed-{seed}"
    if (folder / "result.json").is_file():
      result = read_result(folder)
      return {"seed": seed, "labels": result["target_labels"], "on_rate": result["on_rate"]}
  return None


# --- what the numbers say about the paper's claims


def _claims(content) -> list[dict[str, Any]]:
  """The three claims of the paper as paired comparisons over seeds, from the rows of a report. Differences of accuracy are in points / 100."""
  rows = {(row["protocol"], row["method"], row["local_steps"]): row for part in content["tables"].values() for row in part["rows"]}
  protocols = list(dict.fromkeys(protocol for protocol, _, _ in rows))

  def get(protocol, method, name, steps=1):
    found = (
      content["curves"].get(protocol, {}).get(method)
      if name == "curves"
      else ((rows.get((protocol, method, steps)) or {}).get(name) or {}).get("by_seed")
    )
    return {int(seed): value for seed, value in (found or {}).items()}

  label = lambda protocol, text: f"{PROTOCOL_LABELS[protocol]}: {text}"

  accuracy, speed = [], []
  for protocol in protocols:
    for ours in ("metagater_ungated", "metagater"):
      for theirs in ("fedavg", "per_fedavg"):
        text = f"{label_of(ours)} against {label_of(theirs)}"
        accuracy.append(_comparison(label(protocol, text), get(protocol, ours, "accuracy"), get(protocol, theirs, "accuracy")))
        if protocol in CURVES:
          both = get(protocol, ours, "curves"), get(protocol, theirs, "curves")
          speed.append(_comparison(label(protocol, text + ", mean of the curve"), _curve_means(*both), _curve_means(*both[::-1])))

  moderate, small = [], []
  for protocol in protocols:
    pair = get(protocol, "metagater", "accuracy"), get(protocol, "metagater_ungated", "accuracy")
    text = label(protocol, "with gating against without")
    if protocol in ("cifar10", "cifar10_moderate", "har"):
      moderate.append(_comparison(text, *pair, margin=SLIGHT))
    else:
      small.append(_comparison(text, *pair))

  snip, times, diversity = [], [], []
  for protocol in protocols:
    for method in filter(is_pruning, registry.methods()):
      snip.append(
        _comparison(
          label(protocol, f"MetaGater against {label_of(method)}"), get(protocol, "metagater", "accuracy"), get(protocol, method, "accuracy")
        )
      )
    ours, theirs = (get(protocol, method, "learning_seconds").values() for method in ("metagater", "metasnip_weight"))
    if ours and theirs:
      times.append({"what": label(protocol, "learning time of MetaGater / MetaSNIP"), "ratio": min(ours) / min(theirs)})
    # MetaSNIP gets each task's sparsity from the gate, so only which channels are kept can be compared.
    diversity.append(
      _comparison(
        label(protocol, "difference of two tasks' channels, MetaGater against MetaSNIP by channel"),
        get(protocol, "metagater", "mask_difference"),
        get(protocol, "metasnip_channel", "mask_difference"),
      )
    )

  claims = [
    ("1", "MetaGater is more accurate after adaptation than FedAvg and Per-FedAvg", accuracy, 0.0),
    ("1, per round", "MetaGater converges faster per round (mean accuracy over the evaluated rounds of Figure 4)", speed, 0.0),
    ("2, moderate data", "Gating costs at most a slight accuracy drop with moderate local data", moderate, SLIGHT),
    ("2, small data", "Gating gains accuracy with small local data", small, 0.0),
    ("3, accuracy", "MetaGater is more accurate than MetaSNIP at the same sparsity", snip, 0.0),
    ("3, diversity", "The channels that MetaGater keeps differ more between tasks than MetaSNIP's at the same sparsity", diversity, 0.0),
  ]
  result = []
  for number, statement, comparisons, margin in claims:
    comparisons = [c for c in comparisons if c]
    for comparison, p in zip(comparisons, holm([c["p"] for c in comparisons])):
      comparison["p_holm"] = p
      # Where all differences are the same there is no test, and the single verdict stands.
      comparison["verdict_holm"] = comparison["verdict"] if p is None or p < 0.05 else "not confirmed"
    if comparisons:
      result.append({"claim": number, "statement": statement, "margin": margin, "comparisons": comparisons, "verdict": _verdict(comparisons)})
  if times:
    result.append(
      {
        "claim": "3, time",
        "statement": "MetaGater learns a target task in a time similar to MetaSNIP's, or shorter",
        "times": times,
        "comparisons": [],
        "margin": 0.0,
        "verdict": _time_verdict(times),
      }
    )
  return result


def _curve_means(curves, others):
  """The mean of each curve over the rounds that both methods were evaluated at."""
  common = set.intersection(*(set(curve["rounds"]) for curve in (*curves.values(), *others.values()))) if curves and others else set()
  at = lambda curve: [accuracy for rounds, accuracy in zip(curve["rounds"], curve["accuracy"]) if rounds in common]
  return {seed: float(np.mean(at(curve))) for seed, curve in curves.items() if common}


def _comparison(what, a, b, margin=0.0):
  difference = paired_difference(a, b, margin)
  if difference is None:
    return None
  return {"what": what, **difference._asdict(), "verdict": difference.verdict(margin)}


def _verdict(comparisons):
  """Of a claim, from its comparisons after Holm's correction."""
  verdicts = [c["verdict_holm"] for c in comparisons]
  for verdict in ("confirmed", "refuted", "untested"):
    if all(v == verdict for v in verdicts):
      return verdict
  return "confirmed in part" if "confirmed" in verdicts else "not confirmed"


def _time_verdict(times):
  """Similar: at most 1.5 times as long; the paper's own times are 1.03 s and 1.4 s."""
  similar = [t["ratio"] <= 1.5 for t in times]
  return "confirmed" if all(similar) else "confirmed in part" if any(similar) else "not confirmed"


def explain(protocol: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
  """What the trials of the tuning say about why methods differ, or do not. Accuracies are of validation tasks.

  Args:
    protocol: whose trials these are.
    entries: the methods of its file in configs/tuned/.
  """
  name = PROTOCOL_LABELS.get(protocol, protocol)
  searched = [entry for entry in entries if entry["trials"]]
  accuracies = lambda entry: np.array([trial["accuracy"] for trial in entry["trials"]])
  one = [entry for entry in searched if entry["local_steps"] == 1]
  reasons = []
  if len(one) > 1:
    best = [accuracies(entry).max() for entry in one]
    gaps = [accuracies(entry).max() - np.median(accuracies(entry)) for entry in one]
    between, within = 100 * (max(best) - min(best)), 100 * float(np.median(gaps))
    text = (
      f"{name}: the best trials of the {len(one)} tuned methods lie within {between:.1f} points of each other, and a "
      f"method's own best trial lies {within:.1f} points above its median trial (median over methods). "
    )
    reasons.append(
      text
      + (
        "How well a method's rates are chosen decides more here than which method it is."
        if within > between
        else "The methods differ by more than their rates do."
      )
    )
  for entry in one:
    if entry["algorithm"] == "per_fedavg" and len(entry["trials"]) > 3:
      rho = float(stats.spearmanr([trial["inner_lr"] for trial in entry["trials"]], accuracies(entry)).statistic)
      if abs(rho) > 0.5:
        reasons.append(
          f"{name}: Per-FedAvg's accuracy {'falls' if rho < 0 else 'rises'} with the rate of its inner step (rank "
          f"correlation {rho:+.2f}; its best is {entry['settings']['inner_lr']:g})."
          + (
            " That step sees one minibatch of a task, where a target adapts on all of its data; towards a rate of 0 the method becomes FedAvg."
            if rho < 0
            else ""
          )
        )
  for entry in one:
    rate, rates = entry["settings"].get("adapt_lr"), adaptation_rates()
    if rate in (rates[0], rates[-1]):
      reasons.append(
        f"{name}: the best of {_method_of(entry)}'s {len(entry['trials'])} trials adapts at {rate:g}, an end of the range that was "
        f"searched ({rates[0]:g} to {rates[-1]:g}), with {100 * entry['validation_accuracy']:.1f} % on validation tasks. So settings that suit it "
        "were not found with this budget, and what is said of it here, and in protocols that take these settings, is of little weight."
      )
  several = [entry for entry in searched if entry["local_steps"] > 1 and entry["algorithm"] == "metagater"]
  lost = lambda group: (sum(int((accuracies(entry) < 0.1).sum()) for entry in group), sum(len(entry["trials"]) for entry in group))
  if several:
    (bad, trials), (bad_one, trials_one) = lost(several), lost([e for e in one if e["algorithm"] == "metagater"])
    if bad:
      reasons.append(
        f"{name}: {bad} of MetaGater's {trials} trials with more than one local step diverged, against {bad_one} of "
        f"{trials_one} with one. Gradient descent on the local problem is stable for η(λ + L) < 2 only, where L is "
        "the loss's curvature; with one step from the meta-model the pull has no gradient and λ sets no such bound."
      )
  return reasons


def _method_of(entry):
  known = registry.methods()
  return next(method.label for method in known.values() if (method.algorithm, method.gated) == (entry["algorithm"], entry["gated"]) and method.space)


def _undertrained(protocol, runs):
  """A sentence where meta-training ended so near to guessing that methods are compared in their first rounds only."""
  chance = float(np.log(CLASSES[protocol]))
  losses = {
    label_of(method): float(np.mean(list(run["train_loss"].values())))
    for (p, method, steps), run in runs.items()
    if p == protocol and steps == 1 and run["train_loss"]
  }
  near = {label: loss for label, loss in losses.items() if loss > 0.8 * chance}
  if near:
    yield (
      f"{PROTOCOL_LABELS[protocol]}: at the last round the training loss before adaptation is still near that of guessing "
      f"among all classes ({chance:.2f}): "
      + ", ".join(f"{label} {loss:.2f}" for label, loss in near.items())
      + ". After so few rounds the beginnings of training are compared, not what the methods reach in the end."
    )


# --- from numbers to words


def table_markdown(contents: Mapping[str, Any]) -> str:
  """One of the paper's tables, from report.json."""
  rows = contents["rows"]
  name = lambda row: [PROTOCOL_LABELS[row["protocol"]], label_of(row["method"]) + ("" if row["in_paper"] else " (not in the paper)")]
  if contents["kind"] == "training":
    header = ["Dataset", "Method", "Local update", "Accuracy (%)", "before adaptation", "Training time (s)", "paper: time (s)"]
    cells = lambda row: [row["local_steps"], _accuracy(row), _percent(row["before_adaptation"]), _seconds(row["train_seconds"], ".1f"), _paper(row)]
  else:
    header = [
      "Dataset",
      "Method",
      "Accuracy (%)",
      "Sparsity (%), ± over tasks",
      "channels that differ between two tasks (%)",
      "MACs (%)",
      "Learning time (s)",
      "paper: time (s)",
    ]
    cells = lambda row: [
      _accuracy(row),
      _sparsity(row),
      _percent(row["mask_difference"], spread=False),
      _percent(row["macs"], spread=False),
      _seconds(row["learning_seconds"], ".3f"),
      _paper(row),
    ]
  return table(header, [[*name(row), *cells(row)] for row in rows])


def overview(content: Mapping[str, Any]) -> str:
  """Accuracy after one step per stage of the methods with one local step, by protocol, from report.json."""
  found, protocols = {}, {}
  for part in content["tables"].values():
    for row in part["rows"] if part["kind"] == "training" else ():
      if row["local_steps"] == 1 and row["in_paper"]:
        found.setdefault(row["method"], {})[row["protocol"]] = _accuracy(row)
        protocols[row["protocol"]] = PROTOCOL_LABELS[row["protocol"]]
  return table(
    ["Accuracy (%)", *protocols.values()],
    [[label_of(method), *(cells.get(protocol, "") for protocol in protocols)] for method, cells in found.items()],
  )


def claims_table(content: Mapping[str, Any]) -> str:
  """What the runs say about each claim of the paper, from report.json."""
  return table(
    ["Claim of the paper", "in these runs", "comparisons"],
    [[f"{claim['claim']}: {claim['statement']}", claim["verdict"], claim_summary(claim)] for claim in content["claims"]],
  )


def _accuracy(row):
  failed = f"; {len(row['failures'])} failed" if row["failures"] else ""
  return (_percent(row["accuracy"]) if row["accuracy"] else "no run") + failed


def _percent(statistic, spread=True):
  if statistic is None:
    return ""
  return f"{100 * statistic['mean']:.1f}" + (f" ± {100 * statistic['std']:.1f}" if spread and statistic["std"] is not None else "")


def _sparsity(row):
  if row["sparsity"] is None:
    return ""
  return f"{100 * row['sparsity']['mean']:.1f} ± {100 * row['sparsity_std_over_tasks']['mean']:.1f}"


def _seconds(statistic, form):
  """Of the seed that was disturbed least: on a shared machine the smallest of several times is the most repeatable."""
  return "" if statistic is None else format(min(statistic["by_seed"].values()), form)


def _paper(row):
  return "" if row["paper_seconds"] is None else f"{row['paper_seconds']:g}"


def text(content: Mapping[str, Any], drawn: Sequence[str]) -> str:
  """report.md from what report.json holds, with the figures of these names."""
  content = _of_today(content)
  parts = [
    "# MetaGater: the paper's tables on real data",
    "Accuracy is of the target tasks' test data after one gradient step per stage, mean ± standard deviation over "
    "seeds; sparsity is ± its standard deviation over target tasks, the paper's "
    '"diversity" (every standard deviation is the sample\'s, '
    "with n − 1). Training time is the rounds alone (their median times their number), without compilation and evaluation, "
    "and learning time both stages for one target task (median), each of the seed that was disturbed least on a shared "
    "machine; the paper's times are of its own GPU. The paper's accuracies and sparsities are lost in the text that we have.",
    protocol_table(content),
  ]
  for number, part in content["tables"].items():
    if part["rows"]:
      parts += [f"## Table {number}: {part['title']}", table_markdown(part)]
  failures = [
    f"* Table {number}, {label_of(row['method'])} on {PROTOCOL_LABELS[row['protocol']]}, K = {row['local_steps']}, seed {seed}: {error}"
    for number, part in content["tables"].items()
    for row in part["rows"]
    for seed, error in row["failures"].items()
  ]
  if failures:
    parts += ["## Runs that failed", "\n".join(failures)]
  for name, title, text in (
    ("curves", "Figure 4: accuracy over rounds", "Mean over seeds, band of ± one standard deviation."),
    ("task_sparsity", "Sparsity by target task", "Points are seeds, bars their mean, the dashed line the mean over tasks."),
    ("channels", "Which channels each target task keeps", "One seed; fraction of a task's test samples that switch a channel on."),
  ):
    if name in drawn:
      parts += [f"## {title}", text, f"![{title}](figures/{name}.png)"]
  parts += ["## Claims", *_claims_text(content["claims"])]
  reasons = [reason for group in content["reasons"].values() for reason in group]
  if reasons:
    parts += ["## What explains the differences", "\n".join(f"* {reason}" for reason in reasons)]
  parts += ["## Settings and the budget they were tuned with", _budget_text(content)]
  return "\n\n".join(parts) + "\n"


def protocol_table(content: Mapping[str, Any]) -> str:
  """What the protocols of report.json are."""
  rows = []
  for protocol, p in _of_today(content)["protocols"].items():
    widths = f" {'-'.join(map(str, p['widths']))}" if p["widths"] else ""
    rows.append(
      [
        PROTOCOL_LABELS[protocol],
        seeds_as_text(p["seeds"]),
        " or ".join(map(str, p["rounds"])),
        f"{p['tasks']} ({p['validation_tasks']}, {p['target_tasks']})",
        p["cohort"],
        p["batch_size"],
        f"{p['model']}{widths}",
      ]
    )
  return table(["Protocol", "seeds", "rounds", "tasks (validation, target)", "cohort", "batch", "network"], rows)


def seeds_as_text(seeds: Sequence[int]) -> str:
  """Seeds as commands take them.

  >>> seeds_as_text([1, 2, 3, 7])
  '1-3, 7'
  """
  runs: list[list[int]] = []
  for seed in sorted(seeds):
    if runs and seed == runs[-1][-1] + 1:
      runs[-1].append(seed)
    else:
      runs.append([seed])
  return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _claims_text(claims):
  for claim in claims:
    yield f"### Claim {claim['claim']}: {claim['verdict']}"
    yield (
      f"{claim['statement']}." + (f" Slight means at most {100 * claim['margin']:g} point." if claim["margin"] else "") + " " + claim_summary(claim)
    )
    if claim["comparisons"]:
      rows = []
      for c in claim["comparisons"]:
        interval = "" if c["low"] is None else f"{100 * c['low']:+.1f} … {100 * c['high']:+.1f}"
        optional = lambda value, form: "" if value is None else format(value, form)
        rows.append(
          [
            c["what"],
            f"{100 * c['mean']:+.1f}",
            interval,
            optional(c["effect"], ".1f"),
            optional(c["p"], ".3f"),
            optional(c.get("p_holm"), ".3f"),
            c["seeds"],
            c["verdict"] + ("" if c["verdict"] == c.get("verdict_holm", c["verdict"]) else f" (corrected: {c['verdict_holm']})"),
          ]
        )
      yield table(["Comparison", "difference (points)", "95 % interval", "effect size d", "p", "p, corrected", "seeds", "verdict"], rows)
    for t in claim.get("times", ()):
      yield f"* {t['what']}: {t['ratio']:.2f}"


def claim_summary(claim: Mapping[str, Any]) -> str:
  """One sentence that follows from the comparisons."""
  comparisons = claim["comparisons"]
  if not comparisons:
    return "Similar means at most 1.5 times as long."
  count = lambda verdict, of="verdict": sum(c.get(of, c["verdict"]) == verdict for c in comparisons)
  verb = lambda number, stem: f"{number} {stem}{'s' if number == 1 else ''}"
  corrected = lambda verdict: f" ({count(verdict, 'verdict_holm')} after Holm's correction)" if len(comparisons) > 1 and count(verdict) else ""
  parts = [f"{count('confirmed')} of {len(comparisons)} comparisons confirm it with a paired 95 % interval{corrected('confirmed')}"]
  if count("refuted"):
    worst = min((c for c in comparisons if c["verdict"] == "refuted"), key=lambda c: c["mean"])
    parts.append(
      f"{verb(count('refuted'), 'say')} the opposite{corrected('refuted')}, most of all {worst['what']} ({100 * worst['mean']:+.1f} points)"
    )
  if count("not confirmed"):
    parts.append(f"{count('not confirmed')} cannot tell at this number of seeds")
  if count("untested"):
    parts.append(f"{count('untested')} have too few seeds for an interval")
  return ", ".join(parts) + "."


def _budget_text(content):
  rows = []
  for key, settings in content["settings"].items():
    protocol, method, steps = key.split("-")
    known = registry.methods()[method]
    name = method if is_pruning(method) else known.algorithm
    entries = [b for b in content["protocols"][protocol]["budget"] if (b["algorithm"], b["gated"]) == (name, known.gated)]
    entry = min(entries, key=lambda b: abs(b["local_steps"] - int(steps)), default=None)
    tuned = (
      ""
      if entry is None
      else f"{entry['meta_trainings']} of {entry['rounds']} rounds"
      + ("" if entry["local_steps"] == int(steps) else f" at K = {entry['local_steps']}")
      + ("" if content["protocols"][protocol]["tuned"] == protocol else f" on {PROTOCOL_LABELS[content['protocols'][protocol]['tuned']]}")
    )
    tuned = tuned.replace(" of ", " of at most ", 1) if "rounds" in settings else tuned
    values = ", ".join(f"{field} {value:.3g}" if isinstance(value, float) else f"{field} {value}" for field, value in settings.items())
    rows.append(
      [
        PROTOCOL_LABELS[protocol],
        label_of(method),
        steps,
        values,
        tuned,
        "" if entry is None else entry["adaptation_rates"],
        "" if entry is None else format(100 * entry["validation_accuracy"], ".1f"),
      ]
    )
  header = ["Protocol", "Method", "K", "settings", "meta-trainings", "adaptation rates", "validation accuracy (%)"]
  return (
    "Every method was meta-trained at the same number of points of its own search space, and every meta-model was measured "
    "with the same adaptation rates, on validation tasks that are not trained on "
    "(`python -m experiments.tune`). The images of all those tasks are in "
    "no task of the runs here. MetaSNIP uses the meta-models tuned without gates and has an "
    "adaptation rate of its own.\n\n" + table(header, rows)
  )


def _draw(content, folder):
  """The figures for which there are numbers; their names."""
  folder.mkdir(parents=True, exist_ok=True)
  drawn = []
  panels = {
    PROTOCOL_LABELS[protocol]: {
      label_of(method): (next(iter(curves.values()))["rounds"], np.array([c["accuracy"] for c in curves.values()]))
      for method, curves in methods.items()
      if curves
    }
    for protocol, methods in content["curves"].items()
  }
  panels = {title: curves for title, curves in panels.items() if curves}
  if panels:
    figures.plot_curves(folder / "curves.png", panels)
    drawn.append("curves")
  sparsity = {}
  for part in content["tables"].values():
    for row in part["rows"]:
      if row["method"] == "metagater" and row["local_steps"] == 1 and row["task_sparsity"]:
        sparsity[PROTOCOL_LABELS[row["protocol"]]] = np.array(list(row["task_sparsity"].values()))
  if sparsity:
    figures.plot_task_sparsity(folder / "task_sparsity.png", sparsity)
    drawn.append("task_sparsity")
  channels = {
    f"{PROTOCOL_LABELS[protocol]}, {layer}, seed {c['seed']}": (np.array(rate), c["labels"])
    for protocol, c in content["channels"].items()
    if c
    for layer, rate in c["on_rate"].items()
  }
  if channels:
    figures.plot_channels(
      folder / "channels.png",
      {title: rate for title, (rate, _) in channels.items()},
      {title: [", ".join(map(str, labels)) for labels in names] for title, (_, names) in channels.items()},
    )
    drawn.append("channels")
  return drawn

"""Tables of what things cost, from the record of `python -m benchmarks` in results/benchmark.json."""

from typing import Any

from experiments.reports.markdown import table

__all__ = ["SECTIONS", "machine", "section_table"]

# Sections of `python -m benchmarks` whose rows with a key a page shows, by the page's part; all rows are in the record.
SECTIONS: dict[str, tuple[str, ...]] = {
  "rounds": ("rounds", "bfloat16", "table1"),
  "others": ("others", "lasso"),
  "scale": ("populations", "cohorts", "memory"),
  "start": ("loading", "command"),
  "fewshot": ("maml", "anp"),
  "devices": ("compact", "dynamic"),
}


def machine(figures: dict[str, Any]) -> str:
  """What the figures were measured on, and when."""
  facts, dates = figures["machine"], sorted({row.get("date", figures["machine"]["date"]) for row in _shown(figures)} or {figures["machine"]["date"]})
  return f"{facts['backend']}, {facts['cores']} cores, {facts['processor']}, jax {facts['jax']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


def section_table(figures: dict[str, Any], name: str) -> str:
  """The rows of a page's part."""
  rows = []
  for row in _shown(figures, SECTIONS[name]):
    note = f"{row['gflop_per_second']:.0f} GFLOP/s, {100 * row['of_matrix_rate']:.0f} % of a matrix product's" if "of_matrix_rate" in row else ""
    compiled = f"{row['compile_seconds']:.1f} s" if "compile_seconds" in row else ""
    rows.append([row["what"], f"{_figure(row['value'])} {row['unit']}", compiled, note])
  header = ["what", "figure", "compilation", "rate"]
  shown = [column for column in range(len(header)) if column < 2 or any(row[column] for row in rows)]  # without columns that are empty
  return table([header[column] for column in shown], [[row[column] for column in shown] for row in rows])


def _shown(figures, sections=tuple(section for part in SECTIONS.values() for section in part)):
  return [row for row in figures["rows"] if row["section"] in sections and "key" in row]


def _figure(value):
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

"""Tables of a Markdown page, none wider than a reader can take in."""

from collections.abc import Iterable, Sequence

__all__ = ["WIDEST", "table"]

# Columns; what needs more is two tables.
WIDEST = 8


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
  """A Markdown table.

  Raises:
    ValueError: more than `WIDEST` columns, or a row of another length than the header.

  >>> print(table(["method", "accuracy"], [["FedAvg", 78.9]]))
  | method | accuracy |
  |---|---|
  | FedAvg | 78.9 |
  """
  if len(header) > WIDEST:
    raise ValueError(f"a table of {len(header)} columns ({', '.join(header)}) is too wide to read; split it into tables of at most {WIDEST}.")
  lines = [_line(header), "|" + "---|" * len(header)]
  for row in rows:
    if len(row) != len(header):
      raise ValueError(f"a row has {len(row)} cells, the header {len(header)}: {row}.")
    lines.append(_line(row))
  return "\n".join(lines)


def _line(cells):
  return "| " + " | ".join(map(str, cells)) + " |"

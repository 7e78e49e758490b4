"""`python -m experiments.report RUN…`: finished runs side by side, on one web page that needs no other file.

Runs may be of different algorithms, and federated or few-shot. The page has curves, target tasks, what gates keep and how adaptation changed them,
cost, and the settings that differ.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.command import study_command
from experiments.reports.compare import comparison

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
  """The command. Bad input ends it with one line on standard error and exit status 2."""
  parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
  parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page; default: report.html")
  options = parser.parse_args(arguments)

  def body():
    text = comparison(options.runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(f"{options.out}: {len(options.runs)} run{'s' if len(options.runs) > 1 else ''}, {len(text) / 1000:.0f} KB")

  study_command("experiments.report", body)


if __name__ == "__main__":
  main()

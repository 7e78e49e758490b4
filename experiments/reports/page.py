"""A self-contained web page: text, tables and figures that follow the reader's light or dark scheme, on a laptop and on a phone."""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import markdown

from experiments.reports.figures import pyplot

__all__ = ["cards", "figure", "from_markdown", "page", "rows_table"]

# Lines and text of figures are drawn in this colour, which then becomes the page's own.
_INK = "#010203"
_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2329; --soft: #66707a; --line: #d9dee3; --card: #f5f7f9 }
@media (prefers-color-scheme: dark) { :root { --page: #14181c; --ink: #e6eaee; --soft: #98a3ad; --line: #333b43; --card: #1d2329 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1100px; padding: 1.5rem clamp(.8rem, 3vw, 2rem) 4rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem }
p, figcaption { color: var(--soft); max-width: 46rem; margin: .4rem 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: .8rem; margin: 1rem 0 }
.card { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--soft); border-radius: 8px; padding: .8rem 1rem }
.card b { display: block; font-size: 1.6rem; line-height: 1.2 } .card span { color: var(--soft); overflow-wrap: anywhere }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .93rem }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 }
figure { margin: .8rem 0 } figure svg { width: 100%; height: auto; color: var(--ink) } figure.narrow svg { max-width: 760px }
.wide { overflow-x: auto } .wide svg { min-width: 620px } img { max-width: 100%; background: #ffffff; border-radius: 6px }
"""


def page(title: str, parts: Iterable[str]) -> str:
  """The page, of parts that are HTML already.

  Args:
    title: of the page, plain text.
    parts: one after the other.
  """
  name = html.escape(title)
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{name}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>{name}</h1>\n'
    + "\n".join(parts)
    + "\n</body></html>\n"
  )


def from_markdown(text: str, folder: Path) -> str:
  """The page of a Markdown text, its images inside.

  Args:
    text: its first line is the title, "# …".
    folder: from which the text names its images (PNG).
  """
  title, _, body = text.strip().partition("\n")
  body = markdown.markdown(body, extensions=["tables"])
  whole = lambda match: f'<div class="scroll">{match[0].replace(" ± ", "&nbsp;±&nbsp;")}</div>'
  body = re.sub(r"<table>.*?</table>", whole, body, flags=re.DOTALL)
  inside = lambda match: f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'
  return page(title.removeprefix("# "), [re.sub(r'src="([^":]+\.png)"', inside, body)])


def cards(items: Sequence[tuple[str, str, str]]) -> str:
  """Cards of (large text, small text, colour)."""
  return (
    '<div class="cards">'
    + "".join(
      f'<div class="card" style="border-left-color:{color}"><b>{html.escape(large)}</b><span>{html.escape(small)}</span></div>'
      for large, small, color in items
    )
    + "</div>"
  )


def rows_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """A table that scrolls by itself where a screen is narrow."""
  cells = lambda row, tag: "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
  return (
    f'<div class="scroll"><table><thead><tr>{cells(header, "th")}</tr></thead><tbody>'
    + "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    + "</tbody></table></div>"
  )


def figure(draw, caption: str, *, width: float = 9, height: float = 3.6, panels: int = 1, wide: bool = True) -> str:
  """A figure as SVG inside the page.

  Args:
    draw: `(axes) -> None`, draws into a list of so many axes.
    caption: what it shows, plain text.
    width, height: in inches.
    panels: side by side.
    wide: whether it scrolls where a screen is narrower than a reader can do with.
  """
  from matplotlib import rc_context

  plt = pyplot()
  with rc_context(
    {
      "svg.fonttype": "none",
      "text.color": _INK,
      "axes.edgecolor": _INK,
      "axes.labelcolor": _INK,
      "xtick.color": _INK,
      "ytick.color": _INK,
      "font.size": 10,
      "axes.spines.top": False,
      "axes.spines.right": False,
      "legend.frameon": False,
      "grid.color": "#8a949e",
    }
  ):
    drawn, axes = plt.subplots(1, panels, figsize=(width, height), layout="constrained", squeeze=False)
    draw(list(axes[0]))
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(drawn)
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
  return f'<figure><div class="{"wide" if wide else "narrow"}">{svg}</div><figcaption>{html.escape(caption)}</figcaption></figure>'

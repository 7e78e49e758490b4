"""The documentation's site: `make docs` builds it to docs/_build/html. Notebooks are run while it is built, so their figures are today's."""

import inspect
import os
import re
import shutil
from pathlib import Path

from sphinx.util import logging

import metagater_jax
from metagater_jax import __version__

_LOG = logging.getLogger(__name__)

project = "metagater_jax"
author = copyright = "The metagater_jax authors"
release = version = __version__

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "sphinx.ext.mathjax",
  "sphinx_copybutton",
  "sphinx_design",
]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = "metagater_jax"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image"]
myst_heading_anchors = 4

# "off" for a quick look at the pages alone: METAGATER_NOTEBOOKS=off make docs
nb_execution_mode = os.environ.get("METAGATER_NOTEBOOKS", "force")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
suppress_warnings = ["myst.header"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Notebooks stand beside docs/, where people look for them; Sphinx reads below docs/ only.
_HERE = Path(__file__).parent
shutil.copytree(_HERE.parent / "notebooks", _HERE / "notebooks", dirs_exist_ok=True)


def _as_rst(app, what, name, obj, options, lines):
  """Docstrings are plain text with `code` and mathematics, in which * and | mean themselves; what is indented after an empty line is a formula or
  code."""
  found, field, formula, example = [], False, False, False
  for line in lines:
    bare, indented = line.strip(), line.startswith("    ")
    if bare.startswith(">>>"):
      example = True
    if not bare:
      example = False
      found.append("")
      continue
    if not indented:
      field, formula = bare.startswith(":"), False
    elif not field and not formula and not example and found and not found[-1]:
      formula = True
      found += ["::", ""]
    if formula or example or bare.startswith(".. "):
      found.append(line)
      continue
    start, text = re.match(r"(\s*:(?:param|raises|returns|ivar|type)[^:]*:|)(.*)", line).groups()
    parts = re.split(r"(`+[^`]+`+)", text)
    parts = [re.sub(r"^`\s*([^`]+?)\s*`$", r"``\1``\\ ", part) if k % 2 else re.sub(r"([*|\\])", r"\\\1", part) for k, part in enumerate(parts)]
    found.append(start.replace("*", r"\*") + re.sub(r"`\\ (?=[\s.,;:)]|$)", "`", "".join(parts)))
  lines[:] = found


def _within(app, name, source):
  """Pages link to files beside docs/, which are no pages of the site: there they are names."""
  depth = name.count("/")
  up = "../" * (depth + 1)
  source[0] = source[0].replace(f"]({up}README.md)", f"]({'../' * depth}start.md)")
  source[0] = source[0].replace(f"]({up}notebooks/", f"]({'../' * depth}notebooks/")
  source[0] = re.sub(rf"(?<!!)\[([^]]+)\]\({re.escape(up)}(?!\.\./)([^)]+)\)", r"\1 (`\2`)", source[0])


def _without_fields(app, what, name, obj, skip, options):
  """Fields of tuples are explained in the docstring's attributes; that each is the alias of a number says nothing."""
  return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def _complete(app, env):
  """The reference has what is public, once, and nothing else. What is missing or should not be there is a warning, which ends `make docs`."""
  shown = set(env.get_domain("py").objects)
  wings = [getattr(metagater_jax, name) for name in metagater_jax.__all__ if inspect.ismodule(getattr(metagater_jax, name))]
  places = lambda wing, name: [other for other in wings if name in other.__all__ and getattr(other, name) is getattr(wing, name)]
  for wing in wings:
    of_wing = {name.removeprefix(f"{wing.__name__}.") for name in shown if name.startswith(f"{wing.__name__}.")}
    for name in sorted(set(wing.__all__) ^ {name for name in of_wing if "." not in name}):
      if name in wing.__all__ and any(f"{other.__name__}.{name}" in shown for other in places(wing, name)):
        continue
      _LOG.warning(
        "%s.%s is %s", wing.__name__, name, "public, but not in the reference" if name in wing.__all__ else "in the reference, but not public"
      )


def setup(app):
  app.connect("env-check-consistency", _complete)
  app.connect("autodoc-process-docstring", _as_rst, priority=900)  # after napoleon
  app.connect("autodoc-skip-member", _without_fields)
  app.connect("source-read", _within)

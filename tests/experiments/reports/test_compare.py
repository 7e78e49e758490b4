"""The page that compares runs: what it says, that it needs nothing else, and that a browser shows it whole."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import call

from configs import digits
from experiments.report import main
from experiments.reports import paper
from experiments.reports.compare import comparison
from experiments.reports.page import figure, page, rows_table
from experiments.run import run

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A gated and a plain run of other algorithms on the same tasks."""
  workdir = tmp_path_factory.mktemp("runs")
  for name, fields in (("gated", {}), ("fedavg", {"algorithm": "fedavg", "gated": False})):
    config = digits.get_config()
    config.update(rounds=4, eval_every=2, widths=(4, 4, 8), tuned=None, **fields)
    run(config, workdir / name, quiet=True)
  return workdir


@pytest.fixture(scope="module")
def made(runs):
  outcome = call(main, str(runs / "gated"), str(runs / "fedavg"), f"--out={runs / 'report.html'}")
  assert outcome.status == 0, outcome.err
  return runs / "report.html"


def test_it_is_one_file_with_everything(made):
  text = made.read_text()
  assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]+"', text)  # nothing is loaded from elsewhere
  for words in (
    "digits, metagater, gated, two_stage",
    "digits, fedavg, fine_tune",
    "Accuracy over rounds",
    "Channels that tasks keep",
    "What adaptation changed in the gates",
    "Settings that differ",
    "<td>algorithm</td><td>metagater</td><td>fedavg</td>",
  ):
    assert words in text
  assert text.count("<svg") == 6 and "#010203" not in text and "currentColor" in text


def test_runs_that_are_alike_are_told_apart_and_what_is_no_run_is_named(runs, tmp_path):
  text = comparison([runs / "gated", runs / "gated"])
  assert "seed 0 (gated) (1)" in text and "seed 0 (gated) (2)" in text and "<td>none</td>" in text
  outcome = call(main, str(tmp_path))
  assert outcome.status == 2 and str(tmp_path) in outcome.err and not (tmp_path / "report.html").exists()


def test_words_of_a_run_are_no_markup():
  assert "<script>" not in page("<script>", [rows_table(["<script>"], [["<script>"]]), figure(lambda axes: axes[0].plot([0, 1]), "<script>")])


def seen(page, probe, width):
  """What a browser finds on a page: how much wider than the screen it is, and numbers of figures and of texts that are cut off."""
  script = """<script>window.addEventListener("load", () => {
    const boxes = [...document.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect());
    document.body.dataset.found = JSON.stringify({
      wide: document.documentElement.scrollWidth - window.innerWidth, figures: boxes.length,
      small: boxes.filter(b => b.width < 300 || b.height < 60).length,
      empty: [...document.querySelectorAll("figure svg")].filter(s => s.querySelectorAll("path, use, image").length < 5).length,
      outside: [...document.querySelectorAll("figure svg text")].filter(t => { const a = t.getBoundingClientRect(),
        b = t.closest("svg").getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1 }).length,
      cut: [...document.querySelectorAll("h1, h2, p, figcaption, .card b, .card span")].filter(
        e => e.scrollWidth > e.clientWidth + 1).length})})</script>"""
  probe.write_text(page.read_text().replace("</body>", f"{script}</body>"))
  done = subprocess.run(
    [
      CHROMIUM,
      "--headless",
      "--no-sandbox",
      "--disable-gpu",
      f"--window-size={width},900",
      "--virtual-time-budget=5000",
      "--enable-logging=stderr",
      "--dump-dom",
      f"file://{probe}",
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  assert "CONSOLE" not in done.stderr
  return json.loads(re.search(r'data-found="([^"]+)"', done.stdout)[1].replace("&quot;", '"'))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_whole(made, tmp_path, width):
  """No errors, no empty figure, and nothing wider than the screen but what scrolls by itself."""
  found = seen(made, tmp_path / "probe.html", width)
  assert found.pop("wide") <= 0 and found == {"figures": 6, "small": 0, "empty": 0, "outside": 0, "cut": 0}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_papers_tables_are_such_a_page(tmp_path, width):
  paper.render(json.loads((ROOT / "results" / "tables" / "report.json").read_text()), tmp_path)
  content = (tmp_path / "report.html").read_text()
  assert 'src="figures' not in content and content.count("data:image/png;base64,") == len(list((tmp_path / "figures").iterdir()))
  found = seen(tmp_path / "report.html", tmp_path / "probe.html", width)
  assert found["wide"] <= 0 and found["cut"] == 0

"""What README and docs/ show runs as it stands."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import call

import metagater_jax as mg
from experiments.config import registry
from experiments.run import main

ROOT = Path(__file__).resolve().parents[1]
_BUILT = {"_build", "notebooks"}  # what `make docs` leaves below docs/
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if not _BUILT & set(page.relative_to(ROOT / "docs").parts))]


def block(page, start, language="python"):
  return next(code for code in re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) if code.startswith(start))


def test_readme_is_short():
  assert len((ROOT / "README.md").read_bytes()) <= 8192


def test_fifteen_lines_of_code(capsys):
  names = {}
  exec(block("README.md", "import jax, jax.numpy as jnp, metagater_jax"), names)
  metrics = mg.evaluate_task(names["network"], names["adapted"], names["population"].test(17))
  assert metrics.accuracy > 0.8 and 0.1 < metrics.sparsity < 0.6
  assert "TaskMetrics(" in capsys.readouterr().out


@pytest.fixture(scope="module")
def vectors():
  """A population of 20 small tasks on vectors of four features."""
  rng, tasks = np.random.default_rng(0), 20
  labels = np.arange(20 * tasks) % 3
  parts = np.split(np.arange(20 * tasks), tasks)
  partition = mg.data.Partition(tuple(part[:15] for part in parts), tuple(part[15:] for part in parts))
  return mg.make_population(rng.normal(size=(20 * tasks, 4)).astype(np.float32), labels, partition)


def test_algorithms_and_personalizers(vectors):
  network = mg.GatedNetwork(mg.MLP(classes=3, widths=(8,)))
  names = {
    "mg": mg,
    "jax": jax,
    "jnp": jnp,
    "partial": partial,
    "population": vectors,
    "loss": mg.classification_loss(network),
    "params": network.init(jax.random.key(0), (4,)),
  }
  exec(block("docs/building-blocks.md", "algorithm = "), names)
  assert abs(float(mg.pruning.mask_sparsity(names["adapted"].mask)) - 0.5) < 0.02


def test_many_devices_and_data_on_the_host_give_the_same_rounds(vectors):
  """The two ways of docs/many-devices.md, from the same start and key."""
  network = mg.GatedNetwork(mg.MLP(classes=3, widths=(8,)))
  loss = mg.classification_loss(network)
  images, labels = np.asarray(vectors.images), np.asarray(vectors.labels)
  indices = lambda index, count: tuple(np.asarray(row)[:n] for row, n in zip(index, np.asarray(count)))
  names = {
    "mg": mg,
    "jax": jax,
    "partial": partial,
    "population": vectors,
    "tasks": jnp.arange(len(vectors.train_count)),
    "algorithm": mg.metagater(loss, local_lr=0.1),
    "params": network.init(jax.random.key(0), (4,)),
    "images": images,
    "labels": labels,
    "partition": mg.data.Partition(indices(vectors.train_index, vectors.train_count), indices(vectors.test_index, vectors.test_count)),
  }
  exec(block("docs/many-devices.md", "mesh = "), names)
  meshed = names["state"].server
  exec(block("docs/many-devices.md", "store = "), names)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), jax.device_get(names["server"]), jax.device_get(meshed))


def test_scores_and_masks(vectors):
  network = mg.GatedNetwork(mg.MLP(classes=3, widths=(8,)))
  names = {
    "mg": mg,
    "params": network.init(jax.random.key(0), (4,)),
    "loss": mg.classification_loss(network),
    "batch": vectors.train(0).rows(jnp.arange(15)),
  }
  exec(block("docs/building-blocks.md", "score = "), names)
  assert float((names["pruned"]["backbone"]["hidden1"]["kernel"] == 0).sum()) == round(0.9 * 32)


def test_few_shot():
  rng = np.random.default_rng(0)
  names = {
    "mg": mg,
    "jax": jax,
    "optax": optax,
    "partial": partial,
    "images": rng.normal(size=(60, 8, 8, 1)).astype(np.float32),
    "labels": np.arange(60) % 5,
  }
  exec(block("docs/building-blocks.md", "pool = "), names)
  assert abs(float(mg.pruning.mask_sparsity(names["mask"])) - 0.85) < 0.01
  for weights in (names["state"].params, names["task"]):
    jax.tree.map(lambda w, c: np.testing.assert_array_equal(np.asarray(w)[np.asarray(c) == 0], 0), weights, names["mask"])


def test_lasso():
  a = jax.random.normal(jax.random.key(0), (50, 10))
  b = a[:, 3] * 2
  names = {
    "mg": mg,
    "optax": optax,
    "w": jnp.zeros(10),
    "L": jnp.linalg.norm(a, 2) ** 2 / 50,
    "gradient": jax.grad(lambda w: jnp.mean((a @ w - b) ** 2) / 2),
  }
  exec(block("docs/building-blocks.md", "solver = "), names)
  assert np.flatnonzero(names["solution"]).tolist() == [3]


def test_an_own_model():
  names = {"mg": mg, "jax": jax, "nn": nn, "images": jnp.ones((2, 8, 8, 1))}
  exec(block("docs/building-blocks.md", "class Mine"), names)
  assert names["masks"]["stem"].shape == (2, 16) and mg.nn.head_of(names["Mine"](), (8, 8, 1)) == "head"


@pytest.fixture
def own_registry(monkeypatch):
  """What a test registers is gone afterwards."""
  for table in ("ALGORITHMS", "PERSONALIZERS", "SCORES", "NETWORKS", "DATASETS"):
    monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


def test_one_of_each_registered_from_outside_runs(own_registry, tmp_path):
  config = tmp_path / "mine.py"
  config.write_text(block("docs/extending.md", '"""One of each'))
  outcome = call(main, f"--config={config}", f"--workdir={tmp_path / 'run'}")
  assert outcome.status == 0, outcome.err
  assert "mine: fedavgm, 30 rounds, head_only" in outcome.out and re.search(r"pruned +5\d\.\d %", outcome.out)
  assert "FedAvgM" in {method.label for method in registry.methods().values()}
  with np.load(tmp_path / "run" / "mask.npz") as mask:  # the head, which the network does not name, is found and spared
    assert mask["backbone/logits/kernel"].all() and 0 < mask["backbone/filters/kernel"].mean() < 1
  outcome = call(main, f"--config={config}", "--config.algorithm=fedavgmm", f"--workdir={tmp_path / 'other'}")
  assert outcome.status == 2 and "Did you mean 'fedavgm'" in outcome.err


def apply_diff(diff, folder):
  """Applies one of the page's diffs, whose hunks show a line of the file instead of a number."""
  for part in re.split(r"(?m)^--- ", diff)[1:]:
    header, *hunks = part.split("@@\n")
    old, new, _ = header.split("\n")
    path = folder / new.split("b/", 1)[1]
    for hunk in hunks:
      lines = hunk.rstrip("\n").split("\n")
      text = "".join(line[1:] + "\n" for line in lines)
      if old == "/dev/null":
        path.write_text(text)
        continue
      (anchor,) = (line[1:] for line in lines if line.startswith(" "))
      assert path.read_text().count(anchor + "\n") == 1, anchor
      path.write_text(path.read_text().replace(anchor + "\n", text))


@pytest.mark.slow
def test_the_diffs_are_complete(tmp_path):
  for package in ("metagater_jax", "experiments", "configs"):
    shutil.copytree(ROOT / package, tmp_path / package)
  diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
  assert len(diffs) == 5
  for diff in diffs:
    apply_diff(diff, tmp_path)
  command = [
    sys.executable,
    "-m",
    "experiments.run",
    "--config.rounds=2",
    "--config.eval_every=2",
    "--config.algorithm=fedavgm",
    "--config.personalizer=gate_only",
    "--config.gated=True",
    "--config.gated_layers=conv1",
    "--config.model=tiny",
    "--config.widths=(8,)",
    "--config.dataset=dark_digits",
    "--config.prune.score=gradient",
    "--config.prune.sparsity=0.5",
    "--config.prune.every=1",
  ]
  process = subprocess.run([*command, "--workdir=run"], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
  assert process.returncode == 0, process.stderr
  assert "digits: fedavgm, gated, 2 rounds, gate_only" in process.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_files_and_links_exist(page):
  text = page.read_text()
  for path in re.findall(r"configs/(\w+)\.py", text):
    assert (ROOT / "configs" / f"{path}.py").is_file(), path
  for module in set(re.findall(r"python -m ([\w.]+)", text)):
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() or module in ("pip", "http.server"), module
  for link in re.findall(r"\]\(([^)#:]+)\)", text):
    assert (page.parent / link).exists(), link


def test_method_shows_code_that_is_there():
  """Each line of Algorithm 1 beside the code line that computes it."""
  text = (ROOT / "docs/method.md").read_text()
  rows = re.findall(r"^\| (\d) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
  assert [number for number, _, _ in rows] == ["1", "2", "3", "4", "5"]
  source = "".join(
    (ROOT / "metagater_jax" / path).read_text() for path in ("federated/metagater.py", "optim/accelerated_proximal.py", "federated/rounds.py")
  )
  for _, _, code in rows:
    for piece in re.findall(r"`([^`]+)`", code):
      assert piece in source or (ROOT / "metagater_jax" / piece).is_file(), piece
  for path in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
    assert (ROOT / "metagater_jax" / path).is_file(), path


def test_the_top_has_what_most_users_need():
  wings = ("core", "data", "deploy", "federated", "fewshot", "nn", "optim", "personalize", "pruning")
  assert 20 <= len(set(mg.__all__) - set(wings)) <= 30
  for wing in wings:
    module = getattr(mg, wing)
    assert module.__doc__ and all(hasattr(module, name) for name in module.__all__)
  everywhere = {name for wing in wings for name in getattr(mg, wing).__all__}
  assert set(mg.__all__) - set(wings) <= everywhere  # what is at the top is in a wing, too


def test_every_wing_has_a_page_of_the_reference():
  """`make docs` compares the names on these pages with the public ones."""
  wings = {f"metagater_jax.{name}" for name in mg.__all__ if inspect.ismodule(getattr(mg, name))}
  pages = {page: re.findall(r"automodule:: (\S+)\n((?:   :\S+:\n?)*)", page.read_text()) for page in (ROOT / "docs" / "api").glob("*.md")}
  shown = {module for found in pages.values() for module, options in found if ":members:" in options}
  assert shown == wings
  contents = (ROOT / "docs" / "api" / "index.md").read_text().splitlines()
  assert all(page.stem in contents for page, found in pages.items() if page.stem != "index")


def test_a_network_for_a_device():
  network = mg.GatedNetwork(mg.ConvNet4(classes=3, widths=(4, 8, 32)), ("conv3",))
  params = network.init(jax.random.key(0), (8, 8, 1))
  images = jax.random.normal(jax.random.key(1), (6, 8, 8, 1))
  names = {
    "mg": mg,
    "network": network,
    "loss": mg.classification_loss(network),
    "model": mg.Model(params),
    "calibration": np.asarray(images)[:, None],
    "batch": mg.data.Batch(images, jnp.arange(6) % 3, jnp.ones(6)),
  }
  exec(block("docs/device.md", "from metagater_jax import deploy"), names)
  assert names["small"].kept["conv3"].size == 24
  assert len(names["integers"]) < len(names["content"]) and len(names["adapts"]) > len(names["content"]) > len(names["anywhere"]) > 0

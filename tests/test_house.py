"""Arrows run one way: nothing imports upward, in the library or in the experiments."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Wing to its floor; a wing may import from its own floor and those below.
LIBRARY = {"core": 0, "data": 1, "nn": 2, "optim": 2, "pruning": 2, "personalize": 3, "federated": 3, "fewshot": 3, "deploy": 4}
EXPERIMENTS = {"config": 0, "runs": 1, "studies": 2, "reports": 2}
COMMANDS = 3


def imports(path):
  """Dotted names of what a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wing_of(name, package, wings):
  """The wing of a dotted name, None for another package, "" for what stands above all wings."""
  parts = name.split(".")
  return None if parts[0] != package else parts[1] if len(parts) > 1 and parts[1] in wings else ""


@pytest.mark.parametrize("path", sorted((ROOT / "metagater_jax").rglob("*/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library(path):
  own = path.relative_to(ROOT / "metagater_jax").parts[0]
  for name in imports(path):
    assert not name.startswith(("experiments", "configs", "absl", "ml_collections", "matplotlib")), name
    wing = wing_of(name, "metagater_jax", LIBRARY)
    if wing is not None:
      assert wing and LIBRARY[wing] <= LIBRARY[own], name
      assert own != "optim" or wing in ("optim", "core"), f"optim knows nothing of the rest, but imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").rglob("*/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_experiments(path):
  own = path.relative_to(ROOT / "experiments").parts[0]
  for name in imports(path):
    wing = wing_of(name, "experiments", EXPERIMENTS)
    if wing is not None:
      assert wing and EXPERIMENTS[wing] <= EXPERIMENTS[own], name


def test_wings_do_not_import_each_other_in_circles():
  reached = {wing: set() for wing in LIBRARY}
  for path in (ROOT / "metagater_jax").rglob("*/*.py"):
    own = path.relative_to(ROOT / "metagater_jax").parts[0]
    reached[own] |= {wing for wing in (wing_of(name, "metagater_jax", LIBRARY) for name in imports(path)) if wing and wing != own}
  done = []
  while len(done) < len(reached):
    free = [wing for wing, others in reached.items() if wing not in done and others <= set(done)]
    assert free, {wing: others - set(done) for wing, others in reached.items() if wing not in done}
    done += free


def test_names_of_things_are_in_the_registry_alone():
  """No command, run or study decides by the name of an algorithm, a network or a score."""
  names = {"mlp", "conv7", "fewshot_conv4", "resnet12", "fedavg", "pfedme", "reptile", "two_stage", "fine_tune", "snip"}
  for path in [
    *(ROOT / "experiments").glob("*.py"),
    *(ROOT / "experiments" / "runs").rglob("*.py"),
    *(ROOT / "experiments" / "config").rglob("*.py"),
  ]:
    if path.name == "registry.py":
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Compare):
        constants = {constant.value for part in (node.left, *node.comparators) for constant in ast.walk(part) if isinstance(constant, ast.Constant)}
        assert not constants & names, f"{path}:{node.lineno}"

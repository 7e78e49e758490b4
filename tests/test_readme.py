"""README's examples run as they stand."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagater_jax as mg

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def block(start):
  return next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if code.startswith(start))


def test_building_blocks(capsys):
  names = {}
  exec(block("import jax, jax.numpy as jnp, metagater_jax"), names)
  metrics = mg.evaluate_task(names["network"], names["adapted"], names["population"].test(17))
  assert metrics.accuracy > 0.8 and 0.1 < metrics.sparsity < 0.6
  assert "TaskMetrics(" in capsys.readouterr().out


def test_pruning():
  population = mg.make_population(np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32), np.arange(20) % 3,
                                  mg.data.Partition((np.arange(15),), (np.arange(15, 20),)))
  network = mg.GatedNetwork(mg.MLP(classes=3, widths=(8,)))
  task = population.train(0)
  names = {"mg": mg, "params": network.init(jax.random.key(0), (4,)), "loss": mg.classification_loss(network), "task": task,
           "batch": task.rows(jnp.arange(15))}
  exec(block("score = "), names)
  assert abs(float(mg.pruning.mask_sparsity(names["mask"])) - 0.5) < 0.02
  assert float((names["pruned"]["backbone"]["hidden1"]["kernel"] == 0).sum()) == round(0.9 * 32)


def test_few_shot():
  rng = np.random.default_rng(0)
  names = {"mg": mg, "jax": jax, "optax": optax, "partial": partial, "images": rng.normal(size=(60, 8, 8, 1)).astype(np.float32),
           "labels": np.arange(60) % 5}
  exec(block("pool = "), names)
  assert abs(float(mg.pruning.mask_sparsity(names["mask"])) - 0.85) < 0.01
  for weights in (names["state"].params, names["task"]):
    jax.tree.map(lambda w, c: np.testing.assert_array_equal(np.asarray(w)[np.asarray(c) == 0], 0), weights, names["mask"])


def test_lasso():
  a = jax.random.normal(jax.random.key(0), (50, 10))
  b = a[:, 3] * 2
  names = {"mg": mg, "optax": optax, "w": jnp.zeros(10), "L": jnp.linalg.norm(a, 2) ** 2 / 50,
           "gradient": jax.grad(lambda w: jnp.mean((a @ w - b) ** 2) / 2)}
  exec(block("solver = "), names)
  assert np.flatnonzero(names["solution"]).tolist() == [3]


def test_commands_and_files_that_readme_names_exist():
  root = Path(__file__).resolve().parents[1]
  for path in re.findall(r"configs/(\w+)\.py", README):
    assert (root / "configs" / f"{path}.py").is_file()
  for module in set(re.findall(r"python -m ([\w.]+)", README)):
    path = root / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() or module == "pip", module

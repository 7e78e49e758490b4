"""Small problems that several test files use."""

import gc
import importlib.metadata
import os
import tempfile
from pathlib import Path

# Hundreds of small programs are compiled here and run once or twice: compiling them well takes longer than running them. In the
# environment before JAX is imported, so that it holds in the commands which tests start, too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not have the flag, and abort
  os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
# What one process has compiled no other one compiles again; a worker of pytest-xdist finds the folder in its environment.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.TemporaryDirectory(prefix="metagater-tests-")
  os.environ |= {"JAX_COMPILATION_CACHE_DIR": _compiled.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}

import jax
import numpy as np
import pytest

import metagater_jax as mg

# Some tests spread tasks over devices; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
  """Every compiled program is some regions of memory, of which Linux gives a process 65,530 (vm.max_map_count); one more, and XLA's compiler
  ends in a segmentation fault. So a process that has compiled many forgets them before it goes to the next module."""
  yield
  maps = Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def small_network():
  """A gated network on 8×8 images, small enough to compile in a second."""
  return mg.GatedNetwork(mg.ConvNet4(classes=4, widths=(4, 5, 6)), ("conv3",), initial_log_odds=0.5, logit_scale=1.0)


@pytest.fixture(scope="session")
def small_population():
  """Six tasks of unequal sizes on random images whose mean brightness tells the label."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 400)
  images = (rng.normal(size=(400, 8, 8, 1)) + labels[:, None, None, None]).astype(np.float32)
  partition = mg.partition_by_label(labels, tasks=6, labels_per_task=2, size_range=(12, 60), seed=0)
  return mg.make_population(images, labels, partition)


@pytest.fixture(scope="session")
def linear_problem():
  """(population, float64 tasks): five tasks of unequal sizes for `problems.linear_loss`."""
  rng = np.random.default_rng(3)
  sizes = [3, 7, 4, 9, 5]
  x, y = rng.normal(size=(sum(sizes), 3)).astype(np.float32), rng.integers(0, 5, sum(sizes))
  parts = np.split(rng.permutation(sum(sizes)), np.cumsum(sizes)[:-1])
  population = mg.make_population(x, y, mg.data.Partition(tuple(parts), tuple(parts)))
  tasks = [(x[p].astype(np.float64), y[p].astype(np.float64)) for p in parts]
  return population, tasks


@pytest.fixture
def key():
  return jax.random.key(7)

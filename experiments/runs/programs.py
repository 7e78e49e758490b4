"""Compiled functions, and a clock that keeps compiling and running apart."""

import functools
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import jax
import numpy as np

__all__ = ["Clock", "Compiled", "compiler_options", "dispatches"]


def compiler_options(small: bool = False) -> dict[str, bool]:
  """Options of XLA under which a program compiles faster and runs as fast (`python -m benchmarks --only=compilers`).

  Args:
    small: of a network that says so of itself (`GatedNetwork.small`): the many small operations of an MLP are slower so.
  """
  options = {"xla_cpu_use_fusion_emitters": False}
  return options if not small and jax.default_backend() == "cpu" and _known(tuple(options.items())) else {}


@functools.cache
def _known(options):
  try:
    jax.jit(lambda: 0).lower().compile(compiler_options=dict(options))
  except Exception:
    return False
  return True


class Clock:
  """Seconds by phase: `with clock("train"): …`."""

  def __init__(self, *phases):
    self._phases = phases
    self.reset()

  def reset(self):
    self.seconds = dict.fromkeys(self._phases, 0.0)

  @contextmanager
  def __call__(self, phase):
    start = time.perf_counter()
    yield
    self.seconds[phase] += time.perf_counter() - start


class Compiled:
  """A jitted function that keeps compiling and running apart in a clock; keyword arguments are static."""

  def __init__(self, clock: Clock, phase: str, function: Callable, **jit_options):
    self._clock, self._phase, self._function, self._options = clock, phase, function, jit_options
    self._programs = {}
    self.seconds = 0.0  # of the last run

  def compile(self, *arguments, **static):
    """Compiles for these arguments, if that is not done yet; the program."""
    shapes = jax.tree.map(lambda x: (np.shape(x), jax.dtypes.result_type(x) if np.isscalar(x) else x.dtype), arguments)
    key = tuple(sorted(static.items())), str(shapes)  # an array among the static arguments has no hash: it must be passed by place
    if key not in self._programs:
      with self._clock("compile"):
        jitted = jax.jit(partial(self._function, **static), **self._options)
        self._programs[key] = jitted.lower(*arguments).compile()
    return self._programs[key]

  def __call__(self, *arguments, **static):
    program = self.compile(*arguments, **static)
    start = time.perf_counter()
    with self._clock(self._phase):
      out = jax.block_until_ready(program(*arguments))
    self.seconds = time.perf_counter() - start
    return out


def dispatches(steps: int, eval_every: int, per_dispatch: int) -> list[int]:
  """How many steps each dispatch has: at most `per_dispatch`, and none goes beyond an evaluation.

  >>> dispatches(25, 10, 8)
  [8, 2, 8, 2, 5]
  """
  counts = []
  for start in range(0, steps, eval_every):
    between = min(eval_every, steps - start)
    counts += [min(per_dispatch, between - done) for done in range(0, between, per_dispatch)]
  return counts

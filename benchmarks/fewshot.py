"""Meta-training steps on few-shot episodes: ours against a plain PyTorch MAML loop, compilation, and what the ANP score costs."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import metagater_jax as mg
from benchmarks.measure import compiled, medians, row
from experiments.runs.programs import compiler_options

__all__ = ["meta_steps", "scores"]

STEPS = 2  # outer steps per measurement
EPISODES = 4  # per step
INNER_STEPS, INNER_LR, OUTER_LR = 5, 0.01, 1e-3

# Name to (network, image shape, ways, shots).
CASES = {
  "conv4-1": ("Conv-4, CIFAR-FS, 5-way 1-shot", mg.nn.FewShotConvNet(5), (32, 32, 3), 5, 1),
  "conv4-5": ("Conv-4, CIFAR-FS, 5-way 5-shot", mg.nn.FewShotConvNet(5), (32, 32, 3), 5, 5),
  "omniglot-20": ("Conv-4 (64), Omniglot, 20-way 1-shot", mg.nn.FewShotConvNet(20, widths=(64,) * 4), (28, 28, 1), 20, 1),
  "resnet12-narrow-1": ("ResNet-12 (16-32-64-128), CIFAR-FS, 5-way 1-shot", mg.nn.ResNet12(5, widths=(16, 32, 64, 128)), (32, 32, 3), 5, 1),
  "resnet12-1": ("ResNet-12, CIFAR-FS, 5-way 1-shot", mg.nn.ResNet12(5), (32, 32, 3), 5, 1),
}


def _case(name, learner=mg.maml):
  label, backbone, shape, ways, shots = CASES[name]
  network = mg.GatedNetwork(backbone)
  images = np.random.default_rng(0).integers(0, 256, (64 * 40, *shape), np.uint8)
  pool = mg.fewshot.make_class_pool(images, np.repeat(np.arange(64), 40))
  queries = 5 if ways == 20 else 15
  options = {"head": mg.nn.head_of(backbone, shape)} if learner is mg.fewshot.anil else {}
  learner = learner(mg.classification_loss(network), inner_lr=INNER_LR, inner_steps=INNER_STEPS, **options)
  return label, network, network.init(jax.random.key(0), shape), pool, learner, {"ways": ways, "shots": shots, "queries": queries}


def _program(name, task_axis="auto", mesh=None, learner=mg.maml):
  _, _, params, pool, learner, numbers = _case(name, learner)
  optimizer = optax.adam(OUTER_LR)
  arguments = jax.random.key_data(jax.random.key(1)), params, pool
  if mesh is not None:
    arguments = jax.device_put(arguments, jax.NamedSharding(mesh, jax.P()))

  def steps(key_data, params, pool):
    state = mg.fewshot.meta_init(learner, optimizer, params, jax.random.wrap_key_data(key_data))
    state, metrics = mg.fewshot.run_meta_steps(
      learner,
      optimizer,
      lambda key, pool: mg.fewshot.sample_episode(key, pool, **numbers),
      state,
      pool,
      steps=STEPS,
      episodes=EPISODES,
      task_axis=task_axis,
      mesh=mesh,
    )
    return state.params, metrics

  return compiled(steps, *arguments, compiler_options=compiler_options())


def _mesh():
  return mg.core.task_mesh() if len(jax.devices()) > 1 else None


def meta_steps(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """A step of MAML (4 episodes, 5 inner steps, exact derivative, Adam), of ANIL, and MAML's in PyTorch."""
  rows = []
  names = ["conv4-1"] if quick else ["conv4-1", "conv4-5", "omniglot-20", "resnet12-narrow-1"]
  if jax.default_backend() != "cpu" and not quick:
    names.append("resnet12-1")
  for name in names:
    label = CASES[name][0]
    ours, anil = _program(name, mesh=_mesh()), _program(name, mesh=_mesh(), learner=mg.fewshot.anil)
    functions = {"ours": ours.run, "anil": anil.run}
    try:
      if not name.startswith("resnet"):
        functions["torch"] = torch_steps(name)
    except ImportError as error:
      print(f"PyTorch cannot be imported ({error}): pip install -e '.[benchmark]' for the comparison with its loop.")
    seconds = medians(repeats, functions, pause=0.5)
    rows.append(
      row(
        f"MAML step, {label}",
        1000 * seconds["ours"] / STEPS,
        "ms",
        key=f"maml-{name}",
        compile_seconds=ours.compile_seconds,
        peak_mb=ours.peak_bytes / 2**20,
        episodes_per_second=STEPS * EPISODES / seconds["ours"],
      )
    )
    rows.append(
      row(
        f"MAML step, {label}: MAML / ANIL", seconds["ours"] / seconds["anil"], "ratio", key=f"maml-anil-{name}", compile_seconds=anil.compile_seconds
      )
    )
    if "torch" in seconds:
      rows.append(row(f"MAML step, {label}: PyTorch loop / ours", seconds["torch"] / seconds["ours"], "ratio", key=f"maml-torch-{name}"))
  return rows


def scores(repeats: int, quick: bool) -> list[dict[str, Any]]:
  """The ANP score of 16 episodes: exact and first-order, all layers in one gradient or one after the other."""
  rows = []
  for name in ("conv4-1",) if quick else ("conv4-1", "resnet12-narrow-1"):
    label, _, params, pool, learner, numbers = _case(name)
    episodes = mg.fewshot.sample_episodes(jax.random.key(2), pool, 16, **numbers)
    programs = {}
    for derivative in ("exact", "first_order"):
      for by_layer in (False, True) if name.startswith("conv4") else (False,):
        score = mg.pruning.anp(learner.meta_loss, derivative=derivative, average="signed", by_layer=by_layer)
        programs[derivative, by_layer] = compiled(score, params, episodes, compiler_options=compiler_options())
    seconds = medians(repeats, {key: p.run for key, p in programs.items()})
    rows += [
      row(
        f"ANP score, {label}, {derivative}, {'by layer' if by_layer else 'all layers together'}",
        1000 * seconds[derivative, by_layer],
        "ms",
        key=f"anp-{name}-{derivative}-{by_layer}",
        compile_seconds=p.compile_seconds,
        peak_mb=p.peak_bytes / 2**20,
      )
      for (derivative, by_layer), p in programs.items()
    ]
  return rows


def torch_steps(name: str) -> Callable[[], Any]:
  """The same steps in a plain PyTorch loop: episodes one by one, `torch.autograd.grad(create_graph=True)` inside.

  Raises:
    ImportError: PyTorch is missing.
  """
  import torch
  from torch.nn import functional

  _, _, params, pool, _, numbers = _case(name)
  episodes = [jax.tree.map(np.asarray, mg.fewshot.sample_episode(jax.random.key(i), pool, **numbers)) for i in range(EPISODES)]
  tensor = lambda x: torch.tensor(np.asarray(x))
  batches = [[(tensor(part.images).permute(0, 3, 1, 2).contiguous(), tensor(part.labels).long()) for part in episode] for episode in episodes]
  names = [f"conv{i}" for i in range(1, 5)]
  weights = []
  for layer in names:
    own = params["backbone"][layer]
    weights += [tensor(own["kernel"]).permute(3, 2, 0, 1).contiguous(), tensor(own["scale"]), tensor(own["bias"])]
  weights += [tensor(params["backbone"]["output"]["kernel"]).T.contiguous(), tensor(params["backbone"]["output"]["bias"])]
  weights = [w.requires_grad_() for w in weights]
  optimizer = torch.optim.Adam(weights, OUTER_LR)

  def loss(weights, images, labels):
    h = images
    for i in range(4):
      kernel, scale, bias = weights[3 * i : 3 * i + 3]
      h = functional.conv2d(h, kernel, padding=1)
      h = functional.max_pool2d(functional.relu(functional.batch_norm(h, None, None, scale, bias, training=True)), 2)
    return functional.cross_entropy(h.flatten(1) @ weights[-2].T + weights[-1], labels)

  def run():
    for _ in range(STEPS):
      optimizer.zero_grad()
      for support, query in batches:
        adapted = weights
        for _ in range(INNER_STEPS):
          gradients = torch.autograd.grad(loss(adapted, *support), adapted, create_graph=True)
          adapted = [w - INNER_LR * g for w, g in zip(adapted, gradients)]
        (loss(adapted, *query) / EPISODES).backward()
      optimizer.step()

  return run

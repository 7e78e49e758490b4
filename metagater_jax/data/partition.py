"""How a labelled data set is distributed over tasks: seeded, disjoint, train and test within each task.

Everything here is NumPy on labels alone and runs once, on the host, before training.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

__all__ = [
  "Partition",
  "draw_sizes",
  "partition_by_dirichlet",
  "partition_by_group",
  "partition_by_label",
  "split_groups",
  "split_samples",
  "split_tasks",
]


@dataclasses.dataclass(frozen=True)
class Partition:
  """Indices into a data set by task. No index occurs twice; each label of a task is in its train and its test part."""

  train: tuple[np.ndarray, ...]
  test: tuple[np.ndarray, ...]

  def __len__(self) -> int:
    return len(self.train)

  def to_json(self) -> list[dict[str, list[int]]]:
    """One {"train": […], "test": […]} per task, for `json.dump`."""
    return [{"train": a.tolist(), "test": b.tolist()} for a, b in zip(self.train, self.test)]

  def of(self, samples: np.ndarray) -> "Partition":
    """The same tasks, where the indices were into a selection: `samples[i]` in the place of i."""
    return Partition(*(tuple(samples[part] for part in parts) for parts in (self.train, self.test)))

  @classmethod
  def from_json(cls, tasks: Sequence[dict]) -> "Partition":
    """The inverse of `to_json`."""
    return cls(tuple(np.asarray(task["train"], np.int64) for task in tasks), tuple(np.asarray(task["test"], np.int64) for task in tasks))


def draw_sizes(rng: np.random.Generator, tasks: int, size_range: tuple[int, int], available: float, fill: bool = True) -> np.ndarray:
  """Numbers of train samples of each task, log-normal, clipped to the range and scaled to the data there is.

  The log-normal's median is the geometric mean of the range, and the range spans ± 1.5 of its standard deviations.

  Args:
    rng: source of the draw.
    tasks: how many.
    size_range: smallest and largest number of train samples, both included.
    available: train samples there are for all tasks together.
    fill: scale the sizes so that all that is available is used (as far as the range allows). Otherwise they are scaled
      down only if they ask for more than there is.

  Returns:
    (tasks,) integers.

  Raises:
    ValueError: an empty range, or one whose smallest sizes already need more than there is.
  """
  low, high = size_range
  if not 1 <= low <= high:
    raise ValueError(f"size_range must be two numbers with 1 <= smallest <= largest, got {tuple(size_range)}.")
  if low * tasks > available:
    raise ValueError(
      f"the data cannot fill size_range={tuple(size_range)}: {tasks} tasks of at least {low} train samples "
      f"need {low * tasks}, there are {int(available)}; use fewer tasks or a smaller range."
    )
  drawn = np.sqrt(low * high) * np.exp(rng.normal(size=tasks) * np.log(high / low) / 3)
  sizes = lambda scale: np.clip(drawn * scale, low, high)
  if sizes(1.0).sum() <= available and not fill:
    return np.floor(sizes(1.0)).astype(int)
  smallest, largest = 0.0, max(1.0, high / drawn.min())  # at these scales every size is at its bound
  for _ in range(60):
    middle = (smallest + largest) / 2
    smallest, largest = (middle, largest) if sizes(middle).sum() <= available else (smallest, middle)
  return np.floor(sizes(smallest)).astype(int)


def partition_by_label(
  labels: np.ndarray,
  *,
  tasks: int,
  labels_per_task: int,
  size_range: tuple[int, int],
  seed: int,
  test_fraction: float = 0.25,
  fill: bool = True,
  cyclic: bool = False,
) -> Partition:
  """Each task holds samples of a few labels only: the papers' setting, after pFedMe's data generator.

  Sizes come from `draw_sizes`; a task's samples are spread over its labels as evenly as the data allows, and labels are
  used about equally often. 1 − `test_fraction` of each label's samples in a task are its train part.

  Args:
    labels: (samples,) integers.
    tasks: how many tasks to make.
    labels_per_task: different labels in each.
    size_range: smallest and largest number of train samples of a task.
    seed: the partition is a function of it (and of the other arguments).
    test_fraction: part of each task that is its test data.
    fill: see `draw_sizes`.
    cyclic: task i holds the classes i, i + 1, … (modulo their number), as pFedMe's generator has it, so that tasks with
      the same labels come back; otherwise any combination of labels may occur.

  Returns:
    The partition.

  Raises:
    ValueError: more labels per task than classes, a range too small for the labels, or more than the data can fill.
  """
  rng = np.random.default_rng(seed)
  classes, pools = _shuffled_by_class(rng, labels)
  _check_fraction(test_fraction)
  if tasks < 1:
    raise ValueError(f"tasks must be at least 1, got {tasks}.")
  if not 1 <= labels_per_task <= len(classes):
    raise ValueError(f"labels_per_task is {labels_per_task}, but the data has {len(classes)} classes.")
  low, high = size_range
  if low < labels_per_task:
    raise ValueError(f"size_range starts at {low}, but a task of {labels_per_task} labels has at least one train sample of each.")
  keep = 1 - test_fraction
  # Labels run out one by one, so the last tasks may not find enough of any when all that is there is asked for: then
  # ask for a little less of it.
  share, shortfall = 1.0, None
  while low * tasks <= len(labels) * keep * share or shortfall is None:
    sizes = draw_sizes(np.random.default_rng([seed, 2]), tasks, size_range, len(labels) * keep * share, fill)
    demand, shortfall = _choose_labels(
      np.random.default_rng([seed, 3]), sizes, [len(pool) for pool in pools], labels_per_task, test_fraction, low, cyclic
    )
    if shortfall is None:
      break
    share *= 0.98
  else:
    raise ValueError(
      f"the data cannot fill size_range={tuple(size_range)} with {tasks} tasks of {labels_per_task} labels "
      f"each: a task got {shortfall} train samples; use fewer tasks, more labels per task, or a smaller "
      "range."
    )

  used = np.zeros(len(pools), int)
  parts = []
  for wishes in demand:
    train, test = [], []
    for label, count in wishes:
      samples = pools[label][used[label] : used[label] + count]
      used[label] += count
      cut = _train_part(count, test_fraction)
      train.append(samples[:cut])
      test.append(samples[cut:])
    parts.append((train, test))
  return _assemble(rng, parts)


def partition_by_dirichlet(
  labels: np.ndarray, *, tasks: int, concentration: float, seed: int, test_fraction: float = 0.25, smallest: int = 8
) -> Partition:
  """Each class is spread over the tasks in proportions drawn from Dirichlet(concentration) (Hsu et al. 2019).

  A small concentration gives tasks few labels, a large one gives all tasks the same mixture. A label of which a task
  would hold a single sample is left out of that task, since it could not be in both parts.

  Args:
    labels: (samples,) integers.
    tasks: how many tasks to make.
    concentration: of the Dirichlet distribution, positive.
    seed: the partition is a function of it (and of the other arguments).
    test_fraction: part of each task that is its test data.
    smallest: the proportions are drawn anew until each task holds at least this many samples.

  Returns:
    The partition.

  Raises:
    ValueError: a concentration that is not positive, or no draw in 1,000 that gives each task `smallest` samples.
  """
  if not concentration > 0:
    raise ValueError(f"concentration must be positive, got {concentration}.")
  if tasks < 1:
    raise ValueError(f"tasks must be at least 1, got {tasks}.")
  _check_fraction(test_fraction)
  rng = np.random.default_rng(seed)
  _, pools = _shuffled_by_class(rng, labels)
  for _ in range(1000):
    counts = np.stack(
      [
        np.diff(np.floor(np.cumsum(np.append(0, p)) * len(pool) + 1e-9)).astype(int)
        for pool, p in zip(pools, rng.dirichlet(np.full(tasks, concentration), len(pools)))
      ]
    )
    held = np.where(counts < 2, 0, counts)
    if held.sum(0).min() >= smallest:
      break
  else:
    raise ValueError(
      f"no draw gave each of {tasks} tasks {smallest} samples at concentration={concentration}; use fewer "
      "tasks, a larger concentration or a smaller `smallest`."
    )
  parts = []
  starts = np.cumsum(np.concatenate([np.zeros((len(pools), 1), int), counts], axis=1), axis=1)
  for task in range(tasks):
    train, test = [], []
    for label, pool in enumerate(pools):
      samples = pool[starts[label, task] : starts[label, task] + held[label, task]]
      if len(samples):
        cut = _train_part(len(samples), test_fraction)
        train.append(samples[:cut])
        test.append(samples[cut:])
    parts.append((train, test))
  return _assemble(rng, parts)


def partition_by_group(
  groups: np.ndarray, labels: np.ndarray, spans: np.ndarray | None = None, *, test_fraction: float = 0.25, seed: int = 0
) -> Partition:
  """Each task is one group of the data: a person, a device, a place. Of each label of a group the last samples are its test data.

  Samples that overlap in time are nearly the same. So the order of samples is that of time, train and test data of a task are split at a moment,
  by label, and test samples that overlap with any train sample of the task are left out.

  Args:
    groups: (samples,) integers; tasks are in the order of their numbers.
    labels: (samples,) integers.
    spans: (samples, 2) first and last moment of each sample; None: samples do not overlap, and are in the order of time.
    test_fraction: part of each label of a task that is its test data.
    seed: of the order in which a task's samples are listed, so that its first ones are of all labels. Which they are does not depend on it.

  Returns:
    The partition.

  Raises:
    ValueError: arrays of different lengths, or a group that has no test sample left.

  >>> partition_by_group(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 0]), test_fraction=0.3).test
  (array([2]), array([4]))
  """
  groups, labels = np.asarray(groups), np.asarray(labels)
  spans = np.stack([np.arange(len(groups))] * 2, axis=1) if spans is None else np.asarray(spans)
  if not len(groups) == len(labels) == len(spans):
    raise ValueError(f"there are {len(groups)} groups, {len(labels)} labels and {len(spans)} spans; there must be one of each per sample.")
  _check_fraction(test_fraction)
  rng = np.random.default_rng([seed, 6])
  train, test = [], []
  for group in np.unique(groups):
    parts = []
    for label in np.unique(labels[groups == group]):
      samples = np.flatnonzero((groups == group) & (labels == label))
      samples = samples[np.argsort(spans[samples, 0], kind="stable")]
      cut = _train_part(len(samples), test_fraction)
      parts.append((samples[:cut], samples[cut:]))
    own, later = (np.concatenate(part) for part in zip(*parts))
    order = np.argsort(spans[own, 0], kind="stable")
    starts, latest_end = spans[own[order], 0], np.maximum.accumulate(spans[own[order], 1])
    before = np.searchsorted(starts, spans[later, 1], side="right")  # train samples that start before a test sample ends
    apart = (before == 0) | (latest_end[np.maximum(before, 1) - 1] < spans[later, 0])
    if not apart.any():
      raise ValueError(f"group {group} has {len(own) + len(later)} samples, of which none is left to test on; leave it out, or raise test_fraction.")
    train.append(rng.permutation(own))
    test.append(rng.permutation(later[apart]))
  return Partition(tuple(train), tuple(test))


def split_tasks(tasks: int, targets: int, seed: int, *, validation: int = 0, seen: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Which tasks meta-training uses, which are for choosing settings, and which are targets, as three sorted arrays.

  Args:
    tasks, targets: how many in all, and how many are targets, drawn at random.
    seed: the choice is a function of it. The targets do not depend on `validation`.
    validation: how many of the others are kept out of meta-training.
    seen: let the target tasks take part in meta-training (by default they are held out).

  Returns:
    Numbers of the training, the validation and the target tasks.

  Raises:
    ValueError: if none is left for meta-training.
  """
  if not 1 <= targets <= tasks or validation < 0 or tasks - validation - (0 if seen else targets) < 1:
    raise ValueError(
      f"target_tasks is {targets} and validation_tasks {validation}, but there are {tasks} tasks, of which "
      "at least one must be left for meta-training."
    )
  order = np.random.default_rng([seed, 1]).permutation(tasks)
  target, held_out, rest = np.split(order, [targets, targets + validation])
  return np.sort(np.concatenate([rest, target]) if seen else rest), np.sort(held_out), np.sort(target)


def split_samples(labels: np.ndarray, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """The samples of a data set in two parts that share none, each with its part of every class.

  Settings that are chosen on tasks made of one part have seen no image of tasks that are made of the other.

  Args:
    labels: (samples,) integers.
    fraction: of each class in the second part, in [0, 1).
    seed: that the split is a function of.

  Returns:
    Sorted indices of the first and of the second part.

  Raises:
    ValueError: a fraction outside [0, 1), or labels that are not integers.
  """
  _check_split(fraction, "samples")
  _, pools = _shuffled_by_class(np.random.default_rng([seed, 4]), labels)
  cuts = [round(fraction * len(pool)) for pool in pools]
  parts = zip(*((pool[cut:], pool[:cut]) for pool, cut in zip(pools, cuts)))
  return tuple(np.sort(np.concatenate(part)) for part in parts)  # type: ignore[return-value]


def split_groups(groups: np.ndarray, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """As `split_samples`, for data with natural tasks: a group is in one of the parts as a whole.

  Args:
    groups: (samples,) integers.
    fraction: of the groups in the second part, in [0, 1).
    seed: that the split is a function of.

  Returns:
    Sorted indices of the first and of the second part.

  Raises:
    ValueError: a fraction outside [0, 1).
  """
  _check_split(fraction, "groups")
  there = np.random.default_rng([seed, 5]).permutation(np.unique(groups))
  second = np.isin(groups, there[: round(fraction * len(there))])
  return np.flatnonzero(~second), np.flatnonzero(second)


def _shuffled_by_class(rng, labels):
  labels = np.asarray(labels)
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"labels must be a one-dimensional integer array, got {labels.dtype}{list(labels.shape)}.")
  classes = np.unique(labels)
  return classes, [rng.permutation(np.flatnonzero(labels == c)) for c in classes]


def _choose_labels(rng, train_sizes, available, labels_per_task, test_fraction, low, cyclic):
  """(label, samples) pairs of each task, and None; or None and how many train samples the first task that fails got."""
  left = np.array(available)
  demand = [None] * len(train_sizes)
  # Largest first, each from the labels with the most samples left (near-ties at random): this keeps the labels equally
  # used and leaves no large task without data.
  for task in np.argsort(-train_sizes, kind="stable"):
    if cyclic:
      chosen = (task + np.arange(labels_per_task)) % len(left)
    else:
      chosen = np.argsort(-left * rng.uniform(0.8, 1.0, len(left)))[:labels_per_task]
    wanted = [n + max(1, round(n * test_fraction / (1 - test_fraction))) for n in _even(train_sizes[task], labels_per_task)]
    held = _take(np.array(wanted), left[chosen])
    train = sum(_train_part(n, test_fraction) for n in held)
    if train < low or held.min() < 2:
      return None, train
    left[chosen] -= held
    demand[task] = list(zip(chosen, held))
  return demand, None


def _check_split(fraction, what):
  if not 0 <= fraction < 1:
    raise ValueError(f"the fraction of {what} that are split off must lie in [0, 1), got {fraction}.")


def _check_fraction(test_fraction):
  if not 0 < test_fraction < 1:
    raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}.")


def _even(total, parts):
  return [total // parts + (i < total % parts) for i in range(parts)]


def _take(wanted, left):
  """As near to `wanted` as `left` allows: what one label lacks is taken from the others."""
  taken = np.minimum(wanted, left)
  for i in np.argsort(left - taken)[::-1]:
    taken[i] += min(left[i] - taken[i], wanted.sum() - taken.sum())
  return taken


def _train_part(count, test_fraction):
  return int(np.clip(round(count * (1 - test_fraction)), 1, count - 1)) if count > 1 else count


def _assemble(rng, parts):
  shuffled = lambda pieces: rng.permutation(np.concatenate(pieces))
  return Partition(tuple(shuffled(train) for train, _ in parts), tuple(shuffled(test) for _, test in parts))

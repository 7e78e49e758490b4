"""Human activity: windows that cross no gap, the two forms in which the data comes, people as tasks split in time, and what cannot be read."""

import numpy as np
import pytest

import metagater_jax as mg
from metagater_jax.data.datasets import DatasetError
from metagater_jax.data.hapt import ACTIVITIES, load_hapt

# (recording, user, activity, first and last sample, counted from 1), as in the original labels.txt; 7 is a transition.
STRETCHES = [
  (1, 1, 5, 11, 210),
  (1, 1, 7, 211, 500),
  (1, 1, 4, 501, 660),
  (1, 1, 1, 701, 990),
  (2, 1, 1, 1, 200),
  (2, 1, 1, 241, 400),
  (3, 2, 1, 51, 178),
  (3, 2, 6, 179, 305),
]
LENGTH = 1000


@pytest.fixture
def signals():
  """Integers as the sensors give them, by recording: acceleration and angular velocity (LENGTH, 3)."""
  rng = np.random.default_rng(0)
  return {recording: (rng.integers(-1000, 1000, (LENGTH, 3)), rng.integers(-9000, 9000, (LENGTH, 3))) for recording in (1, 2, 3)}


@pytest.fixture
def as_arrays(tmp_path, signals):
  parts = {name: [] for name in ("acc", "gyro", "label", "user", "recording", "position")}
  for recording, user, activity, first, last in STRETCHES:
    rows = np.arange(first - 1, last)
    for name, value in zip(
      parts,
      (
        signals[recording][0][rows],
        signals[recording][1][rows],
        np.full(len(rows), activity),
        np.full(len(rows), user),
        np.full(len(rows), recording),
        rows,
      ),
    ):
      parts[name].append(value)
  (tmp_path / "har").mkdir()
  np.savez(tmp_path / "har" / "hapt.npz", **{name: np.concatenate(part) for name, part in parts.items()})
  return tmp_path


@pytest.fixture
def as_text(tmp_path, signals):
  raw = tmp_path / "original" / "RawData"
  raw.mkdir(parents=True)
  np.savetxt(raw / "labels.txt", STRETCHES, fmt="%d")
  for recording, (acc, gyro) in signals.items():
    user = next(stretch[1] for stretch in STRETCHES if stretch[0] == recording)
    np.savetxt(raw / f"acc_exp{recording:02d}_user{user:02d}.txt", acc / 720)
    np.savetxt(raw / f"gyro_exp{recording:02d}_user{user:02d}.txt", gyro / 3276.8)
  return raw.parent


def test_windows_of_both_forms(as_arrays, as_text, signals):
  data, text = load_hapt(as_arrays), load_hapt(as_text)
  # 200, 160 and 290 samples hold 2, 1 and 3 windows of 128 at steps of 64; after a gap, or in the next recording, the count begins anew.
  expected = [
    (1, 0, 4, 10),
    (1, 0, 4, 74),
    (1, 0, 3, 500),
    (1, 0, 0, 700),
    (1, 0, 0, 764),
    (1, 0, 0, 828),
    (2, 0, 0, 0),
    (2, 0, 0, 64),
    (2, 0, 0, 240),
    (3, 1, 0, 50),
  ]
  assert [(user, label) for _, user, label, _ in expected] == list(zip(data.groups.tolist(), data.labels.tolist()))
  for window, (recording, _, _, first) in zip(data.images, expected):
    np.testing.assert_allclose(window[:, :3], signals[recording][0][first : first + 128] / 720, rtol=1e-6)  # g
    np.testing.assert_allclose(window[:, 3:], signals[recording][1][first : first + 128] / 3276.8, rtol=1e-6)  # rad/s
  assert data.images.dtype == np.float32 and data.classes == len(ACTIVITIES) == 6
  for name in ("labels", "groups", "spans"):
    np.testing.assert_array_equal(getattr(data, name), getattr(text, name))
  np.testing.assert_allclose(data.images, text.images, rtol=1e-5, atol=1e-6)
  overlap = lambda i, j: data.spans[i, 1] >= data.spans[j, 0] and data.spans[j, 1] >= data.spans[i, 0]
  assert overlap(0, 1) and overlap(3, 4) and not overlap(3, 5) and not overlap(5, 6) and not overlap(1, 2)


def test_other_windows(as_arrays):
  assert len(load_hapt(as_arrays, window=200, step=10).labels) == 1 + 10 + 1
  with pytest.raises(DatasetError, match="no activity lasts for a window of 291"):
    load_hapt(as_arrays, window=291)
  with pytest.raises(DatasetError, match="at least 1, got 128 and 0"):
    load_hapt(as_arrays, step=0)


def test_what_cannot_be_read(tmp_path, as_text):
  with pytest.raises(DatasetError, match="neither hapt.npz nor RawData/labels.txt in .*nowhere .which does not exist.*archive.ics.uci.edu"):
    load_hapt(tmp_path / "nowhere")
  (as_text / "RawData" / "gyro_exp02_user01.txt").unlink()
  with pytest.raises(DatasetError, match="cannot be read: .*gyro_exp02_user01.txt"):
    load_hapt(as_text)
  (tmp_path / "hapt.npz").write_bytes(b"PK\\x03\\x04 cut off")
  with pytest.raises(DatasetError, match="hapt.npz cannot be read: it must hold the arrays acc, gyro"):
    load_hapt(tmp_path)
  np.savez(tmp_path / "hapt.npz", acc=np.zeros((3, 3)))
  with pytest.raises(DatasetError, match="it must hold the arrays acc, gyro"):
    load_hapt(tmp_path)


def test_people_are_tasks_split_in_time():
  rng = np.random.default_rng(1)
  groups, labels, spans = [], [], []
  for person in (3, 5):
    start = 1000 * person
    for label in (0, 1, 0):
      for _ in range(rng.integers(6, 12)):
        groups.append(person), labels.append(label), spans.append((start, start + 9))
        start += 5  # half overlap
      start += 50
  groups, labels, spans = map(np.array, (groups, labels, spans))
  partition = mg.data.partition_by_group(groups, labels, spans, test_fraction=0.3)
  for person, train, test in zip((3, 5), partition.train, partition.test):
    assert (groups[np.concatenate([train, test])] == person).all() and not set(train) & set(test)
    overlapping = (spans[train][:, None, 0] <= spans[test][None, :, 1]) & (spans[test][None, :, 0] <= spans[train][:, None, 1])
    assert not overlapping.any()
    for label in (0, 1):
      own = lambda part, label=label: spans[part[labels[part] == label], 0]
      assert own(train).max() < own(test).min()
      together = (labels[groups == person] == label).sum()
      assert len(own(train)) == round(0.7 * together) and len(own(test)) >= 0.3 * together - 2
  assert mg.data.partition_by_group(groups, labels, spans, seed=4).train[0].tolist() != partition.train[0].tolist()


def test_a_group_without_test_samples_and_lengths_that_differ():
  with pytest.raises(ValueError, match="group 7 has 3 samples, of which none is left to test on"):
    mg.data.partition_by_group(np.full(3, 7), np.zeros(3, int), np.array([[0, 9], [1, 10], [2, 11]]))
  with pytest.raises(ValueError, match="3 groups, 2 labels and 3 spans"):
    mg.data.partition_by_group(np.zeros(3, int), np.zeros(2, int))


def test_groups_are_split_as_a_whole():
  groups = np.repeat(np.arange(12), 5)
  first, second = mg.data.split_groups(groups, 0.25)
  assert set(groups[first]) | set(groups[second]) == set(range(12)) and not set(groups[first]) & set(groups[second])
  assert len(set(groups[second])) == 3 and len(first) + len(second) == 60
  assert mg.data.split_groups(groups, 0.25, seed=1)[1].tolist() != second.tolist()
  with pytest.raises(ValueError, match="must lie in .0, 1., got 1"):
    mg.data.split_groups(groups, 1.0)

"""Human activity from a phone at the waist (UCI HAPT): windows of its sensors, with the person whom each is of.

Reyes-Ortiz, Oneto, Samà, Parra and Anguita, "Transition-aware human activity recognition using smartphones", Neurocomputing 171, 2016; UCI
repository, data set 341, CC BY 4.0. Read from the original text files, or from `hapt.npz`, which holds the same samples as arrays.
"""

import os
import zipfile
from pathlib import Path

import numpy as np

from metagater_jax.data.datasets import Dataset, DatasetError, default_data_dir

__all__ = ["ACTIVITIES", "load_hapt", "windows_of"]

ACTIVITIES = ("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "laying")

# One unit of the integers in hapt.npz.
_G, _RAD_PER_S = 1 / 720, 1 / 3276.8
_ARRAYS = ("acc", "gyro", "label", "user", "recording", "position")
_SOURCE = "https://archive.ics.uci.edu/dataset/341"


def load_hapt(data_dir: str | os.PathLike | None = None, *, window: int = 128, step: int = 64) -> Dataset:
  """Windows of one activity each of the six that last (`ACTIVITIES`), of 30 people, in the order of time.

  Args:
    data_dir: the folder that holds `hapt.npz` or the original files (`RawData/labels.txt` and the recordings beside it), itself or in a folder
      `hapt` or `har`; None is TFDS's own default directory.
    window: samples at 50 Hz; 128 are 2.56 s, as in the data set's own features.
    step: from a window's start to the next one's; no window crosses a gap or the end of an activity.

  Returns:
    Images (windows, window, 6) float32: acceleration along x, y and z in g, then angular velocity in rad/s. Groups are people, spans the first and
    last sample of each window, counted over all recordings.

  Raises:
    DatasetError: no such data there, files that are not what they should be, or a window or step below 1.
  """
  if window < 1 or step < 1:
    raise DatasetError(f"window and step must be at least 1, got {window} and {step}.")
  return windows_of(_read(Path(default_data_dir() if data_dir is None else data_dir).expanduser()), window=window, step=step)


def windows_of(samples: dict[str, np.ndarray], *, window: int, step: int) -> Dataset:
  """Cuts samples into windows.

  Args:
    samples: "signal" (samples, 6), and "label" 1, 2, …, "user" 1, 2, …, "recording", "position" in the recording, each (samples,), in the order of
      recordings and time.
    window, step: in samples.

  Returns:
    As `load_hapt`.

  Raises:
    DatasetError: no stretch of one of the six activities is as long as a window.
  """
  label, recording, position = samples["label"], samples["recording"].astype(np.int64), samples["position"].astype(np.int64)
  new = np.flatnonzero((np.diff(recording) != 0) | (np.diff(position) != 1) | (np.diff(label) != 0) | (np.diff(samples["user"]) != 0)) + 1
  ends = np.append(new, len(label))
  starts = [np.arange(first, end - window + 1, step) for first, end in zip(np.append(0, new), ends) if 1 <= label[first] <= len(ACTIVITIES)]
  starts = np.concatenate(starts) if starts else np.zeros(0, int)
  if not len(starts):
    raise DatasetError(f"no activity lasts for a window of {window} samples.")
  images = samples["signal"][starts[:, None] + np.arange(window)].astype(np.float32)
  first = recording[starts] * (int(position.max()) + window + 1) + position[starts]  # recordings one after the other, on one axis of time
  return Dataset(
    "har",
    images,
    label[starts].astype(np.int32) - 1,
    len(ACTIVITIES),
    groups=samples["user"][starts].astype(np.int32) - 1,
    spans=np.stack([first, first + window - 1], axis=1),
  )


def _read(folder):
  for place in (folder, folder / "hapt", folder / "har"):
    if (place / "hapt.npz").is_file():
      return _from_arrays(place / "hapt.npz")
    for raw in (place, place / "RawData"):
      if (raw / "labels.txt").is_file():
        return _from_text(raw)
  there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "which does not exist"
  raise DatasetError(
    f"'har' is neither hapt.npz nor RawData/labels.txt in {folder} ({there or 'which is empty'}). Download the data set from "
    f"{_SOURCE}, unpack it, and give its folder as data_dir."
  )


def _from_arrays(path):
  try:
    with np.load(path) as file:
      held = {name: file[name] for name in _ARRAYS}
  except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
    raise DatasetError(f"{path} cannot be read: it must hold the arrays {', '.join(_ARRAYS)} ({type(error).__name__}: {error}).") from error
  signal = np.concatenate([held.pop("acc") * np.float32(_G), held.pop("gyro") * np.float32(_RAD_PER_S)], axis=1)
  return {"signal": signal, **held}


def _from_text(folder):
  try:
    stretches = np.loadtxt(folder / "labels.txt", dtype=int, ndmin=2)  # recording, user, activity, first and last sample, counted from 1
    parts, signals = [], {}
    for recording, user, activity, first, last in stretches:
      if recording not in signals:
        signals[recording] = np.concatenate(
          [np.loadtxt(folder / f"{sensor}_exp{recording:02d}_user{user:02d}.txt", dtype=np.float32, ndmin=2) for sensor in ("acc", "gyro")], axis=1
        )
      rows = np.arange(first - 1, last)
      full = lambda value, rows=rows: np.full(len(rows), value)
      parts.append({"signal": signals[recording][rows], "label": full(activity), "user": full(user), "recording": full(recording), "position": rows})
  except (OSError, ValueError, IndexError) as error:
    raise DatasetError(f"the recordings in {folder} cannot be read: {error}") from error
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

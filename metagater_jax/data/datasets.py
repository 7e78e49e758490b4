"""Labelled image sets as NumPy arrays: scikit-learn's digits, and anything TFDS has, without TensorFlow.

A TFDS set is decoded once and kept as a memory-mapped array cache. This module and `metagater_jax.data.hapt` are the only ones of the library
that read files; nothing else in it imports them.
"""

import concurrent.futures
import difflib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["Dataset", "DatasetError", "cache_directory", "default_data_dir", "load_dataset", "load_omniglot", "prepare_dataset"]

_EMBEDDED = "digits"
_CACHE_FORMAT = 2  # part of the cache's key: raise it when what is stored changes


class DatasetError(ValueError):
  """A data set that is unknown, not there, or not made of labelled images of one shape. The message says what to do."""


class Dataset(NamedTuple):
  """Labelled samples; all splits joined.

  Attributes:
    name: of the set.
    images: (samples, height, width, channels) uint8, or any (samples, …) floats.
    labels: (samples,) int32.
    classes: how many there are.
    groups: (samples,) int32, whom or what each sample is of, where the set has natural tasks; None: it has none.
    spans: (samples, 2) first and last moment of each sample, where samples may overlap in time; None: they do not.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray
  classes: int
  groups: np.ndarray | None = None
  spans: np.ndarray | None = None


def load_dataset(name: str, data_dir: str | os.PathLike | None = None) -> Dataset:
  """All samples of a data set; train and test splits are joined, for a partitioner to distribute.

  Args:
    name: "digits" (scikit-learn's 1,797 handwritten digits, 8×8, embedded) or the name of any TFDS set of labelled images
      of one shape ("mnist", "cifar10", "cifar100", "fashion_mnist", …).
    data_dir: where TFDS keeps its sets; None is TFDS's own default. There, a set that is missing is downloaded if
      TensorFlow is installed, which TFDS needs for that one step. A directory given here is only read.

  Raises:
    DatasetError: see there.
  """
  if name == _EMBEDDED:
    return _load_digits()
  builder = _prepared(name, data_dir)
  features = builder.info.features
  if not {"image", "label"} <= set(features) or None in features["image"].shape:
    raise DatasetError(f"'{name}' is not a set of labelled images of one shape; its features are {sorted(features)}.")
  folder = _cached(name, builder, sorted(builder.info.splits, key=lambda split: (split != "train", split)))
  return Dataset(name, np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy", mmap_mode="r"), features["label"].num_classes)


def load_omniglot(data_dir: str | os.PathLike | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
  """Omniglot at the size in which few-shot learners take it: strokes bright on dark, reduced from 105×105 to 28×28.

  Reads TFDS's "train" and "test" where they are, or else the small background sets "small1" and "small2". These have two
  alphabets in common; a drawing that is there twice is taken once, or it could be support and query of one episode.

  Returns:
    Images (samples, 28, 28, 1) uint8, characters (samples,), alphabets (samples,), and the alphabets' names.

  Raises:
    DatasetError: see there.
  """
  builder = _prepared("omniglot", data_dir)
  whole = [split for split in ("train", "test") if split in builder.info.splits]
  folder = _cached("omniglot", builder, whole or sorted(builder.info.splits), _reduced, (28, 28, 1), ("alphabet",))
  images, *numbers = (np.load(folder / f"{file}.npy") for file in ("images", "labels", "alphabet"))
  _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
  return *(array[np.sort(first)] for array in (images, *numbers)), list(builder.info.features["alphabet"].names)


def _reduced(image):
  from PIL import Image  # reads the images of TFDS, so it is there

  strokes = 255 * (image[..., 0] == 0).astype(np.uint8)  # paper is 1 or 255, by how the set was stored
  return np.asarray(Image.fromarray(strokes).resize((28, 28), Image.Resampling.BOX))[..., None]


def prepare_dataset(name: str, data_dir: str | os.PathLike | None = None) -> None:
  """Downloads a TFDS set and writes it in a format that is read without TensorFlow. Needs TensorFlow, once.

  Raises:
    DatasetError: TensorFlow is missing, or TFDS could not prepare the set.
  """
  if name == _EMBEDDED:
    return
  if not importlib.util.find_spec("tensorflow"):
    raise DatasetError(_how_to_prepare(name, data_dir))
  builder = _builder(name, data_dir)
  try:
    builder.download_and_prepare(file_format="array_record")
  except Exception as error:  # TFDS raises a dozen unrelated types here: connection, checksum, disk, manual download
    raise DatasetError(f"TFDS could not prepare '{name}' in {builder.data_dir}: {type(error).__name__}: {error}") from error


def default_data_dir() -> Path:
  """TFDS's own default data directory (the environment variable TFDS_DATA_DIR, or ~/tensorflow_datasets)."""
  return Path(os.environ.get("TFDS_DATA_DIR", Path.home() / "tensorflow_datasets"))


def cache_directory() -> Path:
  """Where decoded arrays are kept: METAGATER_CACHE, or metagater_jax in the user's cache directory."""
  if "METAGATER_CACHE" in os.environ:
    return Path(os.environ["METAGATER_CACHE"])
  return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "metagater_jax"


def _load_digits():
  from sklearn.datasets import load_digits  # an extra: only experiments on this set need scikit-learn

  digits = load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  return Dataset(_EMBEDDED, images, digits.target.astype(np.int32), 10)


def _tfds():
  try:
    import tensorflow_datasets as tfds  # an extra, and slow to import
  except ImportError as error:
    raise DatasetError(
      f"tensorflow-datasets cannot be imported ({error}). It needs importlib_resources, which its release "
      "4.9.10 forgets to require: pip install tensorflow-datasets importlib_resources array_record"
    ) from error
  return tfds


def _builder(name, data_dir):
  tfds = _tfds()
  known = [_EMBEDDED, *tfds.list_builders(with_community_datasets=False)]
  if name not in known:
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    raise DatasetError(
      f"unknown dataset '{name}'; " + (f"did you mean {' or '.join(nearest)}?" if nearest else "give 'digits' or the name of a TFDS data set.")
    )
  directory = Path(default_data_dir() if data_dir is None else data_dir).expanduser()
  if data_dir is not None and not directory.is_dir():
    raise DatasetError(f"the data directory {directory} does not exist.")
  return tfds.builder(name, data_dir=str(directory))


def _prepared(name, data_dir):
  """The builder of a set that is there, or is downloaded if it can be."""
  builder = _builder(name, data_dir)
  if _is_prepared(builder):
    return builder
  if data_dir is None and importlib.util.find_spec("tensorflow"):
    prepare_dataset(name)
    return _builder(name, data_dir)
  raise DatasetError(_how_to_prepare(name, data_dir))


def _is_prepared(builder):
  return bool(builder.info.splits) and Path(builder.data_dir).is_dir()


def _how_to_prepare(name, data_dir):
  directory = Path(default_data_dir() if data_dir is None else data_dir)
  there = sorted(p.name for p in directory.iterdir() if p.is_dir() and p.name != "downloads") if directory.is_dir() else []
  option = "" if data_dir is None else f" --data_dir={data_dir}"
  python = sys.executable or "python"
  return (
    f"'{name}' is not in the data directory {directory} (it holds: {', '.join(there) or 'nothing'}). "
    "TFDS needs TensorFlow to prepare it, once. From the checkout, this installs that and downloads the set:\n"
    f"  {python} -m pip install -e '.[prepare]' && {python} -m metagater_jax.data.prepare {name}{option}"
  )


def _cached(name, builder, splits, convert=lambda image: image, shape=None, more=()):
  """The folder with the decoded arrays of these splits: images (converted to `shape`), labels, and `more` integer features."""
  source = json.dumps(
    [
      _CACHE_FORMAT,
      name,
      str(builder.version),
      [(s, builder.info.splits[s].num_examples, sum(f.stat().st_size for f in map(Path, builder.info.splits[s].filepaths))) for s in splits],
    ]
  )
  folder = cache_directory() / f"{name}-{builder.version}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
  shape = shape or builder.info.features["image"].shape
  count = sum(builder.info.splits[s].num_examples for s in splits)
  shapes = {"images": (np.uint8, (count, *shape)), **{file: (np.int32, (count,)) for file in ("labels", *more)}}
  if folder.is_dir() and not all(_is_whole(folder / f"{file}.npy", *wanted) for file, wanted in shapes.items()):
    shutil.rmtree(folder, ignore_errors=True)  # cut off, or partly removed: made anew
  if not folder.is_dir():
    try:
      _decode_into(folder, builder, splits, convert, shapes, more)
    except OSError as error:
      raise DatasetError(
        f"the decoded images of '{name}' cannot be written to {folder.parent} ({error.strerror or error}). Set the environment "
        "variable METAGATER_CACHE to a folder that can be written and has "
        f" {sum(map(_bytes, shapes.values())) / 2**20:,.0f} MB."
      ) from error
  return folder


def _bytes(wanted):
  dtype, shape = wanted
  return int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))


def _is_whole(path, dtype, shape):
  try:
    held = np.load(path, mmap_mode="r")  # checks the file's length against its header
  except (OSError, ValueError, EOFError):
    return False
  return held.dtype == dtype and held.shape == shape


def _new_array(path, dtype, shape):
  """A memory-mapped file whose place on the disk is there already: a full disk is an error here, and would be a crash in the middle."""
  if _bytes((dtype, shape)) > shutil.disk_usage(path.parent).free:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
  if hasattr(os, "posix_fallocate"):
    with open(path, "r+b") as file:
      os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
  return array


def _decode_into(folder, builder, splits, convert, shapes, more, block=512):
  """Decodes all splits. A folder appears only when it is complete, so an interrupted call leaves no half cache."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  counts = [builder.info.splits[s].num_examples for s in splits]
  work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
  try:
    arrays = {file: _new_array(work / f"{file}.npy", *wanted) for file, wanted in shapes.items()}
    images, labels = arrays["images"], arrays["labels"]
    others = {feature: arrays[feature] for feature in more}
    offset = 0
    for split, count in zip(splits, counts):
      try:
        source = builder.as_data_source(split=split)
      except Exception as error:  # a set that was prepared as TFRecord, which only TensorFlow reads
        raise DatasetError(
          f"'{builder.name}' in {builder.data_dir} cannot be read without TensorFlow ({error}). Prepare it as array_record in another data directory."
        ) from error

      def fill(start, source=source, count=count, offset=offset):
        rows = range(start, min(start + block, count))
        for row, example in zip(rows, source.__getitems__(list(rows))):
          images[offset + row], labels[offset + row] = convert(example["image"]), example["label"]
          for feature, values in others.items():
            values[offset + row] = example[feature]

      with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # image decoders release the GIL
        try:
          list(pool.map(fill, range(0, count, block)))
        except Exception as error:
          files = ", ".join(map(str, builder.info.splits[split].filepaths))
          raise DatasetError(
            f"'{builder.name}' cannot be read: a record of split '{split}' is damaged or cut off ({type(error).__name__}: "
            f"{error}). Its files are {files}; fetch them again."
          ) from error
      offset += count
    if images.max(initial=0) == 1:  # 1-bit images: some decoders give 0 and 255, others 0 and 1
      images *= 255
    for values in (images, labels, *others.values()):
      values.flush()
    try:
      work.rename(folder)
    except OSError:
      if not folder.is_dir():  # otherwise another process was first, with the same content
        raise
  finally:
    shutil.rmtree(work, ignore_errors=True)

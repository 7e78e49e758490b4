"""Data sets: the embedded one, a TFDS set made in a temporary folder, and what is said when there is none."""

import builtins
import importlib.util
import io
import os
import shutil

import numpy as np
import PIL.Image
import pytest

from metagater_jax.data import datasets, prepare


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
  monkeypatch.setenv("METAGATER_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default"))


def test_digits_are_embedded():
  digits = datasets.load_dataset("digits")
  assert digits.images.shape == (1797, 8, 8, 1) and digits.images.dtype == np.uint8 and digits.classes == 10
  assert digits.images.max() == 255 and (np.bincount(digits.labels) > 170).all()


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  """MNIST in TFDS's array_record format with seven and three random images, written without TensorFlow."""
  import tensorflow_datasets as tfds

  folder = tmp_path_factory.mktemp("tfds")
  rng = np.random.default_rng(0)
  content = {
    split: [(rng.integers(0, 256, (28, 28, 1)).astype(np.uint8), int(rng.integers(10))) for _ in range(count)]
    for split, count in (("train", 7), ("test", 3))
  }
  builder = tfds.builder("mnist", data_dir=str(folder), file_format="array_record")

  def png(image):  # encoded here, since TFDS encodes arrays with TensorFlow
    file = io.BytesIO()
    PIL.Image.fromarray(image[..., 0]).save(file, "PNG")
    file.seek(0)
    return file

  examples = lambda split: ((i, {"image": png(image), "label": label}) for i, (image, label) in enumerate(content[split]))
  builder._split_generators = lambda manager: {split: examples(split) for split in content}
  builder.download_and_prepare()
  return folder, content


def test_tfds_set_is_decoded_once_into_a_memory_mapped_cache(tfds_folder, monkeypatch):
  folder, content = tfds_folder
  dataset = datasets.load_dataset("mnist", folder)
  expected = content["train"] + content["test"]  # TFDS shuffles within a split when it writes
  assert dataset.images.shape == (10, 28, 28, 1) and dataset.classes == 10
  key = lambda image, label: (image.tobytes(), int(label))
  for part in (slice(0, 7), slice(7, 10)):
    assert sorted(map(key, dataset.images[part], dataset.labels[part])) == sorted(key(i, l) for i, l in expected[part])
  assert isinstance(dataset.images, np.memmap)

  monkeypatch.setattr(datasets, "_decode_into", lambda *_: pytest.fail("decoded twice"))
  np.testing.assert_array_equal(datasets.load_dataset("mnist", folder).images, dataset.images)


def test_an_interrupted_decode_leaves_no_cache(tfds_folder, monkeypatch):
  folder, _ = tfds_folder
  with monkeypatch.context() as patch:
    patch.setattr(datasets.Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      datasets.load_dataset("mnist", folder)
  assert list(datasets.cache_directory().iterdir()) == []
  assert len(datasets.load_dataset("mnist", folder).labels) == 10


def test_unknown_set_names_the_nearest():
  with pytest.raises(datasets.DatasetError, match="unknown dataset 'cifar01'; did you mean.*cifar10"):
    datasets.load_dataset("cifar01")


def test_a_directory_without_the_set_says_what_it_holds_and_how_to_prepare_it(tfds_folder):
  folder, _ = tfds_folder
  with pytest.raises(datasets.DatasetError) as error:
    datasets.load_dataset("cifar10", folder)
  message = str(error.value)
  assert f"'cifar10' is not in the data directory {folder} (it holds: mnist)" in message
  assert "-m pip install -e '.[prepare]' && " in message
  assert f"-m metagater_jax.data.prepare cifar10 --data_dir={folder}" in message
  with pytest.raises(datasets.DatasetError, match="/no/such does not exist"):
    datasets.load_dataset("cifar10", "/no/such")


def test_the_default_directory_is_prepared_only_where_tensorflow_is_there(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(datasets.DatasetError, match="metagater_jax.data.prepare mnist$"):
    datasets.load_dataset("mnist")
  # With TensorFlow the same call goes to TFDS; the network is where this test stops it.
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
  import tensorflow_datasets as tfds

  def no_network(self, urls):
    raise ConnectionError(f"no network for {sorted(urls)[0]}")

  monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", no_network)
  with pytest.raises(datasets.DatasetError, match="could not prepare 'mnist'.*ConnectionError: no network"):
    datasets.load_dataset("mnist")


def test_prepare_command(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert prepare.main(["mnist"]) == 2
  assert "pip install -e '.[prepare]'" in capsys.readouterr().err
  assert prepare.main(["digits"]) == 0


def test_missing_tfds_says_what_to_install(monkeypatch):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name == "tensorflow_datasets":
      raise ImportError("No module named 'importlib_resources'")
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(datasets.DatasetError, match="pip install tensorflow-datasets importlib_resources"):
    datasets.load_dataset("mnist")


def test_a_damaged_cache_is_made_anew(tfds_folder):
  folder, _ = tfds_folder
  whole = np.array(datasets.load_dataset("mnist", folder).images)
  (entry,) = datasets.cache_directory().iterdir()
  for damage in (
    lambda: (entry / "labels.npy").unlink(),
    lambda: (entry / "images.npy").write_bytes((entry / "images.npy").read_bytes()[:-9]),
    lambda: (entry / "images.npy").write_bytes(b"no array"),
  ):
    damage()
    np.testing.assert_array_equal(datasets.load_dataset("mnist", folder).images, whole)


def test_a_cache_that_cannot_be_written_is_named(tfds_folder, monkeypatch, tmp_path):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("METAGATER_CACHE", str(tmp_path / "file"))
  with pytest.raises(datasets.DatasetError, match="decoded images of 'mnist' cannot be written to .*file.*METAGATER_CACHE"):
    datasets.load_dataset("mnist", tfds_folder[0])
  monkeypatch.setenv("METAGATER_CACHE", str(tmp_path / "new"))
  monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: type("", (), {"free": 3000}))
  with pytest.raises(datasets.DatasetError, match="No space left.*METAGATER_CACHE"):
    datasets.load_dataset("mnist", tfds_folder[0])
  assert list((tmp_path / "new").iterdir()) == []


def test_a_truncated_record_is_named(tfds_folder, tmp_path):
  shutil.copytree(tfds_folder[0], tmp_path / "cut")
  file = next((tmp_path / "cut").rglob("*train*array_record*"))
  os.truncate(file, file.stat().st_size // 2)
  with pytest.raises(datasets.DatasetError, match=f"split 'train' is damaged or cut off.*{file.name}"):
    datasets.load_dataset("mnist", tmp_path / "cut")


@pytest.mark.parametrize("white", [1, 255])
def test_images_of_one_bit_are_black_and_white_whatever_decodes_them(tmp_path, white):
  """Pillow gives 0 and 1, OpenCV 0 and 255."""

  class Builder:
    name, data_dir, version = "bits", str(tmp_path), "1.0.0"
    info = type("", (), {"splits": {"train": type("", (), {"num_examples": 4, "filepaths": []})}})

    def as_data_source(self, split):
      del split
      pictures = [np.full((2, 2, 1), white * (i % 2), np.uint8) for i in range(4)]
      return type("", (), {"__getitems__": lambda self, rows: [{"image": pictures[i], "label": i} for i in rows]})()

  folder = datasets._cached("bits", Builder(), ["train"], shape=(2, 2, 1))
  assert np.load(folder / "images.npy")[:, 0, 0, 0].tolist() == [0, 255, 0, 255]


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  assert prepare.main(["mnist", f"--data_dir={tmp_path / 'file' / 'below'}"]) == 2
  assert "cannot be made (Not a directory); give another with --data_dir" in capsys.readouterr().err

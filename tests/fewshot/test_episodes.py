"""Few-shot episodes: what is drawn, that nothing leaks, and errors that name the numbers."""

from functools import partial

import jax
import numpy as np
import pytest

import metagater_jax as mg


@pytest.fixture(scope="module")
def pool():
  """Nine classes of 6 … 14 samples; a sample's only pixel is its number, its label that number's class."""
  sizes = np.arange(6, 15)
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(9), sizes))
  images = np.arange(len(labels), dtype=np.float32)[:, None]
  return mg.fewshot.make_class_pool(images, labels), labels


@pytest.fixture(scope="module")
def episodes(pool):
  draw = jax.jit(partial(mg.fewshot.sample_episodes, episodes=400, ways=4, shots=2, queries=3))
  return jax.tree.map(np.asarray, draw(jax.random.key(3), pool[0]))


def test_support_and_query_share_no_sample(episodes):
  for support, query in zip(episodes.support.images[..., 0], episodes.query.images[..., 0]):
    drawn = np.concatenate([support, query])
    assert len(np.unique(drawn)) == len(drawn) == 4 * (2 + 3)


def test_a_label_is_one_class_and_classes_differ(pool, episodes):
  _, labels = pool
  for support, query in zip(*(jax.tree.map(lambda x: list(x), part.images[..., 0].astype(int)) for part in episodes)):
    classes = labels[np.concatenate([np.reshape(support, (4, 2)), np.reshape(query, (4, 3))], axis=1)]
    assert (classes == classes[:, :1]).all()
    assert len(np.unique(classes[:, 0])) == 4
  assert episodes.support.labels[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_classes_labels_and_samples_are_uniform(pool, episodes):
  _, labels = pool
  first = labels[episodes.support.images[:, 0, 0].astype(int)]  # the class that is labelled 0
  counts = np.bincount(first, minlength=9)
  expected = 400 / 9
  assert ((counts - expected) ** 2 / expected).sum() < 26.1  # χ², 8 degrees of freedom: one in 1,000 exceeds it
  of_class = episodes.query.images[labels[episodes.query.images[..., 0].astype(int)] == 4, 0].astype(int)
  assert set(of_class) == set(np.flatnonzero(labels == 4))


def test_an_episode_is_a_function_of_its_key(pool):
  draw = partial(mg.fewshot.sample_episode, pool=pool[0], ways=3, shots=1, queries=2)
  one, same, other = draw(jax.random.key(0)), draw(jax.random.key(0)), draw(jax.random.key(1))
  assert (one.query.images == same.query.images).all()
  assert (one.query.images != other.query.images).any()


def test_a_pool_may_be_a_constant_of_a_jitted_function(pool):
  draw = partial(mg.fewshot.sample_episode, pool=pool[0], ways=3, shots=1, queries=2)
  jax.tree.map(np.testing.assert_array_equal, jax.jit(draw)(jax.random.key(0)), draw(jax.random.key(0)))
  with pytest.raises(ValueError, match="need 7 samples of each class, but a class has 6"):
    jax.jit(partial(mg.fewshot.sample_episode, pool=pool[0], ways=2, shots=3, queries=4))(jax.random.key(0))


def test_a_pool_has_its_own_classes_only(pool):
  _, labels = pool
  images = np.arange(len(labels), dtype=np.float32)[:, None]
  part = mg.fewshot.make_class_pool(images, labels, classes=[7, 2])
  assert set(np.asarray(part.images)[:, 0].astype(int)) == set(np.flatnonzero(np.isin(labels, [2, 7])))
  assert part.count.tolist() == [13, 8]


def test_rotations_are_classes_of_their_own():
  images = np.arange(2 * 9, dtype=np.uint8).reshape(2, 3, 3, 1)
  turned, labels = mg.fewshot.with_rotations(images, np.array([0, 5]))
  assert sorted(labels.tolist()) == [0, 1, 2, 3, 20, 21, 22, 23]
  np.testing.assert_array_equal(turned[labels == 22][0], images[1][::-1, ::-1])
  np.testing.assert_array_equal(turned[labels == 1][0], images[0].transpose(1, 0, 2)[::-1])
  with pytest.raises(ValueError, match="3×4"):
    mg.fewshot.with_rotations(np.zeros((1, 3, 4, 1)), np.zeros(1, int))


def test_augmented_images_are_mirrored_and_moved_ones():
  """Each is a crop of the padded image or its mirror image, and all of these come."""
  image = np.arange(12.0, dtype=np.float32).reshape(4, 3, 1)
  crops = {}
  for mirrored in (False, True):
    padded = np.pad(image[:, ::-1] if mirrored else image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    crops |= {(mirrored, i, j): padded[i : i + 4, j : j + 3].tobytes() for i in range(3) for j in range(3)}
  found = {np.asarray(out).tobytes() for out in mg.fewshot.augment_images(jax.random.key(0), np.stack([image] * 400), shift=1)}
  assert found == set(crops.values())
  out = mg.fewshot.augment_images(jax.random.key(0), image[None], flip=False, shift=0)
  np.testing.assert_array_equal(out, image[None])
  with pytest.raises(ValueError, match=r"shift in \[0, their size\), got \(1, 4, 3, 1\) and 3"):
    mg.fewshot.augment_images(jax.random.key(0), image[None], shift=3)


@pytest.mark.parametrize(
  "numbers, message",
  [
    ({"ways": 10, "shots": 1, "queries": 1}, "10 ways are more than the 9 classes"),
    ({"ways": 2, "shots": 3, "queries": 4}, "need 7 samples of each class, but a class has 6"),
    ({"ways": 2, "shots": 0, "queries": 4}, "shots must be .*, got 0"),
  ],
)
def test_impossible_episodes(pool, numbers, message):
  with pytest.raises(ValueError, match=message):
    mg.fewshot.sample_episode(jax.random.key(0), pool[0], **numbers)


def test_impossible_pools():
  images, labels = np.zeros((3, 2)), np.array([0, 1, 1])
  for arguments, message in (
    ((images, labels[:2]), "3 images but 2 labels"),
    ((images, labels, [0, 4]), "class 4"),
    ((images, labels, [1, 1]), "differ"),
  ):
    with pytest.raises(ValueError, match=message):
      mg.fewshot.make_class_pool(*arguments)

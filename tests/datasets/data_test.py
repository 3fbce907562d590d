"""Tests of `ddss_tf.data` and of the embedded digits."""

import os

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.datasets import ddss_digits
from ddss_tf.datasets import load as data
from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError


@pytest.fixture(scope="module")
def npz():
  folder = os.path.dirname(ddss_digits.__file__)
  with np.load(os.path.join(folder, "mnist10k.npz")) as file:
    return {key: file[key] for key in file}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """Prepared data sets of which TFDS has no code: only files."""
  folder = str(tmp_path_factory.mktemp("tiny"))
  pixels = np.random.default_rng(0).integers(
      0, 256, (5, 4, 6, 3), dtype=np.uint8)

  def store(name, feature, examples):
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name, version="1.0.0", data_dir=folder,
        features=tfds.features.FeaturesDict(feature),
        split_datasets={"test": list(enumerate(examples))},
        disable_shuffling=True)

  store("tiny_rgb", {"image": tfds.features.Image(shape=(4, 6, 3))},
        [{"image": image} for image in pixels])
  store("tiny_mixed", {"image": tfds.features.Image(shape=(None, None, 3))},
        [{"image": pixels[0]}, {"image": pixels[1, :3]}])
  store("tiny_text", {"text": tfds.features.Text()}, [{"text": "digit"}])
  return folder, pixels


def one_line(error) -> str:
  text = str(error.value)
  assert text and "\n" not in text
  return text


def test_digits_are_the_file_in_order(digits, tfds_dir, npz):
  del digits  # Has prepared the data set.
  dataset = tfds.load("ddss_digits", split="train", data_dir=tfds_dir,
                      download=False)
  batch = next(iter(tfds.as_numpy(dataset.batch(10000))))
  np.testing.assert_array_equal(batch["image"][..., 0], npz["image"])
  np.testing.assert_array_equal(batch["label"], npz["label"])


def test_digits_info(digits, tfds_dir):
  del digits
  info = tfds.builder("ddss_digits", data_dir=tfds_dir).info
  assert list(info.splits) == ["train"]
  assert info.splits["train"].num_examples == 10000
  assert info.features["label"].num_classes == 10
  assert "LeCun" in info.citation


@pytest.mark.slow
def test_full_size_pixels(tfds_dir, npz):
  dataset = data.load_dataset("ddss_digits", data_dir=tfds_dir)
  assert dataset.images.shape == (10000, 28, 28, 1)
  np.testing.assert_allclose(dataset.images[..., 0],
                             npz["image"] / 127.5 - 1, atol=1e-6)
  np.testing.assert_array_equal(dataset.labels, npz["label"])


def test_16x16_form_matches_independent_formula(digits, npz):
  padded = np.zeros((10000, 32, 32))
  padded[:, 2:30, 2:30] = npz["image"]
  corners = [padded[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
  assert digits.images.dtype == np.float32
  assert digits.images.shape == (10000, 16, 16, 1)
  np.testing.assert_allclose(digits.images[..., 0],
                             sum(corners) / 4 / 127.5 - 1, atol=1e-6)


def test_digits_are_those_of_published_results(digits, tfds_dir):
  # Cards, caches and metrics.json name the data set by these.
  assert digits.sha256 == (
      "0fd9b9710e157f7d894a7d2ad2bc361d68e3508e40d8762323f006247b7a1ccc")
  full = data.load_dataset("ddss_digits", data_dir=tfds_dir)
  assert full.sha256 == (
      "75bd397dd475c28d56ca6c16b9c7f6c16e94904b11970e394e885a31a4f2a910")


@pytest.mark.slow
def test_hash_is_of_the_images(digits, tfds_dir):
  assert digits.sha256 == fingerprint.arrays_sha256([digits.images])
  again = data.load_dataset("ddss_digits", "train[:100%]", pad=2, downsample=2,
                            data_dir=tfds_dir)
  assert again.sha256 == digits.sha256
  part = data.load_dataset("ddss_digits", "train[9000:]", pad=2, downsample=2,
                           data_dir=tfds_dir)
  assert part.sha256 != digits.sha256
  np.testing.assert_array_equal(part.images, digits.images[9000:])
  np.testing.assert_array_equal(part.labels, digits.labels[9000:])


def test_any_prepared_data_set(tiny):
  folder, pixels = tiny
  dataset = data.load_dataset("tiny_rgb", "test", pad=1, downsample=2,
                              data_dir=folder)
  assert dataset.labels is None
  assert dataset.images.shape == (5, 3, 4, 3)
  x = pixels / 127.5 - 1
  np.testing.assert_allclose(dataset.images[:, 1, 1], np.mean(
      [x[:, 1, 1], x[:, 1, 2], x[:, 2, 1], x[:, 2, 2]], axis=0), atol=1e-6)
  np.testing.assert_allclose(
      dataset.images[:, 0, 0], (x[:, 0, 0] - 3) / 4, atol=1e-6)


@pytest.mark.parametrize("convert", [np.asarray, tf.constant])
def test_bytes_and_floats(convert):
  pixels = np.arange(256, dtype=np.uint8)
  floats = dataset_lib.to_float(convert(pixels))
  assert floats.dtype == np.float32
  np.testing.assert_allclose(floats, np.arange(256) / 127.5 - 1, atol=1e-6)
  np.testing.assert_array_equal(dataset_lib.to_uint8(floats), pixels)
  overshoot = convert(np.float32([-1.5, -1.0, -0.999, 0.999, 1.0, 9.0]))
  np.testing.assert_array_equal(
      dataset_lib.to_uint8(overshoot), np.uint8([0, 0, 0, 255, 255, 255]))


@pytest.mark.parametrize("kwargs, words", [
    (dict(split="test"), ["train", "'test'"]),
    (dict(split="train["), ["train", "'train['"]),
    (dict(split=None), ["train", "None"]),
    (dict(split="train[:0]"), ["at least one", "'train[:0]'"]),
    (dict(pad=-1), ["pad", ">= 0", "-1"]),
    (dict(pad=0.5), ["pad", "0.5"]),
    (dict(downsample=0), ["downsample", ">= 1", "0"]),
    (dict(downsample=3), ["28x28", "3"]),
    (dict(crop=29), ["crop", "29", "28x28"]),
    (dict(crop=0), ["crop", "'center'", ">= 1", "0"]),
    (dict(crop="middle"), ["crop", "'center'", "'middle'"]),
    (dict(resize=0), ["resize", ">= 1", "0"]),
    (dict(resize=8.0), ["resize", "8.0"]),
    (dict(resize=8, resize_method="nearest"), ["bicubic", "'nearest'"]),
    (dict(channels=2), ["channels", "1, 3 or None", "2"]),
    (dict(max_images=0), ["max_images", ">= 1", "0"]),
    (dict(subset_seed=-1), ["subset_seed", ">= 0", "-1"]),
    (dict(max_bytes=10**6),
     ["31360000 bytes", "0.0292 GiB", "max_bytes=1000000", "max_images=318"]),
    (dict(max_bytes=10**6, flip=True), ["62720000 bytes", "max_images=159"]),
    (dict(max_bytes=99), ["28x28x1", "a larger max_bytes"]),
])
def test_refusals(digits, tfds_dir, kwargs, words):
  del digits
  with pytest.raises(UserError) as error:
    data.load_dataset("ddss_digits", data_dir=tfds_dir, **kwargs)
  text = one_line(error)
  for word in words:
    assert word in text


@pytest.mark.parametrize(
    "name", ["no_such_digits", "two words", "", "cifar10:9.9.9"])
def test_unknown_name(tmp_path, name):
  with pytest.raises(UserError) as error:
    data.load_dataset(name, data_dir=str(tmp_path))
  assert repr(name) in one_line(error)


def test_not_prepared(tmp_path):
  with pytest.raises(UserError) as error:
    data.load_dataset("cifar10", data_dir=str(tmp_path))
  text = one_line(error)
  for word in ["'cifar10'", str(tmp_path), "tfds build", "download=True"]:
    assert word in text
  assert not list(tmp_path.iterdir())


def test_cannot_prepare(tmp_path):
  file = tmp_path / "file"
  file.write_text("not a folder")
  with pytest.raises(UserError) as error:
    data.load_dataset("ddss_digits", data_dir=str(file))
  assert str(file) in one_line(error)


@pytest.mark.parametrize("name, words", [
    ("tiny_text", ["'image'", "text"]), ("tiny_mixed", ["one size"])])
def test_no_images_of_one_size(tiny, name, words):
  with pytest.raises(UserError) as error:
    data.load_dataset(name, "test", data_dir=tiny[0])
  for word in words:
    assert word in one_line(error)

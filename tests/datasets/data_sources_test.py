"""Tests of folders, npz files and TFRecords, and of the gin includes."""

import os
import pathlib
import shutil
import sys
import types

import gin
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.datasets import load as data
from ddss_tf import configuration  # pylint: disable=unused-import
from ddss_tf.errors import UserError
import stand_in_data
from project import ROOT

GIN = pathlib.Path(ROOT) / "gin_configs"
INCLUDES = sorted(path.name for path in (GIN / "datasets").glob("*.gin"))
random_bytes = stand_in_data.random_bytes


def refusal(name, **kwargs) -> str:
  with pytest.raises(UserError) as error:
    data.load_dataset(name, **kwargs)
  text = str(error.value)
  assert text and "\n" not in text
  assert not any(word in text for word in ("{{", "[Op:", "Iterator::"))
  return text


def save(pixels, path, **kwargs):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.squeeze(pixels)).save(path, **kwargs)


@pytest.fixture
def flat(tmp_path):
  """Four files, written out of order, and some that are no images."""
  pixels = random_bytes(4, 5, 7, 3)
  root = tmp_path / "flat"
  if hasattr(tf.io, "decode_webp"):  # Not in the lowest TensorFlow.
    save(pixels[3], root / "d.WEBP", lossless=True)
  else:
    save(pixels[3], root / "d.PNG")
  save(pixels[0], root / "B.png")
  save(pixels[2], root / "c.png")
  save(pixels[1], root / "a.bmp")
  (root / ".a.png").write_text("hidden")
  (root / "notes.txt").write_text("not an image")
  return root, pixels


def test_flat_folder(flat):
  root, pixels = flat
  dataset = data.load_dataset(f"folder:{root}")
  assert dataset.labels is None
  assert dataset.name == f"folder:{root}"
  np.testing.assert_array_equal(dataset_lib.to_uint8(dataset.images), pixels)
  part = data.load_dataset(f"folder:{root}", max_images=2, subset_seed=None)
  np.testing.assert_array_equal(part.images, dataset.images[:2])


def test_class_folders(tmp_path):
  pixels = random_bytes(5, 4, 4, 3)
  for i, name in enumerate(
      ["cat/2.png", "cat/9.png", "dog/1.png", "dog house/0.png", "emu/3.png"]):
    save(pixels[i], tmp_path / name)
  dataset = data.load_dataset(f"folder:{tmp_path}")
  # As the names sort, "dog" is before "dog house".
  np.testing.assert_array_equal(dataset_lib.to_uint8(dataset.images), pixels)
  np.testing.assert_array_equal(dataset.labels, [0, 0, 1, 2, 3])
  assert dataset.labels.dtype == np.int64


def test_jpeg_is_near_what_pillow_decodes(tmp_path):
  y, x = np.mgrid[:32, :32]
  smooth = np.stack([8 * x, 8 * y, 255 - 4 * (x + y)], -1).astype(np.uint8)
  save(smooth, tmp_path / "a.jpg", quality=95)
  save(smooth[..., 0], tmp_path / "b.jpeg", quality=95)
  images = data.load_dataset(f"folder:{tmp_path}", channels=3).images
  for image, name in zip(images, ["a.jpg", "b.jpeg"]):
    with Image.open(tmp_path / name) as file:
      expected = np.asarray(file.convert("RGB"), np.float32)
    assert np.abs(127.5 * image + 127.5 - expected).max() <= 4


def test_files_of_many_sizes_and_kinds_become_one(tmp_path):
  sizes = [(9, 5, 3), (6, 6, 1), (4, 8, 4)]
  for i, size in enumerate(sizes):
    save(np.full(size, 50 * i, np.uint8), tmp_path / f"{i}.png")
  images = data.load_dataset(
      f"folder:{tmp_path}", channels=3, crop="center", resize=3).images
  expected = np.broadcast_to(
      (np.float32([0, 50, 100]) / 127.5 - 1)[:, None, None, None],
      (3, 3, 3, 3))
  np.testing.assert_allclose(images, expected, atol=1e-5)


def test_mixed_files_are_refused_by_name(flat):
  root, pixels = flat
  save(pixels[0, :4], root / "c.png")
  text = refusal(f"folder:{root}")
  for word in ["5x7x3", "4x7x3", "c.png", "resize", "one size"]:
    assert word in text
  save(pixels[0, ..., 0], root / "c.png")
  text = refusal(f"folder:{root}")
  for word in ["5x7x3", "5x7x1", "c.png", "channels"]:
    assert word in text


@pytest.mark.parametrize("content", [
    b"text", b"", b"\x89PNG\r\n\x1a\n", "cut"], ids=repr)
def test_file_that_is_no_image_is_named(flat, content):
  root, _ = flat
  if content == "cut":
    content = (root / "c.png").read_bytes()[:-30]
  (root / "c.png").write_bytes(content)
  text = refusal(f"folder:{root}")
  assert str(root / "c.png") in text and "cannot be read" in text


def test_truncated_jpeg_is_named(tmp_path):
  save(random_bytes(64, 64, 3), tmp_path / "a.jpg")
  content = (tmp_path / "a.jpg").read_bytes()
  (tmp_path / "b.jpg").write_bytes(content[:len(content) // 2])
  assert str(tmp_path / "b.jpg") in refusal(f"folder:{tmp_path}")


def test_folders_without_images(tmp_path, flat):
  root, pixels = flat
  for path, words in [
      ("", ["must exist", "missing"]),
      (str(tmp_path / "lost"), ["must exist", "lost", "missing"]),
      (str(root / "notes.txt"), ["notes.txt", "a file"])]:
    text = refusal(f"folder:{path}")
    for word in words:
      assert word in text
  (tmp_path / "empty").mkdir()
  assert ".webp" in refusal(f"folder:{tmp_path / 'empty'}")
  # A level of splits would else be taken for classes.
  save(pixels[0], tmp_path / "splits" / "train" / "cat" / "a.png")
  text = refusal(f"folder:{tmp_path / 'splits'}")
  assert os.path.join("train", "cat", "a.png") in text
  save(pixels[0], root / "cat" / "a.png")
  text = refusal(f"folder:{root}")
  assert "B.png" in text and os.path.join("cat", "a.png") in text


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_of_floats(tmp_path, dtype):
  x = np.random.default_rng(0).uniform(-1, 1, (3, 2, 4, 3)).astype(dtype)
  np.savez(tmp_path / "x.npz", images=x, labels=np.uint8([4, 0, 255]))
  dataset = data.load_dataset(f"npz:{tmp_path / 'x.npz'}")
  np.testing.assert_array_equal(dataset.images, x.astype(np.float32))
  np.testing.assert_array_equal(dataset.labels, [4, 0, 255])
  assert dataset.labels.dtype == np.int64


def test_npz_of_bytes(tmp_path):
  pixels = random_bytes(250, 2, 4, 3)  # More than a batch.
  np.savez_compressed(tmp_path / "x.npz", images=pixels)
  dataset = data.load_dataset(f"npz:{tmp_path / 'x.npz'}")
  assert dataset.labels is None
  np.testing.assert_array_equal(dataset.images, dataset_lib.to_float(pixels))


BYTES = random_bytes(3, 4, 4, 1)
FLOATS = BYTES / np.float32(255)


@pytest.mark.parametrize("arrays, words", [
    (dict(pictures=BYTES), ["'images'", "pictures"]),
    (dict(), ["'images'", "no array"]),
    (dict(images=BYTES[..., 0]), ["[N, H, W, C]", "[3, 4, 4]"]),
    (dict(images=BYTES[:0]), ["empty", "[0, 4, 4, 1]"]),
    (dict(images=BYTES.astype(np.int32)), ["uint8", "int32"]),
    (dict(images=FLOATS * 255), ["[-1, 1]", "[3.0, 253.0]"]),
    (dict(images=FLOATS * np.nan), ["[-1, 1]", "nan"]),
    (dict(images=BYTES.astype(object)), ["plain arrays", "pickle"]),
    (dict(images=BYTES, labels=[1, 2]), ["3 integers", "[2]"]),
    (dict(images=BYTES, labels=[1.0, 2, 3]), ["3 integers", "float64"]),
])
def test_npz_of_another_form(tmp_path, arrays, words):
  path = tmp_path / "x.npz"
  np.savez(path, **arrays)
  text = refusal(f"npz:{path}")
  for word in [str(path), *words]:
    assert word in text


def test_damaged_npz(tmp_path):
  path = tmp_path / "x.npz"
  assert "missing" in refusal(f"npz:{path}")
  np.savez_compressed(path, images=random_bytes(20, 8, 8, 3))
  content = path.read_bytes()
  middle = len(content) // 2
  for damaged in [b"", b"text", content[:middle],
                  content[:middle] + b"\0" * 50 + content[middle + 50:]]:
    path.write_bytes(damaged)
    text = refusal(f"npz:{path}")
    assert str(path) in text and "pickle" not in text
  with open(path, "wb") as file:
    np.save(file, BYTES)
  assert "another kind" in refusal(f"npz:{path}")


def write_tfrecords(path, records):
  with tf.io.TFRecordWriter(str(path)) as writer:
    for feature in records:
      writer.write(tf.train.Example(features=tf.train.Features(
          feature=feature)).SerializeToString())


def stylegan_record(image, shape=None):
  """As `TFRecordExporter.add_image` of StyleGAN's dataset_tool.py."""
  chw = image.transpose(2, 0, 1)
  return {
      "shape": tf.train.Feature(int64_list=tf.train.Int64List(
          value=chw.shape if shape is None else shape)),
      "data": tf.train.Feature(bytes_list=tf.train.BytesList(
          value=[chw.tobytes()]))}


def test_stylegan_tfrecords(tmp_path):
  pixels = random_bytes(6, 4, 8, 3)
  path = tmp_path / "set-r02.tfrecords"
  write_tfrecords(path, [stylegan_record(image) for image in pixels])
  dataset = data.load_dataset(f"tfrecords:{path}")
  assert dataset.labels is None
  np.testing.assert_array_equal(dataset_lib.to_uint8(dataset.images), pixels)
  assert dataset.sha256 == data.load_dataset(f"tfrecords:{path}").sha256
  part = data.load_dataset(f"tfrecords:{path}", max_images=2, subset_seed=5)
  assert any(np.array_equal(part.images, dataset.images[[i, j]])
             for j in range(6) for i in range(j))


def test_damaged_tfrecords(tmp_path):
  pixels = random_bytes(3, 4, 4, 3)
  path = tmp_path / "set-r02.tfrecords"
  name = f"tfrecords:{path}"
  assert "missing" in refusal(name)
  good = [stylegan_record(image) for image in pixels]
  write_tfrecords(path, good)
  assert "set-r02.tfrecords" in refusal(f"tfrecords:{tmp_path}")
  content = path.read_bytes()
  for damaged in (content[:-5], b"text" * 9, content[:30]):
    path.write_bytes(damaged)
    text = refusal(name)
    assert str(path) in text and "whole TFRecord" in text
  path.write_bytes(b"")
  assert "at least one" in refusal(name)
  for bad, words in [
      (stylegan_record(pixels[1], (3, 4, 5)), ["image 1", str(path)]),
      (stylegan_record(pixels[1], (3, 4)), ["image 1", str(path)]),
      ({"image": good[0]["data"]}, ["image 1", str(path)]),
      (stylegan_record(pixels[1, :2]), ["4x4x3", "2x4x3", "image 1"])]:
    write_tfrecords(path, [good[0], bad, good[2]])
    text = refusal(name)
    for word in words:
      assert word in text


# TFDS names of the includes: config, version, image shape, whether labelled.
TFDS_SETS = {
    "cifar10.gin": ("cifar10", None, (32, 32, 3), True),
    "mnist.gin": ("mnist", None, (28, 28, 1), True),
    "imagenet64.gin": ("downsampled_imagenet", "64x64", (None, None, 3), False),
    "imagenet_resized64.gin": ("imagenet_resized", "64x64", (64, 64, 3), True),
    "lsun_bedroom.gin": ("lsun", "bedroom", (None, None, 3), False),
    "lsun_church.gin": ("lsun", "church_outdoor", (None, None, 3), False),
    "celeb_a.gin": ("celeb_a", None, (218, 178, 3), False),
}
SHAPES = {
    "cifar10.gin": (32, 32, 3), "mnist.gin": (28, 28, 1),
    "imagenet64.gin": (64, 64, 3), "imagenet_resized64.gin": (64, 64, 3),
    "lsun_bedroom.gin": (128, 128, 3),
    "lsun_church.gin": (128, 128, 3), "celeb_a.gin": (64, 64, 3),
    "digits16.gin": (16, 16, 1), "digits28.gin": (28, 28, 1),
    "emoji32.gin": (32, 32, 3),  # emoji_test.py loads them.
}


@pytest.fixture
def parse(monkeypatch):
  """Parses gin files of the repository and then single bindings."""
  gin.clear_config()
  monkeypatch.chdir(GIN)  # There gin looks for what a file includes.
  with gin.unlock_config():
    def parse_files(*names, bindings=()):
      gin.clear_config()
      for name in names:
        gin.parse_config_file(str(GIN / name), skip_unknown=False)
      gin.parse_config(list(bindings), skip_unknown=False)
    yield parse_files
  gin.clear_config()


def test_there_is_an_include_for_each_data_set():
  assert INCLUDES == sorted([
      *SHAPES, "folder.gin", "npz.gin", "stylegan_tfrecords.gin"])


@pytest.mark.parametrize("include", INCLUDES)
def test_include_stands_alone_and_after_another(parse, include):
  def bindings():
    return {option: gin.query_parameter(f"load_dataset.{option}")
            for option in ("split", "channels", "crop", "pad", "downsample",
                           "resize", "resize_method", "flip", "max_images",
                           "subset_seed", "max_bytes")}
  parse(f"datasets/{include}")
  alone = bindings()
  assert repr(gin.query_parameter("DATASET/gin.macro.value")) == (
      "@dataset/gin.singleton()")
  text = (GIN / "datasets" / include).read_text()
  assert text.startswith("# ") and "\n# Prepare: " in text
  parse("digits.gin", f"datasets/{include}")
  assert bindings() == alone


@pytest.mark.parametrize("include", sorted(TFDS_SETS))
def test_include_loads_a_prepared_stand_in(parse, tmp_path, include):
  name, config, image_shape, labelled = TFDS_SETS[include]
  folder = str(tmp_path)
  parse(f"datasets/{include}", bindings=[f"load_dataset.data_dir = '{folder}'"])
  load = gin.get_configurable("load_dataset")
  with pytest.raises(UserError, match="tfds build"):
    load()
  images = stand_in_data.prepare(folder, name, config, image_shape, labelled)
  dataset = load()
  assert dataset.images.shape == (3, *SHAPES[include])
  if labelled:
    np.testing.assert_array_equal(dataset.labels, [4, 5, 6])
  else:
    assert dataset.labels is None
  for image, loaded in zip(images, dataset.images):
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    pillow = Image.fromarray(
        np.squeeze(image[top:top + side, left:left + side])).resize(
            loaded.shape[:2], Image.Resampling.BICUBIC)
    error = 127.5 * np.squeeze(loaded) + 127.5 - np.asarray(pillow)
    assert np.abs(error).max() < 1.5


class Unloadable(types.ModuleType):
  """tensorflow-io 0.37.1 beside TensorFlow 2.21: found, and then not loaded."""

  def __getattr__(self, name):
    raise NotImplementedError("unable to open file: libtensorflow_io.so, from "
                              "paths: ['/a/b']\ncaused by: undefined symbol")


@pytest.mark.parametrize("found,words", [
    (None, ["tensorflow_io"]),
    (Unloadable("core_ops"), ["libtensorflow_io.so"])])
def test_lsun_without_tensorflow_io(monkeypatch, tmp_path, found, words):
  """What cannot be prepared is not downloaded; what is prepared is read."""
  packages = ["tensorflow_io", "tensorflow_io.python",
              "tensorflow_io.python.ops"]
  for name in packages:
    monkeypatch.setitem(
        sys.modules, name, found and types.ModuleType(name))
  if found:
    sys.modules[packages[-1]].core_ops = found
  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", None)
  for download in (False, True):
    text = refusal("lsun/church_outdoor", data_dir=str(tmp_path),
                   download=download)
    for word in ["tfds build lsun/church_outdoor", "tensorflow-io loads",
                 "data_dir", str(tmp_path), *words]:
      assert word in text
  assert not list(tmp_path.iterdir())
  monkeypatch.undo()
  images = stand_in_data.prepare(
      str(tmp_path), *TFDS_SETS["lsun_church.gin"])
  monkeypatch.setitem(sys.modules, "tensorflow_io", None)
  dataset = data.load_dataset("lsun/church_outdoor", data_dir=str(tmp_path),
                              crop=200)
  for image, loaded in zip(images, dataset.images, strict=True):
    top, left = (image.shape[0] - 200) // 2, (image.shape[1] - 200) // 2
    np.testing.assert_array_equal(
        dataset_lib.to_uint8(loaded), image[top:top + 200, left:left + 200])


def test_many_sizes_of_a_tfds_set_without_resize(parse, tmp_path):
  parse()
  stand_in_data.prepare(str(tmp_path), *TFDS_SETS["lsun_church.gin"])
  text = refusal("lsun/church_outdoor", data_dir=str(tmp_path))
  for word in ["300x256x3", "256x341x3", "resize", "image 1"]:
    assert word in text
  dataset = data.load_dataset("lsun/church_outdoor", data_dir=str(tmp_path),
                              crop=200, resize=20, max_images=2)
  assert dataset.images.shape == (2, 20, 20, 3)


@pytest.mark.slow
@pytest.mark.parametrize("include", [
    "digits16.gin", pytest.param("digits28.gin", marks=pytest.mark.slow)])
def test_include_of_the_digits(parse, digits, tfds_dir, include):
  parse(f"datasets/{include}",
        bindings=[f"load_dataset.data_dir = '{tfds_dir}'"])
  dataset = gin.get_configurable("load_dataset")()
  assert dataset.images.shape == (10000, *SHAPES[include])
  if include == "digits16.gin":
    assert dataset.sha256 == digits.sha256


@pytest.mark.parametrize("include", [
    "folder.gin", "npz.gin", "stylegan_tfrecords.gin"])
def test_include_of_files(parse, tmp_path, include):
  pixels = random_bytes(2, 64, 64, 3)
  (tmp_path / "images").mkdir()
  save(pixels[0], tmp_path / "images" / "0.png")
  save(pixels[1], tmp_path / "images" / "1.png")
  np.savez(tmp_path / "x.npz", images=pixels)
  write_tfrecords(tmp_path / "x.tfrecords",
                  [stylegan_record(image) for image in pixels])
  name = {"folder.gin": f"folder:{tmp_path / 'images'}",
          "npz.gin": f"npz:{tmp_path / 'x.npz'}",
          "stylegan_tfrecords.gin": f"tfrecords:{tmp_path / 'x.tfrecords'}"}
  parse(f"datasets/{include}")
  load = gin.get_configurable("load_dataset")
  with pytest.raises(ValueError, match="load_dataset.name set to `%gin.REQ"):
    gin.finalize()
  gin.bind_parameter("load_dataset.name", name[include])
  np.testing.assert_array_equal(dataset_lib.to_uint8(load().images), pixels)


def test_truncated_tfds_files(tmp_path):
  images = stand_in_data.prepare(str(tmp_path), *TFDS_SETS["mnist.gin"])
  assert len(images) == 3
  file, = tmp_path.rglob("*.tfrecord*")
  file.write_bytes(file.read_bytes()[:-40])
  text = refusal("mnist", data_dir=str(tmp_path))
  assert str(file.parent) in text and "remove" in text
  shutil.rmtree(file.parent)
  assert "tfds build" in refusal("mnist", data_dir=str(tmp_path))

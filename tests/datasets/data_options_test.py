"""Tests of what `load_dataset` does to pixels, on arrays it reads from npz."""

import numpy as np
from PIL import Image
import pytest

from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.datasets import load as data
from ddss_tf.errors import UserError


@pytest.fixture
def load(tmp_path):
  """Loads images, and labels, through an npz file."""
  def load_arrays(images, labels=None, **kwargs):
    path = str(tmp_path / "images.npz")
    arrays = {"images": images}
    if labels is not None:
      arrays["labels"] = labels
    np.savez(path, **arrays)
    return data.load_dataset(f"npz:{path}", **kwargs)
  return load_arrays


def random_bytes(*shape):
  return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def bicubic_matrix(old: int, new: int) -> np.ndarray:
  """[new, old]: Keys' cubic (a = -1/2), widened by the ratio, sum one."""
  ratio = max(old / new, 1.0)
  centres = (np.arange(new)[:, None] + 0.5) * old / new
  x = np.abs(np.arange(old)[None] + 0.5 - centres) / ratio
  weights = np.where(
      x < 1, 1.5 * x**3 - 2.5 * x**2 + 1,
      np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
  return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", [(7, 10), (10, 7), (6, 11), (8, 8)])
def test_center_crop_is_the_middle_square(load, shape):
  pixels = random_bytes(3, *shape, 3)
  side = min(shape)
  middle = np.asarray([np.asarray(Image.fromarray(image).crop((
      (shape[1] - side) // 2, (shape[0] - side) // 2,
      (shape[1] - side) // 2 + side, (shape[0] - side) // 2 + side)))
                       for image in pixels])
  images = load(pixels, crop="center").images
  np.testing.assert_array_equal(dataset_lib.to_uint8(images), middle)
  np.testing.assert_array_equal(images, load(middle).images)


def test_crop_of_a_side(load):
  pixels = random_bytes(2, 9, 12, 1)
  np.testing.assert_array_equal(
      dataset_lib.to_uint8(load(pixels, crop=4).images), pixels[:, 2:6, 4:8])


@pytest.mark.parametrize("old, new", [(178, 64), (20, 10), (9, 14), (13, 13)])
def test_resize_is_antialiased_bicubic(load, old, new):
  pixels = random_bytes(2, old, old, 3) // 2 + 64
  weights = bicubic_matrix(old, new)
  expected = np.einsum("ih,jw,bhwc->bijc", weights, weights,
                       pixels / 127.5 - 1)
  images = load(pixels, resize=new).images
  assert images.dtype == np.float32 and images.shape == (2, new, new, 3)
  np.testing.assert_allclose(images, expected, atol=1e-5)
  # Pillow rounds to bytes after each of its two passes, and clips: hence
  # pixels of middling values.
  pillow = [np.asarray(Image.fromarray(image).resize(
      (new, new), Image.Resampling.BICUBIC)) for image in pixels]
  assert np.abs(127.5 * images + 127.5 - pillow).max() < 1.5


def test_resize_clips_the_overshoot_of_the_cubic(load):
  pixels = np.zeros((1, 8, 8, 1), np.uint8)
  pixels[:, :, 4:] = 255
  weights = bicubic_matrix(8, 16)
  assert (weights @ pixels[0, :, :, 0].T / 127.5 - 1).max() > 1.05
  images = load(pixels, resize=16).images
  assert images.min() == -1 and images.max() == 1


@pytest.mark.parametrize("method, pillow", [
    ("lanczos3", Image.Resampling.LANCZOS), ("area", Image.Resampling.BOX)])
def test_other_methods_are_pillows(load, method, pillow):
  pixels = random_bytes(1, 24, 24, 1)
  image = Image.fromarray(pixels[0, ..., 0].astype(np.float32))
  expected = np.asarray(image.resize((8, 8), pillow)) / 127.5 - 1
  images = load(pixels, resize=8, resize_method=method).images
  np.testing.assert_allclose(images[0, ..., 0], expected, atol=1e-5)


def test_order_of_the_options(load):
  pixels = random_bytes(3, 12, 17, 3)
  x = pixels[:, 1:11, 3:13] / 127.5 - 1  # crop=10.
  grey = x @ [0.299, 0.587, 0.114]
  padded = np.full((3, 12, 12), -1.0)
  padded[:, 1:-1, 1:-1] = grey
  blocks = padded.reshape(3, 6, 2, 6, 2).mean((2, 4))
  weights = bicubic_matrix(6, 4)
  expected = np.clip(weights @ blocks @ weights.T, -1, 1)
  dataset = load(pixels, channels=1, crop=10, pad=1, downsample=2, resize=4,
                 flip=True)
  assert dataset.images.shape == (6, 4, 4, 1)
  np.testing.assert_allclose(dataset.images[:3, ..., 0], expected, atol=1e-5)
  np.testing.assert_allclose(
      dataset.images[3:, ..., 0], expected[:, :, ::-1], atol=1e-5)


def test_flip_appends_mirrored_copies(load):
  pixels = random_bytes(5, 3, 4, 1)
  dataset = load(pixels, np.arange(5), flip=True)
  both = np.concatenate([pixels, pixels[:, :, ::-1]])
  np.testing.assert_array_equal(dataset_lib.to_uint8(dataset.images), both)
  np.testing.assert_array_equal(dataset.labels, [*range(5), *range(5)])
  assert dataset.sha256 == load(both).sha256


def test_channels(load):
  grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  alpha = np.full_like(grey, 7)
  as_is = load(grey).images
  # Grey stays grey to the last bit.
  for pixels in (grey, np.concatenate([grey, alpha], -1)):
    np.testing.assert_array_equal(load(pixels, channels=1).images, as_is)
    np.testing.assert_array_equal(
        load(pixels, channels=3).images, np.repeat(as_is, 3, -1))
  rgba = random_bytes(2, 5, 5, 4)
  np.testing.assert_array_equal(
      load(rgba, channels=3).images, load(rgba[..., :3]).images)
  assert load(rgba).images.shape == (2, 5, 5, 4)
  luma = load(rgba, channels=1).images
  pillow = [np.asarray(Image.fromarray(image[..., :3]).convert("L"))
            for image in rgba]
  assert np.abs(127.5 * luma[..., 0] + 127.5 - pillow).max() < 1


def test_subset_by_seed(load):
  pixels, labels = random_bytes(300, 2, 2, 1), np.arange(300)
  full = load(pixels, labels)
  part = load(pixels, labels, max_images=40)
  assert len(part.images) == 40 and len(set(part.labels)) == 40
  assert list(part.labels) == sorted(part.labels)
  np.testing.assert_array_equal(part.images, full.images[part.labels])
  # A draw of all, not of the beginning: 40 of the first 60 is no chance.
  assert part.labels.min() < 60 and part.labels.max() > 240
  assert load(pixels, labels, max_images=40).sha256 == part.sha256
  other = load(pixels, labels, max_images=40, subset_seed=1)
  assert other.sha256 != part.sha256
  first = load(pixels, labels, max_images=40, subset_seed=None)
  np.testing.assert_array_equal(first.labels, np.arange(40))
  assert load(pixels, labels, max_images=300).sha256 == full.sha256
  assert load(pixels, labels, max_images=999).sha256 == full.sha256


def test_max_bytes_is_of_what_is_kept(load):
  pixels = random_bytes(10, 4, 4, 3)
  size = 4 * 4 * 4 * 3
  assert load(pixels, max_bytes=10 * size).images.nbytes == 10 * size
  assert load(pixels, max_bytes=10 * size, max_images=5,
              flip=True).images.nbytes == 10 * size
  with pytest.raises(UserError, match="max_images=9 or less"):
    load(pixels, max_bytes=10 * size - 1)


@pytest.mark.parametrize("kwargs, words", [
    (dict(resize=4), ["square", "crop='center'", "6x8"]),
    (dict(crop=7), ["crop", "7", "6x8"]),
    (dict(downsample=4), ["downsample", "6x8", "4"]),
    (dict(crop="center", downsample=16, resize=2), ["downsample", "6x6"]),
    (dict(crop="center", pad=1, downsample=3), ["8x8", "3"]),
    (dict(split="test"), ["'train'", "'test'"]),
])
def test_options_that_do_not_fit(load, kwargs, words):
  with pytest.raises(UserError) as error:
    load(random_bytes(2, 6, 8, 3), **kwargs)
  text = str(error.value)
  assert "\n" not in text
  for word in words:
    assert word in text

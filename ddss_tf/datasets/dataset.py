"""Images in memory, with what identifies them."""

import dataclasses

import numpy as np
import tensorflow as tf

from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageDataset:
  """A data set in memory.

  Attributes:
    name: the name it was loaded by.
    images: float32 [N, H, W, C] in [-1, 1].
    labels: int64 [N]; None if the data set has none.
    sha256: content hash of `images`.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray | None
  sha256: str


def as_dataset(images: "ImageDataset | np.ndarray") -> ImageDataset:
  """Makes a data set of images in memory. A data set is given back as it is.

  Args:
    images: float [N, H, W, C] in [-1, 1].

  Raises:
    UserError: the images are not floats or not of that shape, or a value is
      out of range or not finite.
  """
  if isinstance(images, ImageDataset):
    return images
  images = np.asarray(images)
  if images.ndim != 4 or not len(images) or images.dtype.kind != "f":
    raise UserError("images must be floats [N, H, W, C]. Received: "
                    f"{images.dtype} of shape {images.shape}")
  # NaN fails every comparison.
  if not np.abs(images).max() <= 1 + 1e-3:
    raise UserError("images must be finite and in [-1, 1]. Received: "
                    f"{images.min():g} to {images.max():g}")
  images = np.ascontiguousarray(images, np.float32)
  return ImageDataset(
      "images", images, None, fingerprint.arrays_sha256([images]))


def to_float(pixels: np.ndarray | tf.Tensor) -> np.ndarray | tf.Tensor:
  """Maps bytes in [0, 255] to float32 in [-1, 1]: x / 127.5 - 1, any shape."""
  if tf.is_tensor(pixels):
    return tf.cast(pixels, tf.float32) / 127.5 - 1.0
  return np.asarray(pixels).astype(np.float32) / np.float32(127.5) - 1


def to_uint8(images: np.ndarray | tf.Tensor) -> np.ndarray | tf.Tensor:
  """Maps floats in [-1, 1] to the nearest bytes; any shape.

  Values out of range are clipped. It is the inverse of `to_float`, and what
  saving images to a file does to them.
  """
  if tf.is_tensor(images):
    pixels = tf.round(127.5 * tf.cast(images, tf.float32) + 127.5)
    return tf.cast(tf.clip_by_value(pixels, 0.0, 255.0), tf.uint8)
  pixels = np.round(np.float32(127.5) * np.asarray(images, np.float32)
                    + np.float32(127.5))
  with np.errstate(invalid="ignore"):  # NaN has no byte.
    return np.clip(pixels, 0, 255).astype(np.uint8)

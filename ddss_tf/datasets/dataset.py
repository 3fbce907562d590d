"""Images in memory, with what identifies them."""

import collections
import dataclasses

import numpy as np
import tensorflow as tf

from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError, check_whole


@dataclasses.dataclass(frozen=True)
class ImageDataset:
  """A data set in memory.

  Attributes:
    name: the name it was loaded by.
    images: float32 [N, H, W, C] in [-1, 1].
    labels: int64 [N]; None if the data set has none.
    sha256: content hash of `images`, and of nothing else.
    captions: N texts, a tuple; None if the data set has none.

  Raises:
    UserError: there are not as many captions as images.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray | None
  sha256: str
  captions: tuple[str, ...] | None = None

  def __post_init__(self):
    if self.captions is not None and len(self.captions) != len(self.images):
      raise UserError(f"captions of {self.name!r} must be {len(self.images)} texts, "
                      f"one for each image. Received: {len(self.captions)}")

  def __repr__(self):
    size = " x ".join(map(str, self.images.shape[1:]))
    more = [name for name in ("labels", "captions")
            if getattr(self, name) is not None]
    return (f"ImageDataset({self.name!r}, {len(self.images)} images of {size}"
            f"{''.join(f', {name}' for name in more)}, "
            f"sha256={self.sha256[:8]})")

  def caption_counts(self) -> tuple[list[str], list[int]]:
    """The distinct captions, and how often each occurs.

    They are the `prompts` and `weights` of a `ConditionTable` whose images are
    compared with this data set: each prompt is then drawn as often as it occurs
    here.

    Returns:
      M texts in the order in which they first occur, and M whole numbers, whose
      sum is N.

    Raises:
      UserError: the data set has no captions.
    """
    if self.captions is None:
      raise UserError(f"data set {self.name!r} must have captions: a text file "
                      "beside each image, or captions.jsonl. Received: none")
    counts = collections.Counter(self.captions)
    return list(counts), list(counts.values())

  def label_counts(self, num_classes: int) -> list[int]:
    """How often each class occurs: the `label_weights` of a denoiser.

    A denoiser takes them by itself, see `Conditional.for_dataset`.

    Args:
      num_classes: the number of classes of the network, a null class included.

    Returns:
      `num_classes` whole numbers, whose sum is N. Classes without an image, such
      as the null class, have 0.

    Raises:
      UserError: the data set has no labels, or one that is no such class.
    """
    check_whole("num_classes", num_classes, 1)
    if self.labels is None:
      raise UserError(f"data set {self.name!r} must have labels. Received: none")
    low, high = self.labels.min(), self.labels.max()
    if low < 0 or high >= num_classes:
      raise UserError(f"labels of {self.name!r} must be from 0 to "
                      f"{num_classes - 1}, as there are {num_classes} classes. "
                      f"Received: {low} to {high}")
    return np.bincount(self.labels, minlength=num_classes).tolist()


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

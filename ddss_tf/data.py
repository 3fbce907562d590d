"""Images of any TFDS data set, as float32 NHWC in [-1, 1].

All knowledge of pixels as bytes is here: `to_float` and `to_uint8`.
"""

import contextlib
import dataclasses
import sys

from absl import logging
import gin
import numpy as np
import tensorflow as tf

from ddss_tf import fingerprint
from ddss_tf.errors import UserError

# Data sets that come with the package and so need no download.
EMBEDDED = ("ddss_digits",)
_READ_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class ImageDataset:
  """A data set in memory.

  Attributes:
    name: its TFDS name.
    images: float32 [N, H, W, C] in [-1, 1].
    labels: int64 [N]; None if the data set has none.
    sha256: content hash of `images`.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray | None
  sha256: str


def to_float(pixels: np.ndarray | tf.Tensor) -> np.ndarray | tf.Tensor:
  """Bytes in [0, 255] to float32 in [-1, 1]: x / 127.5 - 1, any shape."""
  if tf.is_tensor(pixels):
    return tf.cast(pixels, tf.float32) / 127.5 - 1.0
  return np.asarray(pixels).astype(np.float32) / np.float32(127.5) - 1


def to_uint8(images: np.ndarray | tf.Tensor) -> np.ndarray | tf.Tensor:
  """Floats, meant in [-1, 1], to the nearest byte, clipped; any shape.

  Inverse of `to_float`, and what saving images to a file does to them.
  """
  if tf.is_tensor(images):
    pixels = tf.round(127.5 * tf.cast(images, tf.float32) + 127.5)
    return tf.cast(tf.clip_by_value(pixels, 0.0, 255.0), tf.uint8)
  pixels = np.round(np.float32(127.5) * np.asarray(images, np.float32)
                    + np.float32(127.5))
  return np.clip(pixels, 0, 255).astype(np.uint8)


@gin.register
def load_dataset(name: str = gin.REQUIRED, split: str = "train", *,
                 pad: int = 0, downsample: int = 1, data_dir: str | None = None,
                 download: bool = False) -> ImageDataset:
  """Loads the images of a TFDS data set into memory, in reading order.

  The digits of the 16x16 models are
  `load_dataset("ddss_digits", pad=2, downsample=2)`.

  Args:
    name: TFDS name, e.g. "ddss_digits", "cifar10", "mnist:3.0.1". The data
      set needs a feature `image`, uint8, of one size; `label` is optional.
    split: TFDS split or slice of one, e.g. "train", "test[:50%]".
    pad: pixels of background (-1) added on each side, first.
    downsample: side of the blocks of pixels averaged to one, next.
    data_dir: where TFDS keeps prepared data sets; None is TFDS's own default.
    download: whether TFDS may download and prepare what is missing. The
      embedded data set is prepared at first use, without a download.

  Returns:
    Images float32 [N, (H + 2 pad) / downsample, (W + 2 pad) / downsample, C].

  Raises:
    UserError: in one line, for an unknown data set or split, one that is not
      prepared, that holds no images of the kind above or none at all, and for
      a pad or downsample that does not fit.
  """
  if not isinstance(pad, int) or pad < 0:
    raise UserError(f"pad must be a whole number >= 0. Received: {pad!r}")
  if not isinstance(downsample, int) or downsample < 1:
    raise UserError(
        f"downsample must be a whole number >= 1. Received: {downsample!r}")
  builder = _prepared_builder(name, data_dir, download)
  pixels, labels = _read(builder, name, split)
  images = to_float(pixels)
  images = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)),
                  constant_values=-1)
  n, height, width, channels = images.shape
  if height % downsample or width % downsample:
    raise UserError(
        f"downsample must divide the padded image size {height}x{width} of "
        f"{name!r}. Received: {downsample}")
  if downsample > 1:
    images = images.reshape(n, height // downsample, downsample,
                            width // downsample, downsample, channels)
    images = images.mean((2, 4))
  return ImageDataset(
      name, images, labels, fingerprint.arrays_sha256([images]))


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [repr(error)])[0][:200]


def _prepared_builder(name: str, data_dir: str | None, download: bool):
  """TFDS builder of a data set that is on disk."""
  # A second to import, which commands that read no data need not wait for.
  # pylint: disable=g-import-not-at-top,unused-import
  import tensorflow_datasets as tfds
  import ddss_tf.datasets.ddss_digits
  # pylint: enable=g-import-not-at-top,unused-import

  def find():
    try:
      return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except Exception as error:  # TFDS raises many kinds.
      raise UserError(
          "dataset must be the name of a TFDS data set, e.g. "
          f"{EMBEDDED[0]!r}. Received: {name!r}: {_first_line(error)}"
      ) from error

  builder = find()
  if builder.data_path.exists():
    return builder
  if not download and builder.name not in EMBEDDED:
    raise UserError(
        f"dataset {name!r} must be prepared first: pass download=True, or run "
        f"`tfds build {name} --data_dir={builder.data_dir_root}`. "
        f"Received: nothing at {builder.data_dir}")
  logging.info("Preparing %s in %s", name, builder.data_dir)
  try:
    # TFDS prints; the output of a command is not the place.
    with contextlib.redirect_stdout(sys.stderr):
      builder.download_and_prepare(
          download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  except Exception as error:  # Of the disk, the network or the data set.
    # Another process may have been first; then its result serves as well.
    if not builder.data_path.exists():
      raise UserError(f"dataset {name!r} could not be prepared in "
                      f"{builder.data_dir}: {_first_line(error)}") from error
  return find()


def _read(builder, name: str, split: str):
  """Pixels uint8 [N, H, W, C] and labels int64 [N] or None, in order."""
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  try:
    count = builder.info.splits[split].num_examples
  except (KeyError, ValueError, TypeError, AttributeError) as error:
    raise UserError(
        f"split of {name!r} must be, or be a slice of, one of "
        f"{', '.join(builder.info.splits)}. Received: {split!r}: "
        f"{_first_line(error)}") from error
  if not count:
    raise UserError(f"split of {name!r} must hold at least one image. "
                    f"Received: {split!r}, which is empty")
  features = builder.info.features
  if "image" not in features or features["image"].np_dtype != np.uint8:
    received = ", ".join(f"{key} {features[key].np_dtype}" for key in features)
    raise UserError(f"dataset {name!r} must have a feature 'image' of type "
                    f"uint8. Received: {received}")
  keys = [key for key in ("image", "label") if key in features]
  examples = builder.as_dataset(
      split=split,
      shuffle_files=False,
      # One file after the other: the order is then that of writing.
      read_config=tfds.ReadConfig(
          interleave_cycle_length=1, try_autocache=False))
  examples = examples.map(lambda example: {key: example[key] for key in keys})
  try:
    batches = list(tfds.as_numpy(examples.batch(_READ_BATCH)))
    pixels = np.concatenate([batch["image"] for batch in batches])
  except (tf.errors.InvalidArgumentError, ValueError) as error:
    raise UserError(f"images of {name!r} must all have one size. Received: "
                    f"{_first_line(error)}") from error
  except tf.errors.OpError as error:
    raise UserError(f"{builder.data_dir} cannot be read; remove it to prepare "
                    f"{name!r} again: {_first_line(error)}") from error
  labels = None
  if "label" in keys:
    labels = np.concatenate([batch["label"] for batch in batches])
  return pixels, labels

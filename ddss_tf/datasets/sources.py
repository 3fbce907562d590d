"""Where images come from: TFDS, a folder, an npz file, StyleGAN's TFRecords.

Each function finds the images of one place and decodes none of them. So
`ddss_tf.datasets.load` can choose among them before it spends time and memory.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import sys
import tempfile
from typing import Callable
import zipfile
import zlib

from absl import logging
import numpy as np
import tensorflow as tf

from ddss_tf import storage
from ddss_tf.datasets import captions as captions_lib
from ddss_tf.datasets import decoding
from ddss_tf.errors import UserError

# Data sets that come with the package, or beside it, and so need no download.
EMBEDDED = ("ddss_digits", "ddss_emoji")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


@dataclasses.dataclass(frozen=True)
class ImageSource:
  """Images that are found and not yet decoded.

  Attributes:
    count: number of images, at least 1.
    examples: dicts in reading order, with `image`, which `decode` takes, and,
      if the set has labels, `label`, int64 [].
    decode: maps `image` to pixels [H, W, C], uint8 or float32 in [-1, 1]; a
      function of tensors, for `tf.data.Dataset.map`.
    place: maps the position of an image to words that name it in a message.
    captions: a text for each image, in reading order; None if there are none.
    size: (H, W, C), if `decode` may also be given a batch, which is of this
      size; else None.
  """

  count: int
  examples: tf.data.Dataset
  decode: Callable[[tf.Tensor], tf.Tensor]
  place: Callable[[int], str]
  captions: tuple[str, ...] | None = None
  size: tuple[int, int, int] | None = None


def first_line(error: Exception) -> str:
  """First line of an exception's message, without TensorFlow's node names."""
  text = re.sub(r"\{\{.*?\}\}\s*|\s*\[Op:\w+\]( name:)?|"
                r"Error in user-defined function .*? with iterator: \S+: ",
                "", str(error)).strip()
  return (text.splitlines() or [repr(error)])[0][:200]


def tfds_source(name: str, split: str, data_dir: str | None,
                download: bool) -> ImageSource:
  """Images of a prepared TFDS data set, in the order they were written.

  Args:
    name: TFDS name. The features `image`, uint8, and, if there is one, `label`,
      a whole number, are read.
    split: TFDS split or slice of one.
    data_dir: where TFDS keeps prepared data sets; None is its own default.
    download: whether TFDS may download and prepare what is missing.

  Raises:
    UserError: the data set or the split is unknown, is not prepared, is empty,
      or has no uint8 feature `image`.
  """
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  builder = _prepared_builder(name, data_dir, download)
  try:
    count = builder.info.splits[split].num_examples
  except (KeyError, ValueError, TypeError, AttributeError) as error:
    raise UserError(
        f"split of {name!r} must be, or be a slice of, one of "
        f"{', '.join(builder.info.splits)}. Received: {split!r}: "
        f"{first_line(error)}") from error
  if not count:
    raise UserError(f"split of {name!r} must hold at least one image. "
                    f"Received: {split!r}, which is empty")
  features = builder.info.features
  if "image" not in features or features["image"].np_dtype != np.uint8:
    received = ", ".join(
        f"{key} {getattr(features[key], 'np_dtype', 'of many parts')}"
        for key in features)
    raise UserError(f"dataset {name!r} must have a feature 'image' of type "
                    f"uint8. Received: {received}")
  keys = ["image"]
  if ("label" in features and features["label"].shape == ()
      and np.issubdtype(features["label"].np_dtype, np.integer)):
    keys.append("label")
  examples = builder.as_dataset(
      split=split,
      shuffle_files=False,
      # TFDS gives encoded bytes, so that unwanted images are never decoded.
      decoders=tfds.decode.PartialDecoding(
          {key: True for key in keys},
          decoders={"image": tfds.decode.SkipDecoding()}),
      # Files are read one after the other, which keeps the order of writing.
      read_config=tfds.ReadConfig(
          interleave_cycle_length=1, try_autocache=False))
  shape = features["image"].shape
  return ImageSource(
      count, examples,
      lambda data: decoding.decode(data, decoding.of_bytes, shape),
      lambda i: (f"image {i} of {name!r} in {builder.data_dir} (remove that "
                 "folder to prepare the data set again)"),
      size=tuple(shape) if all(shape) else None)


def _prepared_builder(name: str, data_dir: str | None, download: bool):
  """TFDS builder of a data set that is on disk."""
  # Imported late: it takes a second, and some commands read no data.
  # pylint: disable=g-import-not-at-top,unused-import
  import tensorflow_datasets as tfds
  import ddss_tf.datasets.ddss_digits
  import ddss_tf.datasets.ddss_emoji
  # pylint: enable=g-import-not-at-top,unused-import

  def find(data_dir=data_dir):
    try:
      return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except Exception as error:  # TFDS raises many kinds.
      raise UserError(
          "dataset must be the name of a TFDS data set, e.g. "
          f"{EMBEDDED[0]!r}, or 'folder:', 'npz:' or 'tfrecords:' and a path. "
          f"Received: {name!r}: {first_line(error)}") from error

  builder = find()
  if builder.data_path.exists():
    return builder
  obstacle = _lmdb_obstacle() if builder.name == "lsun" else ""
  if obstacle:  # TFDS would meet it only after a download of tens of GiB.
    raise UserError(
        f"dataset {name!r} must be prepared first, by `tfds build {name}` "
        "where tensorflow-io loads, such as 0.37.1 beside TensorFlow 2.16: then "
        "pass its folder as data_dir: reading it takes no tensorflow-io. "
        f"Received: nothing at {builder.data_dir}, and here {obstacle}")
  if not download and builder.name not in EMBEDDED:
    raise UserError(
        f"dataset {name!r} must be prepared first: pass download=True, or run "
        f"`tfds build {name} --data_dir={builder.data_dir_root}`. "
        f"Received: nothing at {builder.data_dir}")

  def prepare(builder):
    logging.info("Preparing %s in %s", name, builder.data_dir)
    # What TFDS prints must not mix with the output of a command.
    with contextlib.redirect_stdout(sys.stderr):
      builder.download_and_prepare(
          download_config=tfds.download.DownloadConfig(try_download_gcs=False))

  try:
    prepare(builder)
  except UserError:  # The file of a world is missing.
    raise
  except Exception as error:  # A fault of the disk, the network or the data set.
    # Another process may have prepared it meanwhile, which serves as well.
    if builder.data_path.exists():
      return find()
    if data_dir is None and builder.name in EMBEDDED:
      return _prepared_elsewhere(find, prepare, builder, error)
    raise UserError(f"dataset {name!r} could not be prepared in "
                    f"{builder.data_dir}: {first_line(error)}") from error
  return find()


def _prepared_elsewhere(find, prepare, builder, error):
  """Prepares an embedded data set in a temporary folder.

  This serves where TFDS's default folder cannot be written to.
  """
  folder = os.path.join(
      tempfile.gettempdir(), f"ddss_tf-{getattr(os, 'getuid', int)()}")
  logging.warning("%s cannot be prepared in %s (%s): it is in %s", builder.name,
                  builder.data_dir, first_line(error), folder)
  elsewhere = find(folder)
  try:
    if not elsewhere.data_path.exists():
      prepare(elsewhere)
  except Exception as error:  # As above.
    if not elsewhere.data_path.exists():
      raise UserError(
          f"dataset {builder.name!r} could not be prepared in {folder}, nor in "
          f"{builder.data_dir}: {first_line(error)}") from error
  return find(folder)


def _lmdb_obstacle() -> str:
  """Why TFDS cannot read the LMDB files of LSUN here; "" if it can.

  TFDS reads them with tensorflow-io. The compiled part of that package fits one
  version of TensorFlow, and is loaded only when an operation is asked for.
  """
  # pylint: disable=g-import-not-at-top
  try:
    from tensorflow_io.python.ops import core_ops
    core_ops.io_lmdb_mapping_init  # pylint: disable=pointless-statement
  except (ImportError, NotImplementedError, AttributeError) as error:
    return first_line(error)
  return ""


def folder_source(path: str) -> ImageSource:
  """Image files of a folder, or of its class subfolders, sorted by name.

  A flat folder has no labels. With one subfolder per class, the label is the
  position of the subfolder in sorted order, and the images come class by class.
  Names that begin with a dot, and files with other suffixes, are passed over.
  Links are followed. Pillow decodes the files, see `decoding.pixels`. Captions
  lie beside the images, see `captions.read`.

  `tfds.folder_dataset.ImageFolder` does not serve here: it wants a level of
  splits above the classes, shuffles, and knows neither BMP nor WebP.

  Args:
    path: a local folder of PNG, JPEG, BMP, WebP or GIF files.

  Raises:
    UserError: the folder is missing, cannot be read or holds no images; it
      holds images at more than one level, or below its subfolders; an image
      is a link to nothing; or captions are damaged or not one for each image.
  """
  root = pathlib.Path(path).expanduser()
  if not path or not root.is_dir():
    raise UserError(
        f"folder of images must exist. Received: {path!r}, which "
        f"{'is a file' if path and root.exists() else 'is missing'}")
  # Tuples of names sort alike whether the system separates them by \ or by /.
  try:
    found = sorted(_files(root, (os.path.realpath(root),)))
  except OSError as error:
    raise UserError(f"folder {path!r} must be readable. Received: "
                    f"{first_line(error)}") from error
  files = [parts for parts in found if _suffix(parts[-1]) in IMAGE_SUFFIXES]
  if not files:
    raise UserError(
        f"folder {path!r} must hold images ({' '.join(IMAGE_SUFFIXES)}), "
        "itself or in a subfolder per class. Received: none")
  depths = {len(parts): os.path.join(*parts) for parts in reversed(files)}
  if len(depths) > 1 or max(depths) > 2:
    raise UserError(
        f"folder {path!r} must hold its images all itself, or all in a "
        "subfolder per class, and none deeper. Received: "
        f"{' and '.join(depths[depth] for depth in sorted(depths))}")
  paths = [str(root.joinpath(*parts)) for parts in files]
  # To a file system names are bytes, which need not be valid text.
  examples = {"image": [os.fsencode(path) for path in paths]}
  if 2 in depths:
    classes = sorted({parts[0] for parts in files})
    examples["label"] = np.array(
        [classes.index(parts[0]) for parts in files], np.int64)
  return ImageSource(
      len(paths), tf.data.Dataset.from_tensor_slices(examples),
      lambda file: decoding.decode(file, decoding.of_file, (None,) * 3),
      lambda i: paths[i],
      captions_lib.read(root, files, [
          parts for parts in found if _suffix(parts[-1]) == captions_lib.SUFFIX]))


def _suffix(name: str) -> str:
  return os.path.splitext(name)[1].lower()


def _files(folder: pathlib.Path, above: tuple[str, ...]):
  """Yields the image and text files below a folder, as tuples of names.

  Args:
    folder: where to look.
    above: real paths of the folders on the way to it. A link back to one of
      them is not followed.
  """
  with storage.scandir(folder) as entries:
    for entry in entries:
      if entry.name.startswith("."):
        continue
      if entry.is_dir():
        real = os.path.realpath(entry.path)
        if real not in above:
          for parts in _files(pathlib.Path(entry.path), (*above, real)):
            yield entry.name, *parts
      elif _suffix(entry.name) in (*IMAGE_SUFFIXES, captions_lib.SUFFIX):
        if (entry.is_symlink() and not storage.exists(entry.path)
            and _suffix(entry.name) in IMAGE_SUFFIXES):
          raise UserError(f"image {entry.path!r} must be a file. Received: a "
                          "link to nothing")
        if entry.is_file():  # Opening a pipe would wait for its writer.
          yield (entry.name,)


def npz_source(path: str) -> ImageSource:
  """Images of a NumPy archive, which is read into memory whole.

  Args:
    path: an .npz file with `images` [N, H, W, C], uint8 in [0, 255] or float
      in [-1, 1], and optionally `labels`, integers [N]. Nothing in it is
      unpickled, so that reading it runs no code.

  Raises:
    UserError: the file is missing, damaged or not of this form.
  """
  file = os.path.expanduser(path)
  if not storage.isfile(file):
    raise UserError(f"npz file of images must exist. Received: {path!r}, "
                    "which is missing")
  try:
    if not zipfile.is_zipfile(file):  # NumPy's message is about pickles.
      raise ValueError("a file of another kind, or the beginning of one")
    with storage.load_arrays(file) as archive:
      keys = list(archive)
      arrays = {key: archive[key] for key in ("images", "labels")
                if key in keys}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile,
          zlib.error) as error:
    raise UserError(f"{path!r} must be a whole .npz file of plain arrays. "
                    f"Received: {first_line(error)}") from error
  if "images" not in arrays:
    raise UserError(f"{path!r} must hold an array 'images'. Received: "
                    f"{', '.join(keys) or 'no array'}")
  images, labels = arrays["images"], arrays.get("labels")
  if images.ndim != 4 or not images.size:
    raise UserError(f"images of {path!r} must be an array [N, H, W, C], not "
                    f"empty. Received: shape {list(images.shape)}")
  if images.dtype != np.uint8:
    if not np.issubdtype(images.dtype, np.floating):
      raise UserError(f"images of {path!r} must be uint8, or float in [-1, 1]. "
                      f"Received: {images.dtype}")
    low, high = images.min(), images.max()
    if not (low >= -1 and high <= 1):  # In this form NaN is refused, too.
      raise UserError(f"images of {path!r}, of {images.dtype}, must be in "
                      f"[-1, 1]. Received: [{low}, {high}]")
    images = images.astype(np.float32, copy=False)
  examples = {"image": images}
  if labels is not None:
    if (labels.shape != images.shape[:1]
        or not np.issubdtype(labels.dtype, np.integer)):
      raise UserError(
          f"labels of {path!r} must be {len(images)} integers. Received: "
          f"{labels.dtype} {list(labels.shape)}")
    examples["label"] = labels.astype(np.int64)
  return ImageSource(
      len(images), tf.data.Dataset.from_tensor_slices(examples),
      lambda image: image, lambda i: f"image {i} of {path}")


def tfrecords_source(path: str) -> ImageSource:
  """Images of one TFRecord file in StyleGAN's format, without labels.

  A record holds `shape`, int64 [3], and `data`, the bytes of an image in that
  shape, channels first. StyleGAN's tool writes one file for each size: the
  images of `...-r07.tfrecords` are 2**7 = 128 pixels wide. Give the file of the
  wanted size. Source: https://github.com/NVlabs/stylegan, `dataset_tool.py`.

  Args:
    path: the file, uncompressed. It is read once only to count the images.

  Raises:
    UserError: the file is missing, damaged or empty.
  """
  file = os.path.expanduser(path)
  if not storage.isfile(file):
    received = "which is missing"
    if path and storage.isdir(file):
      inside = sorted(name for name in storage.listdir(file)
                      if name.endswith(".tfrecords"))
      received = f"a folder with {', '.join(inside) or 'none'}"
    raise UserError("a TFRecord file, the one of the wanted size, must exist. "
                    f"Received: {path!r}, {received}")
  records = tf.data.TFRecordDataset(file)
  try:
    count = int(records.reduce(np.int64(0), lambda n, _: n + 1))
  except tf.errors.OpError as error:
    raise UserError(f"{path!r} must be a whole TFRecord file. Received: "
                    f"{first_line(error)}") from error
  if not count:
    raise UserError(f"{path!r} must hold at least one image. Received: none")

  def decode(record):
    parsed = tf.io.parse_single_example(record, {
        "shape": tf.io.FixedLenFeature([3], tf.int64),
        "data": tf.io.FixedLenFeature([], tf.string)})
    pixels = tf.io.decode_raw(parsed["data"], tf.uint8)
    return tf.transpose(tf.reshape(pixels, parsed["shape"]), (1, 2, 0))

  return ImageSource(
      count, records.map(lambda record: {"image": record}), decode,
      lambda i: f"image {i} of {path}")

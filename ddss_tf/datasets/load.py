"""Images of any data set, as float32 NHWC in [-1, 1].

Finding and decoding images is in `ddss_tf.datasets.sources`, the conversion
between bytes and floats in `ddss_tf.datasets.dataset`.
"""

import gin
import numpy as np
import tensorflow as tf

from ddss_tf import bindings
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.datasets import sources
from ddss_tf.runs import fingerprint
from ddss_tf.datasets.dataset import ImageDataset
from ddss_tf.errors import UserError, check_whole

# A name that begins with one of these and ":" gives a path, not a TFDS name.
_FILES = {
    "folder": sources.folder_source,
    "npz": sources.npz_source,
    "tfrecords": sources.tfrecords_source,
}
_RESIZE_METHODS = ("bicubic", "lanczos3", "area")
_READ_BATCH = 100


@bindings.register
def load_dataset(name: str = gin.REQUIRED, split: str = "train", *,
                 channels: int | None = None,
                 crop: str | int | None = None, pad: int = 0,
                 downsample: int = 1, resize: int | None = None,
                 resize_method: str = "bicubic", flip: bool = False,
                 max_images: int | None = None, subset_seed: int | None = 0,
                 max_bytes: int = 8 * 2**30, data_dir: str | None = None,
                 download: bool = False) -> ImageDataset:
  """Loads images into memory, in reading order.

  The pixels go through channels -> crop -> pad -> downsample -> resize -> flip.
  Each is off unless asked for. The digits of the 16x16 models are
  `load_dataset("ddss_digits", pad=2, downsample=2)`; photographs of many sizes
  become one size with `crop="center", resize=64`.

  Args:
    name: a TFDS name, e.g. "ddss_digits", "ddss_emoji", "cifar10",
      "lsun/church_outdoor", "mnist:3.0.1", with a feature `image`, uint8, and
      optionally `label`; or
      "folder:PATH", with PNG, JPEG, BMP, WebP and GIF files, flat or in a
      subfolder per class, and with captions if they lie there, see
      `captions.read`; or "npz:FILE", with `images` [N, H, W, C], uint8 or
      float in [-1, 1], and optionally `labels` [N]; or "tfrecords:FILE", the
      one of StyleGAN's files that has the wanted size.
    split: TFDS split or slice of one, e.g. "train", "test[:50%]". A path has
      no splits: leave it at "train".
    channels: 1 turns colour to grey (0.299 R + 0.587 G + 0.114 B, ITU-R
      BT.601), 3 repeats grey; both drop an alpha channel. None keeps the
      channels there are, which must then be the same in all images.
    crop: "center" keeps the largest square in the middle, a whole number the
      square of that side in the middle. If the margin is odd, the smaller half
      is cut at the top and left. None keeps all.
    pad: pixels of background (-1) added on each side.
    downsample: side of the square blocks that are averaged to one pixel.
    resize: side to which `tf.image.resize(antialias=True)` scales the images,
      which must then be square. The result is clipped to [-1, 1], not rounded.
    resize_method: "bicubic", the default because it is what Pillow's BICUBIC
      computes at any ratio, except that Pillow rounds to bytes after each
      pass; "lanczos3", Pillow's LANCZOS, as StyleGAN prepared LSUN; or
      "area", the mean over the area of each new pixel.
    flip: whether all images follow a second time, mirrored left to right, with
      the same labels and captions.
    max_images: number of images kept before any flip; None keeps all.
    subset_seed: seed by which `max_images` are drawn without replacement; they
      stay in reading order. None takes the first, without reading the rest.
    max_bytes: the most bytes that the float32 images may take; the default is
      8 GiB. Hashing and feature networks need more memory besides.
    data_dir: where TFDS keeps prepared data sets; None is TFDS's own default.
    download: whether TFDS may download and prepare what is missing. The
      embedded data set is prepared at first use, without a download.

  Returns:
    Images float32 [N, S, S, C], or [N, H', W', C] if neither cropped nor
    resized, with H' = (H + 2 pad) / downsample.

  Raises:
    UserError: the data set, split, folder or file is missing, damaged, empty or
      of another kind; captions are damaged or not one for each image; the
      processed images differ in size or in their number of channels; an option
      does not fit the images; or the images need more than `max_bytes`.
  """
  check_whole("channels", channels, 1, optional=True)
  if channels not in (None, 1, 3):
    raise UserError(f"channels must be 1, 3 or None. Received: {channels!r}")
  if crop != "center":
    check_whole("crop", crop, 1, optional=True, other="'center'")
  check_whole("pad", pad, 0)
  check_whole("downsample", downsample, 1)
  check_whole("resize", resize, 1, optional=True)
  if resize_method not in _RESIZE_METHODS:
    raise UserError(f"resize_method must be one of "
                    f"{', '.join(_RESIZE_METHODS)}. "
                    f"Received: {resize_method!r}")
  check_whole("max_images", max_images, 1, optional=True)
  check_whole("subset_seed", subset_seed, 0, optional=True)
  check_whole("max_bytes", max_bytes, 1)

  kind, _, path = str(name).partition(":")
  if kind in _FILES:
    if split != "train":
      raise UserError(f"split of {name!r} must be left at 'train': only TFDS "
                      "data sets have splits; give the path of the part. "
                      f"Received: {split!r}")
    source = _FILES[kind](path)
  else:
    source = sources.tfds_source(name, split, data_dir, download)
  positions = _chosen(source.count, max_images, subset_seed)

  def process(batch):
    pixels = batch.pop("image")
    images = pixels if pixels.dtype == tf.float32 else dataset_lib.to_float(pixels)
    if channels:
      images = _to_channels(images, channels)
    images = _crop(images, crop)
    images = _pad_and_downsample(images, pad, downsample)
    if resize:
      images = tf.clip_by_value(tf.image.resize(
          images, (resize, resize), resize_method, antialias=True), -1.0, 1.0)
    return dict(batch, images=images, size=tf.shape(pixels)[1:])

  def check(size, position):
    _check_fits(size, crop, pad, downsample, resize, name,
                source.place(position))

  images, labels = _read(source, positions, process, check, name,
                         copies=2 if flip else 1, max_bytes=max_bytes)
  if flip:
    count = len(positions)
    images[count:] = images[:count, :, ::-1]
    labels = labels if labels is None else np.tile(labels, 2)
  captions = source.captions
  if captions is not None:
    captions = tuple(captions[i] for i in positions) * (2 if flip else 1)
  return ImageDataset(
      name, images, labels, fingerprint.arrays_sha256([images]), captions)


@bindings.register
def label_counts(dataset: ImageDataset = gin.REQUIRED,
                 num_classes: int = gin.REQUIRED) -> list[int]:
  """How often each class occurs in a data set, for `load_denoiser.label_weights`.

  It is for classes that are drawn as often as in another data set than the one
  that images are compared with. Of that one they are taken without it, see
  `Conditional.for_dataset`.

  Args:
    dataset: the images, with labels.
    num_classes: the number of classes of the network, a null class included.

  Returns:
    See `ImageDataset.label_counts`, which says what is raised, too.
  """
  return dataset.label_counts(num_classes)


def _chosen(count: int, max_images: int | None,
            subset_seed: int | None) -> np.ndarray:
  """Positions of the images to keep, int64, increasing."""
  if max_images is None or max_images >= count:
    return np.arange(count)
  if subset_seed is None:
    return np.arange(max_images)
  return np.sort(np.random.default_rng(subset_seed).choice(
      count, max_images, replace=False))


def _to_channels(images: tf.Tensor, channels: int) -> tf.Tensor:
  """Turns [B, H, W, 1 to 4] into [B, H, W, channels], channels 1 or 3."""
  is_grey = tf.shape(images)[-1] < 3  # The second channel is then alpha.
  rgb = tf.gather(images, tf.where(is_grey, [0, 0, 0], [0, 1, 2]), axis=-1)
  if channels == 3:
    return rgb
  luma = tf.reduce_sum(
      rgb * tf.constant([0.299, 0.587, 0.114]), -1, keepdims=True)
  return tf.where(is_grey, rgb[..., :1], luma)


def _crop(images: tf.Tensor, crop: str | int | None) -> tf.Tensor:
  """The middle square of [B, H, W, C]. A side below `crop` is not cut."""
  if crop is None:
    return images
  height, width = tf.shape(images)[1], tf.shape(images)[2]
  side = tf.minimum(height, width) if crop == "center" else crop
  top = tf.maximum((height - side) // 2, 0)
  left = tf.maximum((width - side) // 2, 0)
  return images[:, top:top + side, left:left + side]


def _pad_and_downsample(images: tf.Tensor, pad: int,
                        downsample: int) -> tf.Tensor:
  """Adds a border of -1 to [B, H, W, C], then takes means of square blocks."""
  images = tf.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)),
                  constant_values=-1.0)
  if downsample == 1:
    return images
  height = tf.shape(images)[1] // downsample
  width = tf.shape(images)[2] // downsample
  channels = tf.shape(images)[3]
  blocks = tf.reshape(
      images[:, :height * downsample, :width * downsample],
      (-1, height, downsample, width, downsample, channels))
  # The order of the sums decides the rounding, and so the hashes of data sets.
  return tf.reduce_sum(tf.reduce_sum(blocks, 4), 2) / downsample**2


def _check_fits(size, crop, pad, downsample, resize, name, place):
  """Refuses options that do not fit an image of size [H, W, C]."""
  height, width, _ = (int(n) for n in size)
  if crop == "center":
    height = width = min(height, width)
  elif crop is not None:
    if crop > min(height, width):
      raise UserError(f"crop must fit into the images of {name!r}. Received: "
                      f"{crop}, and {height}x{width} in {place}")
    height = width = crop
  height, width = height + 2 * pad, width + 2 * pad
  if height % downsample or width % downsample:
    raise UserError(
        f"downsample must divide the padded image size {height}x{width} of "
        f"{name!r}. Received: {downsample}")
  if resize and height != width:
    raise UserError("resize needs square images, which crop='center' makes. "
                    f"Received: {height}x{width} in {place}")


def _read(source: sources.ImageSource, positions: np.ndarray, process, check,
          name: str, *, copies: int, max_bytes: int):
  """Reads and processes the chosen images, and reads their labels.

  Args:
    source: the images to choose from.
    positions: int [N], the positions of the chosen ones, increasing.
    process: maps a batch of examples with `image`, pixels [B, H, W, C], to
      one with `images`, float32 [B, H', W', C'], and `size`, (H, W, C).
    check: takes a size (H, W, C) and a position; raises a `UserError` if the
      options do not fit an image of that size.
    name: the name of the data set.
    copies: how many images to make room for per image read.
    max_bytes: the most bytes that this room may take.

  Returns:
    Images float32 [copies N, H', W', C'], of which the first N are filled,
    and labels int64 [N] or None.
  """
  examples = source.examples
  if len(positions) < source.count:
    chosen = tf.constant(np.isin(np.arange(source.count), positions))
    examples = examples.enumerate().filter(lambda i, _: chosen[i]).map(
        lambda _, example: example).take(len(positions))

  def decode(example):
    return dict(example, image=source.decode(example["image"]))

  if source.size:
    examples = examples.batch(_READ_BATCH)
  examples = examples.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
  # Images of different sizes cannot be batched before they are processed.
  size = source.size or examples.element_spec["image"].shape
  one_size = None not in tuple(size)
  if one_size:
    check(size, positions[0])
  if not source.size:
    examples = examples.batch(_READ_BATCH if one_size else 1)
  examples = examples.map(
      process, num_parallel_calls=tf.data.AUTOTUNE).prefetch(1)

  images, labels, count = None, [], 0
  try:
    for batch in examples.as_numpy_iterator():
      if count == len(positions):
        break
      check(batch["size"], positions[count])
      shape = batch["images"].shape[1:]
      if images is None:
        _check_room(name, len(positions), copies, shape, max_bytes)
        images = np.empty((copies * len(positions), *shape), np.float32)
      if shape != images.shape[1:]:
        raise UserError(
            f"images of {name!r} must all have one size and number of "
            "channels, or be given one by crop, resize and channels. Received: "
            f"{_size_text(images.shape[1:])}, and {_size_text(shape)} in "
            f"{source.place(positions[count])}")
      end = count + len(batch["images"])
      images[count:end] = batch["images"]
      labels.append(batch.get("label"))
      count = end
  except tf.errors.OpError as error:
    place = source.place(positions[min(count, len(positions) - 1)])
    raise UserError(
        f"{place}{', or one soon after it,' if one_size else ''} cannot be "
        f"read: {sources.first_line(error)}") from error
  if count < len(positions):
    raise UserError(f"{name!r} must hold {source.count} images. Received: "
                    f"an end after {count} of {len(positions)} to be read")
  labels = (
      None if labels[0] is None else np.concatenate(labels).astype(np.int64))
  return images, labels


def _check_room(name: str, count: int, copies: int, shape, max_bytes: int):
  """Refuses `copies` times `count` float32 images [H, W, C] above the limit."""
  each = 4 * copies * int(np.prod(shape))
  if count * each <= max_bytes:
    return
  remedy = "a larger max_bytes"
  if each <= max_bytes:
    remedy = f"max_images={max_bytes // each} or less, or {remedy}"
  raise UserError(
      f"images of {name!r} must fit into max_bytes={max_bytes}. Received: "
      f"{copies * count} images of {_size_text(shape)}, {count * each} bytes "
      f"({count * each / 2**30:.3g} GiB) as float32; pass {remedy}")


def _size_text(shape) -> str:
  return "x".join(str(n) for n in shape)

"""Image files as Pillow reads them.

TensorFlow's own decoders are not used. Its JPEG decoder differs from Pillow's,
by up to 18 of 255. Its WebP decoder writes past its buffer on an animated file,
which ends the process.
"""

import io
import os
import warnings

import numpy as np
from PIL import Image
from PIL import ImageOps
import tensorflow as tf

# The decoders that a file may reach, whatever its name. Pillow's others are
# seldom used, so their faults are seldom found and mended.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# Pillow's modes that images are decoded to, with their numbers of channels.
_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
_GREY_WITH_ALPHA = ("La", "LA")
_COLOUR_WITH_ALPHA = ("PA", "RGBA", "RGBa")


def of_file(path: bytes) -> np.ndarray:
  """`pixels` of a file."""
  return pixels(os.fsdecode(path))


def of_bytes(data: bytes) -> np.ndarray:
  """`pixels` of an encoded image in memory."""
  return pixels(io.BytesIO(data))


def pixels(file) -> np.ndarray:
  """Decodes one image.

  Grey files give 1 channel, colour files 3, and transparency adds one. Black
  and white counts as grey. Pillow turns a palette, CMYK, YCbCr, LAB and HSV
  into RGB. Grey values of 16 bits are rounded to 8. The rotation in the EXIF
  data is applied. An animation gives its first frame.

  Args:
    file: a path, or a file object.

  Returns:
    uint8 [H, W, C], C from 1 to 4.

  Raises:
    ValueError: the file cannot be read, has an unknown format, or has more
      pixels than `Image.MAX_IMAGE_PIXELS`. The message is one line.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      with Image.open(file, formats=FORMATS) as image:
        return _as_array(ImageOps.exif_transpose(image))
  except Exception as error:  # Pillow raises many kinds for damaged files.
    words = " ".join(str(error).split())
    raise ValueError(f"{type(error).__name__}: {words}") from error


def _as_array(image: Image.Image) -> np.ndarray:
  """The pixels of an open image, uint8 [H, W, C]."""
  if image.mode.startswith("I"):  # I;16, I;16B, and I of older Pillows.
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
      raise ValueError("grey values must have 16 bits. Received: "
                       f"{values.min()} to {values.max()}")
    return ((values + 128) // 257).astype(np.uint8)[..., None]
  transparent = "transparency" in image.info
  if image.mode in _GREY_WITH_ALPHA or (
      image.mode in ("1", "L") and transparent):
    mode = "LA"
  elif image.mode in ("1", "L"):
    mode = "L"
  elif image.mode in _COLOUR_WITH_ALPHA or transparent:
    mode = "RGBA"
  else:
    mode = "RGB"
  array = np.asarray(image if image.mode == mode else image.convert(mode))
  return array.reshape(*array.shape[:2], _CHANNELS[mode])


def decode(data: tf.Tensor, read, shape) -> tf.Tensor:
  """Decodes one image, or a batch of one size, in a `tf.data.Dataset.map`.

  Args:
    data: string [] or [B], what `read` takes.
    read: `of_file` or `of_bytes`.
    shape: (H, W, C) of the images, None where it is not known. If C is 3, a
      grey image is repeated to 3 channels.

  Returns:
    uint8 [H, W, C] or [B, H, W, C]. If a file cannot be read, TensorFlow raises
    an error with the message of `pixels`.
  """
  channels = shape[-1]

  def one(data):
    image = read(data)
    if channels == 3 and image.shape[-1] == 1:
      image = np.repeat(image, 3, axis=-1)
    if any(size not in (None, 0, got) for size, got in zip(shape, image.shape)):
      raise ValueError(f"an image must have the shape {tuple(shape)}. "
                       f"Received: {image.shape}")
    return image

  # A call into Python takes longer than the decoding of a small image.
  many = data.shape.rank == 1
  decoded = tf.numpy_function(
      lambda data: np.stack([one(each) for each in data]) if many else one(data),
      [data], tf.uint8, stateful=False)
  return tf.ensure_shape(
      decoded, [*data.shape, *(size or None for size in shape)])

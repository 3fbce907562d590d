"""Image files as Pillow reads them.

TensorFlow's own decoders are not used: its JPEG differs from Pillow's, by up to
18 of 255, and its WebP writes past its buffer on an animated file, which ends
the process.
"""

import io
import os
import warnings

import numpy as np
from PIL import Image
from PIL import ImageOps
import tensorflow as tf

# Decoders that a file may reach, whatever its name. Others are seldom used, and
# so seldom attacked and mended.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# Modes of Pillow that are kept, by the channels that they have.
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

  Grey files have 1 channel, colour ones 3, and one more where there is
  transparency. Black and white is grey; a palette, CMYK, YCbCr, LAB and HSV
  are turned into RGB by Pillow. 16 bits of grey become the nearest of 8. The
  rotation that EXIF tells is applied. Of a film the first frame counts.

  Args:
    file: a path, or a file object.

  Returns:
    uint8 [H, W, C], C from 1 to 4.

  Raises:
    ValueError: in one line, a file that cannot be read: whatever Pillow raises
      of it, an unknown format, or more pixels than `Image.MAX_IMAGE_PIXELS`.
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
  """The pixels of an image that is open, uint8 [H, W, C]."""
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
  """Decodes inside of a `tf.data.Dataset.map`.

  Args:
    data: string [], what `read` takes.
    read: `of_file` or `of_bytes`.
    shape: (H, W, C) of the images, as far as it is known. Grey is repeated
      where 3 channels are.

  Returns:
    uint8 [H, W, C]. A file that cannot be read is an error of TensorFlow, with
    the words of `pixels`.
  """
  channels = shape[-1]

  def call(data):
    image = read(data)
    if channels == 3 and image.shape[-1] == 1:
      image = np.repeat(image, 3, axis=-1)
    if any(size not in (None, 0, got) for size, got in zip(shape, image.shape)):
      raise ValueError(f"an image must have the shape {tuple(shape)}. "
                       f"Received: {image.shape}")
    return image

  decoded = tf.numpy_function(call, [data], tf.uint8, stateful=False)
  return tf.ensure_shape(decoded, [size or None for size in shape])

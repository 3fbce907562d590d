"""From images in [-1, 1] to what a classifier was trained on.

Which pixels a network sees decides its FID as much as its weights do (Parmar et
al. 2022, https://arxiv.org/abs/2104.11222), so every rule has a name.
"""

import dataclasses

import tensorflow as tf

from ddss_tf.errors import UserError

# ImageNet's means and standard deviations in RGB, of [0, 255] and of [0, 1].
_CAFFE_MEAN = (123.68, 116.779, 103.939)
_TORCH_MEAN = (0.485, 0.456, 0.406)
_TORCH_STD = (0.229, 0.224, 0.225)

# What a protocol calls each. With half-pixel centres output pixel i of `out`
# lies at the input coordinate (i + 1/2) in / out - 1/2. With the corners of
# TensorFlow 1 it lies at i in / out; its Inception scores were computed so.
RESIZES = {
    "none": "no resize",
    "bilinear": "bilinear, half-pixel centres, no antialias",
    "bilinear_antialias": "bilinear, half-pixel centres, antialias",
    "bilinear_tf1": "bilinear, TensorFlow 1 corners, no antialias",
}

VALUE_RANGES = {
    "[-1, 1]": lambda x: x,
    "[0, 1]": lambda x: 0.5 * x + 0.5,
    "[0, 255]": lambda x: 127.5 * x + 127.5,
    # BGR less ImageNet's means, as Caffe's networks want it.
    "caffe": lambda x: (
        127.5 * x + 127.5 - tf.constant(_CAFFE_MEAN))[..., ::-1],
    # RGB, standardised, as Torch's networks want it.
    "torch": lambda x: ((0.5 * x + 0.5 - tf.constant(_TORCH_MEAN))
                        / tf.constant(_TORCH_STD)),
}
# The ranges that have a number for each of three colours.
_OF_COLOURS = ("caffe", "torch")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What is done to images before a feature network; differentiable.

  The order is: one channel to three, one resize, the range of values.

  Attributes:
    resize: one of `RESIZES`.
    size: (height, width) of the resized images; None only with "none".
    value_range: one of `VALUE_RANGES`.
    grey_to_rgb: whether an image of one channel is repeated to three.

  Raises:
    UserError: an unknown rule, or a size that does not fit the resize.
  """

  resize: str = "none"
  size: tuple[int, int] | None = None
  value_range: str = "[-1, 1]"
  grey_to_rgb: bool = False

  def __post_init__(self):
    for name, known in (("resize", RESIZES), ("value_range", VALUE_RANGES)):
      if getattr(self, name) not in known:
        raise UserError(f"{name} of features must be one of "
                        f"{', '.join(map(repr, known))}. "
                        f"Received: {getattr(self, name)!r}")
    if (self.size is None) != (self.resize == "none") or (
        self.size is not None and min(self.size) < 1):
      raise UserError("features must have a positive size to resize to, and "
                      f"none without a resize. Received: {self.size} with "
                      f"{self.resize!r}")

  def __str__(self):
    """The rules in words: equal texts are equal preprocessings."""
    parts = [RESIZES[self.resize]]
    if self.size is not None:
      parts.append("{}x{}".format(*self.size))
    if self.grey_to_rgb:
      parts.append("1 channel repeated to 3")
    return ", ".join([*parts, self.value_range])

  def output_shape(self, image_shape) -> tuple:
    """(H, W, C) of what comes out for images (H, W, C); None for unknown."""
    height, width, channels = image_shape
    if self.size is not None:
      height, width = self.size
    if self.grey_to_rgb and channels == 1:
      channels = 3
    return height, width, channels

  def takes_channels(self, channels: int | None) -> bool:
    """Whether images of so many channels can be mapped; None is any number."""
    return (self.value_range not in _OF_COLOURS or channels in (3, None)
            or self.grey_to_rgb and channels == 1)

  def __call__(self, images: tf.Tensor) -> tf.Tensor:
    """Maps float32 [B, H, W, C] in [-1, 1] to [B, *output_shape]."""
    if self.grey_to_rgb and images.shape[-1] == 1:
      images = tf.repeat(images, 3, axis=-1)
    if self.resize == "bilinear_tf1":
      images = tf.compat.v1.image.resize_bilinear(images, self.size)
    elif self.resize != "none":
      images = tf.image.resize(
          images, self.size, "bilinear",
          antialias=self.resize == "bilinear_antialias")
    return VALUE_RANGES[self.value_range](images)

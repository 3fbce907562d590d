"""EfficientNet-Lite0, a classifier of ImageNet that is small and made for speed.

Tan and Le (2019, https://arxiv.org/abs/1905.11946) describe the network, Google's
EfficientNet-Lite (https://github.com/tensorflow/tpu, models/official/efficientnet,
lite) its simpler form: no squeeze and excitation, ReLU6 for swish, and a stem and a
head of fixed width.
"""

import keras
from keras import layers

# Of each stage: blocks, kernel, stride of the first block, factor by which a block
# widens its input, channels.
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
_STEM, _HEAD = 32, 1280


def build_lite0(num_classes: int = 1000) -> keras.Model:
  """Builds the network as it is used after training.

  Its convolutions have biases instead of batch normalisations, which a reader folds
  into them: in inference both are the same.

  Args:
    num_classes: the number of classes.

  Returns:
    A model from images [B, H, W, 3], standardised RGB of any size, to logits
    [B, num_classes]. Its layer "pool" gives the mean of the last feature map over
    all places, [B, 1280].
  """
  images = keras.Input((None, None, 3), name="images")
  x = _convolution(_STEM, 3, "stem", strides=2)(images)
  number, width = 0, _STEM
  for count, kernel, stride, factor, channels in _STAGES:
    for position in range(count):
      name, entry = f"block_{number}", x
      strides = stride if position == 0 else 1
      if factor > 1:
        x = _convolution(factor * width, 1, f"{name}_expand")(x)
      x = layers.DepthwiseConv2D(
          kernel, strides, "same", activation="relu6", name=f"{name}_depthwise")(x)
      x = _convolution(channels, 1, f"{name}_project", activation=None)(x)
      if strides == 1 and width == channels:
        x = layers.Add(name=f"{name}_sum")([x, entry])
      number, width = number + 1, channels
  x = _convolution(_HEAD, 1, "head")(x)
  x = layers.GlobalAveragePooling2D(name="pool")(x)
  return keras.Model(images, layers.Dense(num_classes, name="logits")(x),
                     name="efficientnet_lite0")


def _convolution(channels, kernel, name, strides=1, activation="relu6"):
  return layers.Conv2D(
      channels, kernel, strides, "same", activation=activation, name=name)

"""Layers of the U-Nets: embeddings of times and labels, residual blocks, attention."""

import math

import keras
from keras import ops

from ddss_tf.networks import group_norm

# GELU is the exact one, as in PyTorch; Keras approximates by default.
_ACTIVATIONS = {
    "silu": ops.silu,
    "mish": lambda x: x * ops.tanh(ops.softplus(x)),
    "gelu": lambda x: ops.gelu(x, approximate=False),
    "relu": ops.relu,
}
ACTIVATIONS = tuple(_ACTIVATIONS)


@keras.saving.register_keras_serializable(package="ddss_tf")
class TimeEmbedding(keras.layers.Layer):
  """Sinusoidal features of a float time; differentiable in it.

  Args:
    dim: even number of features.
    sin_first: [sin, cos] if True, [cos, sin] otherwise.
    frequency_shift: see `UNetConfig`.

  Call arguments:
    t: float [B], in the units the network was trained with.

  Returns:
    float [B, dim] in [-1, 1].

  Reference: Ho et al. (2020), https://arxiv.org/abs/2006.11239, appendix B.
  """

  def __init__(self, dim, sin_first=True, frequency_shift=1.0, **kwargs):
    # Times reach 1000 and more: bfloat16 would merge neighbouring steps.
    kwargs.setdefault("dtype", "float32")
    super().__init__(**kwargs)
    self.dim = dim
    self.sin_first = sin_first
    self.frequency_shift = frequency_shift

  def call(self, t):
    half = self.dim // 2
    rate = -math.log(10000.0) / (half - self.frequency_shift)
    frequencies = ops.exp(rate * ops.arange(half, dtype="float32"))
    angles = ops.cast(t, "float32")[:, None] * frequencies[None, :]
    parts = [ops.sin(angles), ops.cos(angles)]
    return ops.concatenate(parts if self.sin_first else parts[::-1], axis=-1)

  def compute_output_shape(self, input_shape):
    return (input_shape[0], self.dim)

  def get_config(self):
    return {
        **super().get_config(),
        "dim": self.dim,
        "sin_first": self.sin_first,
        "frequency_shift": self.frequency_shift,
    }


@keras.saving.register_keras_serializable(package="ddss_tf")
class ResidualBlock(keras.layers.Layer):
  """norm, activation, conv, time, norm, activation, conv, plus a shortcut.

  Args:
    channels: channels of the output.
    norm_groups: groups of both normalisations.
    norm_epsilon: their epsilon.
    scale_shift: see `UNetConfig`.
    activation: one of `ACTIVATIONS`.
    resample: "down" halves height and width by averages, "up" doubles them by
      repetition, on both branches before their convolutions; None: neither.
    divisor: a divisor of the sum of both branches.
    timed: whether the block is told the time; the decoder of an autoencoder,
      which knows none, has blocks without.

  Call arguments:
    x: float [B, H, W, C].
    time_features: float [B, E]; left out if not `timed`.

  Returns:
    float [B, H, W, channels], or with half or twice the height and width.

  Reference for `resample`: Dhariwal and Nichol (2021),
  https://arxiv.org/abs/2105.05233, section 3.
  """

  def __init__(self, channels, norm_groups, norm_epsilon, scale_shift=False,
               activation="silu", resample=None, divisor=1.0, timed=True,
               **kwargs):
    super().__init__(**kwargs)
    self.channels = channels
    self.norm_groups = norm_groups
    self.norm_epsilon = norm_epsilon
    self.scale_shift = scale_shift
    self.activation = activation
    self.resample = resample
    self.divisor = divisor
    self.timed = timed
    norm = dict(groups=norm_groups, epsilon=norm_epsilon)
    self.norm1 = group_norm.GroupNormalization(**norm, name="norm1")
    self.conv1 = keras.layers.Conv2D(channels, 3, padding="same", name="conv1")
    if timed:
      self.time_projection = keras.layers.Dense(
          channels * (2 if scale_shift else 1), name="time_projection")
    self.norm2 = group_norm.GroupNormalization(**norm, name="norm2")
    self.conv2 = keras.layers.Conv2D(channels, 3, padding="same", name="conv2")
    self.shortcut = None

  def build(self, x_shape, time_features_shape=None):
    out_shape = self.compute_output_shape(x_shape, time_features_shape)
    self.norm1.build(x_shape)
    self.conv1.build(x_shape)
    if self.timed:
      self.time_projection.build(time_features_shape)
    self.norm2.build(out_shape)
    self.conv2.build(out_shape)
    if x_shape[-1] != self.channels:
      self.shortcut = keras.layers.Conv2D(self.channels, 1, name="shortcut")
      self.shortcut.build(x_shape)
    self.built = True

  def _resampled(self, x):
    if self.resample == "down":
      return ops.average_pool(x, 2, strides=2)
    if self.resample == "up":
      return ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2)
    return x

  def call(self, x, time_features=None):
    act = _ACTIVATIONS[self.activation]
    h = self.conv1(self._resampled(act(self.norm1(x))))
    x = self._resampled(x)
    h = self.conv2(act(self._timed(h, act, time_features)))
    h = h + (x if self.shortcut is None else self.shortcut(x))
    return h if self.divisor == 1 else h / self.divisor

  def _timed(self, h, act, time_features):
    """The second normalisation, which the time enters before or after."""
    if not self.timed:
      return self.norm2(h)
    time = self.time_projection(act(time_features))[:, None, None, :]
    if not self.scale_shift:
      return self.norm2(h + time)
    scale, shift = ops.split(time, 2, axis=-1)
    return self.norm2(h) * (1.0 + scale) + shift

  def compute_output_shape(self, x_shape, time_features_shape=None):
    del time_features_shape
    batch, height, width, _ = x_shape
    if self.resample == "down":
      height, width = height // 2, width // 2
    elif self.resample == "up":
      height, width = 2 * height, 2 * width
    return (batch, height, width, self.channels)

  def get_config(self):
    return {
        **super().get_config(),
        "channels": self.channels,
        "norm_groups": self.norm_groups,
        "norm_epsilon": self.norm_epsilon,
        "scale_shift": self.scale_shift,
        "activation": self.activation,
        "resample": self.resample,
        "divisor": self.divisor,
        # Left out where it was always so, which changes no hash.
        **({} if self.timed else {"timed": False}),
    }


@keras.saving.register_keras_serializable(package="ddss_tf")
class SelfAttention(keras.layers.Layer):
  """Self-attention over the pixels, with a residual.

  Args:
    norm_groups: groups of the normalisation; None: no normalisation.
    norm_epsilon: its epsilon.
    head_channels: channels of one head; None: a single head.
    divisor: a divisor of the sum of attention and residual.

  Call arguments:
    x: float [B, H, W, C].

  Returns:
    float [B, H, W, C].
  """

  def __init__(self, norm_groups, norm_epsilon, head_channels=None, divisor=1.0,
               **kwargs):
    super().__init__(**kwargs)
    self.norm_groups = norm_groups
    self.norm_epsilon = norm_epsilon
    self.head_channels = head_channels
    self.divisor = divisor

  def build(self, x_shape):
    width = x_shape[-1]
    self.norm = None
    if self.norm_groups is not None:
      self.norm = group_norm.GroupNormalization(
          groups=self.norm_groups, epsilon=self.norm_epsilon, name="norm")
      self.norm.build(x_shape)
    for name in ("query", "key", "value", "output_projection"):
      dense = keras.layers.Dense(width, name=name)
      dense.build(x_shape)
      setattr(self, name, dense)
    self.built = True

  def call(self, x):
    _, height, width, channels = x.shape
    head = self.head_channels or channels
    heads = channels // head
    h = x if self.norm is None else self.norm(x)
    query, key, value = (
        ops.reshape(dense(h), (-1, height * width, heads, head))
        for dense in (self.query, self.key, self.value))
    h = ops.dot_product_attention(query, key, value)
    h = ops.reshape(h, (-1, height, width, channels))
    h = x + self.output_projection(h)
    return h if self.divisor == 1 else h / self.divisor

  def compute_output_shape(self, x_shape):
    return x_shape

  def get_config(self):
    return {
        **super().get_config(),
        "norm_groups": self.norm_groups,
        "norm_epsilon": self.norm_epsilon,
        "head_channels": self.head_channels,
        "divisor": self.divisor,
    }


@keras.saving.register_keras_serializable(package="ddss_tf")
class Activation(keras.layers.Layer):
  """One of `ACTIVATIONS`, number by number.

  `keras.layers.Activation` approximates "gelu".
  """

  def __init__(self, activation, **kwargs):
    super().__init__(**kwargs)
    self.activation = activation

  def call(self, x):
    return _ACTIVATIONS[self.activation](x)

  def compute_output_shape(self, x_shape):
    return x_shape

  def get_config(self):
    return {**super().get_config(), "activation": self.activation}


def image_output(h, channels: int, norm_groups: int, norm_epsilon: float,
                 activation: str = "silu", kernel_size: int = 3):
  """The last layers of a convolutional network: `norm_out` to `conv_out`.

  What leaves them is float32 whatever the policy: a sampling chain multiplies a
  prediction by up to 1 / sqrt(abar_T).

  Args:
    h: float [B, H, W, C].
    channels: channels of the result.
    norm_groups: groups of the normalisation.
    norm_epsilon: its epsilon.
    activation: one of `ACTIVATIONS`.
    kernel_size: odd height and width of the convolution.

  Returns:
    float32 [B, H, W, channels].
  """
  h = group_norm.GroupNormalization(
      groups=norm_groups, epsilon=norm_epsilon, name="norm_out")(h)
  if activation == "silu":
    h = keras.layers.Activation("silu", name="silu_out")(h)
  else:
    h = Activation(activation, name=f"{activation}_out")(h)
  return keras.layers.Conv2D(channels, kernel_size, padding="same",
                             dtype="float32", name="conv_out")(h)


def check_sizes(sizes, most) -> None:
  """Refuses sizes that no network has, before memory is taken for them.

  Args:
    sizes: by name, whole numbers, tuples of them, or None, which always passes.
    most: by name, the largest that passes.

  Raises:
    ValueError: a number is out of [1, most], or a tuple is empty.
  """
  for key, value in sizes.items():
    values = value if isinstance(value, tuple) else (value,)
    if not values or any(size is not None and not 1 <= size <= most[key]
                         for size in values):
      raise ValueError(f"{key} must be from 1 to {most[key]}. "
                       f"Received: {value}")


@keras.saving.register_keras_serializable(package="ddss_tf")
class OneHot(keras.layers.Layer):
  """Class indices, int [B], to `scale` or 0, float [B, classes].

  An index outside of [0, classes) gives zeros only.
  """

  def __init__(self, classes, scale=1.0, **kwargs):
    super().__init__(**kwargs)
    self.classes = classes
    self.scale = scale

  def call(self, labels):
    return self.scale * ops.one_hot(
        labels, self.classes, dtype=self.compute_dtype)

  def compute_output_shape(self, labels_shape):
    return (*labels_shape, self.classes)

  def get_config(self):
    return {**super().get_config(), "classes": self.classes,
            "scale": self.scale}

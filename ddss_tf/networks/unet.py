"""The DDPM U-Net as a Keras functional model, backend-agnostic (`keras.ops`).

One architecture with switches, covering the networks of Ho et al. (2020,
https://arxiv.org/abs/2006.11239, appendix B) and its descendants as far as
`UNetConfig` goes. Images are NHWC; the time is a float, one per image, because
a learned sampler asks for fractional times.
"""

import dataclasses
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
LABEL_EMBEDDINGS = ("table", "sinusoidal")
# More is a slip, or of a damaged file, and would fill the memory.
_MOST = {"channels": 2**13, "blocks_per_level": 64, "in_channels": 2**13,
         "out_channels": 2**13, "time_features": 2**13, "time_width": 2**13,
         "num_classes": 2**16}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """Everything that fixes the architecture and its arithmetic.

  Attributes:
    image_size: height and width in pixels, or the pair of them, multiples of
      2 ** (len(channels) - 1).
    in_channels: channels of `x_t`.
    out_channels: channels of the prediction.
    channels: width of each resolution level, finest first.
    blocks_per_level: residual blocks of a level on the way down; the way up
      has one more.
    attention_levels: indices into `channels` of the levels with attention. The
      middle has attention always unless `mid_attention` is False.
    head_channels: channels of one attention head; None: a single head, or
      `num_heads`.
    num_heads: heads of every attention layer, whatever its width; None: as
      `head_channels` says.
    num_heads_up: heads of the attention layers on the way up, if not
      `num_heads`.
    norm_groups: groups of every group normalisation.
    norm_epsilon: its epsilon (1e-6 in the TensorFlow original, 1e-5 in the
      PyTorch descendants; Keras's own default of 1e-3 is wrong for both).
    sin_first: time embedding is [sin, cos] if True, [cos, sin] if False.
    frequency_shift: frequencies are 10000 ** (-i / (half - frequency_shift)).
    symmetric_downsample: the strided convolution pads one pixel on all sides
      (PyTorch's padding=1) if True, bottom and right only (TensorFlow's SAME)
      if False. Weights of one give wrong images in the other.
    residual_down_levels: levels left by a residual block that averages 2x2
      pixels instead of the strided convolution.
    residual_up_levels: levels left, on the way up, by a residual block that
      repeats pixels instead of repetition and a convolution.
    scale_shift: the time enters as h * (1 + scale) + shift after the second
      normalisation if True, as an addition before it if False.
    activation: of the residual blocks, one of `ACTIVATIONS`; "silu" everywhere
      else.
    time_scale: the embedded time is `t` times this; networks of any T may be
      trained on times from 0 to 1000.
    time_features: sines and cosines of the time; None: `channels[0]`.
    time_width: width of the time embedding; None: 4 * `channels[0]`.
    num_classes: classes of a class-conditional network, whose third input are
      labels in [0, num_classes - 1]; None: unconditional.
    label_embedding: "table", a learned vector of each class; or "sinusoidal",
      the label embedded as the time is. Either is added to the time embedding.
    center_input: whether the network computes 2 x - 1 first.
    mid_attention: whether the middle has an attention layer.
    mid_attention_norm: whether that layer normalises its input.
    mid_attention_groups: groups of that normalisation; None: `norm_groups`.
    mid_divisor: outputs of the middle's layers, residual included, are divided
      by it.
  """

  image_size: int | tuple[int, int]
  in_channels: int
  out_channels: int
  channels: tuple[int, ...]
  blocks_per_level: int
  attention_levels: tuple[int, ...] = ()
  head_channels: int | None = None
  num_heads: int | None = None
  num_heads_up: int | None = None
  norm_groups: int = 32
  norm_epsilon: float = 1e-6
  sin_first: bool = True
  frequency_shift: float = 1.0
  symmetric_downsample: bool = False
  residual_down_levels: tuple[int, ...] = ()
  residual_up_levels: tuple[int, ...] = ()
  scale_shift: bool = False
  activation: str = "silu"
  time_scale: float = 1.0
  time_features: int | None = None
  time_width: int | None = None
  num_classes: int | None = None
  label_embedding: str = "table"
  center_input: bool = False
  mid_attention: bool = True
  mid_attention_norm: bool = True
  mid_attention_groups: int | None = None
  mid_divisor: float = 1.0


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
    divisor: of the sum of both branches.

  Call arguments:
    x: float [B, H, W, C].
    time_features: float [B, E].

  Returns:
    float [B, H, W, channels], or of half or twice the height and width.

  Reference: of `resample`, Dhariwal and Nichol (2021),
  https://arxiv.org/abs/2105.05233, section 3.
  """

  def __init__(self, channels, norm_groups, norm_epsilon, scale_shift=False,
               activation="silu", resample=None, divisor=1.0, **kwargs):
    super().__init__(**kwargs)
    self.channels = channels
    self.norm_groups = norm_groups
    self.norm_epsilon = norm_epsilon
    self.scale_shift = scale_shift
    self.activation = activation
    self.resample = resample
    self.divisor = divisor
    norm = dict(groups=norm_groups, epsilon=norm_epsilon)
    self.norm1 = group_norm.GroupNormalization(**norm, name="norm1")
    self.conv1 = keras.layers.Conv2D(channels, 3, padding="same", name="conv1")
    self.time_projection = keras.layers.Dense(
        channels * (2 if scale_shift else 1), name="time_projection")
    self.norm2 = group_norm.GroupNormalization(**norm, name="norm2")
    self.conv2 = keras.layers.Conv2D(channels, 3, padding="same", name="conv2")
    self.shortcut = None

  def build(self, x_shape, time_features_shape):
    out_shape = self.compute_output_shape(x_shape, time_features_shape)
    self.norm1.build(x_shape)
    self.conv1.build(x_shape)
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

  def call(self, x, time_features):
    act = _ACTIVATIONS[self.activation]
    h = self.conv1(self._resampled(act(self.norm1(x))))
    x = self._resampled(x)
    time = self.time_projection(act(time_features))[:, None, None, :]
    if self.scale_shift:
      scale, shift = ops.split(time, 2, axis=-1)
      h = self.norm2(h) * (1.0 + scale) + shift
    else:
      h = self.norm2(h + time)
    h = self.conv2(act(h))
    h = h + (x if self.shortcut is None else self.shortcut(x))
    return h if self.divisor == 1 else h / self.divisor

  def compute_output_shape(self, x_shape, time_features_shape):
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
    }


@keras.saving.register_keras_serializable(package="ddss_tf")
class SelfAttention(keras.layers.Layer):
  """Self-attention over the pixels, with a residual.

  Args:
    norm_groups: groups of the normalisation; None: no normalisation.
    norm_epsilon: its epsilon.
    head_channels: channels of one head; None: a single head.
    divisor: of the sum of attention and residual.

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


def check_sizes(sizes, most) -> None:
  """Refuses sizes that no network has, before memory is asked for them.

  Args:
    sizes: whole numbers, tuples of them, or None for any, by name.
    most: the largest of each.

  Raises:
    ValueError: a number out of [1, most], or none in a tuple.
  """
  for key, value in sizes.items():
    values = value if isinstance(value, tuple) else (value,)
    if not values or any(size is not None and not 1 <= size <= most[key]
                         for size in values):
      raise ValueError(f"{key} must be from 1 to {most[key]}. "
                       f"Received: {value}")


def build_unet(config: UNetConfig, name: str = "unet") -> keras.Model:
  """Builds the network `[x_t, t] -> prediction`, with random weights.

  A class-conditional one is `[x_t, t, labels] -> prediction`.

  Layers carry the names of their place (`down_1_block_0`, `mid_attention`,
  `up_2_upsample`, ...), where the number after `up_` counts from the coarsest
  level, in order of execution.

  Args:
    config: the architecture.
    name: name of the model.

  Returns:
    A functional model from `x_t`, float [B, H, W, in_channels] in [-1, 1],
    `t`, float [B], and `labels`, int32 [B], if there are classes, to float
    [B, H, W, out_channels].

  Raises:
    ValueError: the image size does not divide, or groups do not divide widths,
      or heads do not, or they are given twice; an unknown activation or label
      embedding; a size that no network has.
  """
  for key, known in (("activation", ACTIVATIONS),
                     ("label_embedding", LABEL_EMBEDDINGS)):
    if getattr(config, key) not in known:
      raise ValueError(f"{key} must be one of {', '.join(known)}. "
                       f"Received: {getattr(config, key)!r}")
  if None not in (config.num_heads, config.head_channels):
    raise ValueError(
        "num_heads and head_channels must not both be given. Received: "
        f"{config.num_heads} and {config.head_channels}")
  check_sizes({key: getattr(config, key) for key in _MOST}, _MOST)
  levels = len(config.channels)
  factor = 2 ** (levels - 1)
  size = config.image_size
  size = (size, size) if isinstance(size, int) else tuple(size)
  if len(size) != 2 or any(side < 1 or side % factor for side in size):
    raise ValueError(
        f"image_size must be a multiple of {factor} for {levels} levels, or "
        "height and width that are. "
        f"Received: image_size={config.image_size}")
  base = config.channels[0]
  norm = dict(norm_groups=config.norm_groups, norm_epsilon=config.norm_epsilon)
  time_width = config.time_width or 4 * base

  x = keras.Input((*size, config.in_channels), name="x_t")
  t = keras.Input((), name="t")
  inputs = [x, t]
  scaled = t
  if config.time_scale != 1:
    # In float32 for the reason of TimeEmbedding.
    scaled = keras.layers.Rescaling(
        config.time_scale, dtype="float32", name="time_scale")(t)

  def embedded(value, place):
    value = TimeEmbedding(
        config.time_features or base, config.sin_first, config.frequency_shift,
        name=f"{place}_embedding")(value)
    value = keras.layers.Dense(
        time_width, activation="silu", name=f"{place}_1")(value)
    return keras.layers.Dense(time_width, name=f"{place}_2")(value)

  time = embedded(scaled, "time")
  if config.num_classes is not None:
    labels = keras.Input((), dtype="int32", name="labels")
    inputs.append(labels)
    if config.label_embedding == "table":
      label = keras.layers.Embedding(
          config.num_classes, time_width, name="label_embedding")(labels)
    else:
      label = embedded(labels, "label")
    time = keras.layers.Add(name="time_and_label")([time, label])

  def block(h, width, place, **options):
    return ResidualBlock(
        width, **norm, scale_shift=config.scale_shift,
        activation=config.activation, name=place, **options)(h, time)

  def attention(h, place, num_heads=config.num_heads,
                norm_groups=config.norm_groups, **options):
    width, head_channels = h.shape[-1], config.head_channels
    if num_heads is not None:
      if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"num_heads must divide the {width} channels of {place}. "
            f"Received: num_heads={num_heads}")
      head_channels = width // num_heads
    elif head_channels is not None and (
        head_channels < 1 or width % head_channels):
      raise ValueError(
          f"head_channels must divide the {width} channels of {place}. "
          f"Received: head_channels={head_channels}")
    return SelfAttention(norm_groups, config.norm_epsilon, head_channels,
                         name=place, **options)(h)

  if config.center_input:
    x = keras.layers.Rescaling(2.0, -1.0, name="center_input")(x)
  h = keras.layers.Conv2D(base, 3, padding="same", name="conv_in")(x)
  skips = [h]
  for level, width in enumerate(config.channels):
    for i in range(config.blocks_per_level):
      h = block(h, width, f"down_{level}_block_{i}")
      if level in config.attention_levels:
        h = attention(h, f"down_{level}_attention_{i}")
      skips.append(h)
    if level < levels - 1 and level in config.residual_down_levels:
      h = block(h, width, f"down_{level}_downsample", resample="down")
      skips.append(h)
    elif level < levels - 1:
      padding = "same"
      if config.symmetric_downsample:
        h = keras.layers.ZeroPadding2D(1, name=f"down_{level}_pad")(h)
        padding = "valid"
      h = keras.layers.Conv2D(width, 3, strides=2, padding=padding,
                              name=f"down_{level}_downsample")(h)
      skips.append(h)

  mid = dict(divisor=config.mid_divisor)
  h = block(h, config.channels[-1], "mid_block_0", **mid)
  if config.mid_attention:
    groups = config.mid_attention_groups or config.norm_groups
    h = attention(
        h, "mid_attention", **mid,
        norm_groups=groups if config.mid_attention_norm else None)
  h = block(h, config.channels[-1], "mid_block_1", **mid)

  num_heads_up = config.num_heads_up or config.num_heads
  for up, level in enumerate(reversed(range(levels))):
    for i in range(config.blocks_per_level + 1):
      h = keras.layers.Concatenate(name=f"up_{up}_skip_{i}")([h, skips.pop()])
      h = block(h, config.channels[level], f"up_{up}_block_{i}")
      if level in config.attention_levels:
        h = attention(h, f"up_{up}_attention_{i}", num_heads_up)
    if level > 0 and level in config.residual_up_levels:
      h = block(h, config.channels[level], f"up_{up}_upsample", resample="up")
    elif level > 0:
      h = keras.layers.UpSampling2D(2, name=f"up_{up}_repeat")(h)
      h = keras.layers.Conv2D(config.channels[level], 3, padding="same",
                              name=f"up_{up}_upsample")(h)

  h = group_norm.GroupNormalization(
      groups=config.norm_groups, epsilon=config.norm_epsilon,
      name="norm_out")(h)
  h = keras.layers.Activation("silu", name="silu_out")(h)
  # The prediction leaves in float32 whatever the policy: the coefficients of
  # the chain multiply it by up to 1 / sqrt(abar_T).
  h = keras.layers.Conv2D(config.out_channels, 3, padding="same",
                          dtype="float32", name="conv_out")(h)
  return keras.Model(inputs, h, name=name)


@keras.saving.register_keras_serializable(package="ddss_tf")
class OneHot(keras.layers.Layer):
  """Class indices, int [B], to float [B, classes]; zeros for those outside."""

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

"""The DDPM U-Net as a Keras functional model, backend-agnostic (`keras.ops`).

One architecture with switches covers the network of Ho et al. (2020,
https://arxiv.org/abs/2006.11239, appendix B) and its descendants as far as
`UNetConfig` goes. Images are NHWC. The time is a float, one per image, because
a learned sampler asks for fractional times.
"""

import dataclasses

import keras

from ddss_tf.networks import layers
from ddss_tf.networks.layers import ResidualBlock, SelfAttention, TimeEmbedding

LABEL_EMBEDDINGS = ("table", "sinusoidal")
# A larger size is a mistake or from a damaged file, and would fill the memory.
_MOST = {"channels": 2**13, "blocks_per_level": 64, "in_channels": 2**13,
         "out_channels": 2**13, "time_features": 2**13, "time_width": 2**13,
         "num_classes": 2**16}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """Everything that fixes the architecture and its arithmetic.

  Attributes:
    image_size: height and width in pixels, as one number or as a pair;
      multiples of 2 ** (len(channels) - 1).
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
    residual_down_levels: levels that end, on the way down, with a residual
      block that averages 2x2 pixels, instead of the strided convolution.
    residual_up_levels: levels that end, on the way up, with a residual block
      that repeats pixels, instead of repetition and a convolution.
    scale_shift: the time enters as h * (1 + scale) + shift after the second
      normalisation if True, as an addition before it if False.
    activation: the activation of the residual blocks, one of `ACTIVATIONS`;
      "silu" everywhere else.
    time_scale: the embedded time is `t` times this. A network of any T may have
      been trained on times from 0 to 1000.
    time_features: number of sines and cosines of the time, together; None:
      `channels[0]`.
    time_width: width of the time embedding; None: 4 * `channels[0]`.
    num_classes: classes of a class-conditional network, whose third input is
      labels in [0, num_classes - 1]; None: unconditional.
    label_embedding: "table", a learned vector for each class; or "sinusoidal",
      the label embedded as the time is. Either is added to the time embedding.
    center_input: whether the network first maps its input x to 2 x - 1.
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
    A functional model to float [B, H, W, out_channels]. Its inputs are `x_t`,
    float [B, H, W, in_channels], noisy images whose clean ones are in [-1, 1];
    `t`, float [B]; and, if there are classes, `labels`, int32 [B].

  Raises:
    ValueError: the image size is not such a multiple; groups or heads do not
      divide a width; both `num_heads` and `head_channels` are given; the
      activation or the label embedding is unknown; a size is below 1, or larger
      than any network has.
  """
  height, width = _checked(config)
  x = keras.Input((height, width, config.in_channels), name="x_t")
  t = keras.Input((), name="t")
  inputs = [x, t]
  if config.num_classes is not None:
    inputs.append(keras.Input((), dtype="int32", name="labels"))
  parts = _Parts(config, _embedding(config, *inputs[1:]))
  if config.center_input:
    x = keras.layers.Rescaling(2.0, -1.0, name="center_input")(x)
  h = keras.layers.Conv2D(
      config.channels[0], 3, padding="same", name="conv_in")(x)
  h = layers.image_output(
      parts.up(parts.middle(parts.down(h))), config.out_channels,
      config.norm_groups, config.norm_epsilon)
  return keras.Model(inputs, h, name=name)


def _checked(config: UNetConfig) -> tuple[int, int]:
  """Height and width of the images; raises what `build_unet` raises."""
  for key, known in (("activation", layers.ACTIVATIONS),
                     ("label_embedding", LABEL_EMBEDDINGS)):
    if getattr(config, key) not in known:
      raise ValueError(f"{key} must be one of {', '.join(known)}. "
                       f"Received: {getattr(config, key)!r}")
  if None not in (config.num_heads, config.head_channels):
    raise ValueError(
        "num_heads and head_channels must not both be given. Received: "
        f"{config.num_heads} and {config.head_channels}")
  layers.check_sizes({key: getattr(config, key) for key in _MOST}, _MOST)
  levels = len(config.channels)
  factor = 2 ** (levels - 1)
  size = config.image_size
  size = (size, size) if isinstance(size, int) else tuple(size)
  if len(size) != 2 or any(side < 1 or side % factor for side in size):
    raise ValueError(
        f"image_size must be a multiple of {factor} for {levels} levels, or "
        "height and width that are. "
        f"Received: image_size={config.image_size}")
  return size


def _embedding(config: UNetConfig, t, labels=None):
  """The embedding of times, and of labels if there are classes."""
  base = config.channels[0]
  time_width = config.time_width or 4 * base

  def embedded(value, place):
    value = TimeEmbedding(
        config.time_features or base, config.sin_first, config.frequency_shift,
        name=f"{place}_embedding")(value)
    value = keras.layers.Dense(
        time_width, activation="silu", name=f"{place}_1")(value)
    return keras.layers.Dense(time_width, name=f"{place}_2")(value)

  if config.time_scale != 1:
    # In float32 for the same reason as in TimeEmbedding.
    t = keras.layers.Rescaling(
        config.time_scale, dtype="float32", name="time_scale")(t)
  time = embedded(t, "time")
  if labels is None:
    return time
  if config.label_embedding == "table":
    label = keras.layers.Embedding(
        config.num_classes, time_width, name="label_embedding")(labels)
  else:
    label = embedded(labels, "label")
  return keras.layers.Add(name="time_and_label")([time, label])


class _Parts:
  """The three parts of a U-Net, built around one embedding of the time."""

  def __init__(self, config: UNetConfig, time):
    self._config, self._time = config, time
    self._skips = []

  def _block(self, h, width, place, **options):
    config = self._config
    return ResidualBlock(
        width, norm_groups=config.norm_groups,
        norm_epsilon=config.norm_epsilon, scale_shift=config.scale_shift,
        activation=config.activation, name=place, **options)(h, self._time)

  def _attention(self, h, place, num_heads, norm_groups, **options):
    width, head_channels = h.shape[-1], self._config.head_channels
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
    return SelfAttention(norm_groups, self._config.norm_epsilon, head_channels,
                         name=place, **options)(h)

  def down(self, h):
    """From the images' resolution to the coarsest."""
    config, skips = self._config, self._skips
    skips.append(h)
    for level, width in enumerate(config.channels):
      for i in range(config.blocks_per_level):
        h = self._block(h, width, f"down_{level}_block_{i}")
        if level in config.attention_levels:
          h = self._attention(h, f"down_{level}_attention_{i}",
                              config.num_heads, config.norm_groups)
        skips.append(h)
      if level < len(config.channels) - 1:
        h = self._halved(h, level, width)
        skips.append(h)
    return h

  def _halved(self, h, level, width):
    if level in self._config.residual_down_levels:
      return self._block(h, width, f"down_{level}_downsample", resample="down")
    padding = "same"
    if self._config.symmetric_downsample:
      h = keras.layers.ZeroPadding2D(1, name=f"down_{level}_pad")(h)
      padding = "valid"
    return keras.layers.Conv2D(width, 3, strides=2, padding=padding,
                               name=f"down_{level}_downsample")(h)

  def middle(self, h):
    """At the coarsest resolution."""
    config, width = self._config, self._config.channels[-1]
    mid = dict(divisor=config.mid_divisor)
    h = self._block(h, width, "mid_block_0", **mid)
    if config.mid_attention:
      groups = config.mid_attention_groups or config.norm_groups
      h = self._attention(
          h, "mid_attention", config.num_heads,
          groups if config.mid_attention_norm else None, **mid)
    return self._block(h, width, "mid_block_1", **mid)

  def up(self, h):
    """Back to the images' resolution, with what was kept on the way down."""
    config = self._config
    num_heads = config.num_heads_up or config.num_heads
    for up, level in enumerate(reversed(range(len(config.channels)))):
      for i in range(config.blocks_per_level + 1):
        h = keras.layers.Concatenate(name=f"up_{up}_skip_{i}")(
            [h, self._skips.pop()])
        h = self._block(h, config.channels[level], f"up_{up}_block_{i}")
        if level in config.attention_levels:
          h = self._attention(h, f"up_{up}_attention_{i}", num_heads,
                              config.norm_groups)
      if level > 0:
        h = self._doubled(h, up, level)
    return h

  def _doubled(self, h, up, level):
    width = self._config.channels[level]
    if level in self._config.residual_up_levels:
      return self._block(h, width, f"up_{up}_upsample", resample="up")
    h = keras.layers.UpSampling2D(2, name=f"up_{up}_repeat")(h)
    return keras.layers.Conv2D(
        width, 3, padding="same", name=f"up_{up}_upsample")(h)

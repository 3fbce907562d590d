"""The U-Net of text-to-image latent diffusion, as a Keras functional model.

Rombach et al. (2022, https://arxiv.org/abs/2112.10752); with switches for what
came after it, up to SDXL (Podell et al., 2023,
https://arxiv.org/abs/2307.01952). It is the U-Net of `unet` with transformers
in place of attention layers, which also attend to a context: the tokens of a
text. Latents are NHWC, of any height and width. The time is a float, one for
each latent, because a learned sampler asks for fractional times.
"""

import dataclasses

import keras

from ddss_tf.networks import layers
from ddss_tf.networks.condition_layers import ContextTransformer
from ddss_tf.networks.condition_layers import NearestResize, SizesEmbedding
from ddss_tf.networks.layers import Activation, ResidualBlock, TimeEmbedding

# What stands in the middle: two residual blocks around a transformer, one
# residual block, or nothing.
MIDDLES = ("attention", "block", "none")
# See `layers.check_sizes`.
_MOST = {"image_size": 2**13, "in_channels": 2**13, "out_channels": 2**13,
         "channels": 2**13, "blocks_per_level": 2**6, "context_width": 2**16,
         "context_tokens": 2**16, "norm_groups": 2**13, "time_width": 2**16,
         "kernel_in": 2**6, "kernel_out": 2**6, "pooled_width": 2**16,
         "num_sizes": 2**6, "size_features": 2**13}
_MOST_TRANSFORMER_BLOCKS = 2**6


@dataclasses.dataclass(frozen=True)
class ConditionUNetConfig:
  """Everything that fixes the architecture and its arithmetic.

  Attributes:
    image_size: height and width of `x_t`, as one number or as a pair.
    in_channels: channels of `x_t`.
    out_channels: channels of the prediction.
    channels: width of each resolution level, finest first.
    blocks_per_level: residual blocks of each level on the way down, finest
      first; the way up has one more.
    down_transformers: for each level, finest first, the number of blocks of
      the transformer behind each of its residual blocks on the way down; () for
      a level without transformers.
    up_transformers: likewise on the way up, in order of execution: coarsest
      first.
    num_heads: heads of every attention layer of each level, finest first; the
      middle has those of the coarsest.
    context_width: channels of the context.
    context_tokens: its number of tokens; None: any number.
    only_context_levels: indices into `channels` of the levels whose attention
      layers all attend to the context, none to the pixels.
    middle: one of `MIDDLES`.
    mid_transformer: the number of blocks of the middle's transformer.
    mid_divisor: outputs of the middle's residual blocks are divided by it.
    norm_groups: groups of every group normalisation.
    norm_epsilon: its epsilon, but for those before transformers: 1e-6.
    sin_first: see `UNetConfig`.
    frequency_shift: see `UNetConfig`.
    symmetric_downsample: see `UNetConfig`.
    scale_shift: see `UNetConfig`.
    activation: one of `layers.ACTIVATIONS`; transformers have their own.
    time_width: see `UNetConfig`.
    time_activation: activation of the embedded time, before the pooled text and
      the sizes are added; None: none.
    embedding_activation: activation of the sum of all these; None: none.
    center_input: whether the network first maps its input x to 2 x - 1.
    kernel_in: odd height and width of the first convolution.
    kernel_out: of the last one.
    pooled_width: channels of a second condition, "pooled", one vector for a
      text; None: neither this nor sizes.
    num_sizes: the number of sizes of a third condition, "time_ids".
    size_features: sines and cosines of one size, together.
  """

  image_size: int | tuple[int, int]
  in_channels: int
  out_channels: int
  channels: tuple[int, ...]
  blocks_per_level: tuple[int, ...]
  down_transformers: tuple[tuple[int, ...], ...]
  up_transformers: tuple[tuple[int, ...], ...]
  num_heads: tuple[int, ...]
  context_width: int
  context_tokens: int | None = None
  only_context_levels: tuple[int, ...] = ()
  middle: str = "attention"
  mid_transformer: int = 1
  mid_divisor: float = 1.0
  norm_groups: int = 32
  norm_epsilon: float = 1e-5
  sin_first: bool = False
  frequency_shift: float = 0.0
  symmetric_downsample: bool = True
  scale_shift: bool = False
  activation: str = "silu"
  time_width: int | None = None
  time_activation: str | None = None
  embedding_activation: str | None = None
  center_input: bool = False
  kernel_in: int = 3
  kernel_out: int = 3
  pooled_width: int | None = None
  num_sizes: int = 6
  size_features: int = 256

  @property
  def conditions(self) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
    """Names and shapes, without the batch, of the inputs after x_t and t.

    "context" is the text, token by token. "pooled", if there is one, is the
    whole text; and "time_ids" has heights and widths in pixels: of the original
    image, of the corner where it was cropped, and of the image asked for.
    """
    context = ("context", (self.context_tokens, self.context_width))
    if self.pooled_width is None:
      return (context,)
    return (context, ("pooled", (self.pooled_width,)),
            ("time_ids", (self.num_sizes,)))


def build_condition_unet(config: ConditionUNetConfig,
                         name: str = "condition_unet") -> keras.Model:
  """Builds the network `[x_t, t, *conditions] -> prediction`, random weights.

  Layers carry the names of their place (`down_1_block_0`, `mid_attention`,
  `up_2_upsample`, ...), where the number after `up_` counts from the coarsest
  level, in order of execution.

  Args:
    config: the architecture.
    name: name of the model.

  Returns:
    A functional model to float [B, H, W, out_channels]. Its inputs are `x_t`,
    float [B, H, W, in_channels]; `t`, float [B], in the units the network was
    trained with; and float [B, ...] as `config.conditions` says.

  Raises:
    ValueError: the fields that have an entry for each level, or for each block,
      have another number of them; groups or heads do not divide a width; a
      level is smaller than a pixel; the number of sines and cosines is not
      even, or too low for the frequency shift; a kernel is even; the middle or
      an activation is unknown; a size is below 1, or larger than any network
      has.
  """
  height, width = _checked(config)
  x = keras.Input((height, width, config.in_channels), name="x_t")
  t = keras.Input((), name="t")
  conditions = [keras.Input(shape, name=key)
                for key, shape in config.conditions]
  parts = _Parts(config, _embedding(config, t, *conditions[1:]), conditions[0])
  h = x
  if config.center_input:
    h = keras.layers.Rescaling(2.0, -1.0, name="center_input")(h)
  h = keras.layers.Conv2D(config.channels[0], config.kernel_in, padding="same",
                          name="conv_in")(h)
  h = layers.image_output(
      parts.up(parts.middle(parts.down(h))), config.out_channels,
      config.norm_groups, config.norm_epsilon, config.activation,
      config.kernel_out)
  return keras.Model([x, t, *conditions], h, name=name)


def _checked(config: ConditionUNetConfig) -> tuple[int, int]:
  """Height and width of `x_t`; raises what `build_condition_unet` raises."""
  layers.check_sizes({key: getattr(config, key) for key in _MOST}, _MOST)
  for key in ("activation", "time_activation", "embedding_activation"):
    value = getattr(config, key)
    if value not in layers.ACTIVATIONS and (
        value is not None or key == "activation"):
      raise ValueError(f"{key} must be one of {', '.join(layers.ACTIVATIONS)}. "
                       f"Received: {value!r}")
  if config.middle not in MIDDLES:
    raise ValueError(f"middle must be one of {', '.join(MIDDLES)}. "
                     f"Received: {config.middle!r}")
  _check_levels(config)
  # As many sines and cosines of the time as the finest level has channels.
  for key, count in (("channels[0]", config.channels[0]),
                     ("size_features", config.size_features)):
    if count % 2 or count // 2 <= config.frequency_shift:
      raise ValueError(f"{key} must be even and more than twice "
                       f"frequency_shift, {config.frequency_shift}. "
                       f"Received: {count}")
  for key in ("kernel_in", "kernel_out"):
    if not getattr(config, key) % 2:
      raise ValueError(f"{key} must be odd. Received: {getattr(config, key)}")
  size = config.image_size
  size = (size, size) if isinstance(size, int) else tuple(size)
  # A level rounds up with padding on both sides, and down without.
  least = 1 if config.symmetric_downsample else 2 ** (len(config.channels) - 1)
  if len(size) != 2 or any(side < least for side in size):
    raise ValueError(
        f"image_size must be {least} or more, or height and width that are. "
        f"Received: {config.image_size}")
  return size


def _check_levels(config: ConditionUNetConfig) -> None:
  """Checks the fields that have an entry for each level."""
  levels = len(config.channels)
  for key in ("blocks_per_level", "down_transformers", "up_transformers",
              "num_heads"):
    if len(getattr(config, key)) != levels:
      raise ValueError(f"{key} must have {levels} entries, one for each level. "
                       f"Received: {getattr(config, key)}")
  for key, counts in (
      ("down_transformers", config.blocks_per_level),
      ("up_transformers", [n + 1 for n in config.blocks_per_level[::-1]])):
    for depths, count in zip(getattr(config, key), counts, strict=True):
      if len(depths) not in (0, count):
        raise ValueError(f"{key} must have {count} entries, one for each "
                         f"residual block of a level. Received: {depths}")
      _check_transformers(key, depths)
  _check_transformers("mid_transformer", (config.mid_transformer,))
  outside = [n for n in config.only_context_levels if not 0 <= n < levels]
  if outside:
    raise ValueError(f"only_context_levels must be from 0 to {levels - 1}. "
                     f"Received: {config.only_context_levels}")


def _check_transformers(key, depths) -> None:
  if not all(0 <= depth <= _MOST_TRANSFORMER_BLOCKS for depth in depths):
    raise ValueError(f"{key} must be from 0 to {_MOST_TRANSFORMER_BLOCKS}. "
                     f"Received: {depths}")


def _embedding(config: ConditionUNetConfig, t, pooled=None, sizes=None):
  """The embedding of times, and of pooled text and sizes if there are any."""
  width = config.time_width or 4 * config.channels[0]
  waves = dict(sin_first=config.sin_first,
               frequency_shift=config.frequency_shift)
  h = TimeEmbedding(config.channels[0], **waves, name="time_embedding")(t)
  h = keras.layers.Dense(width, name="time_1")(h)
  h = Activation(config.activation, name="time_activation")(h)
  h = keras.layers.Dense(width, name="time_2")(h)
  if config.time_activation is not None:
    h = Activation(config.time_activation, name="time_2_activation")(h)
  if pooled is not None:
    sizes = SizesEmbedding(
        config.size_features, **waves, name="sizes_embedding")(sizes)
    added = keras.layers.Concatenate(name="pooled_and_sizes")([pooled, sizes])
    added = keras.layers.Dense(width, activation="silu", name="added_1")(added)
    added = keras.layers.Dense(width, name="added_2")(added)
    h = keras.layers.Add(name="time_and_added")([h, added])
  if config.embedding_activation is not None:
    h = Activation(config.embedding_activation,
                   name="embedding_activation")(h)
  return h


class _Parts:
  """The three parts of the network, around one embedding and one context."""

  def __init__(self, config: ConditionUNetConfig, time, context):
    self._config, self._time, self._context = config, time, context
    self._skips = []

  def _block(self, h, width, place, **options):
    config = self._config
    if h.shape[-1] % config.norm_groups or width % config.norm_groups:
      raise ValueError(
          f"norm_groups must divide the {h.shape[-1]} channels before {place} "
          f"and the {width} behind. Received: {config.norm_groups}")
    return ResidualBlock(
        width, norm_groups=config.norm_groups,
        norm_epsilon=config.norm_epsilon, scale_shift=config.scale_shift,
        activation=config.activation, name=place, **options)(h, self._time)

  def _transformer(self, h, level, num_blocks, place, only_context):
    num_heads, width = self._config.num_heads[level], h.shape[-1]
    if num_heads < 1 or width % num_heads:
      raise ValueError(f"num_heads must divide the {width} channels of {place}. "
                       f"Received: {num_heads}")
    return ContextTransformer(
        num_blocks, num_heads, self._config.norm_groups, only_context,
        name=place)(h, self._context)

  def _pair(self, h, level, depths, side, i):
    """A residual block of a level and, if there is one, its transformer."""
    h = self._block(h, self._config.channels[level], f"{side}_block_{i}")
    if not depths:
      return h
    return self._transformer(h, level, depths[i], f"{side}_attention_{i}",
                             level in self._config.only_context_levels)

  def down(self, h):
    """From the latents' resolution to the coarsest."""
    config, skips = self._config, self._skips
    skips.append(h)
    for level, width in enumerate(config.channels):
      for i in range(config.blocks_per_level[level]):
        h = self._pair(h, level, config.down_transformers[level],
                       f"down_{level}", i)
        skips.append(h)
      if level < len(config.channels) - 1:
        pad = 1 if config.symmetric_downsample else ((0, 1), (0, 1))
        h = keras.layers.ZeroPadding2D(pad, name=f"down_{level}_pad")(h)
        h = keras.layers.Conv2D(width, 3, strides=2,
                                name=f"down_{level}_downsample")(h)
        skips.append(h)
    return h

  def middle(self, h):
    """At the coarsest resolution."""
    config, level = self._config, len(self._config.channels) - 1
    width, mid = config.channels[-1], dict(divisor=config.mid_divisor)
    if config.middle == "none":
      return h
    h = self._block(h, width, "mid_block_0", **mid)
    if config.middle == "block":
      return h
    h = self._transformer(
        h, level, config.mid_transformer, "mid_attention", False)
    return self._block(h, width, "mid_block_1", **mid)

  def up(self, h):
    """Back to the latents' resolution, with what was kept on the way down."""
    config = self._config
    for up, level in enumerate(reversed(range(len(config.channels)))):
      for i in range(config.blocks_per_level[level] + 1):
        h = keras.layers.Concatenate(name=f"up_{up}_skip_{i}")(
            [h, self._skips.pop()])
        h = self._pair(h, level, config.up_transformers[up], f"up_{up}", i)
      if level > 0:
        h = self._enlarged(h, self._skips[-1].shape[1:3], f"up_{up}_repeat")
        h = keras.layers.Conv2D(config.channels[level], 3, padding="same",
                                name=f"up_{up}_upsample")(h)
    return h

  def _enlarged(self, h, size, place):
    if tuple(size) == (2 * h.shape[1], 2 * h.shape[2]):
      return keras.layers.UpSampling2D(2, name=place)(h)
    return NearestResize(*size, name=place)(h)

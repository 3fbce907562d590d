"""Decoders of latent diffusion as Keras functional models (`keras.ops`).

Rombach et al. (2022, https://arxiv.org/abs/2112.10752, appendix G) denoise
latents, which the decoder of an autoencoder turns into images. One architecture
with switches covers the decoders of its two kinds: KL, and VQ, where a codebook
comes first. Latents and images are NHWC. Encoders are not here, because no
sampler needs them.
"""

import dataclasses

import keras
from keras import ops

from ddss_tf.networks import layers
from ddss_tf.networks.layers import ResidualBlock, SelfAttention

# A larger size is a mistake or from a damaged file, and would fill the memory.
_MOST = {"latent_channels": 2**13, "out_channels": 2**13, "channels": 2**13,
         "layers_per_block": 64, "norm_groups": 2**13,
         "post_quant_channels": 2**13, "num_codes": 2**20}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Everything that fixes the architecture and its arithmetic.

  Attributes:
    latent_size: height and width of the latents, as one number or as a pair.
      Images are 2 ** (len(channels) - 1) times as high and as wide.
    latent_channels: channels of the latents; with a codebook, of its vectors.
    out_channels: channels of the images.
    channels: width of each resolution level, finest first.
    layers_per_block: a level has one residual block more than this.
    norm_groups: groups of every group normalisation.
    norm_epsilon: its epsilon.
    activation: the activation of the residual blocks, one of
      `layers.ACTIVATIONS`; "silu" before the last convolution.
    mid_attention: whether the middle, at the latents' resolution, has an
      attention layer, of a single head.
    post_quant_conv: whether a 1x1 convolution comes before all else but the
      codebook.
    post_quant_channels: channels of its outputs; None: `latent_channels`.
    num_codes: vectors of the codebook, the nearest of which replaces each
      latent vector; None: no codebook, as in KL.
  """

  latent_size: int | tuple[int, int]
  latent_channels: int
  out_channels: int
  channels: tuple[int, ...]
  layers_per_block: int
  norm_groups: int = 32
  norm_epsilon: float = 1e-6
  activation: str = "silu"
  mid_attention: bool = True
  post_quant_conv: bool = True
  post_quant_channels: int | None = None
  num_codes: int | None = None


def build_decoder(config: DecoderConfig,
                  name: str = "decoder") -> keras.Model:
  """Builds the network `latents -> images`, with random weights.

  Layers carry the names of their place (`codebook`, `post_quant_conv`,
  `mid_attention`, `up_2_block_0`, ...), where the number after `up_` counts
  from the coarsest level, in order of execution.

  Args:
    config: the architecture.
    name: name of the model.

  Returns:
    A functional model from `latents`, float [B, h, w, latent_channels], as the
    encoder gives them, to images, float [B, H, W, out_channels], whose usual
    values are in [-1, 1] and which are not clipped. The gradient of a codebook
    is that of the identity.

  Raises:
    ValueError: the activation is unknown; groups do not divide a width;
      `post_quant_channels` is given without that convolution; a size is below
      1, or larger than any network has.
  """
  height, width = _checked(config)
  z = keras.Input((height, width, config.latent_channels), name="latents")
  h = z
  if config.num_codes is not None:
    h = Codebook(config.num_codes, name="codebook")(h)
  if config.post_quant_conv:
    # The next convolution pads with zeros what this one gives, bias included,
    # so that the two are not one.
    h = keras.layers.Conv2D(
        config.post_quant_channels or config.latent_channels, 1,
        name="post_quant_conv")(h)
  h = keras.layers.Conv2D(
      config.channels[-1], 3, padding="same", name="conv_in")(h)
  h = layers.image_output(
      _up(config, _middle(config, h)), config.out_channels, config.norm_groups,
      config.norm_epsilon)
  return keras.Model(z, h, name=name)


def _checked(config: DecoderConfig) -> tuple[int, int]:
  """Height and width of the latents; raises what `build_decoder` raises."""
  if config.activation not in layers.ACTIVATIONS:
    raise ValueError(
        f"activation must be one of {', '.join(layers.ACTIVATIONS)}. "
        f"Received: {config.activation!r}")
  layers.check_sizes({key: getattr(config, key) for key in _MOST}, _MOST)
  if config.post_quant_channels is not None and not config.post_quant_conv:
    raise ValueError("post_quant_channels must be None without post_quant_conv."
                     f" Received: {config.post_quant_channels}")
  if any(width % config.norm_groups for width in config.channels):
    raise ValueError(f"norm_groups must divide the channels {config.channels}. "
                     f"Received: {config.norm_groups}")
  size = config.latent_size
  size = (size, size) if isinstance(size, int) else tuple(size)
  if len(size) != 2 or any(side < 1 for side in size):
    raise ValueError("latent_size must be 1 or more, or height and width that "
                     f"are. Received: {config.latent_size}")
  return size


def _block(config: DecoderConfig, h, width, place):
  return ResidualBlock(
      width, norm_groups=config.norm_groups, norm_epsilon=config.norm_epsilon,
      activation=config.activation, timed=False, name=place)(h)


def _middle(config: DecoderConfig, h):
  """At the latents' resolution."""
  width = config.channels[-1]
  h = _block(config, h, width, "mid_block_0")
  if config.mid_attention:
    h = SelfAttention(config.norm_groups, config.norm_epsilon,
                      name="mid_attention")(h)
  return _block(config, h, width, "mid_block_1")


def _up(config: DecoderConfig, h):
  """From the latents' resolution to that of the images."""
  for up, level in enumerate(reversed(range(len(config.channels)))):
    width = config.channels[level]
    for i in range(config.layers_per_block + 1):
      h = _block(config, h, width, f"up_{up}_block_{i}")
    if level > 0:
      h = keras.layers.UpSampling2D(2, name=f"up_{up}_repeat")(h)
      h = keras.layers.Conv2D(
          width, 3, padding="same", name=f"up_{up}_upsample")(h)
  return h


@keras.saving.register_keras_serializable(package="ddss_tf")
class Codebook(keras.layers.Layer):
  """Replaces every vector by the nearest of a table.

  The gradient is that of the identity ("straight through"): vectors next to
  each other in the table are not next to each other in space, so that the true
  one is zero and useless. Distances are computed in float32 at least and
  without a matrix product, which some devices round to fewer bits. They take
  4 * num_codes bytes for each vector of a batch, and a small multiple of that
  for a moment.

  Args:
    num_codes: vectors of the table.

  Call arguments:
    z: float [B, ..., C].

  Returns:
    float [B, ..., C].

  Reference: van den Oord et al. (2017), https://arxiv.org/abs/1711.00937,
  equations 1 to 3.
  """

  def __init__(self, num_codes, **kwargs):
    # Without autocast: a rounded vector may have another nearest one.
    super().__init__(autocast=False, **kwargs)
    self.num_codes = num_codes

  def build(self, z_shape):
    self.embeddings = self.add_weight(
        name="embeddings", shape=(self.num_codes, z_shape[-1]),
        initializer="uniform")
    self.built = True

  def indices(self, z):
    """Which vector of the table is the nearest; the first of equally near ones.

    Args:
      z: float [B, ..., C].

    Returns:
      int32 [B, ...] in [0, num_codes - 1].
    """
    dtype = keras.backend.result_type(z.dtype, "float32")
    z, codes = ops.cast(z, dtype), ops.cast(self.embeddings, dtype)
    distances = sum(ops.square(z[..., i, None] - codes[:, i])
                    for i in range(z.shape[-1]))
    return ops.cast(ops.argmin(distances, axis=-1), "int32")

  def call(self, z):
    # Nothing of the search is kept for a gradient that it has not.
    values = ops.stop_gradient(z)
    nearest = ops.stop_gradient(
        ops.take(self.embeddings, self.indices(values), axis=0))
    # In this order the sum is the table's vector to the last bit.
    nearest = ops.cast(nearest, z.dtype) + (z - values)
    return ops.cast(nearest, self.compute_dtype)

  def compute_output_shape(self, z_shape):
    return z_shape

  def get_config(self):
    return {**super().get_config(), "num_codes": self.num_codes}

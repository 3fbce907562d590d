"""The networks of EDM as Keras functional models (`keras.ops`).

Karras et al. (2022, https://arxiv.org/abs/2206.00364) name two. "SongUNet" is
DDPM++ and NCSN++ of Song et al. (2021, https://arxiv.org/abs/2011.13456).
"DhariwalUNet" is ADM of Dhariwal and Nichol (2021,
https://arxiv.org/abs/2105.05233). Both are U-Nets like that of `unet`, but
their blocks also resample and attend. A preconditioning by sigma surrounds
them. The model that is built here predicts eps of x_0 + sigma eps.
"""

import dataclasses

import keras

from ddss_tf.networks import edm_layers
from ddss_tf.networks.edm_layers import (
    EDMBlock, EDMInput, EDMOutput, FilteredDown, FourierEmbedding)
from ddss_tf.networks.layers import OneHot, TimeEmbedding, check_sizes

ARCHITECTURES = ("SongUNet", "DhariwalUNet")
PRECONDITIONINGS = ("EDMPrecond", "VPPrecond", "VEPrecond")

# See `layers.check_sizes`. "widths" are `model_channels` times the multipliers.
_MOST = {"image_channels": 2**13, "widths": 2**13, "num_blocks": 64,
         "classes": 2**16}
# Channels of one head of DhariwalUNet; a narrower layer has no attention.
_HEAD_CHANNELS = 64


@dataclasses.dataclass(frozen=True)
class EDMConfig:
  """Everything that fixes the network; most names are the original's.

  Attributes:
    image_size: height and width, a multiple of 2 ** (levels - 1).
    image_channels: the channels of images and predictions.
    architecture: one of `ARCHITECTURES`.
    preconditioning: one of `PRECONDITIONINGS`.
    model_channels: the width that the multipliers multiply.
    channel_mult: the factor on the width of each level, finest first.
    channel_mult_emb: width of the embedding, in units of `model_channels`.
    channel_mult_noise: width of the sinusoids, in units of `model_channels`.
    num_blocks: residual blocks of a level on the way down; the way up has one
      more.
    attn_resolutions: heights of the levels with attention.
    label_dim: number of classes; 0 for none.
    label_dropout: how often the network was trained without a class, for which
      the label `label_dim` stands; 0: never, so that there is no null label for
      guidance.
    fourier: for "SongUNet", whether the sinusoids have frequencies that are
      weights.
    residual_encoder: for "SongUNet", whether the way down adds the images
      themselves, filtered, to every level below the first.
    resample_filter: for "SongUNet", the filter of both resamplings, symmetric,
      with an even number of taps; "DhariwalUNet" has (1, 1), a box.
    sigma_data: the parameter of "EDMPrecond".
    beta_d: a parameter of "VPPrecond".
    beta_min: a parameter of "VPPrecond".
    timesteps: a parameter of "VPPrecond", called M there.
  """

  image_size: int
  image_channels: int
  architecture: str = "SongUNet"
  preconditioning: str = "EDMPrecond"
  model_channels: int = 128
  channel_mult: tuple[int, ...] = (1, 2, 2, 2)
  channel_mult_emb: int = 4
  channel_mult_noise: int = 1
  num_blocks: int = 4
  attn_resolutions: tuple[int, ...] = (16,)
  label_dim: int = 0
  label_dropout: float = 0.0
  fourier: bool = False
  residual_encoder: bool = False
  resample_filter: tuple[int, ...] = (1, 1)
  sigma_data: float = 0.5
  beta_d: float = 19.9
  beta_min: float = 0.1
  timesteps: int = 1000


def build_edm(config: EDMConfig, name: str = "edm") -> keras.Model:
  """Builds `[x, sigma] -> eps`, or `[x, sigma, labels] -> eps`.

  Layers carry the original's names ("enc_32x32_block0").

  Args:
    config: the architecture.
    name: name of the model.

  Returns:
    A functional model to eps, float [B, S, S, C]. Its inputs are `x` = x_0 +
    sigma eps, float [B, S, S, C]; `sigma`, float [B], positive; and, if there
    are classes, `labels`, int32 [B]. A label outside [0, label_dim) stands for
    no class.

  Raises:
    ValueError: a name is unknown; the image size or `model_channels` is not
      the multiple that it must be; `resample_filter` is not as described; a
      size is below 1, or larger than any network has.
  """
  _check(config)
  song = config.architecture == "SongUNet"
  ends = dict(kind=config.preconditioning, sigma_data=config.sigma_data,
              beta_d=config.beta_d, beta_min=config.beta_min,
              timesteps=config.timesteps)
  x = keras.Input((config.image_size, config.image_size,
                   config.image_channels), name="x")
  sigma = keras.Input((), name="sigma")
  inputs = [x, sigma]
  h, noise = EDMInput(**ends, name="scaled_input")(x, sigma)
  label = None
  if config.label_dim:
    labels = keras.Input((), dtype="int32", name="labels")
    inputs.append(labels)
    label = OneHot(config.label_dim, config.label_dim**0.5 if song else 1.0,
                   name="one_hot")(labels)
  parts = _Parts(config, _embedding(config, noise, label))
  h = parts.decoded(parts.encoded(h))
  h = edm_layers.group_norm_layer(h.shape[-1], parts.epsilon, "out_norm")(h)
  h = keras.layers.Activation("silu", name="out_silu")(h)
  h = keras.layers.Conv2D(config.image_channels, 3, padding="same",
                          dtype="float32", name="out_conv")(h)
  eps = EDMOutput(**ends, name="eps")(x, sigma, h)
  return keras.Model(inputs, eps, name=name)


def _check(config: EDMConfig) -> None:
  """Raises what `build_edm` raises."""
  for key, known in (("architecture", ARCHITECTURES),
                     ("preconditioning", PRECONDITIONINGS)):
    if getattr(config, key) not in known:
      raise ValueError(f"{key} must be one of {', '.join(known)}. "
                       f"Received: {getattr(config, key)!r}")
  check_sizes({
      "image_channels": config.image_channels,
      "widths": tuple(config.model_channels * multiplier for multiplier in (
          *config.channel_mult, config.channel_mult_emb,
          config.channel_mult_noise)),
      "num_blocks": config.num_blocks, "classes": config.label_dim or None,
  }, _MOST)
  levels = len(config.channel_mult)
  if not levels or config.image_size % 2 ** (levels - 1):
    raise ValueError(
        f"img_resolution must be a multiple of {2 ** max(levels - 1, 0)} for "
        f"{levels} levels. Received: {config.image_size}")
  if config.model_channels % 4:
    raise ValueError("model_channels must be a multiple of 4. "
                     f"Received: {config.model_channels}")
  taps = config.resample_filter
  if len(taps) < 2 or len(taps) % 2 or taps != taps[::-1] or not sum(taps):
    raise ValueError("resample_filter must be symmetric, of an even number of "
                     f"taps. Received: {taps}")


def _embedding(config: EDMConfig, noise, label):
  """The embedding of the noise level, and of the label if there is one."""
  song = config.architecture == "SongUNet"
  wide = config.model_channels * config.channel_mult_emb
  features = config.model_channels * (
      config.channel_mult_noise if song else 1)
  if config.fourier:
    embedding = FourierEmbedding(features, name="map_noise")(noise)
  else:
    embedding = TimeEmbedding(
        features, sin_first=song, frequency_shift=1.0 if song else 0.0,
        name="map_noise")(noise)
  if song and label is not None:
    embedding = keras.layers.Add(name="add_label")([
        embedding,
        keras.layers.Dense(embedding.shape[-1], name="map_label")(label)])
  embedding = keras.layers.Dense(
      wide, activation="silu", name="map_layer0")(embedding)
  embedding = keras.layers.Dense(wide, name="map_layer1")(embedding)
  if not song and label is not None:
    embedding = keras.layers.Add(name="add_label")([
        embedding,
        keras.layers.Dense(wide, use_bias=False, name="map_label")(label)])
  # In `unet` each block applies this activation itself.
  return keras.layers.Activation("silu", name="map_silu")(embedding)


class _Parts:
  """Encoder and decoder, built around one embedding of the noise level."""

  def __init__(self, config: EDMConfig, embedding):
    self._config, self._embedding = config, embedding
    self._song = config.architecture == "SongUNet"
    self.epsilon = 1e-6 if self._song else 1e-5
    self._options = dict(
        skip_scale=0.5**0.5, scale_shift=False, project_resampled=True,
        resample_filter=config.resample_filter) if self._song else {}
    self._resolutions = [
        config.image_size >> level
        for level in range(len(config.channel_mult))]
    self._attends = [size in config.attn_resolutions
                     for size in self._resolutions]
    self._skips = []

  def _block(self, h, width, place, resample=None, attention=False):
    heads = 0
    if attention:
      heads = 1 if self._song else width // _HEAD_CHANNELS
    return EDMBlock(width, resample, heads, epsilon=self.epsilon,
                    **self._options, name=place)(h, self._embedding)

  def encoded(self, h):
    """From the images' resolution to the coarsest."""
    config, base, skips = self._config, self._config.model_channels, self._skips
    images = h
    for level, (size, factor) in enumerate(zip(self._resolutions,
                                               config.channel_mult)):
      place = f"enc_{size}x{size}"
      if level == 0:
        h = keras.layers.Conv2D(base if self._song else base * factor, 3,
                                padding="same", name=f"{place}_conv")(h)
      else:
        h = self._block(h, h.shape[-1], f"{place}_down", "down")
        if config.residual_encoder:
          h = images = self._with_images(h, images, place)
      skips.append(h)
      for i in range(config.num_blocks):
        h = self._block(h, base * factor, f"{place}_block{i}",
                        attention=self._attends[level])
        skips.append(h)
    return h

  def _with_images(self, h, images, place):
    """Adds the images, in their size, to the states (the residual encoder)."""
    taps = self._config.resample_filter
    # Zeros are put around the images first, so that neither layer pads. Then
    # the convolution's bias may come before the filter.
    images = keras.layers.ZeroPadding2D(
        1 + (len(taps) - 1) // 2, name=f"{place}_pad")(images)
    images = keras.layers.Conv2D(
        h.shape[-1], 3, name=f"{place}_aux_residual")(images)
    images = FilteredDown(taps, name=f"{place}_filter")(images)
    images = keras.layers.Add(name=f"{place}_add")([h, images])
    return keras.layers.Rescaling(0.5**0.5, name=f"{place}_scale")(images)

  def decoded(self, h):
    """Back to the images' resolution, with what the encoder kept."""
    config, levels = self._config, len(self._resolutions)
    for level in reversed(range(levels)):
      place = f"dec_{self._resolutions[level]}x{self._resolutions[level]}"
      if level == levels - 1:
        h = self._block(h, h.shape[-1], f"{place}_in0", attention=True)
        h = self._block(h, h.shape[-1], f"{place}_in1")
      else:
        h = self._block(h, h.shape[-1], f"{place}_up", "up")
      for i in range(config.num_blocks + 1):
        h = keras.layers.Concatenate(name=f"{place}_skip{i}")(
            [h, self._skips.pop()])
        # SongUNet attends once on the way up, after the last block.
        last = i == config.num_blocks
        h = self._block(
            h, config.model_channels * config.channel_mult[level],
            f"{place}_block{i}",
            attention=self._attends[level] and (last or not self._song))
    return h

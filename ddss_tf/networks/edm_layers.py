"""Layers of EDM's networks: filtered resampling, blocks, preconditioning."""

import math

import keras
from keras import ops

from ddss_tf.networks import group_norm


def resampled(x, direction, taps, padding=None):
  """Halves or doubles both sides of images, through a filter.

  Args:
    x: float [B, H, W, C].
    direction: "down", "up" or None.
    taps: the filter along one side, symmetric, with an even number of taps;
      they are divided by their sum. (1, 1) gives means of 2x2 pixels, or each
      pixel four times.
    padding: zeros on every side before "down"; None: as many as halve H and W.

  Returns:
    float [B, H', W', C].
  """
  if direction is None:
    return x
  if padding is None:
    padding = (len(taps) - 1) // 2
  total = float(sum(taps))
  for axis in (1, 2):
    size = x.shape[axis]
    if direction == "down":
      before, after, stride = padding, padding, 2
      length = (size + 2 * padding - len(taps)) // 2 + 1
      scale = 1 / total
    else:
      # A transposed convolution: zeros between the pixels, then the filter.
      zeros = ops.zeros_like(x)
      shape = [-1, *x.shape[1:]]
      shape[axis] = 2 * size
      x = ops.reshape(ops.stack([x, zeros], axis=axis + 1), shape)
      before, after, stride = len(taps) - 1 - padding, padding, 1
      length = 2 * size
      scale = 2 / total
    pads = [(0, 0)] * 4
    pads[axis] = (before, after)
    padded = ops.pad(x, pads)
    parts = []
    for k, tap in enumerate(taps):
      window = [slice(None)] * 4
      window[axis] = slice(k, k + stride * (length - 1) + 1, stride)
      parts.append(tap * scale * padded[tuple(window)])
    x = sum(parts[1:], parts[0])
  return x


@keras.saving.register_keras_serializable(package="ddss_tf")
class FilteredDown(keras.layers.Layer):
  """`resampled` without padding, as a layer.

  Args:
    taps: the filter, see `resampled`.

  Call arguments:
    x: float [B, H, W, C].
  """

  def __init__(self, taps, **kwargs):
    super().__init__(**kwargs)
    self.taps = tuple(taps)

  def call(self, x):
    return resampled(x, "down", self.taps, padding=0)

  def get_config(self):
    return {**super().get_config(), "taps": self.taps}


@keras.saving.register_keras_serializable(package="ddss_tf")
class FourierEmbedding(keras.layers.Layer):
  """[sin, cos] of a float time at frequencies that are weights.

  Args:
    dim: even number of features.

  Call arguments:
    t: float [B].

  Returns:
    float [B, dim] in [-1, 1].

  Reference: Tancik et al. (2020), https://arxiv.org/abs/2006.10739.
  """

  def __init__(self, dim, **kwargs):
    # Angles reach hundreds: see `layers.TimeEmbedding`.
    kwargs.setdefault("dtype", "float32")
    super().__init__(**kwargs)
    self.dim = dim

  def build(self, t_shape):
    del t_shape
    self.freqs = self.add_weight(
        shape=(self.dim // 2,), initializer="random_normal", trainable=False,
        name="freqs")
    self.built = True

  def call(self, t):
    angles = t[:, None] * (2 * math.pi * self.freqs)[None, :]
    return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)

  def compute_output_shape(self, t_shape):
    return (t_shape[0], self.dim)

  def get_config(self):
    return {**super().get_config(), "dim": self.dim}


def group_norm_layer(channels, epsilon, name):
  return group_norm.GroupNormalization(
      groups=min(32, channels // 4), epsilon=epsilon, name=name)


@keras.saving.register_keras_serializable(package="ddss_tf")
class EDMBlock(keras.layers.Layer):
  """A residual block that may resample first and attend last.

  Resampling (see `resampled`) comes before the first convolution and, on the
  shortcut, before its convolution.

  Args:
    channels: channels of the output.
    resample: "down", "up" or None.
    num_heads: the number of heads of the attention; 0: none.
    epsilon: the epsilon of the normalisations.
    skip_scale: factor on both sums.
    scale_shift: the embedding enters as norm(h) * (1 + scale) + shift if True,
      as norm(h + shift) if False.
    project_resampled: whether a resampled shortcut has a convolution even if
      the width stays.
    resample_filter: see `EDMConfig`.

  Call arguments:
    x: float [B, H, W, C].
    embedding: float [B, E].

  Returns:
    float [B, H', W', channels].
  """

  def __init__(self, channels, resample=None, num_heads=0, epsilon=1e-5,
               skip_scale=1.0, scale_shift=True, project_resampled=False,
               resample_filter=(1, 1), **kwargs):
    super().__init__(**kwargs)
    self.channels = channels
    self.resample = resample
    self.num_heads = num_heads
    self.epsilon = epsilon
    self.skip_scale = skip_scale
    self.scale_shift = scale_shift
    self.project_resampled = project_resampled
    self.resample_filter = tuple(resample_filter)

  def build(self, x_shape, embedding_shape):
    width = self.channels
    inner = (*self.compute_output_shape(x_shape)[:-1], width)

    def made(layer, shape):
      layer.build(shape)
      return layer

    def conv(name, size, shape, filters=width):
      return made(keras.layers.Conv2D(
          filters, size, padding="same", name=name), shape)

    self.norm0 = made(group_norm_layer(x_shape[-1], self.epsilon, "norm0"), x_shape)
    self.conv0 = conv("conv0", 3, (*inner[:-1], x_shape[-1]))
    self.affine = made(keras.layers.Dense(
        width * (2 if self.scale_shift else 1), name="affine"),
                       embedding_shape)
    self.norm1 = made(group_norm_layer(width, self.epsilon, "norm1"), inner)
    self.conv1 = conv("conv1", 3, inner)
    self.skip = None
    if x_shape[-1] != width or (self.resample and self.project_resampled):
      self.skip = conv("skip", 1, (*inner[:-1], x_shape[-1]))
    if self.num_heads:
      self.norm2 = made(group_norm_layer(width, self.epsilon, "norm2"), inner)
      self.qkv = conv("qkv", 1, inner, 3 * width)
      self.proj = conv("proj", 1, inner)
    self.built = True

  def _resampled(self, x):
    return resampled(x, self.resample, self.resample_filter)

  def call(self, x, embedding):
    h = self.conv0(self._resampled(ops.silu(self.norm0(x))))
    shift = self.affine(embedding)[:, None, None, :]
    if self.scale_shift:
      scale, shift = ops.split(shift, 2, axis=-1)
      h = self.norm1(h) * (1.0 + scale) + shift
    else:
      h = self.norm1(h + shift)
    h = self.conv1(ops.silu(h))
    shortcut = self._resampled(x)
    if self.skip is not None:
      shortcut = self.skip(shortcut)
    h = (h + shortcut) * self.skip_scale
    if self.num_heads:
      h = (h + self.proj(self._attended(self.norm2(h)))) * self.skip_scale
    return h

  def _attended(self, h):
    _, height, width, channels = h.shape
    # Along the 3 C channels query, key and value change fastest, heads slowest.
    qkv = ops.reshape(self.qkv(h), (
        -1, height * width, self.num_heads, channels // self.num_heads, 3))
    h = ops.dot_product_attention(qkv[..., 0], qkv[..., 1], qkv[..., 2])
    return ops.reshape(h, (-1, height, width, channels))

  def compute_output_shape(self, x_shape, embedding_shape=None):
    del embedding_shape
    batch, height, width, _ = x_shape
    if self.resample == "down":
      height, width = height // 2, width // 2
    elif self.resample == "up":
      height, width = height * 2, width * 2
    return (batch, height, width, self.channels)

  def get_config(self):
    return {
        **super().get_config(),
        "channels": self.channels,
        "resample": self.resample,
        "num_heads": self.num_heads,
        "epsilon": self.epsilon,
        "skip_scale": self.skip_scale,
        "scale_shift": self.scale_shift,
        "project_resampled": self.project_resampled,
        "resample_filter": self.resample_filter,
    }


class _Preconditioning(keras.layers.Layer):
  """What both ends of the network know.

  Args:
    kind: one of `edm_unet.PRECONDITIONINGS`.
    sigma_data: see `EDMConfig`.
    beta_d: see `EDMConfig`.
    beta_min: see `EDMConfig`.
    timesteps: see `EDMConfig`.
  """

  def __init__(self, kind, sigma_data, beta_d, beta_min, timesteps, **kwargs):
    # Sigmas span five decades: see `layers.TimeEmbedding`.
    kwargs.setdefault("dtype", "float32")
    super().__init__(**kwargs)
    self.kind = kind
    self.sigma_data = sigma_data
    self.beta_d = beta_d
    self.beta_min = beta_min
    self.timesteps = timesteps

  def get_config(self):
    return {
        **super().get_config(),
        "kind": self.kind,
        "sigma_data": self.sigma_data,
        "beta_d": self.beta_d,
        "beta_min": self.beta_min,
        "timesteps": self.timesteps,
    }


@keras.saving.register_keras_serializable(package="ddss_tf")
class EDMInput(_Preconditioning):
  """Scales images and sigma for the network (Karras et al., table 1).

  Call arguments:
    x: float [B, H, W, C], x_0 + sigma eps.
    sigma: float [B], positive.

  Returns:
    The images c_in x, float [B, H, W, C], and c_noise, float [B].
  """

  def call(self, x, sigma):
    if self.kind == "VEPrecond":
      return x, ops.log(0.5 * sigma)
    if self.kind == "EDMPrecond":
      c_in = ops.rsqrt(sigma**2 + self.sigma_data**2)
      c_noise = ops.log(sigma) / 4
    else:
      c_in = ops.rsqrt(sigma**2 + 1.0)
      # It is (M - 1) t, and t solves
      # sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1, written without the
      # difference that cancels where sigma is small.
      log = ops.log1p(sigma**2)
      c_noise = (self.timesteps - 1) * 2 * log / (
          self.beta_min + ops.sqrt(self.beta_min**2 + 2 * self.beta_d * log))
    return c_in[:, None, None, None] * x, c_noise

  def compute_output_shape(self, x_shape, sigma_shape):
    return x_shape, sigma_shape


@keras.saving.register_keras_serializable(package="ddss_tf")
class EDMOutput(_Preconditioning):
  """eps = (x - D) / sigma of the denoised D = c_skip x + c_out F.

  The difference is not computed, because it would cancel where sigma is small:
  D is then x but for the last digits.

  Call arguments:
    x: float [B, H, W, C], x_0 + sigma eps.
    sigma: float [B], positive.
    output: float [B, H, W, C], F of the network.

  Returns:
    eps, float [B, H, W, C].
  """

  def call(self, x, sigma, output):
    if self.kind == "VPPrecond":
      return output
    if self.kind == "VEPrecond":
      return -output
    sigma = sigma[:, None, None, None]
    variance = sigma**2 + self.sigma_data**2
    return sigma / variance * x - self.sigma_data * ops.rsqrt(variance) * output

  def compute_output_shape(self, x_shape, sigma_shape, output_shape):
    del sigma_shape, output_shape
    return x_shape

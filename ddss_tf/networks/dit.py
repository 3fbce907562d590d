"""The diffusion transformer, DiT, as a Keras functional model (`keras.ops`).

Peebles and Xie (2023, https://arxiv.org/abs/2212.09748), with adaLN-Zero. It
was made for latents, NHWC here, but takes images of any number of channels.
Patches become tokens; time and class enter every block as shift, scale and gate
of its two branches. The time is a float, one per latent, because a learned
sampler asks for fractional times.
"""

import dataclasses

import keras
from keras import ops
import numpy as np

from ddss_tf.networks import layers
from ddss_tf.networks.layers import TimeEmbedding

# Of the first normalisation of a block, and of the last of the network.
_EPSILON = 1e-6
# See `layers.check_sizes`. "width" is heads times channels of a head.
_MOST = {"image_size": 2**13, "in_channels": 2**13, "out_channels": 2**13,
         "patch_size": 2**8, "num_layers": 2**8, "num_heads": 2**10,
         "width": 2**13, "num_classes": 2**16, "mlp_ratio": 2**6,
         "time_features": 2**13}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """Everything that fixes the architecture and its arithmetic.

  Attributes:
    image_size: height and width of `x_t`, multiples of `patch_size`.
    in_channels: channels of `x_t`.
    out_channels: channels of the prediction.
    patch_size: height and width of the square that becomes one token.
    num_layers: number of blocks.
    num_heads: heads of every attention layer.
    head_channels: channels of one head; a token has as many as all heads
      together, a multiple of 4.
    num_classes: classes, the null label of guidance included.
    norm_epsilon: epsilon of the normalisation before a block's MLP; all others
      have 1e-6. None has weights.
    mlp_ratio: width of the MLPs' hidden layer, in units of that of a token.
    time_features: even number of sines and cosines of the time, together.
    shared_embedding: whether all blocks have one embedding of time and class,
      as in the paper; otherwise each block has its own, and the last layer that
      of the first block.
  """

  image_size: tuple[int, int]
  in_channels: int
  out_channels: int
  patch_size: int
  num_layers: int
  num_heads: int
  head_channels: int
  num_classes: int
  norm_epsilon: float = 1e-6
  mlp_ratio: int = 4
  time_features: int = 256
  shared_embedding: bool = True


def build_dit(config: DiTConfig, name: str = "dit") -> keras.Model:
  """Builds the network `[x_t, t, labels] -> prediction`, with random weights.

  Layers carry the names of their place: `patch_embedding`, `block_3`, `output`.
  The embedding of time and class has `time_1`, `time_2` and `label_embedding`;
  if it is not shared, these begin with their block's name.

  Args:
    config: the architecture.
    name: name of the model.

  Returns:
    A functional model to float [B, H, W, out_channels]. Its inputs are `x_t`,
    float [B, H, W, in_channels]; `t`, float [B], in the units the network was
    trained with; and `labels`, int32 [B], in [0, num_classes - 1].

  Raises:
    ValueError: the image size is not such a multiple; the width is not a
      multiple of 4; the features of the time are not even; a size is below 1,
      or larger than any network has.
  """
  height, width = _checked(config)
  x = keras.Input((height, width, config.in_channels), name="x_t")
  t = keras.Input((), name="t")
  labels = keras.Input((), dtype="int32", name="labels")
  embeddings = _embeddings(config, t, labels)
  h = PatchEmbedding(config.num_heads * config.head_channels,
                     config.patch_size, name="patch_embedding")(x)
  for i, embedding in enumerate(embeddings):
    h = DiTBlock(config.num_heads, config.mlp_ratio, config.norm_epsilon,
                 name=f"block_{i}")(h, embedding)
  h = PatchOutput((height, width), config.patch_size, config.out_channels,
                  name="output")(h, embeddings[0])
  return keras.Model([x, t, labels], h, name=name)


def _checked(config: DiTConfig) -> tuple[int, int]:
  """Height and width of `x_t`; raises what `build_dit` raises."""
  width = config.num_heads * config.head_channels
  layers.check_sizes(
      {key: width if key == "width" else getattr(config, key)
       for key in _MOST}, _MOST)
  size = config.image_size
  if len(size) != 2 or any(side % config.patch_size for side in size):
    raise ValueError(
        f"image_size must be height and width, multiples of "
        f"{config.patch_size}, the patch_size. Received: image_size={size}")
  if width % 4:
    raise ValueError(
        "num_heads times head_channels must be a multiple of 4. "
        f"Received: {config.num_heads} times {config.head_channels}")
  if config.time_features % 2 or config.time_features < 4:
    raise ValueError("time_features must be even and at least 4. "
                     f"Received: {config.time_features}")
  return size


def _embeddings(config: DiTConfig, t, labels) -> list:
  """The embedding of time and class for each block."""
  width = config.num_heads * config.head_channels
  features = TimeEmbedding(
      config.time_features, sin_first=False, name="time_embedding")(t)

  def embedded(prefix):
    time = keras.layers.Dense(
        width, activation="silu", name=f"{prefix}time_1")(features)
    time = keras.layers.Dense(width, name=f"{prefix}time_2")(time)
    label = keras.layers.Embedding(
        config.num_classes, width, name=f"{prefix}label_embedding")(labels)
    return keras.layers.Add(name=f"{prefix}time_and_label")([time, label])

  if config.shared_embedding:
    return [embedded("")] * config.num_layers
  return [embedded(f"block_{i}_") for i in range(config.num_layers)]


def _positions(rows: int, columns: int, width: int) -> np.ndarray:
  """Sines and cosines of every token's place, float32 [rows, columns, width].

  The first half is of the column: sines, then cosines, of the column times
  10000 ** (-i / (width / 4)). The second half is the same of the row.
  """
  quarter = width // 4
  frequencies = 10000.0 ** (-np.arange(quarter) / quarter)

  def waves(count):
    angles = np.arange(count)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

  shape = (rows, columns, 2 * quarter)
  return np.concatenate(
      [np.broadcast_to(waves(columns)[None], shape),
       np.broadcast_to(waves(rows)[:, None], shape)],
      axis=-1).astype(np.float32)


def _modulated(h, epsilon, shift, scale):
  """Normalises tokens without weights, then scales and shifts them."""
  # In float32, because sums over the width lose too much in bfloat16.
  x = ops.cast(h, "float32")
  x = x - ops.mean(x, axis=-1, keepdims=True)
  variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
  x = ops.cast(x * ops.rsqrt(variance + epsilon), h.dtype)
  return x * (1.0 + scale) + shift


def _dense(units, name, input_shape):
  layer = keras.layers.Dense(units, name=name)
  layer.build(input_shape)
  return layer


@keras.saving.register_keras_serializable(package="ddss_tf")
class PatchEmbedding(keras.layers.Layer):
  """Images to tokens, one for each patch, with sines of its place added.

  Args:
    width: channels of a token, a multiple of 4.
    patch_size: height and width of a patch.

  Call arguments:
    x: float [B, H, W, C].

  Returns:
    float [B, (H / patch_size) (W / patch_size), width], row by row.
  """

  def __init__(self, width, patch_size, **kwargs):
    super().__init__(**kwargs)
    self.width = width
    self.patch_size = patch_size
    self.projection = keras.layers.Conv2D(
        width, patch_size, strides=patch_size, name="projection")

  def build(self, x_shape):
    self.projection.build(x_shape)
    self.built = True

  def call(self, x):
    h = self.projection(x)
    _, rows, columns, width = h.shape
    places = _positions(rows, columns, width)
    h = h + ops.convert_to_tensor(places, dtype=h.dtype)
    return ops.reshape(h, (-1, rows * columns, width))

  def compute_output_shape(self, x_shape):
    batch, height, width, _ = x_shape
    tokens = (height // self.patch_size) * (width // self.patch_size)
    return (batch, tokens, self.width)

  def get_config(self):
    return {**super().get_config(), "width": self.width,
            "patch_size": self.patch_size}


@keras.saving.register_keras_serializable(package="ddss_tf")
class DiTBlock(keras.layers.Layer):
  """Self-attention and an MLP, each normalised, modulated, gated and added.

  Args:
    num_heads: heads of the attention.
    mlp_ratio: see `DiTConfig`.
    norm_epsilon: see `DiTConfig`.

  Call arguments:
    h: float [B, N, D], tokens.
    embedding: float [B, D], of time and class.

  Returns:
    float [B, N, D].
  """

  def __init__(self, num_heads, mlp_ratio, norm_epsilon, **kwargs):
    super().__init__(**kwargs)
    self.num_heads = num_heads
    self.mlp_ratio = mlp_ratio
    self.norm_epsilon = norm_epsilon

  def build(self, h_shape, embedding_shape):
    width = h_shape[-1]
    hidden = self.mlp_ratio * width
    self.modulation = _dense(6 * width, "modulation", embedding_shape)
    for name in ("query", "key", "value", "output_projection"):
      setattr(self, name, _dense(width, name, h_shape))
    self.mlp_1 = _dense(hidden, "mlp_1", h_shape)
    self.mlp_2 = _dense(width, "mlp_2", (*h_shape[:-1], hidden))
    self.built = True

  def call(self, h, embedding):
    parts = ops.split(
        self.modulation(ops.silu(embedding))[:, None, :], 6, axis=-1)
    shift, scale, gate = parts[:3]
    h = h + gate * self._attended(_modulated(h, _EPSILON, shift, scale))
    shift, scale, gate = parts[3:]
    x = self.mlp_1(_modulated(h, self.norm_epsilon, shift, scale))
    return h + gate * self.mlp_2(ops.gelu(x, approximate=True))

  def _attended(self, x):
    _, tokens, width = x.shape
    shape = (-1, tokens, self.num_heads, width // self.num_heads)
    query, key, value = (ops.reshape(dense(x), shape)
                         for dense in (self.query, self.key, self.value))
    x = ops.dot_product_attention(query, key, value)
    return self.output_projection(ops.reshape(x, (-1, tokens, width)))

  def compute_output_shape(self, h_shape, embedding_shape):
    del embedding_shape
    return h_shape

  def get_config(self):
    return {**super().get_config(), "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio, "norm_epsilon": self.norm_epsilon}


@keras.saving.register_keras_serializable(package="ddss_tf")
class PatchOutput(keras.layers.Layer):
  """Tokens to images: normalises, modulates, projects, and lays patches out.

  Args:
    image_size: height and width of the images.
    patch_size: height and width of a patch.
    out_channels: channels of the images.

  Call arguments:
    h: float [B, N, D], tokens, row by row.
    embedding: float [B, D], of time and class.

  Returns:
    float [B, H, W, out_channels].
  """

  def __init__(self, image_size, patch_size, out_channels, **kwargs):
    # The prediction leaves in float32 whatever the policy, as in `build_unet`.
    kwargs.setdefault("dtype", "float32")
    super().__init__(**kwargs)
    self.image_size = tuple(image_size)
    self.patch_size = patch_size
    self.out_channels = out_channels

  def build(self, h_shape, embedding_shape):
    width = h_shape[-1]
    self.modulation = keras.layers.Dense(
        2 * width, dtype=self.dtype_policy, name="modulation")
    self.modulation.build(embedding_shape)
    self.projection = keras.layers.Dense(
        self.patch_size**2 * self.out_channels, dtype=self.dtype_policy,
        name="projection")
    self.projection.build(h_shape)
    self.built = True

  def call(self, h, embedding):
    shift, scale = ops.split(
        self.modulation(ops.silu(embedding))[:, None, :], 2, axis=-1)
    h = self.projection(_modulated(h, _EPSILON, shift, scale))
    height, width = self.image_size
    size = self.patch_size
    # A token's numbers go by row, column and channel of its patch.
    h = ops.reshape(h, (-1, height // size, width // size, size, size,
                        self.out_channels))
    h = ops.transpose(h, (0, 1, 3, 2, 4, 5))
    return ops.reshape(h, (-1, height, width, self.out_channels))

  def compute_output_shape(self, h_shape, embedding_shape):
    del embedding_shape
    return (h_shape[0], *self.image_size, self.out_channels)

  def get_config(self):
    return {**super().get_config(), "image_size": self.image_size,
            "patch_size": self.patch_size, "out_channels": self.out_channels}

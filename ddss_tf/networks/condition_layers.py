"""Layers of U-Nets with conditions: attention to a text, numbers of an image.

Rombach et al. (2022, https://arxiv.org/abs/2112.10752, section 3.3) let the
pixels of a U-Net attend to the tokens of a text. Podell et al. (2023,
https://arxiv.org/abs/2307.01952, section 2.2) also tell it the sizes of the
image that is asked for.
"""

import keras
from keras import ops
import numpy as np

from ddss_tf.networks import group_norm
from ddss_tf.networks import layers

# Of the normalisation before a transformer, and of those inside.
_GROUP_EPSILON, _EPSILON = 1e-6, 1e-5
# Width of the MLP's hidden layer, in units of that of a token.
_MLP_RATIO = 4


def _built(layer, *shapes):
  layer.build(*shapes)
  return layer


@keras.saving.register_keras_serializable(package="ddss_tf")
class SizesEmbedding(layers.TimeEmbedding):
  """Sinusoidal features of several numbers for each image.

  They are computed in float32 whatever the policy, because sizes in pixels
  reach 1024 and more: bfloat16 would merge neighbouring ones.

  Args:
    dim: even number of features of one number.
    sin_first: see `layers.TimeEmbedding`.
    frequency_shift: see `layers.TimeEmbedding`.

  Call arguments:
    sizes: float [B, N].

  Returns:
    float [B, N dim] in [-1, 1], those of the first number first.
  """

  def __init__(self, dim, sin_first=True, frequency_shift=1.0, **kwargs):
    # Without autocast, a policy that is set later rounds no input.
    super().__init__(dim, sin_first, frequency_shift, autocast=False, **kwargs)

  def call(self, sizes):
    h = super().call(ops.reshape(sizes, (-1,)))
    return ops.cast(ops.reshape(h, (-1, sizes.shape[1] * self.dim)),
                    self.compute_dtype)

  def compute_output_shape(self, sizes_shape):
    return (sizes_shape[0], sizes_shape[1] * self.dim)


@keras.saving.register_keras_serializable(package="ddss_tf")
class CrossAttention(keras.layers.Layer):
  """Attention of tokens to others, or to themselves; without a residual.

  Queries, keys and values have no bias. Scores of all pairs are in the memory,
  and their softmax is in float32 at least.

  Args:
    num_heads: heads; it must divide D.

  Call arguments:
    h: float [B, N, D], the tokens that attend.
    others: float [B, M, E], the tokens attended to; M may be unknown.

  Returns:
    float [B, N, D].
  """

  def __init__(self, num_heads, **kwargs):
    super().__init__(**kwargs)
    self.num_heads = num_heads

  def build(self, h_shape, others_shape):
    width, policy = h_shape[-1], self.dtype_policy

    def dense(name, shape, bias=False):
      return _built(keras.layers.Dense(
          width, use_bias=bias, dtype=policy, name=name), shape)

    self.query = dense("query", h_shape)
    self.key = dense("key", others_shape)
    self.value = dense("value", others_shape)
    self.output_projection = dense("output_projection", h_shape, bias=True)
    self.built = True

  def call(self, h, others):
    width = h.shape[-1]
    head = width // self.num_heads

    def in_heads(values):
      return ops.reshape(values, (
          ops.shape(values)[0], ops.shape(values)[1], self.num_heads, head))

    # Queries are scaled, not scores, which are many more and might overflow.
    query = in_heads(self.query(h) * head**-0.5)
    key, value = in_heads(self.key(others)), in_heads(self.value(others))
    scores = ops.einsum("bqhc,bkhc->bhqk", query, key)
    weights = ops.softmax(ops.cast(
        scores, keras.backend.result_type(scores.dtype, "float32")), axis=-1)
    h = ops.einsum("bhqk,bkhc->bqhc", ops.cast(weights, value.dtype), value)
    shape = ops.shape(h)
    return self.output_projection(ops.reshape(h, (shape[0], shape[1], width)))

  def compute_output_shape(self, h_shape, others_shape):
    del others_shape
    return h_shape

  def get_config(self):
    return {**super().get_config(), "num_heads": self.num_heads}


@keras.saving.register_keras_serializable(package="ddss_tf")
class ContextBlock(keras.layers.Layer):
  """Attention to itself, to the context, and an MLP; each normalised, added.

  The MLP is a GEGLU of Shazeer (2020, https://arxiv.org/abs/2002.05202): half
  of its hidden numbers are multiplied by an exact GELU of the other half.

  Args:
    num_heads: heads of both attention layers; it must divide D.
    only_context: whether the first layer attends to the context as well.

  Call arguments:
    h: float [B, N, D], tokens.
    context: float [B, M, E]; M may be unknown.

  Returns:
    float [B, N, D].
  """

  def __init__(self, num_heads, only_context=False, **kwargs):
    super().__init__(**kwargs)
    self.num_heads = num_heads
    self.only_context = only_context

  def build(self, h_shape, context_shape):
    width, policy = h_shape[-1], self.dtype_policy
    hidden = _MLP_RATIO * width
    for name in ("norm1", "norm2", "norm3"):
      setattr(self, name, _built(keras.layers.LayerNormalization(
          epsilon=_EPSILON, dtype=policy, name=name), h_shape))
    self.attention1 = _built(
        CrossAttention(self.num_heads, dtype=policy, name="attention1"),
        h_shape, context_shape if self.only_context else h_shape)
    self.attention2 = _built(
        CrossAttention(self.num_heads, dtype=policy, name="attention2"),
        h_shape, context_shape)
    self.mlp_1 = _built(keras.layers.Dense(
        2 * hidden, dtype=policy, name="mlp_1"), h_shape)
    self.mlp_2 = _built(keras.layers.Dense(
        width, dtype=policy, name="mlp_2"), (*h_shape[:-1], hidden))
    self.built = True

  def call(self, h, context):
    x = self.norm1(h)
    h = h + self.attention1(x, context if self.only_context else x)
    h = h + self.attention2(self.norm2(h), context)
    value, gate = ops.split(self.mlp_1(self.norm3(h)), 2, axis=-1)
    return h + self.mlp_2(value * ops.gelu(gate, approximate=False))

  def compute_output_shape(self, h_shape, context_shape):
    del context_shape
    return h_shape

  def get_config(self):
    return {**super().get_config(), "num_heads": self.num_heads,
            "only_context": self.only_context}


@keras.saving.register_keras_serializable(package="ddss_tf")
class ContextTransformer(keras.layers.Layer):
  """A transformer over the pixels, told a context, with a residual.

  Args:
    num_blocks: the number of `ContextBlock`s; 0 leaves two projections.
    num_heads: heads of every attention layer; it must divide C.
    norm_groups: groups of the normalisation before all else.
    only_context: see `ContextBlock`.

  Call arguments:
    x: float [B, H, W, C].
    context: float [B, M, E]; M may be unknown.

  Returns:
    float [B, H, W, C].
  """

  def __init__(self, num_blocks, num_heads, norm_groups, only_context=False,
               **kwargs):
    super().__init__(**kwargs)
    self.num_blocks = num_blocks
    self.num_heads = num_heads
    self.norm_groups = norm_groups
    self.only_context = only_context

  def build(self, x_shape, context_shape):
    _, height, width, channels = x_shape
    policy, tokens = self.dtype_policy, (None, height * width, channels)
    self.norm = _built(group_norm.GroupNormalization(
        groups=self.norm_groups, epsilon=_GROUP_EPSILON, dtype=policy,
        name="norm"), x_shape)
    for name in ("projection_in", "projection_out"):
      setattr(self, name, _built(keras.layers.Dense(
          channels, dtype=policy, name=name), tokens))
    for i in range(self.num_blocks):
      block = _built(ContextBlock(
          self.num_heads, self.only_context, dtype=policy, name=f"block_{i}"),
          tokens, context_shape)
      setattr(self, f"block_{i}", block)
    self.built = True

  def call(self, x, context):
    _, height, width, channels = x.shape
    h = ops.reshape(self.norm(x), (-1, height * width, channels))
    h = self.projection_in(h)
    for i in range(self.num_blocks):
      h = getattr(self, f"block_{i}")(h, context)
    h = self.projection_out(h)
    return x + ops.reshape(h, (-1, height, width, channels))

  def compute_output_shape(self, x_shape, context_shape):
    del context_shape
    return x_shape

  def get_config(self):
    return {**super().get_config(), "num_blocks": self.num_blocks,
            "num_heads": self.num_heads, "norm_groups": self.norm_groups,
            "only_context": self.only_context}


@keras.saving.register_keras_serializable(package="ddss_tf")
class NearestResize(keras.layers.Layer):
  """Repeats pixels until an image has a size.

  Row i of the result is row floor(i h / height) of the input, and columns
  likewise. `keras.layers.UpSampling2D` does the same for twice the size, and is
  faster.

  Args:
    height: of the result.
    width: of the result.

  Call arguments:
    x: float [B, h, w, C].

  Returns:
    float [B, height, width, C].
  """

  def __init__(self, height, width, **kwargs):
    super().__init__(**kwargs)
    self.height = height
    self.width = width

  def call(self, x):
    for axis, size in ((1, self.height), (2, self.width)):
      places = np.arange(size) * x.shape[axis] // size
      x = ops.take(x, places.astype(np.int32), axis=axis)
    return x

  def compute_output_shape(self, x_shape):
    return (x_shape[0], self.height, self.width, x_shape[3])

  def get_config(self):
    return {**super().get_config(), "height": self.height,
            "width": self.width}

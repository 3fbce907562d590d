"""Group normalisation with sums that are fast on a CPU.

The layer, its variables and its results (to rounding) are those of Keras. On a
CPU, XLA makes a loop of each sum over a group in the gradient of Keras's layer,
and computes in that loop all that comes before the sum, the activation's
exponentials too. This takes a fifth of the gradient of a U-Net. Here a sum is
the product with a matrix that says which channel is of which group, and XLA
fuses nothing into a product.
"""

import math

import keras
from keras import ops
import numpy as np


def _normalise(groups, epsilon):
  """A function of x [B, ..., C], gamma [C] and beta [C], with its gradient."""

  @ops.custom_gradient
  def normalise(x, gamma, beta):
    shape, channels = ops.shape(x), x.shape[-1]
    pixels, width = math.prod(shape[1:-1]), channels // groups
    member = ops.convert_to_tensor(  # [C, G]
        np.repeat(np.eye(groups), width, axis=0), dtype=x.dtype)

    def flat(values):  # [B, P, C]
      return ops.reshape(values, (-1, pixels, channels))

    def group_mean(values):  # [B, P, C] to [B, 1, C].
      sums = ops.matmul(ops.reshape(values, (-1, channels)), member)
      means = ops.mean(ops.reshape(sums, (-1, pixels, groups)), axis=1) / width
      # A product here too: a repetition would be fused into all that follows.
      return ops.matmul(means, ops.transpose(member))[:, None]

    centred = flat(x)
    centred = centred - group_mean(centred)
    scale = ops.rsqrt(group_mean(centred * centred) + epsilon)

    def gradient(*args, upstream=None):
      if upstream is None:  # Backends differ in how they hand it over.
        upstream, = args
      upstream, unit = flat(upstream), centred * scale
      inner = upstream * gamma
      of_x = scale * (inner - group_mean(inner)
                      - unit * group_mean(inner * unit))
      return (ops.reshape(of_x, shape), ops.sum(upstream * unit, axis=(0, 1)),
              ops.sum(upstream, axis=(0, 1)))

    return ops.reshape(centred * (scale * gamma) + beta, shape), gradient

  return normalise


@keras.saving.register_keras_serializable(package="ddss_tf")
class GroupNormalization(keras.layers.GroupNormalization):
  """`keras.layers.GroupNormalization` of the last axis, with scale and centre.

  It computes in float32 at least, whatever the policy. Some devices multiply
  matrices of float32 with fewer bits (TensorFloat-32 on a GPU, bfloat16 on a
  TPU). There a group's mean and its scale are rounded to those bits, as the
  inputs of convolutions are.

  Args:
    groups: the number of groups; it must divide that of the channels.
    epsilon: added to the variance.
    **kwargs: options of `keras.layers.Layer`.

  Call arguments:
    inputs: float [B, ..., C].

  Returns:
    float [B, ..., C], in the policy's dtype.

  Reference: Wu and He (2018), https://arxiv.org/abs/1803.08494.
  """

  def __init__(self, groups, epsilon, **kwargs):
    super().__init__(groups=groups, epsilon=epsilon, **kwargs)
    if (self.axis, self.center, self.scale) != (-1, True, True):
      raise ValueError("GroupNormalization has the last axis, a scale and a "
                       f"centre. Received: axis={self.axis}, "
                       f"center={self.center}, scale={self.scale}")

  def call(self, inputs):
    dtype = keras.backend.result_type(inputs.dtype, "float32")
    outputs = _normalise(self.groups, self.epsilon)(*(
        ops.cast(value, dtype) for value in (inputs, self.gamma, self.beta)))
    return ops.cast(outputs, self.compute_dtype)

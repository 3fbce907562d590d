"""Whether XLA can compile a network and its gradient."""

import re

import keras
import tensorflow as tf

from ddss_tf import errors
from ddss_tf.networks import edm_layers
from ddss_tf.networks import group_norm
from ddss_tf.networks import layers

# Layers of the networks that we build. XLA is known to compile them, and asking
# takes as long as tracing them once more.
_KNOWN = (
    keras.layers.InputLayer, keras.layers.Rescaling, keras.layers.Dense,
    keras.layers.Conv2D, keras.layers.GroupNormalization,
    keras.layers.Activation, keras.layers.Concatenate, keras.layers.Add,
    keras.layers.ZeroPadding2D, keras.layers.Embedding,
    group_norm.GroupNormalization, layers.TimeEmbedding, layers.ResidualBlock,
    layers.SelfAttention, edm_layers.FilteredDown, edm_layers.FourierEmbedding,
    edm_layers.EDMBlock, edm_layers.EDMInput, edm_layers.EDMOutput, layers.OneHot)


def _is_known(layer) -> bool:
  if type(layer) is keras.layers.UpSampling2D:  # Others are resized by TF.
    return layer.interpolation == "nearest"
  return type(layer) in _KNOWN


def obstacle(denoiser) -> str | None:
  """Why XLA cannot compile a denoiser's eps; None if it can.

  Its gradient counts, too, because an operation may have a kernel and its
  gradient none. A bicubic resize has neither.

  Args:
    denoiser: the `Denoiser`. Its eps and the gradient are lowered for one
      image, and not compiled.
  """
  if all(_is_known(layer) for layer in denoiser.model.layers):
    return None

  def gradient(x_t, t, labels):
    with tf.GradientTape() as tape:
      tape.watch([x_t, t])
      eps = denoiser.eps(x_t, t, labels)
    return eps, tape.gradient(eps, [x_t, t], unconnected_gradients="zero")

  try:
    with tf.init_scope():  # The caller may be tracing.
      labels = None if denoiser.num_classes is None else tf.zeros([1], tf.int32)
      compiled = tf.function(gradient, jit_compile=True)
      lower = compiled.experimental_get_compiler_ir(
          tf.zeros([1, *denoiser.state_shape]), tf.zeros([1]), labels)
      lower(stage="hlo")
  except Exception as error:  # TensorFlow raises many kinds.
    missing = sorted(set(re.findall(r"No registered '(\w+)'", str(error))))
    if missing:
      return "it has no kernel for " + ", ".join(missing)
    return errors.one_line(error)
  return None

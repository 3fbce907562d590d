"""Networks as compiled functions, and whether XLA can compile them."""

import functools
import re

from absl import logging
import keras
import tensorflow as tf

from ddss_tf import errors
from ddss_tf.denoisers import conventions
from ddss_tf.denoisers import rematerialise
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
      labels = denoiser.example_labels(1)
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


class Compiled:
  """The compiled functions of a `Denoiser`, which inherits them."""

  def compiled_eps(self, jit_compile: bool = True, remat: bool = False):
    """`eps` as a `tf.function`, the same one at every call.

    Compiling a U-Net takes longer than many steps of a search. TensorFlow keeps
    what it compiled, gradients too, with the function. So all chains, searches
    and evaluations of a process share this one.

    Args:
      jit_compile: compile it with XLA, if XLA knows all its operations and
        their gradients. If not, a warning says why, and it is not compiled.
      remat: backpropagation recomputes its activations, see
        `rematerialise.rematerialise`. Then all arguments must be given by
        position.
    """
    return self._compile(self.eps, jit_compile, remat)

  def compiled_output(self, jit_compile: bool = True, remat: bool = False):
    """`output` as a `tf.function`; it is `compiled_eps` if eps is predicted.

    Args:
      jit_compile: see `compiled_eps`.
      remat: see `compiled_eps`.
    """
    if self.prediction not in conventions.EXACT:
      return self.compiled_eps(jit_compile, remat)
    return self._compile(self.output, jit_compile, remat)

  def compiled_output_and_variance(self, jit_compile: bool = True):
    """`output_and_variance` as a `tf.function`, see `compiled_eps`."""
    return self._compile(self.output_and_variance, jit_compile, False)

  def _compile(self, function, jit_compile, remat):
    jit_compile = jit_compile and self._xla_can
    key = function.__name__, jit_compile, remat
    if key not in self._compiled:
      self._compiled[key] = (
          rematerialise.rematerialise(
              self._compile(function, jit_compile, False), jit_compile)
          if remat else tf.function(function, jit_compile=jit_compile))
    return self._compiled[key]

  @functools.cached_property
  def _xla_can(self) -> bool:
    reason = obstacle(self)
    if reason:
      logging.warning("denoiser %r is not compiled by XLA: %s", self.name,
                      reason)
    return not reason

"""Group normalisation beside Keras's own, which differentiates by itself."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ddss_tf.networks import group_norm


def results(layer, x, cotangent, jit_compile=False):
  """Outputs, and the gradients in images, scale and centre."""

  @tf.function(jit_compile=jit_compile)
  def run(x):
    with tf.GradientTape() as tape:
      tape.watch(x)
      y = layer(x)
    return [y, *tape.gradient(y, [x, layer.gamma.value, layer.beta.value],
                              output_gradients=tf.cast(cotangent, y.dtype))]

  return [tf.cast(value, tf.float64).numpy() for value in run(tf.constant(x))]


def layers(shape, **kwargs):
  """Ours and Keras's, with the same variables."""
  rng = np.random.default_rng(0)
  pair = [kind(groups=4, epsilon=1e-5, **kwargs) for kind in (
      group_norm.GroupNormalization, keras.layers.GroupNormalization)]
  values = rng.normal(size=(2, shape[-1]))
  for layer in pair:
    layer.build(shape)
    layer.set_weights(list(values))
  return pair


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 4, 12), (2, 7, 8), (2, 6, 6, 4)])
def test_as_keras_in_float64(shape, jit_compile):
  rng = np.random.default_rng(1)
  # Means far from 0, of which a variance from squares would lose digits.
  x = 100.0 + rng.normal(size=shape) * np.arange(1, shape[-1] + 1)
  cotangent = rng.normal(size=shape)
  ours, theirs = (results(layer, x, cotangent, jit_compile)
                  for layer in layers(shape, dtype="float64"))
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy, tolerance", [
    ("float32", 2e-5), ("mixed_bfloat16", 2e-2)])
def test_as_keras_in_fewer_bits(policy, tolerance):
  rng = np.random.default_rng(2)
  shape = (4, 8, 8, 16)
  x = (2.0 + rng.normal(size=shape)).astype(np.float32)
  cotangent = rng.normal(size=shape)
  ours, theirs = (results(layer, x, cotangent)
                  for layer in layers(shape, dtype=policy))
  assert np.ptp(ours[0]) > 2.0
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_images_of_any_size():
  layer, theirs = layers((None, None, None, 8))
  run = tf.function(layer, input_signature=[
      tf.TensorSpec([None, None, None, 8])])
  for size in (2, 5):
    x = tf.random.stateless_normal([size, size, size + 1, 8], [0, size])
    np.testing.assert_allclose(run(x), theirs(x), atol=1e-5)


def test_config_makes_the_layer_again():
  layer = group_norm.GroupNormalization(2, 1e-6, name="norm")
  other = keras.saving.deserialize_keras_object(
      keras.saving.serialize_keras_object(layer))
  assert type(other) is group_norm.GroupNormalization
  assert other.get_config() == layer.get_config()
  assert (other.groups, other.epsilon) == (2, 1e-6)


def test_other_axes_are_refused():
  with pytest.raises(ValueError, match="axis=1"):
    group_norm.GroupNormalization(2, 1e-6, axis=1)

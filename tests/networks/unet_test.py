"""Tests of the U-Net's own parts; parity is in denoisers_test."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ddss_tf.networks import files
from ddss_tf.networks import layers
from ddss_tf.networks import unet


def test_time_embedding_by_hand():
  t = np.array([0.0, 2.5], np.float32)
  # dim 4: two frequencies, 1 and 10000 ** -(1 / (2 - shift)).
  slow = 10000.0 ** -1.0
  expected = np.stack([np.sin(t), np.sin(t * slow), np.cos(t),
                       np.cos(t * slow)], axis=1)
  np.testing.assert_allclose(
      layers.TimeEmbedding(4, True, 1.0)(t), expected, atol=1e-6)
  slow = 10000.0 ** -0.5
  expected = np.stack([np.cos(t), np.cos(t * slow), np.sin(t),
                       np.sin(t * slow)], axis=1)
  np.testing.assert_allclose(
      layers.TimeEmbedding(4, False, 0.0)(t), expected, atol=1e-6)


def test_time_embedding_gradient():
  t = tf.constant([3.3, 700.0])
  layer = layers.TimeEmbedding(4)
  with tf.GradientTape() as tape:
    tape.watch(t)
    total = tf.reduce_sum(layer(t))
  slow = 1e-4
  expected = (np.cos(t) - np.sin(t)
              + slow * (np.cos(t * slow) - np.sin(t * slow)))
  np.testing.assert_allclose(tape.gradient(total, t), expected, atol=1e-4)


def test_attention_against_numpy():
  keras.utils.set_random_seed(0)
  layer = layers.SelfAttention(norm_groups=2, norm_epsilon=1e-6, head_channels=2)
  x = np.random.default_rng(0).normal(size=(1, 2, 2, 4)).astype(np.float32)
  output = layer(x).numpy()
  grouped = x.reshape(1, 4, 2, 2)
  mean = grouped.mean(axis=(1, 3), keepdims=True)
  var = grouped.var(axis=(1, 3), keepdims=True)
  h = ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(4, 4)
  query, key, value = (
      h @ d.kernel.numpy() for d in (layer.query, layer.key, layer.value))
  heads = []
  for i in (0, 2):
    scores = query[:, i:i + 2] @ key[:, i:i + 2].T / np.sqrt(2)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    heads.append(weights / weights.sum(1, keepdims=True) @ value[:, i:i + 2])
  expected = x.reshape(4, 4) + (
      np.concatenate(heads, 1) @ layer.output_projection.kernel.numpy())
  np.testing.assert_allclose(output.reshape(4, 4), expected, atol=1e-5)


def test_image_size_must_divide():
  with pytest.raises(ValueError, match="multiple of 4.*image_size=10"):
    unet.build_unet(unet.UNetConfig(
        image_size=10, in_channels=1, out_channels=1, channels=(8, 8, 8),
        blocks_per_level=1, norm_groups=4))


def test_heads_of_two_widths():
  config = dict(image_size=4, in_channels=1, out_channels=1, channels=(4, 8),
                blocks_per_level=1, attention_levels=(0, 1), norm_groups=2)
  model = unet.build_unet(unet.UNetConfig(**config, num_heads=2))
  assert model.get_layer("down_0_attention_0").head_channels == 2
  assert model.get_layer("down_1_attention_0").head_channels == 4
  with pytest.raises(ValueError, match="divide the 4 channels.*num_heads=3"):
    unet.build_unet(unet.UNetConfig(**config, num_heads=3))
  with pytest.raises(ValueError, match="must not both.*2 and 4"):
    unet.build_unet(unet.UNetConfig(**config, num_heads=2, head_channels=4))


def test_time_scale():
  config = dict(image_size=4, in_channels=1, out_channels=1, channels=(4,),
                blocks_per_level=1, norm_groups=2)
  keras.utils.set_random_seed(0)
  plain = unet.build_unet(unet.UNetConfig(**config))
  scaled = unet.build_unet(unet.UNetConfig(**config, time_scale=20.0))
  scaled.set_weights(plain.get_weights())
  x = tf.random.stateless_normal([2, 4, 4, 1], [0, 1])
  t = tf.constant([1.5, 40.0])
  np.testing.assert_allclose(scaled([x, t]), plain([x, 20 * t]), atol=1e-6)


@pytest.mark.parametrize("changes,words", [
    (dict(activation="tanh"), "activation.*silu.*'tanh'"),
    (dict(label_embedding="none"), "label_embedding.*table.*'none'"),
    (dict(head_channels=3), "head_channels must divide the 4.*3"),
])
def test_configurations_that_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    unet.build_unet(unet.UNetConfig(
        image_size=4, in_channels=1, out_channels=1, channels=(4,),
        blocks_per_level=1, norm_groups=2, attention_levels=(0,), **changes))


def test_resampling_block_by_hand():
  x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1) * [1, -1]
  time = np.zeros((1, 3), np.float32)
  down = layers.ResidualBlock(2, 1, 1e-6, resample="down", divisor=2.0)
  up = layers.ResidualBlock(2, 1, 1e-6, resample="up")
  for block in (down, up):
    block(x, time)
    # Without what comes after the last activation, the shortcut is left.
    block.conv2.set_weights([0 * w for w in block.conv2.get_weights()])
  averages = x.reshape(1, 2, 2, 2, 2, 2).mean((2, 4))
  np.testing.assert_allclose(down(x, time), averages / 2)
  np.testing.assert_allclose(up(x, time), np.kron(x, np.ones((1, 2, 2, 1))))
  assert down.compute_output_shape(x.shape, None) == (1, 2, 2, 2)
  assert up.compute_output_shape(x.shape, None) == (1, 8, 8, 2)


def test_the_text_of_a_graph_does_not_say_where_classes_lie(monkeypatch):
  inputs = keras.Input([3])
  model = keras.Model(inputs, keras.layers.Dense(2)(
      layers.OneHot(3, name="one_hot")(inputs[:, 0])))
  plain = keras.Model(inputs, keras.layers.Dense(2)(inputs))
  texts = []
  for module in ("ddss_tf.unet", "ddss_tf.networks.layers"):
    monkeypatch.setattr(layers.OneHot, "__module__", module)
    assert f'"module": "{module}"' in model.to_json()
    texts.append(files.graph_text(model))
  assert texts[0] == texts[1] and "OneHot" in texts[0]
  assert files.graph_text(plain) == plain.to_json()

"""Tests of the U-Net with conditions and of its layers.

Golden values of whole networks are in tests/formats/condition_unet_reader_test.py.
"""

import math

import keras
from network_folders import error
import numpy as np
import pytest
import tensorflow as tf

from ddss_tf.networks import condition_layers
from ddss_tf.networks import condition_unet
from ddss_tf.networks import files
from ddss_tf.networks import layers
from ddss_tf.networks import precision
from ddss_tf.networks.condition_unet import ConditionUNetConfig

# Three inputs with conditions, two levels, a size that is odd.
SMALL = dict(
    image_size=(5, 4), in_channels=3, out_channels=2, channels=(4, 8),
    blocks_per_level=(1, 1), down_transformers=((), (1,)),
    up_transformers=((), ()), num_heads=(1, 2), context_width=6,
    middle="none", norm_groups=2, pooled_width=3, num_sizes=2, size_features=4)


def build(**changes):
  return condition_unet.build_condition_unet(
      ConditionUNetConfig(**SMALL | changes))


def randomised(model):
  rng = np.random.default_rng(0)
  for variable in model.weights:
    gain = variable.path.endswith("gamma")
    variable.assign(rng.normal(size=variable.shape) * 0.4 + gain)
  model.trainable = False
  return model


@pytest.fixture(scope="module")
def network():
  """The small network with random weights: do not change it."""
  return randomised(build())


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return [draw(3, 5, 4, 3), np.float32([0.5, 300.25, 999]), draw(3, 5, 6),
          draw(3, 3), np.float32([[512, 768], [0, 1024], [64.5, 1000]])]


def run(model, inputs):
  return model(inputs, training=False).numpy()


def test_inputs(network):
  assert [(i.name, i.shape[1:]) for i in network.inputs] == [
      ("x_t", (5, 4, 3)), ("t", ()), ("context", (None, 6)), ("pooled", (3,)),
      ("time_ids", (2,))]
  assert ConditionUNetConfig(**SMALL).conditions == (
      ("context", (None, 6)), ("pooled", (3,)), ("time_ids", (2,)))
  plain = ConditionUNetConfig(
      **SMALL | dict(pooled_width=None, context_tokens=77))
  assert plain.conditions == (("context", (77, 6)),)


def test_every_input_counts(network, inputs):
  output = run(network, inputs)
  assert output.shape == (3, 5, 4, 2)
  for i in range(len(inputs)):
    # Of the first image alone, so that it changes the first result alone.
    other = [value.copy() for value in inputs]
    other[i][0] += 0.5
    moved = np.abs(run(network, other) - output).max(axis=(1, 2, 3))
    assert moved[0] > 1e-2 and np.all(moved[1:] < 1e-5), network.inputs[i].name


def test_any_number_of_tokens(network, inputs):
  output = run(network, inputs)
  x, t, context, *rest = inputs
  # A text is a set of tokens: neither their order nor their multiplicity, if it
  # is the same for all, makes a difference.
  for other in (context[:, ::-1], np.concatenate([context, context], axis=1)):
    assert error(run(network, [x, t, other, *rest]), output) < 1e-5
  assert error(run(network, [x, t, context[:, :2], *rest]), output) > 1e-2
  told = build(context_tokens=5)
  told.set_weights(network.get_weights())
  np.testing.assert_array_equal(run(told, inputs), output)
  with pytest.raises(ValueError, match="context"):
    told([x, t, context[:, :4], *rest])


def test_conditions_in_float16(network, inputs):
  halves = [value.astype(np.float16) for value in inputs[2:]]
  singles = [value.astype(np.float32) for value in halves]
  np.testing.assert_array_equal(
      run(network, [*map(tf.constant, inputs[:2]), *map(tf.constant, halves)]),
      run(network, [*inputs[:2], *singles]))


def gradients(function, inputs):
  """Of a weighted sum of predictions, in all inputs."""
  given = [tf.constant(value) for value in inputs]
  with tf.GradientTape() as tape:
    tape.watch(given)
    output = function(*given)
    weight = np.random.default_rng(2).normal(size=output.shape)
    total = tf.reduce_sum(tf.cast(weight, output.dtype) * output)
  return [output, *tape.gradient(total, given)]


@pytest.fixture(scope="module")
def one_level():
  """A smaller network, because XLA and tracing are slow; do not change it."""
  return randomised(build(
      channels=(8,), blocks_per_level=(1,), down_transformers=((1,),),
      up_transformers=((),), num_heads=(2,)))


@pytest.mark.slow
@pytest.mark.parametrize("xla", [
    False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_recomputed(one_level, inputs, xla):
  call = lambda *a: one_level(a, training=False)
  # The number of tokens may be unknown in a graph, though not to XLA.
  signature = None if xla else [tf.TensorSpec([None, *i.shape[1:]])
                                for i in one_level.inputs]
  expected = gradients(call, inputs)
  assert all(np.std(value) > 1e-3 for value in expected)
  recomputed = tf.recompute_grad(tf.function(
      call, input_signature=signature, jit_compile=xla))
  for one, other in zip(gradients(recomputed, inputs), expected, strict=True):
    assert error(one, other) < 1e-4


@pytest.mark.slow
def test_transformer_with_xla():
  layer = condition_layers.ContextTransformer(1, 2, 2)
  rng = np.random.default_rng(6)
  given = [rng.normal(size=(2, 3, 2, 4)).astype(np.float32),
           rng.normal(size=(2, 3, 5)).astype(np.float32)]
  layer(*given)
  for variable in layer.weights:
    variable.assign(rng.normal(size=variable.shape))
  for one, other in zip(gradients(tf.function(layer, jit_compile=True), given),
                        gradients(layer, given), strict=True):
    assert error(one, other) < 1e-4


def test_gradient_of_resize():
  layer = condition_layers.NearestResize(3, 5)
  x = np.random.default_rng(5).normal(size=(2, 2, 3, 1)).astype(np.float32)
  for xla in (False, True):
    _, gradient = gradients(tf.function(layer, jit_compile=xla), [x])
    weight = np.random.default_rng(2).normal(size=(2, 3, 5, 1))
    # Rows 0 and 1 are of row 0; columns 0 and 1 of 0, 2 and 3 of 1.
    rows = np.stack([weight[:, :2].sum(1), weight[:, 2]], 1)
    truth = np.stack([rows[:, :, :2].sum(2), rows[:, :, 2:4].sum(2),
                      rows[:, :, 4]], 2)
    np.testing.assert_allclose(gradient, truth, atol=1e-5)


@pytest.mark.slow
def test_keras_file(tmp_path, network, inputs):
  path = str(tmp_path / "net.keras")
  network.save(path)
  for loaded in (files.load_keras(path), keras.saving.load_model(path)):
    np.testing.assert_array_equal(run(loaded, inputs), run(network, inputs))
    assert files.graph_text(loaded) == files.graph_text(network)
  assert not any(v.value.trainable for v in files.load_keras(path).weights)


@pytest.mark.slow
def test_bfloat16(tmp_path, network, inputs):
  model = precision.with_policy(network, precision.BFLOAT16)
  assert precision.policy(model) == precision.BFLOAT16
  output = model(inputs, training=False)
  assert output.dtype == tf.float32
  exact = run(network, inputs)
  assert 1e-4 < error(output, exact) < 0.2
  # bfloat16 itself has steps of 2 at 300, and of 4 at 768.
  for i, step in ((1, 0.25), (4, 1)):
    near = [*inputs]
    near[i] = inputs[i] + np.float32(step)
    moved = run(model, near) - output.numpy()
    truth = run(network, near) - exact
    assert np.corrcoef(moved.ravel(), truth.ravel())[0, 1] > 0.5
  # The layers inside of layers keep the policy in a file.
  path = str(tmp_path / "net.keras")
  model.save(path)
  loaded = files.load_keras(path)
  block = loaded.get_layer("down_1_attention_0").block_0
  assert block.attention2.key.compute_dtype == "bfloat16"


def test_attention_is_that_of_the_formula():
  layer = condition_layers.CrossAttention(2)
  rng = np.random.default_rng(3)
  h, others = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 6))
  layer.build(h.shape, others.shape)
  assert {v.path.split("/")[-2] for v in layer.weights
          if v.path.endswith("bias")} == {"output_projection"}
  for variable in layer.weights:
    variable.assign(rng.normal(size=variable.shape))
  q, k, v, out, bias = (np.asarray(w, np.float64) for w in (
      layer.query.kernel, layer.key.kernel, layer.value.kernel,
      layer.output_projection.kernel, layer.output_projection.bias))
  heads = []
  for part in (slice(0, 2), slice(2, 4)):
    scores = (h @ q)[..., part] @ np.swapaxes((others @ k)[..., part], 1, 2)
    scores = np.exp(scores / math.sqrt(2))
    scores /= scores.sum(-1, keepdims=True)
    heads.append(scores @ (others @ v)[..., part])
  truth = np.concatenate(heads, -1) @ out + bias
  assert error(layer(h.astype(np.float32), others.astype(np.float32)),
               truth) < 1e-5


def test_scores_do_not_overflow():
  # Scores of 3e38 and more: their scale is taken out of the queries first.
  layer = condition_layers.CrossAttention(1)
  h = np.full((1, 2, 64), 1.0, np.float32)
  layer.build(h.shape, h.shape)
  for dense in (layer.query, layer.key, layer.value):
    dense.kernel.assign(np.eye(64))
  layer.output_projection.kernel.assign(np.eye(64))
  layer.query.kernel.assign(np.eye(64) * 2e37)
  np.testing.assert_allclose(layer(h, h), h, rtol=1e-6)


def test_embedding_of_sizes():
  layer = condition_layers.SizesEmbedding(
      6, sin_first=False, frequency_shift=1.0)
  sizes = np.array([[1024, 0.5, 7], [3, 2, 768]])
  angles = sizes[:, :, None] * 10000.0 ** (-np.arange(3) / 2)
  truth = np.concatenate([np.cos(angles), np.sin(angles)], -1).reshape(2, 18)
  np.testing.assert_allclose(layer(sizes.astype(np.float32)), truth, atol=1e-4)
  layer.dtype_policy = "mixed_bfloat16"
  rounded = layer(sizes.astype(np.float32))
  assert rounded.dtype == tf.bfloat16
  np.testing.assert_allclose(tf.cast(rounded, tf.float32), truth, atol=4e-3)


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (5, 7), (2, 3), (9, 1)])
def test_resize(size):
  x = np.random.default_rng(4).normal(size=(2, 2, 3, 1)).astype(np.float32)
  result = condition_layers.NearestResize(*size)(x).numpy()
  assert result.shape == (2, *size, 1)
  for i in range(size[0]):
    for j in range(size[1]):
      np.testing.assert_array_equal(
          result[:, i, j],
          x[:, math.floor(i * 2 / size[0]), math.floor(j * 3 / size[1])])
  if size == (4, 6):
    np.testing.assert_array_equal(result, keras.layers.UpSampling2D(2)(x))


def test_activations():
  x = np.linspace(-3, 3, 13)
  truths = dict(
      gelu=[v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x],
      silu=x / (1 + np.exp(-x)), mish=x * np.tanh(np.log1p(np.exp(x))),
      relu=np.maximum(x, 0))
  assert set(truths) == set(layers.ACTIVATIONS)
  for name, truth in truths.items():
    layer = layers.Activation(name)
    np.testing.assert_allclose(layer(x.astype(np.float32)), truth, atol=1e-6)
    assert layers.Activation.from_config(layer.get_config()).activation == name


def test_global_policy():
  before = keras.config.dtype_policy()
  keras.config.set_dtype_policy("mixed_bfloat16")
  try:
    model = build()
  finally:
    keras.config.set_dtype_policy(before)
  assert model.output.dtype == "float32"
  for name in ("time_embedding", "sizes_embedding", "conv_out"):
    assert model.get_layer(name).compute_dtype == "float32"
  block = model.get_layer("down_1_attention_0").block_0
  assert block.compute_dtype == block.mlp_1.compute_dtype == "bfloat16"


@pytest.mark.parametrize("changes,words", [
    (dict(image_size=(8,)), "image_size.*height and width"),
    (dict(image_size=0), "image_size must be from 1"),
    (dict(image_size=(1, 4), symmetric_downsample=False), "must be 2 or more"),
    (dict(channels=()), "channels must be from 1"),
    (dict(channels=(5, 8), norm_groups=1), "channels.0. must be even.*5"),
    (dict(frequency_shift=2.0), "channels.0.*twice frequency_shift, 2.0.*4"),
    (dict(size_features=3), "size_features must be even.*3"),
    (dict(norm_groups=3), "norm_groups must divide.*down_0_block_0.*3"),
    (dict(norm_groups=8), "norm_groups must divide.*8"),
    (dict(num_heads=(1, 3)), "num_heads must divide the 8.*attention_0.*3"),
    (dict(num_heads=(1, 0)), "num_heads must divide"),
    (dict(num_heads=(1,)), "num_heads must have 2 entries"),
    (dict(blocks_per_level=(1,)), "blocks_per_level must have 2 entries"),
    (dict(down_transformers=((), (1, 1))), "down_transformers must have 1"),
    (dict(up_transformers=((1,), ())), "up_transformers must have 2 entries"),
    (dict(down_transformers=((), (65,))), "down_transformers must be from 0"),
    (dict(mid_transformer=-1), "mid_transformer must be from 0"),
    (dict(only_context_levels=(2,)), "only_context_levels.*0 to 1.*2"),
    (dict(middle="attn"), "middle must be one of attention, .*'attn'"),
    (dict(activation=None), "activation must be one of silu, .*None"),
    (dict(time_activation="tanh"), "time_activation.*'tanh'"),
    (dict(embedding_activation="tanh"), "embedding_activation.*'tanh'"),
    (dict(kernel_in=2), "kernel_in must be odd.*2"),
    (dict(kernel_out=4), "kernel_out must be odd.*4"),
    (dict(context_width=0), "context_width must be from 1"),
    (dict(context_tokens=0), "context_tokens must be from 1"),
    (dict(pooled_width=2**17), "pooled_width must be from 1"),
])
def test_networks_that_cannot_be(changes, words):
  with pytest.raises(ValueError, match=words):
    build(**changes)

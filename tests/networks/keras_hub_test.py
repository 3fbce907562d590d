"""Tests of KerasHub's Stable Diffusion 3 as network and decoder.

Oracles are KerasHub's own loop, the decoder that is tested beside diffusers, and
finite differences. That its network is that of diffusers is tested with the
reader, in tests/formats/sd3_test.py.
"""

import dataclasses

from checkpoint_files import refusal
import keras
from network_folders import error
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import rematerialise
from ddss_tf.denoisers.decoder import Decoder
from ddss_tf.formats import keras_hub as formats
from ddss_tf.networks import autoencoder
from ddss_tf.networks import files
from ddss_tf.networks import keras_hub as networks
from ddss_tf.samplers import generator

pytest.importorskip("keras_hub")

# What imports KerasHub is imported after it was found.
from keras_hub_models import fill, make_backbone  # pylint: disable=g-import-not-at-top,wrong-import-position

CONFIG = networks.MMDiTConfig(
    image_size=(4, 6), in_channels=3, patch_size=2, num_layers=2, num_heads=2,
    head_channels=4, position_size=4, context_width=5, pooled_width=7,
    query_key_norm=True, dual_attention=(1,))
GUIDANCE = 7.0


def drawn(config, batch, seed=0):
  """[x_t, t, context, pooled]."""
  rng = np.random.default_rng(seed)
  shapes = ((*config.image_size, config.in_channels), (6, config.context_width),
            (config.pooled_width,))
  x, context, pooled = (
      tf.constant(rng.standard_normal((batch, *shape)), tf.float32)
      for shape in shapes)
  t = tf.constant(np.linspace(3.5, 995.25, batch), tf.float32)
  return [x, t, context, pooled]


@pytest.fixture(scope="module")
def network():
  model = networks.build_mmdit(CONFIG)
  model.trainable = False
  fill(model, 0)
  return model


@pytest.fixture(scope="module")
def backbone():
  model = make_backbone()
  fill(model.diffuser, 1)
  # The context is 4096 wide.
  fill(model.vae.decoder, 2, 1.0)
  return model


@pytest.fixture(scope="module")
def parts(backbone):
  return formats.parts(backbone)


@pytest.fixture(scope="module")
def embeddings():
  """As `encode_text_step` gives them, of two prompts and two negative ones."""
  rng = np.random.default_rng(3)
  return [tf.constant(rng.standard_normal(shape), tf.float32)
          for shape in ((2, 8, 4096), (2, 8, 4096), (2, 16), (2, 16))]


def test_inputs_and_outputs(network):
  assert [i.name for i in network.inputs] == ["x_t", "t", "context", "pooled"]
  assert network.input_shape == [
      (None, 4, 6, 3), (None,), (None, None, 5), (None, 7)]
  assert network.output_shape == (None, 4, 6, 3)
  shapes = [i.shape[1:] for i in network.inputs[2:]]
  assert [shape for _, shape in CONFIG.conditions] == shapes
  # Any number of tokens will do, and each counts.
  x, t, context, pooled = drawn(CONFIG, 2)
  full = network([x, t, context, pooled])
  assert error(network([x, t, context[:, :5], pooled]), full) > 1e-3
  for i in range(4):
    changed = [x, t, context, pooled]
    changed[i] = changed[i] * 1.1
    assert error(network(changed), full) > 1e-3


@pytest.mark.slow
def test_backbone(backbone, parts, embeddings):
  assert parts.config == networks.MMDiTConfig(
      image_size=(4, 6), in_channels=16, patch_size=2, num_layers=1,
      num_heads=2, head_channels=8, position_size=8, context_width=4096,
      pooled_width=16)
  assert parts.schedule.card()["flow"] == {
      "num_train_steps": 1000, "shift": 2.5}
  x = tf.random.stateless_normal([2, 4, 6, 16], [0, 0])
  t = tf.constant([12.5, 870.0])
  np.testing.assert_array_equal(
      parts.network([x, t, embeddings[0], embeddings[2]], training=False),
      backbone.diffuser({
          "latent": x, "timestep": t, "context": embeddings[0],
          "pooled_projection": embeddings[2]}, training=False))
  # The same architecture with the same weights is the same network.
  again = networks.build_mmdit(parts.config)
  again.set_weights(parts.network.get_weights())
  inputs = [x, t, embeddings[0], embeddings[2]]
  np.testing.assert_array_equal(again(inputs), parts.network(inputs))
  assert not parts.network.trainable_weights


def test_decoder_is_that_of_the_backbone(backbone, parts):
  assert (float(parts.decoder.scale), float(parts.decoder.shift)) == (
      1.5305, 0.0609)
  assert parts.decoder.state_shape == (4, 6, 16)
  assert parts.decoder.image_shape == (32, 48, 3)
  z = 2 * tf.random.stateless_normal([2, 4, 6, 16], [0, 1])
  images = backbone.decode_step(z)
  assert error(parts.decoder(z), images) < 1e-4
  other = Decoder(parts.decoder.model, 1.5305, 0.0)
  assert error(other(z), images) > 1e-3


def test_decoder_is_that_of_autoencoder_kl(backbone):
  """The same numbers in the network of `formats.autoencoder`."""
  own = autoencoder.build_decoder(autoencoder.DecoderConfig(
      latent_size=(4, 6), latent_channels=16, out_channels=3,
      channels=(32, 64), layers_per_block=1, post_quant_conv=False))
  from keras_hub.src.models.vae.vae_layers import VAEDecoder  # pylint: disable=g-import-not-at-top
  hub = VAEDecoder([64, 32], [2, 2])
  hub.build((None, 4, 6, 16))
  fill(own, 4, 1.0)
  same = {"input_projection": "conv_in", "output_projection": "conv_out",
          "output_norm": "norm_out", "upsample_0_conv": "up_0_upsample",
          "block_0_0": "up_0_block_0", "block_0_1": "up_0_block_1",
          "block_1_0": "up_1_block_0", "block_1_1": "up_1_block_1",
          "residual_projection": "shortcut", "group_norm": "norm",
          "query_conv2d": "query", "key_conv2d": "key", "value_conv2d": "value",
          "output_conv2d": "output_projection"}
  values = {v.path: v.numpy() for v in own.weights}
  used = set()
  for v in hub.weights:
    _, *path = v.path.split("/")
    path = "/".join(same.get(name, name) for name in path)
    v.assign(values[path].reshape(v.shape))
    used.add(path)
  assert used == set(values)
  z = tf.random.stateless_normal([2, 4, 6, 16], [0, 2])
  images = hub(z, training=False)
  assert images.shape == (2, 8, 12, 3)
  assert error(own(z, training=False), images) < 1e-4
  del backbone


class Guided:
  """The network of [x, t] with fixed conditions and guidance."""

  def __init__(self, network, embeddings):
    self.network = network
    context, null_context, pooled, null_pooled = embeddings
    self.conditions = [tf.concat([context, null_context], 0),
                       tf.concat([pooled, null_pooled], 0)]

  def __call__(self, inputs, training=False):
    given, free = tf.split(self.network(
        [*(tf.concat([value, value], 0) for value in inputs),
         *self.conditions], training=training), 2)
    return free + GUIDANCE * (given - free)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 28])
def test_the_chain_is_the_loop_of_keras_hub(backbone, parts, embeddings,
                                            steps):
  noise = tf.random.stateless_normal([2, 4, 6, 16], [0, steps])
  # Its loop goes by the steps configured last, whatever it is told.
  backbone.configure_scheduler(steps)
  step = tf.function(lambda z, k: backbone.denoise_step(
      z, embeddings, k, steps, GUIDANCE))
  truth = noise
  for k in range(steps):
    truth = step(truth, tf.constant(k))
  denoiser = ddss_tf.Denoiser(
      Guided(parts.network, embeddings), parts.schedule,
      image_shape=(4, 6, 16), sha256="tiny", **parts.convention)
  sampler = ddss_tf.make_sampler(
      parts.schedule, "ddim", steps, stride="flow-euler")
  latents = generator.decoded_chain(
      denoiser, denoiser.compiled_output(jit_compile=False),
      denoiser.for_chain(sampler.coefficients().numpy()), noise, None)
  assert error(latents, truth) < 1e-4
  if steps > 4:
    return
  images = denoiser.with_decoder(parts.decoder).decode(latents)
  assert error(images, backbone.decode_step(truth)) < 1e-3
  # Without guidance it is another walk.
  for k in range(steps):
    noise = backbone.denoise_step(noise, embeddings, k, steps)
  assert error(latents, noise) > 0.1


def pulled(call, inputs, weight):
  with tf.GradientTape() as tape:
    tape.watch(inputs)
    total = tf.reduce_sum(weight * call(*inputs))
  return tape.gradient(total, inputs)


@pytest.mark.slow
def test_gradients():
  """In all four inputs, in every way in which a search takes them."""
  # A single plain block, because XLA takes seconds for each.
  network = networks.build_mmdit(dataclasses.replace(
      CONFIG, num_layers=1, dual_attention=(), query_key_norm=False))
  fill(network, 0)
  inputs = drawn(CONFIG, 3)
  weight = tf.constant(
      np.random.default_rng(5).standard_normal((3, 4, 6, 3)), tf.float32)

  def call(*values):
    return network(list(values), training=False)

  expected = pulled(call, inputs, weight)
  traced = tf.function(call)
  plain, compiled = (rematerialise.rematerialise(traced, jit_compile)
                     for jit_compile in (False, True))
  for way in (traced, plain, compiled):
    for one, truth in zip(pulled(way, inputs, weight), expected, strict=True):
      assert error(one, truth) < 1e-4
  # Finite differences along a random direction, in float32.
  for i, (value, gradient) in enumerate(zip(inputs, expected, strict=True)):
    step = 0.05 if i == 1 else 0.02
    direction = tf.constant(
        np.random.default_rng(i + 10).standard_normal(value.shape), tf.float32)
    ends = []
    for sign in (1, -1):
      moved = list(inputs)
      moved[i] = value + sign * step * direction
      ends.append(np.sum(weight * call(*moved), dtype=np.float64))
    slope = (ends[0] - ends[1]) / (2 * step)
    assert abs(slope) > 0.05
    np.testing.assert_allclose(
        np.sum(gradient * direction), slope, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
def test_times_are_not_rounded(policy):
  """KerasHub's own network takes 857 and 858 for one time in bfloat16."""
  from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT  # pylint: disable=g-import-not-at-top
  mmdit = MMDiT(2, 8, 1, 2, 4, latent_shape=(4, 6, 3), context_shape=(None, 5),
                pooled_projection_shape=(7,), dtype=policy)
  fill(mmdit, 6)
  x, _, context, pooled = drawn(CONFIG, 1)
  near = [tf.constant([value]) for value in (857.0, 857.25)]
  before = [mmdit({"latent": x, "timestep": t, "context": context,
                   "pooled_projection": pooled}) for t in near]
  np.testing.assert_array_equal(*before)
  network = networks.of_mmdit(mmdit)
  with tf.GradientTape() as tape:
    tape.watch(near)
    after = [network([x, t, context, pooled]) for t in near]
    difference = tf.reduce_sum(tf.abs(after[0] - after[1]))
    total = tf.reduce_sum(after[0] ** 2)
  assert after[0].dtype == tf.float32
  assert difference > 0 and tape.gradient(total, near[0])[0] != 0


def test_global_policy():
  before = keras.config.dtype_policy()
  keras.config.set_dtype_policy("mixed_bfloat16")
  try:
    model = networks.build_mmdit(CONFIG)
  finally:
    keras.config.set_dtype_policy(before)
  assert model.output.dtype == "float32"
  inner = model.get_layer("mmdit")
  assert inner.get_layer("joint_block_1").compute_dtype == "bfloat16"
  assert inner.get_layer("timestep_embedding").compute_dtype == "float32"
  assert inner.get_layer("timestep_embedding").mlp.compute_dtype == "float32"


def test_keras_files(network, parts, tmp_path):
  inputs = drawn(CONFIG, 2)
  z = tf.random.stateless_normal([1, 4, 6, 16], [0, 3])
  for name, model, fed in (("network", network, inputs),
                           ("decoder", parts.decoder.model, z)):
    path = str(tmp_path / f"{name}.keras")
    model.save(path)
    loaded = files.load_keras(path)
    np.testing.assert_array_equal(loaded(fed), model(fed))
    assert files.graph_text(loaded) == files.graph_text(model)


@pytest.mark.parametrize("changes,words", [
    (dict(image_size=(4, 5)), ["multiples of 2", "(4, 5)"]),
    (dict(image_size=(4, 10)), ["at most 8", "4 patches", "(4, 10)"]),
    (dict(dual_attention=(0, 2)), ["blocks from 0 to 1", "(0, 2)"]),
    (dict(dual_attention=(-1,)), ["(-1,)"]),
    (dict(num_layers=0), ["num_layers", "0"]),
    (dict(head_channels=2**14), ["width", "32768"]),
    (dict(context_width=2**20), ["context_width", "1048576"]),
])
def test_refused(changes, words):
  with pytest.raises(ValueError) as error:
    networks.build_mmdit(dataclasses.replace(CONFIG, **changes))
  for word in words:
    assert word in str(error.value)


def test_other_models_are_refused(network):
  for function in (networks.of_backbone, networks.decoder_of_backbone,
                   formats.parts):
    message = refusal(function, network)
    assert "StableDiffusion3Backbone" in message
    assert type(network).__name__ in message

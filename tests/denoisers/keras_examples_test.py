"""Networks as in the diffusion examples of keras.io, small and untrained.

The DDIM example feeds its network with the variance of the noise as
[B, 1, 1, 1], on a schedule of equal angles between two signal rates, with images
that a normalisation layer has standardised. The DDPM example feeds it with whole
steps of linear betas.
"""

import keras
from keras import layers
from keras import ops
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
import small_searches
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.errors import UserError

SIZE = 8


def block(h, width):
  if h.shape[-1] != width:
    h = layers.Conv2D(width, 1)(h)
  return h + layers.Conv2D(width, 3, padding="same", activation="swish")(h)


def ddim_network(seed=0):
  """[noisy images, variances [B, 1, 1, 1]] -> noise."""
  keras.utils.set_random_seed(seed)
  images = keras.Input((SIZE, SIZE, 3), name="noisy_images")
  variances = keras.Input((1, 1, 1), name="noise_variances")
  angles = 2 * np.pi * np.exp(np.linspace(0, np.log(100.0), 4)).astype("f4")
  embedding = ops.concatenate(
      [ops.sin(variances * angles), ops.cos(variances * angles)], axis=3)
  embedding = layers.UpSampling2D(SIZE, interpolation="nearest")(embedding)
  h = layers.Concatenate()([layers.Conv2D(8, 1)(images), embedding])
  h = block(h, 8)
  small = block(layers.AveragePooling2D(2)(h), 12)
  h = layers.Concatenate()([
      layers.UpSampling2D(2, interpolation="bilinear")(small), h])
  return keras.Model([images, variances], layers.Conv2D(3, 1)(block(h, 8)))


@pytest.fixture(scope="module")
def images():
  """Photographs they are not; with three means and deviations, in [0, 1]."""
  rng = np.random.default_rng(1)
  smooth = tf.image.resize(rng.uniform(0, 1, (64, 3, 3, 3)), (SIZE, SIZE))
  return np.clip(smooth.numpy() * [0.7, 0.5, 0.9] + [0.2, 0.1, 0.0],
                 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def ddim(images):
  """The denoiser of the example, and its normaliser."""
  normalizer = layers.Normalization()
  normalizer.adapt(images)
  mean, std = (np.asarray(value).reshape(-1) for value in (
      normalizer.mean, ops.sqrt(normalizer.variance)))
  denoiser = ddss_tf.Denoiser(
      ddim_network(), ddss_tf.make_schedule("cosine_angle", 1000),
      time_input="variance")
  denoiser = denoiser.with_decoder(ddss_tf.Standardised(
      denoiser.state_shape, 2 * mean - 1, 2 * std))
  return denoiser, normalizer


def test_the_schedule_is_the_examples():
  schedule = ddss_tf.make_schedule("cosine_angle", 1001)
  start, end = np.arccos(0.95), np.arccos(0.02)
  for time in (0.0, 0.25, 0.6, 1.0):
    angle = start + time * (end - start)
    alpha, sigma = schedule.alpha_sigma(1000 * time)
    np.testing.assert_allclose(alpha, np.cos(angle), rtol=1e-5)
    np.testing.assert_allclose(sigma, np.sin(angle), rtol=1e-5)
  same = ddss_tf.make_schedule(
      "alpha_bar", alpha_bar=schedule.abar(np.arange(1001)))
  np.testing.assert_allclose(same.betas, schedule.betas, rtol=1e-9)


@pytest.mark.parametrize("options,words", [
    (dict(name="alpha_bar"), "alpha_bar must be given"),
    (dict(name="alpha_bar", alpha_bar=[0.5, 0.6]), "alpha_bar must fall inside"),
    (dict(name="alpha_bar", alpha_bar=[0.5, 0.0]), "alpha_bar must fall inside"),
    (dict(name="alpha_bar", alpha_bar=[]), "must be a non-empty list"),
    (dict(name="linear", alpha_bar=[0.5]), "only then"),
    (dict(name="cosine_angle", max_signal_rate=1.0), "signal rates must be"),
    (dict(name="cosine_angle", min_signal_rate=0.99), "signal rates must be")])
def test_bad_schedules(options, words):
  with pytest.raises(ValueError, match=words):
    ddss_tf.make_schedule(**options)


def test_the_clock_and_the_prediction_are_the_examples(ddim):
  denoiser, _ = ddim
  x = tf.random.stateless_normal([4, SIZE, SIZE, 3], [1, 2])
  t = np.array([0.0, 123.0, 400.5, 999.0], np.float32)
  _, sigma = denoiser.schedule.alpha_sigma(t)
  expected = denoiser.model.layers[-1]([x, tf.reshape(sigma**2, [4, 1, 1, 1])])
  np.testing.assert_allclose(denoiser.eps(x, t), expected, atol=1e-5)


@pytest.mark.parametrize("time_input,clock", [
    ("variance", lambda sigma: sigma**2), ("sigma_vp", lambda sigma: sigma)])
def test_clocks_of_variance(time_input, clock):
  schedule = ddss_tf.make_schedule("cosine_angle", 50)
  x_t, t = keras.Input((2, 2, 1)), keras.Input((1, 1, 1))
  denoiser = ddss_tf.Denoiser(
      keras.Model([x_t, t], 0 * x_t + t), schedule, time_input=time_input)
  found = denoiser.eps(tf.zeros([3, 2, 2, 1]), [0.0, 20.5, 49.0])
  _, sigma = schedule.alpha_sigma(np.array([0.0, 20.5, 49.0]))
  np.testing.assert_allclose(found[:, 0, 0, 0], clock(sigma), rtol=1e-6)
  assert denoiser.continuous_time


def test_the_loop_of_the_example_is_our_ddim(ddim):
  """Its reverse_diffusion, written down again, to its denormalised images."""
  denoiser, normalizer = ddim
  steps, count = 5, 3
  x_T, _ = ddss_tf.draw_noise(
      tf.constant([4, 0]), tf.range(count), denoiser.state_shape, steps)

  def rates(time):
    angle = np.arccos(0.95) + time * (np.arccos(0.02) - np.arccos(0.95))
    return np.float32(np.sin(angle)), np.float32(np.cos(angle))

  network = denoiser.model.layers[-1]
  x = x_T
  for k in range(steps):
    noise_rate, signal_rate = rates(1.0 - k / steps)
    noises = network([x, tf.fill([count, 1, 1, 1], noise_rate**2)])
    predicted = (x - noise_rate * noises) / signal_rate
    noise_rate, signal_rate = rates(1.0 - (k + 1) / steps)
    x = signal_rate * predicted + noise_rate * noises
  mean, std = np.asarray(normalizer.mean), np.sqrt(normalizer.variance)
  expected = 2 * (mean + predicted * std) - 1

  times = [999 * (1.0 - k / steps) for k in range(steps)]
  sampler = ddss_tf.SolverSampler(denoiser.schedule, steps, "ddim", times)
  found = generator_lib.Generator(denoiser, count, False).images(
      sampler.coefficients(), count, seed=4)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_it_is_searched_at_five_steps(ddim, images, tmp_path):
  """The case that the example evaluates with KID; exported and served."""
  denoiser, _ = ddim
  path = str(tmp_path / "features.keras")
  inputs = keras.Input((SIZE, SIZE, 3))
  pool = layers.Flatten(name="pool")(layers.AveragePooling2D(2)(inputs))
  keras.Model(inputs, layers.Dense(3, name="logits")(pool)).save(path)
  parts = dict(denoiser=denoiser, dataset=2 * images - 1,
               features=ddss_tf.load_features(
                   path, pool_layer="pool", logits_layer="logits"))
  found = ddss_tf.search(run_dir=str(tmp_path / "run"), **parts,
                         **small_searches.options(
      sampler=lambda schedule: ddss_tf.make_sampler(
          schedule, family="ggdm+pred+time", num_steps=5),
      num_search_steps=3, batch_size=8, pool_samples=16, validation_samples=16,
      objective="kid_linear"))
  with open(tmp_path / "run" / "sampler.json", encoding="utf-8") as f:
    assert '"variance"' in f.read()  # The card tells the clock.
  folder = ddss_tf.export(str(tmp_path / "run"), denoiser)
  served = tf.saved_model.load(folder).signatures["serving_default"](
      seed=tf.constant([5, 0]), batch_size=tf.constant(2))["images"]
  expected = generator_lib.Generator(denoiser, 2, False).images(
      found.coefficients(), 2, seed=5)
  np.testing.assert_allclose(
      served, np.clip(127.5 * expected + 127.5, 0, 255), atol=1)
  assert "standardised for the network" in ddss_tf.inspect(None, denoiser)


def test_files_and_our_own_format(ddim, tmp_path):
  denoiser, _ = ddim
  network = ddim_network()
  network.save(tmp_path / "ddim.keras")
  mean, std = denoiser.decoder.mean.tolist(), denoiser.decoder.std.tolist()
  read = ddss_tf.load_denoiser(
      str(tmp_path / "ddim.keras"), prediction="eps", time_input="variance",
      schedule={"name": "cosine_angle"}, image_mean=mean, image_std=std)
  denoiser.save(str(tmp_path / "own"))
  again = ddss_tf.load_denoiser(str(tmp_path / "own"))
  assert again.setting == denoiser.setting and again.key == denoiser.key
  assert read.decoder.sha256 == denoiser.decoder.sha256
  x = tf.random.stateless_normal([2, SIZE, SIZE, 3], [3, 4])
  for other in (read, again):
    np.testing.assert_array_equal(
        other.eps(x, [3.0, 700.0]), denoiser.eps(x, [3.0, 700.0]))
    np.testing.assert_array_equal(other.decode(x), denoiser.decode(x))
  with pytest.raises(UserError, match="std must be positive"):
    ddss_tf.load_denoiser(
        str(tmp_path / "ddim.keras"), prediction="eps", time_input="variance",
        schedule={"name": "cosine_angle"}, image_std=[1.0, -1.0, 1.0])
  with pytest.raises(UserError, match="for each of its 3 channels"):
    ddss_tf.Standardised((8, 8, 3), [0.0, 1.0])


def test_the_ddpm_example():
  """Whole steps, linear betas, the noise: read as it is, without a word."""
  keras.utils.set_random_seed(3)
  images = keras.Input((SIZE, SIZE, 3), name="image_input")
  time = keras.Input((), dtype=np.int64, name="time_input")
  h = layers.Conv2D(8, 3, padding="same")(images)
  embedding = layers.Dense(8)(ops.sin(
      ops.cast(time, "float32")[:, None] * np.float32([1, 0.1, 0.01])))
  h = h + embedding[:, None, None, :]
  network = keras.Model([images, time], layers.Conv2D(3, 3, padding="same")(h))
  denoiser = ddss_tf.Denoiser(
      network, ddss_tf.make_schedule("linear", 1000))
  assert not denoiser.continuous_time
  x = tf.random.stateless_normal([2, SIZE, SIZE, 3], [3, 4])
  np.testing.assert_allclose(
      denoiser.eps(x, [3.0, 700.0]), network([x, tf.constant([3, 700], tf.int64)]),
      atol=1e-6)

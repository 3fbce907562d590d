"""Tests of decoders: image by image, with their gradient, and latent models."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
import small_searches
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.denoisers import decoder as decoder_lib
from ddss_tf.reporting import inspection
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.errors import UserError

STATE, IMAGE = (3, 2, 4), (6, 4, 2)


def decoder_model(seed=0):
  """Doubles the sides; not linear, and with a bias at the padded edges."""
  init = keras.initializers.GlorotUniform(seed)
  z = keras.Input(STATE)
  h = keras.layers.Conv2D(
      8, 3, padding="same", kernel_initializer=init,
      bias_initializer=keras.initializers.RandomNormal(seed=seed + 1))(z)
  h = keras.layers.Activation("tanh")(keras.layers.UpSampling2D(2)(h))
  return keras.Model(z, keras.layers.Conv2D(
      2, 3, padding="same", kernel_initializer=init)(h))


def states(count, seed=3):
  return tf.random.stateless_normal([count, *STATE], [seed, 0])


@pytest.mark.quick("1-2-False", "4-2-True", "4-5-False")
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 4])
def test_image_by_image_is_all_at_once(count, at_once, jit_compile):
  model = decoder_model()
  scale, shift = [0.5, 2.0, -1.0, 0.25], 0.3
  decoder = decoder_lib.Decoder(model, scale, shift, batch_size=at_once)
  assert (decoder.state_shape, decoder.image_shape) == (STATE, IMAGE)
  z = states(count)
  weights = tf.random.stateless_normal([count, *IMAGE], [5, 0])

  def plain(z):
    return model(z / tf.constant(scale) + shift)

  def gradient(decode, z):
    with tf.GradientTape() as tape:
      tape.watch(z)
      images = decode(z)
      value = tf.reduce_sum(weights * images**2)
    return images, tape.gradient(value, z)

  # A graph that does not know the size of the batch, and may be compiled.
  inside = tf.function(functools.partial(gradient, decoder),
                       jit_compile=jit_compile, input_signature=[
                           tf.TensorSpec([count if jit_compile else None,
                                          *STATE])])
  expected = gradient(plain, z)
  for found in (gradient(decoder, z), inside(z)):
    for a, b in zip(found, expected):
      assert a.shape == b.shape
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_hash_covers_all_that_decides_the_images():
  plain = decoder_lib.Decoder(decoder_model())
  others = [decoder_lib.Decoder(decoder_model(1)),
            decoder_lib.Decoder(decoder_model(), 2.0),
            decoder_lib.Decoder(decoder_model(), 1.0, 0.5)]
  assert len({d.sha256 for d in (plain, *others)}) == 4


@pytest.mark.parametrize("changes,words", [
    (dict(scale=0.0), "scale must not be 0"),
    (dict(scale=[1.0, 2.0]), "scale must be a number, or one for each of its 4"),
    (dict(shift="much"), "shift must be a number.*'much'"),
    (dict(shift=np.nan), "shift must be a number"),
    (dict(batch_size=0), "batch_size must be at least 1"),
])
def test_bad_arguments(changes, words):
  with pytest.raises(UserError, match=words):
    decoder_lib.Decoder(decoder_model(), **changes)


def test_shapes_must_be_known():
  z = keras.Input((None, None, 4))
  model = keras.Model(z, keras.layers.UpSampling2D(2)(z))
  with pytest.raises(UserError, match="must take one array of known shape"):
    decoder_lib.Decoder(model)


@pytest.fixture(scope="module")
def latent_parts(tmp_path_factory):
  """A latent model without training: its data are other decoded latents."""
  schedule = ddss_tf.make_schedule("linear", 100, 1e-3, 0.2)
  denoiser = ddss_tf.gaussian_denoiser(
      STATE, mean=0.3, std=0.5, schedule=schedule).with_decoder(
          ddss_tf.Decoder(decoder_model(), scale=0.5, shift=0.1))
  images = np.clip(denoiser.decode(0.3 + 0.5 * states(96)).numpy(), -1, 1)
  inputs = keras.Input(IMAGE)
  h = keras.layers.Conv2D(
      8, 3, activation="tanh",
      kernel_initializer=keras.initializers.GlorotUniform(7))(inputs)
  pool = keras.layers.Flatten(name="pool")(keras.layers.AveragePooling2D(2)(h))
  logits = keras.layers.Dense(
      3, name="logits",
      kernel_initializer=keras.initializers.GlorotUniform(8))(pool)
  path = str(tmp_path_factory.mktemp("features") / "features.keras")
  keras.Model(inputs, logits).save(path)
  return dict(
      denoiser=denoiser, dataset=images,
      features=ddss_tf.load_features(
          path, pool_layer="pool", logits_layer="logits"))


@pytest.mark.slow
def test_shapes_and_identity(latent_parts):
  denoiser = latent_parts["denoiser"]
  plain = denoiser.with_decoder(None)
  assert denoiser.state_shape == STATE and denoiser.image_shape == IMAGE
  assert plain.state_shape == plain.image_shape == STATE
  # A sampler belongs to the network; images and caches to the decoder as well.
  assert denoiser.identity == plain.identity == plain.setting
  assert denoiser.setting == {
      **plain.identity, "decoder": denoiser.decoder.sha256}
  assert denoiser.key != plain.key
  z = states(2)
  np.testing.assert_array_equal(plain.decode(z), z)
  for again in (denoiser.with_policy("float32"), plain.with_decoder(
      denoiser.decoder)):
    assert again.key == denoiser.key
  with pytest.raises(ValueError, match="must take latents.*3, 2, 4"):
    ddss_tf.gaussian_denoiser((4, 4, 4)).with_decoder(denoiser.decoder)


def test_own_format_round_trip(latent_parts, tmp_path):
  denoiser = latent_parts["denoiser"]
  denoiser.save(str(tmp_path))
  again = ddss_tf.load_denoiser(str(tmp_path))
  assert again.setting == denoiser.setting and again.key == denoiser.key
  z = states(3)
  np.testing.assert_array_equal(again.decode(z), denoiser.decode(z))
  (tmp_path / "decoder.keras").rename(tmp_path / "elsewhere")
  with pytest.raises(UserError, match="has a decoder.*but no decoder.keras"):
    ddss_tf.load_denoiser(str(tmp_path))
  decoder_model(4).save(tmp_path / "decoder.keras")
  with pytest.raises(UserError, match="decoder in .* must have the SHA-256"):
    ddss_tf.load_denoiser(str(tmp_path))


@pytest.mark.slow
def test_a_chain_gives_decoded_images(latent_parts):
  denoiser = latent_parts["denoiser"]
  sampler = ddss_tf.SolverSampler(denoiser.schedule, 4, "ddim")
  coefficients = sampler.coefficients()
  made = generator_lib.Generator(denoiser, 3, False)
  images = made.images(coefficients, 5, seed=2)
  assert images.shape == (5, *IMAGE)
  x_T, noise = ddss_tf.draw_noise(
      tf.constant([2, 0]), tf.range(5), STATE, 4)
  latents = ddss_tf.run_chain(denoiser.eps, coefficients, x_T, noise)
  model = denoiser.decoder.model
  np.testing.assert_allclose(
      images, model(latents / 0.5 + 0.1), rtol=1e-4, atol=1e-5)
  image, way, predicted = made.path(coefficients, 2, index=1)
  np.testing.assert_allclose(image, images[1], rtol=1e-4, atol=1e-5)
  assert way.shape == predicted.shape == (4, *IMAGE)
  np.testing.assert_allclose(
      way[0], model(x_T[1:2] / 0.5 + 0.1)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_search_an_evaluation_and_an_export(latent_parts, tmp_path):
  """Killed and resumed bit for bit; exported, served by TensorFlow alone."""
  denoiser = latent_parts["denoiser"]
  options = small_searches.options(
      num_search_steps=4, batch_size=8, pool_samples=16, validation_samples=16,
      validate_every=2, checkpoint_every=2)
  run, other = str(tmp_path / "run"), str(tmp_path / "other")
  found = ddss_tf.search(run_dir=run, **latent_parts, **options)
  start = found.start.numpy()
  assert any(np.any(a != b) for a, b in zip(
      found.coefficients().numpy().arrays().values(), start.arrays().values()))
  with pytest.MonkeyPatch.context() as patch:
    small_searches.interrupted(
        other, latent_parts, patch, 3, small_searches.die, KeyboardInterrupt,
        **{k: v for k, v in options.items() if k != "sampler"})
  resumed = ddss_tf.search(run_dir=other, **latent_parts, **options)
  small_searches.same_sampler(found, resumed)

  (row, searched) = ddss_tf.evaluate(
      run, **latent_parts, baselines=["ddpm linear"], num_samples=64,
      batch_size=32, jit_compile=False)
  assert row["denoiser"] == searched["denoiser"] == denoiser.setting
  assert row["fid"] > 0

  folder = ddss_tf.export(run, denoiser)
  served = tf.saved_model.load(folder).signatures["serving_default"](
      seed=tf.constant([5, 0]), batch_size=tf.constant(3))["images"]
  expected = generator_lib.Generator(denoiser, 3, False).images(
      found.coefficients(), 3, seed=5)
  assert served.shape == (3, *IMAGE)
  assert np.abs(served.numpy().astype(int) - dataset_lib.to_uint8(
      expected).astype(int)).max() <= 1
  text = ddss_tf.inspect(None, denoiser)
  assert "latents of 3 x 2 x 4" in text and "6 x 4 x 2" in text
  assert "of the decoder's at once" in text
  one, two = (inspection.decoder_bytes(decoder_lib.Decoder(
      decoder_model(), batch_size=size)) for size in (1, 2))
  # Of the image, its last and first layer at least; but for constants, twice as
  # much for two.
  assert 4 * 6 * 4 * (2 + 8 + 8) < one < two <= 2 * one < two + 100


def test_the_gradient_passes_the_decoder(latent_parts):
  """Of the loss in all coefficients, against finite differences."""
  denoiser = latent_parts["denoiser"]
  network = latent_parts["features"]
  start = ddss_tf.SolverSampler(denoiser.schedule, 3, "ddpm").coefficients()
  x_T, noise = ddss_tf.draw_noise(tf.constant([1, 0]), tf.range(4), STATE, 3)

  def loss(coefficients):
    return tf.reduce_sum(network(denoiser.decode(ddss_tf.run_chain(
        denoiser.eps, coefficients, x_T, noise)))["pool"] ** 2)

  with tf.GradientTape() as tape:
    tape.watch(list(start.arrays().values()))
    value = loss(start)
  slopes = dict(zip(start.arrays(), tape.gradient(
      value, list(start.arrays().values()))))
  for name, index, step in (("times", 1, 0.3), ("x0_from_eps", 0, 1e-3),
                            ("x0_weights", 1, 1e-3), ("noise_scales", 0, 1e-3),
                            ("state_weights", (1, 1), 1e-3)):
    shift = np.zeros(getattr(start, name).shape, np.float32)
    shift[index] = step
    difference = (loss(start._replace(**{name: getattr(start, name) + shift}))
                  - loss(start._replace(**{name: getattr(start, name) - shift})))
    np.testing.assert_allclose(
        slopes[name].numpy()[index], difference / (2 * step), rtol=0.03,
        err_msg=name)


def test_what_makes_no_sense_for_latents_is_refused(latent_parts, tmp_path):
  for changes, words in (
      (dict(x0_bound="clip"), "x0_bound must be None for latents.*'clip'"),
      (dict(objective="elbo"), "must not be 'elbo'.*with a decoder")):
    with pytest.raises(UserError, match=words):
      ddss_tf.search(run_dir=str(tmp_path / "run"), **latent_parts,
                     **small_searches.options(**changes))
  with pytest.raises(UserError, match="images.*shape|shape.*images"):
    ddss_tf.search(run_dir=str(tmp_path / "run"), **{
        **latent_parts, "dataset": np.zeros((8, *STATE), np.float32)},
                   **small_searches.options())

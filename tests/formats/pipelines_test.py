"""Tests of latent pipelines of diffusers: whole runs, refusals, the cache."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
import small_searches
from ddss_tf.samplers import solvers
from ddss_tf.errors import UserError

DATA = os.path.join(os.path.dirname(__file__), "..", "testdata")


def read(name):
  folder = os.path.join(DATA, f"latent_{name}")
  with np.load(os.path.join(folder, "golden.npz")) as file:
    return ddss_tf.load_denoiser(folder), dict(file)


def relative(value, golden):
  """The largest difference, in standard deviations of what is right."""
  return np.abs(np.asarray(value) - golden).max() / golden.std()


@pytest.mark.parametrize("name,shapes", [
    ("ldm", ((8, 8, 3), (16, 16, 3))), ("dit", ((8, 8, 4), (16, 16, 3)))])
def test_a_whole_run_of_the_pipeline(name, shapes):
  """Its own 4 steps of DDIM, with guidance, to the decoded image."""
  denoiser, golden = read(name)
  assert (denoiser.state_shape, denoiser.image_shape) == shapes
  labels = golden.get("run_class_labels")
  if labels is not None:
    assert (denoiser.num_classes, denoiser.null_label) == (11, 10)
    assert golden["run_null_label"] == 10
    denoiser = denoiser.guided(float(golden["run_guidance"]))
  times = golden["run_timesteps"].astype(float)
  np.testing.assert_allclose(
      np.append(denoiser.schedule.abar(times), 1.0), golden["run_abar"],
      rtol=1e-4)
  coefficients = solvers.ddim_coefficients(denoiser.schedule, times)
  sampler = ddss_tf.FixedSampler(denoiser.schedule, coefficients, "its own")

  def output(x, t):
    return denoiser.output(x, t, *(
        [] if labels is None else [labels.astype(np.int32)]))

  latents, states, _ = ddss_tf.run_chain(
      output, denoiser.for_chain(sampler.coefficients()), golden["run_x_T"],
      trajectory=True)
  for state, expected in zip(states[1:], golden["run_states"]):
    assert relative(state, expected) < 5e-4
  assert relative(latents, golden["run_latents"]) < 5e-4
  assert relative(denoiser.decode(latents), golden["run_image"]) < 5e-4


def test_network_and_decoder_of_a_pipeline():
  denoiser, golden = read("dit")
  found = denoiser.network(
      golden["net_x"], golden["net_t"],
      golden["net_class_labels"].astype(np.int32))
  assert relative(found, golden["net_out"][..., :4]) < 2e-4
  # The decoder is given scaled latents; the golden ones are not.
  scale, shift = denoiser.decoder.scale, denoiser.decoder.shift
  z = tf.constant(((golden["dec_z"] - shift) * scale).astype(np.float32))
  with tf.GradientTape() as tape:
    tape.watch(z)
    images = denoiser.decode(z)
    value = tf.reduce_sum(golden["dec_r"] * images)
  assert relative(images, golden["dec_image"]) < 1e-4
  slope = tape.gradient(value, z) * scale.astype(np.float32)
  assert relative(slope, golden["dec_gradient"]) < 1e-4


@pytest.mark.parametrize("name", ["ldm", "dit"])
def test_a_round_trip_and_the_cache_are_bit_equal(name, tmp_path):
  denoiser, golden = read(name)
  denoiser.save(str(tmp_path / "own"))
  folder = os.path.join(DATA, f"latent_{name}")
  cache = str(tmp_path / "cache")
  first, kept = (ddss_tf.load_denoiser(folder, cache_dir=cache)
                 for _ in range(2))
  assert len(os.listdir(os.path.join(cache, "denoisers"))) == 1
  z = tf.constant(golden["run_latents"])
  for again in (ddss_tf.load_denoiser(str(tmp_path / "own")), first, kept):
    assert again.setting == denoiser.setting and again.key == denoiser.key
    assert again.null_label == denoiser.null_label
    np.testing.assert_array_equal(again.decode(z), denoiser.decode(z))
    x, t = golden["net_x"], golden["net_t"]
    labels = [] if name == "ldm" else [
        golden["net_class_labels"].astype(np.int32)]
    np.testing.assert_array_equal(
        again.network(x, t, *labels), denoiser.network(x, t, *labels))


def test_another_decoder_is_another_key_of_the_cache(tmp_path):
  folder = str(tmp_path / "pipeline")
  shutil.copytree(os.path.join(DATA, "latent_ldm"), folder)
  cache = str(tmp_path / "cache")
  first = ddss_tf.load_denoiser(folder, cache_dir=cache)
  path = os.path.join(folder, "vqvae", "config.json")
  with open(path) as f:
    config = json.load(f)
  with open(path, "w") as f:
    json.dump({**config, "scaling_factor": 2.0}, f)
  second = ddss_tf.load_denoiser(folder, cache_dir=cache)
  assert first.identity == second.identity and first.key != second.key
  assert second.decoder.scale == 2.0


@pytest.mark.parametrize("name,words", [
    ("sd", "must be one of LDMPipeline.*text.*'StableDiffusionPipeline'"),
    ("sd3", "must be one of LDMPipeline.*'StableDiffusion3Pipeline'")])
def test_what_is_not_read_is_refused_by_name(name, words):
  with pytest.raises(UserError, match=words):
    read(name)


def test_parts_must_fit(tmp_path):
  folder = str(tmp_path / "pipeline")
  shutil.copytree(os.path.join(DATA, "latent_ldm"), folder)
  shutil.rmtree(os.path.join(folder, "vqvae"))
  shutil.copytree(os.path.join(DATA, "latent_dit", "vae"),
                  os.path.join(folder, "vqvae"))
  with pytest.raises(UserError, match="must take latents.*8, 8, 3"):
    ddss_tf.load_denoiser(folder)
  shutil.rmtree(os.path.join(folder, "vqvae"))
  with pytest.raises(UserError, match="vqvae"):
    ddss_tf.load_denoiser(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ldm", "dit"])
def test_a_search_from_folder_to_export(name, tmp_path, feature_file):
  """Random weights, K = 4: killed and resumed; exported and served."""
  denoiser, _ = read(name)
  if denoiser.num_classes:
    denoiser = denoiser.guided(1.5)
  rng = np.random.default_rng(0)
  parts = dict(
      denoiser=denoiser,
      dataset=np.tanh(rng.standard_normal((48, 16, 16, 3))).astype(np.float32),
      features=ddss_tf.load_features(
          feature_file, pool_layer="pool", logits_layer="logits"))
  options = dict(
      num_search_steps=4, batch_size=4, pool_samples=8, validation_samples=8,
      validate_every=2, checkpoint_every=2)
  options = small_searches.options(**options)
  found = ddss_tf.search(run_dir=str(tmp_path / "a"), **parts, **options)
  with pytest.MonkeyPatch.context() as patch:
    small_searches.interrupted(
        str(tmp_path / "b"), parts, patch, 3, small_searches.die,
        KeyboardInterrupt,
        **{k: v for k, v in options.items() if k != "sampler"})
  small_searches.same_sampler(found, ddss_tf.search(
      run_dir=str(tmp_path / "b"), **parts, **options))
  folder = ddss_tf.export(str(tmp_path / "a"), denoiser)
  served = tf.saved_model.load(folder).signatures["serving_default"](
      seed=tf.constant([5, 0]), batch_size=tf.constant(2))["images"]
  assert served.shape == (2, 16, 16, 3)


@pytest.fixture
def feature_file(tmp_path):
  import keras  # pylint: disable=g-import-not-at-top
  inputs = keras.Input((16, 16, 3))
  h = keras.layers.Conv2D(6, 5, strides=3, activation="tanh")(inputs)
  pool = keras.layers.Flatten(name="pool")(h)
  path = str(tmp_path / "features.keras")
  keras.Model(inputs, keras.layers.Dense(3, name="logits")(pool)).save(path)
  return path

"""Tests of latent pipelines of diffusers: whole runs, refusals, the cache."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
import small_searches
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import solvers
from ddss_tf.errors import UserError

DATA = os.path.join(os.path.dirname(__file__), "..", "testdata")


def read(name):
  """A pipeline of the fixtures, and its golden arrays."""
  if name == "sd3":
    pytest.importorskip("keras_hub")
  folder = os.path.join(DATA, f"latent_{name}")
  with np.load(os.path.join(folder, "golden.npz")) as file:
    return ddss_tf.load_denoiser(folder), dict(file)


# Names of a table's arrays in the golden file, of prompts and negative prompts.
CONDITIONS = {
    "context": ("run_prompt_embeds", "run_negative_prompt_embeds"),
    "pooled": ("run_pooled_prompt_embeds", "run_negative_pooled_prompt_embeds")}


def with_prompts(denoiser, golden):
  """Rows 0 and 1 are the golden prompts, 2 and 3 their negative ones."""
  table = ddss_tf.ConditionTable(
      {name: np.concatenate([golden[key] for key in CONDITIONS[name]])
       for name in denoiser.conditions},
      prompts=["one", "two", "not one", "not two"], null_row=[2, 3, 2, 3])
  return denoiser.with_table(table)


def its_own(denoiser, golden):
  """The sampler of the pipeline, as ours."""
  times = golden["run_timesteps"].astype(float)
  if "run_sigmas" in golden:
    return ddss_tf.make_sampler(
        denoiser.schedule, "ddim", len(times), stride="flow-euler")
  np.testing.assert_allclose(
      denoiser.schedule.abar(times), golden["run_abar"][:-1], rtol=1e-4)
  found = solvers.ddim_coefficients(denoiser.schedule, times).numpy()
  # Stable Diffusion's scheduler ends at the first step's noise, not without any.
  last, end = golden["run_abar"][-2:]
  alpha_t, sigma_t = np.sqrt(last), np.sqrt(1 - last)
  state, eps = found.x0_from_state.copy(), found.x0_from_eps.copy()
  state[-1] = np.sqrt(end) / alpha_t
  eps[-1] = np.sqrt(1 - end) - np.sqrt(end) * sigma_t / alpha_t
  return ddss_tf.FixedSampler(denoiser.schedule, found._replace(
      x0_from_state=state, x0_from_eps=eps), "its own")


def relative(value, golden):
  """The largest difference, in standard deviations of what is right."""
  return np.abs(np.asarray(value) - golden).max() / golden.std()


@pytest.mark.quick("dit-shapes1")
@pytest.mark.parametrize("name,shapes", [
    ("ldm", ((8, 8, 3), (16, 16, 3))), ("dit", ((8, 8, 4), (16, 16, 3))),
    ("sd", ((8, 8, 4), (16, 16, 3))), ("sd3", ((8, 8, 16), (16, 16, 3)))])
def test_a_whole_run_of_the_pipeline(name, shapes):
  """Its own 4 steps, with guidance, to the decoded image."""
  denoiser, golden = read(name)
  assert (denoiser.state_shape, denoiser.image_shape) == shapes
  labels = golden.get("run_class_labels")
  if denoiser.conditions:
    denoiser, labels = with_prompts(denoiser, golden), np.arange(2)
  elif labels is not None:
    assert (denoiser.num_classes, denoiser.null_label) == (11, 10)
    assert golden["run_null_label"] == 10
  if labels is not None:
    denoiser = denoiser.guided(float(golden["run_guidance"]))
  sampler = its_own(denoiser, golden)

  def output(x, t):
    return denoiser.output(x, t, *(
        [] if labels is None else [labels.astype(np.int32)]))

  latents, states, _ = ddss_tf.run_chain(
      output, denoiser.for_chain(sampler.coefficients()), golden["run_x_T"],
      trajectory=True)
  # diffusers holds a flow's states as z = (1 - s) x0 + s eps, not as alpha x0 +
  # sigma eps.
  sizes = (1 - golden["run_sigmas"]) ** 2 + golden["run_sigmas"] ** 2 if (
      "run_sigmas" in golden) else np.ones(5)
  for state, size, expected in zip(states[1:], sizes[1:], golden["run_states"]):
    assert relative(state * np.sqrt(size), expected) < 5e-4
  assert relative(latents, golden["run_latents"]) < 5e-4
  assert relative(denoiser.decode(latents), golden["run_image"]) < 5e-4


@pytest.mark.slow
def test_sdxl_from_prompts_to_images(tmp_path):
  """What tools/encode_prompts.py made of two prompts; weights in float16."""
  folder = os.path.join(DATA, "latent_xl")
  conditions = os.path.join(folder, "conditions.npz")
  denoiser = ddss_tf.load_denoiser(folder, conditions=conditions, guidance_scale=3.0)
  with np.load(os.path.join(folder, "golden.npz")) as file:
    golden = dict(file)
  assert denoiser.conditions == ("context", "pooled", "time_ids")
  assert denoiser.table.prompts == ("a cat", "a dog", "blurry")
  np.testing.assert_allclose(denoiser.table.frequencies, [2 / 3, 1 / 3, 0])
  rows = tf.constant([denoiser.table.row_of(text) for text in ("a dog", "a cat")])
  coefficients = its_own(denoiser, golden).coefficients()
  latents = ddss_tf.run_chain(
      lambda x, t: denoiser.output(x, t, rows), denoiser.for_chain(coefficients),
      golden["run_x_T"])
  assert relative(latents, golden["run_latents"]) < 1e-4
  assert relative(denoiser.decode(latents), golden["run_image"]) < 1e-4
  # The cache keeps network and decoder, not the table.
  cache = str(tmp_path / "cache")
  for options in ({}, {"conditions": conditions}):
    ddss_tf.load_denoiser(folder, cache_dir=cache, **options)
  (kept,) = os.listdir(os.path.join(cache, "denoisers"))
  assert sorted(os.listdir(os.path.join(cache, "denoisers", kept))) == [
      "decoder.keras", "denoiser.json", "network.keras"]


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


def network_inputs(name, golden):
  """The golden inputs of a network, in our order."""
  rest = {"ldm": [], "dit": ["net_class_labels"],
          "sd": ["net_encoder_hidden_states"],
          "sd3": ["net_encoder_hidden_states", "net_pooled_projections"]}[name]
  told = [golden[key] for key in rest]
  if name == "dit":
    return [golden["net_x"], golden["net_t"], told[0].astype(np.int32)]
  return [golden["net_x"], golden["net_t"], *([tuple(told)] if told else [])]


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_networks_of_prompts(name):
  denoiser, golden = read(name)
  found = denoiser.network(*network_inputs(name, golden))
  assert relative(found, golden["net_out"]) < 2e-4
  scale, shift = denoiser.decoder.scale, denoiser.decoder.shift
  z = ((golden["dec_z"] - shift) * scale).astype(np.float32)
  assert relative(denoiser.decode(z), golden["dec_image"]) < 1e-4


@pytest.mark.quick("dit")
@pytest.mark.parametrize("name", ["ldm", "dit", "sd", "sd3"])
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
    assert again.conditions == denoiser.conditions
    inputs = network_inputs(name, golden)
    np.testing.assert_array_equal(
        again.network(*inputs), denoiser.network(*inputs))


@pytest.mark.slow
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


def changed(path, **values):
  with open(path) as f:
    config = json.load(f)
  with open(path, "w") as f:
    json.dump(config | values, f)


def test_what_is_not_read_is_refused_by_name(tmp_path):
  folder = str(tmp_path / "pipeline")
  shutil.copytree(os.path.join(DATA, "latent_sd"), folder)
  changed(os.path.join(folder, "model_index.json"),
          _class_name="StableDiffusionUpscalePipeline")
  with pytest.raises(UserError, match="must be one of LDMPipeline.*with_decoder.*"
                     "'StableDiffusionUpscalePipeline'"):
    ddss_tf.load_denoiser(folder)
  with pytest.raises(UserError, match="learned_variance must not be given"):
    ddss_tf.load_denoiser(os.path.join(DATA, "latent_sd"), learned_variance=True)
  with pytest.raises(UserError, match="takes no conditions"):
    table = str(tmp_path / "table.npz")
    ddss_tf.ConditionTable({"context": np.ones([2, 5, 12])}).save(table)
    ddss_tf.load_denoiser(os.path.join(DATA, "latent_dit"), conditions=table)


def test_another_size_and_a_pipeline_of_flow(tmp_path):
  """A U-Net takes latents of any size, and any scheduler may be of a flow."""
  folder = str(tmp_path / "pipeline")
  shutil.copytree(os.path.join(DATA, "latent_sd"), folder)
  shutil.copy(os.path.join(DATA, "latent_sd3", "scheduler", "scheduler_config.json"),
              os.path.join(folder, "scheduler"))
  denoiser = ddss_tf.load_denoiser(folder, image_size=(8, 12))
  assert denoiser.state_shape == (8, 12, 4)
  assert denoiser.image_shape == (16, 24, 3)
  assert denoiser.prediction == "flow" and denoiser.schedule.shift == 3.0
  assert denoiser.convention.time_scale == 1000.0


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
@pytest.mark.parametrize("name", ["ldm", "dit", "sd", "sd3"])
def test_gradients_through_chain_and_decoder(name):
  """Coefficients, times and guidance, beside finite differences."""
  denoiser, golden = read(name)
  if denoiser.conditions:
    denoiser = with_prompts(denoiser, golden)
  if name == "ldm":  # Its images are those of the nearest codes: all steps.
    denoiser = denoiser.with_decoder(None)
  family = "ggdm+pred+time" + ("" if name == "ldm" else "+guidance")
  # With noise: at none, the noise scales' floor is a kink.
  sampler = ddss_tf.make_sampler(denoiser.schedule, family, 4, init="ddpm")
  variables = sampler.trainable_variables
  weight = tf.random.stateless_normal([2, *denoiser.image_shape], [0, 1])
  output = denoiser.compiled_output(False, True)
  labels = None if denoiser.num_classes is None else tf.constant([0, 1])

  @tf.function
  def loss():
    images = generator_lib.sample_chain(
        denoiser, output, denoiser.for_chain(sampler.coefficients()),
        tf.constant([1, 0]), tf.range(2), labels)
    return tf.reduce_mean(weight * images)

  with tf.GradientTape() as tape:
    value = loss()
  slopes = tape.gradient(value, variables)
  assert all(slope is not None for slope in slopes)
  assert any("guidance" in v.path for v in variables) == (name != "ldm")
  for i, (variable, slope) in enumerate(zip(variables, slopes)):
    direction = np.random.default_rng(i).standard_normal(variable.shape)
    expected = float(tf.reduce_sum(slope * direction.astype(np.float32)))
    # The fastest wave of a network's time turns by a radian in a step of T.
    start, width = variable.numpy(), 1e-4 if "times" in variable.path else 2e-3
    ends = []
    for sign in (1, -1):
      variable.assign(start + sign * width * direction.astype(np.float32))
      ends.append(float(loss()))
    variable.assign(start)
    found = (ends[0] - ends[1]) / (2 * width)
    size = float(tf.norm(slope))
    share = 0.05 if "times" in variable.path else 0.02
    assert abs(found - expected) < share * size + 1e-3, variable.path
    assert size > 0, variable.path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ldm", "dit", "sd", "sd3"])
def test_a_search_from_folder_to_export(name, tmp_path, feature_file):
  """Random weights, K = 4: killed and resumed; exported and served."""
  denoiser, golden = read(name)
  if denoiser.conditions:
    denoiser = with_prompts(denoiser, golden)
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

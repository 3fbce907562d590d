"""Tests of the denoisers: parity with the original, conversions, bad files."""

import json
import os
import shutil

import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.formats import diffusers
from ddss_tf.networks import unet
from ddss_tf.reporting import inspection
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.errors import UserError
from project import TESTDATA

DATA = TESTDATA


@pytest.fixture(scope="module")
def digits_model():
  return ddss_tf.load_denoiser("digits16-ddpm")


def test_embedded_model_matches_pytorch(digits_model):
  # Outputs of the original library on CPU, fractional times among them.
  with np.load(os.path.join(DATA, "digits16_ddpm_golden.npz")) as golden:
    output = digits_model.network(golden["x"], golden["t"])
    assert np.any(golden["t"] % 1)
    np.testing.assert_allclose(output, golden["eps"], atol=1e-4)
    # One at a time, with a scalar time, is the same.
    np.testing.assert_allclose(
        digits_model.network(golden["x"][2:3], golden["t"][2]),
        golden["eps"][2:3], atol=1e-4)


def test_embedded_model_is_what_it_says(digits_model):
  assert digits_model.model.count_params() == 1_112_801
  assert digits_model.image_shape == (16, 16, 1)
  np.testing.assert_allclose(
      digits_model.schedule.betas, np.linspace(1e-4, 0.02, 1000))
  assert not digits_model.model.trainable_weights


def test_gaussian_denoiser_is_the_conditional_mean():
  # E[eps | x_t] of a joint Gaussian, from samples: regress eps on x_t.
  denoiser = ddss_tf.gaussian_denoiser((1, 1, 1), mean=0.3, std=0.5)
  rng = np.random.default_rng(0)
  for t in (50.0, 400.5, 900.0):
    abar = denoiser.schedule.abar(t)
    x0 = 0.3 + 0.5 * rng.normal(size=200_000)
    eps = rng.normal(size=200_000)
    x_t = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps
    slope, intercept = np.polyfit(x_t, eps, 1)
    points = np.array([-1.0, 0.0, 2.0], np.float32)
    np.testing.assert_allclose(
        np.ravel(denoiser.network(points.reshape(3, 1, 1, 1), t)),
        slope * points + intercept, atol=0.02)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_every_prediction_gives_the_same_eps(prediction):
  exact = ddss_tf.gaussian_denoiser((2, 2, 1), mean=0.2, std=0.5)
  x = tf.random.stateless_normal([5, 2, 2, 1], [0, 1])
  t = tf.constant([3.0, 100.5, 400.0, 800.0, 999.0])
  abar = exact.schedule.abar(t.numpy())[:, None, None, None]
  eps = exact.eps(x, t).numpy()
  x0 = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
  raw = {"eps": eps, "x0": x0,
         "v": np.sqrt(abar) * eps - np.sqrt(1 - abar) * x0}[prediction]

  class Table(keras.Model):  # Answers with the tabulated prediction.
    input_shape = ((None, 2, 2, 1), (None,))

    def call(self, inputs, training=False):
      return tf.constant(raw, tf.float32)

  denoiser = denoiser_lib.Denoiser(Table(), exact.schedule, prediction)
  np.testing.assert_allclose(denoiser.eps(x, t), eps, atol=2e-3)


def test_unknown_prediction():
  exact = ddss_tf.gaussian_denoiser((2, 2, 1))
  with pytest.raises(ValueError, match="eps, x0, v, score, flow, flow_reversed.*'mean'"):
    denoiser_lib.Denoiser(exact.model, exact.schedule, "mean")


@pytest.fixture()
def tiny_folder(tmp_path):
  """A tiny model in the diffusers layout: (folder, expected outputs)."""
  folder = tmp_path / "tiny"
  shutil.copytree(os.path.join(DATA, "tiny_unet2d"), folder)
  return str(folder)


def test_diffusers_folder_matches_pytorch(tiny_folder):
  # Symmetric downsampling, [cos, sin], no frequency shift, scale-shift, heads
  # of 4 channels, two blocks a level, v-prediction: all that the digits lack.
  denoiser = ddss_tf.load_denoiser(tiny_folder)
  with np.load(os.path.join(tiny_folder, "golden.npz")) as golden:
    np.testing.assert_allclose(
        denoiser.network(golden["x"], golden["t"]), golden["output"], atol=1e-4)
  assert denoiser.prediction == "v"
  np.testing.assert_allclose(
      denoiser.schedule.betas,
      np.linspace(0.00085**0.5, 0.012**0.5, 500) ** 2)


@pytest.mark.slow
def test_saved_pipeline(tiny_folder, tmp_path):
  """As `save_pretrained` of a pipeline leaves it."""
  alone = ddss_tf.load_denoiser(tiny_folder)
  pipeline = tmp_path / "pipeline"
  shutil.copytree(tiny_folder, pipeline / "unet")
  (pipeline / "scheduler").mkdir()
  shutil.move(pipeline / "unet" / diffusers.SCHEDULER,
              pipeline / "scheduler")
  index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.30.0",
           "scheduler": ["diffusers", "DDPMScheduler"],
           "unet": ["diffusers", "UNet2DModel"], "feature_extractor": [None] * 2}
  path = pipeline / "model_index.json"
  path.write_text(json.dumps(index))
  for part in ("", "unet", "unet/" + diffusers.WEIGHTS):
    cache = str(tmp_path / ("cache" + part.replace("/", "_")))
    # The second time from the cache.
    for _ in range(2):
      denoiser = ddss_tf.load_denoiser(str(pipeline / part), cache_dir=cache)
      assert denoiser.key == alone.key
  # Another scheduler is no copy of this one.
  scheduler = pipeline / "scheduler" / diffusers.SCHEDULER
  text = scheduler.read_text()
  scheduler.write_text(text.replace("v_prediction", "epsilon"))
  assert ddss_tf.load_denoiser(
      str(pipeline), cache_dir=str(tmp_path / "cache")).prediction == "eps"
  scheduler.unlink()
  with pytest.raises(UserError, match="must hold scheduler_config.json"):
    ddss_tf.load_denoiser(str(pipeline))
  path.write_text(json.dumps(index | {"vqvae": ["diffusers", "VQModel"]}))
  with pytest.raises(UserError, match="with a decoder must be one of LDM.*DDPMPipeline"):
    ddss_tf.load_denoiser(str(pipeline))
  path.write_text(json.dumps(index))
  shutil.rmtree(pipeline / "unet")
  with pytest.raises(UserError, match="config.json.*no folder"):
    ddss_tf.load_denoiser(str(pipeline))


def test_a_type_that_numpy_has_not(tiny_folder):
  path = os.path.join(tiny_folder, diffusers.WEIGHTS)
  header = json.dumps({"conv_in.bias": {
      "dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
  with open(path, "wb") as f:
    f.write(len(header).to_bytes(8, "little") + header + bytes(4))
  with pytest.raises(UserError, match="not a complete safetensors file of floa"):
    ddss_tf.load_denoiser(tiny_folder)


def test_old_names_of_attention(tiny_folder):
  expected = ddss_tf.load_denoiser(tiny_folder).sha256
  path = os.path.join(tiny_folder, diffusers.WEIGHTS)
  tensors = safetensors.numpy.load_file(path)
  for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                   ("to_out.0", "proj_attn")):
    tensors = {name.replace(f".{new}.", f".{old}."): value
               for name, value in tensors.items()}
  assert "mid_block.attentions.0.query.weight" in tensors
  safetensors.numpy.save_file(tensors, path)
  assert ddss_tf.load_denoiser(tiny_folder).sha256 == expected


def test_save_and_load(tiny_folder, tmp_path):
  denoiser = ddss_tf.load_denoiser(tiny_folder)
  denoiser.save(str(tmp_path / "own"))
  again = ddss_tf.load_denoiser(str(tmp_path / "own"))
  assert again.sha256 == denoiser.sha256
  assert again.prediction == "v"
  with np.load(os.path.join(tiny_folder, "golden.npz")) as golden:
    np.testing.assert_array_equal(
        again.network(golden["x"], golden["t"]),
        denoiser.network(golden["x"], golden["t"]))
  assert not any(v.value.trainable for v in again.model.weights)


@pytest.fixture(scope="module")
def conditional():
  """A tiny class-conditional network with random weights."""
  keras.utils.set_random_seed(0)
  model = unet.build_unet(unet.UNetConfig(
      image_size=4, in_channels=1, out_channels=1, channels=(4, 8),
      blocks_per_level=1, norm_groups=2, residual_down_levels=(0,),
      residual_up_levels=(1,), num_classes=3, mid_attention=False))
  # Keras draws small ones: give classes a say.
  table = model.get_layer("label_embedding")
  table.set_weights([20 * weight for weight in table.get_weights()])
  return denoiser_lib.Denoiser(
      model, ddss_tf.make_schedule("linear", 1000), "v", num_classes=3)


@pytest.fixture(scope="module")
def noise():
  return (tf.random.stateless_normal([3, 4, 4, 1], [0, 1]),
          tf.constant([3.0, 100.5, 999.0]))


def test_labels(conditional, noise):
  x, t = noise
  labels = np.array([2, 0, 1])
  eps = conditional.eps(x, t, labels).numpy()
  for i, label in enumerate(labels):
    # One at a time, with scalars, is the same.
    np.testing.assert_allclose(
        conditional.eps(x[i:i + 1], t[i], label), eps[i:i + 1], atol=1e-5)
    same, other = (conditional.network(x[i:i + 1], t[i], given)
                   for given in (label, (label + 1) % 3))
    assert np.abs(same - other).max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_eps_takes_labels(conditional, noise, jit_compile):
  x, t = noise
  labels = tf.constant([2, 0, 1])
  compiled = conditional.compiled_eps(jit_compile)
  assert compiled is conditional.compiled_eps(jit_compile)
  np.testing.assert_allclose(
      compiled(x, t, labels), conditional.eps(x, t, labels), atol=1e-5)

  def slope(function):
    with tf.GradientTape() as tape:
      tape.watch(t)
      total = tf.reduce_sum(function(x, t, labels) ** 2)
    return tape.gradient(total, t).numpy()

  assert np.all(slope(conditional.eps))
  np.testing.assert_allclose(
      slope(compiled), slope(conditional.eps), rtol=1e-3, atol=1e-5)
  with pytest.raises(ValueError, match="labels must be given"):
    compiled(x, t)


def test_wrong_labels(conditional, noise, digits_model):
  for labels, words in ((None, "must be given.*3 classes"),
                        (3, r"\[0, 2\].*3 to 3"),
                        ([0, -1, 2], r"\[0, 2\].*-1 to 2"),
                        ([0.0, 1.0, 2.0], "whole numbers.*float32")):
    with pytest.raises(ValueError, match=words):
      conditional.network(*noise, labels)
  with pytest.raises(ValueError, match="must be None.*digits16-ddpm"):
    digits_model.network(tf.zeros([1, 16, 16, 1]), 3.0, 1)


def test_classes_must_fit_the_model(conditional, digits_model):
  for model, num_classes in ((conditional.model, None),
                             (digits_model.model, 10)):
    with pytest.raises(ValueError, match="three inputs"):
      denoiser_lib.Denoiser(model, conditional.schedule, num_classes=num_classes)


@pytest.mark.slow
def test_save_and_load_with_classes(conditional, noise, tmp_path):
  conditional.save(str(tmp_path))
  again = ddss_tf.load_denoiser(str(tmp_path))
  assert again.num_classes == 3
  np.testing.assert_array_equal(
      again.eps(*noise, [0, 1, 2]), conditional.eps(*noise, [0, 1, 2]))
  assert "classes      3" in inspection.inspect(denoiser=again)
  edit(tmp_path, "denoiser.json", num_classes=None)
  refused(tmp_path, "damaged", "num_classes")


def refused(path, *words):
  with pytest.raises(UserError) as error:
    ddss_tf.load_denoiser(str(path))
  message = str(error.value).split("\n  In call to configurable")[0]
  assert "\n" not in message
  for word in words:
    assert word in message, message


def edit(folder, name, **changes):
  path = os.path.join(folder, name)
  with open(path) as f:
    values = json.load(f)
  values.update(changes)
  with open(path, "w") as f:
    json.dump(values, f)


@pytest.mark.parametrize("changes,words", [
    (dict(act_fn="tanh"), ["act_fn", "'silu'", "'tanh'"]),
    (dict(class_embed_type="timestep"), ["class_embed_type"]),
    (dict(brand_new_key=1), ["brand_new_key"]),
    (dict(down_block_types=["SkipDownBlock2D", "DownBlock2D"]),
     ["SkipDownBlock2D"]),
    (dict(up_block_types=["UpBlock2D", "UpBlock2D"]), ["attention"]),
    (dict(block_out_channels=[8, 12]), ["shape"]),
    (dict(layers_per_block=1), ["Unused"]),
    (dict(layers_per_block=3), ["Missing"]),
    (dict(_class_name="UNet3DConditionModel"), ["UNet3DConditionModel"]),
])
def test_architectures_that_are_refused(tiny_folder, changes, words):
  edit(tiny_folder, "config.json", **changes)
  refused(tiny_folder, *words)


@pytest.mark.parametrize("changes,words", [
    (dict(beta_schedule="sigmoid"), ["beta_schedule", "'sigmoid'"]),
    (dict(prediction_type="flow"), ["prediction_type", "'flow'"]),
    (dict(rescale_betas_zero_snr=True, prediction_type="epsilon"),
     ["rescale_betas_zero_snr", "'epsilon'"]),
    (dict(_class_name="FlowMatchEulerDiscreteScheduler"),
     ["with betas", "'FlowMatchEulerDiscreteScheduler'"]),
    (dict(_class_name="ScoreSdeVeScheduler"), ["'ScoreSdeVeScheduler'"]),
    (dict(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True),
     ["use_flow_sigmas", "True"]),
    (dict(_class_name="EulerDiscreteScheduler", timestep_type="continuous"),
     ["timestep_type", "'continuous'"]),
])
def test_schedules_that_are_refused(tiny_folder, changes, words):
  edit(tiny_folder, "scheduler_config.json", **changes)
  refused(tiny_folder, *words)


@pytest.mark.slow
@pytest.mark.parametrize("name,abar", [
    # Of diffusers 0.42: alphas_cumprod at 0, 500, 998 of DDIMScheduler.
    ("scaled_linear", [0.9991499781608582, 0.24101854860782623,
                       1.9679629303936963e-07]),
    ("linear", [0.9991499781608582, 0.14151257276535034,
                6.27736440605986e-08]),
    ("squaredcos_cap_v2", [0.9999587535858154, 0.4922648072242737,
                           2.277813109685667e-06])])
@pytest.mark.parametrize("kind", [
    "v_prediction", pytest.param("sample", marks=pytest.mark.slow)])
def test_schedules_of_zero_snr(tiny_folder, name, abar, kind):
  edit(tiny_folder, "scheduler_config.json", beta_schedule=name,
       beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
       prediction_type=kind, rescale_betas_zero_snr=True, trained_betas=None)
  denoiser = ddss_tf.load_denoiser(tiny_folder)
  # float32 products there: the last value is off by its own cancellation.
  np.testing.assert_allclose(
      denoiser.schedule.abar([0, 500]), abar[:2], rtol=1e-4)
  np.testing.assert_allclose(denoiser.schedule.abar(998), abar[2], rtol=0.05)
  assert denoiser.schedule.betas[-1] == 1
  sampler = ddss_tf.make_sampler(
      denoiser.schedule, "ddim", 3, stride=[999, 500, 100])
  images = generator_lib.Generator(denoiser, 2, jit_compile=False).images(
      sampler.coefficients(), 2, 0)
  assert np.all(np.isfinite(images)) and np.abs(images).max() < 50


@pytest.mark.parametrize("name,betas", [
    ("PNDMScheduler", np.linspace(1e-4, 0.02, 1000)),
    ("HeunDiscreteScheduler", np.linspace(0.00085, 0.012, 1000)),
    ("LCMScheduler", np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2)])
def test_a_scheduler_says_what_its_configuration_leaves_out(
    tiny_folder, name, betas):
  with open(os.path.join(tiny_folder, "scheduler_config.json"), "w") as f:
    json.dump({"_class_name": name}, f)
  np.testing.assert_allclose(
      ddss_tf.load_denoiser(tiny_folder).schedule.betas, betas)


def test_damaged_files(tiny_folder, tmp_path):
  refused(tmp_path / "nowhere", "nowhere", "digits16-ddpm")
  (tmp_path / "empty").mkdir()
  refused(tmp_path / "empty", "denoiser.json", "config.json")
  weights = os.path.join(tiny_folder, diffusers.WEIGHTS)
  with open(weights, "rb") as f:
    whole = f.read()
  with open(weights, "wb") as f:
    f.write(whole[:len(whole) // 2])
  refused(tiny_folder, "not a complete safetensors file")
  tensors = safetensors.numpy.load(whole)
  tensors["conv_in.bias"] = tensors["conv_in.bias"] * np.float32("nan")
  safetensors.numpy.save_file(tensors, weights)
  refused(tiny_folder, "conv_in.bias", "NaN")
  os.remove(weights)
  refused(tiny_folder, diffusers.WEIGHTS)
  with open(os.path.join(tiny_folder, "config.json"), "w") as f:
    f.write("{")
  refused(tiny_folder, "not JSON")


@pytest.mark.slow
def test_damaged_own_format(tmp_path):
  folder = str(tmp_path / "own")
  ddss_tf.load_denoiser("digits16-ddpm").save(folder)
  edit(folder, "denoiser.json", sha256="0" * 64)
  refused(folder, "0" * 64, "SHA-256")
  network = os.path.join(folder, "network.keras")
  with open(network, "r+b") as f:
    f.truncate(os.path.getsize(network) // 2)
  refused(folder, "not a complete and safe Keras file")
  os.remove(network)
  refused(folder, "no network.keras")
  with open(os.path.join(folder, "denoiser.json"), "w") as f:
    f.write("[]")
  refused(folder, "damaged")


def test_the_embedded_model_is_the_one_of_the_results():
  denoiser = ddss_tf.load_denoiser("digits16-ddpm")
  with open(os.path.join(
      os.path.dirname(DATA), os.pardir, "results", "digits16",
      "metrics.json")) as f:
    records = json.load(f)
  assert {json.dumps(record["denoiser"]) for record in records} == {
      json.dumps(denoiser.identity)}
  assert denoiser.key == denoiser.sha256 == denoiser_lib.weights_sha256(
      denoiser.model)


def test_what_a_network_means_is_part_of_what_it_is():
  """Or a record of a wrong prediction would be taken for the right one's."""
  exact = ddss_tf.gaussian_denoiser((4, 4, 1))
  keys, identities = zip(*(
      (d.key, json.dumps(d.identity)) for d in (
          ddss_tf.Denoiser(exact.model, exact.schedule, prediction, **more)
          for prediction, more in (
              ("eps", {}), ("v", {}), ("x0", {}), ("eps", {"time_scale": 0.5}),
              ("eps", {"time_offset": 1.0})))))
  assert len(set(keys)) == len(set(identities)) == 5
  assert set(json.loads(identities[0])) == {"name", "sha256"}

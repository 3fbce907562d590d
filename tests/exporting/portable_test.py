"""Tests of the exports to other runtimes, in these runtimes."""

import html
import importlib.util
import os
import re
import warnings

import conditional_parts
import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.exporting import portable
from ddss_tf.networks import unet
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import generator as generator_lib

needs = {name: pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in modules),
    reason=f"the extra {name!r} is not installed")
         for name, modules in portable._MODULES.items()}
each_format = pytest.mark.parametrize("name", [
    pytest.param(name, marks=needs[name]) for name in portable.FORMATS])


def write_run(path, denoiser, coefficients, x0_bound=None):
  """A run directory with a sampler in it."""
  card.write(str(path / run_dir_lib.SAMPLER), card.SamplerCard(
      "DDPM", coefficients.numpy(), denoiser.identity, {}, x0_bound))
  return str(path)


@pytest.fixture
def run(tmp_path, gaussian_parts):
  """A run directory with a stochastic sampler in it."""
  denoiser = gaussian_parts["denoiser"]
  return write_run(tmp_path, denoiser, ddss_tf.solver_coefficients(
      denoiser.schedule, "ddpm", 3), "clip")


@each_format
def test_another_runtime_makes_our_images(name, run, gaussian_parts):
  denoiser = gaussian_parts["denoiser"]
  ddss_tf.export(run, denoiser, also=[name])
  with open(os.path.join(run, run_dir_lib.ALSO[name]), "rb") as f:
    content = f.read()
  found = card.read(os.path.join(run, run_dir_lib.SAMPLER))
  received = {"onnx": portable._run_onnx, "tflite": portable._run_tflite}[name]
  for batch, seed in ((5, 1), (1, 2)):  # Of any size, not only the checked one.
    x_T, step_noise = chain.draw_noise(
        generator_lib.seed_pair(seed), np.arange(batch), denoiser.image_shape, 3)
    expected = np.clip(chain.run_chain(
        denoiser.eps, found.coefficients, x_T, step_noise, x0_bound="clip"),
                       -1, 1)
    images = received(content, {"x_T": x_T.numpy(),
                                "step_noise": step_noise.numpy()})
    np.testing.assert_allclose(images, expected, atol=1e-4)
    assert np.std(images) > 0.02


@each_format
def test_the_report_says_how_to_run_it(name, run, gaussian_parts):
  ddss_tf.export(run, gaussian_parts["denoiser"], also=[name])
  with open(ddss_tf.report(run)) as f:
    snippets = [html.unescape(text) for text in re.findall(
        "<pre><code>(.*?)</code></pre>", f.read(), re.DOTALL)]
  snippet, = (text for text in snippets if run_dir_lib.ALSO[name] in text)
  received = {}
  exec(snippet, received)
  x_T, step_noise = received["noise"]["x_T"], received["noise"]["step_noise"]
  found = card.read(os.path.join(run, run_dir_lib.SAMPLER))
  expected = np.clip(chain.run_chain(
      gaussian_parts["denoiser"].eps, found.coefficients, x_T, step_noise,
      x0_bound="clip"), -1, 1)
  assert len(x_T) == 16 and np.std(expected) > 0.02
  np.testing.assert_allclose(received["images"], expected, atol=1e-4)


def check_classes(name, run, denoiser, classes, other):
  """Exports, and compares images of classes, of batches of any size.

  Args:
    name: of the format.
    run: directory, with a sampler.
    denoiser: class-conditional.
    classes: of the images, of one batch.
    other: a class each of which changes its image.
  """
  ddss_tf.export(run, denoiser, also=[name])
  with open(os.path.join(run, run_dir_lib.ALSO[name]), "rb") as f:
    content = f.read()
  found = card.read(os.path.join(run, run_dir_lib.SAMPLER)).coefficients
  received = {"onnx": portable._run_onnx, "tflite": portable._run_tflite}[name]
  for batch, seed in ((len(classes), 1), (1, 2)):
    x_T, step_noise = chain.draw_noise(
        generator_lib.seed_pair(seed), np.arange(batch), denoiser.image_shape,
        found.num_steps)

    def images(labels):
      inputs = {"x_T": x_T.numpy(), "step_noise": step_noise.numpy(),
                "labels": np.array(labels, np.int32)}
      expected = np.clip(chain.run_chain(
          denoiser_lib.with_labels(denoiser.eps, inputs["labels"]), found, x_T,
          step_noise), -1, 1)
      # Not at the bounds, where all are the same.
      assert np.std(expected) > 0.02
      result = received(content, inputs)
      np.testing.assert_allclose(result, expected, atol=1e-4)
      return result

    difference = images(classes[:batch]) - images([other] * batch)
    assert np.all(np.abs(difference).max((1, 2, 3)) > 0.02)
  return content


def inputs_of(name, content):
  """Inputs that a file asks for: {name: (dtype, rank)}."""
  if name == "onnx":
    import onnxruntime  # pylint: disable=g-import-not-at-top
    dtypes = {"tensor(float)": np.float32, "tensor(int32)": np.int32}
    return {value.name: (dtypes[value.type], len(value.shape))
            for value in onnxruntime.InferenceSession(
                content, providers=["CPUExecutionProvider"]).get_inputs()}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    runner = tf.lite.Interpreter(
        model_content=content).get_signature_runner("serving_default")
  return {key: (value["dtype"], len(value["shape"]))
          for key, value in runner.get_input_details().items()}


@pytest.mark.slow
@each_format
@pytest.mark.parametrize("scale,scales", [
    pytest.param(None, None, marks=pytest.mark.slow),
    pytest.param(1.3, None, marks=pytest.mark.slow),
    (None, [0.5, 1.4, 0.8])])
def test_classes_in_another_runtime(name, scale, scales, tmp_path):
  """Without guidance, with one scale of it, and with one of each step."""
  denoiser = conditional_parts.make(
      null_label=conditional_parts.NULL, guidance_scale=scale)
  coefficients = ddss_tf.solver_coefficients(
      denoiser.schedule, "ddpm", 3)._replace(guidance_scales=scales)
  content = check_classes(
      name, write_run(tmp_path, denoiser, coefficients), denoiser,
      [0, 2, 0, 2, 0], other=3)
  # Scales are in the file: nothing is asked for but noise and classes.
  assert inputs_of(name, content) == {
      "x_T": (np.float32, 4), "step_noise": (np.float32, 5),
      "labels": (np.int32, 1)}


@pytest.mark.slow
@each_format
def test_a_network_of_classes_in_another_runtime(name, tmp_path):
  """A U-Net with a table of classes, attention and the exact GELU."""
  keras.utils.set_random_seed(0)
  model = unet.build_unet(unet.UNetConfig(
      image_size=4, in_channels=1, out_channels=1, channels=(4, 8),
      blocks_per_level=1, norm_groups=2, num_classes=3, activation="gelu"))
  # Keras draws small ones: give classes a say.
  table = model.get_layer("label_embedding")
  table.set_weights([20 * weight for weight in table.get_weights()])
  denoiser = denoiser_lib.Denoiser(
      model, ddss_tf.make_schedule("linear", 1000), "v", num_classes=3,
      null_label=2, guidance_scale=1.5)
  run = write_run(tmp_path, denoiser, ddss_tf.solver_coefficients(
      denoiser.schedule, "ddpm", 2))
  check_classes(name, run, denoiser, [0, 1, 0], other=2)


@needs["onnx"]
@pytest.mark.parametrize("function,oracle,tolerances,places", [
    (tf.math.expm1, np.expm1, dict(rtol=1e-6),
     [-30.0, -2.0, -1e-3, -1e-12, 1e-6, 0.1, 20.0]),
    (tf.math.log1p, np.log1p, dict(rtol=1e-6),
     [-0.99, -1e-3, 1e-12, 1e-6, 1e-3, 0.1, 2.0, 50.0, 1e6]),
    (tf.math.erfc, scipy.special.erfc, dict(atol=3e-7),
     [-9.0, -1.0, -1e-6, 0.0, 0.3, 1.0, 9.0])])
def test_functions_that_onnx_lacks(function, oracle, tolerances, places):
  x = np.array(places, np.float32)

  @tf.function(autograph=False, input_signature=[
      tf.TensorSpec([None], tf.float32, "x_T")])
  def from_noise(x_T):
    return {"images": function(x_T)}

  received = portable._run_onnx(
      portable._to_onnx(None, from_noise), {"x_T": x})
  np.testing.assert_allclose(
      received, oracle(x.astype(np.float64)), **{"rtol": 0, **tolerances})


@pytest.mark.slow
@each_format
def test_the_digits_in_another_runtime(name, tmp_path):
  # Minutes: the converters walk through the U-Net five times. `export` compares
  # the images itself, and leaves no file if they differ.
  ddss_tf.export(
      str(tmp_path), ddss_tf.load_denoiser("digits16-ddpm"), also=[name],
      sampler="digits16-ddpm-k5-ggdm+pred+time")
  # The weights are there once, not once a step.
  size = os.path.getsize(tmp_path / run_dir_lib.ALSO[name])
  assert 4e6 < size < 8e6


@pytest.mark.slow
def test_images_that_differ_leave_no_file(run, gaussian_parts, monkeypatch):
  monkeypatch.setattr(portable, "_run_tflite",
                      lambda content, inputs: inputs["x_T"])
  with pytest.raises(ddss_tf.UserError, match="a difference of"):
    ddss_tf.export(run, gaussian_parts["denoiser"], also=["tflite"])
  assert not os.path.exists(os.path.join(run, "sampler.tflite"))


def test_a_missing_extra_is_named(run, gaussian_parts, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
  with pytest.raises(ddss_tf.UserError,
                     match=r"tf2onnx.*pip install 'ddss_tf\[onnx\]'"):
    ddss_tf.export(run, gaussian_parts["denoiser"], also=["onnx"])
  # Before anything was written.
  assert not os.path.exists(os.path.join(run, "export"))


def test_an_unknown_form_is_refused(run, gaussian_parts):
  with pytest.raises(ddss_tf.UserError, match="export.also .* 'coreml'"):
    ddss_tf.export(run, gaussian_parts["denoiser"], also=["coreml"])


def test_a_scheduler_of_diffusers_beside_it(run, gaussian_parts):
  ddss_tf.export(run, gaussian_parts["denoiser"], also="diffusers")
  assert sorted(os.listdir(os.path.join(run, "diffusers_scheduler"))) == [
      "scheduler_config.json", "scheduling_ddss.py"]

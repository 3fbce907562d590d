"""Tests of the exports to other runtimes, in these runtimes."""

import importlib.util
import os

import numpy as np
import pytest

import ddss_tf
from ddss_tf import card
from ddss_tf import chain
from ddss_tf import exporting
from ddss_tf import portable
from ddss_tf import sampling

needs = {name: pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in modules),
    reason=f"the extra {name!r} is not installed")
         for name, modules in portable._MODULES.items()}
each_format = pytest.mark.parametrize("name", [
    pytest.param(name, marks=needs[name]) for name in portable.FORMATS])


@pytest.fixture
def run(tmp_path, gaussian_parts):
  """A run directory with a stochastic sampler in it."""
  denoiser = gaussian_parts["denoiser"]
  coefficients = ddss_tf.solver_coefficients(denoiser.schedule, "ddpm", 3)
  card.write(str(tmp_path / card.FILE), card.SamplerCard(
      "DDPM", coefficients.numpy(), denoiser.identity, {}, "clip"))
  return str(tmp_path)


@each_format
def test_another_runtime_makes_our_images(name, run, gaussian_parts):
  denoiser = gaussian_parts["denoiser"]
  ddss_tf.export(run, denoiser, also=[name])
  with open(os.path.join(run, exporting.ALSO[name]), "rb") as f:
    content = f.read()
  found = card.read(os.path.join(run, card.FILE))
  received = {"onnx": portable._run_onnx, "tflite": portable._run_tflite}[name]
  for batch, seed in ((5, 1), (1, 2)):  # Of any size, not only the checked one.
    x_T, step_noise = chain.draw_noise(
        sampling.seed_pair(seed), np.arange(batch), denoiser.image_shape, 3)
    expected = np.clip(chain.run_chain(
        denoiser.eps, found.coefficients, x_T, step_noise, x0_bound="clip"),
                       -1, 1)
    images = received(content, {"x_T": x_T.numpy(),
                                "step_noise": step_noise.numpy()})
    np.testing.assert_allclose(images, expected, atol=1e-4)
    assert np.std(images) > 0.02


@pytest.mark.slow
@each_format
def test_the_digits_in_another_runtime(name, tmp_path):
  # Minutes: the converters walk through the U-Net five times. `export` compares
  # the images itself, and leaves no file if they differ.
  ddss_tf.export(
      str(tmp_path), ddss_tf.load_denoiser("digits16-ddpm"), also=[name],
      sampler="digits16-ddpm-k5-ggdm+pred+time")
  # The weights are there once, not once a step.
  size = os.path.getsize(tmp_path / exporting.ALSO[name])
  assert 4e6 < size < 8e6


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

"""Tests of the package as a library, without gin."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys

import keras
import numpy as np
from PIL import Image
import pytest

import ddss_tf
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.denoisers import denoiser as denoiser_lib
from project import ROOT



def test_public_names_have_documentation():
  for name in ddss_tf.__all__:
    value = getattr(ddss_tf, name)
    assert value.__doc__ and len(value.__doc__.splitlines()[0]) > 10, name
    if inspect.isfunction(value):
      assert "<object object" not in str(inspect.signature(value)), name
      for parameter in inspect.signature(value).parameters:
        if parameter != "options":
          # Every argument is explained.
          assert re.search(
              rf"^ +\**{parameter}:", value.__doc__, re.M), (name, parameter)
  signature = str(inspect.signature(ddss_tf.search))
  assert "batch_size: int = REQUIRED" in signature
  with pytest.raises(AttributeError, match="no attribute 'find_sampler'"):
    ddss_tf.find_sampler  # pylint: disable=pointless-statement


def test_names_for_editors_are_the_public_ones():
  with open(ddss_tf.__file__ + "i") as f:
    text = f.read()
  checked = re.findall(r"^from \.[\w.]* import (.+)$", text, re.M)
  names = {name.split(" as ")[0] for line in checked for name in line.split(", ")}
  assert names == set(ddss_tf.__all__)


def test_import_is_quick():
  code = ("import sys, ddss_tf; "
          "sys.exit('tensorflow' in sys.modules or 'numpy' in sys.modules)")
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_search_takes_arrays_and_a_sampler(gaussian_parts, tmp_path):
  denoiser = gaussian_parts["denoiser"]
  images = np.clip(gaussian_parts["dataset"].images, -1, 1)
  features = gaussian_parts["features"]
  options = dict(num_search_steps=1, batch_size=8, validation_samples=8,
                 pool_samples=16, jit_compile=False)
  make = lambda schedule: ddss_tf.make_sampler(schedule, "ggdm", num_steps=2)
  a = ddss_tf.search(denoiser, make(denoiser.schedule), features, images,
                     run_dir=str(tmp_path / "a"), **options)
  b = ddss_tf.search(denoiser, make, features, dataset_lib.as_dataset(images),
                     run_dir=str(tmp_path / "b"), **options)
  for name, x, y in zip(a.coefficients()._fields, a.coefficients(),
                        b.coefficients()):
    np.testing.assert_array_equal(x, y, err_msg=name)
  for bad, words in ((images[0], "shape"), (images + 9, r"\[-1, 1\]"),
                     ((images * 100).astype(np.uint8), "uint8"),
                     (images * np.nan, "finite")):
    with pytest.raises(ddss_tf.UserError, match=words):
      ddss_tf.search(denoiser, make, features, bad,
                     run_dir=str(tmp_path / "c"), **options)
  with pytest.raises(ddss_tf.UserError, match="init is 'auto'"):
    ddss_tf.search(denoiser, ddss_tf.make_sampler(
        denoiser.schedule, "ggdm", num_steps=2, init="auto"), features, images,
                   run_dir=str(tmp_path / "c"), **options)


@pytest.mark.slow  # A page of the documentation runs much the same.
@pytest.mark.parametrize("model", ["gaussian", "tiny_unet2d"])
def test_quick_start(model, tmp_path, monkeypatch):
  spec = importlib.util.spec_from_file_location(
      "quick_start", os.path.join(ROOT, "examples", "quick_start.py"))
  quick_start = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(quick_start)
  # Compiling with XLA would take longer than all else.
  compiled = denoiser_lib.Denoiser.compiled_eps
  monkeypatch.setattr(denoiser_lib.Denoiser, "compiled_eps",
                      lambda self, jit_compile=True, remat=False: compiled(
                          self, False, remat))
  if model == "gaussian":
    path = str(tmp_path / model)
    ddss_tf.gaussian_denoiser((8, 8, 3)).save(path)
  else:
    path = os.path.join(ROOT, "tests", "testdata", model)
  rng = np.random.default_rng(0)
  os.mkdir(tmp_path / "images")
  for i in range(24):
    Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(
        tmp_path / "images" / f"{i}.png")
  keras.utils.set_random_seed(0)
  inputs = keras.Input((8, 8, 3))
  x = keras.layers.Flatten()(keras.layers.Conv2D(4, 3, strides=2)(inputs))
  x = keras.layers.Dense(6, activation="tanh", name="pool")(x)
  keras.Model(inputs, keras.layers.Dense(3, name="logits")(x)).save(
      tmp_path / "features.keras")
  run = str(tmp_path / "run")
  records = quick_start.main(
      path, str(tmp_path / "images"), run, str(tmp_path / "features.keras"),
      num_steps=2, num_samples=8, num_search_steps=1, batch_size=4,
      gradient_samples=2, pool_samples=8, validation_samples=4)
  assert records[-1]["sampler"] == "GGDM+PRED+TIME"
  assert records[-1]["num_real"] == 24
  for name in ("sampler.json", "metrics.json", "export/saved_model.pb",
               "diffusers_scheduler/scheduling_ddss.py", "generated.png"):
    assert os.path.exists(os.path.join(run, name)), name


def test_one_version():
  with open(os.path.join(ROOT, "CHANGELOG.md")) as f:
    newest = re.search(r"^## ([\d.]+)", f.read(), re.M).group(1)
  assert newest == ddss_tf.__version__


def test_what_is_missing_is_told_in_one_line(gaussian_parts):
  schedule = gaussian_parts["denoiser"].schedule
  for call, words in (
      (lambda: ddss_tf.make_sampler(schedule, "ggdm"),
       "make_sampler: num_steps must be given. Received: family, schedule"),
      (ddss_tf.load_features,
       "load_features: path must be given. Received: no arguments"),
      (lambda: ddss_tf.search(run_dir="x", num_search_steps=3),
       "search: denoiser, sampler, features, dataset, batch_size must be given"),
      # gin would append the calls that led here.
      (lambda: ddss_tf.make_sampler(schedule, "ggdm", 2, init="nobody"),
       "Received: 'nobody'")):
    with pytest.raises(ddss_tf.UserError) as caught:
      call()
    assert str(caught.value).endswith(words) or words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_objects_say_what_they_are(gaussian_parts):
  schedule = ddss_tf.NoiseSchedule.linear()
  assert repr(schedule) == (
      "NoiseSchedule(T=1000, alpha_bar from 0.9999 to 4.036e-05)")
  assert repr(gaussian_parts["denoiser"]) == (
      f"Denoiser('gaussian', [4, 4, 1], prediction='eps', {schedule!r})")
  assert repr(gaussian_parts["dataset"]).startswith(
      "ImageDataset('gaussian', 400 images of 4 x 4 x 1, sha256=")
  assert repr(gaussian_parts["features"]).startswith("FeatureNetwork('random', ")
  assert repr(ddss_tf.make_sampler(schedule, "ddim", 5)) == (
      "SolverSampler('DDIM linear', num_steps=5)")


@pytest.mark.slow
def test_a_type_checker_knows_the_arguments(tmp_path):
  pytest.importorskip("mypy")
  script = tmp_path / "user.py"
  script.write_text(
      "import ddss_tf\n"
      "reveal_type(ddss_tf.search)\n"
      "ddss_tf.make_sampler(ddss_tf.make_schedule(), 'ggdm', num_steps=3)\n"
      "ddss_tf.evaluate('runs/mine', num_sample=3)\n"
      "ddss_tf.evaluate('runs/mine', num_samples=3)\n", encoding="utf-8")
  found = subprocess.run(
      [sys.executable, "-m", "mypy", "--ignore-missing-imports",
       "--follow-imports=silent", str(script)], cwd=ROOT, capture_output=True,
      text=True, check=False).stdout.splitlines()
  revealed = next(line for line in found if "Revealed type" in line)
  assert "num_search_steps: int" in revealed and "run_dir: str" in revealed
  (error,) = [line for line in found if ": error:" in line]
  assert ":4: error" in error and '"num_sample" for "evaluate"' in error, error

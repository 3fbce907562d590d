"""Tests of the scheduler that is written for diffusers, in pipelines of images.

The fixture is what diffusers' own pipeline made with it. CI has no PyTorch, so
there the written configuration and the class are tied to the fixture; set
DDSS_TORCH_PYTHON to a Python with torch and diffusers to run it again.
"""

import hashlib
import json
import os
import subprocess

import pages
import numpy as np
import pytest
import scheduler_cases

import ddss_tf
from ddss_tf.exporting import diffusers_scheduler
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from project import ROOT, SUPPORT

FIXTURE = os.path.join(scheduler_cases.TESTDATA, "schedulers.npz")
TORCH = os.environ.get("DDSS_TORCH_PYTHON")


@pytest.fixture(scope="module")
def cases():
  return scheduler_cases.cases()


@pytest.fixture(scope="module")
def golden():
  with np.load(FIXTURE) as arrays:
    return dict(arrays)


@pytest.mark.slow
def test_the_fixture_is_of_these_cases(cases, golden):
  assert {key.split("/")[0] for key in golden} - {"template_sha256"} == set(
      cases)


@pytest.mark.slow
def test_images_of_diffusers_are_ours(cases, golden, tmp_path):
  for name, (sampler, denoiser, _) in cases.items():
    folder = str(tmp_path / name)
    diffusers_scheduler.write(folder, sampler, denoiser)
    with open(os.path.join(folder, "scheduler_config.json")) as f:
      assert json.load(f) == json.loads(str(golden[f"{name}/config"])), name
    images = chain.run_chain(
        denoiser.compiled_eps(jit_compile=False), sampler.coefficients,
        golden[f"{name}/x_T"], golden[f"{name}/noise"],
        x0_bound=sampler.x0_bound).numpy()
    theirs = golden[f"{name}/images"]
    assert np.std(theirs) > 0.1 and np.mean(np.abs(theirs) < 1) > 0.2, name
    np.testing.assert_allclose(images, theirs, atol=1e-4, err_msg=name)


def test_the_fixture_is_of_this_class(golden):
  """Of another one: write the fixture anew, by its tool."""
  with open(diffusers_scheduler._TEMPLATE, "rb") as f:
    assert hashlib.sha256(f.read()).hexdigest() == str(
        golden["template_sha256"])


@pytest.mark.slow
def test_the_coefficients_are_kept_exactly(cases, golden):
  for name, (sampler, denoiser, _) in cases.items():
    config = json.loads(str(golden[f"{name}/config"]))
    for key, value in sampler.coefficients.arrays().items():
      np.testing.assert_array_equal(np.float32(config[key]), value)
    np.testing.assert_array_equal(
        config["trained_betas"], denoiser.schedule.betas)
    assert config["denoiser"]["sha256"] == denoiser.sha256


def test_only_a_schedulers_folder_is_replaced(cases, tmp_path):
  sampler, denoiser, _ = cases["tiny_ddpm_k10"]
  folder = str(tmp_path / "scheduler")
  diffusers_scheduler.write(folder, sampler, denoiser)
  diffusers_scheduler.write(folder, sampler, denoiser)
  assert sorted(os.listdir(folder)) == [
      "scheduler_config.json", "scheduling_ddss.py"]
  with pytest.raises(ddss_tf.UserError, match="must be new"):
    diffusers_scheduler.write(str(tmp_path), sampler, denoiser)
  assert os.listdir(tmp_path) == ["scheduler"]


@pytest.mark.skipif(not TORCH, reason="DDSS_TORCH_PYTHON is not set")
def test_the_fixture_in_pytorch(cases, golden, tmp_path):
  folder, path = str(tmp_path / "cases"), str(tmp_path / "again.npz")
  for name, (sampler, denoiser, model) in cases.items():
    if model == "tiny_unet2d":
      diffusers_scheduler.write(
          os.path.join(folder, model, name), sampler, denoiser)
  subprocess.run(
      [TORCH, os.path.join(ROOT, "tools", "dump_scheduler_fixture.py"), folder,
       path, os.path.join(scheduler_cases.TESTDATA, "tiny_unet2d")],
      check=True)
  with np.load(path) as again:
    for name in (key for key in again if key.startswith("tiny")):
      if name.endswith("/config"):
        assert str(again[name]) == str(golden[name])
      else:
        np.testing.assert_allclose(
            again[name], golden[name], atol=1e-5, err_msg=name)


@pytest.mark.skipif(not TORCH, reason="DDSS_TORCH_PYTHON is not set")
def test_the_class_in_pytorch(cases, tmp_path):
  sampler, denoiser, _ = cases["tiny_v_None_k5"]
  diffusers_scheduler.write(str(tmp_path / "scheduler"), sampler, denoiser)
  subprocess.run(
      [TORCH, os.path.join(SUPPORT, "scheduler_in_torch.py"),
       str(tmp_path / "scheduler"),
       os.path.join(scheduler_cases.TESTDATA, "tiny_unet2d"),
       str(tmp_path / "pipeline")], check=True)


@pytest.mark.skipif(not TORCH, reason="DDSS_TORCH_PYTHON is not set")
def test_the_code_of_the_readme_in_pytorch(cases, tmp_path):
  sampler, denoiser, _ = cases["tiny_v_None_k5"]
  folder = tmp_path / "runs" / "demo" / "diffusers_scheduler"
  folder.parent.mkdir(parents=True)
  diffusers_scheduler.write(str(folder), sampler, denoiser)
  (code,) = [
      block for block in pages.blocks("README.md") if "DDSS" in block]
  model = os.path.join(scheduler_cases.TESTDATA, "tiny_unet2d")
  before = f"""
import sys
sys.path.insert(0, "runs/demo/diffusers_scheduler")
import diffusers, numpy
pipe = diffusers.DDPMPipeline(
    diffusers.UNet2DModel.from_pretrained({model!r}),
    diffusers.DDPMScheduler())
"""
  after = """
(image,) = map(numpy.asarray, images)
assert image.dtype == numpy.uint8 and image.std() > 5, image
"""
  subprocess.run([TORCH, "-c", before + code + after], cwd=tmp_path, check=True)


def test_a_damaged_card_is_refused(tmp_path, cases):
  sampler = cases["digits_vars_k5"][0]
  path = str(tmp_path / "card.json")
  card.write(path, sampler)
  with open(path) as f:
    values = json.load(f)
  values["coefficients"]["times"][0] += 1  # Not what the figures are of.
  with open(path, "w") as f:
    json.dump(values, f)
  with pytest.raises(ddss_tf.UserError, match="own coefficients"):
    card.read(path)

"""Tests of the scheduler for diffusers in pipelines of latents, flows and guidance.

The fixture is what diffusers' own pipelines made with it, and what their networks
were asked and answered. Our chain is fed with these answers where it asks the
same, so that it needs no network of text here. CI has no PyTorch; set
DDSS_TORCH_PYTHON to a Python with torch, diffusers and, for pipelines of text,
transformers to run the pipelines again.
"""

import hashlib
import json
import os
import subprocess

import conditional_parts
import numpy as np
import pipeline_cases
import pytest

import ddss_tf
from ddss_tf.exporting import diffusers_scheduler
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from project import ROOT, SUPPORT, TESTDATA

FIXTURE = os.path.join(TESTDATA, "scheduler_pipelines.npz")
TORCH = os.environ.get("DDSS_TORCH_PYTHON")
# Our own networks are readings of theirs: pipelines_test.py.
NETWORKS = ("ldm", "dit")


@pytest.fixture(scope="module")
def cases():
  return pipeline_cases.cases()


@pytest.fixture(scope="module")
def golden():
  with np.load(FIXTURE) as arrays:
    return dict(arrays)


def relative(value, expected):
  """The largest difference, in standard deviations of what is right."""
  return np.abs(np.asarray(value) - expected).max() / expected.std()


@pytest.mark.slow
def test_the_fixture_is_of_these_cases_and_files(cases, golden):
  """Of others: write the fixture anew, by its tool."""
  assert {key.split("/")[0] for key in golden if "/" in key} == set(cases)
  folder = os.path.dirname(diffusers_scheduler._TEMPLATE)
  for name in ("scheduling_ddss", "guidance"):
    with open(os.path.join(folder, f"{name}.py"), "rb") as f:
      assert hashlib.sha256(f.read()).hexdigest() == str(
          golden[f"{name}_sha256"])


def test_the_configurations_are_what_is_written(cases, golden, tmp_path):
  for name, (sampler, denoiser, _) in cases.items():
    folder = tmp_path / name
    diffusers_scheduler.write(str(folder), sampler, denoiser)
    config = json.loads(str(golden[f"{name}/config"]))
    assert json.loads((folder / "scheduler_config.json").read_text()) == config
    for key, value in sampler.coefficients.arrays().items():
      np.testing.assert_array_equal(np.float32(config[key]), value)
    flow, guided = name.startswith("sd3"), name not in (
        "sd3_heun", "ldm", "dit")
    assert ("flow_shift" in config) == ("x0_from_v" in config) == flow
    assert ("trained_betas" in config) == ("x0_from_eps" in config) != flow
    assert ("guidance_scales" in config) == guided
    assert (folder / "guidance.py").exists() == guided


@pytest.mark.parametrize("name", [
    "sd_guided", "sd_v_steps", "sd3_steps", "sd3_heun"])
def test_latents_of_a_pipeline_are_the_chains(cases, golden, name):
  """It asks the network the same, and makes the same of its answers."""
  sampler, denoiser, _ = cases[name]
  found = {key: golden[f"{name}/{key}"] for key in (
      "x_T", "noise", "states", "times", "predictions", "latents")}
  replay = pipeline_cases.Replay(
      found["states"], found["times"], found["predictions"])
  denoiser = pipeline_cases.denoiser(
      denoiser.name, denoiser.guidance_scale, replay)
  coefficients = denoiser.for_chain(sampler.coefficients)
  latents = chain.run_chain(
      lambda x_t, t, *scale: denoiser.output(
          x_t, t, pipeline_cases.PROMPT, *scale),
      coefficients, found["x_T"], found["noise"])
  assert replay.finished()
  assert relative(latents, found["latents"]) < 1e-5
  # Its parts matter: what no prompt gave, and the noise of the steps.
  if found["predictions"].shape[1] == 2:
    assert relative(found["predictions"][:, 0],
                    found["predictions"][:, 1]) > 0.1
  assert (found["noise"].std() > 0.5) == (name != "sd3_heun")


@pytest.mark.parametrize("name", NETWORKS)
def test_latents_of_a_pipeline_are_our_networks(cases, golden, name):
  sampler, denoiser, folder = cases[name]
  with np.load(os.path.join(TESTDATA, folder, "golden.npz")) as file:
    labels = [file[key].astype(np.int32) for key in file
              if key == "run_class_labels"]
  latents = chain.run_chain(
      lambda x_t, t: denoiser.output(x_t, t, *labels),
      denoiser.for_chain(sampler.coefficients), golden[f"{name}/x_T"],
      golden[f"{name}/noise"])
  assert relative(latents, golden[f"{name}/latents"]) < 5e-4


def test_flow_match_euler_is_a_sampler_of_ours(golden):
  """In its pipeline, DDIM gives what its own scheduler gave there."""
  with np.load(os.path.join(TESTDATA, "latent_sd3", "golden.npz")) as own:
    assert relative(golden["sd3_euler/latents"], own["run_latents"]) < 5e-6


def test_a_flow_below_pure_noise_keeps_its_deviation(cases, golden):
  """z of standard normal noise has the deviation 1 / n where s is below 1."""
  (sampler, denoiser, _), name = cases["sd3_steps"], "sd3_steps"
  s = float(denoiser.schedule.noise_level(sampler.coefficients.times[0]))
  assert s < 0.999
  np.testing.assert_allclose(
      golden[f"{name}/states"][0],
      golden[f"{name}/x_T"] * np.hypot(s, 1 - s), rtol=1e-5)
  np.testing.assert_allclose(golden[f"{name}/times"][0], 1000 * s, rtol=1e-6)


def make_card(coefficients, denoiser):
  return card.SamplerCard(
      "DDIM", coefficients, denoiser.identity, {}, None)


def test_scales_of_the_steps_go_before_the_models_own(tmp_path):
  options = dict(null_label=1, guidance_scale=2.0)
  denoiser = conditional_parts.make(**options)
  coefficients = ddss_tf.solver_coefficients(
      denoiser.schedule, "ddim", 3, "linear").numpy()
  folder = tmp_path / "scheduler"

  def written(found, model):
    diffusers_scheduler.write(str(folder), make_card(found, model), model)
    config = json.loads((folder / "scheduler_config.json").read_text())
    scales = config.get("guidance_scales")
    assert sorted(os.listdir(folder)) == (
        ["guidance.py"] if scales else []) + [
            "scheduler_config.json", "scheduling_ddss.py"]
    return scales

  assert written(coefficients, denoiser) == [2.0] * 3
  scales = np.float32([0.5, 1.5, 4.0])
  assert written(coefficients._replace(guidance_scales=scales),
                 denoiser) == [0.5, 1.5, 4.0]
  # A folder that has guidance is replaced by one without.
  assert written(coefficients, conditional_parts.make(null_label=1)) is None


def flow_denoiser(**changes):
  options = dict(process="flow", time_input="flow", time_scale=1000.0)
  return ddss_tf.Denoiser(
      pipeline_cases.Replay([], [], []), changes.pop(
          "schedule", ddss_tf.make_schedule("flow", 1000, shift=3.0)),
      changes.pop("prediction", "flow"), "flow net", num_classes=2,
      null_label=1, image_shape=(4, 4, 16), sha256="0", continuous_time=True,
      **{**options, **changes})


@pytest.mark.parametrize("changes", [
    dict(prediction="flow_reversed", time_scale=-1.0, time_offset=1.0),
    dict(prediction="v"), dict(prediction="eps"), dict(time_scale=500.0),
    dict(time_offset=1.0), dict(time_input="step", time_scale=1.0),
    dict(process="vp")])
def test_other_flows_are_refused(tmp_path, changes):
  denoiser = flow_denoiser(**changes)
  coefficients = ddss_tf.solver_coefficients(
      denoiser.schedule, "ddim", 3, "trailing").numpy()
  with pytest.raises(ddss_tf.UserError, match=(
      "process, time_input and prediction 'flow'.* 1000 or 1.*'flow net' with")):
    diffusers_scheduler.write(
        str(tmp_path / "no"), make_card(coefficients, denoiser), denoiser)
  assert not os.listdir(tmp_path)


def test_flows_that_pipelines_know(tmp_path):
  """The clock of the network may show s: pipelines then divide by T."""
  for scale in (1.0, 1000.0):
    denoiser = flow_denoiser(time_scale=scale)
    coefficients = ddss_tf.solver_coefficients(
        denoiser.schedule, "ddim", 3, "trailing").numpy()
    config = diffusers_scheduler.config(
        make_card(coefficients, denoiser), denoiser)
    assert config["flow_shift"] == 3.0 and config["times"][0] == 999.0
    assert config["num_train_timesteps"] == 1000
    assert config["prediction_type"] == "flow_prediction"


def test_a_sampler_of_another_process_is_refused(tmp_path):
  flow = flow_denoiser()
  in_v = ddss_tf.solver_coefficients(
      flow.schedule, "ddim", 3, "trailing").numpy()
  other = pipeline_cases.denoiser("sd_v")
  in_eps = ddss_tf.solver_coefficients(other.schedule, "ddim", 3).numpy()
  for coefficients, denoiser, words in (
      (in_v, other, "in v, on a flow, and 'sd_v' in eps"),
      (in_eps, flow, "in eps, on a process with betas, and 'flow net' in v")):
    with pytest.raises(ddss_tf.UserError, match=f"of one process.*{words}"):
      diffusers_scheduler.write(
          str(tmp_path / "no"), make_card(coefficients, denoiser), denoiser)


def pipelines():
  """The folders of pipelines that the Python with PyTorch can import."""
  if not TORCH:
    pytest.skip("DDSS_TORCH_PYTHON is not set")
  if subprocess.run([TORCH, "-c", "import transformers"], check=False,
                    capture_output=True).returncode:
    pytest.skip("transformers is not installed in DDSS_TORCH_PYTHON")
  return {name: os.path.join(TESTDATA, f"latent_{name}")
          for name in ("sd", "sd3", "ldm", "dit")}


def test_the_fixture_in_pytorch(cases, golden, tmp_path):
  found = pipelines()
  path = str(tmp_path / "again.npz")
  for name, (sampler, denoiser, folder) in cases.items():
    diffusers_scheduler.write(
        str(tmp_path / "cases" / folder / name), sampler, denoiser)
  subprocess.run(
      [TORCH, os.path.join(ROOT, "tools", "dump_pipeline_fixture.py"),
       str(tmp_path / "cases"), path, *found.values()], check=True)
  with np.load(path) as again:
    assert set(again) == set(golden)
    for key in again:
      if key.endswith(("config", "sha256")):
        assert str(again[key]) == str(golden[key]), key
      elif golden[key].any():
        assert relative(again[key], golden[key]) < 1e-3, key


def test_the_class_in_pytorch(cases, tmp_path):
  found = pipelines()
  for name in ("sd_guided", "sd3_steps", "sd3_heun"):
    sampler, denoiser, _ = cases[name]
    diffusers_scheduler.write(str(tmp_path / name), sampler, denoiser)
  subprocess.run(
      [TORCH, os.path.join(SUPPORT, "scheduler_in_pipelines.py"), str(tmp_path),
       found["sd"], found["sd3"]], check=True)

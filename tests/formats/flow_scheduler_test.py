"""Tests of flow schedulers' files beside the noise levels of diffusers 0.42.1.

tests/testdata/flow_schedulers.json has configurations that diffusers wrote, and
the noise levels that its schedulers then visited.
"""

import json
import os

from absl import logging
from checkpoint_files import DATA, refusal
import numpy as np
import pytest

from ddss_tf.denoisers import conventions
from ddss_tf.formats import flow_scheduler
from ddss_tf.samplers import solvers
from ddss_tf.samplers import strides

with open(os.path.join(DATA, "flow_schedulers.json"), encoding="utf-8") as file:
  CASES = json.load(file)
SD3 = CASES[1]["config"]
NAMES = [f"{i}-{case['config']['_class_name']}" for i, case in enumerate(CASES)]
UNIPC = next(case["config"] for case in CASES
             if case["config"]["_class_name"].startswith("UniPC"))


def write(folder, config):
  """A network's folder beside that of its scheduler, as pipelines have them."""
  network, scheduler = folder / "transformer", folder / "scheduler"
  for path in (network, scheduler):
    path.mkdir(exist_ok=True)
  with open(scheduler / "scheduler_config.json", "w", encoding="utf-8") as f:
    json.dump(config, f)
  return str(network)


def read(folder, config, size=(8, 8), patch_size=2):
  return flow_scheduler.read(write(folder, config), (*size, 16), patch_size)


def times(schedule, case):
  """The times of the scheduler's own list, as we name them."""
  config, steps = case["config"], case["steps"]
  if config["_class_name"].startswith("FlowMatchEuler"):
    stride = ("flow-dynamic" if config["use_dynamic_shifting"]
              else "flow-euler")
    return strides.times_of(schedule, stride, steps)
  if config["_class_name"].startswith("FlowMatchHeun"):
    return solvers.solver_coefficients(
        schedule, "heun", 2 * steps - 1, "flow-euler").times
  # The solvers' lists are of levels that are not shifted yet: equal steps from
  # 1 to 1 / T, or from 1 - 1 / T to 0, without the last one.
  total = schedule.num_train_steps
  first = 1 if config["_class_name"].startswith("UniPC") else 1 - 1 / total
  q = first - np.arange(steps) / steps * (1 - 1 / total)
  return total * q - 1


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_noise_levels_are_those_of_diffusers(tmp_path, case):
  schedule, convention = read(
      tmp_path, case["config"], case["size"], case["patch_size"])
  expected = np.array(case["sigmas"][:-1])
  # Two of the solvers do not go to 0.
  assert case["sigmas"][-1] in (0, expected[-1])
  if case["config"]["_class_name"].startswith("FlowMatchHeun"):
    # A step of Heun's visits its end before it takes it.
    assert len(expected) == 2 * case["steps"] - 1
  levels = schedule.noise_level(times(schedule, case))
  np.testing.assert_allclose(levels, expected, atol=2e-6)
  total = case["config"]["num_train_timesteps"]
  assert schedule.num_train_steps == total
  assert convention["time_scale"] == total
  # Another shift would show.
  other = type(schedule)(total, schedule.shift * 1.01)
  assert np.max(np.abs(
      other.noise_level(times(schedule, case)) - expected)) > 1e-4


def test_what_the_network_is_fed_with(tmp_path):
  """1000 s at every step, and z = (1 - s) x0 + s eps."""
  schedule, convention = read(tmp_path, SD3)
  assert schedule.card() == {"flow": {"num_train_steps": 1000, "shift": 3.0}}
  convention = conventions.Convention(**convention)
  t = np.array([0.0, 0.5, 400.25, 999.0], np.float32)
  s = 3 * (t + 1) / 1000 / (1 + 2 * (t + 1) / 1000)
  x0, eps = np.random.default_rng(0).normal(size=(2, 4, 2, 2, 1))
  alpha, sigma = ((part / np.hypot(1 - s, s))[:, None, None, None]
                  for part in (1 - s, s))
  x, clock = convention.inputs(
      schedule, (alpha * x0 + sigma * eps).astype(np.float32), t)
  np.testing.assert_allclose(clock, 1000 * s, rtol=1e-6)
  s = s[:, None, None, None]
  np.testing.assert_allclose(x, (1 - s) * x0 + s * eps, atol=1e-6)
  # The prediction means eps - x0.
  np.testing.assert_allclose(
      convention.eps(schedule, (alpha * x0 + sigma * eps).astype(np.float32), t,
                     (eps - x0).astype(np.float32)), eps, atol=1e-5)


def test_the_shift_of_a_size_is_told(tmp_path, monkeypatch):
  told = []
  monkeypatch.setattr(logging, "info", lambda text, *values: told.append(
      text % values))
  dynamic = SD3 | {"use_dynamic_shifting": True}
  found = [read(tmp_path, dynamic, size, 2)[0].shift
           for size in ((32, 32), (64, 128), (64, 32))]
  # 256 and 2048 tokens; the two ends of diffusers' line are 256 and 4096.
  np.testing.assert_allclose(found[:2], np.exp(
      [0.5, 0.5 + 0.65 * 1792 / 3840]), rtol=1e-9)
  assert len(told) == 3 and "for 512 tokens" in told[2]
  assert f"{found[2]:.6g}" in told[2]
  read(tmp_path, SD3)
  assert len(told) == 3


def test_what_concerns_sampling_changes_nothing(tmp_path):
  plain = read(tmp_path, SD3)
  changed = SD3 | {
      "use_karras_sigmas": True, "stochastic_sampling": True,
      "shift_terminal": 0.1, "base_shift": 0.1, "max_shift": None,
      "time_shift_type": "linear", "base_image_seq_len": 3,
      "max_image_seq_len": 7, "_made_by": "somebody"}
  other = read(tmp_path, changed)
  assert other[0].card() == plain[0].card() and other[1] == plain[1]
  changed = UNIPC | {"solver_order": 3, "beta_start": 0.5, "thresholding": True,
                     "rescale_betas_zero_snr": True, "sigma_max": 0.7}
  assert read(tmp_path, changed)[0].card() == (
      read(tmp_path, UNIPC)[0].card())


def test_defaults_are_those_of_diffusers(tmp_path):
  for name in ("FlowMatchEulerDiscreteScheduler",
               "FlowMatchHeunDiscreteScheduler"):
    schedule, _ = read(tmp_path, {"_class_name": name})
    assert schedule.card()["flow"] == {"num_train_steps": 1000, "shift": 1.0}


def test_what_is_a_flow(tmp_path):
  for config, truth in (
      (SD3, True), (UNIPC, True), (UNIPC | {"use_flow_sigmas": False}, False),
      ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, True),
      ({"_class_name": "DDIMScheduler"}, False), ({}, False),
      ({"_class_name": ["DDIMScheduler"]}, False)):
    assert flow_scheduler.is_flow(write(tmp_path, config)) is truth


@pytest.mark.parametrize("changes,words", [
    (dict(_class_name="DDIMScheduler"), ["FlowMatchEuler", "'DDIMScheduler'"]),
    (dict(_class_name=["a"]), ["_class_name", "['a']"]),
    (dict(invert_sigmas=True), ["invert_sigmas must be False", "True"]),
    (dict(shift=0), ["shift", "above 0", "0"]),
    (dict(shift="3"), ["shift", "'3'"]),
    (dict(num_train_timesteps=0), ["num_train_timesteps", "0"]),
    (dict(num_train_timesteps=1000.0), ["num_train_timesteps", "1000.0"]),
    (dict(num_train_timesteps=10**9), ["num_train_steps", "1000000000"]),
    (dict(brand_new=1), ["unknown key 'brand_new'", "1"]),
    (dict(flow_shift=3.0), ["unknown key 'flow_shift'"]),
    (dict(use_dynamic_shifting=True, time_shift_type="cubic"),
     ["time_shift_type", "'exponential' or 'linear'", "'cubic'"]),
    (dict(use_dynamic_shifting=True, max_shift=None), ["max_shift", "None"]),
    (dict(use_dynamic_shifting=True, base_image_seq_len=0.5),
     ["base_image_seq_len", "0.5"]),
    (dict(use_dynamic_shifting=True, base_image_seq_len=4096),
     ["must be positive", "differ"]),
    (dict(use_dynamic_shifting=True, max_shift=1e9), ["scheduler_config"]),
    (dict(use_dynamic_shifting=True, time_shift_type="linear", max_shift=-9),
     ["shift must be positive"]),
])
def test_refused(tmp_path, changes, words):
  # 4096 tokens, so that every number counts.
  message = refusal(read, tmp_path, SD3 | changes, (128, 256))
  for word in ["scheduler_config.json", *words]:
    assert word in message, message


@pytest.mark.parametrize("changes,words", [
    (dict(use_flow_sigmas=False), ["use_flow_sigmas", "'UniPC"]),
    (dict(prediction_type="epsilon"), ["'flow_prediction'", "'epsilon'"]),
    (dict(flow_shift=-1.0), ["flow_shift", "-1.0"]),
    (dict(shift=3.0), ["unknown key 'shift'"]),
    (dict(use_dynamic_shifting=True, time_shift_type="linear"),
     ["time_shift_type must be 'exponential'", "'linear'"]),
])
def test_solvers_refused(tmp_path, changes, words):
  message = refusal(read, tmp_path, UNIPC | changes)
  for word in ["scheduler_config.json", *words]:
    assert word in message, message


def test_missing_and_damaged_files(tmp_path):
  folder = write(tmp_path, SD3)
  path = tmp_path / "scheduler" / "scheduler_config.json"
  path.write_text("{")
  assert "not JSON" in refusal(flow_scheduler.read, folder, (8, 8, 16), 2)
  path.unlink()
  assert "scheduler_config.json" in refusal(
      flow_scheduler.read, folder, (8, 8, 16), 2)

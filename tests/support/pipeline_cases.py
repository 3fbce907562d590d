"""Samplers for the test of schedulers in pipelines of latents and of flows.

  python tests/support/pipeline_cases.py FOLDER

writes their schedulers, for `tools/dump_pipeline_fixture.py`.
"""

import os
import sys

import numpy as np
import tensorflow as tf

import ddss_tf
from ddss_tf.exporting import diffusers_scheduler
from ddss_tf.samplers import card
from ddss_tf.samplers.coefficients import Coefficients
from project import TESTDATA

PROMPT, NULL = 0, 1
_SD3 = dict(process="flow", time_input="flow", time_scale=1000.0)


class Replay:
  """A network that answers as a pipeline's did, where it is asked the same.

  Args:
    states: [K, B, H, W, C], what the pipeline's network was fed with.
    times: [K], likewise.
    predictions: [K, 1 or 2, B, H, W, C], its answers to the prompt and, with
      guidance, to no prompt.
  """

  variables = trainable_variables = ()

  def __init__(self, states, times, predictions):
    self._calls = list(zip(states, times, predictions))

  def __call__(self, inputs, training=False):
    x, t, labels = inputs
    state, time, answers = self._calls.pop(0)
    batch = len(state)
    np.testing.assert_array_equal(
        labels, np.repeat([PROMPT, NULL][:len(answers)], batch))
    np.testing.assert_allclose(t, np.full(len(x), time), rtol=1e-6)
    np.testing.assert_allclose(
        x, np.concatenate([state] * len(answers)), atol=1e-5 * state.std())
    return tf.constant(np.concatenate(answers))

  def finished(self) -> bool:
    """Whether it was called as often as the pipeline's."""
    return not self._calls


def denoiser(model, guidance_scale=None, replay=None) -> ddss_tf.Denoiser:
  """A network with a prompt and without one, in place of a pipeline's.

  Args:
    model: the pipeline: "sd", "sd_v" or "sd3".
    guidance_scale: see `Denoiser`.
    replay: a `Replay`, if it is to be called.
  """
  flow = model == "sd3"
  schedule = (
      ddss_tf.make_schedule("flow", 1000, shift=3.0) if flow else
      ddss_tf.make_schedule("scaled_linear", 1000, 0.00085, 0.012))
  return ddss_tf.Denoiser(
      replay or Replay([], [], []), schedule,
      {"sd": "eps", "sd_v": "v", "sd3": "flow"}[model], model, num_classes=2,
      null_label=NULL, guidance_scale=guidance_scale,
      image_shape=(4, 4, 16 if flow else 4), sha256=model,
      continuous_time=True, **(_SD3 if flow else {}))


def _moved(schedule, solver: str, num_steps: int, stride: str, noisy: bool,
           scales=None) -> Coefficients:
  """A dense sampler near a solver, as a search could have found it."""
  start = ddss_tf.solver_coefficients(schedule, solver, num_steps, stride)
  rng = np.random.default_rng(num_steps)
  moved = start.map(
      lambda value: value + 0.02 * rng.normal(size=value.shape))
  noise = np.abs(moved.noise_scales) * noisy
  noise[-1] = 0.0
  # Times are fractional, in order, and below the first of the start.
  times = start.times * 0.98 + rng.uniform(1, 9, num_steps)
  return moved._replace(
      times=times, state_weights=np.tril(moved.state_weights),
      noise_scales=noise, guidance_scales=scales).numpy()


def cases() -> dict:
  """(card, denoiser, folder of the pipeline) by name of the case."""
  found = {}

  def add(name, coefficients, model, folder):
    found[name] = (card.SamplerCard(
        name, coefficients.numpy(), model.identity, {}, None), model, folder)

  sd, sd_v = denoiser("sd", 7.5), denoiser("sd_v")
  sd3, sd3_guided = denoiser("sd3"), denoiser("sd3", 7.0)
  add("sd_guided", _moved(sd.schedule, "unipc3-bh2", 5, "linspace", True), sd,
      "latent_sd")
  # With scales at which pipelines would not guide by themselves.
  add("sd_v_steps", _moved(
      sd.schedule, "deis3", 4, "leading", True, [4.0, 1.0, 0.5, 3.0]), sd_v,
      "latent_sd")
  add("sd3_steps", _moved(
      sd3.schedule, "unipc2-bh2", 4, "trailing", True, [5.0, -0.5, 1.0, 2.5]),
      sd3, "latent_sd3")
  # It has equal times.
  add("sd3_heun", ddss_tf.solver_coefficients(
      sd3.schedule, "heun", 5, "trailing"), sd3, "latent_sd3")
  add("sd3_euler", ddss_tf.solver_coefficients(
      sd3.schedule, "ddim", 4, "flow-euler"), sd3_guided, "latent_sd3")
  for name in ("ldm", "dit"):
    folder = f"latent_{name}"
    model = ddss_tf.load_denoiser(os.path.join(TESTDATA, folder))
    add(name, _moved(model.schedule, "dpm++2m", 3, "linspace", True), model,
        folder)
  return found


def main(folder: str) -> None:
  for name, (sampler, model, pipeline) in cases().items():
    diffusers_scheduler.write(
        os.path.join(folder, pipeline, name), sampler, model)


if __name__ == "__main__":
  main(sys.argv[1])

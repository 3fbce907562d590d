"""Samplers for the test of the schedulers that are written for diffusers.

  python tests/support/scheduler_cases.py FOLDER

writes their schedulers, for `tools/dump_scheduler_fixture.py`.
"""

import os
import sys

import numpy as np

import ddss_tf
from ddss_tf.exporting import diffusers_scheduler
from ddss_tf.samplers import card
from ddss_tf.samplers.coefficients import Coefficients
from project import TESTDATA

_DIGITS, _TINY = "digits16-ddpm", "tiny_unet2d"


def _perturbed(schedule, solver: str, num_steps: int) -> Coefficients:
  """A dense sampler near a solver, as a search could have found it."""
  start = ddss_tf.solver_coefficients(schedule, solver, num_steps, "linspace")
  rng = np.random.default_rng(num_steps)
  moved = start.map(
      lambda value: value + 0.02 * rng.normal(size=value.shape))
  noise = np.abs(moved.noise_scales)
  noise[1], noise[-1] = 0.0, 0.0  # Steps 2 and K add no noise.
  # Times are fractional, in order, and within the training steps.
  times = start.times * 0.93 + rng.uniform(1, 9, num_steps)
  return moved._replace(
      times=times, state_weights=np.tril(moved.state_weights),
      noise_scales=noise).numpy()


def cases() -> dict:
  """(card, denoiser, folder of the model) by name of the case."""
  digits = ddss_tf.load_denoiser(_DIGITS)
  tiny = ddss_tf.load_denoiser(os.path.join(TESTDATA, _TINY))
  found = {}
  for name in ("ggdm+pred+time", "vars"):
    # Copies of earlier cards: those of the zoo change when the search does.
    found[f"digits_{name}_k5"] = (card.read(os.path.join(
        TESTDATA, f"searched_{name}.json")), digits, _DIGITS)

  def add(name, coefficients, denoiser, folder, x0_bound=None):
    found[name] = (card.SamplerCard(
        name, coefficients.numpy(), denoiser.identity, {}, x0_bound),
                   denoiser, folder)

  add("digits_unipc_k10", ddss_tf.solver_coefficients(
      digits.schedule, "unipc3-bh2", 10, "logsnr"), digits, _DIGITS)
  for prediction, x0_bound in (("v", None), ("x0", None), ("eps", "clip"),
                               ("eps", "dynamic")):
    denoiser = tiny if prediction == tiny.prediction else ddss_tf.Denoiser(
        tiny.model, tiny.schedule, prediction, _TINY)
    for num_steps in (5, 10):
      add(f"tiny_{prediction}_{x0_bound}_k{num_steps}",
          _perturbed(tiny.schedule, "deis3", num_steps), denoiser, _TINY,
          x0_bound)
  add("tiny_ddpm_k10", ddss_tf.solver_coefficients(
      tiny.schedule, "ddpm", 10), tiny, _TINY)
  return found


def main(folder: str) -> None:
  for name, (sampler, denoiser, model) in cases().items():
    diffusers_scheduler.write(
        os.path.join(folder, model, name), sampler, denoiser)


if __name__ == "__main__":
  main(sys.argv[1])

"""Tests of the training-free samplers: parity, order, exactness."""

import os

import numpy as np
import pytest
import tensorflow as tf

from ddss_tf import chain
from ddss_tf import schedules
from ddss_tf import solvers
from ddss_tf.schedules import NoiseSchedule

FIXTURE = np.load(os.path.join(
    os.path.dirname(__file__), "testdata", "solvers.npz"))
CASES = sorted({key.split("/")[0] for key in FIXTURE if "/" in key})


def mixture_eps(schedule, dtype=tf.float32):
  """The exact denoiser of the fixture's Gaussian mixture."""
  means = FIXTURE["mixture_means"]
  stds, weights = FIXTURE["mixture_stds"], FIXTURE["mixture_weights"]

  def eps(x, t):
    # All samples of a batch share their time.
    abar = schedule.abar(np.asarray(t)[0])
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    flat = tf.reshape(x, [-1, 1, 4])
    variance = tf.constant((alpha * stds) ** 2 + sigma**2, dtype)
    offset = flat - tf.constant(alpha * means, dtype)
    logits = (np.log(weights) - 2 * tf.math.log(variance)
              - tf.reduce_sum(offset**2, -1) / (2 * variance))
    score = tf.nn.softmax(logits)[..., None] * offset / variance[:, None]
    return tf.reshape(sigma * tf.reduce_sum(score, axis=1), tf.shape(x))

  return eps


def schedule_of(case):
  if "scaled_linear" in case:
    return NoiseSchedule.scaled_linear(1000, 0.00085, 0.012)
  if "cosine" in case:
    return NoiseSchedule.cosine()
  return NoiseSchedule.linear()


def test_betas_are_those_of_diffusers():
  for name, schedule in (
      ("linear", NoiseSchedule.linear()),
      ("scaled_linear", NoiseSchedule.scaled_linear(1000, 0.00085, 0.012)),
      ("cosine", NoiseSchedule.cosine())):
    np.testing.assert_allclose(
        schedule.betas, FIXTURE[f"betas_{name}"], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_parity_with_diffusers(case):
  schedule = schedule_of(case)
  fixture = {key.split("/")[1]: FIXTURE[key]
             for key in FIXTURE if key.startswith(case + "/")}
  times = fixture["times"]
  solver, eta = case.split("_")[0], None
  if solver == "ddim":
    eta = float(case.split("_")[1][len("eta"):])
  # PNDM names its second time once.
  grid = np.delete(times, 1) if solver == "pndm" else times
  coefficients = solvers.solver_coefficients(
      schedule, solver, len(times), grid, eta, float(fixture["abar_end"]))
  np.testing.assert_array_equal(coefficients.times, times)
  noise = fixture.get("noise")

  def run(dtype, coefficients):
    images, states, _ = chain.run_chain(
        mixture_eps(schedule, dtype), coefficients,
        tf.constant(FIXTURE["x_T"], dtype),
        None if noise is None else tf.constant(noise, dtype), trajectory=True)
    return images.numpy(), np.array(states)

  # In float64 it is the same algorithm, all the way and not only in its end.
  images, states = run(tf.float64, coefficients)
  np.testing.assert_allclose(images, fixture["image"], atol=1e-9)
  np.testing.assert_allclose(states, fixture["states"], atol=1e-9)
  # In float32, the chain's precision. The cosine schedule's alpha_T of 5e-5
  # divides a difference of eps: diffusers' own float32 is off by 1.6e-4 there.
  images, _ = run(tf.float32, coefficients.numpy())
  np.testing.assert_allclose(
      images, fixture["image"], atol=2e-4 if "cosine" in case else 1e-4)

"""Tests of what networks predict and are fed with, on exact Gaussian ones.

For x_0 ~ N(mean, std^2 I) every prediction of every process is known in closed
form, and all of them must mean the same eps.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf import chain
from ddss_tf import conventions

MEAN, STD = 0.2, 0.5
SHAPE = (2, 2, 1)
TIMES = [0.0, 3.0, 100.5, 400.0, 800.25, 999.0]


class Exact(keras.Model):
  """The exact network of Gaussian images.

  Args:
    prediction: what it gives.
    process: from time to the (a, s) of its own z = a x_0 + s eps.
  """

  input_shape = ((None, *SHAPE), (None,))

  def __init__(self, prediction, process):
    super().__init__()
    self.prediction = prediction
    self.process = process
    self.built = True

  def call(self, inputs, training=False):
    z, time = inputs
    a, s = (v[:, None, None, None] for v in self.process(time))
    variance = (a * STD) ** 2 + s**2
    eps = s * (z - a * MEAN) / variance
    # Not through eps: each is exact on its own.
    x0 = MEAN + a * STD**2 * (z - a * MEAN) / variance
    return {"eps": eps, "x0": x0, "v": a * eps - s * x0,
            "score": -(z - a * MEAN) / variance}[self.prediction]


def states():
  """(x_t, t) of six images."""
  return tf.random.stateless_normal([len(TIMES), *SHAPE], [0, 1]), (
      tf.constant(TIMES))


def expected_eps(schedule, x_t, t):
  """The exact eps in float64."""
  x_t = np.asarray(x_t, np.float64)
  abar = schedule.abar(t)[:, None, None, None]
  return np.sqrt(1 - abar) * (x_t - np.sqrt(abar) * MEAN) / (
      abar * STD**2 + 1 - abar)


def sampled(denoiser):
  """Images of a five-step solver, from the same noise."""
  sampler = ddss_tf.make_sampler(denoiser.schedule, "dpm++2m", 5)
  x_T, noise = chain.draw_noise([0, 1], tf.range(4), SHAPE, 5)
  return chain.run_chain(denoiser.eps, sampler.coefficients(), x_T, noise)


@pytest.fixture(scope="module")
def vp():
  return ddss_tf.gaussian_denoiser(SHAPE, mean=MEAN, std=STD)


@pytest.mark.parametrize("prediction", conventions.PREDICTIONS)
def test_predictions_of_one_model_agree(vp, prediction):
  denoiser = ddss_tf.Denoiser(
      Exact(prediction, vp.schedule.alpha_sigma), vp.schedule, prediction)
  x_t, t = states()
  # x0 is divided by sigma_0 = 0.01: two digits of float32 go.
  np.testing.assert_allclose(
      denoiser.eps(x_t, t), expected_eps(vp.schedule, x_t, t), atol=3e-5)
  np.testing.assert_allclose(sampled(denoiser), sampled(vp), atol=1e-5)
  # A scalar time is one for all.
  np.testing.assert_allclose(
      denoiser.eps(x_t[2:3], t[2]), denoiser.eps(x_t, t)[2:3], atol=1e-6)


@pytest.mark.parametrize("prediction", conventions.PREDICTIONS)
def test_gradient_in_time_of_every_prediction(vp, prediction):
  denoiser = ddss_tf.Denoiser(
      Exact(prediction, vp.schedule.alpha_sigma), vp.schedule, prediction)
  x_t, _ = states()
  t = tf.constant([20.3, 100.5, 300.7, 400.2, 800.2, 990.5])
  with tf.GradientTape() as tape:
    tape.watch(t)
    eps = denoiser.eps(x_t, t)
  # In float64, within one interval of the schedule's table.
  high, low = (expected_eps(vp.schedule, x_t, t.numpy() + d)
               for d in (1e-3, -1e-3))
  np.testing.assert_allclose(
      tape.gradient(eps, t), np.sum((high - low) / 2e-3, axis=(1, 2, 3)),
      rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("changes,words", [
    (dict(prediction="flow"), "eps, x0, v, score.*'flow'"),
    (dict(process="sub-vp"), "vp, ve.*'sub-vp'"),
    (dict(time_input="snr"), "step, sigma, log_sigma.*'snr'"),
    (dict(prediction="v", process="ve"), "eps, x0 or score.*'ve'.*'v'"),
    (dict(time_scale="2"), "time_scale must be a number.*'2'"),
    (dict(time_scale=0), "time_scale must not be 0"),
    (dict(time_offset=float("nan")), "time_offset must be a number.*nan"),
])
def test_conventions_that_there_are_not(changes, words):
  with pytest.raises(ValueError, match=words):
    conventions.Convention(**changes)

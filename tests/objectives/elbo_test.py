"""Tests of the variational bound: its closed form, what it bounds."""

import numpy as np
import pytest
import tensorflow as tf

from ddss_tf.denoisers import gaussian
from ddss_tf.denoisers import rematerialise
from ddss_tf.objectives import elbo
from ddss_tf.samplers import families
from ddss_tf.samplers import solvers
from ddss_tf.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
SHAPE = (4, 4, 1)
MEAN, STD = 0.3, 0.4
DENOISER = gaussian.gaussian_denoiser(SHAPE, MEAN, STD)
# -E log p of the data itself, nats per dimension.
ENTROPY = 0.5 * np.log(2 * np.pi * np.e * STD**2)


def exact(c):
  """The expected bound on this data, by moments, in float64 NumPy.

  Pixels are independent; [x_0, x_0-th state, ...] are jointly Gaussian, and
  x0_hat_k is affine in state k.
  """
  a = 1 / float(c.x0_from_state[0])
  v = (float(c.x0_from_eps[0]) * a) ** 2
  loss = 0.5 * (a**2 * (MEAN**2 + STD**2) + v - 1 - np.log(v))
  # Of x_0 and all states: mean, covariance.
  mean = np.array([MEAN, a * MEAN])
  covariance = np.array([[STD**2, a * STD**2],
                         [a * STD**2, a**2 * STD**2 + v]])
  steps = len(c.times)
  for k in range(steps):
    abar = SCHEDULE.abar(c.times[k])
    slope = np.sqrt(1 - abar) / (abar * STD**2 + 1 - abar)
    gain = c.x0_from_state[k] + c.x0_from_eps[k] * slope
    offset = -c.x0_from_eps[k] * slope * np.sqrt(abar) * MEAN
    # x_0 - x0_hat as a row over the joint vector.
    row = np.zeros(k + 2)
    row[0], row[-1] = 1, -gain
    error = row @ covariance @ row + (row @ mean - offset) ** 2
    if k == steps - 1:
      return loss + 0.5 * (np.log(2 * np.pi * error) + 1)
    loss += 0.5 * (c.x0_weights[k] / c.noise_scales[k]) ** 2 * error
    new = np.concatenate([[c.x0_weights[k]], c.state_weights[k, :k + 1]])
    cross = covariance @ new
    covariance = np.block([
        [covariance, cross[:, None]],
        [cross[None], new @ cross + c.noise_scales[k] ** 2]])
    mean = np.append(mean, new @ mean)


def estimate(c, count=4096):
  rng = np.random.default_rng(0)
  draw = lambda *shape: tf.constant(rng.normal(size=shape), tf.float32)
  x_0 = MEAN + STD * draw(count, *SHAPE)
  return float(elbo.negative_elbo(
      DENOISER.eps, c, x_0, draw(count, *SHAPE),
      draw(count, c.num_steps - 1, *SHAPE)))


@pytest.mark.parametrize("steps", [2, 5, 10])
@pytest.mark.parametrize("family", ["ddpm", "ggdm+pred", "vars"])
def test_closed_form(steps, family):
  sampler = families.make_sampler(
      SCHEDULE, family, steps,
      **({"init": "ddpm"} if family == "ggdm+pred" else {}))
  rng = np.random.default_rng(steps)
  for variable in sampler.weights:  # Away from DDPM: no marginals match.
    variable.assign(variable + 0.02 * rng.normal(size=variable.shape))
  c = sampler.coefficients().numpy()
  np.testing.assert_allclose(estimate(c), exact(c), rtol=0.02, atol=0.01)


def test_it_bounds_the_likelihood_and_more_steps_tighten_it():
  values = []
  for steps in (3, 10, 50, 400):
    c = solvers.solver_coefficients(SCHEDULE, "ddpm", steps, "logsnr")
    values.append(exact(c))
  assert values == sorted(values, reverse=True)
  assert ENTROPY < values[-1] < ENTROPY + 0.1


def test_a_deterministic_sampler_has_none():
  c = solvers.solver_coefficients(SCHEDULE, "ddim", 4).numpy()
  assert np.isinf(estimate(c, 16))


def test_gradients_reach_every_coefficient_and_lower_the_bound():
  sampler = families.make_sampler(SCHEDULE, "ggdm+pred+time", 4, init="ddpm")
  rng = np.random.default_rng(0)
  draw = lambda *shape: tf.constant(rng.normal(size=shape), tf.float32)
  x_0 = MEAN + STD * draw(256, *SHAPE)
  x_T, noise = draw(256, *SHAPE), draw(256, 3, *SHAPE)
  eps_fn = rematerialise.rematerialise(DENOISER.compiled_eps(False))

  @tf.function
  def loss_and_gradients():
    with tf.GradientTape() as tape:
      loss = elbo.negative_elbo(
          eps_fn, sampler.coefficients(), x_0, x_T, noise)
    return loss, tape.gradient(loss, [v.value for v in sampler.weights])

  before, gradients = loss_and_gradients()
  for variable, gradient in zip(sampler.weights, gradients):
    assert np.all(np.isfinite(gradient)), variable.name
    assert np.all(np.asarray(gradient) != 0), variable.name
  size = sum(float(tf.reduce_sum(g**2)) for g in gradients)
  # A short step along the gradient lowers it by what the gradient says.
  for variable, gradient in zip(sampler.weights, gradients):
    variable.assign(variable - 1e-3 / size * gradient)
  after, _ = loss_and_gradients()
  np.testing.assert_allclose(float(before - after), 1e-3, rtol=0.1)

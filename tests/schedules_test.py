"""Tests of `ddss_tf.schedules`."""

import numpy as np
import pytest
import tensorflow as tf

from ddss_tf import schedules
from ddss_tf.schedules import NoiseSchedule


@pytest.fixture(scope="module")
def linear():
  return NoiseSchedule.linear()


def test_abar_of_ho_et_al(linear):
  # The published end points of the linear schedule, by direct product.
  betas = [1e-4 + i * (0.02 - 1e-4) / 999 for i in range(1000)]
  product = 1.0
  for i, beta in enumerate(betas):
    product *= 1 - beta
    if i in (0, 1, 500, 999):
      np.testing.assert_allclose(linear.abar(i), product, rtol=1e-12)
  np.testing.assert_allclose(linear.abar(999), 4.0358e-5, rtol=1e-4)


def test_fractional_times_are_geometric_means(linear):
  np.testing.assert_allclose(
      linear.abar(100.25),
      linear.abar(100) ** 0.75 * linear.abar(101) ** 0.25, rtol=1e-13)


def test_tensorflow_agrees_with_numpy(linear):
  t = np.array([0, 0.5, 17.25, 500, 998.9, 999])
  alpha, sigma = linear.alpha_sigma(t)
  np.testing.assert_allclose(alpha**2, linear.abar(t), rtol=2e-5)
  np.testing.assert_allclose(sigma**2, 1 - linear.abar(t), rtol=2e-5)


def test_gradient_in_time(linear):
  t = tf.constant([0.3, 250.5, 900.2])
  with tf.GradientTape() as tape:
    tape.watch(t)
    alpha, _ = linear.alpha_sigma(t)
  numeric = (np.sqrt(linear.abar(t.numpy() + 0.05))
             - np.sqrt(linear.abar(t.numpy() - 0.05))) / 0.1
  np.testing.assert_allclose(tape.gradient(alpha, t), numeric, rtol=2e-3)


def test_strides_by_hand(linear):
  np.testing.assert_array_equal(
      linear.stride("linear", 5), [800, 600, 400, 200, 0])
  np.testing.assert_array_equal(
      linear.stride("linear", 15)[:3], [933, 866, 800])
  np.testing.assert_array_equal(
      linear.stride("quadratic", 10),
      [800, 632, 483, 355, 246, 158, 88, 39, 9, 0])


  np.testing.assert_array_equal(
      linear.stride("trailing", 5), [999, 799, 599, 399, 199])
  np.testing.assert_array_equal(
      linear.stride("linspace", 5), [999, 749, 500, 250, 0])
  np.testing.assert_array_equal(
      linear.stride("linspace_open", 5), [999, 799, 599, 400, 200])


def test_strides_in_noise_levels(linear):
  # Equal steps of log-SNR, and of (sigma / alpha)^(1/7), between both ends.
  for name, level in (
      ("logsnr", linear.log_snr),
      ("karras", lambda t: np.exp(-linear.log_snr(t)) ** (1 / 7))):
    tau = linear.stride(name, 9)
    np.testing.assert_allclose(tau[[0, -1]], [999, 0], atol=1e-9)
    steps = np.diff(level(tau))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_log_snr_and_its_inverse(linear):
  t = np.array([0, 0.3, 10.7, 500, 998.99, 999])
  abar = linear.abar(t)
  np.testing.assert_allclose(
      linear.log_snr(t), 0.5 * np.log(abar / (1 - abar)), rtol=1e-12)
  np.testing.assert_allclose(
      linear.time_of_log_snr(linear.log_snr(t)), t, atol=1e-8)
  np.testing.assert_array_equal(linear.time_of_log_snr([-99, 99]), [999, 0])


def test_cosine_and_scaled_linear():
  # Nichol and Dhariwal (2021), equation 17, away from the clipped end.
  cosine = NoiseSchedule.cosine(4000)
  f = lambda t: np.cos((t / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2
  for i in (0, 100, 2000, 3900):
    np.testing.assert_allclose(cosine.abar(i), f(i + 1) / f(0), rtol=1e-9)
  assert cosine.betas.max() == 0.999
  scaled = NoiseSchedule.scaled_linear(1000, 0.00085, 0.012)
  np.testing.assert_allclose(scaled.betas[[0, -1]], [0.00085, 0.012])
  roots = np.sqrt(scaled.betas)
  np.testing.assert_allclose(np.diff(roots), roots[1] - roots[0], rtol=1e-6)


def test_given_times(linear):
  times = [900.5, 400, 0.25]
  np.testing.assert_array_equal(linear.stride(times, 3), times)
  for bad, message in (([900, 400], "3 times"), ([1, 2, 3], "decrease"),
                       ([9, 9, 1], "decrease"), ([1000, 2, 1], "999"),
                       ([9, 2, -1], "999")):
    with pytest.raises(ValueError, match=message):
      linear.stride(bad, 3)


@pytest.mark.parametrize("name", [
    "linear", "quadratic", "trailing", "linspace", "linspace_open"])
@pytest.mark.parametrize("steps", [1, 2, 29, 30, 100, 950, 1000])
def test_strides_waste_no_step(linear, name, steps):
  tau = linear.stride(name, steps)
  assert len(tau) == steps
  assert np.all(np.diff(tau) < 0)
  assert 0 <= tau[-1] and tau[0] <= 999
  np.testing.assert_array_equal(tau, np.floor(tau))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_number_of_steps(linear, steps):
  with pytest.raises(ValueError, match=f"1 to 1000.*num_steps={steps}"):
    linear.stride("linear", steps)


def test_bad_arguments(linear):
  with pytest.raises(ValueError, match="linear, trailing.*'cubic'"):
    linear.stride("cubic", 5)
  with pytest.raises(ValueError, match="between 0 and 1"):
    NoiseSchedule([0.1, 1.0])
  with pytest.raises(ValueError, match="non-empty"):
    NoiseSchedule([])


def test_schedules_by_name():
  np.testing.assert_array_equal(
      schedules.make_schedule("cosine", 500).betas,
      NoiseSchedule.cosine(500).betas)
  np.testing.assert_array_equal(
      schedules.make_schedule("scaled_linear", 9, 0.1, 0.4).betas,
      NoiseSchedule.scaled_linear(9, 0.1, 0.4).betas)
  np.testing.assert_array_equal(
      schedules.make_schedule("betas", betas=[0.1, 0.3]).betas, [0.1, 0.3])
  for arguments in (dict(name="sine"), dict(name="betas"),
                    dict(name="linear", betas=[0.1])):
    with pytest.raises(ValueError, match="Received"):
      schedules.make_schedule(**arguments)


def test_exploding_schedule_in_closed_form():
  schedule = schedules.make_schedule(
      "geometric", 101, sigma_min=0.02, sigma_max=80.0)
  t = np.array([0.0, 12.25, 50.0, 99.5, 100.0])
  sigma = 0.02 * 4000 ** (t / 100)  # Geometric between the steps, too.
  np.testing.assert_allclose(schedule.abar(t), 1 / (1 + sigma**2), rtol=1e-12)
  np.testing.assert_allclose(schedule.log_snr(t), -np.log(sigma), rtol=1e-12)
  np.testing.assert_allclose(schedule.time_of_log_snr(-np.log(sigma)), t,
                             atol=1e-9)
  alpha_t, sigma_t = schedule.alpha_sigma(t)
  np.testing.assert_allclose(alpha_t, 1 / np.sqrt(1 + sigma**2), rtol=2e-6)
  np.testing.assert_allclose(sigma_t, sigma / np.sqrt(1 + sigma**2), rtol=2e-6)
  # At the steps it is the process of its betas.
  np.testing.assert_allclose(
      NoiseSchedule(schedule.betas).abar(np.arange(101)),
      schedule.abar(np.arange(101)), rtol=1e-10)
  # A stride of the base class.
  times = schedule.stride("logsnr", 5)
  np.testing.assert_allclose(times, [100, 75, 50, 25, 0], atol=1e-9)


@pytest.mark.parametrize("changes,words", [
    (dict(name="sigmas"), "sigmas must be given"),
    (dict(name="cosine", sigmas=[1.0]), "sigmas must be given.*only then"),
    (dict(name="sigmas", sigmas=[1.0, 1.0]), "positive and increase"),
    (dict(name="sigmas", sigmas=[0.0, 1.0]), "positive and increase"),
    (dict(name="sigmas", sigmas=[]), "non-empty"),
    (dict(name="geometric", sigma_min=3, sigma_max=2), "below sigma_max.*3"),
])
def test_exploding_schedules_that_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    schedules.make_schedule(**changes)

"""Tests of `ddss_tf.schedules`."""

import numpy as np
import pytest
import tensorflow as tf

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


@pytest.mark.parametrize("name", ["linear", "quadratic"])
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
  with pytest.raises(ValueError, match="linear, quadratic.*'cubic'"):
    linear.stride("cubic", 5)
  with pytest.raises(ValueError, match="between 0 and 1"):
    NoiseSchedule([0.1, 1.0])
  with pytest.raises(ValueError, match="non-empty"):
    NoiseSchedule([])

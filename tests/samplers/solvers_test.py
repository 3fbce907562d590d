"""Tests of the training-free samplers: parity, order, exactness."""

import os

import numpy as np
import pytest
import tensorflow as tf

from ddss_tf.samplers import chain
from ddss_tf.samplers import solvers
from ddss_tf.samplers import strides
from ddss_tf.schedules import NoiseSchedule
from project import TESTDATA

FIXTURE = np.load(os.path.join(
    TESTDATA, "solvers.npz"))
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


# On one pixel with data N(MEAN, STD^2) the probability-flow ODE is solved by
# x_t = alpha_t MEAN + c sqrt(alpha_t^2 STD^2 + sigma_t^2), c from the start.
MEAN, STD, START = 0.3, 0.6, 1.3


def exact_solution(begin, end):
  def alpha_sigma(log_snr):
    return (1 + np.exp(-2 * log_snr)) ** -0.5, (1 + np.exp(2 * log_snr)) ** -0.5

  (a, b), (c, d) = alpha_sigma(begin), alpha_sigma(end)
  return c * MEAN + (START - a * MEAN) * np.sqrt(
      ((c * STD) ** 2 + d**2) / ((a * STD) ** 2 + b**2))


def run_numpy(eps, c, x_T, noise=0.0):
  """The chain's equation in float64 NumPy; the image and the states."""
  states = [np.asarray(x_T, np.float64)]
  for k in range(len(c.times)):
    x0 = (c.x0_from_state[k] * states[-1]
          + c.x0_from_eps[k] * eps(states[-1], c.times[k]))
    states.append(c.x0_weights[k] * x0 + c.noise_scales[k] * noise + sum(
        w * x for w, x in zip(c.state_weights[k], states)))
  return states[-1], states[:-1]


def solve(schedule, coefficients):
  """A sampler on that pixel: the image and the states."""
  def eps(x, t):
    abar = schedule.abar(t)
    slope = np.sqrt(1 - abar) / (abar * STD**2 + 1 - abar)
    return slope * (x - np.sqrt(abar) * MEAN)

  return run_numpy(eps, coefficients, START)


# UniPC of order p corrects its states, which makes the whole of order p + 1.
# The published third order of DPM-Solver++ is of second order: half a term.
@pytest.mark.parametrize("solver,order", [
    ("ddim", 1), ("dpm++2m", 2), ("dpm++3m", 2), ("dpm++3m-exact", 3),
    ("deis2", 2), ("deis3", 3), ("ab2", 2), ("ab3", 3), ("ipndm", 2),
    ("pndm", 2), ("unipc2-bh1", 3), ("unipc2-bh2", 3), ("unipc3-bh1", 4),
    ("unipc3-bh2", 4)])
def test_convergence_order(solver, order):
  schedule = NoiseSchedule.linear()
  begin, end = -3.0, 2.0
  abar_end = 1 / (1 + np.exp(-2 * end))
  errors = []
  for steps in (24, 96):
    if solver in ("ipndm", "pndm", "ddim"):
      grid = np.linspace(begin, end, steps + 1)
    else:
      # The first step is of first order whatever the solver: make it short.
      grid = np.linspace(begin, end, steps)
      grid = np.insert(grid, 1, begin + (grid[1] - grid[0]) ** 2)
    times = schedule.time_of_log_snr(grid[:-1])
    if solver == "ddim":
      # It only goes to clean images: its last state is where the others end.
      value = solve(schedule, solvers.ddim_coefficients(
          schedule, schedule.time_of_log_snr(grid)))[1][-1]
    else:
      value, _ = solve(schedule, solvers.solver_coefficients(
          schedule, solver, len(times) + (solver == "pndm"), times,
          abar_end=abar_end, lower_order_final=False))
    errors.append(abs(value - exact_solution(begin, end)))
  measured = np.log(errors[0] / errors[1]) / np.log(4)
  assert order - 0.25 < measured < order + 0.6, (measured, errors)


@pytest.mark.parametrize("stride", strides.STRIDES)
@pytest.mark.parametrize("schedule", [
    NoiseSchedule.linear(), NoiseSchedule.cosine(),
    NoiseSchedule.scaled_linear(), NoiseSchedule(np.full(50, 0.07))])
def test_every_solver_on_every_stride_and_schedule(stride, schedule):
  # Data of one point: the exact x0_hat is that point at every state, so every
  # consistent solver ends there exactly; K from 1 up.
  point = 0.37

  def eps(x, t):
    abar = schedule.abar(t)
    return (x - np.sqrt(abar) * point) / np.sqrt(1 - abar)

  for solver in solvers.SOLVERS:
    for steps in (1, 2, 3, 5, 10, 25):
      c = solvers.solver_coefficients(schedule, solver, steps, stride)
      c.validate()
      assert len(c.times) == steps
      image, _ = run_numpy(eps, c, [-0.8, 1.6], noise=1.0)
      # The cosine schedule divides by an alpha_T of 5e-5.
      np.testing.assert_allclose(image, point, atol=1e-5)


@pytest.mark.parametrize("stride", ["linear", "logsnr"])
def test_a_hundred_steps(stride):
  schedule, point = NoiseSchedule.linear(), 0.37
  for solver in solvers.SOLVERS:
    c = solvers.solver_coefficients(schedule, solver, 100, stride)

    def eps(x, t):
      abar = schedule.abar(t)
      return (x - np.sqrt(abar) * point) / np.sqrt(1 - abar)

    image, _ = run_numpy(eps, c, [-0.8, 1.6], noise=1.0)
    np.testing.assert_allclose(image, point, atol=1e-5, err_msg=solver)


def test_elimination_is_exact():
  # DPM-Solver++(2M) as its loop, with a non-linear network, against its point
  # of the structure: float64, 1e-12.
  schedule = NoiseSchedule.linear()
  steps = 10
  c = solvers.solver_coefficients(schedule, "dpm++2m", steps, "quadratic")
  # The figures of the literature's quadratic K = 10.
  np.testing.assert_allclose(c.x0_weights[8], 1.255, atol=5e-4)
  abar = np.append(schedule.abar(c.times), 1.0)
  alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
  with np.errstate(divide="ignore"):
    lam = np.log(alpha / sigma)
  x = np.array([[[[1.1, -0.4]]]])
  history = []
  for k in range(steps):
    eps = np.tanh(1.3 * x) + 0.1 * np.sin(c.times[k])
    history.append((x - sigma[k] * eps) / alpha[k])
    h = lam[k + 1] - lam[k]
    d = history[-1]
    if 0 < k < steps - 1:
      r = (lam[k] - lam[k - 1]) / h
      d = (1 + 0.5 / r) * d - 0.5 / r * history[-2]
    x = sigma[k + 1] / sigma[k] * x + alpha[k + 1] * -np.expm1(-h) * d
  images = chain.run_chain(
      lambda x, t: tf.tanh(1.3 * x) + 0.1 * np.sin(np.asarray(t)[0]), c,
      tf.constant([[[[1.1, -0.4]]]], tf.float64))
  np.testing.assert_allclose(images, x, atol=1e-11)


@pytest.mark.parametrize("arguments,message", [
    (dict(solver="euler"), "ddpm, ddim, .*'euler'"),
    (dict(solver="dpm++2m", eta=0.5), "no noise.*0.5"),
    (dict(solver="ddim", eta=-0.1), "at least 0.*-0.1"),
    (dict(solver="ddim", abar_end=0.9), "abar_end=1.*0.9"),
    (dict(solver="ab2", stride=[900, 500, 100]), r"5 times.*\(3,\)"),
    (dict(solver="pndm", stride=[900, 700, 500, 300, 100]), r"4 times.*\(5,\)"),
    (dict(solver="ab2", stride=[900, 500, 500, 20, 10]), "decrease strictly"),
    (dict(solver="ab2", stride=[1000, 500, 400, 20, 10]), r"\[0, 999\]"),
    (dict(solver="ab2", num_steps=0), "1 to 1000.*num_steps=0"),
])
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    solvers.solver_coefficients(
        NoiseSchedule.linear(), **{"num_steps": 5, **arguments})

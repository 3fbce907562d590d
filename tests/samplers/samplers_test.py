"""Tests of the families: closed forms, equivalences, counts, ranges."""

import functools
import math

import gin
import keras
import numpy as np
import pytest
import tensorflow as tf

from ddss_tf.denoisers import gaussian
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import families
from ddss_tf.samplers import labels as labels_lib
from ddss_tf.samplers import marginals
from ddss_tf.samplers import sampler as sampler_lib
from ddss_tf.samplers import solvers
from ddss_tf.samplers import strides
from ddss_tf.errors import UserError
from ddss_tf.schedules import NoiseSchedule, make_schedule

SCHEDULE = NoiseSchedule.linear()
SHAPE = (2, 2, 1)
MEAN, STD = 0.3, 0.4
DENOISER = gaussian.gaussian_denoiser(SHAPE, MEAN, STD)


def ddim(steps, stride="linear", eta=0.0):
  return sampler_lib.SolverSampler(SCHEDULE, steps, "ddim", stride, eta)


def gaussian_moments(times, eta):
  """Exact output mean and variance of DDIM on N(MEAN, STD^2), in plain Python.

  Derived with eps, not with state weights: on a Gaussian data set x0_hat and
  eps are affine in x_t, so mean and variance of x_t follow from step to step.
  """
  abar = [float(SCHEDULE.abar(t)) for t in times] + [1.0]
  mean, variance = 0.0, 1.0
  for k in range(len(times)):
    a_t, a_s = abar[k], abar[k + 1]
    total = a_t * STD**2 + 1 - a_t
    # eps = slope (x - sqrt(a_t) MEAN); x0_hat = (x - sqrt(1 - a_t) eps) / ...
    slope = math.sqrt(1 - a_t) / total
    sigma = 0.0
    if k < len(times) - 1:
      sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    direction = math.sqrt(max(1 - a_s - sigma**2, 0.0))
    gain = (math.sqrt(a_s / a_t) * (1 - math.sqrt(1 - a_t) * slope)
            + direction * slope)
    offset = slope * math.sqrt(a_t) * MEAN * (
        math.sqrt(a_s / a_t) * math.sqrt(1 - a_t) - direction)
    mean = gain * mean + offset
    variance = gain**2 * variance + sigma**2
  return mean, variance


def chain_moments(coefficients):
  """Exact output moments of any sampler on the same data, from its structure.

  Every state is affine in x_T and the step noises; the network is affine in its
  state. Pushes unit vectors through the chain itself.
  """
  steps = coefficients.num_steps
  # Batch of inputs: zero, one for x_T, one for each step noise.
  x_T = np.zeros((1 + steps, *SHAPE), np.float32)
  noise = np.zeros((1 + steps, steps - 1, *SHAPE), np.float32)
  x_T[1] = 1
  for k in range(steps - 1):
    noise[2 + k, k] = 1
  out = chain.run_chain(DENOISER.eps, coefficients, tf.constant(x_T),
                        tf.constant(noise)).numpy()[:, 0, 0, 0]
  return out[0], np.sum((out[1:].astype(np.float64) - out[0]) ** 2)


@pytest.mark.parametrize("stride", ["linear", "quadratic"])
@pytest.mark.parametrize("steps,eta", [
    (1, 0.0), (2, 0.5), (5, 0.0), (5, 0.5), (5, 1.0), (10, 0.0), (10, 1.0),
    (25, 0.5)])
def test_ddim_has_the_closed_form_on_gaussian_data(stride, steps, eta):
  sampler = ddim(steps, stride, eta)
  mean, variance = chain_moments(sampler.coefficients())
  expected = gaussian_moments(strides.times_of(SCHEDULE, stride, steps), eta)
  np.testing.assert_allclose([mean, variance], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_ddim_monte_carlo():
  # The same moments from samples, through `draw_noise`: 65 536 pixels.
  sampler = ddim(5, "linear", 1.0)
  @tf.function
  def sample():
    x_T, noise = chain.draw_noise(
        tf.constant([3, 0]), tf.range(2**14), SHAPE, 5)
    return sampler(x_T, noise, eps_fn=DENOISER.eps)

  images = sample().numpy()
  mean, variance = gaussian_moments(strides.times_of(SCHEDULE, "linear", 5), 1.0)
  np.testing.assert_allclose(images.mean(), mean, atol=4 * variance**.5 / 256)
  np.testing.assert_allclose(images.var(), variance, rtol=0.025)


def test_many_steps_recover_the_data():
  # DDIM is of first order: the error falls with 1 / K, down to the data's own
  # moments. The closed form carries it to K = T, the chain to K = 100.
  errors = []
  for steps in (100, 200, 1000):
    mean, variance = gaussian_moments(strides.times_of(SCHEDULE, "linear", steps), 0.0)
    errors.append(abs(variance / STD**2 - 1))
  assert errors[1] < 0.6 * errors[0] and errors[2] < 0.01
  np.testing.assert_allclose(mean, MEAN, atol=3e-3)
  moments = chain_moments(ddim(100).coefficients())
  np.testing.assert_allclose(
      moments, gaussian_moments(strides.times_of(SCHEDULE, "linear", 100), 0.0), rtol=1e-3)


@functools.lru_cache
def noise_of(num_steps):
  return chain.draw_noise(
      tf.constant([1, 0]), tf.range(16), SHAPE, num_steps)


def images_of(sampler):
  x_T, noise = noise_of(sampler.num_steps)
  return sampler(x_T, noise, eps_fn=DENOISER.eps).numpy()


LEARNED = [name + extra for name in families.LEARNED
           for extra in ("", "+pred", "+time", "+pred+time")]


@pytest.mark.parametrize("family", LEARNED)
@pytest.mark.parametrize("stride,eta,steps", [
    ("linear", 0.0, 1), ("linear", 1.0, 5), ("quadratic", 0.7, 5),
    ("karras", 0.0, 10)])
def test_real_families_start_at_ddim(family, stride, eta, steps):
  if family.startswith("vars"):
    start = sampler_lib.SolverSampler(SCHEDULE, steps, "ddpm", stride)
    sampler = families.make_sampler(SCHEDULE, family, steps, stride=stride)
  else:
    start = ddim(steps, stride, eta)
    sampler = families.make_sampler(
        SCHEDULE, family, steps, init="ddim", stride=stride, eta=eta)
  np.testing.assert_allclose(images_of(sampler), images_of(start), atol=3e-5)


@pytest.mark.parametrize("family", ["ggdm", "ggdm+pred+time"])
@pytest.mark.parametrize(
    "solver", [s for s in solvers.SOLVERS if s not in ("ddim", "ddpm")])
def test_ggdm_holds_every_solver(family, solver):
  # On the strides they are used on; K = 10, and one K with odd ends.
  for steps, stride in ((10, "linspace_open"), (3, "logsnr")):
    start = sampler_lib.SolverSampler(SCHEDULE, steps, solver, stride)
    ggdm = families.make_sampler(
        SCHEDULE, family, steps, init=solver, stride=stride)
    # Without +pred x0_hat goes through Theorem 1, in float32 coefficients.
    tolerance = 2e-5 if "+pred" in family else 5e-4
    # Relative, too: on log-SNR steps a 3-step PNDM leaves [-1, 1] far behind.
    np.testing.assert_allclose(
        images_of(ggdm), images_of(start), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("extra", ["+pred", "+time", "+pred+time"])
def test_extras_leave_a_solver_where_it_is(extra):
  for solver in ("ddpm", "dpm++2m", "unipc3-bh1", "deis3"):
    plain = sampler_lib.SolverSampler(SCHEDULE, 6, solver, "quadratic")
    extended = families.make_sampler(
        SCHEDULE, solver + extra, 6, stride="quadratic")
    np.testing.assert_allclose(
        images_of(extended), images_of(plain), atol=2e-5)
    assert set(extended.variables_by_kind) == {
        {"pred": "pred", "time": "times"}[e] for e in extra[1:].split("+")}


def test_a_search_can_start_where_another_ended(tmp_path):
  first = families.make_sampler(SCHEDULE, "ggdm+pred+time", 4, init="ddpm")
  rng = np.random.default_rng(0)
  for variable in first.weights:
    value = variable.numpy() + 0.02 * rng.normal(size=variable.shape)
    if variable.constraint is not None:
      value = variable.constraint(np.asarray(value, np.float32))
    variable.assign(value)
  path = str(tmp_path / "sampler.json")
  found = first.coefficients().numpy()
  card.write(path, card.SamplerCard("found", found, {}, {}))
  for init in (path, found):
    second = families.make_sampler(
        SCHEDULE, "ggdm+pred+time", 4, init=init)
    np.testing.assert_array_equal(images_of(second), images_of(first))
  # What the smaller family cannot hold it must not pretend to.
  with pytest.raises(UserError, match="without .pred cannot start"):
    families.make_sampler(SCHEDULE, "ggdm", 4, init=path)
  with pytest.raises(UserError, match="num_steps=5.*of 4"):
    families.make_sampler(SCHEDULE, "ggdm+pred", 5, init=path)


@pytest.mark.parametrize("family", LEARNED)
def test_paper_families_start_near_ddim(family):
  # Floors of 1e-3 in the coefficients and 0.1 of a step in the first time.
  start = ddim(5, eta=1.0 if family.startswith("vars") else 0.0)
  sampler = families.make_sampler(
      SCHEDULE, family, 5, stride="linear", parameterisation="paper")
  np.testing.assert_allclose(images_of(sampler), images_of(start), atol=0.05)
  times = sampler.coefficients().times.numpy()
  np.testing.assert_allclose(times, [800, 600, 400, 200, 0], atol=0.11)


def test_eta_one_is_ddpm():
  np.testing.assert_array_equal(
      images_of(families.make_sampler(SCHEDULE, "ddpm", 5)),
      images_of(families.make_sampler(SCHEDULE, "ddim", 5, eta=1.0)))


def test_a_fixed_large_variance_is_beta():
  """Ho et al. (2020), section 3.2: sigma_t^2 = beta_t, the mean unchanged."""
  schedule = make_schedule("cosine", 40)
  large, small = (sampler_lib.full_chain(schedule, variance)
                  for variance in ("fixed_large", "posterior"))
  one, other = large.coefficients().numpy(), small.coefficients().numpy()
  np.testing.assert_allclose(
      one.noise_scales[:-1], np.sqrt(schedule.betas[:0:-1]), rtol=1e-4)
  assert one.noise_scales[-1] == 0
  assert np.all(one.noise_scales[:-1] > other.noise_scales[:-1])
  for name, a, b in zip(one._fields, one, other):
    if name not in ("noise_scales", "guidance_scales"):
      np.testing.assert_array_equal(a, b, err_msg=name)
  assert [large.label, small.label] == [
      "DDPM (full chain, fixed-large variance)", "DDPM (full chain)"]
  fewer = sampler_lib.full_chain(schedule, num_steps=10)
  assert fewer.label == "DDPM (10 of 40 steps)"
  linear = sampler_lib.SolverSampler(
      schedule, 10, "ddpm", variance="fixed_large")
  assert linear.label == "DDPM (fixed-large variance) linear"
  np.testing.assert_allclose(
      linear.coefficients().times, fewer.coefficients().times)
  for label in (large.label, small.label, fewer.label):
    assert labels_lib.is_full_chain(label), label
  assert not labels_lib.is_full_chain(linear.label)
  for label in (large.label, fewer.label, linear.label):
    assert labels_lib.group(label) == labels_lib.BASELINES, label
  for solver, options in (("ddim", {}), ("ddpm", {"eta": 0.5}),
                          ("dpm++2m", {})):
    with pytest.raises(ValueError, match="variance must be 'posterior' but for"):
      sampler_lib.SolverSampler(
          schedule, 10, solver, variance="fixed_large", **options)
  with pytest.raises(ValueError, match="must be one of posterior, fixed_large"):
    sampler_lib.SolverSampler(schedule, 10, "ddpm", variance="large")


def test_ddpm_is_the_posterior_of_ho_et_al():
  # Ho et al. (2020), equations 6 and 7, on consecutive training steps.
  times = [501, 500, 499]
  c = solvers.ddim_coefficients(SCHEDULE, times, 1.0)
  beta = SCHEDULE.betas[501]
  abar, before = SCHEDULE.abar(501), SCHEDULE.abar(500)
  np.testing.assert_allclose(
      c.x0_weights[0], np.sqrt(before) * beta / (1 - abar), rtol=1e-9)
  np.testing.assert_allclose(
      c.state_weights[0, 0], np.sqrt(1 - beta) * (1 - before) / (1 - abar),
      rtol=1e-9)
  np.testing.assert_allclose(
      c.noise_scales[0] ** 2, beta * (1 - before) / (1 - abar), rtol=1e-9)


def random_ggdm(steps=5, seed=0):
  rng = np.random.default_rng(seed)
  return (np.tril(rng.normal(size=(steps, steps))).astype(np.float32) * 0.5,
          rng.normal(size=steps).astype(np.float32),
          rng.uniform(0.1, 1, steps).astype(np.float32), 0.3, 0.9)


def test_theorem_1_against_the_recursion():
  weights, x0, noise, first_mean, first_std = random_ggdm()
  steps = len(x0)
  # The paper's own indices: state t = 1 ... K, K the noisiest, mu[t][u] the
  # weight of x_u (u = 0: of x_0) in x_t.
  mu = np.zeros((steps + 1, steps + 1))
  sigma = np.zeros(steps + 1)
  mu[steps, 0], sigma[steps] = first_mean, first_std
  for k in range(steps - 1):
    t = steps - 1 - k
    mu[t, 0], sigma[t] = x0[k], noise[k]
    for u in range(k + 1):
      mu[t, steps - u] = weights[k, u]
  a, v = np.zeros(steps + 1), np.zeros(steps + 1)
  for t in range(1, steps + 1):
    row, variance = mu[t].copy(), sigma[t] ** 2
    for i in range(1, steps - t + 1):
      factor = row[t + i]
      variance += (factor * sigma[t + i]) ** 2
      row = np.where(np.arange(steps + 1) == t + i, row, row
                     + factor * mu[t + i])
    a[t], v[t] = row[0], variance
  got_a, got_v = marginals.marginals(weights, x0, noise, first_mean, first_std)
  np.testing.assert_allclose(got_a.numpy()[::-1], a[1:], rtol=1e-5)
  np.testing.assert_allclose(got_v.numpy()[::-1], v[1:], rtol=1e-5)


def test_theorem_1_against_monte_carlo():
  weights, x0, noise, first_mean, first_std = random_ggdm(4, seed=2)
  rng = np.random.default_rng(0)
  count, image = 400_000, 0.7
  states = [first_mean * image + first_std * rng.normal(size=count)]
  for k in range(3):
    states.append(x0[k] * image + noise[k] * rng.normal(size=count)
                  + sum(weights[k, u] * states[u] for u in range(k + 1)))
  a, v = marginals.marginals(weights, x0, noise, first_mean, first_std)
  for k, state in enumerate(states):
    deviation = float(v[k]) ** 0.5
    np.testing.assert_allclose(
        state.mean(), a[k] * image, atol=5 * deviation / count**0.5)
    np.testing.assert_allclose(state.var(), v[k], rtol=0.015)


def random_sampler(family, steps, seed=0, **options):
  """A sampler of a family, away from its start, and valid."""
  sampler = families.make_sampler(SCHEDULE, family, steps, **{
      "init": None if "vars" in family else "ddpm", **options})
  rng = np.random.default_rng(seed)
  for variable in sampler.weights:
    value = variable.numpy() + 0.05 * rng.normal(size=variable.shape)
    if variable.constraint is not None:
      value = variable.constraint(np.asarray(value, np.float32))
    variable.assign(value)
  return sampler


def propagated_moments(c):
  """Output mean and variance on the same data by a covariance recursion.

  All states are jointly Gaussian: mean vector and covariance matrix grow by one
  entry a step. In float64 NumPy, without the chain.
  """
  steps = len(c.times)
  mean, covariance = np.zeros(1), np.ones((1, 1))
  for k in range(steps):
    abar = SCHEDULE.abar(c.times[k])
    slope = np.sqrt(1 - abar) / (abar * STD**2 + 1 - abar)
    # x0_hat = gain x_k + offset
    gain = c.x0_from_state[k] + c.x0_from_eps[k] * slope
    offset = -c.x0_from_eps[k] * slope * np.sqrt(abar) * MEAN
    row = c.state_weights[k, :k + 1].astype(np.float64)
    row[k] += c.x0_weights[k] * gain
    cross = covariance @ row
    variance = row @ cross + c.noise_scales[k].astype(np.float64) ** 2
    mean = np.append(mean, row @ mean + c.x0_weights[k] * offset)
    covariance = np.block([
        [covariance, cross[:, None]], [cross[None], variance]])
  return mean[-1], covariance[-1, -1]


@pytest.mark.parametrize("family", LEARNED + ["ddpm+pred+time"])
@pytest.mark.parametrize("steps", [2, 5, 10])
def test_every_stochastic_family_has_its_closed_form(family, steps):
  c = random_sampler(family, steps).coefficients().numpy()
  assert np.any(c.noise_scales > 0)
  np.testing.assert_allclose(
      chain_moments(c), propagated_moments(c), rtol=5e-4, atol=5e-5)


@pytest.mark.parametrize("family", ["vars", "ddim-learned"])
def test_marginals_are_those_the_family_claims(family):
  # Theorem 1 on their rows. VARS: the learned variances. Learned DDIM: the
  # forward process's own, whatever the noise scales.
  sampler = random_sampler(family, 6)
  c = sampler.coefficients().numpy()
  if family == "vars":
    logits = np.append(sampler.weights[0].numpy(), 1.0)
    variance = np.cumsum(np.exp(logits) / np.exp(logits).sum())[:-1][::-1]
  else:
    variance = 1 - SCHEDULE.abar(c.times)
  a, v = marginals.marginals(
      c.state_weights, c.x0_weights, c.noise_scales,
      np.sqrt(1 - variance[0]), np.sqrt(variance[0]))
  np.testing.assert_allclose(a, np.sqrt(1 - variance), rtol=1e-4)
  np.testing.assert_allclose(v, variance, rtol=1e-3)
  np.testing.assert_allclose(
      (c.x0_from_eps / c.x0_from_state) ** 2, variance, rtol=1e-4)


@pytest.mark.parametrize("family", ["ggdm", "rddim"])
@pytest.mark.parametrize("parameterisation", ["real", "paper"])
def test_predictions_follow_from_the_marginals(family, parameterisation):
  """Without +PRED, wherever a search may lead: x_k = a_k x_0 + sqrt(v_k) eps.

  The moments of Theorem 1 as those of a vector of jointly Gaussian states.
  """
  options = dict(parameterisation=parameterisation,
                 init="ddpm" if parameterisation == "real" else None)
  c = random_sampler(family, 6, **options).coefficients().numpy()
  start = families.make_sampler(SCHEDULE, family, 6, **options)
  moved = np.abs(c.state_weights - start.coefficients().numpy().state_weights)
  assert moved.max() > 1e-3
  mean = np.array([1 / c.x0_from_state[0]], np.float64)
  covariance = np.array(
      [[(c.x0_from_eps[0] / c.x0_from_state[0]) ** 2]], np.float64)
  for k in range(5):
    row = c.state_weights[k, :k + 1].astype(np.float64)
    cross = covariance @ row
    variance = row @ cross + c.noise_scales[k].astype(np.float64) ** 2
    mean = np.append(mean, row @ mean + c.x0_weights[k])
    covariance = np.block([
        [covariance, cross[:, None]], [cross[None], variance]])
  np.testing.assert_allclose(1 / c.x0_from_state, mean, rtol=1e-4)
  np.testing.assert_allclose(
      (c.x0_from_eps / c.x0_from_state) ** 2, np.diag(covariance), rtol=1e-3)
  assert np.all(c.x0_from_eps / c.x0_from_state < 0)


@pytest.mark.parametrize("family,steps,start", [
    ("ddim-learned", 5, ("ddim", "trailing")),
    ("rddim", 10, ("ddim", "trailing")),
    ("ggdm", 3, ("dpm++3m", "linear")), ("ggdm", 5, ("dpm++3m", "linspace")),
    ("ggdm", 10, ("unipc3-bh1", "linspace_open")),
    ("ggdm", 20, ("unipc2-bh1", "trailing"))])
def test_default_starts(family, steps, start):
  c = families.make_sampler(SCHEDULE, family, steps).coefficients()
  solver, stride = start
  expected = solvers.solver_coefficients(SCHEDULE, solver, steps, stride)
  for name, values in c.arrays().items():
    np.testing.assert_allclose(
        values, expected.arrays()[name], rtol=1e-4, atol=1e-5, err_msg=name)
  paper = families.make_sampler(
      SCHEDULE, family, steps, parameterisation="paper").coefficients()
  np.testing.assert_allclose(
      paper.times, strides.times_of(SCHEDULE, "linear", steps), atol=1e-3)


def test_a_learned_family_starts_on_a_list_of_times():
  times = [900, 400.5, 10]
  try:
    with gin.unlock_config():
      gin.parse_config(["mine/make_sampler.family = 'ggdm+pred+time'",
                        "mine/make_sampler.init = 'unipc2-bh2'",
                        f"mine/make_sampler.stride = {times}"])
    with gin.config_scope("mine"):
      c = families.make_sampler(SCHEDULE, num_steps=3).coefficients()
  finally:
    gin.clear_config()
  expected = solvers.solver_coefficients(SCHEDULE, "unipc2-bh2", 3, times)
  np.testing.assert_allclose(c.times, times, rtol=1e-6)
  for name, values in c.arrays().items():
    np.testing.assert_allclose(
        values, expected.arrays()[name], rtol=2e-5, atol=1e-6, err_msg=name)
  with pytest.raises(ValueError, match="3.*4|4.*3"):
    families.make_sampler(
        SCHEDULE, "ggdm", 4, init="unipc2-bh2", stride=times).coefficients()


def test_times_stay_in_order_and_earlier_ones_win():
  sampler = families.make_sampler(SCHEDULE, "ggdm+pred+time", 4, init="ddim")
  times, = sampler.variables_by_kind["times"]
  # 750, 500, 250, 0: the last wants to go to 400, the second to -30 and back.
  times.assign(times.constraint(np.float32([0.3, 0, 0, 0.4])))
  np.testing.assert_allclose(
      sampler.coefficients().times, [999, 500, 250, 250], atol=1e-3)
  times.assign(times.constraint(np.float32([0, -0.53, 0, 0.1])))
  np.testing.assert_allclose(
      sampler.coefficients().times, [750, 0, 0, 0], atol=1e-3)


def count(sampler, kind):
  return sum(int(np.prod(v.shape))
             for v in sampler.variables_by_kind.get(kind, []))


@pytest.mark.parametrize("parameterisation", ["real", "paper"])
@pytest.mark.parametrize(
    "steps,weights", [(5, 14), (10, 54), (15, 119), (20, 209), (25, 324)])
def test_free_parameters(parameterisation, steps, weights):
  full = families.GGDM(SCHEDULE, steps, pred=True, time=True,
                       parameterisation=parameterisation)
  assert count(full, "weights") == weights
  assert count(full, "noise_scales") == steps - 1
  assert count(full, "times") == steps
  # The real form has two numbers a step where the paper has one.
  assert count(full, "pred") == steps * (
      2 if parameterisation == "real" else 1)
  plain = families.GGDM(SCHEDULE, steps, parameterisation=parameterisation)
  assert count(plain, "weights") == weights + 2  # and the row of x_K
  assert set(plain.variables_by_kind) == {"weights", "noise_scales"}
  make = lambda family: families.make_sampler(
      SCHEDULE, family, steps, parameterisation=parameterisation)
  rddim = make("rddim")
  assert count(rddim, "weights") == 2 * (steps - 1) + 2
  assert count(rddim, "noise_scales") == steps - 1
  assert make("ddim-learned").count_params() == steps - 1
  assert make("vars").count_params() == steps


def test_paper_pred_is_variance_preserving():
  sampler = families.GGDM(
      SCHEDULE, 5, pred=True, time=True, parameterisation="paper")
  rng = np.random.default_rng(0)
  for variable in sampler.weights:
    variable.assign(rng.normal(size=variable.shape))
  c = sampler.coefficients().numpy()
  s = (c.x0_from_eps / c.x0_from_state) ** 2
  np.testing.assert_allclose(c.x0_from_state, 1 / np.sqrt(1 - s), rtol=1e-4)
  assert np.all(np.diff(s) < 0) and np.all(np.diff(c.times) < 0)
  assert np.all((c.noise_scales[:-1] > 0) & (c.noise_scales[:-1] < 1))


@pytest.mark.parametrize("family", LEARNED)
@pytest.mark.parametrize("parameterisation", ["real", "paper"])
def test_coefficients_stay_valid(family, parameterisation):
  sampler = families.make_sampler(
      SCHEDULE, family, 4, parameterisation=parameterisation)
  optimizer = keras.optimizers.SGD(5.0)
  rng = np.random.default_rng(0)
  for _ in range(15):
    optimizer.apply([tf.constant(rng.normal(size=v.shape), tf.float32)
                     for v in sampler.weights], sampler.weights)
    coefficients = sampler.coefficients().numpy()
    coefficients.validate()
    assert np.all(coefficients.times <= 1000)


@pytest.mark.parametrize("family", LEARNED)
@pytest.mark.parametrize("parameterisation", ["real", "paper"])
def test_every_variable_gets_a_gradient(family, parameterisation):
  sampler = families.make_sampler(
      SCHEDULE, family, 4, parameterisation=parameterisation,
      init="ddpm" if family.startswith("vars") else "ddim",
      eta=None if family.startswith("vars") else 0.5)
  x_T, noise = noise_of(4)
  variables = [v.value for v in sampler.weights]
  with tf.GradientTape() as tape:
    images = sampler(x_T, noise, eps_fn=DENOISER.eps)
    loss = tf.reduce_mean(images**3 + images)
  for variable, gradient in zip(
      sampler.weights, tape.gradient(loss, variables)):
    assert np.all(np.isfinite(gradient)), variable.name
    assert np.all(np.asarray(gradient) != 0), variable.name


def test_free_last_row_can_mix():
  sampler = families.GGDM(SCHEDULE, 3, pred=True, free_last_row=True,
                          init="ddim")
  before = images_of(sampler)
  np.testing.assert_allclose(
      before, images_of(ddim(3)), atol=2e-5)
  state, = [v for v in sampler.weights if v.name == "state_weights"]
  state.assign([0, 0, 0, 0, 0, 0.5])
  assert sampler.coefficients().state_weights[2, 2] == 0.5
  assert np.abs(images_of(sampler) - before).max() > 1e-3


@pytest.mark.parametrize("arguments,message", [
    (dict(family="magic", num_steps=5), "ddpm, ddim.*'magic'"),
    (dict(family="ddim", num_steps=0), "1 to 1000.*num_steps=0"),
    (dict(family="ddim", num_steps=-3), "1 to 1000.*num_steps=-3"),
    (dict(family="ggdm", num_steps=1001), "1 to 1000.*num_steps=1001"),
    (dict(family="ggdm", num_steps=2.5), "whole number.*2.5"),
    (dict(family="ddim", num_steps=5, stride="cubic"), "'cubic'"),
    (dict(family="ddim", num_steps=5, eta=-1.0), "at least 0.*-1"),
    (dict(family="ggdm", num_steps=5, parameterisation="x"), "real, paper"),
    (dict(family="ggdm", num_steps=5, colour="red"), "colour"),
    (dict(family="ggdm", num_steps=5, parameterisation="paper",
          free_last_row=True), "free_last_row"),
])
def test_bad_arguments(arguments, message):
  with pytest.raises(UserError, match=message):
    families.make_sampler(SCHEDULE, **arguments)


@pytest.mark.parametrize("family,init", [
    ("vars", "ddpm"), ("ddim-learned", "ddpm"), ("ggdm+pred", "ddpm")])
def test_starts_are_exact_at_the_end_of_a_cosine_schedule(family, init):
  """Where abar is 2e-9, which is 0 as a difference from 1 in float32."""
  schedule = NoiseSchedule.cosine(1000)
  times = [999, 749, 499, 249]  # Named strides leave the last steps out.
  sampler = families.make_sampler(schedule, family, 4, init=init, stride=times)
  wanted = solvers.solver_coefficients(schedule, init, 4, times).numpy()
  assert wanted.x0_from_state[0] > 1e4
  for name, value in sampler.coefficients().numpy().arrays().items():
    np.testing.assert_allclose(
        value, getattr(wanted, name), rtol=2e-3, atol=1e-6, err_msg=name)

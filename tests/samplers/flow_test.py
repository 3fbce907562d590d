"""Tests of samplers on flows: exact at pure noise, and as others have them."""

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf import schedules
from ddss_tf.objectives import elbo
from ddss_tf.runs import fingerprint
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import flow
from ddss_tf.samplers import labels
from ddss_tf.samplers import solvers
from ddss_tf.samplers import strides
from ddss_tf.samplers.coefficients import Coefficients

MEAN, STD = 0.2, 0.5
SHAPE = (2, 2, 1)
SCHEDULE = schedules.FlowSchedule(1000, 3.0)


@pytest.fixture(scope="module")
def oracle():
  return ddss_tf.gaussian_denoiser(SHAPE, MEAN, STD, SCHEDULE)


def velocity(z, s):
  """u of the exact flow of N(MEAN, STD^2) in float64."""
  variance = ((1 - s) * STD) ** 2 + s**2
  residual = z - (1 - s) * MEAN
  x0 = MEAN + (1 - s) * STD**2 * residual / variance
  return s * residual / variance - x0


def noise(steps=1):
  return chain.draw_noise([7, 0], tf.range(4), SHAPE, steps)


def run_numpy(c, x_T):
  """The chain's equations in float64, in v; the image and the x0_hats."""
  states, x0_hats = [np.asarray(x_T, np.float64)], []
  for k, t in enumerate(c.times):
    s = SCHEDULE.noise_level(t)
    norm = np.hypot(1 - s, s)
    u = velocity(states[-1] * norm, s)
    v = norm * ((1 - 2 * s) / norm * states[-1] + u)
    x0_hats.append(c.x0_from_state[k] * states[-1] + c.x0_from_v[k] * v)
    states.append(c.x0_weights[k] * x0_hats[-1] + sum(
        w * x for w, x in zip(c.state_weights[k], states)))
  return states[-1], x0_hats


def euler(x_T, sigmas):
  z = np.asarray(x_T, np.float64)
  for s, end in zip(sigmas, np.append(sigmas[1:], 0.0)):
    z = z + (end - s) * velocity(z, s)
  return z


def heun(x_T, sigmas):
  """A textbook Heun, whose step to 0 is Euler's."""
  z = np.asarray(x_T, np.float64)
  for s, end in zip(sigmas, sigmas[1:]):
    first = velocity(z, s)
    second = velocity(z + (end - s) * first, end)
    z = z + (end - s) * (first + second) / 2
  return z - sigmas[-1] * velocity(z, sigmas[-1])


def run_tf(denoiser, coefficients, x_T, **options):
  return chain.run_chain(
      denoiser.output, denoiser.for_chain(coefficients), x_T, **options)


@pytest.mark.parametrize("stride", ["trailing", "flow-euler", "linear"])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_ddim_is_euler(oracle, stride, steps):
  c = solvers.solver_coefficients(SCHEDULE, "ddim", steps, stride)
  x_T, _ = noise()
  sigmas = SCHEDULE.noise_level(c.times)
  # The first state is x_T as it is: z is that only where s is 1.
  z = np.asarray(x_T, np.float64) * np.hypot(1 - sigmas[0], sigmas[0])
  expected = euler(z, sigmas)
  np.testing.assert_allclose(run_numpy(c, x_T)[0], expected, atol=1e-12)
  np.testing.assert_allclose(
      run_tf(oracle, c.numpy(), x_T), expected, atol=1e-5)


@pytest.mark.parametrize("calls,stride", [
    (1, "trailing"), (7, "trailing"), (13, "flow-dynamic"), (8, "trailing")])
def test_heun(oracle, calls, stride):
  c = solvers.solver_coefficients(SCHEDULE, "heun", calls, stride)
  assert c.num_steps == calls
  times = strides.times_of(SCHEDULE, stride, calls // 2 + 1)
  np.testing.assert_array_equal(np.unique(c.times)[::-1], times)
  sigmas = SCHEDULE.noise_level(times)
  x_T, _ = noise()
  if calls % 2:
    expected = heun(x_T, sigmas)
  else:
    # The last step before the image is Euler's.
    z = np.asarray(x_T, np.float64)
    for s, end in zip(sigmas[:-2], sigmas[1:-1]):
      first = velocity(z, s)
      z = z + (end - s) / 2 * (
          first + velocity(z + (end - s) * first, end))
    expected = euler(z, sigmas[-2:])
  np.testing.assert_allclose(run_numpy(c, x_T)[0], expected, atol=1e-12)
  np.testing.assert_allclose(
      run_tf(oracle, c.numpy(), x_T), expected, atol=1e-5)


@pytest.mark.slow
def test_heun_on_every_process():
  """It is of second order: a quarter of the error in steps of half the size."""
  for schedule in (ddss_tf.make_schedule(), SCHEDULE):
    denoiser = ddss_tf.gaussian_denoiser(SHAPE, MEAN, STD, schedule)
    x_T = tf.constant([[[[1.3]] * 2] * 2])
    times = np.linspace(0.9, 0.1, 65) * (schedule.num_train_steps - 1)
    ends = []
    for every in (1, 8, 16):
      grid = times[::every]
      c = solvers.solver_coefficients(
          schedule, "heun", 2 * len(grid) - 1, grid)
      _, states, _ = run_tf(denoiser, c.numpy(), x_T, trajectory=True)
      ends.append(states[-1][0, 0, 0, 0].numpy())
    fine, coarse = np.abs(np.subtract(ends[1:], ends[0]))
    assert fine < 0.35 * coarse and coarse < 0.05, (fine, coarse)


@pytest.mark.parametrize("solver", solvers.ALL_SOLVERS)
def test_every_solver_at_pure_noise(oracle, solver):
  """Finite and exact at s = 1: the first x0_hat is the mean of the data."""
  x_T, step_noise = noise(6)
  for steps in (1, 2, 3, 6):
    for stride in ("linspace", "flow-dynamic", "trailing"):
      c = solvers.solver_coefficients(SCHEDULE, solver, steps, stride)
      c.validate()
      assert c.times[0] == 999 and c.x0_from_eps is None
      assert c.x0_from_state[0] == 0 and c.x0_from_v[0] == -1
  images, _, x0_hats = run_tf(
      oracle, c.numpy(), x_T, step_noise=step_noise, trajectory=True)
  np.testing.assert_allclose(x0_hats[0], np.full(x_T.shape, MEAN), atol=1e-6)
  assert np.all(np.isfinite(images))
  # Nothing is 1 / alpha times as large.
  assert np.max(np.abs(c.state_weights)) < 4


# DEIS tends to it as well, but with 1 / log alpha.
@pytest.mark.parametrize("solver", [
    "ddpm", "ddim", "ab2", "ab3", "ipndm", "heun"])
def test_pure_noise_is_a_limit(solver):
  at, below = (solvers.solver_coefficients(SCHEDULE, solver, 5, [
      SCHEDULE.time_of_noise_level(s), 900, 700, 300, 100][:3 if (
          solver == "heun") else 5]) for s in (1.0, 1 - 1e-7))
  for name in ("x0_from_state", "x0_from_v", "state_weights", "x0_weights",
               "noise_scales"):
    np.testing.assert_allclose(at.arrays()[name], below.arrays()[name],
                               atol=1e-5, err_msg=name)


@pytest.mark.parametrize("solver", ["dpm++3m", "unipc2-bh1", "unipc2-bh2",
                                    "unipc3-bh2", "deis3", "ab3", "ipndm"])
def test_solvers_converge(solver):
  """To the exact flow, which ends at MEAN + STD eps."""
  x_T, _ = noise()
  errors = [np.max(np.abs(run_numpy(solvers.solver_coefficients(
      SCHEDULE, solver, steps, "logsnr"), x_T)[0] - exact(x_T)))
            for steps in (10, 40)]
  assert errors[1] < 0.5 * errors[0] or errors[1] < 2e-3
  assert errors[1] < 0.02


def exact(x_T):
  """The end of the flow from the first state of the stride "logsnr"."""
  s = SCHEDULE.noise_level(strides.times_of(SCHEDULE, "logsnr", 2)[0])
  norm = np.hypot(1 - s, s)
  z = np.asarray(x_T, np.float64) * norm
  return MEAN + STD * (z - (1 - s) * MEAN) / np.sqrt(
      ((1 - s) * STD) ** 2 + s**2)


def test_flow_matching_euler_of_diffusers():
  """run_sigmas of a StableDiffusion3Pipeline: shift 3, K = 4."""
  times = strides.times_of(SCHEDULE, "flow-euler", 4)
  np.testing.assert_allclose(
      SCHEDULE.noise_level(times),
      [1.0, 0.857692301273346, 0.602150559425354, 0.008928571827709675],
      atol=5e-7)
  # Without a shift, all steps are even.
  for total in (1000, 37):
    np.testing.assert_allclose(
        strides.times_of(schedules.FlowSchedule(total), "flow-euler", 5),
        np.linspace(total - 1, 0, 5), atol=1e-9)


def test_dynamic_shifting():
  assert flow.dynamic_shift(256) == pytest.approx(np.exp(0.5))
  assert flow.dynamic_shift(4096) == pytest.approx(np.exp(1.15))
  assert flow.dynamic_shift(2176, "linear") == pytest.approx(0.825)
  schedule = schedules.FlowSchedule(1000, flow.dynamic_shift(4096))
  q = np.linspace(1, 1 / 1000, 5)
  # diffusers' formula: e^mu / (e^mu + (1 / q - 1)).
  mu = np.exp(1.15)
  np.testing.assert_allclose(
      schedule.noise_level(strides.times_of(schedule, "flow-dynamic", 5)),
      mu / (mu + (1 / q - 1)), rtol=1e-9)
  for arguments, words in (
      ((256, "square"), "kind must be"), ((0,), "must be positive"),
      ((256, "linear", (256, 4096), (-1.0, 1.0)), "shift must be positive")):
    with pytest.raises(ValueError, match=words):
      flow.dynamic_shift(*arguments)


def test_times_of_sigmas():
  sigmas = [1.0, 0.75, 0.5, 0.25]
  times = flow.times_of_sigmas(SCHEDULE, sigmas)
  np.testing.assert_allclose(SCHEDULE.noise_level(times), sigmas, rtol=1e-12)
  np.testing.assert_array_equal(
      flow.times_of_sigmas(SCHEDULE, sigmas, shifted=False),
      strides.times_of(SCHEDULE, "trailing", 4))
  assert ddss_tf.make_sampler(SCHEDULE, "ddim", 4, stride=times).num_steps == 4
  for wrong in ([1.0, 0.5, 0.0], [1.1, 0.5], [0.5, 0.5], [], [[1.0]]):
    with pytest.raises(ValueError, match="sigmas must decrease strictly"):
      flow.times_of_sigmas(SCHEDULE, wrong)
  with pytest.raises(ValueError, match="of a FlowSchedule.*NoiseSchedule"):
    flow.times_of_sigmas(ddss_tf.make_schedule(), sigmas)


def test_strides_of_flows_are_of_flows():
  for stride in strides.FLOW_STRIDES:
    with pytest.raises(ValueError, match="must be on a FlowSchedule"):
      strides.times_of(ddss_tf.make_schedule(), stride, 4)
  with pytest.raises(ValueError, match="decrease strictly and lie in"):
    strides.times_of(schedules.FlowSchedule(1000, 0.3), "flow-euler", 4)
  assert labels.without_stride("Heun flow-euler") == "Heun"
  assert labels.group("Heun flow-euler") == labels.TRAINING_FREE


def test_same_process_as_an_exploding_one():
  """For s < 1, sigmas of s / (1 - s) have the same alpha, sigma and images."""
  exploding = schedules.ExplodingSchedule(
      [s / (1 - s) for s in SCHEDULE.noise_level(np.arange(999))])
  t = np.arange(999)
  np.testing.assert_allclose(exploding.abar(t), SCHEDULE.abar(t), rtol=1e-9)
  for ours, theirs in zip(SCHEDULE.alpha_sigma(t), exploding.alpha_sigma(t)):
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)
  x_T, _ = noise()
  times = [990, 800, 500, 200, 30]
  flows = ddss_tf.gaussian_denoiser(SHAPE, MEAN, STD, SCHEDULE)
  other = ddss_tf.Denoiser(flows.model, exploding, "flow", process="flow",
                           time_input="flow")
  eps = ddss_tf.gaussian_denoiser(SHAPE, MEAN, STD, exploding)
  for solver in ("ddim", "dpm++2m", "unipc2-bh2", "heun"):
    c, in_eps = (solvers.solver_coefficients(
        schedule, solver, 5, times[:3 if solver == "heun" else 5]).numpy()
                 for schedule in (SCHEDULE, exploding))
    assert c.in_v and not in_eps.in_v
    expected = run_tf(flows, c, x_T)
    np.testing.assert_allclose(run_tf(other, in_eps, x_T), expected, atol=1e-4)
    np.testing.assert_allclose(run_tf(eps, in_eps, x_T), expected, atol=1e-4)


FAMILIES = ["ggdm", "ggdm+pred+time", "rddim+pred", "rddim+time",
            "ddim-learned", "vars", "vars+pred", "unipc2-bh2+pred+time",
            "heun+pred+time"]


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_families_start_at_their_solver(oracle, family):
  sampler = ddss_tf.make_sampler(SCHEDULE, family=family, num_steps=4)
  start = sampler.start.numpy()
  assert start.times[0] == 999
  x_T, step_noise = noise(4)
  with tf.GradientTape() as tape:
    c = sampler.coefficients()
    images = run_tf(oracle, c, x_T, step_noise=step_noise)
    loss = tf.reduce_mean((images - 0.3 * x_T - 0.1) ** 2)
  gradients = tape.gradient(loss, sampler.trainable_variables)
  for variable, gradient in zip(sampler.trainable_variables, gradients):
    assert np.all(np.isfinite(gradient)), variable.name
    assert np.any(gradient), variable.name
  # VARS is exact up to its floor of abar.
  tolerance = dict(atol=2e-5 if family.startswith("vars") else 1e-7)
  for name, value in c.arrays().items():
    np.testing.assert_allclose(
        value, start.arrays()[name], rtol=1e-6, err_msg=name, **tolerance)
  np.testing.assert_allclose(
      images, run_tf(oracle, start, x_T, step_noise=step_noise), atol=2e-5)
  if family == "ggdm+pred+time":
    for name, value in c.arrays().items():
      np.testing.assert_array_equal(value, start.arrays()[name])
    np.testing.assert_array_equal(
        sampler.start.times, strides.times_of(SCHEDULE, "trailing", 4))


def test_gradients_at_pure_noise(oracle):
  """Of the coefficients of x0_hat and of the time, by finite differences."""
  sampler = ddss_tf.make_sampler(
      SCHEDULE, family="ggdm+pred+time", num_steps=3, init="ddim",
      stride="trailing")
  x_T, _ = noise()

  def loss():
    return tf.reduce_mean(tf.cast(run_tf(
        oracle, sampler.coefficients(), x_T), tf.float64) ** 3)

  with tf.GradientTape() as tape:
    value = loss()
  gradients = tape.gradient(value, sampler.trainable_variables)
  by_name = dict(zip((v.name for v in sampler.trainable_variables),
                     zip(sampler.trainable_variables, gradients)))
  for name, sign in (("x0_from_state", 0), ("x0_from_v", 0), ("times", 1)):
    variable, gradient = by_name[name]
    before, h = variable.numpy(), 3e-3
    values = []
    # A time at its upper bound can only be lowered.
    for step in ((-2 * h, -h, 0) if sign else (-h, h)):
      variable.assign(before + step * np.eye(3, dtype=np.float32)[0])
      values.append(loss().numpy())
    variable.assign(before)
    slope = ((values[0] - 4 * values[1] + 3 * values[2]) / (2 * h) if sign
             else (values[1] - values[0]) / (2 * h))
    np.testing.assert_allclose(gradient[0], slope, rtol=2e-2, atol=1e-5)


def test_paper_form_is_finite(oracle):
  x_T, step_noise = noise(4)
  for family in ("ggdm+pred+time", "ggdm", "vars", "ddim-learned+pred"):
    sampler = ddss_tf.make_sampler(
        SCHEDULE, family=family, num_steps=4, parameterisation="paper")
    with tf.GradientTape() as tape:
      c = sampler.coefficients()
      loss = tf.reduce_mean(run_tf(oracle, c, x_T, step_noise=step_noise)**2)
    c.numpy().validate()
    for gradient in tape.gradient(loss, sampler.trainable_variables):
      assert np.all(np.isfinite(gradient))


def test_a_learned_sampler_survives_its_card(tmp_path):
  sampler = ddss_tf.make_sampler(SCHEDULE, family="rddim", num_steps=4)
  for variable in sampler.trainable_variables:
    variable.assign_add(0.01 * np.ones(variable.shape, np.float32))
  found = sampler.coefficients().numpy()
  path = str(tmp_path / "sampler.json")
  card.write(path, card.SamplerCard("RDDIM", found, {}, {}))
  again = card.read(path)
  for name, value in found.arrays().items():
    np.testing.assert_array_equal(again.coefficients.arrays()[name], value)
  assert again.coefficients.in_v and again.coefficients.x0_from_eps is None
  # Theorem 1 finds its marginals again.
  larger = ddss_tf.make_sampler(
      SCHEDULE, family="ggdm", num_steps=4, init=path)
  for name, value in larger.coefficients().arrays().items():
    np.testing.assert_allclose(
        value, found.arrays()[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_coefficients_in_v_and_in_eps():
  in_v = solvers.solver_coefficients(SCHEDULE, "ddim", 2, "trailing").numpy()
  in_eps = solvers.solver_coefficients(
      ddss_tf.make_schedule(), "ddim", 2).numpy()
  assert list(in_eps.arrays()) == [
      "times", "x0_from_state", "x0_from_eps", "state_weights", "x0_weights",
      "noise_scales"]
  assert "x0_from_eps" not in in_v.to_dict()
  for c in (in_v, in_eps):
    again = Coefficients.from_dict(c.to_dict())
    assert (fingerprint.coefficients_sha256(again)
            == fingerprint.coefficients_sha256(c))
  both = {**in_eps.to_dict(), "x0_from_v": [0.0, 0.0]}
  with pytest.raises(ValueError, match="x0_from_v"):
    Coefficients.from_dict(both)
  for wrong in (in_eps._replace(x0_from_v=in_v.x0_from_v),
                in_v._replace(x0_from_v=None)):
    with pytest.raises(ValueError, match="x0_from_eps or x0_from_v"):
      wrong.validate()


def test_variational_bound(oracle):
  """At pure noise the first state tells nothing: its term is 0."""
  c = solvers.solver_coefficients(SCHEDULE, "ddpm", 5, "trailing").numpy()
  x_T, step_noise = noise(5)
  x_0 = MEAN + STD * noise()[0]
  bound = elbo.bound(c, tf.reduce_mean(elbo.squares(
      oracle.output, c, x_0, x_T, step_noise, oracle.for_chain), axis=0))
  assert np.isfinite(bound)
  a, v = elbo._first_state(c)
  assert a == 0 and v == 1

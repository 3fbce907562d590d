"""Tests of `ddss_tf.schedules`."""

import numpy as np
import pytest
import tensorflow as tf

from ddss_tf import schedules
from ddss_tf.samplers import strides
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
      strides.times_of(linear, "linear", 5), [800, 600, 400, 200, 0])
  np.testing.assert_array_equal(
      strides.times_of(linear, "uniform", 15)[:3], [933, 866, 800])
  np.testing.assert_array_equal(
      strides.times_of(linear, "quadratic", 10),
      [800, 632, 483, 355, 246, 158, 88, 39, 9, 0])
  np.testing.assert_array_equal(
      strides.times_of(linear, "trailing", 5), [999, 799, 599, 399, 199])
  np.testing.assert_array_equal(
      strides.times_of(linear, "linspace", 5), [999, 749, 500, 250, 0])
  np.testing.assert_array_equal(
      strides.times_of(linear, "linspace_open", 5), [999, 799, 599, 400, 200])


def test_strides_in_noise_levels(linear):
  # Equal steps of log-SNR, and of (sigma / alpha)^(1/7), between both ends.
  for name, level in (
      ("logsnr", linear.log_snr),
      ("karras", lambda t: np.exp(-linear.log_snr(t)) ** (1 / 7))):
    tau = strides.times_of(linear, name, 9)
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
  np.testing.assert_array_equal(strides.times_of(linear, times, 3), times)
  for bad, message in (([900, 400], "3 times"), ([1, 2, 3], "decrease"),
                       ([9, 9, 1], "decrease"), ([1000, 2, 1], "999"),
                       ([9, 2, -1], "999")):
    with pytest.raises(ValueError, match=message):
      strides.times_of(linear, bad, 3)


WHOLE = sorted(set(strides.STRIDES) - {"logsnr", "karras"})


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("steps", [1, 2, 29, 30, 100, 950, 1000])
def test_strides_waste_no_step(linear, name, steps):
  for schedule in (linear, NoiseSchedule.cosine()):
    tau = strides.times_of(schedule, name, steps)
    assert len(tau) == steps
    assert np.all(np.diff(tau) < 0)
    assert 0 <= tau[-1] and tau[0] <= 999
    np.testing.assert_array_equal(tau, np.floor(tau))


@pytest.mark.parametrize("total", [1000, 4000, 50, 37])
@pytest.mark.parametrize("steps", [1, 3, 5, 10, 15, 30, 37])
def test_leading_as_other_libraries_have_it(total, steps):
  theirs = [i * (total // steps) for i in range(steps)][::-1]
  for make in (NoiseSchedule.linear, NoiseSchedule.cosine):
    np.testing.assert_array_equal(strides.times_of(make(total), "leading", steps), theirs)
  linear = NoiseSchedule.linear(total, 0.1 / total, 10 / total)
  assert linear.num_visible_steps == total
  np.testing.assert_array_equal(strides.times_of(linear, "linear", steps), theirs)
  np.testing.assert_array_equal(
      strides.times_of(linear, "uniform", steps),
      [i * total // steps for i in range(steps)][::-1])


# Schedules that people have, and the beta schedules of other libraries.
SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "linear of 4000": NoiseSchedule.linear(4000, 1e-4 / 4, 0.02 / 4),
    "linear of 2000, too long": NoiseSchedule.linear(2000),
    "scaled linear": NoiseSchedule.scaled_linear(1000, 0.00085, 0.012),
    "cosine": NoiseSchedule.cosine(),
    "cosine of 4000": NoiseSchedule.cosine(4000),
    "cosine of 50": NoiseSchedule.cosine(50),
    "zero SNR, linear": NoiseSchedule.linear().rescaled_to_zero_snr(),
    "zero SNR, scaled": NoiseSchedule.scaled_linear(
        1000, 0.00085, 0.012).rescaled_to_zero_snr(),
    "zero SNR, cosine": NoiseSchedule.cosine().rescaled_to_zero_snr(),
    "exploding": schedules.ExplodingSchedule.geometric(0.01, 50.0),
    "exploding, far": schedules.ExplodingSchedule.geometric(0.002, 1e4),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(),
                                         ids=SCHEDULES)


@every_schedule
@pytest.mark.parametrize("name", sorted(set(strides.STRIDES) - {"leading"}))
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 25, 50])
def test_named_strides_begin_where_there_is_an_image(schedule, name, steps):
  """An error of 1 % in eps makes one of 2 in x0_hat at the most."""
  tau = strides.times_of(schedule, name, steps)
  assert len(tau) == steps and np.all(np.diff(tau) < 0)
  assert 0 <= tau[-1] and tau[0] <= schedule.num_train_steps - 1
  if steps <= schedule.num_visible_steps:
    assert 0.01 / np.sqrt(schedule.abar(tau[0])) < 2


@every_schedule
def test_visible_steps(schedule):
  """As many as are above the bound; all of them where T is asked for."""
  count, total = schedule.num_visible_steps, schedule.num_train_steps
  above = schedule.log_snr(np.arange(total)) >= schedules.NOISIEST_LOG_SNR
  np.testing.assert_array_equal(above, np.arange(total) < count)
  if total <= 1000:
    for name in strides.STRIDES:
      if name not in ("logsnr", "karras"):
        np.testing.assert_array_equal(
            strides.times_of(schedule, name, total), np.arange(total)[::-1])


@pytest.mark.parametrize("name", [
    "linear", "trailing", "linspace", "linspace_open", "quadratic"])
def test_matched_strides(linear, name):
  """The noise levels of the linear schedule, to half a step of one's own."""
  for steps in (1, 2, 3, 5, 7, 10, 15, 20, 25, 100, 1000):
    np.testing.assert_array_equal(
        strides.times_of(linear, "matched_" + name, steps), strides.times_of(linear, name, steps))
  wanted = linear.log_snr(strides.times_of(linear, name, 10))
  # A range that is smaller is used whole, in the same proportions.
  narrow = SCHEDULES["scaled linear"]
  share = (wanted - linear.log_snr(999)) / np.diff(linear.log_snr([999, 0]))
  scaled = narrow.log_snr(999) + share * np.diff(narrow.log_snr([999, 0]))
  for key, levels in (
      ("cosine", wanted), ("cosine of 4000", wanted),
      ("zero SNR, cosine", wanted), ("linear of 2000, too long", wanted),
      ("exploding, far", wanted), ("scaled linear", scaled)):
    schedule = SCHEDULES[key]
    tau = strides.times_of(schedule, "matched_" + name, 10)
    half = np.abs(schedule.log_snr(np.clip(
        tau + [[-0.5], [0.5]], 0, schedule.num_train_steps - 1))
                  - schedule.log_snr(tau)).max(axis=0)
    assert np.all(np.abs(schedule.log_snr(tau) - levels) <= half * 1.1), key
  with pytest.raises(ValueError, match="at most 1000.*1001"):
    strides.times_of(SCHEDULES["cosine of 4000"], "matched_" + name, 1001)


@pytest.mark.parametrize("key", ["linear", "scaled linear", "cosine"])
def test_rescaled_to_zero_snr(key):
  """Lin et al. (2023), algorithm 1, written out."""
  before = SCHEDULES[key]
  after = before.rescaled_to_zero_snr()
  root = np.sqrt(np.cumprod(1 - before.betas))
  root = (root - root[-1]) * root[0] / (root[0] - root[-1])
  np.testing.assert_allclose(
      np.sqrt(after.abar(np.arange(999))), root[:-1], rtol=1e-6, atol=1e-12)
  assert after.betas[-1] == 1 and 0 < after.abar(999) < 1.001e-12
  # What is taken for 0 stays finite, and survives its card.
  assert np.isfinite(after.log_snr(999)) and after.time_of_log_snr(-99) == 999
  again = schedules.from_card(after.card())
  np.testing.assert_array_equal(
      again.abar(np.arange(1000)), after.abar(np.arange(1000)))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_number_of_steps(linear, steps):
  with pytest.raises(ValueError, match=f"1 to 1000.*num_steps={steps}"):
    strides.times_of(linear, "linear", steps)


def test_bad_arguments(linear):
  with pytest.raises(ValueError, match="linear, trailing.*'cubic'"):
    strides.times_of(linear, "cubic", 5)
  for betas in ([1.0, 0.1], [0.1, 1.1], [0.1, 0.0], [0.1, np.nan]):
    with pytest.raises(ValueError, match="between 0 and 1"):
      NoiseSchedule(betas)
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
  np.testing.assert_array_equal(
      schedules.make_schedule("cosine", 500, zero_snr=True).betas,
      NoiseSchedule.cosine(500).rescaled_to_zero_snr().betas)
  for arguments in (dict(name="sine"), dict(name="betas"),
                    dict(name="linear", betas=[0.1]),
                    dict(name="geometric", zero_snr=True),
                    dict(name="betas", betas=[0.1], zero_snr=True)):
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
  times = strides.times_of(schedule, "logsnr", 5)
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


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("total", [1, 2, 37, 1000])
def test_flow_schedule(total, shift):
  """Its closed forms against the definition, at pure noise too."""
  schedule = schedules.FlowSchedule(total, shift)
  t = np.linspace(0, total - 1, 41)
  q = (t + 1) / total
  s = shift * q / (1 + (shift - 1) * q)
  norm = np.hypot(1 - s, s)
  np.testing.assert_allclose(schedule.noise_level(t), s, rtol=1e-12)
  np.testing.assert_allclose(
      schedule.abar(t), ((1 - s) / norm) ** 2, rtol=1e-9, atol=1e-25)
  np.testing.assert_allclose(
      schedule.time_of_noise_level(s), t, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(
      schedule.time_of_log_snr(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-9)
  for dtype, rtol in ((tf.float32, 2e-6), (tf.float64, 1e-12)):
    # float32 cannot tell every t.
    given = t if dtype == tf.float64 else t.astype(np.float32).astype(float)
    abar = schedule.abar(given)
    alpha, sigma = schedule.alpha_sigma(given, dtype)
    np.testing.assert_allclose(alpha, np.sqrt(abar), rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(sigma, np.sqrt(1 - abar), rtol=rtol, atol=1e-9)
  # The end is exact, and so are times beyond the ends.
  for beyond in (total - 1, total):
    assert schedule.abar(beyond) == 0 and schedule.noise_level(beyond) == 1
    assert schedule.log_snr(beyond) == -np.inf
    alpha, sigma = schedule.alpha_sigma(float(beyond))
    assert alpha == 0 and sigma == 1
  assert schedule.time_of_log_snr(-np.inf) == total - 1
  assert schedule.time_of_log_snr(np.inf) == 0
  again = schedules.from_card({**schedule.card(), "name": "a card of a model"})
  assert again.card() == schedule.card() and again.shift == shift
  assert schedule.num_visible_steps == schedule.num_train_steps == total


def test_flow_schedule_has_gradients_at_its_ends():
  schedule = schedules.FlowSchedule(1000, 3.0)
  t = tf.constant([0.0, 500.5, 999.0])
  with tf.GradientTape(persistent=True) as tape:
    tape.watch(t)
    alpha, sigma = schedule.alpha_sigma(t)
  slopes = []
  for side in (-1e-4, 1e-4):
    # One-sided where the other side is clipped.
    abar = schedule.abar(t.numpy().astype(float) + side)
    slopes.append([np.sqrt(abar), np.sqrt(1 - abar)])
  (low, high) = np.array(slopes)
  width = np.array([1e-4, 2e-4, 1e-4])
  for value, before, after in zip((alpha, sigma), low, high):
    np.testing.assert_allclose(
        tape.gradient(value, t), (after - before) / width, rtol=2e-3,
        atol=2e-6)


def test_flow_schedule_by_name():
  schedule = schedules.make_schedule("flow", 100, shift=3.0)
  assert isinstance(schedule, schedules.FlowSchedule)
  assert schedule.card() == {"flow": {"num_train_steps": 100, "shift": 3.0}}
  assert schedule.rescaled_to_zero_snr() is schedule
  for arguments, words in (
      (dict(name="flow", zero_snr=True), "zero_snr must be False.*flow"),
      (dict(name="linear", shift=3.0), "shift must be given with"),
      (dict(name="flow", shift=0.0), "shift must be a positive number"),
      (dict(name="flow", shift=float("nan")), "shift must be a positive"),
      (dict(name="flow", num_train_steps=0), "num_train_steps must be"),
      (dict(name="flow", num_train_steps=2.0), "num_train_steps must be")):
    with pytest.raises(ValueError, match=words):
      schedules.make_schedule(**arguments)


@pytest.mark.parametrize("name", strides.STRIDES + strides.FLOW_STRIDES)
def test_strides_of_a_flow(name):
  """Those that name the last step begin at pure noise; all are in order."""
  schedule = schedules.FlowSchedule(1000, 3.0)
  for steps in (1, 2, 5, 10, 50, 333, 1000):
    tau = strides.times_of(schedule, name, steps)
    assert len(tau) == steps and np.all(np.diff(tau) < 0)
    assert 0 <= tau[-1] and tau[0] <= 999
    if name in ("trailing", "linspace", "linspace_open", *strides.FLOW_STRIDES):
      assert tau[0] == 999
    if name in ("logsnr", "karras"):
      assert schedule.log_snr(tau[0]) == pytest.approx(
          schedules.NOISIEST_LOG_SNR)

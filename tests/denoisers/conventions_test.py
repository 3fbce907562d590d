"""Tests of what networks predict and are fed with, on exact Gaussian ones.

For x_0 ~ N(mean, std^2 I) every prediction of every process is known in closed
form, and all of them must mean the same eps.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf import schedules
from ddss_tf.denoisers import conventions
from ddss_tf.samplers import chain
from ddss_tf.samplers import generator as generator_lib

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
            "score": -(z - a * MEAN) / variance, "flow": eps - x0,
            "flow_reversed": x0 - eps}[self.prediction]


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


@pytest.mark.parametrize("scale,offset", [
    (1 / 999, 0.0), (1 / 1000, 1 / 1000), (-1.0, 999.0)])
def test_other_clocks(vp, scale, offset):
  # Networks that were trained on times from 0 to 1, from 1/T to 1, and on
  # steps that count from the noisiest.
  own = lambda time: vp.schedule.alpha_sigma((time - offset) / scale)
  denoiser = ddss_tf.Denoiser(
      Exact("eps", own), vp.schedule, time_scale=scale, time_offset=offset)
  x_t, t = states()
  np.testing.assert_allclose(
      denoiser.eps(x_t, t), vp.eps(x_t, t), atol=1e-4)
  np.testing.assert_allclose(sampled(denoiser), sampled(vp), atol=1e-4)
  # `network` is in its own units.
  np.testing.assert_allclose(
      denoiser.network(x_t, t * scale + offset), vp.eps(x_t, t), atol=1e-4)
  # The gradient is with respect to steps.
  gradients = []
  for each in (denoiser, vp):
    middle = tf.constant([20.3, 100.5, 300.7, 400.4, 800.3, 990.5])
    with tf.GradientTape() as tape:
      tape.watch(middle)
      eps = each.eps(x_t, middle)
    gradients.append(tape.gradient(eps, middle))
  np.testing.assert_allclose(*gradients, rtol=2e-3, atol=1e-5)


VE = {"geometric": dict(name="geometric", sigma_min=0.01, sigma_max=50.0),
      "sigmas": dict(name="sigmas", sigmas=np.linspace(0.2, 9.0, 40) ** 2)}


@pytest.mark.parametrize("kind", VE)
@pytest.mark.parametrize("prediction", ["eps", "x0", "score"])
@pytest.mark.parametrize("time_input", ["sigma", "log_sigma", "step"])
def test_exploding_networks_in_preserving_form(kind, prediction, time_input):
  schedule = ddss_tf.make_schedule(**VE[kind])
  own = {"sigma": lambda s: (tf.ones_like(s), s),
         "log_sigma": lambda s: (tf.ones_like(s), tf.exp(s)),
         "step": lambda t: (tf.ones_like(t), tf.exp(tf.cast(
             -schedule.log_snr(t), tf.float32)))}[time_input]
  denoiser = ddss_tf.Denoiser(
      Exact(prediction, own), schedule, prediction, process="ve",
      time_input=time_input)
  x_t, t = states()
  t = t * ((schedule.num_train_steps - 1) / 999)
  np.testing.assert_allclose(
      denoiser.eps(x_t, t), expected_eps(schedule, x_t, t), atol=3e-5)
  exact = ddss_tf.Denoiser(Exact("eps", schedule.alpha_sigma), schedule)
  np.testing.assert_allclose(sampled(denoiser), sampled(exact), atol=2e-5)


def test_exploding_gradient_in_time():
  schedule = ddss_tf.make_schedule(**VE["geometric"])
  denoiser = ddss_tf.Denoiser(
      Exact("score", lambda s: (tf.ones_like(s), s)), schedule, "score",
      process="ve", time_input="sigma")
  x_t, _ = states()
  t = tf.constant([20.3, 100.5, 300.7, 400.2, 800.2, 990.5])
  with tf.GradientTape() as tape:
    tape.watch(t)
    eps = denoiser.eps(x_t, t)
  high, low = (expected_eps(schedule, x_t, t.numpy() + d)
               for d in (1e-3, -1e-3))
  np.testing.assert_allclose(
      tape.gradient(eps, t), np.sum((high - low) / 2e-3, axis=(1, 2, 3)),
      rtol=1e-2, atol=1e-5)


LOW_SNR = {
    "cosine": dict(name="cosine"),
    "cosine of 4000": dict(name="cosine", num_train_steps=4000),
    "zero SNR": dict(name="scaled_linear", beta_start=0.00085, beta_end=0.012,
                     zero_snr=True),
    "too long": dict(name="linear", num_train_steps=2000),
    "exploding, far": dict(name="geometric", sigma_max=1e5),
}


def images_in_float64(schedule, coefficients, x_T):
  """What a chain of the exact network gives, in float64 throughout."""
  states, times = [np.asarray(x_T, np.float64)], coefficients.times
  for k in range(len(times)):
    abar = schedule.abar(times[k])
    # Of this network x0_hat is a function of the state, without eps.
    x0 = MEAN + np.sqrt(abar) * STD**2 * (states[-1] - np.sqrt(abar) * MEAN) / (
        abar * STD**2 + 1 - abar)
    states.append(coefficients.x0_weights[k] * x0 + sum(
        weight * state for weight, state in zip(
            coefficients.state_weights[k], states)))
  return states[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOW_SNR)
@pytest.mark.parametrize("prediction", [
    "v", pytest.param("x0", marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver,whole", [
    ("ddim", True), pytest.param("ddim", False, marks=pytest.mark.slow),
    ("unipc2-bh2", True)])
def test_digits_at_low_snr(kind, prediction, solver, whole):
  """From the very last step, where 1 / alpha is 2e4 or more."""
  schedule = ddss_tf.make_schedule(**LOW_SNR[kind])
  last = schedule.num_train_steps - 1
  assert schedule.abar(last) < 1e-8
  times = np.append(last, schedule.time_of_log_snr([-4.0, -2.0, 0.0, 2.0]))
  times = np.round(times) if whole else times.astype(np.float32)
  process = "ve" if prediction == "x0" and "exploding" in kind else "vp"
  own = (schedule.alpha_sigma if process == "vp" else
         lambda t: (tf.ones_like(t), tf.exp(schedules.interpolated(
             -schedule.log_snr(np.arange(last + 1)), t))))
  denoiser = ddss_tf.Denoiser(
      Exact(prediction, own), schedule, prediction, process=process)
  sampler = ddss_tf.make_sampler(schedule, solver, 5, stride=times)
  coefficients = sampler.coefficients().numpy()
  assert coefficients.x0_from_state[0] > 1e4
  x_T, _ = chain.draw_noise([7, 0], tf.range(4), SHAPE, 5)
  expected = images_in_float64(
      schedule, ddss_tf.solver_coefficients(schedule, solver, 5, times), x_T)
  generator = generator_lib.Generator(denoiser, 4, jit_compile=False)
  np.testing.assert_allclose(
      generator.images(coefficients, 4, 7), expected, atol=2e-6)
  # As a search runs it, in a graph with coefficients that can be learned.
  learned = ddss_tf.make_sampler(
      schedule, "ggdm+pred+time", 5, init=solver, stride=times)
  run = tf.function(lambda: chain.run_chain(
      denoiser.output, denoiser.for_chain(learned.coefficients()), x_T))
  np.testing.assert_allclose(run(), expected, atol=2e-6)
  # The first prediction itself: through eps it is off by 1e-3 and more.
  first = images_in_float64(schedule, ddss_tf.solver_coefficients(
      schedule, "ddim", 1, times[:1]), x_T[:1])
  _, _, x0_hats = generator.path(coefficients, 7)
  np.testing.assert_allclose(x0_hats[:1], first, atol=2e-6)


@pytest.mark.parametrize("prediction", conventions.PREDICTIONS)
def test_a_chain_of_predictions_is_a_chain_of_eps(vp, prediction):
  """Values and gradients, of coefficients that are no schedule's."""
  denoiser = ddss_tf.Denoiser(
      Exact(prediction, vp.schedule.alpha_sigma), vp.schedule, prediction)
  rng = np.random.default_rng(1)
  base = ddss_tf.solver_coefficients(vp.schedule, "dpm++3m", 5, [
      900.3, 700.0, 400.6, 150.2, 20.7]).numpy()
  c = base._replace(
      times=base.times + rng.uniform(-9, 9, 5).astype(np.float32),
      x0_from_state=base.x0_from_state * rng.uniform(0.8, 1.2, 5).astype("f"),
      x0_from_eps=base.x0_from_eps * rng.uniform(0.8, 1.2, 5).astype("f"))
  x_T, noise = chain.draw_noise([0, 1], tf.range(4), SHAPE, 5)
  results = []
  for eps_fn, convert in ((denoiser.eps, lambda c: c),
                          (denoiser.output, denoiser.for_chain)):
    variables = c.map(tf.constant)
    with tf.GradientTape() as tape:
      tape.watch(list(variables.arrays().values()))
      images = chain.run_chain(eps_fn, convert(variables), x_T, noise)
      loss = tf.reduce_sum(images**3 + images)
    gradients = tape.gradient(loss, list(variables.arrays().values()))
    results.append((images, gradients))
    constant = chain.run_chain(eps_fn, convert(c), x_T, noise)
    np.testing.assert_allclose(constant, images, rtol=2e-5, atol=2e-5)
  (images, gradients), (own_images, own_gradients) = results
  np.testing.assert_allclose(own_images, images, rtol=2e-5, atol=2e-5)
  for name, value, own in zip(c.arrays(), gradients, own_gradients):
    np.testing.assert_allclose(
        own, value, rtol=2e-3, atol=2e-4 * np.abs(value).max(), err_msg=name)


def test_offsets_have_a_gradient_where_they_begin(vp):
  """Coefficients that are the schedule's own: 0 in value, not in slope."""
  schedule = ddss_tf.make_schedule("cosine")
  denoiser = ddss_tf.Denoiser(
      Exact("v", schedule.alpha_sigma), schedule, "v")
  sampler = ddss_tf.make_sampler(schedule, "ddim+pred", 4)
  x_T, noise = chain.draw_noise([0, 1], tf.range(4), SHAPE, 4)
  gradients = []
  for eps_fn, convert in ((denoiser.eps, lambda c: c),
                          (denoiser.output, denoiser.for_chain)):
    with tf.GradientTape() as tape:
      loss = tf.reduce_sum(chain.run_chain(
          eps_fn, convert(sampler.coefficients()), x_T, noise) ** 2)
    gradients.append(tape.gradient(loss, [v.value for v in sampler.weights]))
  for value, own in zip(*gradients):
    assert np.all(own.numpy() != 0)
    np.testing.assert_allclose(own, value, rtol=1e-3)


def test_own_format_keeps_the_convention(tmp_path):
  schedule = ddss_tf.make_schedule(**VE["sigmas"])
  model = ddss_tf.gaussian_denoiser(SHAPE).model
  denoiser = ddss_tf.Denoiser(
      model, schedule, "x0", process="ve", time_input="log_sigma",
      time_scale=0.25, time_offset=3.0)
  denoiser.save(str(tmp_path / "own"))
  again = ddss_tf.load_denoiser(str(tmp_path / "own"))
  assert again.convention == denoiser.convention
  np.testing.assert_array_equal(again.schedule.sigmas, schedule.sigmas)
  x_t, _ = states()
  np.testing.assert_array_equal(
      again.eps(x_t, 7.5), denoiser.eps(x_t, 7.5))


@pytest.mark.parametrize("changes,words", [
    (dict(prediction="mean"), "eps, x0, v, score, flow.*'mean'"),
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


FLOWS = {  # Arguments of `Denoiser`, and the (a, s) of the network at its time.
    "SD3": (dict(prediction="flow", time_input="flow", time_scale=1000.0),
            lambda t: (1 - t / 1000, t / 1000)),
    "SiT": (dict(prediction="flow_reversed", time_input="flow",
                 time_scale=-1.0, time_offset=1.0), lambda t: (t, 1 - t)),
    "x0": (dict(prediction="x0", time_input="flow"), lambda t: (1 - t, t)),
    "v": (dict(prediction="v", time_input="flow"), None),
    "score": (dict(prediction="score", time_input="flow"),
              lambda t: (1 - t, t)),
    "eps": (dict(prediction="eps", time_input="flow"), lambda t: (1 - t, t)),
}


class VelocityOfStates(Exact):
  """v is of the variance-preserving form, whatever the network is fed with."""

  def call(self, inputs, training=False):
    z, s = inputs
    norm = tf.math.rsqrt((1 - s)**2 + s**2)[:, None, None, None]
    self.process = lambda s: ((1 - s) * norm[:, 0, 0, 0],
                              s * norm[:, 0, 0, 0])
    return super().call([z * norm, s])


@pytest.mark.parametrize("kind", FLOWS)
def test_networks_of_flows(kind):
  schedule = schedules.FlowSchedule(1000, 3.0)
  arguments, own = FLOWS[kind]
  prediction = arguments["prediction"]
  network = (VelocityOfStates if own is None else Exact)(prediction, own)
  denoiser = ddss_tf.Denoiser(network, schedule, process="flow", **arguments)
  x_t, t = states()
  t = tf.minimum(t, 998.0) if prediction == "score" else t
  np.testing.assert_allclose(
      denoiser.eps(x_t, t), expected_eps(schedule, x_t, t),
      atol=3e-4 if prediction == "x0" else 1e-4)  # It is divided by 0.003.
  # A scalar time is one for all.
  np.testing.assert_allclose(
      denoiser.output(x_t[2:3], t[2]), denoiser.output(x_t, t)[2:3], atol=1e-6)
  exact = ddss_tf.gaussian_denoiser(SHAPE, MEAN, STD, schedule)
  # eps and score must begin below pure noise, where they tell of an image.
  times = [900.0 if prediction in ("eps", "score") else 999.0, 700, 400, 150, 9]
  x_T, _ = chain.draw_noise([0, 1], tf.range(4), SHAPE, 5)
  for family in ("unipc2-bh2", "ggdm+pred+time"):
    c = ddss_tf.make_sampler(
        schedule, family, 5, stride=times,
        **({} if "+" not in family else {"init": "ddim"})).coefficients()
    images, expected = (
        chain.run_chain(each.output, each.for_chain(c), x_T)
        for each in (denoiser, exact))
    np.testing.assert_allclose(images, expected, atol=1e-5)
    at_once = denoiser.for_chain(c.numpy()).numpy()
    for name, value in denoiser.for_chain(c).numpy().arrays().items():
      np.testing.assert_allclose(at_once.arrays()[name], value, rtol=1e-6)


@pytest.mark.parametrize("prediction", conventions.PREDICTIONS)
def test_learned_coefficients_in_v(prediction):
  """Values and gradients of x0_hat = p x_t + q v for every network."""
  schedule = schedules.FlowSchedule(1000, 3.0)
  c = ddss_tf.solver_coefficients(schedule, "dpm++3m", 5, [
      900.3, 700.0, 400.6, 150.2, 20.7]).numpy()
  rng = np.random.default_rng(1)
  c = c._replace(
      x0_from_state=c.x0_from_state * rng.uniform(0.8, 1.2, 5).astype("f"),
      x0_from_v=c.x0_from_v * rng.uniform(0.8, 1.2, 5).astype("f"))
  x_T, noise = chain.draw_noise([0, 1], tf.range(4), SHAPE, 5)
  results = []
  for each in ("v", prediction):
    denoiser = ddss_tf.Denoiser(
        Exact(each, schedule.alpha_sigma), schedule, each)
    variables = c.map(tf.constant)
    with tf.GradientTape() as tape:
      tape.watch(list(variables.arrays().values()))
      images = chain.run_chain(
          denoiser.output, denoiser.for_chain(variables), x_T, noise)
      loss = tf.reduce_sum(images**3 + images)
    results.append([images, *tape.gradient(
        loss, [variables.x0_from_state, variables.x0_from_v,
               variables.x0_weights])])
  for one, other in zip(*results):
    np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_pure_noise_tells_eps_nothing_but_stays_finite():
  schedule = schedules.FlowSchedule()
  denoiser = ddss_tf.Denoiser(Exact("eps", schedule.alpha_sigma), schedule)
  c = ddss_tf.solver_coefficients(schedule, "ddim", 3, "trailing").numpy()
  denoiser.for_chain(c).validate()


@pytest.mark.parametrize("prediction", ["v", "flow", "flow_reversed"])
def test_velocities_are_not_of_exploding_processes(prediction):
  with pytest.raises(ValueError, match=f"eps, x0 or score.*'{prediction}'"):
    conventions.Convention(prediction, "ve")


def test_flow_denoisers_are_saved(tmp_path):
  denoiser = ddss_tf.gaussian_denoiser(
      SHAPE, MEAN, STD, schedules.FlowSchedule(50, 1.5))
  denoiser.save(str(tmp_path))
  again = ddss_tf.Denoiser.load(str(tmp_path))
  assert again.convention == denoiser.convention
  assert again.schedule.card() == denoiser.schedule.card()
  x_t, _ = states()
  np.testing.assert_array_equal(again.output(x_t, 49.0),
                                denoiser.output(x_t, 49.0))
  np.testing.assert_allclose(again.output(x_t, 49.0),
                             np.full(x_t.shape, -MEAN), atol=1e-6)


def test_a_network_of_steps_on_a_flow(vp):
  """`on_schedule`: from noise levels that its own schedule has."""
  flow = ddss_tf.on_schedule(vp, schedules.FlowSchedule(1000, 3.0))
  x_t, _ = states()
  t = tf.constant([3.0, 100.5, 400.0, 600.0, 800.25, 900.0])
  np.testing.assert_allclose(
      flow.eps(x_t, t), expected_eps(flow.schedule, x_t, t), atol=2e-3)

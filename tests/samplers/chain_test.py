"""Tests of the chain: its equation, its gradients, its noise."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.denoisers import gaussian
from ddss_tf.denoisers import rematerialise
from ddss_tf.samplers import chain
from ddss_tf.samplers import coefficients as coefficients_lib
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import sampler as sampler_lib
from ddss_tf.networks.frozen import frozen_variables
from ddss_tf.networks.unet import UNetConfig, build_unet
from ddss_tf.samplers.coefficients import Coefficients
from project import ROOT

SHAPE = (4, 4, 1)


@pytest.fixture(scope="module")
def small():
  """A denoiser with a real, tiny U-Net: random weights, frozen."""
  import keras  # pylint: disable=g-import-not-at-top
  keras.utils.set_random_seed(0)
  config = UNetConfig(
      image_size=4, in_channels=1, out_channels=1, channels=(8,),
      blocks_per_level=1, attention_levels=(), norm_groups=4)
  with frozen_variables():
    model = build_unet(config)
  return denoiser_lib.Denoiser(model, sampler_lib.NoiseSchedule.linear())


def random_coefficients(steps=3, seed=0):
  rng = np.random.default_rng(seed)
  noise = rng.uniform(0.1, 0.5, steps)
  noise[-1] = 0
  return Coefficients(
      times=np.sort(rng.uniform(10, 900, steps))[::-1] + 0.3,
      x0_from_state=rng.uniform(0.5, 1.5, steps),
      x0_from_eps=rng.uniform(-1.5, -0.5, steps),
      state_weights=np.tril(rng.normal(size=(steps, steps))) * 0.4,
      x0_weights=rng.uniform(0.5, 1, steps),
      noise_scales=noise).numpy()


@pytest.mark.parametrize("constant", [False, True])
def test_the_equation_against_numpy(constant):
  c = random_coefficients()
  rng = np.random.default_rng(1)
  x_T = rng.normal(size=(2, *SHAPE)).astype(np.float32)
  noise = rng.normal(size=(2, 2, *SHAPE)).astype(np.float32)

  def eps(x, t):
    return np.tanh(x) * (1 + t[:, None, None, None] / 1000)

  states = [x_T]
  for k in range(3):
    x0 = (c.x0_from_state[k] * states[-1]
          + c.x0_from_eps[k] * eps(states[-1], np.full(2, c.times[k])))
    new = c.x0_weights[k] * x0 + np.tensordot(
        c.state_weights[k, :k + 1], np.stack(states), 1)
    if k < 2:
      new = new + c.noise_scales[k] * noise[:, k]
    states.append(new)
  images, visited, x0_hats = chain.run_chain(
      lambda x, t: tf.tanh(x) * (1 + t[:, None, None, None] / 1000),
      c if constant else c.map(tf.constant), tf.constant(x_T),
      tf.constant(noise), trajectory=True)
  np.testing.assert_allclose(images, states[-1], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(visited[2], states[2], rtol=1e-5, atol=1e-5)
  assert len(visited) == len(x0_hats) == 3


@pytest.mark.slow
def test_samples_with_coefficients_of_their_own(small):
  own = [random_coefficients(seed=seed)._replace(
      guidance_scales=np.float32([seed, 1, 2])) for seed in range(3)]
  rng = np.random.default_rng(1)
  x_T = tf.constant(rng.normal(size=(3, *SHAPE)).astype(np.float32))
  noise = tf.constant(rng.normal(size=(3, 2, *SHAPE)).astype(np.float32))

  def eps_fn(x, t, scale):
    return small.eps(x, t) * scale[:, None, None, None]

  together = Coefficients(**{
      name: tf.constant(np.stack(
          [c.arrays()[name] for c in own], axis=-1)[..., None, None, None])
      for name in own[0].arrays()})
  images = chain.run_chain(eps_fn, together, x_T, noise)
  for i, c in enumerate(own):
    np.testing.assert_allclose(
        images[i:i + 1], chain.run_chain(
            eps_fn, c.map(tf.constant), x_T[i:i + 1], noise[i:i + 1]),
        rtol=1e-5, atol=1e-5)


def test_states_without_weight_are_not_read():
  c = random_coefficients(steps=5)
  weights = np.zeros((5, 5), np.float32)
  # From two steps before, from the noise at the very end, or from none.
  for k, u in ((0, 0), (2, 0), (2, 1), (4, 0), (4, 4)):
    weights[k, u] = c.state_weights[k, u]
  c = c._replace(state_weights=weights)
  x_T, noise = chain.draw_noise(tf.constant([0, 0]), tf.range(3), SHAPE, 5)

  def images(coefficients):
    return chain.run_chain(lambda x, t: tf.sin(x), coefficients, x_T, noise)

  np.testing.assert_array_equal(images(c), images(c.map(tf.constant)))


def test_a_markovian_chain_costs_as_much_at_every_step():
  def operations(solver, steps):
    c = sampler_lib.SolverSampler(
        sampler_lib.NoiseSchedule.linear(), steps, solver).coefficients().numpy()
    graph = tf.function(lambda x: chain.run_chain(
        lambda x, t: x, c, x)).get_concrete_function(
            tf.TensorSpec([2, *SHAPE])).graph
    return len(graph.get_operations())

  few, more, most = (operations("ddpm", steps) for steps in (3, 6, 9))
  assert most - more == more - few


def test_step_by_step_as_traced_as_one(monkeypatch):
  denoiser = gaussian.gaussian_denoiser(SHAPE)
  coefficients = sampler_lib.SolverSampler(
      denoiser.schedule, 6, "ddpm").coefficients()
  one = generator_lib.Generator(denoiser, 4, False).images(coefficients, 5, 3)
  monkeypatch.setattr(generator_lib, "_UNROLLED", 5)
  long = generator_lib.Generator(denoiser, 4, False)
  monkeypatch.setattr(long, "_sample", None)
  np.testing.assert_allclose(
      long.images(coefficients, 5, 3), one, rtol=1e-5, atol=1e-5)


def gradients(eps_fn, coefficients, jit=False):
  """Loss and its gradient in every coefficient."""
  x_T, noise = chain.draw_noise(tf.constant([0, 0]), tf.range(3), SHAPE, 3)
  target = tf.sin(tf.range(16, dtype=tf.float32))

  @tf.function(jit_compile=jit, autograph=False)
  def compute(values):
    with tf.GradientTape() as tape:
      tape.watch(values)
      images = chain.run_chain(eps_fn, Coefficients(*values), x_T, noise)
      loss = tf.reduce_mean(tf.tanh(tf.reshape(images, [3, 16])) * target)
    return loss, tape.gradient(loss, values), tape.watched_variables()

  values = [tf.constant(v) for v in coefficients.arrays().values()]
  loss, gradient, _ = compute(values)
  return float(loss), [np.asarray(g) for g in gradient]


@pytest.mark.parametrize(
    "jit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_remat_changes_nothing(small, jit):
  c = random_coefficients()
  # A function of its own, so that it is traced once and not at every step.
  loss, plain = gradients(tf.function(small.eps, autograph=False), c)
  loss_remat, remat = gradients(small.compiled_eps(jit, remat=True), c)
  np.testing.assert_allclose(loss_remat, loss, rtol=1e-4)
  for name, a, b in zip(c._fields, plain, remat):
    assert np.abs(a).max() > 0, name
    np.testing.assert_allclose(
        b, a, rtol=2e-3, atol=2e-5 * np.abs(a).max(), err_msg=name)


_COMPILED = """
import functools, glob, sys
import numpy as np
import tensorflow as tf
from ddss_tf.denoisers import rematerialise

def eps(x, t):  # The gradient of a concatenation asks for shapes.
  return tf.tanh(tf.reduce_mean(
      tf.concat([x, x * t[:, None, None, None]], -1), -1, keepdims=True))

remat = rematerialise.rematerialise(tf.function(eps, jit_compile=True), True)

def differentiate(eps, seed, times):
  x = tf.random.stateless_normal([2, 4, 4, 1], seed)
  with tf.GradientTape() as tape:
    tape.watch(times)
    for time in tf.unstack(times):
      x = 0.5 * x + eps(x, tf.repeat(time[None], 2))
    loss = tf.reduce_sum(x ** 2)
  return tape.gradient(loss, times)

compiled = tf.function(functools.partial(differentiate, remat),
                       autograph=False)
for step in range(3):
  seed, times = tf.constant([0, step]), tf.constant([3., 2., 1.]) - step
  plain = differentiate(eps, seed, times)
  assert np.all(plain != 0.0)
  np.testing.assert_allclose(compiled(seed, times), plain, rtol=1e-4)
print(len(glob.glob(sys.argv[1] + "/*before_optimizations.txt")))
"""


@pytest.mark.slow
def test_xla_compiles_once_for_all_steps_and_values(tmp_path):
  dump = str(tmp_path / "dump")
  root = ROOT
  result = subprocess.run(
      [sys.executable, "-c", _COMPILED, dump], capture_output=True, text=True,
      env=os.environ | {"XLA_FLAGS": f"--xla_dump_to={dump}",
                        "PYTHONPATH": root}, check=False)
  assert result.returncode == 0, result.stderr
  # The call, and the gradient with what it recomputes.
  assert result.stdout.split()[-1] == "2"


def test_gradients_agree_with_finite_differences(small):
  c = random_coefficients()
  eps_fn = rematerialise.rematerialise(small.compiled_eps(False))
  _, analytic = gradients(eps_fn, c)
  x_T, noise = chain.draw_noise(tf.constant([0, 0]), tf.range(3), SHAPE, 3)
  target = tf.sin(tf.range(16, dtype=tf.float32))
  traced = tf.function(small.eps, autograph=False)

  @tf.function(autograph=False)
  def loss(values):
    images = chain.run_chain(traced, Coefficients(*values), x_T, noise)
    return tf.reduce_mean(tf.tanh(tf.reshape(images, [3, 16])) * target)

  # The fastest frequency of the time embedding is one radian per step.
  steps = dict(times=0.05)
  for field, (name, value) in enumerate(c.arrays().items()):
    for index in np.ndindex(value.shape):
      if name == "state_weights" and index[1] > index[0]:
        continue
      if name == "noise_scales" and index == (2,):
        continue  # The last step adds no noise.
      h = steps.get(name, 3e-3)
      sides = []
      for sign in (1, -1):
        moved = [v.copy() for v in c.arrays().values()]
        moved[field][index] += sign * h
        sides.append(float(loss([tf.constant(v) for v in moved])))
      numeric = (sides[0] - sides[1]) / (2 * h)
      tolerance = 0.02 * abs(numeric) + 3e-7 / h
      assert abs(analytic[field][index] - numeric) < tolerance, (
          name, index, analytic[field][index], numeric)
  # The times do matter: the test above must not pass by comparing zeros.
  assert np.abs(analytic[0]).min() > 3e-7


def test_no_gradient_work_for_network_weights(small):
  with tf.GradientTape() as tape:
    small.eps(tf.zeros([1, *SHAPE]), tf.zeros([1]))
  assert not tape.watched_variables()


def test_bounds_of_x0():
  rng = np.random.default_rng(0)
  x0 = rng.normal(size=(3, *SHAPE)).astype(np.float32)
  x0[0] *= 0.2  # Inside [-1, 1]: nothing to do, whatever the bound.
  np.testing.assert_array_equal(chain.bound_x0(x0, None), x0)
  np.testing.assert_array_equal(
      chain.bound_x0(x0, "clip"), np.clip(x0, -1, 1))
  dynamic = chain.bound_x0(tf.constant(x0), "dynamic").numpy()
  for image, got in zip(x0, dynamic):
    s = max(np.quantile(np.abs(image), 0.995), 1.0)
    np.testing.assert_allclose(got, np.clip(image, -s, s) / s, rtol=1e-5)
  np.testing.assert_array_equal(dynamic[0], x0[0])
  assert np.abs(dynamic).max() <= 1
  with pytest.raises(ValueError, match="clip or dynamic.*'hard'"):
    chain.bound_x0(x0, "hard")


@pytest.mark.parametrize("bound", chain.X0_BOUNDS)
def test_the_chain_bounds_every_x0(bound):
  c = random_coefficients()
  x_T, noise = chain.draw_noise(tf.constant([0, 0]), tf.range(3), SHAPE, 3)
  eps = lambda x, t: 3 * tf.sin(x) * (1 + t[:, None, None, None] / 1000)
  images, states, x0_hats = chain.run_chain(
      eps, c, x_T, noise, trajectory=True, x0_bound=bound)
  for k in range(3):
    free = (c.x0_from_state[k] * states[k]
            + c.x0_from_eps[k] * eps(states[k], tf.fill([3], c.times[k])))
    assert np.abs(free).max() > 1.2  # There is something to bound.
    np.testing.assert_allclose(
        x0_hats[k], chain.bound_x0(free, bound), rtol=1e-5, atol=1e-6)
    assert np.abs(x0_hats[k]).max() <= 1
  # And it is the bounded one that the next state is made of.
  expected = c.x0_weights[2] * x0_hats[2] + sum(
      c.state_weights[2, u] * states[u] for u in range(3))
  np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-5)


def test_every_sample_has_its_own_noise():
  draw = tf.function(chain.draw_noise, autograph=False)
  seed = tf.constant([5, 0])
  x_T, noise = draw(seed, tf.range(40), SHAPE, 3)
  part_x, part_noise = draw(seed, tf.range(17, 20), SHAPE, 3)
  np.testing.assert_array_equal(part_x, x_T[17:20])
  np.testing.assert_array_equal(part_noise, noise[17:20])
  longer, _ = draw(seed, tf.range(40), SHAPE, 7)
  np.testing.assert_array_equal(longer, x_T)
  other, _ = draw(tf.constant([6, 0]), tf.range(40), SHAPE, 3)
  flat = np.concatenate(
      [x_T, other, noise[:, 0], noise[:, 1]]).reshape(160, -1)
  # All different, and standard normal.
  assert len(np.unique(flat[:, 0])) == 160
  np.testing.assert_allclose(flat.mean(), 0, atol=4 / flat.size**0.5)
  np.testing.assert_allclose(flat.var(), 1, atol=6 / flat.size**0.5)


def test_coefficients_round_trip_exactly(tmp_path):
  import json  # pylint: disable=g-import-not-at-top
  c = random_coefficients()
  back = Coefficients.from_dict(json.loads(json.dumps(c.to_dict())))
  for a, b in zip(c, back):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("change,message", [
    (dict(times=[500.0, 1.0]), r"x0_from_state must have shape \(2,\)"),
    (dict(x0_weights=[1.0, np.nan, 1.0]), "x0_weights must be finite"),
    (dict(noise_scales=[0.1, -0.1, 0.0]), "non-negative"),
    (dict(noise_scales=[0.1, 0.1, 0.1]), "end in 0"),
    (dict(state_weights=np.ones((3, 3))), "lower triangular"),
    (dict(times=[5.0, 1.0, -2.0]), "negative"),
    (dict(times=[]), "at least one step"),
])
def test_invalid_coefficients(change, message):
  values = random_coefficients()._replace(
      **{k: np.asarray(v, np.float32) for k, v in change.items()})
  with pytest.raises(ValueError, match=message):
    coefficients_lib.Coefficients.from_dict(values.to_dict())

"""Tests of the tool that trains the latent model of the digits."""

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from project import load_tool


tool = load_tool("train_latent_digits")


@pytest.fixture
def tiny(monkeypatch):
  """A small transformer in place of the tool's, and how to train it."""
  monkeypatch.setattr(tool, "TRANSFORMER", dataclasses.replace(
      tool.TRANSFORMER, num_layers=1, num_heads=2, head_channels=4))
  return tool.Recipe(num_steps=2, batch_size=8, learning_rate=0.01, seed=3,
                     warmup_steps=1)


def some_moments(count=40, seed=0):
  """Moments of latents, and classes."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(count, 7, 7, 8)).astype(np.float32),
          rng.integers(0, 10, count))


class Clock:
  """A clock that is a second later every time it is read."""

  def __init__(self):
    self.seconds = itertools.count()

  def time(self):
    return float(next(self.seconds))


def test_the_flow_s_conditional_mean_has_no_loss():
  """Where all latents are c, E[eps - x_0 | z] is (z - c) / s."""
  c = tf.random.stateless_normal([1, 7, 7, 4], [0, 1])
  asked = []

  def oracle(inputs, training):
    del training
    z, t, labels = inputs
    asked.append((t.numpy(), labels.numpy()))
    return (z - c) / (t / 1000.0)[:, None, None, None]

  labels = tf.constant(np.arange(1000) % 10, tf.int32)
  latents = tf.repeat(c, 1000, axis=0)
  loss = tool.flow_loss(oracle, latents, labels, tf.constant([5, 6]))
  assert loss < 1e-6
  (times, told), = asked
  # One time in each thousandth; a tenth of the labels are the null label.
  np.testing.assert_array_equal(np.floor(times), np.arange(1000))
  assert 70 < np.sum(told == 10) < 130
  np.testing.assert_array_equal(told[told != 10], labels[told != 10])
  # A prediction of zero is wrong by the mean of (eps - c)^2.
  zero = tool.flow_loss(lambda inputs, training: 0.0 * inputs[0], latents,
                        labels, tf.constant([5, 6]))
  np.testing.assert_allclose(zero, 1.0 + np.mean(c**2), rtol=0.02)


def test_the_loss_is_the_negative_elbo():
  rng = np.random.default_rng(1)
  moments, _ = some_moments(3)
  images, decoded = rng.uniform(-1, 1, (2, 3, 28, 28, 1)).astype(np.float32)
  # The divergence from a standard normal distribution, by quadrature.
  grid = np.linspace(-60, 60, 60001)
  mean, variance = moments[..., :4].astype(float), np.exp(
      moments[..., 4:].astype(float))
  divergence = 0.0
  for m, v in zip(mean.ravel(), variance.ravel()):
    log_q = -0.5 * (grid - m) ** 2 / v - 0.5 * np.log(2 * np.pi * v)
    log_p = -0.5 * grid**2 - 0.5 * np.log(2 * np.pi)
    divergence += np.trapezoid(np.exp(log_q) * (log_q - log_p), grid)
  expected = (np.sum((images - decoded) ** 2) / (2 * 0.1**2)
              + divergence) / (3 * 784)
  np.testing.assert_allclose(
      tool.negative_elbo(images, decoded, moments), expected, rtol=1e-5)


def test_drawn_latents_have_the_moments_that_are_told():
  moments, _ = some_moments(2)
  moments = np.repeat(moments, 4000, axis=0)
  drawn = tool.draw_latents(moments, tf.constant([1, 2])).numpy()
  mean, std = moments[..., :4], np.exp(0.5 * moments[..., 4:])
  standard = ((drawn - mean) / std).reshape(2, 4000, -1)
  np.testing.assert_allclose(standard.mean(axis=1), 0, atol=0.08)
  np.testing.assert_allclose(standard.std(axis=1), 1, atol=0.06)
  mean, std = tool.standard_of(moments)
  np.testing.assert_allclose(mean, drawn.mean(axis=(0, 1, 2)), atol=0.02)
  np.testing.assert_allclose(std, drawn.std(axis=(0, 1, 2)), rtol=0.02)


def test_a_pass_sees_every_image_once():
  recipe = tool.Recipe(num_steps=9, batch_size=4, learning_rate=1.0, seed=0)
  passes = [np.concatenate([recipe.batch(14, 3 * i + j) for j in range(3)])
            for i in range(2)]
  for one in passes:
    assert len(set(one.tolist())) == 12 and one.max() < 14
  assert passes[0].tolist() != passes[1].tolist()


@pytest.mark.parametrize("last_rate", [0.0, 0.25, 1.0])
def test_the_rate_grows_and_then_falls_to_what_is_left(last_rate):
  optimizer = tool.Recipe(
      num_steps=110, batch_size=4, learning_rate=2.0, seed=0, warmup_steps=10,
      last_rate=last_rate).optimizer()

  def rate(step):
    optimizer.iterations.assign(step)
    return float(optimizer.learning_rate)

  np.testing.assert_allclose(
      [rate(0), rate(5), rate(10), rate(60), rate(110)],
      [0.0, 1.0, 2.0, 1.0 + last_rate, 2.0 * last_rate], atol=1e-6)


def test_the_transformer_begins_at_zero(tiny):
  del tiny
  x, _ = some_moments(5)
  network = tool.build_transformer()
  output = network([x[..., :4], np.linspace(0, 1000, 5, dtype=np.float32),
                    np.arange(5)])
  np.testing.assert_array_equal(output, np.zeros((5, 7, 7, 4)))


def train_line(folder, deadline=np.inf, num_steps=6):
  """Fits a line by the tool's `Training`; gives it and whether it is ready."""
  recipe = tool.Recipe(num_steps=num_steps, batch_size=4, learning_rate=0.1,
                       seed=3, warmup_steps=1)
  model = tool.keras.Sequential(
      [tool.keras.Input((2,)), tool.keras.layers.Dense(1)])
  model.set_weights([np.ones((2, 1)), np.zeros(1)])
  x = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
  training = tool.Training(str(folder), recipe, {"model": model}, average=True)

  def step_fn(chosen, seed):
    with tf.GradientTape() as tape:
      noise = tf.random.stateless_normal([4, 1], seed)
      loss = tf.reduce_mean((model(tf.gather(x, chosen)) - noise - 3.0) ** 2)
    training.apply(tape.gradient(loss, training.variables))
    return loss

  return training, training.run("line", step_fn, len(x), deadline)


def test_a_stopped_training_ends_the_same(tmp_path, monkeypatch):
  whole, ready = train_line(tmp_path / "whole")
  assert ready and whole.told()["num_steps"] == 6
  monkeypatch.setattr(tool, "time", Clock())
  parts, ready = train_line(tmp_path / "parts", deadline=15.0)
  assert not ready and 0 < int(parts.step) < 6
  parts, ready = train_line(tmp_path / "parts")
  assert ready
  for one, other in ((whole.variables, parts.variables),
                     (whole.averages, parts.averages)):
    for a, b in zip(one, other, strict=True):
      np.testing.assert_array_equal(a, b)
  # What is ready is not trained any further.
  again, ready = train_line(tmp_path / "parts")
  assert ready and int(again.step) == 6
  np.testing.assert_array_equal(again.variables[0], whole.variables[0])


def test_the_average_of_two_steps(tmp_path):
  training, _ = train_line(tmp_path, num_steps=2)
  # The first step has the rate 0. The decay is 1 / 11, then 2 / 12.
  last = training.variables[0].numpy()
  assert np.all(np.abs(last - 1.0) > 0.01)
  np.testing.assert_allclose(
      training.averages[0], 2 / 12 + last * 10 / 12, rtol=1e-6)


@pytest.mark.slow
def test_the_transformer_is_trained(tiny, tmp_path):
  moments, labels = some_moments()
  network, training = tool.train_transformer(
      str(tmp_path), moments, labels, tool.standard_of(moments), np.inf, tiny)
  assert int(training.step) == tiny.num_steps
  for mine, average in zip(network.trainable_variables, training.averages,
                           strict=True):
    np.testing.assert_array_equal(mine, average)
  # Zero was the first prediction.
  assert np.any(network.get_layer("output").projection.kernel.numpy())


@pytest.mark.slow
def test_what_is_saved_is_what_was_trained(tiny, tmp_path):
  del tiny
  rng = np.random.default_rng(3)
  encoder = tool.build_encoder()
  decoder = tool.autoencoder.build_decoder(tool.DECODER)
  network = tool.dit.build_dit(tool.TRANSFORMER)  # Not zero, as at first.
  standard = (np.array([0.1, -0.2, 0.3, 0.0], np.float32),
              np.array([0.5, 1.0, 2.0, 1.5], np.float32))
  images = rng.uniform(-1, 1, (6, 28, 28, 1)).astype(np.float32)
  denoiser = tool.make_denoiser(network, decoder, standard)
  errors = tool.held_out_errors(encoder, denoiser, images, np.arange(6))
  own = encoder(images)[..., :4]
  np.testing.assert_allclose(
      errors["reconstruction_mse"], np.mean((decoder(own) - images) ** 2),
      rtol=1e-4)
  tool.save(str(tmp_path), denoiser, {"seed": 1})
  loaded = ddss_tf.load_denoiser(str(tmp_path))
  assert loaded.key == denoiser.key
  # Standardised latents are what the decoder's are less the mean, by std.
  z = (own - standard[0]) / standard[1]
  np.testing.assert_allclose(loaded.decode(z), decoder(own), atol=1e-4)
  assert (loaded.null_label, loaded.num_classes) == (10, 11)
  assert loaded.guidance_scale is None

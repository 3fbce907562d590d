"""Tests of the check of a network's wiring: wrong ones are told, right ones not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import wiring
from ddss_tf.errors import UserError
from ddss_tf.features import network as network_lib
import gaussian_parts

SHAPE = (4, 4, 1)
T = 1000


def images(low=-0.8, high=0.7, count=64):
  """Images that are either dark or bright, with a little noise, in [-1, 1]."""
  rng = np.random.default_rng(0)
  levels = np.where(rng.random(count) < 0.5, low, high)
  return (levels[:, None, None, None]
          + 0.05 * rng.normal(size=(count, *SHAPE))).astype(np.float32)


class Exact(keras.layers.Layer):
  """The exact denoiser of `images`: a mixture of two Gaussians.

  Args:
    schedule: the process that it was made for.
    scale, mean, std: its clock shows `scale` times the step, its images are
      (image - mean) / std.
    prediction: "eps", "x0" or "v".
  """

  def __init__(self, schedule, scale=1.0, mean=0.0, std=1.0, prediction="eps",
               backwards=False):
    super().__init__()
    self.process, self.scale, self.prediction = schedule, scale, prediction
    self.levels = [(level - mean) / std for level in (-0.8, 0.7)]
    self.deviation = 0.05 / std
    self.backwards = backwards

  def call(self, x, t):
    t = t / self.scale
    if self.backwards:
      t = T - 1 - t
    alpha, sigma = (value[:, None, None, None]
                    for value in self.process.alpha_sigma(t))
    variance = alpha**2 * self.deviation**2 + sigma**2
    gain = alpha * self.deviation**2 / variance
    found, logits = [], []
    for level in self.levels:
      found.append(level + gain * (x - alpha * level))
      logits.append(-tf.reduce_sum(
          (x - alpha * level) ** 2, [1, 2, 3], keepdims=True) / (2 * variance))
    first = tf.sigmoid(logits[0] - logits[1])
    x0 = first * found[0] + (1 - first) * found[1]
    eps = (x - alpha * x0) / sigma
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[self.prediction]


def network(**options):
  options.setdefault("schedule", ddss_tf.NoiseSchedule.linear(T))
  x, t = keras.Input(SHAPE), keras.Input(())
  return keras.Model([x, t], Exact(**options)(x, t))


LINEAR = ddss_tf.NoiseSchedule.linear(T)
COSINE = ddss_tf.NoiseSchedule.cosine(T)
LATENT = ddss_tf.NoiseSchedule.scaled_linear(T, 0.00085, 0.012)
# How the network was made, how it is wired, and what the line must say.
WRONG = {
    "a clock in [0, 1]": (dict(scale=1 / (T - 1)), {}, ["time_scale = 0.001001"]),
    "a clock of steps": ({}, dict(time_scale=1 / (T - 1)), ["time_scale = 1 "]),
    "a clock backwards": (dict(backwards=True), {}, [
        "time_scale = -1 ", "time_offset = 999"]),
    "a clock of sigma": (
        {}, dict(time_input="sigma"), ["time_input = 'step' (now 'sigma')"]),
    "x0": (dict(prediction="x0"), {}, ["prediction = 'x0' (now 'eps')"]),
    "v": (dict(prediction="v"), {}, ["prediction = 'v' (now 'eps')"]),
    "eps": ({}, dict(prediction="v"), ["prediction = 'eps' (now 'v')"]),
    "the schedule": (dict(schedule=COSINE), {}, ["the schedule is 'cosine'"]),
    "the other schedule": (dict(schedule=LINEAR), dict(schedule=COSINE),
                           ["the schedule is 'linear'"]),
    "a latent schedule": (dict(schedule=LATENT), {}, [
        "'scaled_linear', beta_start 0.00085, beta_end 0.012"]),
    "images in [0, 1]": (dict(mean=-1.0, std=2.0), {}, [
        "images in [0, 1] (image_mean = -1, image_std = 2)"]),
    "standardised images": (dict(mean=-0.05, std=0.752), {}, [
        "of mean 0 and deviation 1"]),
    "two faults": (dict(scale=1 / (T - 1), prediction="x0"), {}, [
        "time_scale = 0.001001", "and prediction = 'x0' (now 'eps')"]),
}


def wired(made, told):
  told = {"schedule": LINEAR, **told}
  return ddss_tf.Denoiser(network(**made), told.pop("schedule"), **told)


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_wiring_is_told(fault, caplog):
  made, told, words = WRONG[fault]
  denoiser = wired(made, told)
  wiring.warn(denoiser, images())
  (line,) = [record.getMessage() for record in caplog.records
             if record.levelname == "WARNING"]
  assert "seems to be wired wrongly" in line and "\n" not in line
  assert all(word in line for word in words), line


@pytest.mark.parametrize("made,told", [
    ({}, {}),
    (dict(scale=1 / (T - 1)), dict(time_scale=1 / (T - 1))),
    (dict(prediction="x0"), dict(prediction="x0")),
    (dict(prediction="v"), dict(prediction="v")),
    (dict(schedule=COSINE), dict(schedule=COSINE)),
    (dict(schedule=LATENT), dict(schedule=LATENT)),
])
def test_a_right_wiring_is_not(made, told):
  found = wiring.check(wired(made, told), images())
  # An exact denoiser is better than the best affine one, which it may be.
  assert not found.cause and found.error < 1, found


def test_the_error_is_that_of_the_closed_form():
  """The exact denoiser of Gaussian images is the affine one: the error is 1."""
  rng = np.random.default_rng(1)
  for std in (0.25, 0.05):
    some = (0.3 + std * rng.normal(size=(64, *SHAPE))).astype(np.float32)
    found = wiring.check(ddss_tf.gaussian_denoiser(SHAPE, 0.3, std), some)
    # 64 images of 16 values at each of five levels.
    assert not found.cause and abs(found.error - 1) < 0.12, found


def test_images_in_0_to_1_are_told():
  """Floats in [0, 1] pass for images in [-1, 1]."""
  denoiser = wired({}, {})
  found = wiring.check(denoiser, (images() + 1) / 2)
  assert "which are in [0, 1], are made to [-1, 1]" in found.cause, found


def test_a_standardised_network_is_known():
  decoder = ddss_tf.Standardised(SHAPE, -0.05, 0.752)
  model = network(mean=-0.05, std=0.752)
  right = ddss_tf.Denoiser(model, LINEAR, decoder=decoder)
  assert not wiring.check(right, images()).cause
  wrong = ddss_tf.Denoiser(network(), LINEAR, decoder=decoder)
  assert "images in [-1, 1]" in wiring.check(wrong, images()).cause


def random_network(seed, last="random_normal"):
  keras.utils.set_random_seed(seed)
  x, t = keras.Input(SHAPE), keras.Input(())
  y = keras.layers.Conv2D(8, 3, padding="same", activation="silu")(x)
  y = y + keras.layers.Dense(8)(keras.ops.log(1 + t)[:, None])[:, None, None]
  y = keras.layers.Conv2D(1, 3, padding="same", kernel_initializer=last)(y)
  return keras.Model([x, t], y)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("last", ["zeros", "random_normal", "glorot_uniform"])
def test_a_network_that_was_never_trained_has_no_other_cause(prediction, last):
  """An answer of zeros would be a fair v, but it tells nothing."""
  denoiser = ddss_tf.Denoiser(random_network(1, last), LINEAR, prediction)
  assert not wiring.check(denoiser, images()).cause


def test_a_network_that_gives_nan_does_not_stop_the_check():
  x, t = keras.Input(SHAPE), keras.Input(())
  model = keras.Model([x, t], x * np.nan + t[:, None, None, None])
  found = wiring.check(ddss_tf.Denoiser(model, LINEAR), images())
  assert not found.cause and found.error == np.inf
  assert "does not denoise these images" in found.text


@pytest.mark.slow
def test_the_check_is_deterministic_and_kept():
  calls = []

  class Counted(ddss_tf.Denoiser):

    def network(self, x, t, labels=None):
      calls.append(len(x))
      return super().network(x, t, labels)

  denoiser = Counted(network(), LINEAR)
  first = wiring.check(denoiser, images(), key="a", batch_size=64)
  # Five levels of 64 images, and no more images at once than told.
  assert calls[:5] == [64] * 5 and max(calls) == 64
  calls.clear()
  assert wiring.check(denoiser, images(), key="a") == first and not calls
  assert wiring.check(denoiser, images(), batch_size=7) == pytest.approx(
      first, nan_ok=True)


@pytest.mark.slow
def test_classes_are_those_of_the_images_or_drawn():
  given = []

  class Watched(ddss_tf.Denoiser):

    def network(self, x, t, labels=None):
      given.append(np.asarray(labels))
      return super().network(x, t, labels)

  x, t, y = keras.Input(SHAPE), keras.Input(()), keras.Input((), dtype="int32")
  model = keras.Model([x, t, y], Exact(LINEAR)(x, t) + 0 * keras.ops.cast(
      y, "float32")[:, None, None, None])
  denoiser = Watched(model, LINEAR, num_classes=4, null_label=3)
  labels = np.arange(64) % 3
  wiring.check(denoiser, images(), labels, batch_size=1000)
  np.testing.assert_array_equal(given[0], np.tile(labels, 5))
  for unknown in (None, labels + 7):
    given.clear()
    wiring.check(denoiser, images(), unknown, batch_size=1000)
    assert set(given[0]) == {0, 1, 2}  # Never the one that stands for none.


def test_latents_are_not_checked():
  x = keras.Input((2, 2, 3))
  decoder = ddss_tf.Decoder(
      keras.Model(x, keras.layers.Conv2DTranspose(1, 2, strides=2)(x)))
  denoiser = ddss_tf.gaussian_denoiser((2, 2, 3)).with_decoder(decoder)
  found = wiring.check(denoiser, images())
  assert found.text.startswith("not checked: a decoder has no encoder")


def test_channels_first_are_told():
  x, t = keras.Input((1, 4, 4)), keras.Input(())
  denoiser = ddss_tf.Denoiser(
      keras.Model([x, t], x + t[:, None, None, None]), LINEAR)
  parts = gaussian_parts.make()
  with pytest.raises(UserError, match=r"seems to be \[C, H, W\]: put it between"):
    network_lib.check_shapes(denoiser, parts["dataset"])


def test_a_search_warns_before_it_begins(parts, tmp_path, caplog):
  changed = {**parts, "denoiser": wired(*WRONG["x0"][:2]),
             "dataset": images(count=400)}
  with pytest.raises(UserError, match="no step"):  # Stopped by its metric.
    ddss_tf.search(
        run_dir=str(tmp_path), **changed, num_search_steps=1, batch_size=4,
        pool_samples=4, validation_samples=4, jit_compile=False,
        sampler=lambda schedule: (_ for _ in ()).throw(UserError("no step")))
  assert not caplog.records
  ddss_tf.search(
      run_dir=str(tmp_path), **changed, num_search_steps=1, batch_size=4,
      pool_samples=4, validation_samples=4, jit_compile=False,
      optimizer="adam", objective="kid_linear",
      sampler=lambda schedule: ddss_tf.make_sampler(schedule, "ggdm", 2))
  (line,) = [record.getMessage() for record in caplog.records
             if "wired wrongly" in record.getMessage()]
  assert "prediction = 'x0' (now 'eps')" in line


def test_inspect_says_it(parts):
  from ddss_tf.reporting import inspection  # pylint: disable=g-import-not-at-top
  rows = dict(line.split(maxsplit=1) for line in inspection.inspect(
      denoiser=wired(*WRONG["x0"][:2]), dataset=images()).splitlines())
  assert "but with" in rows["wiring"] and "prediction = 'x0'" in rows["wiring"]
  rows = inspection.inspect(
      denoiser=parts["denoiser"], dataset=parts["dataset"])
  assert "times the squared error of an affine denoiser" in rows
  assert "but with" not in rows


@pytest.fixture(name="embedded", scope="module")
def fixture_embedded():
  return ddss_tf.load_denoiser("digits16-ddpm")


@pytest.mark.slow
@pytest.mark.parametrize("fault,told,word", [
    ("", {}, ""),
    ("a clock in [0, 1]", dict(time_scale=1 / 999), "time_scale = 1 "),
    ("a clock of sigma", dict(time_input="sigma"), "time_input = 'step'"),
    ("read as x0", dict(prediction="x0"), "prediction = 'eps' (now 'x0')"),
    ("read as v", dict(prediction="v"), "prediction = 'eps' (now 'v')"),
    ("a cosine schedule", dict(schedule=COSINE), "the schedule is 'linear'"),
    ("a scaled schedule", dict(
        schedule=ddss_tf.NoiseSchedule.scaled_linear(T)), "'linear'"),
    ("images in [0, 1]", dict(mean=-1.0, std=2.0), "images in [-1, 1]"),
])
def test_the_embedded_model(fault, told, word, digits, embedded):
  del fault
  known = embedded
  told = dict(told)
  decoder = ddss_tf.Standardised(
      known.state_shape, told.pop("mean"), told.pop("std")) if (
          "mean" in told) else None
  denoiser = ddss_tf.Denoiser(
      known.model, told.pop("schedule", known.schedule), decoder=decoder, **told)
  found = wiring.check(denoiser, digits.images, digits.labels)
  assert bool(found.cause) == bool(word) and word in found.cause, found

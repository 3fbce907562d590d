"""Tests of guidance whose scale is learned, step by step.

Guidance of a Gaussian class by another is the exact network of a third mean, so
that a chain with a scale for each step is a chain through known networks.
"""

import functools
import os

import conditional_parts
from conditional_parts import MEANS, NULL, SHAPE, STD, STEPS
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.runs import fingerprint
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import coefficients as coefficients_lib
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.errors import UserError

SCALES = np.array([0.5, 3.0, 1.7], np.float32)
BEST = 0.4  # Of the data set below.
TIMES = [800, 550, 300]


def guided_mean(scale, label):
  return MEANS[NULL] + scale * (MEANS[label] - MEANS[NULL])


@pytest.fixture(scope="module")
def denoiser():
  return conditional_parts.make(null_label=NULL)


def make_sampler(denoiser, family="ddpm+guidance", **options):
  return ddss_tf.make_sampler(denoiser.schedule, family, STEPS, **options)


def test_every_step_has_its_scale(denoiser):
  coefficients = make_sampler(denoiser).coefficients()._replace(
      guidance_scales=tf.constant(SCALES))
  found = generator_lib.Generator(denoiser, 4, False).images(
      coefficients, 4, 5, label=2)
  x_T, noise = chain.draw_noise(
      generator_lib.seed_pair(5), tf.range(4), SHAPE, STEPS)
  steps = iter(SCALES)
  # run_chain calls the network once a step, in order.
  expected = chain.run_chain(
      lambda x, t: conditional_parts.gaussian(
          guided_mean(next(steps), 2)).eps(x, t),
      coefficients._replace(guidance_scales=None), x_T, noise)
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("scale", [None, 2.5])
def test_start(denoiser, scale):
  # A scale of 1 is no guidance; one for all steps is the denoiser's.
  images = functools.partial(
      conditional_parts.images, count=6, batch_size=6, label=0)
  sampler = make_sampler(denoiser, guidance_scale=scale)
  assert sampler.label == "DDPM+GUIDANCE"
  found = generator_lib.Generator(denoiser, 6, False).images(
      sampler.coefficients(), 6, 5, label=0)
  np.testing.assert_allclose(
      found, images(denoiser if scale is None else denoiser.guided(scale)),
      atol=1e-5)


@pytest.mark.slow
def test_gradient(denoiser):
  x_T, noise = chain.draw_noise([0, 1], tf.range(3), SHAPE, STEPS)
  labels = tf.constant([0, 2, 3])
  plain = make_sampler(denoiser).coefficients()
  eps_fn = denoiser_lib.with_labels(denoiser.compiled_eps(False), labels)

  def total(scales, function=eps_fn):
    return tf.reduce_sum(chain.run_chain(
        function, plain._replace(guidance_scales=scales), x_T, noise) ** 2)

  gradients = []
  for function in (eps_fn, *(
      denoiser_lib.with_labels(denoiser.compiled_eps(jit, remat=True), labels)
      for jit in (False, True))):
    scales = tf.constant(SCALES)
    with tf.GradientTape() as tape:
      tape.watch(scales)
      value = total(scales, function)
    gradients.append(tape.gradient(value, scales))
  np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-5)
  np.testing.assert_allclose(gradients[2], gradients[0], rtol=1e-4)  # By XLA.
  for k in range(STEPS):
    step = 0.01 * np.eye(STEPS, dtype=np.float32)[k]
    difference = (total(SCALES + step) - total(SCALES - step)) / 0.02
    np.testing.assert_allclose(gradients[0][k], difference, rtol=1e-2)


@pytest.fixture(scope="module")
def searched(denoiser, gaussian_parts, tmp_path_factory):
  rng = np.random.default_rng(0)
  means = np.repeat([guided_mean(BEST, label) for label in (0, 2, 3)], 150)
  real = (means[:, None, None, None]
          + STD * rng.normal(size=(450, *SHAPE))).astype(np.float32)
  run = str(tmp_path_factory.mktemp("guidance"))
  parts = dict(denoiser=denoiser, features=gaussian_parts["features"],
               dataset=dataset_lib.ImageDataset(
                   "guided", real, None, fingerprint.arrays_sha256([real])))
  sampler = ddss_tf.search(
      run_dir=run, **parts, num_search_steps=60, batch_size=240,
      pool_samples=2400, validation_samples=1000, validate_every=10,
      learning_rate=0.2,
      objective="kid_linear", jit_compile=False, sampler=functools.partial(
          ddss_tf.make_sampler, family="ddim+guidance", num_steps=STEPS,
          init="ddim", stride=TIMES))
  return run, parts, sampler


@pytest.mark.slow
def test_search_finds_the_scale(searched):
  run, parts, sampler = searched
  start, end = ddss_tf.evaluate(
      run, **parts, num_samples=600, jit_compile=False,
      baselines=[functools.partial(
          ddss_tf.make_sampler, family="ddim", num_steps=STEPS, stride=TIMES)])
  assert end["fid"] < 0.5 * start["fid"]
  # Only what all scales do together is determined: the mean of each class. It is
  # that of the best single scale, which is not the data's: three steps leave too
  # small a spread, and the means make up for it.
  generator = generator_lib.Generator(parts["denoiser"], 500, False)
  features = parts["features"]
  goal = features(parts["dataset"].images)["pool"].numpy().mean(0)
  plain = sampler.coefficients().numpy()
  scales = np.linspace(0.3, 0.8, 11)
  distances = [
      np.sum((features(generator.images(plain._replace(
          guidance_scales=np.full(STEPS, scale, np.float32)), 1000, 9)
                      )["pool"].numpy().mean(0) - goal) ** 2)
      for scale in scales]
  best = -np.divide(*np.polyfit(scales, distances, 2)[1::-1]) / 2
  assert BEST < best < 0.7
  for label in (0, 2, 3):
    images = generator.images(plain, 60, 9, label=label)
    assert abs(images.mean() - guided_mean(best, label)) < 0.04
    assert abs(MEANS[label] - guided_mean(best, label)) > 0.15


@pytest.mark.slow
def test_found_scales_are_kept(searched):
  run, parts, sampler = searched
  found = card.read(os.path.join(run, run_dir_lib.SAMPLER)).coefficients
  np.testing.assert_array_equal(
      found.guidance_scales, sampler.coefficients().guidance_scales)
  # A search goes on from them.
  again = make_sampler(parts["denoiser"], "ggdm+pred+guidance",
                       init=os.path.join(run, run_dir_lib.SAMPLER))
  np.testing.assert_array_equal(
      again.coefficients().guidance_scales, found.guidance_scales)
  # A family that does not learn them keeps them.
  kept = make_sampler(parts["denoiser"], "ggdm+pred",
                      init=os.path.join(run, run_dir_lib.SAMPLER))
  np.testing.assert_array_equal(
      kept.coefficients().guidance_scales, found.guidance_scales)
  served = tf.saved_model.load(
      ddss_tf.export(run, parts["denoiser"])).signatures["from_noise"]
  x_T, noise = chain.draw_noise([0, 1], tf.range(3), SHAPE, STEPS)
  labels = tf.constant([0, 2, 3])
  expected = chain.run_chain(
      denoiser_lib.with_labels(parts["denoiser"].eps, labels), found.map(tf.constant),
      x_T, noise)
  np.testing.assert_allclose(
      served(x_T=x_T, step_noise=noise, labels=labels)["images"],
      np.clip(expected, -1, 1), atol=1e-5)


@pytest.mark.slow
def test_what_is_refused(denoiser, searched, tmp_path):
  run, parts, _ = searched
  learned = functools.partial(
      ddss_tf.make_sampler, family="ddim+guidance", num_steps=STEPS)
  for other, words in (
      (conditional_parts.make(), "null_label is told, or .* null_row. Received: 'classes'"),
      (conditional_parts.gaussian(0.0), "needs a class-conditional denoiser"),
      (denoiser.guided(2.0), "that has its own. Received: 2.0")):
    with pytest.raises(UserError, match=words):
      ddss_tf.search(
          run_dir=str(tmp_path / "run"), **{**parts, "denoiser": other},
          num_search_steps=1, batch_size=4, sampler=learned)
  with pytest.raises(UserError, match="with null_label 1.*with None"):
    ddss_tf.export(run, conditional_parts.make())
  with pytest.raises(UserError, match="parameterisation='real'"):
    make_sampler(denoiser, "ggdm+guidance", init="ddim",
                 parameterisation="paper")
  with pytest.raises(UserError, match="families with .guidance"):
    make_sampler(denoiser, "ggdm", guidance_scale=2.0)
  with pytest.raises(ValueError, match="guidance needs a null_label"):
    conditional_parts.make().eps(tf.zeros([1, *SHAPE]), 3.0, 0, guidance=2.0)
  values = make_sampler(denoiser).coefficients().to_dict()
  with pytest.raises(ValueError, match="guidance_scales must have shape"):
    coefficients_lib.Coefficients.from_dict(
        {**values, "guidance_scales": [1.0]})

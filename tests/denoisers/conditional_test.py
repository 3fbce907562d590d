"""Tests of class-conditional denoisers, on classes that are Gaussians.

With class y of N(MEANS[y], STD^2), the exact network of a class is that of a
Gaussian data set; and guidance, linear in eps and so in the mean, is exactly
the network of another mean.
"""

import functools
import json
import os

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.formats import own
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.reporting import inspection
from ddss_tf.runs import fingerprint
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.searching import options as options_lib
from ddss_tf.searching import search as search_lib
from ddss_tf.errors import UserError
from conditional_parts import (  # pylint: disable=unused-import
    MEANS, NULL, SHAPE, STD, STEPS, gaussian, images, make)


@pytest.mark.parametrize("label", range(len(MEANS)))
def test_images_of_a_class(label):
  np.testing.assert_allclose(
      images(make(), label=label), images(gaussian(MEANS[label])), atol=1e-5)


@pytest.mark.slow
def test_every_image_has_a_class_of_its_own():
  denoiser = make(null_label=NULL)
  pair = generator_lib.seed_pair(5)
  labels = tf.function(denoiser.draw_labels)(pair, tf.range(3000)).numpy()
  # One at a time, or in another order, they are the same.
  np.testing.assert_array_equal(
      denoiser.draw_labels(pair, tf.constant([77, 3])), labels[[77, 3]])
  # All classes but the null one, as often: within five standard errors.
  counts = np.bincount(labels, minlength=4)
  assert counts[NULL] == 0
  assert np.abs(counts[[0, 2, 3]] - 1000).max() < 5 * np.sqrt(3000 * 2 / 9)
  found = images(denoiser)
  for label in (0, 2, 3):
    own = np.flatnonzero(labels[:12] == label)
    np.testing.assert_allclose(
        found[own], images(gaussian(MEANS[label]))[own], atol=1e-5)
  np.testing.assert_allclose(images(denoiser, batch_size=12), found, atol=1e-5)
  # Without a null label all four are drawn.
  assert set(make().draw_labels(pair, tf.range(50)).numpy()) == set(range(4))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_another_mean(scale):
  denoiser = make(guidance_scale=scale, null_label=NULL)
  mean = MEANS[NULL] + scale * (MEANS[0] - MEANS[NULL])
  np.testing.assert_allclose(
      images(denoiser, label=0), images(gaussian(mean)), atol=1e-4)
  x = tf.random.stateless_normal([2, *SHAPE], [0, 1])
  # A scalar time and a scalar label serve all images.
  np.testing.assert_allclose(
      denoiser.eps(x, 300.0, 0), gaussian(mean).eps(x, 300.0), atol=1e-5)


def test_guidance_is_part_of_what_a_denoiser_is(tmp_path):
  one, other, none = (make(guidance_scale=scale, null_label=null)
                      for scale, null in ((2.0, 1), (3.0, 1), (None, 1)))
  # Which classes are drawn is a part of it, with or without guidance.
  assert len({one.key, other.key, none.key, make().key}) == 4
  assert none.identity["null_label"] == 1 and "null_label" not in (
      make().identity)
  assert one.identity["guidance_scale"] == 2.0
  assert "guidance_scale" not in none.identity
  one.save(str(tmp_path))
  again = ddss_tf.load_denoiser(str(tmp_path))
  assert (again.guidance_scale, again.null_label) == (2.0, 1)
  assert again.key == one.key
  again = ddss_tf.load_denoiser(str(tmp_path), guidance_scale=3.0)
  assert again.key == other.key
  assert ("classes      4, label 1 stands for none, guidance 3: 2 calls a step"
          in inspection.inspect(denoiser=again))
  with pytest.raises(UserError, match="null_label must be one.*are 4.*9"):
    ddss_tf.load_denoiser(str(tmp_path), null_label=9)
  path = tmp_path / own.CARD
  card = json.loads(path.read_text())
  for changes in (dict(num_classes="5"), dict(num_classes=0), dict(version=99),
                  dict(format="other"), dict(name=[]),
                  dict(guidance_scale=True)):
    path.write_text(json.dumps(card | changes))
    with pytest.raises(UserError, match=f"damaged.*{list(changes)[0]} must be"):
      ddss_tf.load_denoiser(str(tmp_path))


@pytest.mark.parametrize("options,message", [
    (dict(guidance_scale=2.0), "guidance_scale needs a null_label"),
    (dict(null_label=4), "one of the network's classes, of which there are 4"),
    (dict(null_label="x"), "null_label must be .*whole number.*'x'"),
    (dict(null_label=1.5), "null_label must be .*whole number.*1.5"),
    (dict(null_label=True), "null_label must be .*whole number.*True"),
    *[(dict(null_label=1, guidance_scale=value),
       "guidance_scale must be a finite number") for value in (
           "x", float("nan"), [1], True)],
])
def test_bad_guidance(options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)


@pytest.fixture(scope="module")
def parts(gaussian_parts):
  rng = np.random.default_rng(0)
  real = (np.repeat(MEANS[[0, 2, 3]], 150)[:, None, None, None]
          + STD * rng.normal(size=(450, *SHAPE))).astype(np.float32)
  return dict(
      denoiser=make(null_label=NULL, guidance_scale=1.5),
      dataset=dataset_lib.ImageDataset(
          "classes", real, None, fingerprint.arrays_sha256([real])),
      features=gaussian_parts["features"])


@pytest.mark.slow
def test_rematerialised_gradient_with_labels(parts):
  real = parts["features"](parts["dataset"].images)["pool"].numpy()
  results = []
  for remat in (True, False):
    search = search_lib.assemble(
        parts["denoiser"], families.make_sampler(
            parts["denoiser"].schedule, "ggdm+pred+time", STEPS, init="ddpm"),
        objective_lib.Objective("frechet", [parts["features"]], [real], SHAPE),
        options_lib.SearchOptions(
            objective="frechet", batch_size=24, micro_batch_size=8,
            num_search_steps=5, control_variate=False, jit_compile=False),
        remat=remat)
    results.append(search.gradient(0))
  (loss, gradient), (plain_loss, plain_gradient) = results
  np.testing.assert_allclose(loss, plain_loss, rtol=1e-4)
  assert np.all(gradient != 0)
  error = np.linalg.norm(gradient - plain_gradient)
  assert error < 1e-4 * np.linalg.norm(plain_gradient)


@pytest.fixture(scope="module")
def searched(parts, tmp_path_factory):
  run = str(tmp_path_factory.mktemp("conditional"))
  sampler = ddss_tf.search(
      run_dir=run, **parts, num_search_steps=15, batch_size=60,
      pool_samples=180, validation_samples=180, validate_every=5, learning_rate=0.3,
      objective="frechet", jit_compile=False, sampler=functools.partial(
          families.make_sampler, family="ggdm+pred+time", num_steps=STEPS,
          init="ddim"))
  return run, sampler


@pytest.mark.slow
def test_a_conditional_search_lowers_the_distance(parts, searched):
  run, sampler = searched
  start, end = ddss_tf.evaluate(
      run, **parts, num_samples=600, jit_compile=False,
      baselines=[functools.partial(
          families.make_sampler, family="ddim", num_steps=STEPS)])
  assert end["fid"] < 0.7 * start["fid"]
  assert end["denoiser"]["guidance_scale"] == 1.5
  assert card.read(os.path.join(run, run_dir_lib.SAMPLER)).denoiser == end["denoiser"]
  del sampler


@pytest.mark.slow
def test_export_with_classes(parts, searched):
  run, sampler = searched
  denoiser = parts["denoiser"]
  served = tf.saved_model.load(ddss_tf.export(run, denoiser)).signatures
  pair, indices = generator_lib.seed_pair(3), tf.range(7)
  x_T, noise = chain.draw_noise(pair, indices, SHAPE, STEPS)
  labels = tf.constant([0, 2, 3, 0, 0, 2, 1])
  expected = chain.run_chain(
      denoiser_lib.with_labels(denoiser.eps, labels), sampler.coefficients(), x_T,
      noise)
  found = served["from_noise"](x_T=x_T, step_noise=noise, labels=labels)
  np.testing.assert_allclose(
      found["images"], np.clip(expected, -1, 1), atol=1e-5)
  generator = generator_lib.Generator(denoiser, 7, False)

  def nearly(a, b):  # Rounding to bytes may go either way.
    return np.abs(a.astype(int) - b).max() <= 1

  assert nearly(
      served["of_classes"](seed=pair, labels=labels)["images"].numpy(),
      dataset_lib.to_uint8(expected.numpy()))
  assert nearly(
      served["serving_default"](seed=pair, batch_size=7)["images"].numpy(),
      dataset_lib.to_uint8(generator.images(sampler.coefficients(), 7, 3)))
  with np.load(ddss_tf.sample(run, denoiser, num_images=7, seed=3, label=2,
                              jit_compile=False)) as file:
    assert nearly(file["images"], dataset_lib.to_uint8(
        generator.images(sampler.coefficients(), 7, 3, label=2)))


@pytest.mark.slow
def test_bad_requests(parts, searched, tmp_path):
  run, _ = searched
  with pytest.raises(UserError, match="one of the 4 classes.*'classes'.*: 4"):
    ddss_tf.sample(run, parts["denoiser"], label=4)
  with pytest.raises(UserError, match="guidance_scale 1.5. Received.*None"):
    ddss_tf.sample(run, make(null_label=NULL))
  with pytest.raises(UserError, match="'elbo' needs an unconditional"):
    ddss_tf.search(
        run_dir=str(tmp_path), **parts, num_search_steps=1, batch_size=4,
        objective="elbo", sampler=functools.partial(
            families.make_sampler, family="ggdm", num_steps=2, init="ddpm"))

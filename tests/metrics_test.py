"""Tests of the loss and the metrics against independent formulas."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import tensorflow as tf

from ddss_tf import metrics
from ddss_tf.features import reference
from ddss_tf.objectives import distances
from ddss_tf.runs import records


@pytest.fixture(scope="module")
def sets():
  rng = np.random.default_rng(0)
  real = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6))
  generated = 0.3 + rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
  return real.astype(np.float32), generated.astype(np.float32)


def test_linear_kid_against_the_double_sum(sets):
  real, generated = sets
  real, generated = real[:40].astype(float), generated[:30].astype(float)
  fake_fake = np.mean([a @ b for i, a in enumerate(generated)
                       for j, b in enumerate(generated) if i != j])
  fake_real = np.mean([a @ b for a in generated for b in real])
  mean = real.mean(0)
  np.testing.assert_allclose(
      distances.kid_linear(generated, mean.astype(np.float32)),
      fake_fake - 2 * fake_real + mean @ mean, rtol=1e-4)


def test_linear_kid_is_unbiased_and_goes_below_zero():
  rng = np.random.default_rng(1)
  offset = 0.2
  sets = (offset + rng.normal(size=(4000, 8, 3))).astype(np.float32)
  values = tf.map_fn(
      tf.function(lambda each: distances.kid_linear(each, tf.zeros(3))),
      sets).numpy()
  # |E f - m|^2 = 3 offset^2; its standard error here is about 0.005.
  np.testing.assert_allclose(np.mean(values), 3 * offset**2, atol=0.02)
  assert min(values) < 0


def test_linear_kid_gradient_in_graph_mode(sets):
  _, generated = sets
  mean = generated[:50].mean(0) + 1
  features = tf.constant(generated[:20])

  @tf.function
  def gradient(features):
    with tf.GradientTape() as tape:
      tape.watch(features)
      loss = distances.kid_linear(features, mean)
    return tape.gradient(loss, features)

  total = generated[:20].sum(0)
  n = 20
  expected = 2 * (total - generated[:20]) / (n * (n - 1)) - 2 * mean / n
  np.testing.assert_allclose(gradient(features), expected, atol=1e-5)


def test_fid_against_scipy(sets):
  real, generated = (s.astype(np.float64) for s in sets)
  a, b = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
  root = scipy.linalg.sqrtm(a @ b).real
  expected = (np.sum((real.mean(0) - generated.mean(0)) ** 2)
              + np.trace(a + b - 2 * root))
  np.testing.assert_allclose(metrics.fid(*sets), expected, rtol=1e-3)
  np.testing.assert_allclose(metrics.fid(sets[0], sets[0]), 0, atol=1e-2)


def cubic_kid(real, generated):
  dim = real.shape[1]

  def kernel(a, b):
    return (a @ b.T / dim + 1) ** 3

  def off_diagonal(k):
    return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

  return (off_diagonal(kernel(real, real))
          + off_diagonal(kernel(generated, generated))
          - 2 * kernel(real, generated).mean())


def dealt(*sets):
  """Real and generated features in the order in which blocks are made."""
  return [x[np.random.default_rng(seed).permutation(len(x))]
          for seed, x in enumerate(sets)]


def test_kid_against_numpy(sets):
  real, generated = (s.astype(np.float64)[:200] for s in sets)
  value, error = metrics.kid(real, generated)
  # Two blocks of 100.
  real, generated = dealt(real, generated)
  blocks = [cubic_kid(real[i:i + 100], generated[i:i + 100]) for i in (0, 100)]
  np.testing.assert_allclose(value, np.mean(blocks), rtol=1e-3)
  np.testing.assert_allclose(
      error, np.std(blocks, ddof=1) / np.sqrt(2), rtol=1e-3)


def test_kid_of_few_samples_against_many(sets):
  # 300 real, 5 generated: two blocks, of 150 and 2 or 3.
  real, generated = dealt(
      sets[0].astype(np.float64), sets[1][:5].astype(np.float64))
  blocks = [cubic_kid(real[:150], generated[:2]),
            cubic_kid(real[150:], generated[2:])]
  value, error = metrics.kid(*[sets[0], sets[1][:5]], block_size=100)
  np.testing.assert_allclose(value, np.mean(blocks), rtol=1e-3)
  np.testing.assert_allclose(
      error, np.std(blocks, ddof=1) / np.sqrt(2), rtol=1e-3)


def test_kid_of_images_class_by_class():
  """Ten far classes in order: no block may hold one class only."""
  rng = np.random.default_rng(0)
  centres = 5 * rng.normal(size=(10, 4))
  real = np.repeat(centres, 200, axis=0) + rng.normal(size=(2000, 4))
  generated = centres[rng.integers(10, size=2000)] + rng.normal(size=(2000, 4))
  kid, error = metrics.kid(real, generated, block_size=200)
  assert abs(kid) < 4 * error
  apart = real[:1000], real[1000:]
  assert metrics.kid(*apart, block_size=200)[0] > 20 * error


def test_kid_needs_samples_for_an_error():
  with pytest.raises(ValueError, match="at least 4.*Received: 3"):
    metrics.kid(np.zeros((10, 2)), np.zeros((3, 2)))


def test_inception_score_against_numpy():
  logits = np.random.default_rng(0).normal(size=(100, 5)) * 3
  p = scipy.special.softmax(logits, axis=1)
  divergence = np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1)
  np.testing.assert_allclose(
      metrics.inception_score(logits)[0], np.exp(divergence.mean()), rtol=1e-4)


def test_inception_score_of_splits():
  logits = np.random.default_rng(0).normal(size=(23, 5)) * 3
  parts = [logits[:8], logits[8:16], logits[16:]]  # As equal as can be.
  scores = [metrics.inception_score(part)[0] for part in parts]
  mean, std = metrics.inception_score(logits, splits=3)
  np.testing.assert_allclose([mean, std], [np.mean(scores), np.std(scores)],
                             rtol=1e-6)
  assert std > 0 and metrics.inception_score(logits)[1] == 0
  for splits in (0, 24):
    with pytest.raises(ValueError, match=f"from 1 to the 23.*: {splits}"):
      metrics.inception_score(logits, splits=splits)


@pytest.mark.parametrize("count", [2, 4095, 4096, 4097, 9000])
def test_moments_in_blocks_are_those_of_all_rows(count):
  rng = np.random.default_rng(count)
  # Far from 0, where sums of squares in float32 would lose the spread.
  x = (100 + rng.normal(size=(count, 3)) @ rng.normal(size=(3, 3))).astype(
      np.float32)
  mean, covariance = metrics.moments(x)
  np.testing.assert_allclose(mean, x.astype(float).mean(0), rtol=1e-12)
  np.testing.assert_allclose(
      covariance, np.cov(x.astype(float), rowvar=False), rtol=1e-9, atol=1e-9)


def test_moments_of_one_row_are_refused():
  with pytest.raises(ValueError, match="at least 2 rows. Received: 1"):
    metrics.moments(np.zeros((1, 3)))


def test_fid_is_tf_gans(sets):
  theirs = metrics._tfgan().frechet_classifier_distance_from_activations(
      *map(tf.constant, sets))
  np.testing.assert_allclose(metrics.fid(*sets), theirs, rtol=1e-5)
  assert metrics.fid(*map(metrics.moments, sets)) == metrics.fid(*sets)


def test_an_fid_of_few_samples_says_so():
  labels = {50_000: "FID", 60_000: "FID", 49_999: "FID-49999",
            10_000: "FID-10k", 500: "FID-500"}
  assert labels == {n: records.fid_label(n) for n in labels}


def test_fids_of_held_out_networks_by_name():
  networks = [{"name": name} for name in ("a", "b", "a")]
  record = lambda *values: {
      "fid_heldout": list(values), "features_heldout": networks}
  assert records.heldout_fids(record(1.0, 2.0, 3.0)) == {
      "held-out a": 1.0, "held-out b": 2.0, "held-out a (2)": 3.0}
  assert records.heldout_fids(
      {"fid_heldout": 4.0, "features_heldout": networks[0]}) == {"held-out": 4}
  assert records.heldout_fids(
      {"fid_heldout": None, "features_heldout": None}) == {}
  for values in ((1.0, 2.0), (1.0, 2.0, 3.0, 4.0)):
    with pytest.raises(ValueError):
      records.heldout_fids(record(*values))


@pytest.mark.slow
def test_metrics_tell_shifted_and_collapsed_from_equal():
  rng = np.random.default_rng(3)
  real = rng.normal(size=(400, 4))
  # The same moments but for one thing: FID is exactly what that is.
  spread = np.trace(np.cov(real, rowvar=False))
  mean = real.mean(0)
  for generated, fid in (
      (rng.permutation(real), 0.0), (real + 1, 4.0),
      (3 * (real - mean) + mean, 4 * spread),
      (np.repeat(mean[None], 400, axis=0), spread)):
    np.testing.assert_allclose(
        metrics.fid(real, generated), fid, rtol=1e-4, atol=1e-4)
  # The cubic kernel's expectations over Gaussians of 4 dimensions, by hand:
  # 1.75 for two of mean 0, 12.875 for two of mean (1, 1, 1, 1), 2.5 for one of
  # either, and 1 for one of mean 0 and the constant 0.
  equal, other = rng.normal(size=(2, 4000, 4)).astype(np.float32)
  for generated, kid in ((other, 0.0), (other + 1, 1.75 + 12.875 - 2 * 2.5),
                         (np.zeros_like(other), 1.75 + 1 - 2 * 1)):
    value, error = metrics.kid(equal, generated)
    assert abs(value - kid) < 4 * error and error < 0.1 * max(kid, 0.1)
  equal = rng.normal(size=(400, 4))
  shifted = equal + 1
  # The linear kernel sees means only.
  spread = 3 * (equal - equal.mean(0)) + mean
  mean = tf.constant(mean, tf.float32)
  # (An unbiased estimate of 0: minus the variance over N, on average 0.)
  distance = distances.kid_linear(spread.astype(np.float32), mean)
  assert abs(float(distance)) < 0.2
  assert float(distances.kid_linear(shifted.astype(np.float32), mean)) > 3


@pytest.mark.parametrize("rows", [0, 7, 9])
def test_other_numbers_of_samples_than_asked_for(rows):
  batches = ((np.ones([size, 3]),) for size in (4, rows - 4) if size > 0)
  with pytest.raises(ValueError, match=f"must be 8 rows. Received: {rows or 4}"):
    reference.collect(batches, 8)


def test_metrics_of_a_constant_image(sets):
  """One image, again and again: all its figures are known."""
  real, _ = sets
  image = np.full((50, 6), 0.7, np.float32)
  spread = np.sum((real.mean(0) - image[0]) ** 2) + np.trace(
      np.cov(real, rowvar=False))
  np.testing.assert_allclose(metrics.fid(real, image), spread, rtol=1e-4)
  np.testing.assert_allclose(metrics.fid(image, image), 0.0, atol=1e-5)
  kid, error = metrics.kid(image, image)
  np.testing.assert_allclose([kid, error], 0.0, atol=1e-6)
  # The cubic kernel's mean over pairs, of which two are between constants.
  kernel = lambda a, b: (a @ b.T / 6 + 1) ** 3
  among = kernel(real.astype(float), real.astype(float))
  count = len(real)
  expected = ((among.sum() - np.trace(among)) / (count * (count - 1))
              + kernel(image[:1], image[:1])[0, 0]
              - 2 * kernel(real.astype(float), image[:1]).mean())
  # In blocks: the estimate of the same number from other pairs.
  kid, error = metrics.kid(real, image)
  assert abs(kid - expected) < 4 * max(error, 0.05 * expected)
  score, deviation = metrics.inception_score(image, splits=5)
  np.testing.assert_allclose([score, deviation], [1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("name", ["kid_cubic", "kid_rbf"])
def test_kernel_kid_loss_against_the_double_sum(sets, name):
  real, generated = (part[:40].astype(float) for part in sets)
  if name == "kid_cubic":
    kernel = lambda a, b: (a @ b / 6 + 1) ** 3
  else:
    median = np.median([np.linalg.norm(a - b) for i, a in enumerate(real)
                        for b in real[:i]])
    kernel = lambda a, b: np.mean(
        [np.exp(-np.sum((a - b) ** 2) / (2 * (scale * median) ** 2))
         for scale in (0.5, 1, 2)])
  pairs = lambda x: np.mean([kernel(a, b) for i, a in enumerate(x)
                             for j, b in enumerate(x) if i != j])
  expected = (pairs(real) + pairs(generated)
              - 2 * np.mean([[kernel(a, b) for b in real] for a in generated]))
  objective = distances.make_distance(name, real.astype(np.float32))
  np.testing.assert_allclose(
      objective(generated.astype(np.float32)), expected, rtol=1e-4, atol=1e-6)


def test_cubic_kid_loss_is_the_metric_of_tfgan(sets):
  # TF-GAN's estimate on one block of equal sets, which has no error.
  real, generated = sets[0][:200], sets[1]
  value, _ = metrics.kid(real, generated, block_size=200)
  real, generated = dealt(real, generated)
  parts = [float(distances.make_distance("kid_cubic", real[i:i + 100])(
      generated[i:i + 100])) for i in (0, 100)]
  np.testing.assert_allclose(np.mean(parts), value, rtol=1e-3)


def smoothed_fid(real, generated):
  """FID of features with white noise, as the loss has it; by SciPy."""
  covariances = [np.cov(x.astype(float), rowvar=False) for x in
                 (real, generated)]
  noise = distances.SMOOTHING * np.linalg.eigvalsh(covariances[0]).max()
  c, s = (x + noise * np.eye(len(x)) for x in covariances)
  return np.sum((real.mean(0) - generated.mean(0)) ** 2) + np.trace(
      c + s - 2 * scipy.linalg.sqrtm(c @ s).real)


def test_frechet_loss_is_the_smoothed_metric(sets):
  real, generated = sets
  objective = distances.make_distance("frechet", real)
  np.testing.assert_allclose(
      objective(generated), smoothed_fid(real, generated), rtol=2e-3)
  np.testing.assert_allclose(
      smoothed_fid(real, generated), metrics.fid(real, generated), rtol=0.02)


@pytest.mark.parametrize("name", ["frechet", "frechet_axes"])
def test_a_frechet_loss_is_least_at_the_real_spread(name):
  """Along every axis, however small its variance is."""
  rng = np.random.default_rng(0)
  count, deviations = 2000, 10.0 ** np.array([0, -0.5, -1, -1.5, -2, -2.5])
  unit = rng.normal(size=(count, len(deviations)))
  unit -= unit.mean(0)
  unit @= np.linalg.inv(np.linalg.cholesky(np.cov(unit.T))).T
  real = (unit * deviations).astype(np.float32)
  loss = distances.make_distance(name, real)
  scales = tf.ones([len(deviations)])
  with tf.GradientTape() as tape:
    tape.watch(scales)
    value = loss(real * scales)
  np.testing.assert_allclose(value, 0.0, atol=2e-3)
  # Shares of each axis' own variance, which is what its collapse would cost.
  gradient = tape.gradient(value, scales).numpy() / (2 * deviations**2)
  assert np.all(np.abs(gradient) < 0.02), gradient
  for axis in range(len(deviations)):
    worse = [float(loss(real * np.where(np.arange(6) == axis, factor, 1.0)
                        .astype(np.float32))) for factor in (0.0, 0.5, 1.5)]
    # With the white noise the last axis matters 1e-8: below float32's rounding.
    rounding = 1e-6 if axis == 5 and name == "frechet" else 0.0
    assert min(worse) > float(value) - rounding, (axis, worse, value)


def test_frechet_loss_of_dependent_features(sets):
  # One feature twice, and one that is constant: rounding may leave negative
  # eigenvalues of a covariance without full rank.
  real, generated = (
      np.concatenate([x, x[:, :1], np.ones_like(x[:, :1])], axis=1)
      for x in sets)
  features = tf.constant(generated)
  with tf.GradientTape() as tape:
    tape.watch(features)
    value = distances.make_distance("frechet", real)(features)
  gradient = tape.gradient(value, features)
  np.testing.assert_allclose(
      value, smoothed_fid(real, generated), rtol=5e-3)
  assert np.all(np.isfinite(gradient))


def test_frechet_loss_of_what_is_not_finite(sets):
  real, generated = sets
  loss = distances.make_distance("frechet", real)
  for fault in (np.nan, np.inf):
    broken = generated.copy()
    broken[3, 1] = fault
    assert np.isnan(tf.function(loss)(tf.constant(broken)))


def test_frechet_along_axes(sets):
  real, generated = sets
  objective = distances.make_distance("frechet_axes", real)
  # The distances of the marginals along the real principal axes; the mean's
  # part is the unbiased one.
  _, axes = np.linalg.eigh(np.cov(real.astype(float).T))
  spread = np.sum((np.std(generated.astype(float) @ axes, axis=0, ddof=1)
                   - np.std(real.astype(float) @ axes, axis=0, ddof=1)) ** 2)
  mean = distances.kid_linear(generated, real.mean(0))
  np.testing.assert_allclose(objective(generated), mean + spread, rtol=1e-4)
  # A lower bound of the full distance, and equal to it on common axes.
  assert float(objective(generated)) < metrics.fid(real, generated)
  stretched = real.mean(0) + 1.5 * (real - real.mean(0))
  np.testing.assert_allclose(
      objective(stretched), metrics.fid(real, stretched), rtol=0.05)


def correlated(count, seed=0):
  """Features and a control on the same noise; the control is off by 0.2."""
  rng = np.random.default_rng(seed)
  common = rng.normal(size=(count, 6))
  features = 0.3 + common + 0.1 * rng.normal(size=(count, 6))
  return features.astype(np.float32), (0.5 + 1.1 * common).astype(np.float32)


def known_moments(control, real_mean):
  own = control.astype(float) - real_mean
  return [tf.constant(v, tf.float32)
          for v in (own.mean(0), own.T @ own / len(own))]


@pytest.mark.quick("kid_linear", "frechet_axes")
@pytest.mark.parametrize("name", distances.MOMENTS)
def test_a_control_variate_sharpens_a_distance(sets, name):
  real = sets[0]
  objective = distances.make_distance(name, real)
  features, control = correlated(200_000)
  truth = float(objective(features))
  moments = known_moments(control, real.mean(0))
  plain, sharp = [], []
  for i in range(0, 20_000, 100):
    part = features[i:i + 100]
    plain.append(float(objective(part)))
    sharp.append(float(objective(
        part, distances.Control(tf.constant(control[i:i + 100]), *moments))))
  # f - c = -0.1 common + 0.1 noise: a fiftieth of the variance of f.
  assert np.std(sharp) < 0.3 * np.std(plain)
  error = np.std(sharp) / len(sharp) ** 0.5
  np.testing.assert_allclose(
      np.mean(sharp), truth, atol=5 * error + 2e-3 * truth)


@pytest.mark.parametrize("name", distances.MOMENTS)
def test_a_control_variate_corrects_moments(sets, name):
  # Against the distance of the corrected moments, by NumPy.
  real = sets[0]
  features, control = correlated(150, seed=1)
  many = correlated(5000, seed=2)[1]
  m = real.mean(0).astype(float)
  f, c, all_c = (x.astype(float) - m for x in (features, control, many))
  mean = (f - c).mean(0) + all_c.mean(0)
  noise = np.cov((f - c).T) / len(f)
  covariance = (f.T @ f - c.T @ c) / len(f) + all_c.T @ all_c / len(all_c) - (
      np.outer(mean, mean) - noise)
  square = mean @ mean
  if name == "kid_linear":
    expected = square - np.trace(noise)
  elif name == "frechet_axes":
    values, axes = np.linalg.eigh(np.cov(real.astype(float).T))
    deviations = np.sqrt(np.diag(axes.T @ covariance @ axes))
    expected = square - np.trace(noise) + np.sum(
        (deviations - np.sqrt(values)) ** 2)
  else:
    real_covariance = np.cov(real.astype(float).T)
    noise = distances.SMOOTHING * np.linalg.eigvalsh(real_covariance).max()
    expected = metrics.fid(*(
        metrics.Moments(m, c + noise * np.eye(6)) for m, c in (
            (mean, covariance), (np.zeros(6), real_covariance))))
  got = distances.make_distance(name, real)(features, distances.Control(
      tf.constant(control), *known_moments(many, real.mean(0))))
  np.testing.assert_allclose(got, expected, rtol=2e-3)


@pytest.mark.parametrize("name", distances.DISTANCES)
def test_distances_agree_on_what_is_worse(sets, name):
  real, _ = sets
  objective = distances.make_distance(name, real)
  rng = np.random.default_rng(0)
  shift = rng.normal(size=6).astype(np.float32)
  same, near, far = (
      float(objective(real[:150] + size * shift)) for size in (0, 1, 3))
  assert same < near < far
  # Finite gradients, also of a collapsed population.
  for features in (real[:50], np.repeat(real[:1], 50, axis=0)):
    features = tf.constant(features)
    with tf.GradientTape() as tape:
      tape.watch(features)
      loss = objective(features)
    gradient = tape.gradient(loss, features)
    assert np.all(np.isfinite(gradient)) and np.any(gradient)

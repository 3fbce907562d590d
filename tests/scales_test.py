"""Metrics, objectives and searches of features of any scale and any mean.

The oracles are in float64, or of more digits, and share nothing with the code:
singular values of the features themselves, sums over pairs.
"""

import functools
import itertools
import json

import keras
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import tensorflow as tf

import ddss_tf
from ddss_tf import metrics
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.features import load as features_lib
from ddss_tf.features import network as network_lib
from ddss_tf.objectives import distances
from ddss_tf.runs import records
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.errors import UserError
import gaussian_parts

SCALES = (1e-10, 1e-4, 1e-2, 1.0, 1e2, 1e4)


def exact_fid(a, b):
  """By the singular values of A B', of centred features: no covariances."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  means = a.mean(0) - b.mean(0)
  a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
  spread = np.sum(a**2) + np.sum(b**2)
  # Their triangles have the same singular values, and fewer rows.
  a, b = (np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x
          for x in (a, b))
  return np.sum(means**2) + spread - 2 * np.sum(
      np.linalg.svd(a @ b.T, compute_uv=False))


def pair_of(kind, width=48, count=300):
  """Two sets of features, float32 [N, D], of a kind."""
  rng = np.random.default_rng(7)
  a, b = rng.normal(size=(2, count, width))
  b = 1.1 * b + 0.05
  if kind == "white":
    pass
  elif kind.startswith("power"):
    spectrum = np.arange(1, width + 1.0) ** (-float(kind[5:]) / 2)
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    a, b = (x * spectrum @ turn for x in (a, b))
  elif kind in ("axes", "other axes"):
    scales = 10 ** rng.uniform(-4, 4, width)
    a, b = a * scales, b * (scales if kind == "axes" else scales[::-1])
  elif kind == "few":
    a, b = a[:20], b[:30]
  elif kind == "few of one":
    a = a[:10]
  elif kind == "constant":
    a[:, :5], b[:, :5] = 3.0, 3.0
    a[:, 5] = -1.0
  elif kind == "twice":
    a[:, 10:20], b[:, 10:20] = a[:, :10], b[:, :10]
    a[:, 20] = a[:, 21]
  elif kind == "flat":
    plane = rng.normal(size=(6, width))
    a, b = a[:, :6] @ plane, b[:, :6] @ plane
  elif kind == "far":
    a, b = a + 1e4, b + 1e4
  elif kind == "all the same":
    a[:] = a[0]
  return a.astype(np.float32), b.astype(np.float32)


KINDS = ("white", "power1.5", "power4", "power8", "axes", "other axes", "few",
         "few of one", "constant", "twice", "flat", "far", "all the same")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_fid_is_right(kind, scale):
  a, b = (x * np.float32(scale) for x in pair_of(kind))
  np.testing.assert_allclose(metrics.fid(a, b), exact_fid(a, b), rtol=1e-7)
  assert metrics.fid(a, b) == pytest.approx(metrics.fid(b, a), rel=1e-9)
  for x in (a, b):
    own = metrics.fid(x, x)
    assert 0 <= own <= 1e-12 * np.sum(np.var(x, axis=0, dtype=np.float64))
  # Another order of samples and of axes is no other set.
  axes = np.random.default_rng(0).permutation(a.shape[1])
  np.testing.assert_allclose(
      metrics.fid(a[::-1][:, axes], b[:, axes]), metrics.fid(a, b), rtol=1e-7)


def test_fid_is_tf_gans_where_that_is_right():
  for kind, scale in itertools.product(("white", "power1.5"), (1.0, 100.0)):
    a, b = (metrics.moments(x * scale) for x in pair_of(kind))
    root = float(metrics._tfgan().trace_sqrt_product(
        tf.constant(a.covariance), tf.constant(b.covariance)))
    theirs = np.sum((a.mean - b.mean) ** 2) + np.trace(
        a.covariance + b.covariance) - 2 * root
    np.testing.assert_allclose(metrics.fid(a, b), theirs, rtol=1e-9)
  # And this is where it is not.
  a, b = (metrics.moments(x * 1e-4) for x in pair_of("white"))
  wrong = float(metrics._tfgan().trace_sqrt_product(
      tf.constant(a.covariance), tf.constant(b.covariance)))
  assert metrics._trace_of_root(a.covariance, b.covariance) > 2 * wrong


def pairs_mean(kernel, a, b=None):
  """The mean over pairs, of different ones if they are of one set."""
  values = kernel(a, a if b is None else b)
  if b is not None:
    return values.mean()
  return (values.sum() - np.trace(values)) / (len(a) * (len(a) - 1))


def cubic(a, b):
  return (a @ b.T / a.shape[1] + np.longdouble(1)) ** 3


def distance(kernel, a, b):
  a, b = a.astype(np.longdouble), b.astype(np.longdouble)
  return float(pairs_mean(kernel, a) + pairs_mean(kernel, b)
               - 2 * pairs_mean(kernel, a, b))


def shifted_pair(mean, scale, width=16):
  rng = np.random.default_rng(3)
  a = mean + scale * rng.normal(size=(400, width))
  b = mean + scale * (1.2 * rng.normal(size=(100, width)) + 0.3)
  return a.astype(np.float32), b.astype(np.float32)


MEANS_AND_SCALES = [(mean, scale) for mean in (0.0, 10.0, 1e3, 1e4)
                    for scale in (1e-3, 1e-2, 1.0, 1e2, 1e4)
                    if scale > 1e-6 * mean]  # Of which float32 has digits.


@pytest.mark.parametrize("mean,scale", MEANS_AND_SCALES)
def test_kid_is_right(mean, scale):
  real, generated = shifted_pair(mean, scale)
  value, error = metrics.kid(real, generated)
  real, generated = (
      x[np.random.default_rng(seed).permutation(len(x))]
      for seed, x in enumerate((real, generated)))
  blocks = [distance(cubic, real[:200], generated[:50]),
            distance(cubic, real[200:], generated[50:])]
  # Cubes of 1e18 have no more digits, in float64.
  size = (mean**2 + scale**2 + 1) ** 3
  rounding = 1e-15 * size
  np.testing.assert_allclose(value, np.mean(blocks), rtol=1e-6, atol=rounding)
  np.testing.assert_allclose(error, np.std(blocks, ddof=1) / np.sqrt(2),
                             rtol=1e-5, atol=rounding)


def expected_distance(name, real, generated):
  """A distance of `distances.DISTANCES`, in float64."""
  real, x = real.astype(np.float64), generated.astype(np.float64)
  if name == "kid_cubic":
    return distance(cubic, real, x)
  if name == "kid_rbf":
    width = np.median(scipy.spatial.distance.pdist(real))
    return distance(lambda a, b: sum(
        np.exp(-scipy.spatial.distance.cdist(a, b, "sqeuclidean")
               / (2 * (scale * width) ** 2)) for scale in (0.5, 1, 2)) / 3,
                    real, x)
  mean = x.mean(0) - real.mean(0)
  known, own = np.cov(real.T), np.cov(x.T)
  means = np.sum(mean**2) - np.trace(own) / len(x)
  if name == "kid_linear":
    return means
  values, axes = np.linalg.eigh(known)
  if name == "frechet_axes":
    along = np.diag(axes.T @ own @ axes)
    return means + np.sum((np.sqrt(along) - np.sqrt(values)) ** 2)
  noise = distances.SMOOTHING * values.max() * np.eye(len(mean))
  return metrics.fid(metrics.Moments(mean, own + noise),
                     metrics.Moments(0 * mean, known + noise))


@pytest.mark.parametrize("name", distances.DISTANCES)
@pytest.mark.parametrize("mean,scale", [*MEANS_AND_SCALES, (0.0, 1e-4)])
def test_an_objective_is_right(name, mean, scale):
  real, generated = shifted_pair(mean, scale)
  features = tf.constant(generated)
  with tf.GradientTape() as tape:
    tape.watch(features)
    value = distances.make_distance(name, real)(features)
  expected = expected_distance(name, real, generated)
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  gradient = tape.gradient(value, features).numpy()
  assert np.all(np.isfinite(gradient))
  # Along the way to the real mean, against a difference in float64.
  way = real.mean(0, dtype=np.float64) - generated.mean(0, dtype=np.float64)
  slope = np.sum(gradient.astype(np.float64) * way)
  ends = [expected_distance(name, real, generated + step * way)
          for step in (-1e-3, 1e-3)]
  np.testing.assert_allclose(
      slope, (ends[1] - ends[0]) / 2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", distances.MOMENTS)
def test_a_control_variate_of_features_with_a_large_mean(name):
  """All counted from somewhere else is the same distance."""
  rng = np.random.default_rng(0)
  common = rng.normal(size=(60, 6))
  features, control = (
      (0.3 + common + 0.1 * rng.normal(size=(60, 6))).astype(np.float32),
      (0.5 + 1.1 * common).astype(np.float32))
  real = rng.normal(size=(300, 6)).astype(np.float32)
  mean, second = (tf.constant(x, tf.float32) for x in (
      np.full(6, 0.5), 1.21 * np.eye(6) + 0.25))

  def value(offset):
    return float(distances.make_distance(name, real + offset)(
        tf.constant(features + offset), distances.Control(
            tf.constant(control + offset), mean, second)))

  # 4096 has 12 bits, so that the sums keep 11 of those behind the point.
  np.testing.assert_allclose(value(np.float32(4096)), value(np.float32(0)),
                             rtol=5e-3)


def test_what_was_right_is_unchanged_to_the_last_bit(digits):
  """Features of the digits are counted from nothing, as they ever were."""
  network = features_lib.load_features("digits_cnn")
  real = network(digits.images[:200])["pool"].numpy()
  for name in distances.DISTANCES:
    assert distances._centre(name, real) is None


@pytest.mark.parametrize("logits,expected", [
    # Sure of classes that are equally frequent: as many as there are.
    (1e3 * np.eye(4), 4.0), (1e30 * np.eye(4), 4.0),
    (np.where(np.eye(4), 0.0, -np.inf), 4.0),
    (np.where(np.eye(4), 0.0, -3e38), 4.0),
    (1e5 + np.log(np.eye(4) + 1e-300), 4.0),
    # All the same: one.
    (np.tile([1e4, 0.0, -1e4], (8, 1)), 1.0),
    (np.zeros((5, 3)), 1.0), (np.full((5, 3), -1e38), 1.0),
    # Half of one, half of another that the third never is.
    (np.array([[800.0, 0, -800], [0, 800, -800]]), 2.0)])
def test_inception_score_of_extreme_logits(logits, expected):
  with np.errstate(over="ignore"):
    for dtype in (np.float64, np.float32):
      score, deviation = metrics.inception_score(logits.astype(dtype))
      np.testing.assert_allclose(score, expected, rtol=1e-6)
      assert deviation == 0


def test_inception_score_against_scipy_at_any_scale():
  rng = np.random.default_rng(0)
  for scale in (1e-3, 1.0, 30.0, 1e3, 1e6):
    logits = scale * rng.normal(size=(200, 7))
    p = scipy.special.softmax(logits, axis=1)
    expected = np.exp(np.mean(np.sum(
        scipy.special.rel_entr(p, p.mean(0)), axis=1)))
    np.testing.assert_allclose(
        metrics.inception_score(logits)[0], expected, rtol=1e-9)


def test_what_is_not_finite_gives_nan():
  a, b = pair_of("white")
  for fault in (np.nan, np.inf, -np.inf):
    broken = b.copy()
    broken[3, 4] = fault
    assert np.isnan(metrics.fid(a, broken)) and np.isnan(metrics.fid(broken, a))
    assert np.all(np.isnan(metrics.kid(a, broken)))
    if fault != -np.inf:  # Which is a class that cannot be.
      assert np.isnan(metrics.inception_score(broken)[0])


@pytest.mark.parametrize("value,form,shown", [
    (None, ".2f", "-"), (0.0, ".2f", "0.00"), (1.234, ".2f", "1.23"),
    (1.98e-6, ".2f", "1.98e-06"), (-4e-7, ".4f", "-4e-07"), (3, "d", "3"),
    (1e9, ".2f", "1000000000.00")])
def test_a_figure_in_words(value, form, shown):
  assert records.text(value, form) == shown


# --- A search ---


def parts_of_scale(scale, offset=0.0):
  """The Gaussian parts, with features in another unit."""
  parts = gaussian_parts.make()
  model = parts["features"].model
  pool, logits = model.outputs
  pool = keras.layers.Rescaling(scale, offset, name="scaled")(pool)
  return {**parts, "features": network_lib.FeatureNetwork(
      keras.Model(model.inputs, [pool, logits]), "scaled", "scaled")}


def searched(run, parts, objective, steps=4, **options):
  sampler = ddss_tf.search(
      run_dir=str(run), **parts, sampler=functools.partial(
          ddss_tf.make_sampler, family="ggdm+pred+time", num_steps=2,
          init="ddpm"), objective=objective, num_search_steps=steps,
      batch_size=32, pool_samples=64, validation_samples=64, validate_every=2,
      checkpoint_every=4, log_every=4, jit_compile=False, **options)
  found = card.read(str(run / run_dir_lib.SAMPLER))
  return sampler.coefficients().numpy(), found.search


@pytest.mark.slow
@pytest.mark.parametrize("objective", [
    "kid_linear", pytest.param("frechet", marks=pytest.mark.slow)])
def test_a_search_does_not_know_the_unit_of_features(objective, tmp_path):
  """By powers of two even the rounding is the same."""
  coefficients, found = searched(
      tmp_path / "one", parts_of_scale(1.0), objective, rate_of_distance=0.1)
  # The start's distance, in deviations, limits it.
  assert found["skipped_steps"] == 0 and found["rate"] < 0.1
  for power in (-13, 13):  # 1e-4 and 1e4, about.
    scaled, other = searched(
        tmp_path / str(power), parts_of_scale(2.0**power), objective,
        rate_of_distance=0.1)
    np.testing.assert_allclose(other["rate"], found["rate"], rtol=1e-6)
    assert other["best_step"] == found["best_step"]
    np.testing.assert_allclose(
        other["validation"], 4.0**power * found["validation"], rtol=1e-3)
    for name, value in coefficients.arrays().items():
      np.testing.assert_allclose(
          scaled.arrays()[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("scale,offset", [
    (1e4, 0.0), pytest.param(1e-4, 0.0, marks=pytest.mark.slow),
    pytest.param(1.0, 1e3, marks=pytest.mark.slow)])
def test_a_search_with_the_cubic_kernel_takes_its_steps(
    scale, offset, tmp_path):
  _, found = searched(tmp_path / "run", parts_of_scale(scale, offset),
                      "kid_cubic", steps=6)
  assert found["skipped_steps"] == 0 and found["best_step"] > 0


@pytest.mark.parametrize("images,words", [
    (np.full((1, 4, 4, 1), 0.5), "at least 2 images.*Received: 1"),
    (np.full((30, 4, 4, 1), 0.5), "must differ.*30 images with the same")])
def test_a_data_set_without_a_spread(images, words, tmp_path):
  parts = {**gaussian_parts.make(),
           "dataset": dataset_lib.as_dataset(images.astype(np.float32))}
  with pytest.raises(UserError, match=words) as refused:
    searched(tmp_path, parts, "kid_linear")
  assert "\n" not in str(refused.value).split("\n  In call")[0]
  assert not (tmp_path / run_dir_lib.SAMPLER).exists()


def test_equal_images_are_evaluated(tmp_path):
  """Their features have no spread: the FID is the mean's and that of others."""
  parts = {**gaussian_parts.make(), "dataset": dataset_lib.as_dataset(
      np.full((10, 4, 4, 1), 0.5, np.float32))}
  (record,) = ddss_tf.evaluate(
      str(tmp_path), **parts, num_samples=8, jit_compile=False, baselines=[
          functools.partial(ddss_tf.make_sampler, family="ddim", num_steps=2)])
  assert record["fid"] > 0
  assert None not in record["inception_score_splits"].values()
  with open(tmp_path / "metrics.json", encoding="utf-8") as f:
    assert json.load(f) == [record]

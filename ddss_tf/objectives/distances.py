"""Distances between generated and real features."""

import functools
from typing import Callable, NamedTuple

import numpy as np
import scipy.spatial.distance
import tensorflow as tf

from ddss_tf.errors import UserError

# White noise of the smoothed Frechet distance, as a share of the largest
# variance of the real features along an axis.
SMOOTHING = 1e-3
_LEAST_SMOOTHING = 1e-12  # Where all real features are the same.
# A mean of so many deviations costs float32 more than two of its seven digits.
_LARGE_MEAN = 16.0
# The most real features that a kernel is evaluated against.
_KERNEL_REAL = 5000
_RBF_SCALES = (0.5, 1.0, 2.0)


class Control(NamedTuple):
  """What is known of a control variate: another sampler on the same noise.

  A population has few samples, so its moments are uncertain. Another sampler's
  images from the same noise have nearly the same error, and its moments can be
  measured once over many more samples. So

    E f  ~  mean_i (f_i - c_i) + E c,

  and the same for second moments. The variance is that of f - c instead of f.
  The estimate is unbiased but for the error of E c, which does not change from
  step to step. Our choice; the textbook method of control variates with the
  factor 1.

  Attributes:
    features: float32 [N, D], c_i, of the population's own noise.
    mean: float32 [D], the mean of c - m with the real mean m, of many samples.
    second: float32 [D, D], the mean of (c - m) (c - m)^T of many samples.
  """
  features: tf.Tensor
  mean: tf.Tensor
  second: tf.Tensor


def _about(features, real_mean, control):
  """Own and control features less the real mean, their residuals, the mean."""
  own = tf.cast(features, tf.float32) - real_mean
  if control is None:
    return own, None, own, tf.reduce_mean(own, axis=0)
  other = control.features - real_mean
  residual = own - other
  return own, other, residual, tf.reduce_mean(residual, axis=0) + control.mean


def _squared_mean(residual, mean):
  """Unbiased estimate of the squared norm of the expected mean."""
  count = tf.cast(tf.shape(residual)[0], tf.float32)
  centred = residual - tf.reduce_mean(residual, axis=0)
  return tf.reduce_sum(mean**2) - tf.reduce_sum(centred**2) / (
      count * (count - 1.0))


def kid_linear(features: tf.Tensor, real_mean: tf.Tensor,
               control: Control | None = None) -> tf.Tensor:
  """Unbiased Kernel Inception Distance with the linear kernel, as a loss.

  With k(a, b) = a . b, N generated features f_i and the mean m of the features
  of the whole training set,

    sum_{i != j} f_i . f_j / (N (N - 1)) - 2/N sum_i f_i . m + |m|^2

  (Watson et al. 2022; Binkowski et al. 2018,
  https://arxiv.org/abs/1801.01401). It is an unbiased estimate of
  |E f - m|^2, the squared distance of the mean features, and so sees nothing of
  their spread; it can be negative and is never clamped. Its gradient passes in
  graph mode; that of TF-GAN's own KID does not.

  Args:
    features: float [N, D], N at least 2.
    real_mean: float [D].
    control: a control variate, or None.

  Returns:
    float32 scalar.
  """
  # The distance is a small difference of large numbers: shift by m first.
  _, _, residual, mean = _about(features, real_mean, control)
  return _squared_mean(residual, mean)


def cubic_kernel(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
  """(a . b / D + 1)^3 of all pairs, the kernel of Binkowski et al. [N, M]."""
  width = tf.cast(tf.shape(a)[1], tf.float32)
  return (tf.matmul(a, b, transpose_b=True) / width + 1.0) ** 3


def centred_cubic_kernel(a: tf.Tensor, b: tf.Tensor,
                         centre: np.ndarray) -> tf.Tensor:
  """The cubic kernel less its terms in one argument only, [N, M].

  With m the centre, k the kernel at a + m and b + m,

    k(a + m, b + m) - k(a + m, m) - k(m, b + m) + k(m, m).

  The terms taken away cancel in the distance. With a large mean they are nearly
  the whole kernel, and float32 has no digits for the rest. With
  c = |m|^2 / D + 1, u = a . m / D, v = b . m / D, w = a . b / D and
  r = c + u + v it is

    3 u v (2 c + u + v) + w (3 r^2 + 3 r w + w^2).

  Args:
    a: float32 [N, D], features less the centre.
    b: float32 [M, D], others, less the centre too.
    centre: float32 [D].
  """
  width = len(centre)
  constant = float(np.sum(centre.astype(np.float64) ** 2)) / width + 1.0
  u, v = (tf.linalg.matvec(x, centre) / width for x in (a, b))
  u, v = u[:, None], v[None]
  w = tf.matmul(a, b, transpose_b=True) / width
  r = constant + u + v
  return (3.0 * u * v * (2.0 * constant + u + v)
          + w * (3.0 * r**2 + 3.0 * r * w + w**2))


def rbf_kernel(a: tf.Tensor, b: tf.Tensor, bandwidth: float) -> tf.Tensor:
  """A mixture of Gaussian kernels of all pairs, [N, M].

  The mean of exp(-|a - b|^2 / (2 s^2)) over s = bandwidth times 1/2, 1 and 2;
  the mixture is our choice.
  """
  squares = (tf.reduce_sum(a**2, axis=1)[:, None]
             + tf.reduce_sum(b**2, axis=1)[None]
             - 2.0 * tf.matmul(a, b, transpose_b=True))
  squares = tf.maximum(squares, 0.0) / bandwidth**2
  return tf.add_n([tf.exp(-squares / (2.0 * scale**2))
                   for scale in _RBF_SCALES]) / len(_RBF_SCALES)


def kid(features: tf.Tensor, real: tf.Tensor, kernel,
        real_term: tf.Tensor | float = 0.0) -> tf.Tensor:
  """Unbiased Kernel Inception Distance with any kernel, as a loss.

  The estimate is unbiased for the distance to the given real features. With
  the cubic kernel it sees means, covariances and third moments; with the
  Gaussian one, all moments.

  Args:
    features: float [N, D], N at least 2.
    real: float [R, D].
    kernel: function from [N, D] and [M, D] to [N, M].
    real_term: the mean of k over pairs of real features. No gradient depends
      on it; 0 leaves it out of the value.

  Returns:
    float32 scalar.
  """
  features = tf.cast(features, tf.float32)
  count = tf.cast(tf.shape(features)[0], tf.float32)
  own = kernel(features, features)
  pairs = tf.reduce_sum(own) - tf.linalg.trace(own)
  return (pairs / (count * (count - 1.0)) + real_term
          - 2.0 * tf.reduce_mean(kernel(features, real)))


def mean_of_pairs(kernel, real: tf.Tensor) -> tf.Tensor:
  """The mean of a kernel over pairs of different rows of [R, D]."""
  pairs = kernel(real, real)
  count = tf.cast(tf.shape(real)[0], tf.float32)
  return (tf.reduce_sum(pairs) - tf.linalg.trace(pairs)) / (
      count * (count - 1.0))


def frechet_axes(features: tf.Tensor, real_mean: tf.Tensor, axes: tf.Tensor,
                 deviations: tf.Tensor,
                 control: Control | None = None) -> tf.Tensor:
  """Frechet distance along the principal axes of the real features, as a loss.

    KID with the linear kernel + sum_d (s_d - sigma_d)^2

  with s_d the standard deviation of the population along axis d and sigma_d
  that of the real features. Our choice: the linear kernel sees means only, and
  near its minimum it no longer tells good samplers apart; the full Frechet
  distance estimates D^2 covariances and drowns in their noise. This is the sum
  of the distances of the D marginals, hence a lower bound of the full one and
  equal to it where both covariances have the same axes. The mean's part is
  unbiased; the spread's is biased by about sum_d s_d^2 / (2 N).

  Args:
    features: float [N, D].
    real_mean: float [D].
    axes: float [D, D], the principal axes as columns.
    deviations: float [D], standard deviations of the real features along them.
    control: a control variate, or None.

  Returns:
    float32 scalar.
  """
  own, other, residual, mean = _about(features, real_mean, control)
  count = tf.cast(tf.shape(own)[0], tf.float32)
  squares = tf.matmul(own, axes) ** 2
  if control is not None:
    squares += (tf.reduce_sum(axes * tf.matmul(control.second, axes), axis=0)
                - tf.matmul(other, axes) ** 2)
  along = tf.matmul(residual, axes)
  own_noise = tf.math.reduce_variance(along, axis=0) / (count - 1.0)
  variance = (tf.reduce_mean(squares, axis=0)
              - tf.matmul(mean[None], axes)[0] ** 2 + own_noise)
  # The root has no finite gradient at 0, where a collapsed population is. With
  # a control the estimate of a small variance can be below 0.
  floor = 1e-8 * tf.reduce_max(deviations) ** 2
  variance = tf.maximum(variance, 0.0)
  spread = tf.reduce_sum((tf.sqrt(variance + floor)
                          - tf.sqrt(deviations**2 + floor)) ** 2)
  return _squared_mean(residual, mean) + spread


def frechet(features: tf.Tensor, real_mean: tf.Tensor, root: tf.Tensor,
            smoothing: float, control: Control | None = None) -> tf.Tensor:
  """Frechet distance of Gaussian fits, as a loss (Heusel et al. 2017).

    |f - m|^2 + tr(S + C - 2 (C^1/2 S C^1/2)^1/2)

  with f and S the mean and covariance of the population. It is biased upwards,
  by a term that falls with 1 / N and grows with D, and the bias has a gradient
  of its own. So it needs a population of several times D.

  Our choice: both covariances get `smoothing` I, which makes it the distance of
  features with as much white noise. The reason is that the root of an
  eigenvalue near 0 has an unbounded gradient, which is mostly chance. It stays
  a distance, and is least at S = C.

  Args:
    features: float [N, D].
    real_mean: float [D].
    root: float [D, D], the symmetric root of C + `smoothing` I.
    smoothing: above 0; see `SMOOTHING`.
    control: a control variate, or None.

  Returns:
    float32 scalar.
  """
  own, other, residual, mean = _about(features, real_mean, control)
  count = tf.cast(tf.shape(own)[0], tf.float32)
  second = tf.matmul(own, own, transpose_a=True) / count
  if control is not None:
    second += control.second - tf.matmul(other, other, transpose_a=True) / count
  centred = residual - tf.reduce_mean(residual, axis=0)
  own_noise = tf.matmul(centred, centred, transpose_a=True) / (
      count * (count - 1.0))
  covariance = (second - mean[:, None] * mean + own_noise
                + smoothing * tf.eye(tf.shape(root)[0]))
  product = tf.matmul(root, tf.matmul(covariance, root))
  # Decomposing a matrix that is not finite raises an error. A NaN instead lets
  # the search skip the step.
  finite = tf.reduce_all(tf.math.is_finite(product))
  product = tf.linalg.eigvalsh(tf.where(finite, product, 0.0))
  # With a control the estimated covariance may have negative eigenvalues.
  product = tf.maximum(product, 0.01 * smoothing**2)
  distance = (tf.reduce_sum(mean**2) + tf.linalg.trace(covariance)
              + tf.reduce_sum(root**2) - 2.0 * tf.reduce_sum(tf.sqrt(product)))
  return tf.where(finite, distance, np.nan)


class Distance(NamedTuple):
  """A distance between sets of features, as a search minimises it.

  Attributes:
    make: function of real features, float [R, D]. It returns a function from
      features [N, D] (and a `Control` or None if `moments`) to a float32
      scalar.
    moments: whether it depends on moments only. Then a control variate can make
      it more precise.
    centre: whether `make` also takes the point that features are counted from,
      or None.
  """
  make: Callable
  moments: bool = False
  centre: bool = False


def make_distance(name: str, real: np.ndarray):
  """A distance to real features, of which all that it needs is prepared.

  Args:
    name: one of `DISTANCES`.
    real: float [R, D], features of the whole training set. The cubic and the
      Gaussian kernel are evaluated against 5 000 of them at the most, drawn
      once with seed 0. The Gaussian's bandwidth is the median distance of 1 000
      of these.

  Returns:
    A function from features [N, D], and a `Control` or None if the distance is
    one of `MOMENTS`, to a float32 scalar.

  Raises:
    ValueError: unknown name.
    UserError: there is no bandwidth, because most real features are the same.
  """
  if name not in DISTANCES:
    raise ValueError(f"distance must be one of {', '.join(DISTANCES)}. "
                     f"Received: {name!r}")
  known = DISTANCES[name]
  if not known.centre:
    return known.make(real)
  centre = _centre(name, real)
  if centre is None:
    return known.make(real, None)
  distance = known.make(real - centre, centre)

  def shifted(features, *control):
    features = tf.cast(features, tf.float32) - centre
    # A control's moments are about the real mean already.
    control = [known and known._replace(features=known.features - centre)
               for known in control]
    return distance(features, *control)

  return shifted


def _centre(name: str, real: np.ndarray) -> np.ndarray | None:
  """The origin of features, float32 [D]: their mean, or None for 0.

  It is the mean if that is so large that float32 loses digits of the spread.
  Most distances depend on differences only. The cubic kernel has a constant of
  its own, (|m|^2 / D + 1)^3, so its 1 counts as a part of the mean.
  """
  mean = real.mean(axis=0, dtype=np.float64)
  spread = np.sum(np.var(real, axis=0, dtype=np.float64))
  size = np.sum(mean**2) + (len(mean) if name == "kid_cubic" else 0)
  if size <= _LARGE_MEAN**2 * spread:
    return None
  return mean.astype(np.float32)


def make_fresh_distance(name: str, real: np.ndarray):
  """A distance to real features that are fresh at every call, as published.

  Args:
    name: one of `KERNELS`.
    real: float [R, D], features of the whole training set, which give the
      origin of the features and the bandwidth.

  Returns:
    A function from features [N, D] and real features [M, D], M at least 2, to
    the unbiased estimate of the distance, a float32 scalar.

  Raises:
    ValueError: unknown name.
    UserError: see `make_distance`.
  """
  if name not in KERNELS:
    raise ValueError(f"distance must be one of {', '.join(KERNELS)}. "
                     f"Received: {name!r}")
  # With the linear kernel the distance is a small difference of large numbers.
  centre = (real.mean(axis=0, dtype=np.float64).astype(np.float32)
            if name == "kid_linear" else _centre(name, real))
  shift = np.zeros(real.shape[1], np.float32) if centre is None else centre
  kernel = KERNELS[name](_drawn(real - shift), centre)

  def distance(features, fresh):
    features, fresh = (tf.cast(x, tf.float32) - shift for x in (features, fresh))
    return kid(features, fresh, kernel, mean_of_pairs(kernel, fresh))

  return distance


def _real_mean(real):
  return tf.constant(real.mean(axis=0, dtype=np.float64), tf.float32)


def _axes(real):
  """Variances along the principal axes, and the axes as columns; float64."""
  return np.linalg.eigh(np.cov(real.astype(np.float64).T))


def _make_kid_linear(real, centre):
  del centre
  real_mean = _real_mean(real)
  return lambda features, control=None: kid_linear(
      features, real_mean, control)


def _make_frechet_axes(real, centre):
  del centre
  real_mean = _real_mean(real)
  values, axes = _axes(real)
  axes = tf.constant(axes, tf.float32)
  deviations = tf.constant(np.sqrt(np.maximum(values, 0)), tf.float32)
  return lambda features, control=None: frechet_axes(
      features, real_mean, axes, deviations, control)


def _make_frechet(real, centre):
  del centre
  real_mean = _real_mean(real)
  values, vectors = _axes(real)
  # Rounding may make a variance negative if features depend on each other.
  values = np.maximum(values, 0.0)
  smoothing = SMOOTHING * float(values.max()) or _LEAST_SMOOTHING
  root = tf.constant((vectors * np.sqrt(values + smoothing)) @ vectors.T,
                     tf.float32)
  return lambda features, control=None: frechet(
      features, real_mean, root, smoothing, control)


def _drawn(real):
  """The real features that a kernel is evaluated against, float32."""
  order = np.random.default_rng(0).permutation(len(real))
  return tf.constant(real[order[:_KERNEL_REAL]], tf.float32)


def _make_kid(kernel_of):
  """The `Distance.make` of a kernel, which is made of real features."""
  def make(real, centre):
    drawn = _drawn(real)
    kernel = kernel_of(drawn, centre)
    real_term = mean_of_pairs(kernel, drawn)
    return lambda features: kid(features, drawn, kernel, real_term)

  return make


def _linear(real, centre):
  del real, centre
  return lambda a, b: tf.matmul(a, b, transpose_b=True)


def _cubic(real, centre):
  del real
  return cubic_kernel if centre is None else functools.partial(
      centred_cubic_kernel, centre=centre)


def _rbf(real, centre):
  del centre
  bandwidth = float(np.median(scipy.spatial.distance.pdist(
      real[:1000].numpy().astype(np.float64))))
  if not bandwidth > 0:
    raise UserError("kid_rbf needs real features that differ. Received: "
                    f"a median distance of {bandwidth:g}")
  return functools.partial(rbf_kernel, bandwidth=bandwidth)


# All distances by name.
DISTANCES = {
    "kid_linear": Distance(_make_kid_linear, moments=True, centre=True),
    "kid_cubic": Distance(_make_kid(_cubic), centre=True),
    "kid_rbf": Distance(_make_kid(_rbf), centre=True),
    "frechet_axes": Distance(_make_frechet_axes, moments=True, centre=True),
    "frechet": Distance(_make_frechet, moments=True, centre=True),
}
# The kernels of the Kernel Inception Distances: functions from real features and
# their centre, or None, to a function from [N, D] and [M, D] to [N, M].
KERNELS = {"kid_linear": _linear, "kid_cubic": _cubic, "kid_rbf": _rbf}
# Names of the distances that depend on moments only.
MOMENTS = [name for name, distance in DISTANCES.items() if distance.moments]


def register_distance(name: str, make: Callable, moments: bool) -> None:
  """Adds a distance, see `objective.register_objective`."""
  DISTANCES[name] = Distance(make, moments)
  if moments and name not in MOMENTS:
    MOMENTS.append(name)

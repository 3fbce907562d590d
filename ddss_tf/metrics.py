"""FID, KID, sliced distance and Inception Score from activations of any scale.

KID and the Inception Score are TF-GAN's, called where its arithmetic is right:
in float64, and with logits whose probabilities do not underflow. FID has its
formula, but not its matrix root; see `fid`. Input that is not finite gives NaN.

This module alone imports TF-GAN. Its package `__init__` needs
`tensorflow.estimator`, which TensorFlow dropped in 2.16, so that
`import tensorflow_gan` fails; the evaluation modules themselves are fine, and
are loaded past it.
"""

import functools
import importlib
import importlib.util
import os
import sys
import types
from typing import NamedTuple

import numpy as np
import scipy.linalg
import tensorflow as tf


_BLOCK_ROWS = 4096
_DIRECTIONS_AT_A_TIME = 100
# Differences of logits beyond this are cut: exp(-600) adds nothing to a score,
# but it is not yet 0, as exp(-800) is.
_LOGIT_RANGE = 600.0


@functools.cache
def _tfgan():
  """`tensorflow_gan.python.eval.classifier_metrics`."""
  spec = importlib.util.find_spec("tensorflow_gan")
  root = spec.submodule_search_locations[0]
  parents = {
      "tensorflow_gan": root,
      "tensorflow_gan.python": os.path.join(root, "python"),
      "tensorflow_gan.python.eval": os.path.join(root, "python", "eval"),
  }
  added = []
  try:
    for name, path in parents.items():
      if name not in sys.modules:
        # An empty package: sub-modules are found, its `__init__` never runs.
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]
        added.append(name)
    return importlib.import_module(
        "tensorflow_gan.python.eval.classifier_metrics")
  finally:
    # Leave no hollow package behind for whoever imports TF-GAN after us.
    for name in added:
      del sys.modules[name]


class Moments(NamedTuple):
  """Mean and covariance of activations.

  Attributes:
    mean: float64 [D].
    covariance: float64 [D, D], unbiased.
  """
  mean: np.ndarray
  covariance: np.ndarray


def moments(activations: np.ndarray) -> Moments:
  """Mean and unbiased covariance, in float64.

  It takes a block of rows at a time, so that beside the activations themselves
  memory does not grow with their number; TF-GAN's own call makes several
  float64 copies of all of them.

  Args:
    activations: float [N, D], N at least 2. Columns that are not finite have
      moments that are not finite.

  Raises:
    ValueError: fewer than 2 rows.
  """
  count, width = activations.shape
  if count < 2:
    raise ValueError(f"a covariance needs at least 2 rows. Received: {count}")
  covariance = np.zeros((width, width))
  with np.errstate(over="ignore", invalid="ignore"):
    mean = np.mean(activations, axis=0, dtype=np.float64)
    for start in range(0, count, _BLOCK_ROWS):
      centred = activations[start:start + _BLOCK_ROWS] - mean
      covariance += centred.T @ centred
  return Moments(mean, covariance / (count - 1))


def _factor(covariance: np.ndarray) -> np.ndarray:
  """L with L L' = covariance, float64 [D, rank].

  It is the pivoted Cholesky factor (LAPACK's pstrf) of the correlations, scaled
  back. Correlations have no scale, so an axis keeps its digits however small
  its variance is beside others. LAPACK stops where the rest of the diagonal is
  below D times the rounding error: the rest is rounding and adds no rank.
  """
  deviations = np.sqrt(np.maximum(np.diag(covariance), 0.0))
  scales = np.where(deviations > 0, deviations, 1.0)
  factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(
      covariance / scales[:, None] / scales, lower=1)
  ordered = np.empty((len(covariance), rank))
  ordered[pivots - 1] = np.tril(factor)[:, :rank]  # LAPACK leaves the rest.
  return scales[:, None] * ordered


def _trace_of_root(a: np.ndarray, b: np.ndarray) -> float:
  """tr (A B)^1/2 of two covariances, float64 [D, D].

  With A = L L' and B = M M' it is the sum of the singular values of L' M: the
  eigenvalues of A B are those of (L' M)(L' M)'. This forms no squares of
  variances; small ones would lose their digits beside larger ones.
  """
  product = _factor(a).T @ _factor(b)
  if not product.size:  # One of them is 0.
    return 0.0
  # TensorFlow's SVD: where another process has a core, the threads of OpenBLAS
  # wait for each other and take ten times as long.
  return float(tf.reduce_sum(tf.linalg.svd(product, compute_uv=False)))


def fid(real: np.ndarray | Moments, generated: np.ndarray | Moments) -> float:
  """Frechet distance of two sets of activations.

  Heusel et al. (2017, https://arxiv.org/abs/1706.08500). Biased upwards by few
  samples: compare only values of the same counts (`fid_label` names them).

  It is right at any scale: it grows with the square of the activations, and a
  set has the distance 0 to itself, up to rounding of the variance. TF-GAN's
  `trace_sqrt_product` agrees where all variances are near 1 but is wrong for
  small ones: its root leaves singular values, which are squares of variances,
  as they are below an absolute 1e-10. In larger units it would take their roots
  too, but also those of mere rounding on axes without variance. No unit serves
  both, so the trace of the root is computed here (`_trace_of_root`).

  Args:
    real: float [N, D], or its moments.
    generated: float [M, D], or its moments.

  Returns:
    The distance, at least 0; NaN of activations that are not finite.
  """
  a, b = (values if isinstance(values, Moments) else moments(values)
          for values in (real, generated))
  if not all(np.all(np.isfinite(values)) for values in (*a, *b)):
    return float("nan")
  spread = (np.trace(a.covariance) + np.trace(b.covariance)
            - 2 * _trace_of_root(a.covariance, b.covariance))
  return float(np.sum((a.mean - b.mean) ** 2) + max(spread, 0.0))


def kid(real: np.ndarray, generated: np.ndarray,
        block_size: int = 1000) -> tuple[float, float]:
  """Kernel Inception Distance with the cubic kernel, and its standard error.

  Binkowski et al. (2018, https://arxiv.org/abs/1801.01401): unbiased, so it
  can be negative. The error comes from the spread between blocks. There are at
  least two, since one has no spread, and few enough that each holds two samples
  of each set. Samples are dealt to the blocks at random, with a fixed seed,
  because in many folders images come class by class.

  It is computed in float64: the cubes of features with a large mean are larger
  than their differences by more than the digits of float32.

  Args:
    real: float [N, D], N at least 4.
    generated: float [M, D], M at least 4.
    block_size: the most samples of the larger set per block.

  Returns:
    The distance and its standard error; NaN of features that are not finite.

  Raises:
    ValueError: fewer than 4 samples.
  """
  smallest = min(len(real), len(generated))
  if smallest < 4:
    raise ValueError(f"KID with an error needs at least 4 samples. "
                     f"Received: {smallest}")
  largest = max(len(real), len(generated))
  blocks = max(2, min(-(-largest // block_size), smallest // 2))
  # As TF-GAN deals them: of unequal blocks, the larger come last.
  dealt = [np.array_split(np.random.default_rng(seed).permutation(
      len(values))[::-1], blocks)[::-1]
           for seed, values in enumerate((real, generated))]
  found = []
  for rows in zip(*dealt):
    block = [tf.constant(values[own], tf.float64)
             for values, own in zip((real, generated), rows)]
    found.append(float(_tfgan().kernel_classifier_distance_from_activations(
        *block, max_block_size=max(map(len, rows)))))
  return float(np.mean(found)), float(np.std(found, ddof=1) / blocks**0.5)


def sliced_wasserstein(real: np.ndarray, generated: np.ndarray,
                       directions: int = 1000, seed: int = 0) -> float:
  """Squared sliced Wasserstein-2 distance of two sets of activations.

  It is the mean over random directions of the squared Wasserstein-2 distance of the
  projections, which is exact: that of sorted numbers. Unlike FID it sees more than
  two moments, and needs fewer samples. The Monge Inception Distance (Berthet et al.
  2026, "MIND", https://arxiv.org/abs/2605.06797) is such a distance on Inception's
  features; the number of directions and the scale here are our choice, so figures do
  not compare with theirs. Of two sets that differ by a shift alone it is the square
  of the shift's length over D.

  Args:
    real: float [N, D].
    generated: float [M, D].
    directions: how many directions, uniform on the sphere.
    seed: their seed.

  Returns:
    The distance, at least 0; NaN of activations that are not finite.
  """
  if not (np.all(np.isfinite(real)) and np.all(np.isfinite(generated))):
    return float("nan")
  count, other = len(real), len(generated)
  # The quantile functions are constant between the shares i / N and j / M. In units
  # of 1 / (N M) these are whole numbers.
  ends = np.union1d(np.arange(1, count + 1) * other, np.arange(1, other + 1) * count)
  starts = np.concatenate([[0], ends[:-1]])
  weights = (ends - starts) / (count * other)
  rows, other_rows = starts // other, starts // count
  centre = np.mean(real, axis=0, dtype=np.float64)
  vectors = np.random.default_rng(seed).normal(size=(directions, len(centre)))
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  vectors = vectors.astype(np.float32)
  both = [(values - centre).astype(np.float32) for values in (real, generated)]
  total = 0.0
  for block in np.array_split(vectors, -(-directions // _DIRECTIONS_AT_A_TIME)):
    with tf.device("CPU"):  # A GPU may multiply with 10 bits of the 23 (TF32).
      a, b = (np.sort(tf.matmul(
          block, values, transpose_b=True).numpy(), axis=1) for values in both)
    total += np.sum((a[:, rows] - b[:, other_rows]) ** 2 @ weights)
  return float(total / directions)


def inception_score(logits: np.ndarray, splits: int = 1
                    ) -> tuple[float, float]:
  """exp E KL(p(y|x) || p(y)) of a classifier's logits, at least 1.

  Salimans et al. (2016, https://arxiv.org/abs/1606.03498) give mean and
  standard deviation over 10 splits. A smaller split has a smaller score.

  Args:
    logits: float [N, classes], of any size; -infinity is an impossible class.
    splits: the number of parts, of nearly equal size and in order.

  Returns:
    The mean score of the splits and its standard deviation, 0 for one split;
    NaN if a logit is NaN or infinity.

  Raises:
    ValueError: more splits than samples, or fewer than 1.
  """
  if not 1 <= splits <= len(logits):
    raise ValueError(f"splits must be from 1 to the {len(logits)} samples. "
                     f"Received: {splits}")
  with np.errstate(invalid="ignore"):
    logits = np.asarray(logits, np.float64)
    logits = np.maximum(
        logits - np.max(logits, axis=1, keepdims=True), -_LOGIT_RANGE)
  scores = [float(_tfgan().classifier_score_from_logits(tf.constant(part)))
            for part in np.array_split(logits, splits)]
  return float(np.mean(scores)), float(np.std(scores))

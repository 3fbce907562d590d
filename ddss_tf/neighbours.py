"""Density, coverage, precision and recall: figures of nearest neighbours.

FID sees two moments of the features only, so a search that matches these moments can
flatter it. These figures ask where the samples lie. Around each sample of one set is
a ball that reaches to its k-th nearest neighbour in the same set; the balls stand for
the set's support, and the samples of the other set lie inside or outside.

All distances are exact: the squares are float32, of centred features, a block of rows
at a time, so that memory does not grow with the product of the numbers of samples.
The figures grow or fall with these numbers: compare values of equal numbers only.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

# Of Naeem et al. for density and coverage, of Kynkäänniemi et al. for the others.
COVERAGE_K, RECALL_K = 5, 3
_BLOCK_ENTRIES = 2**24  # Distances at a time: 64 MiB.


class Balls(NamedTuple):
  """Samples and the squared radii of their balls.

  Attributes:
    points: float32 [N, D].
    squares: float32 [len(ks), N], the squared distances to the k-th neighbours.
  """
  points: np.ndarray
  squares: np.ndarray


class Figures(NamedTuple):
  """What `figures` gives, each a share of samples but for the density.

  Attributes:
    density: how many balls of real samples hold a generated one, on average, over
      k; about 1 for equal distributions. (Naeem et al. 2020, equation 3)
    coverage: real samples whose ball holds a generated one. (equation 4)
    precision: generated samples in a ball of a real one. (Kynkäänniemi et al. 2019)
    recall: real samples in a ball of a generated one.
  """
  density: float
  coverage: float
  precision: float
  recall: float


def balls(points: np.ndarray, ks: tuple[int, ...] = (COVERAGE_K, RECALL_K)) -> Balls:
  """The balls around samples that reach to their nearest neighbours.

  Args:
    points: float [N, D], N above every k.
    ks: numbers of neighbours.

  Raises:
    ValueError: there are too few samples.
  """
  points = np.ascontiguousarray(points, np.float32)
  if len(points) <= max(ks):
    raise ValueError(f"balls to the nearest neighbour {max(ks)} need more samples "
                     f"than that. Received: {len(points)}")
  centre = _mean(points)
  squares = np.empty((len(ks), len(points)), np.float32)
  for rows, distances in _distances(points, points, centre):
    # A sample is no neighbour of itself, but one that is equal to it is.
    distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
    nearest = np.sort(np.partition(distances, max(ks) - 1, axis=1)[:, :max(ks)], axis=1)
    squares[:, rows] = nearest[:, [k - 1 for k in ks]].T
  return Balls(points, squares)


def figures(real: Balls, generated: np.ndarray) -> Figures:
  """Density, coverage, precision and recall of generated samples.

  Naeem et al. (2020, "Reliable Fidelity and Diversity Metrics for Generative Models",
  https://arxiv.org/abs/2002.09797), with k = 5; Kynkäänniemi et al. (2019, "Improved
  Precision and Recall Metric", https://arxiv.org/abs/1904.06991), with k = 3. A
  sample on the surface of a ball is inside: Kynkäänniemi et al. count so, and
  duplicates, whose balls are points, then count as covered by each other.

  Args:
    real: `balls` of the real samples with the default `ks`.
    generated: float [M, D], M above 5.

  Returns:
    The figures; NaN of samples that are not finite.

  Raises:
    ValueError: there are too few samples.
  """
  if not (np.all(np.isfinite(generated)) and np.all(np.isfinite(real.points))):
    return Figures(*[float("nan")] * 4)
  made = balls(generated)
  inside = precise = 0
  covered, recalled = (np.zeros(len(real.points), bool) for _ in range(2))
  for rows, distances in _distances(
      made.points, real.points, _mean(real.points)):
    in_real = distances <= real.squares[0]
    inside += np.count_nonzero(in_real)
    covered |= np.any(in_real, axis=0)
    precise += np.count_nonzero(np.any(distances <= real.squares[1], axis=1))
    recalled |= np.any(distances <= made.squares[1, rows, None], axis=0)
  return Figures(
      density=float(inside / (COVERAGE_K * len(made.points))),
      coverage=float(np.mean(covered)),
      precision=float(precise / len(made.points)), recall=float(np.mean(recalled)))


def _mean(points):
  return np.mean(points, axis=0, dtype=np.float64).astype(np.float32)


def _distances(one: np.ndarray, other: np.ndarray, centre: np.ndarray):
  """Yields a slice of rows of `one` and their squared distances to `other`.

  Features are far from 0, and the squares of their lengths would lose the digits of
  their distances. So they are centred first.

  Args:
    one: float32 [N, D].
    other: float32 [M, D].
    centre: float32 [D].

  Yields:
    Pairs of a slice and float32 [rows, M], at least 0.
  """

  def extended(points, factor, order):
    """The centred points, times a factor, with their squared lengths and with ones."""
    points = points - centre
    more = [np.sum(points**2, axis=1), np.ones(len(points), np.float32)]
    return tf.constant(np.column_stack([factor * points, *more[::order]]))

  # One product gives |x|^2 + |y|^2 - 2 x y: passes over its result cost more.
  columns = extended(other, 1, -1)
  step = max(1, _BLOCK_ENTRIES // len(other))
  for start in range(0, len(one), step):
    rows = slice(start, min(start + step, len(one)))
    with tf.device("CPU"):  # A GPU may multiply with 10 bits of the 23 (TF32).
      squares = np.array(tf.matmul(
          extended(one[rows], -2, 1), columns, transpose_b=True))
    yield rows, np.maximum(squares, 0.0, out=squares)

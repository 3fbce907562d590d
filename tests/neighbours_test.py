"""Tests of coverage, recall and the sliced distance: brute force, closed forms."""

import numpy as np
import pytest
from scipy import stats

from ddss_tf import metrics
from ddss_tf import neighbours


def brute_force(real, generated):
  """The figures from all distances at once, in float64, by their definitions."""
  def pairs(a, b):
    return np.sqrt(np.sum((a[:, None] - b[None]) ** 2, axis=-1))

  def radii(points, k):  # The first of the sorted ones is the point itself.
    return np.sort(pairs(points, points), axis=1)[:, k]

  across = pairs(real.astype(np.float64), generated.astype(np.float64))
  in_5 = across <= radii(real, 5)[:, None]
  return (np.sum(in_5) / (5 * len(generated)), np.mean(np.any(in_5, axis=1)),
          np.mean(np.any(across <= radii(real, 3)[:, None], axis=0)),
          np.mean(np.any(across <= radii(generated, 3)[None], axis=1)))


@pytest.mark.parametrize("block", [2**24, 1000])
def test_figures_are_those_of_brute_force(block, monkeypatch):
  monkeypatch.setattr(neighbours, "_BLOCK_ENTRIES", block)
  rng = np.random.default_rng(0)
  # Far from 0, as features are, where squares have no digits left for distances.
  real = (50 + rng.normal(size=(210, 4))).astype(np.float32)
  generated = (50.3 + 0.7 * rng.normal(size=(170, 4))).astype(np.float32)
  found = neighbours.figures(neighbours.balls(real), generated)
  np.testing.assert_allclose(found, brute_force(real, generated), rtol=1e-6)
  assert all(0.05 < value < 0.98 for value in found[1:])


def test_equal_lost_and_collapsed_samples():
  rng = np.random.default_rng(1)
  real, again = rng.normal(size=(2, 1000, 2)).astype(np.float32)
  known = neighbours.balls(real)
  same = neighbours.figures(known, real)
  assert same[1:] == (1.0, 1.0, 1.0)  # Each point lies in its own ball.
  far = neighbours.figures(known, again + 100)
  assert far == (0.0, 0.0, 0.0, 0.0)
  half = neighbours.figures(known, again * [[1, 0.01]] + [[0, 3.0]])
  assert half.recall < 0.05 and half.coverage < 0.05
  # All samples in one mode of two: precise, and half of the data is missed.
  modes = real.copy()
  modes[::2] += 100
  one_mode = neighbours.figures(neighbours.balls(modes), again)
  assert one_mode.precision > 0.95 and 0.45 < one_mode.recall < 0.51
  assert 0.45 < one_mode.coverage < 0.51


def test_equal_distributions():
  """A ball of 5 neighbours is missed with nearly the probability 1 / 2^5.

  Naeem et al., lemma 2: 1 - coverage is (N - 1) ... (N - k) / ((N + M - 1) ... (N + M - k))
  on average, in any dimension.
  """
  found, count, other = [], 300, 450
  for seed in range(20):
    rng = np.random.default_rng(seed)
    real, again = (rng.normal(size=(n, 2)) for n in (count, other))
    found.append(neighbours.figures(neighbours.balls(real), again))
  missed = np.prod([(count - k) / (count + other - k) for k in range(1, 6)])
  coverage = np.array([figures.coverage for figures in found])
  assert abs(np.mean(coverage) - (1 - missed)) < 4 * np.std(coverage) / 20**0.5
  assert np.std(coverage) < 0.02
  assert abs(np.mean([figures.density for figures in found]) - 1) < 0.05


def test_duplicates_are_neighbours():
  real = np.repeat(np.arange(3, dtype=np.float32)[:, None] * 10, 7, axis=0)
  np.testing.assert_array_equal(neighbours.balls(real).squares, 0)
  assert neighbours.figures(neighbours.balls(real), real).coverage == 1


def test_few_or_broken_samples():
  real = np.random.default_rng(0).normal(size=(20, 3))
  with pytest.raises(ValueError, match="neighbour 5 need more.*Received: 5"):
    neighbours.balls(real[:5])
  broken = real.copy()
  broken[3, 1] = np.nan
  assert np.all(np.isnan(neighbours.figures(neighbours.balls(real), broken)))
  assert np.isnan(metrics.sliced_wasserstein(real, broken))


def test_the_sliced_distance_of_a_line_is_scipys():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(30, 1)), rng.exponential(size=(21, 1))
  # In one dimension every direction is 1 or -1. W1 of numbers in common order is
  # SciPy's; W2 is compared with all pairs of a common multiple of both counts.
  long_a, long_b = np.sort(np.repeat(a, 7)), np.sort(np.repeat(b, 10))
  assert np.isclose(stats.wasserstein_distance(a[:, 0], b[:, 0]),
                    np.mean(np.abs(long_a - long_b)))
  np.testing.assert_allclose(metrics.sliced_wasserstein(a, b, 3),
                             np.mean((long_a - long_b) ** 2), rtol=1e-5)
  np.testing.assert_allclose(metrics.sliced_wasserstein(b, a, 3),
                             np.mean((long_a - long_b) ** 2), rtol=1e-5)


def test_the_sliced_distance_in_closed_form():
  rng = np.random.default_rng(0)
  real = 20 + rng.normal(size=(500, 6))
  shift = np.array([1.0, -2, 0, 0, 0.5, 1])
  assert metrics.sliced_wasserstein(real, real) == 0
  # A shift moves every projection by its own: E <v, shift>^2 = |shift|^2 / D.
  found = metrics.sliced_wasserstein(real, real + shift, 4000)
  np.testing.assert_allclose(found, shift @ shift / 6, rtol=0.05)
  # About the mean, a factor s moves a projection by (s - 1) of itself.
  centre = real.mean(axis=0)
  spread = np.trace(np.cov(real.T, ddof=0)) / 6
  np.testing.assert_allclose(
      metrics.sliced_wasserstein(real, centre + 1.5 * (real - centre), 4000),
      0.25 * spread, rtol=0.05)


def test_moments_do_not_fool_the_sliced_distance():
  """Two points of equal weight have the moments of a normal distribution."""
  rng = np.random.default_rng(0)
  real = rng.normal(size=(2000, 2))
  fooled = rng.choice([-1.0, 1.0], size=(2000, 2))
  assert metrics.fid(real, fooled) < 0.02
  # W2^2 of a normal distribution and +-1 is 2 - 2 E|z| = 2 - 2 sqrt(2 / pi) on an
  # axis; it is less on others.
  axis = metrics.sliced_wasserstein(real[:, :1], fooled[:, :1], 2)
  np.testing.assert_allclose(axis, 2 - 2 * np.sqrt(2 / np.pi), atol=0.05)
  assert 0.1 < metrics.sliced_wasserstein(real, fooled) < axis
  figures = neighbours.figures(neighbours.balls(real), fooled)
  assert figures.coverage < 0.05 and figures.recall < 0.05

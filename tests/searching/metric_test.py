"""The metric of the features."""

import numpy as np
import pytest
import tensorflow as tf

from ddss_tf.searching import metric as metric_lib

from small_searches import make_search


def damped(eigenvalue):
  return eigenvalue / (eigenvalue + 1e-3) ** 2


@pytest.mark.parametrize("correlation", [0.0, 0.5, -0.9, 1.0])
def test_the_preconditioner_of_two_variables(correlation):
  """Two variables of two kinds, whose eigenvectors are (1, 1) and (1, -1)."""
  effects = np.array([4.0, 1e-3])
  metric = np.outer(effects, effects) * [[1, correlation], [correlation, 1]]
  found = metric_lib.preconditioner(
      metric, np.array(["weights", "times"]), np.zeros(2, bool),
      np.ones(2, bool))
  floor = 1 + 0.03**2  # In units of each variable's own effect.
  plus, minus = (damped((1 + sign * correlation) / floor) for sign in (1, -1))
  expected = 0.5 * np.array([[plus + minus, plus - minus],
                             [plus - minus, plus + minus]])
  np.testing.assert_allclose(
      found, expected / np.outer(effects, effects) / floor, rtol=1e-9,
      atol=1e-9 * np.abs(found).max())


def test_the_preconditioner_of_held_bounded_and_idle_variables():
  """A held one does not move, a bounded one stands alone, an idle one is safe.

  All are of one kind, whose floor is 3 % of its root mean square.
  """
  effects = np.array([2.0, 2.0, 2.0, 0.0])
  metric = np.outer(effects, effects)
  bounded = np.array([False, True, False, False])
  free = np.array([True, True, False, True])
  found = metric_lib.preconditioner(
      metric, np.array(["weights"] * 4), bounded, free)
  floor = 0.03**2 * 3.0  # The mean of 4, 4, 4 and 0 is 3.
  expected = np.zeros([4, 4])
  expected[0, 0] = damped(4 / (4 + floor)) / (4 + floor)
  expected[1, 1] = 1 / (4 + floor)
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("family,init", [
    ("ggdm+pred+time", "ddpm"), ("ggdm", "dpm++3m"), ("vars", "ddpm")])
def test_the_metric_is_that_of_the_features(parts, family, init):
  # By finite differences, on other images than those it was measured on.
  search = make_search(parts, family=family, init=init, batch_size=256,
                       gradient_samples=256, micro_batch_size=256)
  search.optimizer.begin(0)
  inverse, measured = (
      search.optimizer.metric.inverse.numpy(),
      search.optimizer.metric.value.numpy())
  indices = tf.constant(np.arange(5000, 5256))
  real = parts["features"](parts["dataset"].images)["pool"].numpy()
  std = np.sqrt(real.var(axis=0).sum())
  moves, position = [], 0
  for number, variable in enumerate(search.optimizer.variables.variables):
    before = variable.numpy()
    for index in np.ndindex(before.shape):
      # A difference that is small, but not beside rounding, in any unit.
      step = 0.02 * np.sqrt(inverse[position, position] / len(inverse))
      # Noise scales are 0 at the least, where this solver has them.
      bound = init == "dpm++3m" and search.optimizer.variables.kinds[number] == "noise_scales"
      ends = (0.1, 0) if bound else (1, -1)
      views = []
      for end in ends:
        moved = np.array(before)
        moved[index] += end * step
        variable.assign(moved)
        views.append(search.gradient.views(indices).numpy().astype(np.float64))
      moves.append((views[0] - views[1]) / ((ends[0] - ends[1]) * step * std))
      position += 1
    variable.assign(before)
  moves = np.stack(moves)  # [n, N, D]
  metric = np.einsum("ind,jnd->ij", moves, moves) / moves.shape[1]
  alone = np.repeat([v.constraint is not None for v in search.optimizer.variables.variables],
                    [int(np.prod(v.shape)) for v in search.optimizer.variables.variables])
  np.testing.assert_array_equal(inverse[alone][:, ~alone], 0)
  np.testing.assert_allclose(inverse, inverse.T, rtol=1e-9)
  effects = np.diag(inverse)[alone] * np.diag(metric)[alone]
  free = metric[~alone][:, ~alone]
  if len(free):
    effects = np.append(effects, np.linalg.eigvals(
        inverse[~alone][:, ~alone] @ free).real)
    scales = 1 / np.sqrt(np.diag(free))
    related = np.linalg.eigvalsh(free * scales[:, None] * scales)
    # In units of equal effect alone, some would move them far more together.
    assert np.max(related) > 2.5
  # Each direction by 1, or hardly at all.
  felt = effects[effects > 0.3]
  assert len(felt) > len(effects) / 3
  assert np.max(felt) < 1.5
  felt = effects[effects > 0.2 * np.max(effects)]
  assert np.max(felt) < 2.5 * np.min(felt)
  # And of any step the effect is known.
  steps = np.random.default_rng(0).normal(size=inverse.shape) @ inverse
  np.testing.assert_allclose(
      np.einsum("ki,ij,kj->k", steps, measured, steps),
      np.einsum("ki,ij,kj->k", steps, metric, steps), rtol=0.5)

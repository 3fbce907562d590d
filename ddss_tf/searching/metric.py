"""The metric of a sampler's variables: how far each moves the features."""

from absl import logging
import numpy as np
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf.errors import UserError
from ddss_tf.searching.population import PopulationGradient
from ddss_tf.searching.variables import SamplerVariables

_DRAWS = 8
_ROWS = 4  # The least rows that are drawn for each variable.
_SENSITIVITY_FLOOR = 0.03
_LEAST_EFFECT = 1e-3


def preconditioner(metric: np.ndarray, kinds: np.ndarray, bounded: np.ndarray,
                   free: np.ndarray) -> np.ndarray:
  """The inverse of a metric, damped where the metric is hardly known.

  The inverse is taken in units in which all variables have the same effect: the
  row and the column of variable v are divided by s_v, the root of its diagonal
  entry. A variable with hardly any effect is treated as if it had 3 % of the
  root mean square of its kind. Along an eigenvector of eigenvalue l the inverse
  is l / (l + 0.001)^2 instead of 1 / l: a direction that hardly changes the
  images is moved less instead of more.

  Each bounded variable is inverted alone. At a bound such a variable stays
  behind, and others that should move with it must not move without it.

  Our choice: the paper uses Adam alone.

  Args:
    metric: float64 [n, n], the second moment of the variables' effects.
    kinds: [n], the kind of every variable. Each kind has units of its own.
    bounded: bool [n], the variables with a constraint.
    free: bool [n], the variables that may move.

  Returns:
    float64 [n, n], symmetric; 0 in the rows of variables that are held.
  """
  squares = np.diag(metric)
  scales = np.empty_like(squares)
  for kind in set(kinds):
    own = kinds == kind
    floor = _SENSITIVITY_FLOOR**2 * np.mean(squares[own]) + 1e-30
    scales[own] = 1 / np.sqrt(squares[own] + floor)
  inverse = np.diag(np.where(bounded & free, 1.0, 0.0))
  joint = np.ix_(*[np.flatnonzero(free & ~bounded)] * 2)
  values, vectors = np.linalg.eigh(
      (metric * scales[:, None] * scales)[joint])
  values = np.maximum(values, 0.0)
  inverse[joint] = (
      vectors * (values / (values + _LEAST_EFFECT) ** 2)) @ vectors.T
  return inverse * scales[:, None] * scales


class FeatureMetric:
  """How the features of an image move with all variables of a sampler.

  With the Jacobian J of an image's features the metric is E J' J. For standard
  normal r the rows r . J have this second moment (Hutchinson's estimate), and
  one backward pass gives such a row for every image.

  The metric is a mean over the places where it was measured. Its arrays are in
  float64 on the host, because not every accelerator has float64.

  Args:
    population: gives the gradient of each sample.
    variables: the variables of the sampler that is learned.
    objective: its first network's features are measured, in units of their
      standard deviation.
    free: bool [n], the entries that may move.
    micro_batch_size: images per chain.

  Attributes:
    value: tf.Variable, float64 [n, n], the metric.
    inverse: tf.Variable, float64 [n, n], see `preconditioner`.
    count: tf.Variable, float64, how often the metric was measured.
  """

  def __init__(self, population: PopulationGradient,
               variables: SamplerVariables, objective, free: np.ndarray,
               micro_batch_size: int):
    self._population, self._variables = population, variables
    self._objective, self._free = objective, free
    self._micro_batch_size = micro_batch_size
    size = len(free)
    self.value, self.inverse, self.count = distribution.outside(lambda: [
        tf.Variable(value, dtype=tf.float64, trainable=False)
        for value in (np.zeros([size, size]), np.eye(size), 0.0)])

  def measure(self, step: int) -> None:
    """Measures the metric at the present variables and updates the mean.

    Args:
      step: the step of the search, for messages.

    Raises:
      UserError: the first measurement is not finite, or 0.
    """
    measured = self._measured()
    before = int(self.count.numpy())
    if not np.all(np.isfinite(measured)) or not np.any(measured):
      if before:
        logging.warning("step %d: the metric of before is kept, because this "
                        "one is not finite", step)
        return
      raise UserError("the search's start must have finite, non-zero "
                      "sensitivities: the denoiser or the feature network "
                      "gives NaN, infinity or a constant")
    metric = (before * self.value.numpy() + measured) / (before + 1)
    self.value.assign(metric)
    self.count.assign_add(1)
    self.inverse.assign(preconditioner(
        metric, self._variables.kind_of_entry, self._variables.constrained,
        self._free))

  def natural(self, gradient: np.ndarray) -> tuple[np.ndarray, float]:
    """The inverse metric times the gradient, and the length of this move.

    Args:
      gradient: float [n].

    Returns:
      The move, float64 [n], and its length in the metric: by how many standard
      deviations it would move the features. NaN stays NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
      move = self.inverse.numpy() @ gradient
      # Rounding may make a square negative.
      return move, float(
          np.sqrt(np.maximum(move @ self.value.numpy() @ move, 0)))

  def _measured(self) -> np.ndarray:
    """The metric here, float64 [n, n], from samples that were not used yet."""
    size, objective = self._micro_batch_size, self._objective
    jacobian, metric = self._population.jacobian(), 0.0
    draws = max(_DRAWS, -(-_ROWS * len(self._free) // size))
    before = int(self.count.numpy())
    for draw in range(draws * before, draws * (before + 1)):
      # The metric's samples have indices that go down from 2^31 - 1.
      indices = 2**31 - 1 - size * (1 + draw) + np.arange(size)
      r = objective.layout.first_only(tf.random.stateless_normal(
          [size, objective.layout.feature_width], [draw, 0], alg="philox"))
      rows = self._population.per_sample(indices, r) @ jacobian
      metric = metric + rows.T @ rows
    return metric / (draws * size) / objective.feature_std**2

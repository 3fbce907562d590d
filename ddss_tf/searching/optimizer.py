"""The update rule of the search. Another rule would go here.

An optimiser has `begin`, called before the first step and before the next one
after going back; `apply`, which makes a step; `go_back`, called after a
validation that was worse than the best; `rate`; and `state`, what a checkpoint
holds of it.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf.searching.metric import FeatureMetric
from ddss_tf.searching.variables import SamplerVariables

# Adam's factors. The second is short because searches are short. Our choice.
_BETA_1, _BETA_2 = 0.9, 0.99
# The square of the first gradient's norm must still fit into a float64. A later
# norm, in units of those before, must not fill the second moment for the rest
# of the search.
_LARGEST_NORM = 1e150
_LARGEST_GROWTH = 1e18


class StepResult(NamedTuple):
  """What a step did.

  Attributes:
    loss: the objective of the step's population.
    norm: the length of its gradient.
    taken: whether the variables moved.
    fault: what was not finite; "" if the step was taken.
  """
  loss: float
  norm: float
  taken: bool
  fault: str = ""


class MetricAdam:
  """Adam (Kingma & Ba 2015) in the metric of the features. Our choice.

  The gradient is multiplied by the inverse of the metric: a natural gradient.
  The second moment is one number, the size of the whole step. So a step does
  not depend on the choice of axes.

  The states of a chain are nearly equal, so changing any one of the weights by
  which a step mixes them has nearly the same effect. With a learning rate for
  each weight they would all move together. A multistep solver consists of the
  differences between them, which would be lost. In the metric one learning rate
  serves weights, times and noise scales, and every K.

  Args:
    variables: the variables of the sampler that is learned.
    metric: the metric of the features.
    num_search_steps: steps in all. The rate rises over a tenth of them and then
      decays to 0 (cosine).
    learning_rate: the highest rate, in feature standard deviations for all
      variables together.
    multipliers: float32 [n], factors on it, of every entry.

  Attributes:
    moments: tf.Variables, float64: the first moment [n], the second moment, and
      the number of steps in them.
  """

  def __init__(self, variables: SamplerVariables, metric: FeatureMetric, *,
               num_search_steps: int, learning_rate: float,
               multipliers: np.ndarray):
    self.variables, self.metric = variables, metric
    self._multipliers, size = multipliers, len(multipliers)
    self._factor, *self.moments = distribution.outside(lambda: [
        tf.Variable(value, dtype=tf.float64, trainable=False)
        for value in (1.0, np.zeros(size), 0.0, 0.0)])
    # Adam's first steps are as long however noisy they are: start slowly.
    warmup = num_search_steps // 10
    self._schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else learning_rate, num_search_steps - warmup,
        warmup_target=learning_rate if warmup else None, warmup_steps=warmup)

  @property
  def state(self) -> dict:
    """What a checkpoint holds, by name."""
    return {"preconditioner": self.metric.inverse, "metric": self.metric.value,
            "measured": self.metric.count, "moments": self.moments,
            "factor": self._factor}

  def rate(self, step: int) -> float:
    """The learning rate of a step."""
    return float(self._factor.numpy()) * float(self._schedule(step + 0.5))

  def begin(self, step: int) -> None:
    """Measures the metric where the variables are."""
    self.metric.measure(step)

  def go_back(self) -> None:
    """Forgets the moments and halves the rate."""
    for moment in self.moments:
      moment.assign(tf.zeros_like(moment))
    self._factor.assign(0.5 * self._factor)

  def apply(self, step: int, loss: float, gradient: np.ndarray) -> StepResult:
    """Makes a step.

    A step with a value that is not finite, or that would end at coefficients
    that are not, changes nothing.

    Args:
      step: the step of the search, which decides the rate.
      loss: the objective.
      gradient: float [n], its gradient in all variables.
    """
    move, norm = self.metric.natural(gradient)
    if not np.isfinite(loss) or not norm < self._largest_norm():
      return StepResult(loss, norm, False, self._not_finite(loss, gradient))
    if not self._take(step, move, norm):
      return StepResult(
          loss, norm, False, "the coefficients it would lead to")
    return StepResult(loss, norm, True)

  def _largest_norm(self) -> float:
    """The least norm of a gradient whose step is not taken.

    It scales with the norms so far if these are above 1: the cube of a kernel
    is far from 1.
    """
    _, second, count = self.moments
    if not count.numpy():
      return _LARGEST_NORM
    return _LARGEST_GROWTH * max(1.0, self._root_of_square(second, count))

  @staticmethod
  def _root_of_square(second, count) -> float:
    """Root of the mean square so far, without its start at 0; never 0."""
    square = second.numpy() / (1 - _BETA_2 ** count.numpy())
    return float(max(square, np.finfo(np.float64).tiny)) ** 0.5

  def _take(self, step: int, move: np.ndarray, norm: float) -> bool:
    """Adam's step, inside the constraints; whether the sampler allows it."""
    changed = [*self.variables.variables, *self.moments]
    before = [tf.convert_to_tensor(variable) for variable in changed]
    first, second, count = self.moments
    first.assign(_BETA_1 * first + (1 - _BETA_1) * move)
    second.assign(_BETA_2 * second + (1 - _BETA_2) * norm**2)
    count.assign_add(1)
    # Both means began at 0; the division corrects that.
    mean = first.numpy() / (1 - _BETA_1 ** count.numpy())
    self.variables.add(-self.rate(step) * self._multipliers * mean
                       / self._root_of_square(second, count))
    try:
      self.variables.sampler.coefficients().validate()
    except ValueError:
      for variable, value in zip(changed, before):
        variable.assign(value)
      return False
    return True

  def _not_finite(self, loss, gradient) -> str:
    """Names what is NaN or infinite."""
    parts = [] if np.isfinite(loss) else ["the loss"]
    parts += [f"the gradient of {variable.name}"
              for part, variable in self.variables.split(gradient)
              if not np.all(np.isfinite(part))]
    return ", ".join(parts) or "the norm of the gradient"

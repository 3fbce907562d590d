"""The update rule of the search. Another rule would go here.

  Optimizer   what the search needs of one
  Adam        the paper's: Adam on every variable
  MetricAdam  ours: Adam in the metric of the features
"""

from typing import Callable, NamedTuple

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
# Adam of Keras keeps squares of the gradient in float32.
_LARGEST_SQUARED = 1e18
SCHEDULES = ("constant", "cosine")
# From a step, a half between two of them, to its learning rate.
Schedule = Callable[[float], float]


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


class Optimizer:
  """What makes a step of a gradient.

  A step with a value that is not finite, or that would end at coefficients
  that are not, changes nothing.

  Args:
    variables: the variables of the sampler that is learned.
    multipliers: float32 [n], factors on the rate, of every entry.
    schedule: from a step, a half between two of them, to the learning rate.

  Attributes:
    goes_back: whether a validation that is worse than the best takes the search
      back.
  """
  goes_back = False

  def __init__(self, variables: SamplerVariables, multipliers: np.ndarray,
               schedule: Schedule):
    self.variables = variables
    self._multipliers, self._schedule = multipliers, schedule

  @property
  def state(self) -> dict:
    """What a checkpoint holds, by name."""
    raise NotImplementedError

  def rate(self, step: int) -> float:
    """The learning rate of a step."""
    return float(self._schedule(step + 0.5))

  def begin(self, step: int) -> None:
    """Before the first step, and after each return to the best variables."""

  def go_back(self) -> None:
    """After a return to the best variables."""

  def apply(self, step: int, loss: float, gradient: np.ndarray) -> StepResult:
    """Makes a step.

    Args:
      step: the step of the search, which decides the rate.
      loss: the objective.
      gradient: float [n], its gradient in all variables.
    """
    move, norm = self._measured(gradient)
    if not np.isfinite(loss) or not norm < self._largest_norm():
      return StepResult(loss, norm, False, self._not_finite(loss, gradient))
    changed = [*self.variables.variables, *self._moments]
    before = [tf.convert_to_tensor(variable) for variable in changed]
    self.variables.add(
        self._step(-self.rate(step) * self._multipliers, move, norm))
    try:
      self.variables.sampler.coefficients().validate()
    except ValueError:
      for variable, value in zip(changed, before):
        variable.assign(value)
      return StepResult(
          loss, norm, False, "the coefficients it would lead to")
    return StepResult(loss, norm, True)

  @property
  def _moments(self) -> list:
    """The variables that `_step` changes."""
    raise NotImplementedError

  def _measured(self, gradient: np.ndarray) -> tuple[np.ndarray, float]:
    """What `_step` takes, float [n], and the length of the gradient."""
    raise NotImplementedError

  def _largest_norm(self) -> float:
    """The length of a gradient from which on its step is not taken."""
    raise NotImplementedError

  def _step(self, factors: np.ndarray, move: np.ndarray, norm: float
            ) -> np.ndarray:
    """What to add to all variables, float [n]; remembers the gradient.

    Args:
      factors: [n], the negative rate of every entry.
      move, norm: what `_measured` returns.
    """
    raise NotImplementedError

  def _not_finite(self, loss, gradient) -> str:
    """Names what is NaN or infinite."""
    parts = [] if np.isfinite(loss) else ["the loss"]
    parts += [f"the gradient of {variable.name}"
              for part, variable in self.variables.split(gradient)
              if not np.all(np.isfinite(part))]
    return ", ".join(parts) or "the norm of the gradient"


class Adam(Optimizer):
  """Keras's Adam on every entry of the unconstrained variables.

  The paper says Adam; beta_1 = 0.9, beta_2 = 0.999 and epsilon = 1e-8 are
  recalled (Kingma & Ba 2015 have them too).

  Args:
    variables, multipliers, schedule: see `Optimizer`.
  """

  def __init__(self, variables: SamplerVariables, multipliers: np.ndarray,
               schedule: Schedule):
    super().__init__(variables, multipliers, schedule)
    self._adam, self._zeros = distribution.outside(self._make)

  def _make(self):
    # What Adam makes of zeros, at a rate of 1, is its step.
    zeros = keras.Variable(np.zeros(len(self._multipliers), np.float32))
    adam = keras.optimizers.Adam(
        1.0, beta_1=0.9, beta_2=0.999, epsilon=1e-8)
    adam.build([zeros])
    return adam, zeros

  @property
  def state(self) -> dict:
    return {"adam": self._moments}

  @property
  def _moments(self) -> list:
    return [variable.value for variable in self._adam.variables]

  def _measured(self, gradient):
    # What is not finite is told apart by `_largest_norm`.
    with np.errstate(over="ignore", invalid="ignore"):
      return gradient, float(np.linalg.norm(gradient.astype(np.float64)))

  def _largest_norm(self) -> float:
    return _LARGEST_SQUARED

  def _step(self, factors, move, norm):
    def update():
      self._zeros.assign(np.zeros_like(self._multipliers))
      self._adam.apply([tf.constant(move, tf.float32)], [self._zeros])
      return self._zeros.numpy()

    return -factors * distribution.outside(update)


class MetricAdam(Optimizer):
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
    variables, multipliers, schedule: see `Optimizer`. A rate is the share of
      the features' standard deviation by which a step of all variables together
      moves them.
    metric: the metric of the features.

  Attributes:
    moments: tf.Variables, float64: the first moment [n], the second moment, and
      the number of steps in them.
  """

  goes_back = True

  def __init__(self, variables: SamplerVariables, multipliers: np.ndarray,
               schedule: Schedule, metric: FeatureMetric):
    super().__init__(variables, multipliers, schedule)
    self.metric = metric
    self._factor, *self.moments = distribution.outside(lambda: [
        tf.Variable(value, dtype=tf.float64, trainable=False)
        for value in (1.0, np.zeros(len(multipliers)), 0.0, 0.0)])

  @property
  def state(self) -> dict:
    """What a checkpoint holds, by name."""
    return {"preconditioner": self.metric.inverse, "metric": self.metric.value,
            "measured": self.metric.count, "moments": self.moments,
            "factor": self._factor}

  @property
  def _moments(self) -> list:
    return self.moments

  def rate(self, step: int) -> float:
    return float(self._factor.numpy()) * super().rate(step)

  def begin(self, step: int) -> None:
    """Measures the metric where the variables are."""
    self.metric.measure(step)

  def go_back(self) -> None:
    """Forgets the moments and halves the rate."""
    for moment in self.moments:
      moment.assign(tf.zeros_like(moment))
    self._factor.assign(0.5 * self._factor)

  def _measured(self, gradient):
    return self.metric.natural(gradient)

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

  def _step(self, factors, move, norm):
    first, second, count = self.moments
    first.assign(_BETA_1 * first + (1 - _BETA_1) * move)
    second.assign(_BETA_2 * second + (1 - _BETA_2) * norm**2)
    count.assign_add(1)
    # Both means began at 0, which is divided out.
    mean = first.numpy() / (1 - _BETA_1 ** count.numpy())
    return factors * mean / self._root_of_square(second, count)


def make_schedule(kind: str, learning_rate: float, num_search_steps: int,
                  warmup_steps: int) -> Schedule:
  """The learning rate of every step.

  Args:
    kind: one of `SCHEDULES`: constant, or to 0 at the last step (cosine).
    learning_rate: the highest rate.
    num_search_steps: steps in all.
    warmup_steps: how many of them it first rises in, from 0.
  """
  if kind == "cosine":
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else learning_rate, num_search_steps - warmup_steps,
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps)
  return lambda step: learning_rate * min(1.0, step / max(warmup_steps, step))

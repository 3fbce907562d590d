"""How coefficients are made from variables: the paper's form, and ours.

A form says for every quantity of a sampler which variables it has and how its
value follows from them. Each method creates the variables of one quantity
through `learn(kind, name, start, constraint)` and returns a function that gives
the value, differentiable. The family decides where each quantity starts.

  PaperForm  as in the paper: weights and noise scales in (0, 1), cumulative
             softmaxes for +PRED and +TIME
  RealForm   every value is its start plus an offset; our choice
"""

from typing import Callable

import keras
import numpy as np
import tensorflow as tf

from ddss_tf.samplers import marginals as marginals_lib
from ddss_tf.samplers.coefficients import Coefficients
from ddss_tf.schedules import NoiseSchedule

Value = Callable[[], tf.Tensor]

# A sigmoid reaches neither 0 nor 1. Starts that are closer are moved here.
_SIGMOID_FLOOR = 1e-3
# The first increment of the times, as a part of T. A stride that starts at step
# 0 has an increment of 0, which no softmax expresses.
_TIME_FLOOR = 1e-4
# The least abar of VARS and of +PRED in the paper's form.
_LEAST_ABAR = 1e-12


@keras.saving.register_keras_serializable(package="ddss_tf")
class Interval(keras.constraints.Constraint):
  """Keeps a variable inside [lower, upper], elementwise."""

  def __init__(self, lower, upper):
    self.lower = np.asarray(lower, np.float32)
    self.upper = np.asarray(upper, np.float32)

  def __call__(self, value):
    return keras.ops.clip(value, self.lower, self.upper)

  def get_config(self):
    return {"lower": self.lower.tolist(), "upper": self.upper.tolist()}


@keras.saving.register_keras_serializable(package="ddss_tf")
class _Decreasing(keras.constraints.Constraint):
  """Keeps start + value inside [0, 1] and in decreasing order.

  An entry that would overtake those before it stops at the least of them. The
  later entry gives way, because less depends on the later times.
  """

  def __init__(self, start):
    self.start = np.asarray(start, np.float32)

  def __call__(self, value):
    value = keras.ops.clip(self.start + value, 0.0, 1.0)
    earlier = keras.ops.tril(keras.ops.ones((len(self.start),) * 2)) > 0
    ordered = keras.ops.min(
        keras.ops.where(earlier, value[None, :], 1.0), axis=1)
    return ordered - self.start

  def get_config(self):
    return {"start": self.start.tolist()}


def logit(p) -> np.ndarray:
  """The variable whose sigmoid is p, moved to a floor near 0 and 1."""
  p = np.clip(p, _SIGMOID_FLOOR, 1 - _SIGMOID_FLOOR)
  return np.log(p) - np.log1p(-p)


def variance_logits(abar) -> np.ndarray:
  """The `cumulative_logits` of 1 - abar, given with the noisiest first."""
  abar = np.where(abar == 0, _LEAST_ABAR, abar)
  return cumulative_logits((1 - abar)[::-1])


def cumulative_logits(values) -> np.ndarray:
  """Variables v for which cumsum(softmax([v; 1])) starts with `values`."""
  increments = np.diff(np.concatenate([[0.0], values, [1.0]]))
  return np.log(increments[:-1]) - np.log(increments[-1]) + 1.0


def cumulative(v) -> tuple[tf.Tensor, tf.Tensor]:
  """cumsum(softmax([v; 1])) without its last entry, which is 1; and 1 minus it.

  The second is summed on its own. At the end of a cosine schedule it is 2e-9,
  which subtracting from 1 in float32 would lose.
  """
  increments = tf.nn.softmax(tf.concat([v, [1.0]], axis=0))
  values = tf.cumsum(increments)[:-1]
  rest = tf.cumsum(increments, exclusive=True, reverse=True)[:-1]
  # x0_hat is divided by its root.
  return values, tf.maximum(rest, _LEAST_ABAR)


class PaperForm:
  """The paper's form (Watson et al. 2022), started at DDIM or DDPM.

  The weights of RDDIM (slides, 10 and 11) and GGDM (13 and 14) and their noise
  scales are sigmoids of variables. That they stay in (0, 1) is published; the
  sigmoid, and its floor of 1e-3 for starts at 0 or 1, are our choice.

  +PRED: s = cumsum(softmax([v; 1])), x0_hat = (x_t - sqrt(s_t) eps) /
  sqrt(1 - s_t). +TIME: tau = T cumsum(softmax([w; 1])), with a floor of 1e-4 T
  for the first increment. Both forms are recalled from the paper's text; they
  have no number on the slides.
  """

  name = "paper"
  starts = ("ddim", "ddpm")  # Weights of other solvers leave (0, 1).
  exact = False  # A start may be moved to the floors.

  def weight(self, learn, kind: str, name: str, start) -> Value:
    """A weight in (0, 1)."""
    variable = learn(kind, name, logit(start))
    return lambda: tf.sigmoid(variable.value)

  def bounded(self, learn, kind: str, name: str, start, least=0.0, most=np.inf,
              scale=None) -> Value:
    """A value in (0, scale), or (0, 1) without; ignores `least` and `most`."""
    del least, most
    if scale is None:
      return self.weight(learn, kind, name, start)
    variable = learn(kind, name, logit(start / scale))
    factor = np.asarray(scale, np.float32)
    return lambda: factor * tf.sigmoid(variable.value)

  def x0_hat(self, learn, schedule: NoiseSchedule, start: Coefficients):
    """+PRED: the coefficients of x0_hat, see above.

    In v, they are those of the same s, see `marginals.x0_of_marginals`.
    """
    abar = schedule.abar(start.times)
    variable = learn("pred", "pred", variance_logits(abar))

    def value():
      variance, rest = cumulative(variable.value)
      return marginals_lib.x0_of_marginals(
          tf.sqrt(rest)[::-1], variance[::-1], start.in_v)

    return value

  def times(self, learn, schedule: NoiseSchedule, start: Coefficients) -> Value:
    """+TIME: the times, see above."""
    total = schedule.num_train_steps
    fraction = start.times[::-1] / total
    floor = _TIME_FLOOR * (1 + np.arange(len(fraction)))
    variable = learn(
        "times", "times", cumulative_logits(np.maximum(fraction, floor)))

    def value():
      values, _ = cumulative(variable.value)
      # Rounding could reach T.
      return float(total) * tf.minimum(values, 1.0 - 1e-6)[::-1]

    return value


class RealForm:
  """Every value is its start plus an offset. Our choice; no published formula.

  The search begins with the images of the start, to float precision. Weights
  may leave [0, 1], as those of multistep solvers do. +PRED offsets both
  coefficients of x0_hat. +TIME adds (T - 1) w to the times, which stay inside
  [0, T - 1] and in order.
  """

  name = "real"
  starts = None  # Any.
  exact = True

  def weight(self, learn, kind: str, name: str, start) -> Value:
    """A weight without bounds."""
    variable = learn(kind, name, np.zeros_like(start))
    start = np.asarray(start, np.float32)
    return lambda: start + variable.value

  def bounded(self, learn, kind: str, name: str, start, least=0.0, most=np.inf,
              scale=None) -> Value:
    """A value in [least, most], where least is 0 or above."""
    del scale
    variable = learn(kind, name, np.zeros_like(start),
                     constraint=Interval(least - start, most - start))
    start = np.asarray(start, np.float32)
    return lambda: at_least_0(start + variable.value)

  def x0_hat(self, learn, schedule: NoiseSchedule, start: Coefficients):
    """+PRED: both coefficients of x0_hat."""
    del schedule
    state = self.weight(learn, "pred", "x0_from_state", start.x0_from_state)
    output = self.weight(
        learn, "pred", "x0_from_v" if start.in_v else "x0_from_eps",
        start.x0_from_output)
    return lambda: (state(), output())

  def times(self, learn, schedule: NoiseSchedule, start: Coefficients) -> Value:
    """+TIME: the times.

    Offsets are in units of T - 1. Otherwise times would be the only variables
    measured in training steps, and one learning rate could not serve all.
    """
    most = float(schedule.num_train_steps - 1)
    variable = learn(
        "times", "times", np.zeros(start.num_steps), constraint=_Decreasing(
            np.minimum(start.times / max(most, 1), 1)))
    first = start.numpy().times

    def value():
      times = first + most * variable.value
      # The constraint holds only up to the rounding of this sum. The gradient
      # passes the clip, or a time that reached its bound could not leave it.
      bounded = tf.clip_by_value(times, 0.0, most)
      return times + tf.stop_gradient(bounded - times)

    return value


FORMS = {form.name: form for form in (RealForm(), PaperForm())}


def at_least_0(value) -> tf.Tensor:
  """Cuts what rounding leaves below 0; its gradient at 0 is not 0."""
  return tf.maximum(value, 0.0)

"""What a foreign network is fed with and what its answer means.

Inside the library a network is eps(x_t, t): x_t of the variance-preserving
process of `schedules`, t an index of a training step. A network of another
process, another clock or another prediction is turned into that here, by exact
changes of variable, differentiable in x_t and t.
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from ddss_tf.schedules import NoiseSchedule

PREDICTIONS = ("eps", "x0", "v", "score")
PROCESSES = ("vp", "ve")
TIME_INPUTS = ("step", "sigma", "log_sigma")
# These give an exact image even where the state has hardly any signal. There
# the image would be lost in eps, which is a difference from the state.
EXACT = ("x0", "v")
# The relative rounding of two float32, with some room. A coefficient that is as
# close as this to that of the schedule is taken to be equal to it.
_ROUNDING = 3e-7


@dataclasses.dataclass(frozen=True)
class Convention:
  """How a network was trained to be called, and to answer.

  Its own noisy image is z = a x_0 + s eps: for "vp", a = alpha_t and
  s = sigma_t; for "ve" (variance exploding), a = 1 and s = sigma_t / alpha_t,
  the sigma of Song et al. (2021, https://arxiv.org/abs/2011.13456) and of
  Karras et al. (2022, https://arxiv.org/abs/2206.00364). Dividing the second by
  sqrt(1 + s^2) gives the first: x_t = alpha_t z, alpha_t = 1 / sqrt(1 + s^2).

  Attributes:
    prediction: "eps"; "x0"; "v" = alpha_t eps - sigma_t x0 (Salimans and Ho
      2022, https://arxiv.org/abs/2202.00512), for "vp" only; or "score", the
      gradient of log q(z) with respect to z in the network's own units, which
      is -eps / s. A network that returns s times the score predicts -eps: that
      is none of these.
    process: "vp" or "ve".
    time_input: what the network's clock shows: "step", the index t in
      [0, T - 1]; "sigma", the s of "ve"; or "log_sigma", ln of it.
    time_scale: the network is fed with time_scale * clock + time_offset.
      1 / (T - 1) makes steps of [0, T - 1] times of [0, 1]; 1 / T with the
      offset 1 / T makes them (t + 1) / T.
    time_offset: it is added to the scaled time.

  Raises:
    ValueError: a value that is none of these, or "v" with "ve".
  """

  prediction: str = "eps"
  process: str = "vp"
  time_input: str = "step"
  time_scale: float = 1.0
  time_offset: float = 0.0

  def __post_init__(self):
    for name, known in (("prediction", PREDICTIONS), ("process", PROCESSES),
                        ("time_input", TIME_INPUTS)):
      value = getattr(self, name)
      if value not in known:
        raise ValueError(
            f"{name} must be one of {', '.join(known)}. Received: {value!r}")
    if self.prediction == "v" and self.process == "ve":
      raise ValueError("prediction must be eps, x0 or score for the process "
                       "'ve'. Received: 'v'")
    for name in ("time_scale", "time_offset"):
      value = getattr(self, name)
      # type(), because True is an int.
      if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number. Received: {value!r}")
    if self.time_scale == 0:
      raise ValueError("time_scale must not be 0")

  def inputs(self, schedule: NoiseSchedule, x_t: tf.Tensor,
             t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """What to feed the network with.

    Args:
      schedule: the process in its "vp" form.
      x_t: float32 [B, H, W, C].
      t: float32 [B] or a scalar, in steps.

    Returns:
      The network's own noisy images and times, of the shapes of x_t and t.
    """
    x, clock = x_t, t
    if self.process == "ve" or self.time_input != "step":
      alpha_t, sigma_t = schedule.alpha_sigma(t)
      if self.process == "ve":
        x = x_t / alpha_t[..., None, None, None]
      if self.time_input != "step":
        clock = sigma_t / alpha_t
      if self.time_input == "log_sigma":
        clock = tf.math.log(clock)
    if (self.time_scale, self.time_offset) != (1, 0):
      clock = clock * self.time_scale + self.time_offset
    return x, clock

  def eps(self, schedule: NoiseSchedule, x_t: tf.Tensor, t: tf.Tensor,
          prediction: tf.Tensor) -> tf.Tensor:
    """The noise that a prediction means.

    Args:
      schedule: see `inputs`.
      x_t: see `inputs`.
      t: see `inputs`.
      prediction: float32 [B, H, W, C], the network's answer to `inputs`.

    Returns:
      float32 [B, H, W, C].
    """
    if self.prediction == "eps":
      return prediction
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_t = alpha_t[..., None, None, None]
    sigma_t = sigma_t[..., None, None, None]
    if self.prediction == "x0":
      return (x_t - alpha_t * prediction) / sigma_t
    if self.prediction == "v":
      return sigma_t * x_t + alpha_t * prediction
    own_sigma = sigma_t / alpha_t if self.process == "ve" else sigma_t
    return -own_sigma * prediction

  def of_prediction(self, schedule: NoiseSchedule,
                    coefficients):
    """`Coefficients` of x0_hat for the prediction itself instead of its eps.

    A chain with them is fed with what the network predicts. The images are the
    same but for rounding. With v, x0_hat = p x_t + q eps is

      (alpha_t + dp + dq sigma_t) x_t + (-sigma_t + dq alpha_t) v,
      dp = p - 1 / alpha_t,  dq = q + sigma_t / alpha_t,

    where dp and dq are 0 unless they have been learned. With x0 it is

      (dp + dq / sigma_t) x_t + (1 - dq alpha_t / sigma_t) x0.

    Through eps it would be the difference of two images 1 / alpha_t times as
    large; 1 / alpha_t is 2e4 at the end of a cosine schedule.

    Args:
      schedule: the process in its "vp" form.
      coefficients: for eps. NumPy arrays are computed at once; tensors, of any
        trailing dimensions, stay differentiable.

    Returns:
      Coefficients whose `x0_from_eps` multiplies the prediction. If that is eps
      or a score, they are the ones that were given.
    """
    if self.prediction not in EXACT:
      return coefficients
    arrays = (coefficients.times, coefficients.x0_from_state,
              coefficients.x0_from_eps)
    if isinstance(coefficients.times, np.ndarray):
      with tf.init_scope():  # At once, even if the caller is tracing.
        values = [value.numpy()
                  for value in self._of_prediction(schedule, *arrays)]
    else:
      values = self._of_prediction(schedule, *arrays)
    return coefficients._replace(
        x0_from_state=values[0], x0_from_eps=values[1])

  def _of_prediction(self, schedule, times, p, q):
    """See `of_prediction`; float32, computed in float64."""
    p, q = tf.cast(p, tf.float64), tf.cast(q, tf.float64)
    alpha_t, sigma_t = schedule.alpha_sigma(times, tf.float64)
    dp = _difference(p, 1 / alpha_t)
    dq = _difference(q, -sigma_t / alpha_t)
    if self.prediction == "v":
      own = alpha_t + dp + dq * sigma_t, -sigma_t + dq * alpha_t
    else:
      own = dp + dq / sigma_t, 1 - dq * alpha_t / sigma_t
    return [tf.cast(value, tf.float32) for value in own]

  def non_default(self) -> dict:
    """The attributes that are not as they are by default, for cards."""
    return {field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default}


def _difference(value, reference):
  """value - reference, 0 if that is rounding; its gradient passes anyway."""
  difference = value - reference
  is_rounding = tf.abs(difference) <= _ROUNDING * tf.abs(reference)
  return difference - tf.stop_gradient(
      tf.where(is_rounding, difference, tf.zeros_like(difference)))

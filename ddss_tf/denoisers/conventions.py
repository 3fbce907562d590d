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

PREDICTIONS = ("eps", "x0", "v", "score", "flow", "flow_reversed")
PROCESSES = ("vp", "ve", "flow")
TIME_INPUTS = ("step", "sigma", "log_sigma", "flow", "variance", "sigma_vp")
# These give an exact image even where the state has hardly any signal. There
# the image would be lost in eps, which is a difference from the state.
EXACT = ("x0", "v", "flow", "flow_reversed")
_FLOWS = ("flow", "flow_reversed")
# What alpha is taken for where eps is made to v and it is 0: there eps is the
# state itself, whatever the network, and no image can be told from it.
_LEAST_ALPHA = 1e-6
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
  For "flow" (flow matching, see `schedules.FlowSchedule`), a = 1 - s and
  s = sigma_t / (alpha_t + sigma_t): x_t = (alpha_t + sigma_t) z.

  Stable Diffusion 3 has the process "flow", the time_input "flow" with a
  time_scale of 1000, and the prediction "flow". A network that goes the other
  way, from noise at 0 to images at 1 as SiT does, has a time_scale of -1, a
  time_offset of 1 and the prediction "flow_reversed".

  Attributes:
    prediction: "eps"; "x0"; "v" = alpha_t eps - sigma_t x0 (Salimans and Ho
      2022, https://arxiv.org/abs/2202.00512), not for "ve"; "flow", the
      velocity u = dz / ds = eps - x0 of a flow, not for "ve" either;
      "flow_reversed", which is -u; or "score", the
      gradient of log q(z) with respect to z in the network's own units, which
      is -eps / s. A network that returns s times the score predicts -eps: that
      is none of these.
    process: "vp", "ve" or "flow".
    time_input: what the network's clock shows: "step", the index t in
      [0, T - 1]; "sigma", the s of "ve"; "log_sigma", ln of it; "flow", the
      s of "flow", in [0, 1]; "sigma_vp", sigma_t; or "variance", its square.
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
    if self.prediction in ("v", *_FLOWS) and self.process == "ve":
      raise ValueError("prediction must be eps, x0 or score for the process "
                       f"'ve'. Received: {self.prediction!r}")
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
    if self.process != "vp" or self.time_input != "step":
      alpha_t, sigma_t = schedule.alpha_sigma(t)
      if self.process == "ve":
        x = x_t / alpha_t[..., None, None, None]
      if self.process == "flow":
        x = x_t / (alpha_t + sigma_t)[..., None, None, None]
      if self.time_input == "flow":
        clock = sigma_t / (alpha_t + sigma_t)
      elif self.time_input in ("variance", "sigma_vp"):
        clock = sigma_t**2 if self.time_input == "variance" else sigma_t
      elif self.time_input != "step":
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
    if self.prediction in _FLOWS:
      return (x_t + alpha_t * self._velocity(prediction)) / (alpha_t + sigma_t)
    own_sigma = sigma_t
    if self.process != "vp":
      own_sigma /= alpha_t if self.process == "ve" else alpha_t + sigma_t
    return -own_sigma * prediction

  def output(self, schedule: NoiseSchedule, x_t: tf.Tensor, t: tf.Tensor,
             prediction: tf.Tensor) -> tf.Tensor:
    """What a chain is fed with that has the coefficients of `of_prediction`.

    That is the prediction itself if it is x0 or v. A flow's u is made to

      v = ((alpha_t - sigma_t) x_t + u) / (alpha_t + sigma_t),

    which at pure noise is -x0. All others are made to eps. The arguments are
    those of `eps`.
    """
    if self.prediction not in EXACT:
      return self.eps(schedule, x_t, t, prediction)
    if self.prediction not in _FLOWS:
      return prediction
    alpha_t, sigma_t = (value[..., None, None, None]
                        for value in schedule.alpha_sigma(t))
    return ((alpha_t - sigma_t) * x_t + self._velocity(prediction)) / (
        alpha_t + sigma_t)

  def _velocity(self, prediction):
    """u of a flow's prediction."""
    return prediction if self.prediction == "flow" else -prediction

  def of_prediction(self, schedule: NoiseSchedule,
                    coefficients):
    """`Coefficients` of x0_hat for what `output` gives instead of eps or v.

    The images are the same but for rounding. With v, which is also the output
    of a flow's network, x0_hat = p x_t + q eps is

      (alpha_t + dp + dq sigma_t) x_t + (-sigma_t + dq alpha_t) v,
      dp = p - 1 / alpha_t,  dq = q + sigma_t / alpha_t,

    where dp and dq are 0 unless they have been learned. With x0 it is

      (dp + dq / sigma_t) x_t + (1 - dq alpha_t / sigma_t) x0.

    Through eps it would be the difference of two images 1 / alpha_t times as
    large; 1 / alpha_t is 2e4 at the end of a cosine schedule.

    Coefficients in v (`Coefficients.in_v`) stay as they are for an output in v.
    With x0, x0_hat = p x_t + q v is

      (dp + dq alpha_t / sigma_t) x_t + (1 - dq / sigma_t) x0,
      dp = p - alpha_t,  dq = q + sigma_t,

    and with eps it is

      (1 / alpha_t + dp - dq sigma_t / alpha_t) x_t
      + (-sigma_t + dq) / alpha_t eps.

    Args:
      schedule: the process in its "vp" form.
      coefficients: for eps, or for v. NumPy arrays are computed at once;
        tensors, of any trailing dimensions, stay differentiable.

    Returns:
      Coefficients whose `x0_from_output` multiplies what `output` gives. They
      are the ones that were given if these are in it already: in eps, for eps
      or a score; in v, for v or a flow's prediction.
    """
    in_v = coefficients.in_v
    if self.prediction in (("v", *_FLOWS) if in_v else ("eps", "score")):
      return coefficients
    arrays = (coefficients.times, coefficients.x0_from_state,
              coefficients.x0_from_output)
    change = self._of_v if in_v else self._of_prediction
    if isinstance(coefficients.times, np.ndarray):
      with tf.init_scope():  # At once, even if the caller is tracing.
        values = [value.numpy() for value in change(schedule, *arrays)]
    else:
      values = change(schedule, *arrays)
    return coefficients._replace(
        x0_from_state=values[0], x0_from_eps=values[1], x0_from_v=None)

  def _of_prediction(self, schedule, times, p, q):
    """See `of_prediction`; float32, computed in float64."""
    p, q = tf.cast(p, tf.float64), tf.cast(q, tf.float64)
    alpha_t, sigma_t = schedule.alpha_sigma(times, tf.float64)
    dp = _difference(p, 1 / alpha_t)
    dq = _difference(q, -sigma_t / alpha_t)
    if self.prediction == "x0":
      own = dp + dq / sigma_t, 1 - dq * alpha_t / sigma_t
    else:
      own = alpha_t + dp + dq * sigma_t, -sigma_t + dq * alpha_t
    return [tf.cast(value, tf.float32) for value in own]

  def _of_v(self, schedule, times, p, q):
    """See `of_prediction`; float32, computed in float64."""
    p, q = tf.cast(p, tf.float64), tf.cast(q, tf.float64)
    alpha_t, sigma_t = schedule.alpha_sigma(times, tf.float64)
    dp, dq = _difference(p, alpha_t), _difference(q, -sigma_t)
    if self.prediction == "x0":
      own = dp + dq * alpha_t / sigma_t, 1 - dq / sigma_t
    else:
      alpha_t = tf.maximum(alpha_t, tf.constant(_LEAST_ALPHA, tf.float64))
      own = 1 / alpha_t + dp - dq * sigma_t / alpha_t, (dq - sigma_t) / alpha_t
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

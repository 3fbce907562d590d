"""The sampler families: variables, and the map from them to `Coefficients`.

A family never samples: `chain.run_chain` does, for all of them. Symbols follow
the paper (Watson et al. 2022, https://arxiv.org/abs/2202.05830); where it
publishes no formula the docstring says "our choice".

To add a family, subclass `Sampler`, create its variables with `_learn`, write
`coefficients`, and give it a name in `make_sampler`.
"""

import gin
import keras
import numpy as np
import tensorflow as tf

from ddss_tf import chain
from ddss_tf.coefficients import Coefficients
from ddss_tf.errors import UserError
from ddss_tf.schedules import NoiseSchedule

KINDS = ("weights", "pred", "times", "noise_scales")
PARAMETERISATIONS = ("real", "paper")

# A sigmoid reaches neither 0 nor 1: starts closer than this are moved here.
_SIGMOID_FLOOR = 1e-3
# The first increment of the times, as a part of T: a stride that starts at
# step 0 has an increment of 0, which no softmax expresses.
_TIME_FLOOR = 1e-4
# Noise scales are linear in their variable below this and exponential above.
_NOISE_KNEE = 1e-2


def ddim_coefficients(schedule: NoiseSchedule, times,
                      eta: float = 0.0) -> Coefficients:
  """DDIM on a grid of times; eta = 1 is DDPM, eta = 0 is deterministic.

  Song et al. (2021, https://arxiv.org/abs/2010.02502), equations 12 and 16,
  with eps replaced by its expression in x_t and x0_hat, so that the step is
  written in states and x0_hat alone. The last step goes to abar = 1.

  Args:
    schedule: the forward process.
    times: [K], strictly decreasing, in [0, T - 1].
    eta: scale of the noise, at least 0.

  Returns:
    Coefficients in float64 NumPy.
  """
  times = np.asarray(times, np.float64)
  num_steps = len(times)
  abar_t = schedule.abar(times)
  abar_s = np.append(abar_t[1:], 1.0)
  sigma = eta * np.sqrt((1 - abar_s) / (1 - abar_t)) * np.sqrt(
      1 - abar_t / abar_s)
  # At abar_s = 1 this is 0 up to rounding, so the last step returns x0_hat.
  eps_weight = np.sqrt(np.maximum(1 - abar_s - sigma**2, 0))
  from_state = eps_weight / np.sqrt(1 - abar_t)
  return Coefficients(
      times=times,
      x0_from_state=1 / np.sqrt(abar_t),
      x0_from_eps=-np.sqrt(1 - abar_t) / np.sqrt(abar_t),
      state_weights=np.diag(from_state),
      x0_weights=np.sqrt(abar_s) - from_state * np.sqrt(abar_t),
      noise_scales=np.where(np.arange(num_steps) < num_steps - 1, sigma, 0),
  )


def marginals(state_weights, x0_weights, noise_scales, first_mean, first_std):
  """Theorem 1: the marginals q(x_k | x_0) = N(a_k x_0, v_k I) of a GGDM.

  With M the strictly triangular matrix of the weights of earlier states, one
  triangular solve replaces the paper's recursion (Watson et al. 2022, appendix
  A.1): X = (I - M)^{-1} [mu_0 | diag(sigma)], a = X[:, 0], v = sum_j X[:, j]^2.

  Args:
    state_weights: [K, K]; row k makes state k + 1, the last row is not used.
    x0_weights: [K], likewise.
    noise_scales: [K], likewise.
    first_mean: scalar, weight of x_0 in the noisiest state.
    first_std: scalar, standard deviation of the noisiest state.

  Returns:
    a and v, [K] each, noisiest state first.
  """
  num_steps = state_weights.shape[0]
  # Row k of M belongs to state k, made by row k - 1 of the coefficients.
  lower = tf.concat([tf.zeros([1, num_steps]), state_weights[:-1]], axis=0)
  mean = tf.concat([tf.reshape(first_mean, [1]), x0_weights[:-1]], axis=0)
  std = tf.concat([tf.reshape(first_std, [1]), noise_scales[:-1]], axis=0)
  solution = tf.linalg.triangular_solve(
      tf.eye(num_steps) - lower,
      tf.concat([mean[:, None], tf.linalg.diag(std)], axis=1))
  return solution[:, 0], tf.reduce_sum(solution[:, 1:] ** 2, axis=1)


class _Interval(keras.constraints.Constraint):
  """Keeps a variable inside [lower, upper], elementwise."""

  def __init__(self, lower, upper):
    self.lower = np.asarray(lower, np.float32)
    self.upper = np.asarray(upper, np.float32)

  def __call__(self, value):
    return keras.ops.clip(value, self.lower, self.upper)

  def get_config(self):
    return {"lower": self.lower.tolist(), "upper": self.upper.tolist()}


def _logit(p):
  p = np.clip(p, _SIGMOID_FLOOR, 1 - _SIGMOID_FLOOR)
  return np.log(p) - np.log1p(-p)


def _cumulative_logits(values):
  """Variables v for which cumsum(softmax([v; 1])) starts with `values`."""
  increments = np.diff(np.concatenate([[0.0], values, [1.0]]))
  return np.log(increments[:-1]) - np.log(increments[-1]) + 1.0


def _cumulative(v):
  """cumsum(softmax([v; 1])) without its last entry, which is 1."""
  values = tf.cumsum(tf.nn.softmax(tf.concat([v, [1.0]], axis=0)))[:-1]
  # Rounding could reach 1 and beyond, and x0_hat would divide by 0. The limit
  # is below abar_T of any schedule in use (4e-5 for the linear one).
  return tf.minimum(values, 1.0 - 1e-6)


class Sampler(keras.layers.Layer):
  """Base of the families: K steps on a forward process.

  Args:
    schedule: the forward process of the denoiser.
    num_steps: K, from 1 to T.
    label: what tables and pictures call it.

  Call arguments:
    x_T, step_noise: as in `chain.run_chain`.
    eps_fn: likewise.

  Returns:
    Images, float32 [B, H, W, C].

  Raises:
    ValueError: K is out of range.
  """

  def __init__(self, schedule: NoiseSchedule, num_steps: int, label: str,
               **kwargs):
    # Keras would number the instances, and configurations would differ.
    super().__init__(**{"name": "sampler", **kwargs})
    if not 1 <= num_steps <= schedule.num_train_steps:
      raise ValueError(
          f"num_steps must be from 1 to {schedule.num_train_steps}, the "
          f"training steps of the model. Received: num_steps={num_steps}")
    self.schedule = schedule
    self.num_steps = num_steps
    self.label = label
    self.variables_by_kind = {}
    self.built = True

  def _learn(self, kind: str, name: str, start, constraint=None):
    """Creates a variable of one of `KINDS`, which share a learning rate."""
    start = np.asarray(start, np.float32)
    variable = self.add_weight(
        shape=start.shape, name=name, constraint=constraint,
        initializer=lambda shape, dtype=None: tf.constant(start, dtype))
    self.variables_by_kind.setdefault(kind, []).append(variable)
    return variable

  def coefficients(self) -> Coefficients:
    """The sampler's coefficients as float32 tensors, differentiable."""
    raise NotImplementedError(f"{type(self).__name__} must map its variables "
                              "to coefficients")

  def call(self, x_T, step_noise=None, eps_fn=None):
    return chain.run_chain(eps_fn, self.coefficients(), x_T, step_noise)

  def get_config(self):
    return {**super().get_config(), "num_steps": self.num_steps,
            "label": self.label}


class FixedSampler(Sampler):
  """A sampler without variables: given coefficients.

  Args:
    schedule: the forward process of the denoiser.
    coefficients: NumPy, any precision; used in float32.
    label: what tables and pictures call it.
  """

  def __init__(self, schedule, coefficients: Coefficients, label: str,
               **kwargs):
    super().__init__(schedule, coefficients.num_steps, label, **kwargs)
    coefficients.validate()
    if np.max(coefficients.times) > schedule.num_train_steps:
      raise UserError(
          f"times must not exceed {schedule.num_train_steps}, the training "
          f"steps of the model. Received: {np.max(coefficients.times):g}")
    self._values = coefficients.numpy()

  def coefficients(self):
    return Coefficients(*(tf.constant(value) for value in self._values))


class DDIM(FixedSampler):
  """DDIM with any eta on a stride of training steps; eta = 1 is DDPM.

  Args:
    schedule: the forward process of the denoiser.
    num_steps: K.
    stride: "linear" or "quadratic", see `NoiseSchedule.stride`.
    eta: 0 deterministic, 1 DDPM (Song et al. 2021, equation 16).
    label: what tables and pictures call it; made from the others if None.
  """

  def __init__(self, schedule, num_steps, stride="linear", eta=0.0, label=None,
               **kwargs):
    if eta < 0:
      raise ValueError(f"eta must be at least 0. Received: eta={eta}")
    if label is None:
      name = {0.0: "DDIM", 1.0: "DDPM"}.get(float(eta), f"DDIM(eta={eta:g})")
      label = f"{name} {stride}"
    super().__init__(
        schedule,
        ddim_coefficients(schedule, schedule.stride(stride, num_steps), eta),
        label, **kwargs)
    self.stride = stride
    self.eta = eta

  def get_config(self):
    return {**super().get_config(), "stride": self.stride, "eta": self.eta}


class GGDM(Sampler):
  """Generalised Gaussian diffusion model, with +PRED and +TIME.

  Each state may use every earlier state and x0_hat (Watson et al. 2022,
  section 3; the authors' slides call it GDDIM). Without `pred` the map from
  state and eps to x0_hat follows from the other coefficients by Theorem 1
  (`marginals`), the mean and deviation of the noisiest state being learned too;
  with `pred` it is learned freely.

  parameterisation="paper", the published constraints:
    weights and noise scales are sigmoids of their variables (the sigmoid is our
    choice). PRED: s = cumsum(softmax([v; 1])),
    x0_hat = (x_t - sqrt(s_t) eps) / sqrt(1 - s_t). TIME:
    tau = T cumsum(softmax([w; 1])). A sigmoid reaches neither 0 nor a negative
    weight, so the start is DDIM up to a floor of 1e-3 in every coefficient
    (and of 1e-4 T in the first time).

  parameterisation="real", our choice, past the paper:
    weights are real offsets from the start, which is exact. PRED scales both
    coefficients of x0_hat, each with a variable of its own:
    x0_hat = p (1 + v) x_t + q (1 + w) eps. Noise scales are
    0.01 (exp(u) - 1) with u >= 0: exactly 0 can be left, and large scales move
    by ratios. TIME adds T w to the start, kept inside [0, T - 1]. Optionally
    the last row is free as well, so the image may be a mixture.

  Args:
    schedule: the forward process of the denoiser.
    num_steps: K.
    pred: learn the coefficients of x0_hat.
    time: learn the times fed to the network.
    parameterisation: "real" or "paper".
    stride: the stride of the DDIM it starts at.
    eta: the eta of the DDIM it starts at.
    free_last_row: learn the weights of the last step ("real" only).
    label: what tables and pictures call it; made from the others if None.

  Raises:
    ValueError: an argument is out of its range.
  """

  def __init__(self, schedule, num_steps, pred=False, time=False,
               parameterisation="real", stride="linear", eta=0.0,
               free_last_row=False, label=None, **kwargs):
    if parameterisation not in PARAMETERISATIONS:
      raise ValueError(
          f"parameterisation must be one of {', '.join(PARAMETERISATIONS)}. "
          f"Received: {parameterisation!r}")
    if free_last_row and parameterisation == "paper":
      raise ValueError("free_last_row needs parameterisation='real': the "
                       "paper's last step returns x0_hat")
    if eta < 0:
      raise ValueError(f"eta must be at least 0. Received: eta={eta}")
    if label is None:
      label = "GGDM" + ("+PRED" if pred else "") + ("+TIME" if time else "")
    super().__init__(schedule, num_steps, label, **kwargs)
    self.pred = pred
    self.time = time
    self.parameterisation = parameterisation
    self.stride = stride
    self.eta = eta
    self.free_last_row = free_last_row

    start = ddim_coefficients(schedule, schedule.stride(stride, num_steps), eta)
    self._start = start
    # The learned entries: all rows but the last, which returns x0_hat.
    self._rows = num_steps if free_last_row else num_steps - 1
    self._entries = np.argwhere(np.tril(np.ones((num_steps, num_steps))))
    self._entries = self._entries[self._entries[:, 0] < self._rows]
    create = self._create_real if parameterisation == "real" else (
        self._create_paper)
    create(start, schedule.abar(start.times))

  def get_config(self):
    return {
        **super().get_config(),
        "pred": self.pred,
        "time": self.time,
        "parameterisation": self.parameterisation,
        "stride": self.stride,
        "eta": self.eta,
        "free_last_row": self.free_last_row,
    }

  def _create_real(self, start, abar):
    rows, total = self._rows, self.schedule.num_train_steps
    self._state = self._learn(
        "weights", "state_weights", np.zeros(len(self._entries)))
    self._x0 = self._learn("weights", "x0_weights", np.zeros(rows))
    self._noise = self._learn(
        "noise_scales", "noise_scales",
        np.log1p(start.noise_scales[:-1] / _NOISE_KNEE),
        constraint=keras.constraints.NonNeg())
    if self.pred:
      self._pred_state = self._learn(
          "pred", "x0_from_state", np.zeros(self.num_steps))
      self._pred_eps = self._learn(
          "pred", "x0_from_eps", np.zeros(self.num_steps))
    else:
      self._first_mean = self._learn("weights", "first_mean", 0.0)
      # Never 0: the marginal variances of all states would lose their root.
      self._first_std = self._learn(
          "weights", "first_std", 0.0,
          constraint=_Interval(1e-2 - np.sqrt(1 - abar[0]), np.inf))
    if self.time:
      self._times = self._learn(
          "times", "times", np.zeros(self.num_steps),
          constraint=_Interval(-start.times / total,
                               (total - 1 - start.times) / total))

  def _create_paper(self, start, abar):
    state = start.state_weights[tuple(self._entries.T)]
    self._state = self._learn("weights", "state_weights", _logit(state))
    self._x0 = self._learn(
        "weights", "x0_weights", _logit(start.x0_weights[:-1]))
    self._noise = self._learn(
        "noise_scales", "noise_scales", _logit(start.noise_scales[:-1]))
    if self.pred:
      self._pred = self._learn(
          "pred", "pred", _cumulative_logits((1 - abar)[::-1]))
    else:
      self._first_mean = self._learn(
          "weights", "first_mean", _logit(np.sqrt(abar[0])))
      self._first_std = self._learn(
          "weights", "first_std", _logit(np.sqrt(1 - abar[0])))
    if self.time:
      fraction = start.times[::-1] / self.schedule.num_train_steps
      floor = _TIME_FLOOR * (1 + np.arange(self.num_steps))
      self._times = self._learn(
          "times", "times", _cumulative_logits(np.maximum(fraction, floor)))

  def coefficients(self):
    real = self.parameterisation == "real"
    start = self._start.numpy()
    steps = self.num_steps

    def pad(value, last):
      return tf.concat([value, last[value.shape[0]:]], axis=0)

    entries = tf.scatter_nd(
        self._entries,
        self._state.value if real else tf.sigmoid(self._state.value),
        (steps, steps))
    # The start's last row is zero: DDIM ends in x0_hat.
    state_weights = start.state_weights + entries if real else entries
    if real:
      x0_weights = pad(start.x0_weights[:self._rows] + self._x0.value,
                       start.x0_weights)
      noise = _NOISE_KNEE * tf.math.expm1(self._noise.value)
    else:
      x0_weights = pad(tf.sigmoid(self._x0.value), start.x0_weights)
      noise = tf.sigmoid(self._noise.value)
    noise_scales = tf.concat([noise, [0.0]], axis=0)

    if self.pred and real:
      x0_from_state = start.x0_from_state * (1.0 + self._pred_state.value)
      x0_from_eps = start.x0_from_eps * (1.0 + self._pred_eps.value)
    else:
      if self.pred:
        variance = _cumulative(self._pred.value)[::-1]
        mean = tf.sqrt(1.0 - variance)
      else:
        mean, variance = marginals(
            state_weights, x0_weights, noise_scales, *self._first())
      x0_from_state = 1.0 / mean
      x0_from_eps = -tf.sqrt(variance) / mean

    times = tf.constant(start.times)
    if self.time:
      total = float(self.schedule.num_train_steps)
      times = (times + total * self._times.value if real
               else total * _cumulative(self._times.value)[::-1])
    return Coefficients(times, x0_from_state, x0_from_eps, state_weights,
                        x0_weights, noise_scales)

  def _first(self):
    """Mean weight and standard deviation of the noisiest state."""
    if self.parameterisation == "paper":
      return (tf.sigmoid(self._first_mean.value),
              tf.sigmoid(self._first_std.value))
    abar = self.schedule.abar(self._start.times[0])
    return (np.float32(np.sqrt(abar)) + self._first_mean.value,
            np.float32(np.sqrt(1 - abar)) + self._first_std.value)


FAMILIES = ("ddpm", "ddim", "ggdm", "ggdm+pred", "ggdm+time", "ggdm+pred+time")


@gin.configurable
def make_sampler(schedule: NoiseSchedule, family: str = gin.REQUIRED,
                 num_steps: int = gin.REQUIRED, **options) -> Sampler:
  """Makes a sampler from its name.

  Args:
    schedule: the forward process of the denoiser.
    family: one of `FAMILIES`.
    num_steps: K, from 1 to T.
    **options: of the family's class: `DDIM` or `GGDM`.

  Returns:
    The sampler.

  Raises:
    UserError: unknown family, or options that it does not accept.
  """
  if family not in FAMILIES:
    raise UserError(f"sampler family must be one of {', '.join(FAMILIES)}. "
                    f"Received: {family!r}")
  if isinstance(num_steps, bool) or not isinstance(num_steps, int):
    raise UserError(
        f"num_steps must be a whole number. Received: {num_steps!r}")
  try:
    if family == "ddpm":
      return DDIM(schedule, num_steps, **{"eta": 1.0, **options})
    if family == "ddim":
      return DDIM(schedule, num_steps, **options)
    return GGDM(schedule, num_steps, pred="+pred" in family,
                time="+time" in family, **options)
  except (TypeError, ValueError) as error:
    raise UserError(f"sampler {family!r}: {error}") from error

"""The forward process of a model.

Notation, used in the whole package: `alpha_t` and `sigma_t` are the scale of
the image and the standard deviation of the noise in
q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I); the process is variance preserving,
alpha_t^2 + sigma_t^2 = 1, and `abar` = alpha_t^2. `t` is the index of a
training step, 0 ... T - 1 (0 the cleanest), which is also what the network is
fed with; fractional values are allowed. A step goes from the noisier `t` to the
cleaner `s`. The clean image itself has abar = 1.

Tables are float64 NumPy. Only what a gradient must pass through is TensorFlow.
"""

import functools
from typing import Mapping

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ddss_tf import bindings

# The least log(alpha / sigma) at which a named stride begins. There 1 / alpha
# is 164: an error of 1 % in eps is one of 1.6 in x0_hat. The linear schedule of
# Ho et al. ends at -5.06; DPM-Solver's users cut cosine ones at -5.1.
NOISIEST_LOG_SNR = -5.1
# What abar = 0 is taken for, so that log-SNR and 1 / alpha stay finite.
_ZERO_ABAR = 1e-12
# More is a mistake or from a damaged file, and would fill the memory.
_MOST_STEPS = 10**6


class NoiseSchedule:
  """A discrete variance-preserving forward process, continued between steps.

  Between training steps log abar is interpolated linearly, exact at integers
  (our choice; so do the DPM-Solver family's discrete schedules).

  Args:
    betas: float [T], the variances of the T training steps, each in (0, 1).
      The last one may be 1. The process then ends in pure noise, as one that is
      rescaled to zero SNR does, and its last abar is taken for 1e-12.

  Raises:
    ValueError: `betas` is empty, not one-dimensional, or leaves these bounds;
      or no signal is left before a last beta of 1.
  """

  # Whether samplers on it are written in v, see `coefficients`.
  in_v = False

  def __init__(self, betas: npt.ArrayLike):
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not betas.size:
      raise ValueError(
          f"betas must be a non-empty list. Received: shape {betas.shape}")
    if not (np.all((betas > 0) & (betas <= 1)) and np.all(betas[:-1] < 1)):
      raise ValueError(
          "betas must lie strictly between 0 and 1, but for the last, which may "
          f"be 1. Received: {betas.min():g} ... {betas.max():g}")
    self.betas = betas
    kept = betas[:-1] if betas[-1] == 1 else betas
    self._log_abar = np.cumsum(np.log1p(-kept))
    if betas[-1] == 1:
      self._log_abar = np.append(self._log_abar, np.log(_ZERO_ABAR))
    if np.any(np.diff(self._log_abar) >= 0):
      raise ValueError(
          "betas must leave some signal at every step but the last. Received: "
          f"abar of {np.exp(self._log_abar[-2]):g} before a last beta of 1")

  @classmethod
  def linear(cls, num_train_steps: int = 1000, beta_start: float = 1e-4,
             beta_end: float = 0.02) -> "NoiseSchedule":
    """Betas in equal steps (Ho et al. 2020, section 4)."""
    return cls(np.linspace(beta_start, beta_end, num_train_steps))

  @classmethod
  def scaled_linear(cls, num_train_steps: int = 1000, beta_start: float = 1e-4,
                    beta_end: float = 0.02) -> "NoiseSchedule":
    """Betas whose square roots go in equal steps (latent diffusion models)."""
    return cls(np.linspace(
        beta_start**0.5, beta_end**0.5, num_train_steps) ** 2)

  @classmethod
  def cosine(cls, num_train_steps: int = 1000, offset: float = 0.008,
             max_beta: float = 0.999) -> "NoiseSchedule":
    """abar follows a squared cosine (Nichol and Dhariwal 2021, equation 17)."""
    angle = (np.arange(num_train_steps + 1) / num_train_steps + offset) / (
        1 + offset) * np.pi / 2
    abar = np.cos(angle) ** 2
    return cls(np.minimum(1 - abar[1:] / abar[:-1], max_beta))

  @classmethod
  def of_alpha_bar(cls, alpha_bar: npt.ArrayLike) -> "NoiseSchedule":
    """The process with these abar, float [T], which fall inside (0, 1)."""
    alpha_bar = np.asarray(alpha_bar, np.float64)
    if alpha_bar.ndim != 1 or not alpha_bar.size:
      raise ValueError("alpha_bar must be a non-empty list. "
                       f"Received: shape {alpha_bar.shape}")
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    if not np.all((0 < alpha_bar) & (alpha_bar < before)):
      raise ValueError("alpha_bar must fall inside (0, 1). Received: "
                       f"{alpha_bar[:3].tolist()} ... {alpha_bar[-1]:g}")
    return cls(1 - alpha_bar / before)

  @classmethod
  def cosine_angle(cls, num_train_steps: int = 1000,
                   max_signal_rate: float = 0.95,
                   min_signal_rate: float = 0.02) -> "NoiseSchedule":
    """alpha is the cosine of an angle in equal steps, between two signal rates.

    It is the schedule of the DDIM example of keras.io, whose rates are the
    defaults, at T equal steps of its continuous time: alpha_t = cos(a_t), with
    cos(a_0) = max_signal_rate and cos(a_{T-1}) = min_signal_rate.
    """
    if not 0 < min_signal_rate < max_signal_rate < 1:
      raise ValueError(
          "signal rates must be in (0, 1), the least below the largest. "
          f"Received: {min_signal_rate} and {max_signal_rate}")
    angles = np.linspace(np.arccos(max_signal_rate),
                         np.arccos(min_signal_rate), num_train_steps)
    return cls.of_alpha_bar(np.cos(angles) ** 2)

  def rescaled_to_zero_snr(self) -> "NoiseSchedule":
    """The same process, shifted and stretched so that it ends in pure noise.

    Lin et al. (2023, https://arxiv.org/abs/2305.08891), algorithm 1: sqrt(abar)
    becomes 0 at step T - 1 and stays as it is at step 0.
    """
    root = np.sqrt(self.abar(np.arange(self.num_train_steps)))
    if len(root) < 2:
      raise ValueError("a schedule must have two steps to be rescaled. "
                       f"Received: {len(root)}")
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = np.concatenate([[1.0], root**2])
    return NoiseSchedule(1 - abar[1:] / abar[:-1])

  def __repr__(self):
    last = self.num_train_steps - 1
    return (f"{type(self).__name__}(T={last + 1}, alpha_bar from "
            f"{float(self.abar(0)):.4g} to {float(self.abar(last)):.4g})")

  @property
  def num_train_steps(self) -> int:
    """T."""
    return len(self.betas)

  @functools.cached_property
  def num_visible_steps(self) -> int:
    """How many training steps are above `NOISIEST_LOG_SNR`; at least 1."""
    log_snr = self.log_snr(np.arange(self.num_train_steps))
    return max(int(np.sum(log_snr >= NOISIEST_LOG_SNR)), 1)

  def abar(self, t: npt.ArrayLike) -> np.ndarray:
    """alpha_t^2 in float64 at times `t`, each in [0, T - 1]."""
    t = np.asarray(t, np.float64)
    return np.exp(np.interp(t, np.arange(self.num_train_steps),
                            self._log_abar))

  def card(self) -> dict:
    """What `from_card` makes the same schedule of, exactly; for JSON."""
    return {"betas": self.betas.tolist()}

  def alpha_sigma(self, t: tf.Tensor, dtype: tf.DType = tf.float32
                  ) -> tuple[tf.Tensor, tf.Tensor]:
    """(alpha_t, sigma_t) at times `t`, differentiable in `t`.

    Args:
      t: float, any shape, in [0, T - 1].
      dtype: what they are computed in.
    """
    log_abar = interpolated(self._log_abar, t, dtype)
    # expm1 keeps sigma exact where abar is close to one.
    return tf.exp(0.5 * log_abar), tf.sqrt(-tf.math.expm1(log_abar))

  def log_snr(self, t: npt.ArrayLike) -> np.ndarray:
    """lambda_t = log(alpha_t / sigma_t) in float64 at times `t`.

    Half the logarithm of the signal-to-noise ratio, the time of the
    DPM-Solver family (Lu et al. 2022, https://arxiv.org/abs/2206.00927).
    """
    abar = self.abar(t)
    return 0.5 * (np.log(abar) - np.log1p(-abar))

  def time_of_log_snr(self, log_snr: npt.ArrayLike) -> np.ndarray:
    """The inverse of `log_snr`: fractional times, clipped to [0, T - 1]."""
    # log abar = -log(1 + exp(-2 lambda)). It decreases in t, and np.interp
    # needs what increases: hence the minus signs below.
    log_abar = -np.logaddexp(0.0, -2 * np.asarray(log_snr, np.float64))
    steps = np.arange(self.num_train_steps)
    return np.interp(-log_abar, -self._log_abar, steps)


class ExplodingSchedule(NoiseSchedule):
  """A variance-exploding process in its variance-preserving form.

  x_0 + s eps, divided by sqrt(1 + s^2), has alpha = 1 / sqrt(1 + s^2) and
  sigma = s alpha; so log(alpha / sigma) = -log s. Between steps log s is
  interpolated linearly, exact at integers, so a geometric process stays
  geometric.

  Args:
    sigmas: float [T], the s of the T steps, positive, increasing.

  Raises:
    ValueError: `sigmas` is empty, not one-dimensional, or not increasing.
  """

  def __init__(self, sigmas: npt.ArrayLike):
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or not sigmas.size:
      raise ValueError(
          f"sigmas must be a non-empty list. Received: shape {sigmas.shape}")
    if not (sigmas[0] > 0 and np.all(np.diff(sigmas) > 0)
            and np.isfinite(sigmas[-1])):
      raise ValueError("sigmas must be positive and increase. Received: "
                       f"{sigmas[:3].tolist()} ... {sigmas[-1]:g}")
    variances = sigmas**2
    super().__init__(np.diff(variances, prepend=0.0) / (1 + variances))
    self.sigmas = sigmas
    self._log_abar = -np.log1p(variances)
    self._log_sigmas = np.log(sigmas)

  @classmethod
  def geometric(cls, sigma_min: float, sigma_max: float,
                num_train_steps: int = 1000) -> "ExplodingSchedule":
    """Sigmas in equal ratios (Song et al. 2021, appendix C)."""
    if not 0 < sigma_min < sigma_max:
      raise ValueError("sigma_min must be positive and below sigma_max. "
                       f"Received: {sigma_min} and {sigma_max}")
    return cls(np.geomspace(sigma_min, sigma_max, num_train_steps))

  def card(self) -> dict:
    """See the base class."""
    return {"sigmas": self.sigmas.tolist()}

  def abar(self, t: npt.ArrayLike) -> np.ndarray:
    """See the base class."""
    return 1 / (1 + np.exp(-2 * self.log_snr(t)))

  def alpha_sigma(self, t: tf.Tensor, dtype: tf.DType = tf.float32
                  ) -> tuple[tf.Tensor, tf.Tensor]:
    """See the base class."""
    sigma = tf.exp(interpolated(self._log_sigmas, t, dtype))
    alpha = tf.math.rsqrt(1.0 + sigma**2)
    return alpha, sigma * alpha

  def log_snr(self, t: npt.ArrayLike) -> np.ndarray:
    """See the base class."""
    t = np.asarray(t, np.float64)
    return -np.interp(t, np.arange(self.num_train_steps), self._log_sigmas)

  def time_of_log_snr(self, log_snr: npt.ArrayLike) -> np.ndarray:
    """See the base class."""
    return np.interp(-np.asarray(log_snr, np.float64), self._log_sigmas,
                     np.arange(self.num_train_steps))


class FlowSchedule(NoiseSchedule):
  """The process of flow matching in its variance-preserving form.

  z = (1 - s) x_0 + s eps, s in (0, 1] (Liu et al. 2023,
  https://arxiv.org/abs/2209.03003; Lipman et al. 2023,
  https://arxiv.org/abs/2210.02747), divided by its deviation, has
  alpha = (1 - s) n and sigma = s n with n = ((1 - s)^2 + s^2)^(-1/2), which is
  alpha + sigma; so log(alpha / sigma) = log((1 - s) / s).

  Step t, fractional or not, carries the shift of Esser et al. (2024,
  https://arxiv.org/abs/2403.03206, for larger images):

    s = shift q / (1 + (shift - 1) q),   q = (t + 1) / T.

  All is in closed form, without a table, and there are no betas. At t = T - 1
  s is 1 and alpha 0, exactly, and the log-SNR is minus infinity: the first
  state is pure noise. Samplers on it are written in v, which stays finite there
  (see `coefficients`), and named strides may begin there.

  Args:
    num_train_steps: T, a whole number from 1 on.
    shift: positive; 1 is none, 3 that of Stable Diffusion 3.

  Raises:
    ValueError: an argument is out of its range.
  """

  in_v = True

  def __init__(self, num_train_steps: int = 1000, shift: float = 1.0):
    # type(), because True is an int.
    if type(num_train_steps) is not int or not (
        1 <= num_train_steps <= _MOST_STEPS):
      raise ValueError(
          f"num_train_steps must be a whole number from 1 to {_MOST_STEPS}. "
          f"Received: {num_train_steps!r}")
    if type(shift) not in (int, float) or not 0 < shift < float("inf"):
      raise ValueError(f"shift must be a positive number. Received: {shift!r}")
    self._num_train_steps = num_train_steps
    self.shift = float(shift)

  @property
  def num_train_steps(self) -> int:
    """T."""
    return self._num_train_steps

  @property
  def num_visible_steps(self) -> int:
    """T: in v no error grows with 1 / alpha, and the flow begins at noise."""
    return self._num_train_steps

  def rescaled_to_zero_snr(self) -> "FlowSchedule":
    """Itself, which ends in pure noise as it is."""
    return self

  def card(self) -> dict:
    """See the base class."""
    return {"flow": {"num_train_steps": self._num_train_steps,
                     "shift": self.shift}}

  def _parts(self, t):
    """What s and 1 - s are proportional to; neither loses digits near 0."""
    return self.shift * (t + 1.0), (self._num_train_steps - 1.0) - t

  def abar(self, t: npt.ArrayLike) -> np.ndarray:
    """See the base class."""
    noise, signal = self._parts(self._clipped(t))
    return signal**2 / (signal**2 + noise**2)

  def alpha_sigma(self, t: tf.Tensor, dtype: tf.DType = tf.float32
                  ) -> tuple[tf.Tensor, tf.Tensor]:
    """See the base class."""
    t = tf.clip_by_value(tf.cast(t, dtype), 0.0, self._num_train_steps - 1.0)
    noise, signal = self._parts(t)
    # Of parts that are at most 1, whose squares stay in float32.
    largest = tf.stop_gradient(tf.maximum(noise, signal))
    noise, signal = noise / largest, signal / largest
    scale = tf.math.rsqrt(noise**2 + signal**2)
    return signal * scale, noise * scale

  def log_snr(self, t: npt.ArrayLike) -> np.ndarray:
    """See the base class; minus infinity at T - 1."""
    noise, signal = self._parts(self._clipped(t))
    with np.errstate(divide="ignore"):
      return np.log(signal) - np.log(noise)

  def time_of_log_snr(self, log_snr: npt.ArrayLike) -> np.ndarray:
    """See the base class; minus infinity is T - 1."""
    with np.errstate(over="ignore"):
      ratio = self.shift * np.exp(np.asarray(log_snr, np.float64))
    return self._clipped(self._num_train_steps / (1 + ratio) - 1)

  def noise_level(self, t: npt.ArrayLike) -> np.ndarray:
    """s in float64 at times `t`, each in [0, T - 1]."""
    noise, signal = self._parts(self._clipped(t))
    return noise / (noise + signal)

  def time_of_noise_level(self, s: npt.ArrayLike) -> np.ndarray:
    """The inverse of `noise_level`: fractional times, clipped to [0, T - 1]."""
    s = np.asarray(s, np.float64)
    return self._clipped(self._num_train_steps * s / (
        self.shift + (1 - self.shift) * s) - 1)

  def _clipped(self, t):
    return np.clip(np.asarray(t, np.float64), 0, self._num_train_steps - 1)


def from_card(card: Mapping[str, object]) -> NoiseSchedule:
  """The schedule of a `card()`, which may have other keys as well.

  Raises:
    KeyError: the card has neither betas, sigmas nor flow.
    TypeError: the arguments of flow are unknown.
    ValueError: see the classes.
  """
  if "flow" in card:
    return FlowSchedule(**card["flow"])
  if "sigmas" in card:
    return ExplodingSchedule(card["sigmas"])
  return NoiseSchedule(card["betas"])


def interpolated(table: np.ndarray, t,
                 dtype: tf.DType = tf.float32) -> tf.Tensor:
  """A table at fractional times, clipped to its ends, differentiable.

  Args:
    table: float [T].
    t: float, any shape.
    dtype: the type of the result.

  Returns:
    The shape of `t`: linear between the entries.
  """
  t = tf.cast(t, dtype)
  end = len(table) - 1
  table = tf.constant(table, dtype)
  left = tf.clip_by_value(tf.cast(tf.floor(t), tf.int32), 0, max(end - 1, 0))
  right = tf.minimum(left + 1, end)
  fraction = tf.clip_by_value(t - tf.cast(left, dtype), 0.0, 1.0)
  lower = tf.gather(table, left)
  return lower + fraction * (tf.gather(table, right) - lower)


@bindings.register
def make_schedule(name: str = "linear", num_train_steps: int = 1000,
                  beta_start: float = 1e-4, beta_end: float = 0.02,
                  betas: npt.ArrayLike | None = None, sigma_min: float = 0.01,
                  sigma_max: float = 50.0,
                  sigmas: npt.ArrayLike | None = None,
                  zero_snr: bool = False, shift: float = 1.0,
                  alpha_bar: npt.ArrayLike | None = None,
                  max_signal_rate: float = 0.95,
                  min_signal_rate: float = 0.02) -> NoiseSchedule:
  """Makes a noise schedule from its name.

  Args:
    name: "linear", "scaled_linear", "cosine", "cosine_angle" (see
      `NoiseSchedule.cosine_angle`), or "betas" or "alpha_bar" for given ones. For a
      variance-exploding process (see `ExplodingSchedule`), "geometric", or
      "sigmas" for given ones. For flow matching, "flow" (see `FlowSchedule`).
    num_train_steps: T. If `betas`, `sigmas` or `alpha_bar` are given, their
      number is T.
    beta_start: the first beta of the two linear ones.
    beta_end: the last beta of these.
    betas: float [T], for "betas" only.
    sigma_min: the smallest sigma of the geometric one. Its default and that of
      `sigma_max` are those of Song et al. (2021,
      https://arxiv.org/abs/2011.13456) for CIFAR-10.
    sigma_max: the largest of these.
    sigmas: float [T], for "sigmas" only.
    zero_snr: whether to rescale the schedule so that it ends in pure noise, see
      `NoiseSchedule.rescaled_to_zero_snr`; not for variance-exploding ones,
      nor for the flow, which does.
    shift: the shift of the flow's noise levels, for "flow" only.
    alpha_bar: float [T], alpha_t^2, for "alpha_bar" only.
    max_signal_rate: alpha at the first step of "cosine_angle".
    min_signal_rate: alpha at its last step.

  Returns:
    The schedule.

  Raises:
    ValueError: the name is unknown; betas, sigmas or alpha_bar are missing, not
      asked for, or out of range; `zero_snr` for a variance-exploding process or a flow;
      `shift` for another process.
  """
  if shift != 1 and name != "flow":
    raise ValueError("shift must be given with the schedule 'flow' only. "
                     f"Received: name={name!r}, shift={shift!r}")
  for key, values in (("betas", betas), ("sigmas", sigmas),
                      ("alpha_bar", alpha_bar)):
    if (values is not None) != (name == key):
      raise ValueError(
          f"{key} must be given with the schedule {key!r}, and only then. "
          f"Received: name={name!r}, {key}={values!r}")
  if num_train_steps > _MOST_STEPS:
    raise ValueError(f"num_train_steps must be at most {_MOST_STEPS}. "
                     f"Received: {num_train_steps}")
  makers = {
      "linear": lambda: NoiseSchedule.linear(
          num_train_steps, beta_start, beta_end),
      "scaled_linear": lambda: NoiseSchedule.scaled_linear(
          num_train_steps, beta_start, beta_end),
      "cosine": lambda: NoiseSchedule.cosine(num_train_steps),
      "cosine_angle": lambda: NoiseSchedule.cosine_angle(
          num_train_steps, max_signal_rate, min_signal_rate),
      "betas": lambda: NoiseSchedule(betas),
      "alpha_bar": lambda: NoiseSchedule.of_alpha_bar(alpha_bar),
      "geometric": lambda: ExplodingSchedule.geometric(
          sigma_min, sigma_max, num_train_steps),
      "sigmas": lambda: ExplodingSchedule(sigmas),
      "flow": lambda: FlowSchedule(num_train_steps, shift),
  }
  if name not in makers:
    raise ValueError(f"schedule must be one of {', '.join(makers)}. "
                     f"Received: {name!r}")
  schedule = makers[name]()
  if not zero_snr:
    return schedule
  if isinstance(schedule, (ExplodingSchedule, FlowSchedule)):
    raise ValueError("zero_snr must be False for a variance-exploding schedule "
                     f"and for a flow. Received: name={name!r}")
  return schedule.rescaled_to_zero_snr()

"""The learned families: variables, and the map from them to `Coefficients`.

Symbols follow the paper (Watson et al. 2022, https://arxiv.org/abs/2202.05830);
where it publishes no formula the docstring says "our choice".

  fixed    a solver of `solvers.py`: nothing to learn
  learned  rows of weights and noise    what is free in them
           <solver>                     nothing: +PRED and +TIME only
           ddim-learned                 one noise scale a step
           vars                         the marginal variances of a DDPM
           rddim                        weights of x_t and x0_hat, noise
           ggdm                         weights of all states and x0_hat, noise
  +pred    the coefficients of x0_hat are learned instead of implied
  +time    the times fed to the network are learned; noise levels do not follow
  +guidance  the scale of classifier-free guidance of every step is learned,
           past the paper; of class-conditional networks with a null label

Each contains the ones above it, except that only ggdm holds the solvers that
use earlier states. With +pred it holds all of them exactly.

To add a family, subclass `LearnedSampler`, create its variables with `_learn`,
write `_rows`, and give it a name in `LEARNED`.
"""

import gin
import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ddss_tf import card
from ddss_tf import solvers
from ddss_tf.runs import fingerprint
from ddss_tf.coefficients import Coefficients
from ddss_tf.errors import UserError
from ddss_tf.samplers import LABELS, Sampler, SolverSampler
from ddss_tf.schedules import NoiseSchedule

PARAMETERISATIONS = ("real", "paper")

# A sigmoid reaches neither 0 nor 1: starts closer than this are moved here.
_SIGMOID_FLOOR = 1e-3
# The first increment of the times, as a part of T: a stride that starts at
# step 0 has an increment of 0, which no softmax expresses.
_TIME_FLOOR = 1e-4
# Least magnitude of the mean of a state, and least variance of one of VARS, by
# which x0_hat and the posterior are divided.
_MEAN_FLOOR = 1e-6
_LEAST_ABAR = 1e-12  # Of VARS and +PRED in their cumulative form.

_MOST_MATCHED = 1000  # Steps of a matched stride.
# Where GGDM starts: the largest K, and the solver and stride that were best up
# to it on the digits, by validation KID on 1 000 images (K = 3, 5) and, where
# that no longer tells them apart, on 10 000 (K = 10, the lowest FID as well) or
# 2 000 (K = 15, 20, the lower Frechet distance as well). Other K by
# neighbourhood. The digits' schedule is linear; others visit the same noise
# levels, which is what a matched stride means.
_BEST_STARTS = (
    (4, "dpm++3m", "matched_linear"),
    (7, "dpm++3m", "matched_linspace"),
    (12, "unipc3-bh1", "matched_linspace_open"),
    (_MOST_MATCHED, "unipc2-bh1", "matched_trailing"),
    (np.inf, "unipc2-bh1", "trailing"),
)
# The start of what holds no multistep solver: DDIM's best stride at K = 5, and
# within 1 % of the best at K = 10.
_BEST_DDIM = "ddim", "matched_trailing"


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
    a and v, float32 [K] each, noisiest state first; solved in float64.
  """
  state_weights, x0_weights, noise_scales, first_mean, first_std = (
      tf.cast(value, tf.float64) for value in (
          state_weights, x0_weights, noise_scales, first_mean, first_std))
  num_steps = state_weights.shape[0]
  # Row k of M belongs to state k, made by row k - 1 of the coefficients.
  first_row = tf.zeros([1, num_steps], tf.float64)
  lower = tf.concat([first_row, state_weights[:-1]], axis=0)
  mean = tf.concat([tf.reshape(first_mean, [1]), x0_weights[:-1]], axis=0)
  std = tf.concat([tf.reshape(first_std, [1]), noise_scales[:-1]], axis=0)
  solution = tf.linalg.triangular_solve(
      tf.eye(num_steps, dtype=tf.float64) - lower,
      tf.concat([mean[:, None], tf.linalg.diag(std)], axis=1))
  return (tf.cast(solution[:, 0], tf.float32),
          tf.cast(tf.reduce_sum(solution[:, 1:] ** 2, axis=1), tf.float32))


@keras.saving.register_keras_serializable(package="ddss_tf")
class _Interval(keras.constraints.Constraint):
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

  An entry that would overtake those before it stops at the least of them: the
  later times are the ones that less depends on.
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


def _logit(p):
  p = np.clip(p, _SIGMOID_FLOOR, 1 - _SIGMOID_FLOOR)
  return np.log(p) - np.log1p(-p)


def _cumulative_logits(values):
  """Variables v for which cumsum(softmax([v; 1])) starts with `values`."""
  increments = np.diff(np.concatenate([[0.0], values, [1.0]]))
  return np.log(increments[:-1]) - np.log(increments[-1]) + 1.0


def _cumulative(v):
  """cumsum(softmax([v; 1])) without its last entry, which is 1; and 1 minus it.

  The second is a sum of its own: at the end of a cosine schedule it is 2e-9,
  which a difference from 1 in float32 is not.
  """
  increments = tf.nn.softmax(tf.concat([v, [1.0]], axis=0))
  values = tf.cumsum(increments)[:-1]
  rest = tf.cumsum(increments, exclusive=True, reverse=True)[:-1]
  # x0_hat is divided by the root of it.
  return values, tf.maximum(rest, _LEAST_ABAR)


class LearnedSampler(Sampler):
  """Base of the learned families: a start, and what may leave it.

  parameterisation="paper", the published constraints, started at DDIM or DDPM:
    +PRED: s = cumsum(softmax([v; 1])), x0_hat = (x_t - sqrt(s_t) eps) /
    sqrt(1 - s_t). +TIME: tau = T cumsum(softmax([w; 1])). Starts of 0 are
    moved to a floor of 1e-3 in weights and of 1e-4 T in the first time.

  parameterisation="real", our choice, past the paper:
    every coefficient is its start plus an offset, so the search begins with the
    images of the start, to float precision, and weights may leave [0, 1] as
    those of multistep solvers do. +PRED offsets both coefficients of x0_hat.
    +TIME adds (T - 1) w to the times, which are kept inside [0, T - 1] and in
    order. Noise scales stay at 0 or above. +GUIDANCE offsets one scale a step.

  Without +PRED the map from state and eps to x0_hat follows from the rows by
  Theorem 1 (`marginals`).

  Args:
    schedule: the forward process of the denoiser.
    num_steps: K.
    family: its name, without the extras.
    pred: learn the coefficients of x0_hat.
    time: learn the times fed to the network.
    guidance: learn the guidance scale of every step ("real" only; our choice).
    guidance_scale: where that starts; None: at those of a `sampler.json` or of
      `Coefficients`, or at 1, which is no guidance.
    parameterisation: "real" or "paper".
    init: where it starts: the name of a solver (`solvers.SOLVERS`); the path of
      a `sampler.json`; `Coefficients`; "auto", with which `search` tries all
      solvers on all strides and takes the best; or None, the family's default.
    stride: the stride of that solver; None is the default of `init=None`, and
      "linear" otherwise.
    eta: the eta of that solver, for ddim and ddpm.
    label: what tables and pictures call it; made from the others if None.

  Raises:
    ValueError: an argument is out of its range, or the family cannot start
      there.
  """

  def __init__(self, schedule: NoiseSchedule, num_steps: int, family: str,
               pred: bool = False, time: bool = False,
               parameterisation: str = "real",
               init: str | Coefficients | None = None,
               stride: str | npt.ArrayLike | None = None,
               eta: float | None = None, label: str | None = None,
               guidance: bool = False, guidance_scale: float | None = None,
               **kwargs):
    if parameterisation not in PARAMETERISATIONS:
      raise ValueError(
          f"parameterisation must be one of {', '.join(PARAMETERISATIONS)}. "
          f"Received: {parameterisation!r}")
    if label is None:
      label = LABELS[family] + ("+PRED" if pred else "") + (
          "+TIME" if time else "") + ("+GUIDANCE" if guidance else "")
    super().__init__(schedule, num_steps, label, **kwargs)
    self.family = family
    self.pred = pred
    self.time = time
    self.guidance = guidance
    self.parameterisation = parameterisation
    self.init = init
    self._stride = stride
    self._eta = eta
    if init is None or isinstance(init, str) and init == "auto":
      default_init, default_stride = self.default_start()
      init = default_init
      stride = default_stride if stride is None else stride
    if parameterisation == "paper" and init not in ("ddim", "ddpm"):
      raise ValueError("parameterisation='paper' starts at ddim or ddpm: its "
                       f"weights stay in (0, 1). Received: init={init!r}")
    self._start = start_coefficients(
        schedule, num_steps, init, "linear" if stride is None else stride, eta)
    self._start = self._start._replace(guidance_scales=self._first_guidance(
        guidance_scale))
    self._create_rows()
    if pred:
      self._create_pred()
    if time:
      self._create_times()
    if guidance:
      # It changes x0_hat, as +PRED does.
      self._guidance = self._learn(
          "pred", "guidance_scales", np.zeros(num_steps))

  def default_start(self):
    """(solver, stride) of `init=None`."""
    if self.parameterisation == "paper":
      return "ddim", "linear"
    if self.num_steps > _MOST_MATCHED:
      return "ddim", "trailing"
    return _BEST_DDIM

  def get_config(self):
    init = self.init
    if isinstance(init, Coefficients):
      init = fingerprint.coefficients_sha256(init)
    return {
        **super().get_config(),
        "family": self.family,
        "pred": self.pred,
        "time": self.time,
        **({"guidance": True} if self.guidance else {}),
        "parameterisation": self.parameterisation,
        "init": init,
        "stride": self._stride,
        "eta": self._eta,
        # What the names above stood for.
        "start_sha256": fingerprint.coefficients_sha256(self._start.numpy()),
    }

  @property
  def start(self) -> Coefficients:
    """The coefficients it starts from, in float64 NumPy."""
    return self._start

  @property
  def _real(self):
    return self.parameterisation == "real"

  def _create_rows(self):
    """Creates the variables of the rows."""

  def _rows(self):
    """(state_weights, x0_weights, noise_scales) as float32 tensors."""
    raise NotImplementedError(f"{type(self).__name__} must map its variables "
                              "to rows")

  def _implied_x0(self, state_weights, x0_weights, noise_scales):
    """(x0_from_state, x0_from_eps) where they are not learned."""
    del state_weights, x0_weights, noise_scales
    start = self._start.numpy()
    return tf.constant(start.x0_from_state), tf.constant(start.x0_from_eps)

  def _create_pred(self):
    if self._real:
      self._pred_state = self._learn(
          "pred", "x0_from_state", np.zeros(self.num_steps))
      self._pred_eps = self._learn(
          "pred", "x0_from_eps", np.zeros(self.num_steps))
    else:
      abar = self.schedule.abar(self._start.times)
      self._pred = self._learn(
          "pred", "pred", _cumulative_logits((1 - abar)[::-1]))

  def _learned_x0(self):
    if self._real:
      start = self._start.numpy()
      return (start.x0_from_state + self._pred_state.value,
              start.x0_from_eps + self._pred_eps.value)
    variance, rest = _cumulative(self._pred.value)
    return _x0_of_marginals(tf.sqrt(rest)[::-1], variance[::-1])

  def _create_times(self):
    total = self.schedule.num_train_steps
    if self._real:
      # Inside [0, T - 1]; in units of T - 1, as no other kind is in steps.
      start = self._start.times / max(total - 1, 1)
      self._times = self._learn("times", "times", np.zeros(self.num_steps),
                                constraint=_Decreasing(np.minimum(start, 1)))
    else:
      fraction = self._start.times[::-1] / total
      floor = _TIME_FLOOR * (1 + np.arange(self.num_steps))
      self._times = self._learn(
          "times", "times", _cumulative_logits(np.maximum(fraction, floor)))

  def _learned_times(self):
    total = self.schedule.num_train_steps
    if not self._real:
      values, _ = _cumulative(self._times.value)
      # Rounding could reach T.
      return float(total) * tf.minimum(values, 1.0 - 1e-6)[::-1]
    times = self._start.numpy().times + float(total - 1) * self._times.value
    # The constraint holds up to the rounding of this sum. The gradient passes
    # all the same, or a time that reached its bound could not leave it.
    bounded = tf.clip_by_value(times, 0.0, float(total - 1))
    return times + tf.stop_gradient(bounded - times)

  def _first_guidance(self, scale):
    """The guidance scales of the start, float64 [K], or None."""
    known = self._start.guidance_scales
    if not self.guidance:
      if scale is not None:
        raise ValueError("guidance_scale is of families with +guidance; a "
                         "fixed one is load_denoiser's. "
                         f"Received: guidance_scale={scale}")
      return known
    if not self._real:
      raise ValueError("+guidance needs parameterisation='real'")
    if scale is None and known is not None:
      return known
    return np.full(self.num_steps, 1.0 if scale is None else float(scale))

  def coefficients(self):
    rows = self._rows()
    start = self._start.numpy()
    x0_from_state, x0_from_eps = (
        self._learned_x0() if self.pred else self._implied_x0(*rows))
    times = self._learned_times() if self.time else tf.constant(start.times)
    guidance = start.guidance_scales
    if self.guidance:
      guidance = guidance + self._guidance.value
    elif guidance is not None:
      guidance = tf.constant(guidance)
    return Coefficients(times, x0_from_state, x0_from_eps, *rows, guidance)


def start_coefficients(schedule: NoiseSchedule, num_steps: int, init, stride,
                       eta) -> Coefficients:
  """The coefficients that an `init` stands for, see `LearnedSampler`.

  Raises:
    ValueError: unknown solver, or a sampler of another number of steps.
    UserError: a `sampler.json` that is missing or damaged.
  """
  source = "init"
  if isinstance(init, str) and init.endswith(".json"):
    source, init = f"init, {init},", card.read(init).coefficients
  if not isinstance(init, Coefficients):
    return solvers.solver_coefficients(schedule, init, num_steps, stride, eta)
  if init.num_steps != num_steps:
    raise ValueError(f"{source} must be a sampler of num_steps={num_steps}. "
                     f"Received: one of {init.num_steps}")
  init.validate()
  last = float(np.max(init.times))
  if last > schedule.num_train_steps:
    raise ValueError(
        f"{source} must have times of at most {schedule.num_train_steps}, the "
        f"training steps of the model. Received: {last:g}")
  return init.map(lambda value: np.asarray(value, np.float64))


def _at_least_0(value):
  """The constraint's bound, up to rounding; unlike relu with gradient at 0."""
  return tf.maximum(value, 0.0)


def _x0_of_marginals(mean, variance):
  """x0_hat = (x_t - sqrt(v) eps) / a, as its two coefficients."""
  # A search may drive a mean through 0. No schedule comes near this floor.
  mean = tf.where(mean < 0.0, tf.minimum(mean, -_MEAN_FLOOR),
                  tf.maximum(mean, _MEAN_FLOOR))
  return 1.0 / mean, -tf.sqrt(variance) / mean


class Retimed(LearnedSampler):
  """A solver whose rows stay: only +PRED and +TIME are learned (our choice)."""

  def default_start(self):
    return self.family, "linear"

  def _rows(self):
    start = self._start.numpy()
    return (tf.constant(start.state_weights), tf.constant(start.x0_weights),
            tf.constant(start.noise_scales))


class LearnedDDIM(LearnedSampler):
  """DDIM with one learned noise scale a step (Watson et al. 2022).

  "paper": sigma = sqrt(1 - abar_s) sigmoid(v). "real": sigma is its start plus
  an offset, kept inside [0, 0.999 sqrt(1 - abar_s)]; our choice.
  """

  def _create_rows(self):
    if isinstance(self.init, Coefficients) or self.init not in (
        None, "auto", "ddim", "ddpm"):
      raise ValueError(f"{self.family} starts at ddim or ddpm. "
                       f"Received: init={self.init!r}")
    abar = self.schedule.abar(self._start.times)
    self._abar_t, self._abar_s = abar[:-1], abar[1:]
    most = np.sqrt(1 - self._abar_s)
    noise = self._start.noise_scales[:-1]
    if self._real:
      self._noise = self._learn(
          "noise_scales", "noise_scales", np.zeros(self.num_steps - 1),
          constraint=_Interval(
              -noise, np.maximum(0.999 * most - noise, 0.0)))
    else:
      self._noise = self._learn(
          "noise_scales", "noise_scales", _logit(noise / most))

  def _rows(self):
    start = self._start.numpy()
    most = np.sqrt(1 - self._abar_s).astype(np.float32)
    if self._real:
      sigma = _at_least_0(start.noise_scales[:-1] + self._noise.value)
    else:
      sigma = most * tf.sigmoid(self._noise.value)
    # Short of all, where a square root has no gradient; or where it started.
    first = start.noise_scales[:-1]
    sigma = tf.minimum(sigma, np.maximum(0.9999 * most, first))
    # most^2 - sigma^2, whose difference float32 may not have: from the start's.
    left = (1 - self._abar_s - self._start.noise_scales[:-1].astype(float)**2)
    direction = tf.sqrt(
        left.astype(np.float32) + (first - sigma) * (first + sigma))
    from_state = direction / np.sqrt(1 - self._abar_t).astype(np.float32)
    x0 = (np.sqrt(self._abar_s).astype(np.float32)
          - from_state * np.sqrt(self._abar_t).astype(np.float32))
    return (tf.linalg.diag(tf.concat([from_state, [0.0]], axis=0)),
            tf.concat([x0, [1.0]], axis=0),
            tf.concat([sigma, [0.0]], axis=0))


class VARS(LearnedSampler):
  """A DDPM whose marginal variances are learned (Watson et al. 2022).

  1 - abar = cumsum(softmax([v; 1])), cleanest state first, in both
  parameterisations; it starts at the schedule's own exactly.
  """

  def default_start(self):
    return "ddpm", "linear"

  def _create_rows(self):
    if self.init not in (None, "auto", "ddpm"):
      raise ValueError(
          f"vars is a DDPM and starts there. Received: init={self.init!r}")
    if self._eta not in (None, 1.0):
      raise ValueError(f"vars is a DDPM. Received: eta={self._eta}")
    abar = self.schedule.abar(self._start.times)
    self._vars = self._learn(
        "noise_scales", "variances", _cumulative_logits((1 - abar)[::-1]))

  def _marginals(self):
    """1 - abar and abar of the K states, noisiest first."""
    variances, rest = _cumulative(self._vars.value)
    return tf.maximum(variances, _MEAN_FLOOR)[::-1], rest[::-1]

  def _rows(self):
    variance_t, abar_t = self._marginals()
    variance_s = tf.concat([variance_t[1:], [0.0]], axis=0)
    abar_s = tf.concat([abar_t[1:], [1.0]], axis=0)
    # The posterior of a DDPM, Ho et al. (2020), equations 6 and 7, for a step
    # from abar_t to abar_s: beta = 1 - abar_t / abar_s.
    ratio = abar_t / abar_s
    beta = (variance_t - variance_s) / abar_s
    x0 = tf.sqrt(abar_s) * beta / variance_t
    from_state = tf.sqrt(ratio) * variance_s / variance_t
    # The root of 0 in the last step has no finite gradient.
    sigma = tf.sqrt((variance_s * beta / variance_t)[:-1])
    return (tf.linalg.diag(from_state), x0,
            tf.concat([sigma, [0.0]], axis=0))

  def _implied_x0(self, state_weights, x0_weights, noise_scales):
    variance, abar = self._marginals()
    return _x0_of_marginals(tf.sqrt(abar), variance)


class GGDM(LearnedSampler):
  """Generalised Gaussian diffusion model (Watson et al. 2022, section 3).

  Each state may use every earlier state and x0_hat; the authors' slides call it
  GDDIM. With `markov`, only the last state: RDDIM. Without +PRED the mean and
  deviation of the noisiest state, which Theorem 1 needs, are learned too.

  In "paper" weights and noise scales are sigmoids of their variables (the
  sigmoid is our choice). In "real" any start is exact, and the last row may be
  free as well, so that the image is a mixture of x0_hat and all states.

  Args:
    markov: use the last state only.
    free_last_row: learn the weights of the last step ("real" only).
    **kwargs: see `LearnedSampler`.
  """

  def __init__(self, schedule: NoiseSchedule, num_steps: int,
               family: str = "ggdm", markov: bool = False,
               free_last_row: bool = False, parameterisation: str = "real",
               **kwargs):
    if free_last_row and parameterisation == "paper":
      raise ValueError("free_last_row needs parameterisation='real': the "
                       "paper's last step returns x0_hat")
    self.markov = markov
    self.free_last_row = free_last_row
    super().__init__(schedule, num_steps, family,
                     parameterisation=parameterisation, **kwargs)

  def default_start(self):
    if self.markov or self.parameterisation == "paper":
      return super().default_start()
    return next(start for most, *start in _BEST_STARTS
                if self.num_steps <= most)

  def get_config(self):
    return {**super().get_config(), "markov": self.markov,
            "free_last_row": self.free_last_row}

  def _create_rows(self):
    start, steps = self._start, self.num_steps
    # The learned entries: all rows but the last, which returns x0_hat.
    rows = steps if self.free_last_row else steps - 1
    mask = np.eye(steps) if self.markov else np.tril(np.ones((steps, steps)))
    if self.markov and np.any(start.state_weights * (1 - mask)):
      raise ValueError(f"{self.family} uses the last state only: it cannot "
                       f"start at the multistep init={self.init!r}")
    self._entries = np.argwhere(mask)
    self._entries = self._entries[self._entries[:, 0] < rows]
    state = start.state_weights[tuple(self._entries.T)]
    x0, noise = start.x0_weights[:rows], start.noise_scales[:-1]
    if self._real:
      self._state = self._learn("weights", "state_weights", np.zeros(
          len(self._entries)))
      self._x0 = self._learn("weights", "x0_weights", np.zeros(rows))
      self._noise = self._learn(
          "noise_scales", "noise_scales", np.zeros(steps - 1),
          constraint=_Interval(-noise, np.inf))
    else:
      self._state = self._learn("weights", "state_weights", _logit(state))
      self._x0 = self._learn("weights", "x0_weights", _logit(x0))
      self._noise = self._learn("noise_scales", "noise_scales", _logit(noise))
    if self.pred:
      return
    # x0_hat = p x + q eps of the noisiest state is mean 1/p, deviation -q/p.
    mean = 1 / start.x0_from_state[0]
    std = -start.x0_from_eps[0] * mean
    if self._real:
      self._check_marginals(mean, std)
      self._first_mean = self._learn("weights", "first_mean", 0.0)
      # Never 0: the marginal variances of all states would lose their root.
      self._first_std = self._learn(
          "weights", "first_std", 0.0, constraint=_Interval(1e-2 - std, np.inf))
    else:
      self._first_mean = self._learn("weights", "first_mean", _logit(mean))
      self._first_std = self._learn("weights", "first_std", _logit(std))
    self._first = mean, std

  def _check_marginals(self, mean, std):
    """Without +PRED a start must have the x0_hat that Theorem 1 implies."""
    start = self._start.numpy()
    implied = _x0_of_marginals(*marginals(*start[3:6], mean, std))
    for value, expected in zip(start[1:3], implied):
      if not np.allclose(value, expected, rtol=1e-3, atol=1e-4):
        raise ValueError(f"{self.family} without +pred cannot start at a "
                         "sampler whose x0_hat is not that of its marginals")

  def _rows(self):
    start, shape = self._start.numpy(), (self.num_steps,) * 2
    if self._real:
      state_weights = start.state_weights + tf.scatter_nd(
          self._entries, self._state.value, shape)
      rows = self._x0.shape[0]
      x0_weights = tf.concat([start.x0_weights[:rows] + self._x0.value,
                              start.x0_weights[rows:]], axis=0)
      noise = _at_least_0(start.noise_scales[:-1] + self._noise.value)
    else:
      state_weights = tf.scatter_nd(
          self._entries, tf.sigmoid(self._state.value), shape)
      x0_weights = tf.concat([tf.sigmoid(self._x0.value), [1.0]], axis=0)
      noise = tf.sigmoid(self._noise.value)
    return state_weights, x0_weights, tf.concat([noise, [0.0]], axis=0)

  def _implied_x0(self, state_weights, x0_weights, noise_scales):
    mean, std = self._first
    if self._real:
      mean = np.float32(mean) + self._first_mean.value
      std = np.float32(std) + self._first_std.value
    else:
      mean = tf.sigmoid(self._first_mean.value)
      std = tf.sigmoid(self._first_std.value)
    return _x0_of_marginals(*marginals(
        state_weights, x0_weights, noise_scales, mean, std))


LEARNED = ("ddim-learned", "vars", "rddim", "ggdm")
_EXTRAS = tuple(pred + time + guidance for guidance in ("", "+guidance")
                for pred, time in (("", ""), ("+pred", ""), ("", "+time"),
                                   ("+pred", "+time")))
FAMILIES = (*solvers.SOLVERS,
            *(name + extra for name in LEARNED for extra in _EXTRAS),
            *(name + extra for name in solvers.SOLVERS
              for extra in _EXTRAS[1:]))


@gin.configurable
def make_sampler(schedule: NoiseSchedule, family: str = gin.REQUIRED,
                 num_steps: int = gin.REQUIRED, **options) -> Sampler:
  """Makes a sampler from its name.

  Args:
    schedule: the forward process of the denoiser.
    family: one of `FAMILIES`: a solver of `solvers.SOLVERS`, such as "ddpm",
      "ddim", "dpm++2m", "unipc2-bh2"; one of `LEARNED`: "ddim-learned", "vars",
      "rddim", "ggdm"; either with "+pred", "+time", "+guidance", or several in
      this order.
    num_steps: K, from 1 to T.
    **options: of the family's class, `SolverSampler` for a plain solver, else
      `LearnedSampler` and its subclass: `stride`, one of `schedules.STRIDES` or
      a list of times; `eta` of DDIM; of what is learned also `init`, where it
      starts (a solver, "auto", the path of a `sampler.json`, None for the
      best known), and `parameterisation`, "real" or "paper".

  Returns:
    The sampler.

  Raises:
    UserError: unknown family, or options that it does not accept.
  """
  if family not in FAMILIES:
    raise UserError(
        f"sampler family must be one of {', '.join(solvers.SOLVERS)}, "
        f"{', '.join(LEARNED)}, or one of these with +pred, +time, +guidance "
        f"or several in this order. Received: {family!r}")
  if isinstance(num_steps, bool) or not isinstance(num_steps, int):
    raise UserError(
        f"num_steps must be a whole number. Received: {num_steps!r}")
  base, extras = family, {}
  for extra in ("guidance", "time", "pred"):
    extras[extra] = base.endswith(f"+{extra}")
    base = base.removesuffix(f"+{extra}")
  try:
    if family in solvers.SOLVERS:
      return SolverSampler(schedule, num_steps, solver=family, **options)
    if base == "ddim-learned":
      return LearnedDDIM(schedule, num_steps, base, **extras, **options)
    if base == "vars":
      return VARS(schedule, num_steps, base, **extras, **options)
    if base in ("rddim", "ggdm"):
      return GGDM(schedule, num_steps, base, markov=base == "rddim", **extras,
                  **options)
    return Retimed(schedule, num_steps, base, **extras, **options)
  except (TypeError, ValueError) as error:
    raise UserError(f"sampler {family!r}: {error}") from error

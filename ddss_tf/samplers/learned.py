"""What learned samplers share: variables, starts, constraints."""

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ddss_tf.runs import fingerprint
from ddss_tf.samplers import card
from ddss_tf.samplers import marginals as marginals_lib
from ddss_tf.samplers import solvers
from ddss_tf.samplers.coefficients import Coefficients
from ddss_tf.samplers.labels import LABELS
from ddss_tf.samplers.sampler import Sampler
from ddss_tf.schedules import NoiseSchedule

PARAMETERISATIONS = ("real", "paper")
# A sigmoid reaches neither 0 nor 1: starts closer than this are moved here.
_SIGMOID_FLOOR = 1e-3
# The first increment of the times, as a part of T: a stride that starts at
# step 0 has an increment of 0, which no softmax expresses.
_TIME_FLOOR = 1e-4
_LEAST_ABAR = 1e-12  # Of VARS and +PRED in their cumulative form.
_MOST_MATCHED = 1000  # Steps of a matched stride.
# Where GGDM starts: the largest K, and the solver and stride that were best up
# to it on the digits, by validation KID on 1 000 images (K = 3, 5) and, where
# that no longer tells them apart, on 10 000 (K = 10, the lowest FID as well) or
# 2 000 (K = 15, 20, the lower Frechet distance as well). Other K by
# neighbourhood. The digits' schedule is linear; others visit the same noise
# levels, which is what a matched stride means.
BEST_STARTS = (
    (4, "dpm++3m", "matched_linear"),
    (7, "dpm++3m", "matched_linspace"),
    (12, "unipc3-bh1", "matched_linspace_open"),
    (_MOST_MATCHED, "unipc2-bh1", "matched_trailing"),
    (np.inf, "unipc2-bh1", "trailing"),
)
# The start of what holds no multistep solver: DDIM's best stride at K = 5, and
# within 1 % of the best at K = 10.
_BEST_DDIM = "ddim", "matched_trailing"


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


def logit(p):
  p = np.clip(p, _SIGMOID_FLOOR, 1 - _SIGMOID_FLOOR)
  return np.log(p) - np.log1p(-p)


def cumulative_logits(values):
  """Variables v for which cumsum(softmax([v; 1])) starts with `values`."""
  increments = np.diff(np.concatenate([[0.0], values, [1.0]]))
  return np.log(increments[:-1]) - np.log(increments[-1]) + 1.0


def cumulative(v):
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
          "pred", "pred", cumulative_logits((1 - abar)[::-1]))

  def _learned_x0(self):
    if self._real:
      start = self._start.numpy()
      return (start.x0_from_state + self._pred_state.value,
              start.x0_from_eps + self._pred_eps.value)
    variance, rest = cumulative(self._pred.value)
    return marginals_lib.x0_of_marginals(tf.sqrt(rest)[::-1], variance[::-1])

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
          "times", "times", cumulative_logits(np.maximum(fraction, floor)))

  def _learned_times(self):
    total = self.schedule.num_train_steps
    if not self._real:
      values, _ = cumulative(self._times.value)
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


def at_least_0(value):
  """The constraint's bound, up to rounding; unlike relu with gradient at 0."""
  return tf.maximum(value, 0.0)


class Retimed(LearnedSampler):
  """A solver whose rows stay: only +PRED and +TIME are learned (our choice)."""

  def default_start(self):
    return self.family, "linear"

  def _rows(self):
    start = self._start.numpy()
    return (tf.constant(start.state_weights), tf.constant(start.x0_weights),
            tf.constant(start.noise_scales))

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
import numpy as np
import tensorflow as tf

from ddss_tf.samplers import learned
from ddss_tf.samplers import marginals as marginals_lib
from ddss_tf.samplers import solvers
from ddss_tf.errors import UserError
from ddss_tf.samplers.coefficients import Coefficients
from ddss_tf.samplers.learned import LearnedSampler, Retimed
from ddss_tf.samplers.sampler import Sampler, SolverSampler
from ddss_tf.schedules import NoiseSchedule


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
          constraint=learned.Interval(
              -noise, np.maximum(0.999 * most - noise, 0.0)))
    else:
      self._noise = self._learn(
          "noise_scales", "noise_scales", learned.logit(noise / most))

  def _rows(self):
    start = self._start.numpy()
    most = np.sqrt(1 - self._abar_s).astype(np.float32)
    if self._real:
      sigma = learned.at_least_0(start.noise_scales[:-1] + self._noise.value)
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
        "noise_scales", "variances", learned.cumulative_logits((1 - abar)[::-1]))

  def _marginals(self):
    """1 - abar and abar of the K states, noisiest first."""
    variances, rest = learned.cumulative(self._vars.value)
    return tf.maximum(variances, marginals_lib.MEAN_FLOOR)[::-1], rest[::-1]

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
    return marginals_lib.x0_of_marginals(tf.sqrt(abar), variance)


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
    return next(start for most, *start in learned.BEST_STARTS
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
          constraint=learned.Interval(-noise, np.inf))
    else:
      self._state = self._learn("weights", "state_weights", learned.logit(state))
      self._x0 = self._learn("weights", "x0_weights", learned.logit(x0))
      self._noise = self._learn("noise_scales", "noise_scales", learned.logit(noise))
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
          "weights", "first_std", 0.0, constraint=learned.Interval(1e-2 - std, np.inf))
    else:
      self._first_mean = self._learn("weights", "first_mean", learned.logit(mean))
      self._first_std = self._learn("weights", "first_std", learned.logit(std))
    self._first = mean, std

  def _check_marginals(self, mean, std):
    """Without +PRED a start must have the x0_hat that Theorem 1 implies."""
    start = self._start.numpy()
    implied = marginals_lib.x0_of_marginals(*marginals_lib.marginals(*start[3:6], mean, std))
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
      noise = learned.at_least_0(start.noise_scales[:-1] + self._noise.value)
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
    return marginals_lib.x0_of_marginals(*marginals_lib.marginals(
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

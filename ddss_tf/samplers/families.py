"""The learned families: variables, and the map from them to `Coefficients`.

Symbols follow the paper (Watson et al. 2022, https://arxiv.org/abs/2202.05830).
A formula without a number on the authors' slides is called recalled, if it is
recalled from the paper, or else our choice.

  fixed    a solver of `solvers.py`: nothing to learn
  learned  rows of weights and noise    what is free in them
           <solver>                     nothing: +PRED and +TIME only
           ddim-learned                 one noise scale a step
           vars                         the marginal variances of a DDPM
           rddim                        weights of x_t and x0_hat, noise
           ggdm                         weights of all states and x0_hat, noise
  +pred    the coefficients of x0_hat are learned instead of implied
  +time    the times fed to the network are learned; the noise levels stay
  +guidance  every step's scale of classifier-free guidance is learned, which
           is not in the paper; needs class labels and a null label

rddim contains ddim-learned and vars, and ggdm contains rddim. Only ggdm holds
the solvers that use earlier states. With +pred it holds all of them exactly.

To add a family, subclass `LearnedSampler`, create its variables in
`_create_rows`, map them to rows in `_rows`, and add it to the table with
`register_family`.
"""

import functools
from typing import Callable, NamedTuple

import gin
import numpy as np
import tensorflow as tf

from ddss_tf import bindings
from ddss_tf.runs import fingerprint
from ddss_tf.samplers import labels
from ddss_tf.samplers import learned
from ddss_tf.samplers import marginals as marginals_lib
from ddss_tf.samplers import parameterisations
from ddss_tf.samplers import solvers
from ddss_tf.errors import UserError
from ddss_tf.samplers.coefficients import Coefficients
from ddss_tf.samplers.learned import LearnedSampler, Retimed
from ddss_tf.samplers.sampler import Sampler, SolverSampler
from ddss_tf.schedules import NoiseSchedule


class LearnedDDIM(LearnedSampler):
  """DDIM with one learned noise scale a step (Watson et al. 2022).

  "paper": sigma = sqrt(1 - abar_s) sigmoid(v), recalled. "real": sigma is its
  start plus an offset, kept inside [0, 0.999 sqrt(1 - abar_s)]; our choice.
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
    self._noise = self._form.bounded(
        self._learn, "noise_scales", "noise_scales", noise,
        most=np.maximum(0.999 * most, noise), scale=most)

  def _rows(self):
    start = self._start.numpy()
    most = np.sqrt(1 - self._abar_s).astype(np.float32)
    # A little less than all noise, because the square root below has no
    # gradient at 0; but not less than the start.
    first = start.noise_scales[:-1]
    sigma = tf.minimum(self._noise(), np.maximum(0.9999 * most, first))
    # most^2 - sigma^2 is computed from its value at the start: in float32 the
    # difference of such squares may be lost to rounding.
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
  parameterisations; this form is recalled. It starts at the schedule's own
  exactly.
  """

  def default_start(self):
    return "ddpm", self._simple_stride()

  def _create_rows(self):
    if self.init not in (None, "auto", "ddpm"):
      raise ValueError(
          f"vars is a DDPM and starts there. Received: init={self.init!r}")
    if self._eta not in (None, 1.0):
      raise ValueError(f"vars is a DDPM. Received: eta={self._eta}")
    abar = self.schedule.abar(self._start.times)
    self._vars = self._learn(
        "noise_scales", "variances", parameterisations.variance_logits(abar))

  def _marginals(self):
    """1 - abar and abar of the K states, noisiest first."""
    variances, rest = parameterisations.cumulative(self._vars.value)
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
    # Without the last step: the root of its 0 has no finite gradient.
    sigma = tf.sqrt((variance_s * beta / variance_t)[:-1])
    return (tf.linalg.diag(from_state), x0,
            tf.concat([sigma, [0.0]], axis=0))

  def _implied_x0(self, state_weights, x0_weights, noise_scales):
    variance, abar = self._marginals()
    return marginals_lib.x0_of_marginals(
        tf.sqrt(abar), variance, self._start.in_v)


class GGDM(LearnedSampler):
  """Generalised Gaussian diffusion model (Watson et al. 2022).

  Each state may use every earlier state and x0_hat; the authors' slides call it
  GDDIM. With `markov` it may use only the last state and x0_hat: this is RDDIM.
  Theorem 1 needs the mean and deviation of the noisiest state, so without +PRED
  these are learned too. In v the square of the one is 1 minus that of the other
  (our choice): at pure noise x0_hat would tell of nothing but their ratio.

  The rows are equations 13 and 14 of the slides; with `markov`, 10 and 11. In
  "paper" weights and noise scales are sigmoids of their variables (the sigmoid
  is our choice). In "real" any start is exact, and the last row may be free as
  well, so that the image is a mixture of x0_hat and all states.

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
    if self.markov or self._form.starts:
      return super().default_start()
    return learned.best_start(self.schedule, self.num_steps)

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
    weight = functools.partial(self._form.weight, self._learn, "weights")
    self._state = weight("state_weights", state)
    self._x0 = weight("x0_weights", x0)
    self._noise = self._form.bounded(
        self._learn, "noise_scales", "noise_scales", noise)
    # The weights that are not learned: those of the last row.
    self._fixed = np.array(start.state_weights, np.float32)
    self._fixed[tuple(self._entries.T)] = 0.0
    self._fixed_x0 = np.array(start.x0_weights[rows:], np.float32)
    if self.pred:
      return
    if start.in_v:
      self._create_first_in_v()
      return
    # x0_hat = p x + q eps of the noisiest state means that this state has the
    # mean 1/p and the deviation -q/p.
    mean = 1 / start.x0_from_state[0]
    std = -start.x0_from_eps[0] * mean
    if self._form.exact:
      self._check_marginals(mean, std)
    self._first_mean = weight("first_mean", mean)
    # The deviation stays above 0: without noise in the steps all marginal
    # variances would be 0, and their root has no finite gradient there.
    self._first_std = self._form.bounded(
        self._learn, "weights", "first_std", std, least=1e-2)

  def _create_first_in_v(self):
    """x0_hat = p x + q v, p^2 + q^2 = 1: the mean p and the deviation -q."""
    mean, variance = self._start.x0_from_state[0], self._start.x0_from_v[0]**2
    if self._form.exact:
      self._check_marginals(mean, np.sqrt(variance))
    self._first_mean = self._form.bounded(
        self._learn, "weights", "first_mean", mean,
        most=np.maximum(0.999, mean))
    first = np.float32(mean)

    def std():
      # From its start, or float32 would lose it where there is little noise.
      value = self._first_mean()
      return tf.sqrt(tf.maximum(
          np.float32(variance) + (first - value) * (first + value), 1e-12))

    self._first_std = std

  def _check_marginals(self, mean, std):
    """Without +PRED a start must have the x0_hat that Theorem 1 implies."""
    start = self._start.numpy()
    implied = marginals_lib.x0_of_marginals(*marginals_lib.marginals(
        *start[3:6], mean, std), start.in_v)
    for value, expected in zip(
        (start.x0_from_state, start.x0_from_output), implied):
      if not np.allclose(value, expected, rtol=1e-3, atol=1e-4):
        raise ValueError(f"{self.family} without +pred cannot start at a "
                         "sampler whose x0_hat is not that of its marginals")

  def _rows(self):
    state_weights = self._fixed + tf.scatter_nd(
        self._entries, self._state(), self._fixed.shape)
    x0_weights = tf.concat([self._x0(), self._fixed_x0], axis=0)
    return state_weights, x0_weights, tf.concat([self._noise(), [0.0]], axis=0)

  def _implied_x0(self, state_weights, x0_weights, noise_scales):
    return marginals_lib.x0_of_marginals(*marginals_lib.marginals(
        state_weights, x0_weights, noise_scales, self._first_mean(),
        self._first_std()), self._start.in_v)


class Family(NamedTuple):
  """A learned family.

  Attributes:
    name: what gin and the command line call it.
    label: what tables and pictures call it.
    make: the class, or a function of (schedule, num_steps, family, **options)
      that gives a `LearnedSampler`.
    contains: names of the families whose samplers it can start at.
    multistep: whether it holds the solvers that use earlier states.
  """
  name: str
  label: str
  make: Callable[..., LearnedSampler]
  contains: tuple[str, ...] = ()
  multistep: bool = False


# All learned families by name, smaller ones first.
LEARNED = {}
_EXTRAS = tuple(pred + time + guidance for guidance in ("", "+guidance")
                for pred, time in (("", ""), ("+pred", ""), ("", "+time"),
                                   ("+pred", "+time")))


def register_family(name: str, *, label: str, contains: tuple[str, ...] = (),
                    multistep: bool = False) -> Callable:
  """Adds a learned family to those that `make_sampler` and `compare` know.

    @ddss_tf.register_family("mine", label="MINE", contains=("ddim-learned",))
    class Mine(ddss_tf.LearnedSampler):
      ...

  Args:
    name: what gin and the command line call it.
    label: what tables and pictures call it.
    contains: names of the families whose samplers it can start at.
    multistep: whether it holds the solvers that use earlier states.

  Returns:
    A decorator of the class, or of a function of (schedule, num_steps, family,
    **options) that gives a `LearnedSampler`.

  Raises:
    ValueError: the name is taken, has a "+", or a family that it contains is
      not known.
  """
  if name in solvers.ALL_SOLVERS or "+" in name or not name:
    raise ValueError(
        f"a family's name must be new, without +. Received: {name!r}")
  unknown = set(contains) - set(LEARNED)
  if unknown:
    raise ValueError("a family must contain families that are known, out of "
                     f"{', '.join(LEARNED)}. Received: {sorted(unknown)}")

  def register(make):
    known = LEARNED.get(name)
    if known is not None and (fingerprint.definition(known.make)
                              != fingerprint.definition(make)):
      raise ValueError(f"a family's name must be new. Received: {name!r}, which "
                       f"is {'.'.join(fingerprint.definition(known.make))}")
    LEARNED[name] = Family(name, label, make, tuple(contains), multistep)
    labels.LABELS[name] = label
    return make

  return register


def _rddim(schedule, num_steps, family, **options):
  return GGDM(schedule, num_steps, family, markov=True, **options)


def _ggdm(schedule, num_steps, family, **options):
  return GGDM(schedule, num_steps, family, markov=False, **options)


register_family("ddim-learned", label="learned DDIM")(LearnedDDIM)
register_family("vars", label="VARS")(VARS)
register_family(
    "rddim", label="RDDIM", contains=("ddim-learned", "vars"))(_rddim)
register_family("ggdm", label="GGDM", multistep=True,
                contains=("ddim-learned", "vars", "rddim"))(_ggdm)


def split_name(family: str) -> tuple[str, tuple[str, ...]]:
  """The base of a name and its extras: "ggdm", ("pred",) of "ggdm+pred"."""
  base, extras = family, ()
  for extra in ("guidance", "time", "pred"):
    if base.endswith(f"+{extra}"):
      base, extras = base.removesuffix(f"+{extra}"), (extra, *extras)
  return base, extras


def family_names() -> tuple[str, ...]:
  """All names that `make_sampler` takes: solvers and families, with extras."""
  return (*solvers.ALL_SOLVERS,
          *(name + extra for name in LEARNED for extra in _EXTRAS),
          *(name + extra for name in solvers.ALL_SOLVERS
            for extra in _EXTRAS[1:]))


def contained(family: str) -> tuple[str, ...]:
  """The families whose samplers a family can start at, smaller ones first.

  These are the families of its row in the table, and itself with fewer extras.
  A family that contains none starts at solvers only.
  """
  base, extras = split_name(family)
  if base not in LEARNED or not LEARNED[base].contains:
    return ()
  fewer = [name for name in (base + extra for extra in _EXTRAS)
           if name != family and set(split_name(name)[1]) <= set(extras)]
  return (*LEARNED[base].contains, *fewer)


def is_multistep(family: str) -> bool:
  """Whether a family holds the solvers that use earlier states."""
  base, _ = split_name(family)
  return base in LEARNED and LEARNED[base].multistep


# What `compare` searches: each family, the multistep one with its extras too.
COMPARED = tuple(
    name + extra for name in LEARNED
    for extra in (_EXTRAS[:4] if LEARNED[name].multistep else ("",)))


@bindings.configurable()
def make_sampler(schedule: NoiseSchedule, family: str = gin.REQUIRED,
                 num_steps: int = gin.REQUIRED, **options) -> Sampler:
  """Makes a sampler from its name.

  Args:
    schedule: the forward process of the denoiser.
    family: a solver of `solvers.ALL_SOLVERS`, such as "ddpm", "ddim",
      "dpm++2m", "unipc2-bh2"; or a learned family: "ddim-learned", "vars", "rddim",
      "ggdm", or one that was registered (`register_family`). Either may be
      followed by "+pred", "+time", "+guidance", or several in this order.
    num_steps: K, from 1 to T.
    **options: options of the family's class, `SolverSampler` for a plain
      solver, else `LearnedSampler` and its subclass: `stride`, one of
      `strides.STRIDES` or a list of times; `eta` of DDIM; for what is learned
      also `init`, where it starts (a solver, "auto", the path of a
      `sampler.json`, None for the best known), and `parameterisation`, "real"
      or "paper".

  Returns:
    The sampler.

  Raises:
    UserError: unknown family, or options that it does not accept.
  """
  if family not in family_names():
    raise UserError(
        f"sampler family must be one of {', '.join(solvers.ALL_SOLVERS)}, "
        f"{', '.join(LEARNED)}, or one of these with +pred, +time, +guidance "
        f"or several in this order. Received: {family!r}")
  if isinstance(num_steps, bool) or not isinstance(num_steps, int):
    raise UserError(
        f"num_steps must be a whole number. Received: {num_steps!r}")
  base, extras = split_name(family)
  learned_parts = {extra: extra in extras
                   for extra in ("pred", "time", "guidance")}
  make = LEARNED[base].make if base in LEARNED else Retimed
  try:
    if family in solvers.ALL_SOLVERS:
      return SolverSampler(schedule, num_steps, solver=family, **options)
    return make(schedule, num_steps, base, **learned_parts, **options)
  except (TypeError, ValueError) as error:
    raise UserError(f"sampler {family!r}: {error}") from error

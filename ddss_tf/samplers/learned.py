"""What learned samplers share: variables, starts, constraints."""

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ddss_tf.runs import fingerprint
from ddss_tf.samplers import card
from ddss_tf.samplers import solvers
from ddss_tf.samplers.coefficients import Coefficients
from ddss_tf.samplers.labels import LABELS
from ddss_tf.samplers.parameterisations import FORMS
from ddss_tf.samplers.sampler import Sampler
from ddss_tf.schedules import NoiseSchedule

_MOST_MATCHED = 1000  # The most steps of a matched stride.
# Where GGDM starts: the largest K of a row, its solver and its stride. They
# were the best on the digits by validation KID: on 1 000 images at K = 3 and 5
# and, where that no longer tells starts apart, on 10 000 at K = 10 (the lowest
# FID as well) and 2 000 at K = 15 and 20 (the lower Frechet distance as well).
# Other K take the row of a measured neighbour. The digits' schedule is linear;
# on other schedules a matched stride visits the same noise levels.
BEST_STARTS = (
    (4, "dpm++3m", "matched_linear"),
    (7, "dpm++3m", "matched_linspace"),
    (12, "unipc3-bh1", "matched_linspace_open"),
    (_MOST_MATCHED, "unipc2-bh1", "matched_trailing"),
    (np.inf, "unipc2-bh1", "trailing"),
)
# Where GGDM starts on a flow. Against the exact flow of mixtures of Gaussians,
# with a shift of 1 or 3 at K = 4 to 20, it was near the best of the solvers on
# this stride (iPNDM was better on some mixtures); no network has been tried.
BEST_FLOW_START = "unipc2-bh2", "trailing"
# The start of families that hold no multistep solver. It is DDIM's best stride
# at K = 5, and within 1 % of the best at K = 10.
_BEST_DDIM = "ddim", "matched_trailing"


def best_start(schedule: NoiseSchedule, num_steps: int) -> tuple[str, str]:
  """The best solver known for K, and its stride; see `BEST_STARTS`."""
  if schedule.in_v:
    return BEST_FLOW_START
  return next((solver, stride) for most, solver, stride in BEST_STARTS
              if num_steps <= most)


class LearnedSampler(Sampler):
  """Base of the learned families: a start, and the variables that change it.

  A family creates the variables of its rows in `_create_rows`, through a form
  of `parameterisations.py`: the paper's constraints, or ours. +PRED and +TIME
  are the form's. +GUIDANCE offsets one scale a step. Without +PRED the map from
  state and eps to x0_hat follows from the rows by Theorem 1 (`marginals`).

  Args:
    schedule: the forward process of the denoiser.
    num_steps: K.
    family: its name, without the extras.
    pred: learn the coefficients of x0_hat.
    time: learn the times fed to the network.
    guidance: learn the guidance scale of every step ("real" only; our choice).
    guidance_scale: where these scales start. None starts at the scales of a
      `sampler.json` or of `Coefficients`, or else at 1, which is no guidance.
    parameterisation: "real" or "paper".
    init: where it starts: the name of a solver (`solvers.SOLVERS`); the path of
      a `sampler.json`, or the name of one in the zoo; `Coefficients`; "auto", with which `search` tries all
      solvers on all strides and takes the best; or None, the family's default.
    stride: the stride of that solver; None is the default of `init=None`, and
      "linear" otherwise.
    eta: the eta of that solver, for ddim and ddpm.
    label: what tables and pictures call it; None makes it from the family and
      its extras.

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
    if parameterisation not in FORMS:
      raise ValueError(
          f"parameterisation must be one of {', '.join(FORMS)}. "
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
    self._form = FORMS[parameterisation]
    self.init = init
    self._stride = stride
    self._eta = eta
    if init is None or self.chooses_start:
      default_init, default_stride = self.default_start()
      init = default_init
      stride = default_stride if stride is None else stride
    if self._form.starts and init not in self._form.starts:
      raise ValueError(
          f"parameterisation={parameterisation!r} starts at "
          f"{' or '.join(self._form.starts)}: its weights stay in (0, 1). "
          f"Received: init={init!r}")
    self._start = start_coefficients(
        schedule, num_steps, init, "linear" if stride is None else stride, eta)
    self._start = self._start._replace(guidance_scales=self._first_guidance(
        guidance_scale))
    self._create_rows()
    if pred:
      self._x0_hat = self._form.x0_hat(self._learn, schedule, self._start)
    if time:
      self._times = self._form.times(self._learn, schedule, self._start)
    if guidance:
      # A scale changes x0_hat, as +PRED does, so its kind is the same.
      self._guidance = self._learn(
          "pred", "guidance_scales", np.zeros(num_steps))

  def default_start(self):
    """(solver, stride) of `init=None`."""
    if self._form.starts:
      return self._form.starts[0], self._simple_stride()
    if self.schedule.in_v:
      return "ddim", self._simple_stride()
    if self.num_steps > _MOST_MATCHED:
      return "ddim", "trailing"
    return _BEST_DDIM

  def _simple_stride(self):
    """"linear"; on a flow "trailing", which begins at pure noise."""
    return "trailing" if self.schedule.in_v else "linear"

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
        # The coefficients that the names above stood for.
        "start_sha256": fingerprint.coefficients_sha256(self._start.numpy()),
    }

  @property
  def start(self) -> Coefficients:
    """The coefficients it starts from, in float64 NumPy."""
    return self._start

  @property
  def chooses_start(self) -> bool:
    return isinstance(self.init, str) and self.init == "auto"

  def _create_rows(self):
    """Creates the variables of the rows."""

  def _rows(self):
    """(state_weights, x0_weights, noise_scales) as float32 tensors."""
    raise NotImplementedError(f"{type(self).__name__} must map its variables "
                              "to rows")

  def _implied_x0(self, state_weights, x0_weights, noise_scales):
    """(x0_from_state, x0_from_output) where they are not learned."""
    del state_weights, x0_weights, noise_scales
    start = self._start.numpy()
    return tf.constant(start.x0_from_state), tf.constant(start.x0_from_output)

  def _first_guidance(self, scale):
    """The guidance scales of the start, float64 [K], or None."""
    known = self._start.guidance_scales
    if not self.guidance:
      if scale is not None:
        raise ValueError("guidance_scale is of families with +guidance; a "
                         "fixed one is load_denoiser's. "
                         f"Received: guidance_scale={scale}")
      return known
    if self._form is not FORMS["real"]:
      raise ValueError("+guidance needs parameterisation='real'")
    if scale is None and known is not None:
      return known
    return np.full(self.num_steps, 1.0 if scale is None else float(scale))

  def coefficients(self):
    rows = self._rows()
    start = self._start.numpy()
    x0_from_state, x0_from_output = (
        self._x0_hat() if self.pred else self._implied_x0(*rows))
    times = self._times() if self.time else tf.constant(start.times)
    guidance = start.guidance_scales
    if self.guidance:
      guidance = guidance + self._guidance.value
    elif guidance is not None:
      guidance = tf.constant(guidance)
    in_v = self._start.in_v
    return Coefficients(
        times, x0_from_state, None if in_v else x0_from_output, *rows, guidance,
        x0_from_v=x0_from_output if in_v else None)


def start_coefficients(schedule: NoiseSchedule, num_steps: int, init, stride,
                       eta) -> Coefficients:
  """The coefficients that an `init` stands for, see `LearnedSampler`.

  Raises:
    ValueError: unknown solver, or a sampler of another number of steps or with
      times above T.
    UserError: a `sampler.json` that is missing or damaged.
  """
  source = "init"
  # Solvers first: to list the zoo is to read a folder.
  if isinstance(init, str) and init not in solvers.ALL_SOLVERS and (
      init.endswith(".json") or init in card.names()):
    path = init if init.endswith(".json") else card.find(init)
    source, init = f"init, {init},", card.read(path).coefficients
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


class Retimed(LearnedSampler):
  """A solver whose rows stay: only +PRED and +TIME are learned (our choice)."""

  def default_start(self):
    return self.family, self._simple_stride()

  def _rows(self):
    start = self._start.numpy()
    return (tf.constant(start.state_weights), tf.constant(start.x0_weights),
            tf.constant(start.noise_scales))

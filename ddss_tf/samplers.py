"""What a sampler is: K steps, as a Keras layer that gives `Coefficients`.

A sampler never samples: `chain.run_chain` does, for all of them. Here are the
base class and the samplers without variables; `families.py` has the learned
ones and the factory that makes any of them from its name.
"""

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ddss_tf import chain
from ddss_tf import solvers
from ddss_tf.coefficients import Coefficients
from ddss_tf.errors import UserError
from ddss_tf.schedules import NoiseSchedule, STRIDES

KINDS = ("weights", "pred", "times", "noise_scales")

LABELS = {
    "ddpm": "DDPM", "ddim": "DDIM", "dpm++2m": "DPM-Solver++(2M)",
    "dpm++3m": "DPM-Solver++(3M)", "dpm++3m-exact": "DPM-Solver++(3M, exact)",
    "deis2": "DEIS-2", "deis3": "DEIS-3", "ab2": "AB-2", "ab3": "AB-3",
    "ipndm": "iPNDM", "pndm": "PNDM", "unipc2-bh1": "UniPC-2 (bh1)",
    "unipc2-bh2": "UniPC-2 (bh2)", "unipc3-bh1": "UniPC-3 (bh1)",
    "unipc3-bh2": "UniPC-3 (bh2)", "ddim-learned": "learned DDIM",
    "vars": "VARS", "rddim": "RDDIM", "ggdm": "GGDM",
}
_GIVEN_TIMES = "given times"
FULL_CHAIN = "DDPM (full chain)"

# What tables and pictures compare with each other.
BASELINES = "DDPM and DDIM"
TRAINING_FREE = "training-free solvers"
SEARCHED = "searched"


def without_stride(label: str) -> str:
  """A label without its stride: what one solver is called at every K."""
  for stride in (*STRIDES, _GIVEN_TIMES):
    if label.endswith(f" {stride}"):
      return label.removesuffix(f" {stride}")
  return label


def group(label: str) -> str:
  """Which of the three groups a label belongs to.

  What is neither DDPM or DDIM nor another solver by its name was searched.
  """
  name = without_stride(label)
  if (name in (LABELS["ddpm"], LABELS["ddim"], FULL_CHAIN)
      or name.startswith("DDIM(eta=")):
    return BASELINES
  if name in (LABELS[solver] for solver in solvers.SOLVERS):
    return TRAINING_FREE
  return SEARCHED


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
    self._starts = {}  # Of the variables, by name.
    self.built = True

  def _learn(self, kind: str, name: str, start, constraint=None):
    """Creates a variable of one of `KINDS`, which share a learning rate."""
    start = np.asarray(start, np.float32)
    variable = self.add_weight(
        shape=start.shape, name=name, constraint=constraint,
        initializer=lambda shape, dtype=None: tf.constant(start, dtype))
    self.variables_by_kind.setdefault(kind, []).append(variable)
    self._starts[name] = start
    return variable

  def reset(self) -> None:
    """Puts all that is learned back to where it starts."""
    for variables in self.variables_by_kind.values():
      for variable in variables:
        variable.assign(self._starts[variable.name])

  def coefficients(self) -> Coefficients:
    """The sampler's coefficients as float32 tensors, differentiable."""
    raise NotImplementedError(f"{type(self).__name__} must map its variables "
                              "to coefficients")

  def call(self, x_T: tf.Tensor, step_noise: tf.Tensor | None = None,
           eps_fn: chain.EpsFn | None = None) -> tf.Tensor:
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

  def __init__(self, schedule: NoiseSchedule, coefficients: Coefficients,
               label: str, **kwargs):
    super().__init__(schedule, coefficients.num_steps, label, **kwargs)
    coefficients.validate()
    if np.max(coefficients.times) > schedule.num_train_steps:
      raise UserError(
          f"times must not exceed {schedule.num_train_steps}, the training "
          f"steps of the model. Received: {np.max(coefficients.times):g}")
    self._values = coefficients.numpy()

  def coefficients(self):
    return self._values.map(tf.constant)


class SolverSampler(FixedSampler):
  """A training-free solver by name: DDPM, DDIM, DPM-Solver++, UniPC, ...

  Args:
    schedule: the forward process of the denoiser.
    num_steps: K.
    solver: one of `solvers.SOLVERS`, see `solvers.solver_coefficients`.
    stride: a name or a list of times, see `NoiseSchedule.stride`.
    eta: scale of the noise, ddim and ddpm only (Song et al. 2021, equation 16).
    lower_order_final: see `solvers.solver_coefficients`.
    label: what tables and pictures call it; made from the others if None.
  """

  def __init__(self, schedule: NoiseSchedule, num_steps: int,
               solver: str = "ddim", stride: str | npt.ArrayLike = "linear",
               eta: float | None = None, lower_order_final: bool = True,
               label: str | None = None, **kwargs):
    values = solvers.solver_coefficients(
        schedule, solver, num_steps, stride, eta,
        lower_order_final=lower_order_final)
    if label is None:
      label = LABELS[solver]
      if eta is not None and solver in ("ddim", "ddpm"):
        label = {0.0: "DDIM", 1.0: "DDPM"}.get(
            float(eta), f"DDIM(eta={eta:g})")
      label += " " + (stride if isinstance(stride, str) else _GIVEN_TIMES)
    super().__init__(schedule, values, label, **kwargs)
    self.solver = solver
    self.stride = stride
    self.eta = eta
    self.lower_order_final = lower_order_final

  def get_config(self):
    return {**super().get_config(), "solver": self.solver,
            "stride": self.stride, "eta": self.eta,
            "lower_order_final": self.lower_order_final}


def full_chain(schedule: NoiseSchedule) -> SolverSampler:
  """DDPM at every training step, what few-step samplers are measured against.

  Args:
    schedule: the forward process of the denoiser.

  Returns:
    A sampler of T steps (Ho et al. 2020, https://arxiv.org/abs/2006.11239,
    algorithm 2, with the variance of the posterior).
  """
  return SolverSampler(schedule, schedule.num_train_steps, "ddpm", "linspace",
                       label=FULL_CHAIN)

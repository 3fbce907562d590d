"""What a sampler is: K steps, as a Keras layer that gives `Coefficients`.

A sampler never samples: `chain.run_chain` does, for all of them. This module
has the base class and the samplers without variables; `families.py` has the
learned ones and the factory that makes any of them from its name.
"""

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ddss_tf.samplers import chain
from ddss_tf.samplers import labels
from ddss_tf.samplers import solvers
from ddss_tf.errors import UserError
from ddss_tf.samplers.coefficients import Coefficients
from ddss_tf.schedules import NoiseSchedule

KINDS = ("weights", "pred", "times", "noise_scales")


class Sampler(keras.layers.Layer):
  """Base of the families: K steps on a forward process.

  Args:
    schedule: the forward process of the denoiser.
    num_steps: K, from 1 to T.
    label: what tables and pictures call it.

  Call arguments:
    x_T, step_noise: as in `chain.run_chain`.
    eps_fn: as in `chain.run_chain`.

  Returns:
    Images, float32 [B, H, W, C].

  Raises:
    ValueError: K is out of range.
  """

  def __repr__(self):
    return f"{type(self).__name__}({self.label!r}, num_steps={self.num_steps})"

  def __init__(self, schedule: NoiseSchedule, num_steps: int, label: str,
               **kwargs):
    # Without a name Keras numbers the instances, and configurations differ.
    super().__init__(**{"name": "sampler", **kwargs})
    if not 1 <= num_steps <= schedule.num_train_steps:
      raise ValueError(
          f"num_steps must be from 1 to {schedule.num_train_steps}, the "
          f"training steps of the model. Received: num_steps={num_steps}")
    self.schedule = schedule
    self.num_steps = num_steps
    self.label = label
    self.variables_by_kind = {}
    self._starts = {}  # Where each variable starts, by its name.
    self.built = True

  def _learn(self, kind: str, name: str, start, constraint=None):
    """Creates a variable; those of one of `KINDS` share a learning rate."""
    start = np.asarray(start, np.float32)
    variable = self.add_weight(
        shape=start.shape, name=name, constraint=constraint,
        initializer=lambda shape, dtype=None: tf.constant(start, dtype))
    self.variables_by_kind.setdefault(kind, []).append(variable)
    self._starts[name] = start
    return variable

  @property
  def chooses_start(self) -> bool:
    """Whether a search ranks possible starts first (`init="auto"`)."""
    return False

  def reset(self) -> None:
    """Puts every variable back to where it starts."""
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
    stride: a name or a list of times, see `strides.times_of`.
    eta: scale of the noise, ddim and ddpm only (Song et al. 2021, equation 16).
    lower_order_final: see `solvers.solver_coefficients`.
    label: what tables and pictures call it; None makes it from solver, eta and
      stride.
    variance: see `solvers.ddim_coefficients`.
  """

  def __init__(self, schedule: NoiseSchedule, num_steps: int,
               solver: str = "ddim", stride: str | npt.ArrayLike = "linear",
               eta: float | None = None, lower_order_final: bool = True,
               label: str | None = None, variance: str = "posterior",
               **kwargs):
    values = solvers.solver_coefficients(
        schedule, solver, num_steps, stride, eta,
        lower_order_final=lower_order_final, variance=variance)
    if label is None:
      label = labels.LABELS[solver]
      if eta is not None and solver in ("ddim", "ddpm"):
        label = {0.0: "DDIM", 1.0: "DDPM"}.get(
            float(eta), f"DDIM(eta={eta:g})")
      if variance != "posterior":
        label += f" ({labels.VARIANCES[variance]})"
      label += " " + (stride if isinstance(stride, str) else labels.GIVEN_TIMES)
    super().__init__(schedule, values, label, **kwargs)
    self.solver = solver
    self.stride = stride
    self.eta = eta
    self.lower_order_final = lower_order_final
    self.variance = variance

  def get_config(self):
    return {**super().get_config(), "solver": self.solver,
            "stride": self.stride, "eta": self.eta,
            "lower_order_final": self.lower_order_final,
            "variance": self.variance}


def full_chain(schedule: NoiseSchedule, variance: str = "posterior",
               num_steps: int | None = None) -> SolverSampler:
  """DDPM at many steps, against which few-step samplers are measured.

  Args:
    schedule: the forward process of the denoiser.
    variance: see `solvers.ddim_coefficients`.
    num_steps: K, from 1 to T; None for every training step.

  Returns:
    A sampler of K steps (Ho et al. 2020, https://arxiv.org/abs/2006.11239,
    algorithm 2), on the "linear" stride.

  Raises:
    ValueError: unknown variance, or K is out of range.
  """
  total = schedule.num_train_steps
  num_steps = total if num_steps is None else num_steps
  return SolverSampler(
      schedule, num_steps, "ddpm",
      "linspace" if num_steps == total else "linear", variance=variance,
      label=labels.full_chain(num_steps, total, variance))

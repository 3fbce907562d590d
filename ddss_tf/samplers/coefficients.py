"""The one structure that every sampler family produces.

state_0 = x_T is the noise, state_1 ... state_{K-1} are the states on the way,
and state_K is the image. k counts the steps taken; the paper counts the other
way. x0_hat_k is the clean image that step k predicts. A K-step sampler is

  x0_hat_k    = x0_from_state[k] state_k + x0_from_eps[k] eps(state_k, times[k])
  state_{k+1} = x0_weights[k] x0_hat_k + sum_{u <= k} state_weights[k, u] state_u
                + noise_scales[k] z_k,    z_k ~ N(0, I)

On a flow (`schedules.FlowSchedule`) the first line is in v instead, where
v = alpha_t eps - sigma_t x_0 (Salimans and Ho 2022,
https://arxiv.org/abs/2202.00512):

  x0_hat_k    = x0_from_state[k] state_k + x0_from_v[k] v(state_k, times[k])

At pure noise, where a flow begins, eps is the state itself and tells nothing of
the network, and x0_from_state of eps, 1 / alpha, is infinite. In v the two are
alpha and -sigma. Exactly one of x0_from_eps and x0_from_v is not None; a reader
that knows eps only finds nothing under its name, instead of another thing.

The last step adds no noise. For a class-conditional network eps(x, t) may stand
for eps(x, t, null) + guidance_scales[k] (eps(x, t, label) - eps(x, t, null)).
Everything that comes after the families, the chain, TensorBoard, pictures,
`sampler.json` and the export, reads only this structure.
"""

from typing import Any, Callable, NamedTuple

import numpy as np

from ddss_tf.schedules import NoiseSchedule


class Coefficients(NamedTuple):
  """Coefficients of a K-step sampler: float32 tensors or arrays.

  Attributes:
    times: [K], fed to the network; noisiest first, fractional allowed, in
      [0, T].
    x0_from_state: [K].
    x0_from_eps: [K], or None where the sampler is written in v.
    state_weights: [K, K], lower triangular.
    x0_weights: [K].
    noise_scales: [K], non-negative, the last one 0.
    guidance_scales: [K], or None where the denoiser is called as it is.
    noise_ratios: [K], or None where every pixel has the step's noise scale. With
      it, the noise scale of a pixel is noise_scales[k] noise_ratios[k]^v, and
      the network predicts v together with the noise: a learned variance (Nichol
      and Dhariwal 2021, equation 15). DDPM alone has it, at many steps.
    x0_from_v: [K], or None where the sampler is written in eps.
  """

  times: Any
  x0_from_state: Any
  x0_from_eps: Any
  state_weights: Any
  x0_weights: Any
  noise_scales: Any
  guidance_scales: Any = None
  noise_ratios: Any = None
  x0_from_v: Any = None

  @classmethod
  def x0_of(cls, schedule: NoiseSchedule, alpha, sigma) -> dict[str, Any]:
    """The fields that make x0_hat, before anything is learned.

    Args:
      schedule: the forward process; it decides between eps and v.
      alpha: NumPy [K].
      sigma: NumPy [K].
    """
    if schedule.in_v:
      return {"x0_from_state": alpha, "x0_from_eps": None, "x0_from_v": -sigma}
    return {"x0_from_state": 1 / alpha, "x0_from_eps": -sigma / alpha}

  @property
  def in_v(self) -> bool:
    """Whether it is written in v."""
    return self.x0_from_v is not None

  @property
  def x0_from_output(self) -> Any:
    """[K], what multiplies the network: `x0_from_v` or `x0_from_eps`."""
    return self.x0_from_v if self.in_v else self.x0_from_eps

  @property
  def num_steps(self) -> int:
    """K, which is also the number of network calls (NFE)."""
    return int(self.times.shape[0])

  def numpy(self) -> "Coefficients":
    """The same as float32 NumPy arrays."""
    return self.map(lambda value: np.asarray(value, np.float32))

  def map(self, function: Callable[[Any], Any]) -> "Coefficients":
    """Applies a function to every array that is not None."""
    return self._replace(**{name: function(value)
                            for name, value in self.arrays().items()})

  def arrays(self) -> dict[str, Any]:
    """The arrays by name, without those that are None."""
    return {name: value for name, value in self._asdict().items()
            if value is not None}

  def to_dict(self) -> dict[str, list]:
    """Plain lists, exact: a float64, which JSON keeps, holds every float32."""
    return {name: np.asarray(value, np.float32).astype(float).tolist()
            for name, value in self.arrays().items()}

  @classmethod
  def from_dict(cls, values: dict[str, list]) -> "Coefficients":
    """The inverse of `to_dict`, validated.

    Raises:
      ValueError: a name is missing or unknown, a shape or a value is not
        allowed.
    """
    needed = set(cls._fields) - set(cls._field_defaults)
    if "x0_from_v" in values:
      needed = needed - {"x0_from_eps"} | {"x0_from_v"}
    allowed = needed | {"guidance_scales"}
    if not needed <= set(values) <= allowed:
      raise ValueError(
          f"coefficients must be {sorted(needed)}, and may be "
          f"{sorted(allowed - needed)}. Received: {sorted(values)}")
    arrays = cls(**{"x0_from_eps": None, **values}).numpy()
    arrays.validate()
    return arrays

  def named_scalars(self) -> dict[str, float]:
    """Every entry under a name of its own, such as `state_weights/2_1`."""
    scalars = {}
    for name, value in self.numpy().arrays().items():
      for index in np.ndindex(value.shape):
        if name == "state_weights" and index[1] > index[0]:
          continue
        scalars[f"{name}/{'_'.join(map(str, index))}"] = float(value[index])
    return scalars

  def validate(self) -> None:
    """Checks shapes and ranges.

    Raises:
      ValueError: says what was expected and what was received.
    """
    if (self.x0_from_eps is None) != self.in_v:
      raise ValueError("x0_from_eps or x0_from_v must be given, and not both")
    arrays = self.numpy()
    steps = arrays.times.shape[0] if arrays.times.ndim == 1 else 0
    if steps < 1:
      raise ValueError("coefficients must have at least one step. "
                       f"Received: times of shape {arrays.times.shape}")
    for name, value in arrays.arrays().items():
      expected = (steps, steps) if name == "state_weights" else (steps,)
      if value.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected}. Received: {value.shape}")
      if not np.all(np.isfinite(value)):
        raise ValueError(f"{name} must be finite. Received: {value.tolist()}")
    if np.any(np.triu(arrays.state_weights, 1)):
      raise ValueError("state_weights must be lower triangular: no step can "
                       "use a state that is not visited yet")
    if np.any(arrays.noise_scales < 0) or arrays.noise_scales[-1] != 0:
      raise ValueError(
          "noise_scales must be non-negative and end in 0. "
          f"Received: {arrays.noise_scales.tolist()}")
    if np.any(arrays.times < 0):
      raise ValueError(
          f"times must not be negative. Received: {arrays.times.tolist()}")

# Part of ddss_tf, under the Apache License 2.0.
"""A searched few-step sampler as a scheduler of diffusers.

This file and the `scheduler_config.json` beside it are all there is to it; they
need PyTorch and diffusers, and nothing of the library that wrote them:

  from scheduling_ddss import DDSSScheduler  # This folder on sys.path.

  pipe.scheduler = DDSSScheduler.from_pretrained("this/folder")
  images = pipe(num_inference_steps=K).images

`pipe` is a pipeline that makes images or latents of noise, such as `DDPMPipeline`,
`LDMPipeline`, `StableDiffusionPipeline` or, with a sampler of a flow,
`StableDiffusion3Pipeline`. If there is a `guidance.py` beside this file, it has the
scales of guidance for the pipeline.

With state_0 ... state_{K-1} the visited states, state_0 = x_T the noise,

  x0_hat_k    = x0_from_state[k] state_k + x0_from_eps[k] eps(state_k, times[k])
  state_{k+1} = x0_weights[k] x0_hat_k + sum_{u <= k} state_weights[k][u] state_u
                + noise_scales[k] z_k,    z_k ~ N(0, I)

and state_K is the image. A step uses all states before it, so a chain starts at its
first step and leaves none out; it cannot begin halfway, as image-to-image
pipelines would have it.

These states are of a variance-preserving process: alpha^2 + sigma^2 = 1. A flow's
pipeline has z = (1 - s) x_0 + s noise instead, and its model predicts the velocity
u = noise - x_0. A step turns both into

  state = n z,   v = ((alpha - sigma) state + u) / n,   n = alpha + sigma
                                                        = ((1 - s)^2 + s^2)^(-1/2),

takes v with x0_from_v in place of eps with x0_from_eps, and gives the next z.
"""

import dataclasses
import math
import os
import shutil

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
import torch

_FLOW = "flow_prediction"
_PREDICTIONS = ("epsilon", "sample", "v_prediction", _FLOW)
_BOUNDS = (None, "clip", "dynamic")
_DYNAMIC_QUANTILE = 0.995


@dataclasses.dataclass
class DDSSSchedulerOutput(BaseOutput):
  """What a step returns.

  Attributes:
    prev_sample: [B, C, H, W], the next state; after the last step the image.
    pred_original_sample: [B, C, H, W], the image predicted at this step.
  """

  prev_sample: torch.Tensor
  pred_original_sample: torch.Tensor | None = None


class DDSSScheduler(SchedulerMixin, ConfigMixin):
  """K steps with the coefficients that a search has found.

  Args:
    times: [K], training steps in [0, T - 1], noisiest first; fractional. The
      network is fed with them. A flow's is fed with T s, where
      s = shift q / (1 + (shift - 1) q), q = (time + 1) / T.
    x0_from_state: [K].
    state_weights: [K][K], lower triangular.
    x0_weights: [K].
    noise_scales: [K], the last one 0.
    x0_from_eps: [K], for all but a flow.
    x0_from_v: [K], for a flow.
    trained_betas: [T], the variances of the training steps of the model, for
      all but a flow.
    flow_shift: the shift of a flow; None: the model is not of a flow.
    num_train_timesteps: T.
    prediction_type: what the model predicts: "epsilon", "sample" (the image),
      "v_prediction", or a flow's velocity, "flow_prediction".
    guidance_scales: [K], the scales of guidance, which a pipeline has to apply,
      see `guidance.py`; None: the sampler is for a model without guidance.
    x0_bound: what the sampler was searched with: None; "clip", predicted images
      are clipped to [-1, 1]; "dynamic", to the 0.995 quantile of their absolute
      values, if that is above 1, and divided by it.
    integer_timesteps: round the times, for a model that takes whole numbers
      only or cuts fractions off. It is then another sampler than the one that
      was searched, with other images.
    label: what its author calls the sampler.
    denoiser: the name and the SHA-256 of the model it was searched for.

  Attributes:
    timesteps: [K], what the network is fed with: float32, or int64 with
      `integer_timesteps`.
    init_noise_sigma: the deviation of the noise that a pipeline starts with. It
      is 1, but for a flow's sampler that starts below pure noise, where it is
      1 / n. Pipelines of flows do not ask for it: give them
      `latents=noise * init_noise_sigma` then.

  Raises:
    ValueError: lists that do not fit together, a part of a flow with a part of
      another process, unknown prediction_type or x0_bound.
  """

  order = 1

  @register_to_config
  def __init__(
      self,
      times: list[float],
      x0_from_state: list[float],
      state_weights: list[list[float]],
      x0_weights: list[float],
      noise_scales: list[float],
      x0_from_eps: list[float] | None = None,
      x0_from_v: list[float] | None = None,
      trained_betas: list[float] | None = None,
      flow_shift: float | None = None,
      num_train_timesteps: int = 1000,
      prediction_type: str = "epsilon",
      guidance_scales: list[float] | None = None,
      x0_bound: str | None = None,
      integer_timesteps: bool = False,
      label: str = "DDSS",
      denoiser: dict | None = None,
  ):
    if prediction_type not in _PREDICTIONS:
      raise ValueError(f"prediction_type must be one of {_PREDICTIONS}. "
                       f"Received: {prediction_type!r}")
    if x0_bound not in _BOUNDS:
      raise ValueError(f"x0_bound must be one of {_BOUNDS}. "
                       f"Received: {x0_bound!r}")
    self._is_flow = prediction_type == _FLOW
    needed, other = ("x0_from_eps", "trained_betas"), ("x0_from_v", "flow_shift")
    if self._is_flow:
      needed, other = other, needed
    given = dict(x0_from_eps=x0_from_eps, trained_betas=trained_betas,
                 x0_from_v=x0_from_v, flow_shift=flow_shift)
    if [name for name in given if given[name] is not None] != list(needed):
      raise ValueError(
          f"{' and '.join(needed)} must be given, and not {' or '.join(other)}, "
          f"with prediction_type {prediction_type!r}. Received: "
          f"{[name for name in given if given[name] is not None]}")
    steps = len(times)
    lengths = {len(values) for values in (
        x0_from_state, given[needed[0]], state_weights, x0_weights,
        noise_scales, *state_weights, guidance_scales or times)}
    if lengths != {steps}:
      raise ValueError(f"all coefficients must have {steps} entries, one a "
                       f"step. Received: {sorted(lengths)}")
    if not self._is_flow:
      if len(trained_betas) != num_train_timesteps:
        raise ValueError(f"trained_betas must have {num_train_timesteps} "
                         f"entries. Received: {len(trained_betas)}")
      betas = torch.tensor(trained_betas, dtype=torch.float64)
      # A last beta of 1, which leaves no signal, is taken for abar = 1e-12.
      self._log_abar = torch.cumsum(
          torch.log1p(-betas), 0).clamp(min=math.log(1e-12))
      self.betas = betas.float()
      self.alphas_cumprod = torch.exp(self._log_abar).float()
    self.num_inference_steps = steps
    self.set_timesteps()

  def __len__(self) -> int:
    return self.config.num_train_timesteps

  @property
  def step_index(self) -> int:
    """How many steps of the current chain have been made."""
    return len(self._states)

  def set_timesteps(self, num_inference_steps: int | None = None,
                    device: str | torch.device | None = None,
                    sigmas: list[float] | None = None,
                    mu: float | None = None) -> None:
    """Begins a chain.

    Args:
      num_inference_steps: K; None is the same.
      device: of `timesteps`.
      sigmas: K noise levels that a pipeline would have by default. The sampler
        has its own, so only their number is looked at.
      mu: the shift that a pipeline would have; ignored, likewise.

    Raises:
      ValueError: another number of steps, for which there are no coefficients.
    """
    del mu
    steps = len(self.config.times)
    for asked in (num_inference_steps, None if sigmas is None else len(sigmas)):
      if asked not in (None, steps):
        raise ValueError(
            f"num_inference_steps must be {steps}: the sampler was searched for "
            f"{steps} steps. Received: {asked}")
    times = torch.tensor(self.config.times, dtype=torch.float64)
    if self._is_flow:
      # s is noise / (noise + signal); neither loses digits near 0.
      noise = self.config.flow_shift * (times + 1)
      # As diffusers rounds: s to float32 first, then T s.
      times = len(self) * (noise / (noise + len(self) - 1 - times)).float()
    times = times.float()
    if self.config.integer_timesteps:
      times = times.round().long()
      if not self._is_flow:
        times = times.clamp(max=len(self) - 1)
    self.timesteps = times.to(device)
    self._times = times.tolist()
    # n of each step: what the pipeline's state is multiplied with. 1 at the end.
    self._norms = [1.0] * (steps + 1)
    if self._is_flow:
      self._norms[:-1] = sum(self._alpha_sigma(times)).tolist()
    self.init_noise_sigma = 1 / self._norms[0]
    self._states = []

  def set_begin_index(self, begin_index: int = 0) -> None:
    """Some pipelines say with it that a chain begins at its first step.

    Raises:
      ValueError: another step.
    """
    if begin_index:
      raise ValueError("begin_index must be 0: a chain cannot begin halfway. "
                       f"Received: {begin_index}")

  def scale_model_input(self, sample: torch.Tensor,
                        timestep=None) -> torch.Tensor:
    """The states are the network's input as they are."""
    del timestep
    return sample

  def step(
      self,
      model_output: torch.Tensor,
      timestep: float | torch.Tensor,
      sample: torch.Tensor,
      eta: float = 0.0,
      use_clipped_model_output: bool | None = None,
      generator: torch.Generator | list[torch.Generator] | None = None,
      variance_noise: torch.Tensor | None = None,
      return_dict: bool = True,
  ) -> DDSSSchedulerOutput | tuple:
    """Makes one step. After the last one the next chain may begin.

    Args:
      model_output: [B, C, H, W], the model's prediction at `sample`; or
        [B, 2 C, H, W] of a model with a learned variance, whose last C channels
        are not used: the noise is the sampler's own.
      timestep: of this step, from `timesteps` in their order.
      sample: [B, C, H, W], the pipeline's current state.
      eta: must be 0, as `DDIMPipeline` has it: the noise is the sampler's own.
      use_clipped_model_output: must be None or False, likewise.
      generator: of the noise, in the steps that add any.
      variance_noise: [B, C, H, W], standard normal noise to use instead.
      return_dict: return a tuple if False.

    Returns:
      The pipeline's next state and the predicted image.

    Raises:
      ValueError: a step out of order, a model_output of another shape, both
        generator and variance_noise, or an option of other samplers.
    """
    k = self.step_index
    self._check_order(k, float(timestep))
    received, channels = tuple(model_output.shape), sample.shape[1]
    if received[1:2] == (2 * channels,):
      model_output = model_output[:, :channels]
    if model_output.shape != sample.shape:
      raise ValueError(
          f"model_output must have the shape {tuple(sample.shape)} of the "
          "sample, or twice as many channels with a learned variance. Received: "
          f"{received}")
    if eta or use_clipped_model_output:
      raise ValueError(
          "eta must be 0 and use_clipped_model_output False: the sampler has "
          "noise and bounds of its own. Received: "
          f"{eta} and {use_clipped_model_output}")
    if generator is not None and variance_noise is not None:
      raise ValueError("generator and variance_noise must not both be given")
    config = self.config
    # The state in float32, whatever the model's precision.
    x_t = self._norms[k] * sample.float()
    self._states.append(x_t)
    from_state, from_output = self._x0_coefficients(k)
    x0_hat = from_state * x_t + from_output * model_output.float()
    x0_hat = _bound(x0_hat, config.x0_bound)
    x_s = config.x0_weights[k] * x0_hat
    for weight, state in zip(config.state_weights[k], self._states):
      x_s = x_s + weight * state
    if config.noise_scales[k] > 0:
      if variance_noise is None:
        variance_noise = randn_tensor(
            sample.shape, generator=generator, device=sample.device,
            dtype=sample.dtype)
      x_s = x_s + config.noise_scales[k] * variance_noise.float()
    if k == len(self._times) - 1:
      self._states = []
    x_s = (x_s / self._norms[k + 1]).to(sample.dtype)
    x0_hat = x0_hat.to(sample.dtype)
    if not return_dict:
      return x_s, x0_hat
    return DDSSSchedulerOutput(prev_sample=x_s, pred_original_sample=x0_hat)

  def _check_order(self, k: int, timestep: float) -> None:
    """Refuses a step that is not the next one."""
    # The nearest of all: a pipeline may have rounded it to half precision.
    nearest = min(self._times, key=lambda time: abs(time - timestep))
    if nearest != self._times[k]:
      raise ValueError(
          f"step {k} of the chain must be at timestep {self._times[k]:g}. "
          f"Received: {timestep:g}. Begin a chain with set_timesteps and take "
          "its timesteps one after the other")

  def _alpha_sigma(self, times: torch.Tensor):
    """(alpha, sigma) at `timesteps`, or any between.

    log abar is linear between training steps; a flow is in closed form.
    """
    times = times.double()
    if self._is_flow:
      s = (times / len(self)).clamp(0, 1)
      norm = torch.rsqrt((1 - s) ** 2 + s**2)
      return (1 - s) * norm, s * norm
    times = times.clamp(0, len(self) - 1)
    left = times.floor().long().clamp(max=max(len(self) - 2, 0))
    right = (left + 1).clamp(max=len(self) - 1)
    table = self._log_abar.to(times.device)
    log_abar = table[left] + (times - left) * (table[right] - table[left])
    return torch.exp(0.5 * log_abar), torch.sqrt(-torch.expm1(log_abar))

  def _x0_coefficients(self, k: int) -> tuple[float, float]:
    """Of x0_hat in step k: the factors of the state and of the model's output.

    x0_hat = p x + q eps, written in v or in the predicted image, is exact even
    where 1 / alpha is large. Of a flow x0_hat = p x + q v is written in u.
    """
    config = self.config
    p = config.x0_from_state[k]
    alpha, sigma = (float(value) for value in self._alpha_sigma(
        torch.tensor(self._times[k], dtype=torch.float64)))
    if self._is_flow:
      q = config.x0_from_v[k] / (alpha + sigma)
      return p + q * (alpha - sigma), q
    q = config.x0_from_eps[k]
    if config.prediction_type == "epsilon":
      return p, q
    dp = _difference(p, 1 / alpha)
    dq = _difference(q, -sigma / alpha)
    if config.prediction_type == "sample":
      return dp + dq / sigma, 1 - dq * alpha / sigma
    return alpha + dp + dq * sigma, -sigma + dq * alpha

  def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor,
                timesteps: torch.Tensor) -> torch.Tensor:
    """A sample of the forward process, as the pipeline has it.

    Args:
      original_samples: [B, ...].
      noise: [B, ...], standard normal.
      timesteps: [B], of the kind of `timesteps`; fractional allowed.
    """
    shape = (-1,) + (1,) * (original_samples.ndim - 1)
    alpha, sigma = self._alpha_sigma(timesteps.to(original_samples.device))
    if self._is_flow:
      alpha, sigma = alpha / (alpha + sigma), sigma / (alpha + sigma)
    alpha, sigma = (value.to(original_samples).reshape(shape)
                    for value in (alpha, sigma))
    return alpha * original_samples + sigma * noise

  def save_pretrained(self, save_directory: str | os.PathLike,
                      push_to_hub: bool = False, **kwargs) -> None:
    """Saves the configuration, and this file and `guidance.py` beside it."""
    os.makedirs(save_directory, exist_ok=True)
    own = os.path.abspath(__file__)
    for file in (own, os.path.join(os.path.dirname(own), "guidance.py")):
      copy = os.path.join(os.path.abspath(save_directory), os.path.basename(file))
      if file != copy and os.path.exists(file):
        shutil.copyfile(file, copy)
    super().save_pretrained(save_directory, push_to_hub, **kwargs)


def _difference(value: float, reference: float) -> float:
  """value - reference, 0 if that is rounding to float32."""
  difference = value - reference
  return 0.0 if abs(difference) <= 3e-7 * abs(reference) else difference


def _bound(x0_hat: torch.Tensor, x0_bound: str | None) -> torch.Tensor:
  """Keeps predicted images [B, ...] near [-1, 1]; see `DDSSScheduler`."""
  if x0_bound is None:
    return x0_hat
  if x0_bound == "clip":
    return x0_hat.clamp(-1, 1)
  # Not torch.quantile, which refuses large images.
  ordered = x0_hat.abs().flatten(1).sort(dim=1).values
  position = _DYNAMIC_QUANTILE * (ordered.shape[1] - 1)
  left = int(position)
  right = min(left + 1, ordered.shape[1] - 1)
  s = torch.lerp(ordered[:, left], ordered[:, right], position - left)
  s = s.clamp(min=1).reshape((-1,) + (1,) * (x0_hat.ndim - 1))
  return x0_hat.clamp(-s, s) / s

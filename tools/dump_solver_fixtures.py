"""Dumps small trajectories of the schedulers of diffusers, for the tests.

  pip install torch diffusers
  python tools/dump_solver_fixtures.py tests/testdata/solvers.npz

Run once, outside CI: the tests then need neither PyTorch nor diffusers. The
file was written with diffusers 0.42.1. All is float64. The "network" is the
exact noise prediction for a data set that is a mixture of two Gaussians on R^4,
shown as images [2, 2, 1]. So the tests can rebuild it from stored constants.

Each case `<solver>_<grid>_<K>`, of K network calls, has these keys in the file:

  <case>/times     [K] time of each network call, in order
  <case>/states    [K, B, 2, 2, 1] input of each network call
  <case>/image     [B, 2, 2, 1] what the last step returns
  <case>/abar_end  abar that the last step goes to; 1 is the clean image
  <case>/noise     [B, K - 1, 2, 2, 1] standard normal noise that all steps but
                   the last add, for stochastic solvers only

The cases share `x_T`, `mixture_means` [2, 4], `mixture_stds` [2],
`mixture_weights` [2], `betas_linear`, `betas_scaled_linear`, `betas_cosine`.
All cases but `dpm++2m_scaled_linear` and `dpm++2m_cosine` (K = 10, linspace)
have linear betas.
"""

import fractions
import sys
import types
from unittest import mock

import diffusers
from diffusers.schedulers import scheduling_ddim
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers import scheduling_deis_multistep
from diffusers.schedulers import scheduling_dpmsolver_multistep
from diffusers.schedulers import scheduling_pndm
from diffusers.schedulers import scheduling_unipc_multistep
import numpy as np
import torch

BATCH = 6
NUM_CALLS = (5, 10, 20)
TRAIN_STEPS = 1000
MEANS = np.array([[0.6, -0.4, 0.5, 0.3], [-0.5, 0.5, -0.2, -0.6]])
STDS = np.array([0.25, 0.4])
WEIGHTS = np.array([0.35, 0.65])

BETAS = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085,
                          beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
}


def use_float64() -> None:
  """Makes the schedulers keep their tables and states in float64.

  They name float32 for the betas, the sigmas and, in DPM-Solver, the sample of
  each step. Here that name gives float64. To overwrite attributes afterwards
  would be too late: other values would be made from rounded ones before.
  """
  torch.set_default_dtype(torch.float64)
  for module in (scheduling_ddim, scheduling_ddpm, scheduling_deis_multistep,
                 scheduling_dpmsolver_multistep, scheduling_pndm,
                 scheduling_unipc_multistep):
    module.np = types.SimpleNamespace(**vars(np))
    module.np.float32 = np.float64
    module.torch = types.SimpleNamespace(**vars(torch))
    module.torch.float32 = torch.float64


def log_abar_table(betas: np.ndarray) -> np.ndarray:
  return np.cumsum(np.log1p(-betas))


def mixture_eps(x: np.ndarray, t: float, betas: np.ndarray) -> np.ndarray:
  """E[noise | x_t = x], exact; log abar is linear between integer times."""
  log_abar = np.interp(t, np.arange(len(betas)), log_abar_table(betas))
  alpha, sigma_squared = np.exp(0.5 * log_abar), -np.expm1(log_abar)
  variances = alpha ** 2 * STDS ** 2 + sigma_squared
  offsets = x.reshape([len(x), 1, -1]) - alpha * MEANS
  dim = MEANS.shape[1]
  logits = (np.log(WEIGHTS) - 0.5 * dim * np.log(variances)
            - 0.5 * np.sum(offsets ** 2, -1) / variances)
  posterior = np.exp(logits - logits.max(-1, keepdims=True))
  posterior /= posterior.sum(-1, keepdims=True)
  eps = np.sqrt(sigma_squared) * np.einsum(
      "bi,bid->bd", posterior / variances, offsets)
  return eps.reshape(x.shape)


def network_times(scheduler) -> np.ndarray:
  """The times whose abar is the one that the scheduler computes with."""
  steps = scheduler.timesteps.numpy().astype(np.float64)
  if not hasattr(scheduler, "sigmas"):
    return steps  # Schedulers without sigmas look abar up at these integers.
  # `sigmas` are sigma_t / alpha_t; the last one belongs to the final image.
  sigmas = scheduler.sigmas.numpy()[:-1]
  log_abar = log_abar_table(scheduler.betas.numpy())
  times = np.interp(np.log1p(sigmas ** 2), -log_abar, np.arange(len(log_abar)))
  if not (scheduler.config.get("use_karras_sigmas")
          or scheduler.config.get("use_lu_lambdas")):
    np.testing.assert_allclose(times, steps, rtol=0, atol=1e-8)
    times = steps
  # On a Karras or Lu grid the scheduler rounds the times for the network, but
  # keeps the sigmas that they were rounded from. The fractional times match
  # these sigmas.
  at_times = np.interp(times, np.arange(len(log_abar)), log_abar)
  np.testing.assert_allclose(np.sqrt(np.expm1(-at_times)), sigmas, rtol=1e-9)
  return times


def trajectory(scheduler, num_calls: int, x_start: np.ndarray,
               noise: np.ndarray | None = None, eta: float = 0.0) -> dict:
  """Runs a scheduler; returns the fields of a case, see the module.

  Args:
    scheduler: a scheduler of diffusers.
    num_calls: K.
    x_start: x_T [B, 2, 2, 1]. The schedulers work element by element, so the
      order of the axes does not matter to them.
    noise: [B, K - 1, 2, 2, 1]; None for a deterministic solver.
    eta: the eta of DDIM.
  """
  is_ddim = isinstance(scheduler, diffusers.DDIMScheduler)
  is_pndm = isinstance(scheduler, diffusers.PNDMScheduler)
  # PNDM visits its second time twice.
  scheduler.set_timesteps(num_calls - 1 if is_pndm else num_calls)
  steps = scheduler.timesteps.tolist()
  times = network_times(scheduler)
  betas = scheduler.betas.numpy()
  x, states = torch.from_numpy(x_start), []
  for i, (step, t) in enumerate(zip(steps, times, strict=True)):
    states.append(x.numpy())
    eps = torch.from_numpy(mixture_eps(states[-1], t, betas))
    # If DDPM and DDIM ask for noise in the last step, they scale it by zero, or
    # by 1e-10, because DDPM clamps the variance.
    added = torch.zeros_like(x)
    if noise is not None and i < num_calls - 1:
      added = torch.from_numpy(noise[:, i])
    options = {}
    if is_ddim:
      options = dict(eta=eta, variance_noise=added)
      # DDIM steps to step - TRAIN_STEPS // num_inference_steps, which on a
      # linspace grid is not the next time of that grid: the state would be
      # treated as less noisy than it is. This makes it the next time, and
      # changes nothing on the other grids.
      following = steps[i + 1] if i + 1 < len(steps) else -1
      scheduler.num_inference_steps = fractions.Fraction(
          TRAIN_STEPS, step - following)
    with mock.patch.object(scheduling_ddpm, "randn_tensor",
                           lambda *args, value=added, **kwargs: value):
      x = scheduler.step(eps, step, x, **options).prev_sample
  fields = dict(times=times, states=np.stack(states), image=x.numpy(),
                abar_end=np.float64(1.0))
  if hasattr(scheduler, "sigmas"):
    fields["abar_end"] = 1 / (1 + scheduler.sigmas.numpy()[-1] ** 2)
  if noise is not None:
    fields["noise"] = noise
  for name, value in fields.items():
    assert value.dtype == np.float64 and np.all(np.isfinite(value)), name
  return fields


def solvers():
  """Yields (name, numbers of calls, make_scheduler, is_stochastic, eta)."""
  def make(cls, betas="linear", **config):
    return lambda: cls(num_train_timesteps=TRAIN_STEPS, **BETAS[betas],
                       **config)

  for spacing in ("leading", "trailing"):
    yield f"ddpm_{spacing}", NUM_CALLS, make(
        diffusers.DDPMScheduler, variance_type="fixed_small",
        clip_sample=False, timestep_spacing=spacing), True, 0.0

  for eta, spacing in ((0, "leading"), (0, "trailing"), (0, "linspace"),
                       (0.5, "leading"), (1, "leading")):
    yield f"ddim_eta{eta}_{spacing}", NUM_CALLS, make(
        diffusers.DDIMScheduler, clip_sample=False, set_alpha_to_one=True,
        timestep_spacing=spacing), eta > 0, eta

  def dpm(order, **config):
    return make(diffusers.DPMSolverMultistepScheduler, solver_order=order,
                algorithm_type="dpmsolver++", solver_type="midpoint",
                final_sigmas_type="zero", **config)

  for order in (2, 3):
    for spacing in ("linspace", "leading"):
      yield (f"dpm++{order}m_{spacing}", NUM_CALLS,
             dpm(order, timestep_spacing=spacing), False, 0.0)
  yield ("dpm++2m_karras", NUM_CALLS, dpm(2, use_karras_sigmas=True), False,
         0.0)
  yield "dpm++2m_lu", NUM_CALLS, dpm(2, use_lu_lambdas=True), False, 0.0
  for betas in ("scaled_linear", "cosine"):
    yield f"dpm++2m_{betas}", (10,), dpm(2, betas=betas), False, 0.0

  for order in (2, 3):
    yield f"deis{order}_linspace", NUM_CALLS, make(
        diffusers.DEISMultistepScheduler, solver_order=order), False, 0.0

  # bh1 cannot end with a zero sigma: B(h) = h is infinite in that step, and
  # diffusers multiplies it by zero.
  for order, variant, final in ((2, "bh1", "sigma_min"), (2, "bh2", "zero"),
                                (3, "bh1", "sigma_min"), (3, "bh2", "zero"),
                                (3, "bh2", "sigma_min")):
    grid = "linspace" if final == "zero" else final
    yield f"unipc{order}-{variant}_{grid}", NUM_CALLS, make(
        diffusers.UniPCMultistepScheduler, solver_order=order,
        solver_type=variant, predict_x0=True,
        final_sigmas_type=final), False, 0.0

  yield "pndm_leading", NUM_CALLS, make(
      diffusers.PNDMScheduler, skip_prk_steps=True, set_alpha_to_one=True,
      timestep_spacing="leading"), False, 0.0


def main(path: str) -> None:
  use_float64()
  rng = np.random.default_rng(0)
  x_start = rng.standard_normal([BATCH, 2, 2, 1])
  arrays = dict(x_T=x_start, mixture_means=MEANS, mixture_stds=STDS,
                mixture_weights=WEIGHTS)
  for name, config in BETAS.items():
    arrays[f"betas_{name}"] = diffusers.DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS, **config).betas.numpy()
  for name, numbers, make_scheduler, is_stochastic, eta in solvers():
    for num_calls in numbers:
      noise = None
      if is_stochastic:
        noise = rng.standard_normal([BATCH, num_calls - 1, 2, 2, 1])
      case = f"{name}_{num_calls}" if len(numbers) > 1 else name
      fields = trajectory(make_scheduler(), num_calls, x_start, noise, eta)
      for field, value in fields.items():
        arrays[f"{case}/{field}"] = value
  np.savez_compressed(path, **arrays)


if __name__ == "__main__":
  main(sys.argv[1])

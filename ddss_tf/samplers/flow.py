"""The schedulers of flow models as lists of times: sigmas, and their shift.

Euler's method on dz / ds = u, which these schedulers take, is our ddim. So what
is their own are the noise levels that they visit. `strides.FLOW_STRIDES` has
those with a name; here are those that a user gives.
"""

import math

import numpy as np
import numpy.typing as npt

from ddss_tf.schedules import FlowSchedule

SHIFTS = ("exponential", "linear")


def times_of_sigmas(schedule: FlowSchedule, sigmas: npt.ArrayLike,
                    shifted: bool = True) -> np.ndarray:
  """The times of noise levels, such as the `sigmas` that a pipeline is given.

  Args:
    schedule: the process.
    sigmas: float [K], strictly decreasing, in (0, 1], 1 for pure noise; without
      the 0 of the image, which libraries append.
    shifted: whether they are the s of the states; else they are what the
      schedule shifts to them, as the pipelines of diffusers take them.

  Returns:
    float64 [K], a stride for `make_sampler`.

  Raises:
    ValueError: they do not decrease strictly, or one is below the noise level
      of step 0 or above 1.
  """
  if not isinstance(schedule, FlowSchedule):
    raise ValueError("sigmas must be of a FlowSchedule. "
                     f"Received: {type(schedule).__name__}")
  sigmas = np.asarray(sigmas, np.float64)
  total = schedule.num_train_steps
  least = float(schedule.noise_level(0)) if shifted else 1 / total
  if sigmas.ndim != 1 or not sigmas.size or not (
      np.all(np.diff(sigmas) < 0) and sigmas[0] <= 1
      and sigmas[-1] >= least * (1 - 1e-6)):
    raise ValueError(
        f"sigmas must decrease strictly and lie in [{least:.6g}, 1], without a "
        f"last 0. Received: {sigmas.tolist()}")
  if shifted:
    return schedule.time_of_noise_level(sigmas)
  return np.clip(total * sigmas - 1, 0, total - 1)


def dynamic_shift(num_tokens: int, kind: str = "exponential",
                  num_tokens_range: tuple[int, int] = (256, 4096),
                  mu_range: tuple[float, float] = (0.5, 1.15)) -> float:
  """The shift of a flow schedule for the size of an image.

  What diffusers calls dynamic shifting: mu is linear in the number of tokens,
  through the two given points and beyond them. It goes with the stride
  "flow-dynamic".

  Args:
    num_tokens: positive: the patches of an image, 4096 at 1024 x 1024 for
      latents of an eighth of the size and patches of 2 x 2.
    kind: "exponential", the shift is e^mu; or "linear", it is mu.
    num_tokens_range: the two numbers of tokens.
    mu_range: mu at these. The defaults are those of FLUX in diffusers.

  Returns:
    The `shift` of `FlowSchedule`.

  Raises:
    ValueError: unknown kind, the numbers of tokens are equal or not positive,
      or the shift would not be positive.
  """
  if kind not in SHIFTS:
    raise ValueError(f"kind must be {' or '.join(SHIFTS)}. Received: {kind!r}")
  (few, many), (low, high) = num_tokens_range, mu_range
  if few == many or min(num_tokens, few, many) < 1:
    raise ValueError(
        "num_tokens and the two of num_tokens_range must be positive, and "
        f"these differ. Received: {num_tokens} and {num_tokens_range}")
  mu = low + (high - low) * (num_tokens - few) / (many - few)
  shift = math.exp(mu) if kind == "exponential" else float(mu)
  if not shift > 0:
    raise ValueError(f"the shift must be positive. Received: mu={mu:g}")
  return shift

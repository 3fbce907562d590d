"""Strides: the K training steps, of T, that a sampler visits."""

import functools
from typing import Callable

import numpy as np
import numpy.typing as npt

from ddss_tf.schedules import NOISIEST_LOG_SNR, FlowSchedule, NoiseSchedule

_KARRAS_RHO = 7.0
_MATCHED = "matched_"


def _linear(count, num_steps):
  return np.arange(num_steps) * (count // num_steps)


def _uniform(count, num_steps):
  return np.arange(num_steps) * count // num_steps


def _trailing(count, num_steps):
  return np.round((np.arange(num_steps) + 1) * count / num_steps) - 1


def _linspace(count, num_steps):
  return np.round(np.linspace(count - 1, 0, num_steps))[::-1]


def _linspace_open(count, num_steps):
  return np.round(np.linspace(0, count - 1, num_steps + 1))[1:]


def _quadratic(count, num_steps):
  return np.floor(np.linspace(0, np.sqrt(0.8 * count), num_steps) ** 2)


# Functions of N and K that give whole times, the cleanest first.
_WHOLE = {
    "linear": _linear, "trailing": _trailing, "linspace": _linspace,
    "linspace_open": _linspace_open, "quadratic": _quadratic}
STRIDES = (*_WHOLE, "logsnr", "karras", "leading", "uniform",
           *(_MATCHED + name for name in _WHOLE))


def _flow_euler(schedule, num_steps):
  # Of the last step's s, which is shifted, the shift is taken once more.
  q = np.linspace(1, schedule.noise_level(0), num_steps)
  # Without a shift the last one is step 0, to rounding.
  return np.round(schedule.num_train_steps * q - 1, 9)


def _flow_dynamic(schedule, num_steps):
  return np.linspace(schedule.num_train_steps - 1.0, 0, num_steps)


# Of flows only: functions of the schedule and K, the noisiest time first.
_OF_FLOWS = {"flow-euler": _flow_euler, "flow-dynamic": _flow_dynamic}
FLOW_STRIDES = tuple(_OF_FLOWS)


def times_of(schedule: NoiseSchedule, stride: str | npt.ArrayLike,
             num_steps: int) -> np.ndarray:
  """Times tau of a K-step sampler, noisiest first.

  With i = 0 ... K-1, and N the number of training steps whose log-SNR is at
  least `NOISIEST_LOG_SNR`, or K if that is more:

    linear:    i (N // K), the first step of each of K equal blocks; the
               N mod K noisiest steps are in none of them
    leading:   i (T // K), as in the original DDIM code and diffusers; equal to
               linear where N is T
    uniform:   floor(i N / K), equal to linear where K divides N
    trailing:  round((i + 1) N / K) - 1
    linspace:  round(linspace(0, N - 1, K)_i)
    linspace_open: round(linspace(0, N - 1, K + 1)_{i+1}), without step 0, as
               diffusers' multistep schedulers do by default
    quadratic: floor(linspace(0, sqrt(0.8 N), K)_i ** 2)
    logsnr:    lambda_tau in equal steps from lambda_0 to lambda_{N-1}
    karras:    (sigma_tau / alpha_tau)^(1/7) in equal steps between the same
               ends (Karras et al. 2022, https://arxiv.org/abs/2206.00364,
               equation 5)
    matched_linear, matched_trailing, matched_linspace, matched_linspace_open,
    matched_quadratic: the training steps whose log-SNR is nearest to that of
               the linear schedule of Ho et al. (2020, T = 1000) at its linear,
               trailing, ... steps. Where the range of this schedule is
               smaller, the values are scaled to fit into it.

  and on a flow, where q = (t + 1) / T is what the schedule shifts,

    flow-euler: q = linspace(1, s_0, K)_i, s_0 the s of step 0, which is shifted
               already: FlowMatchEulerDiscreteScheduler of diffusers, which
               shifts its steps twice; for a shift of 1 or more
    flow-dynamic: q = linspace(1, 1 / T, K)_i: the same with dynamic shifting,
               where the schedule has the shift of the image's size (see
               `flow.dynamic_shift`)

  The paper names a linear and a quadratic stride without a formula. The
  quadratic one is that of Song et al. (2021,
  https://arxiv.org/abs/2010.02502); N and the matched strides are our choice.

  N is T for the linear schedule. A cosine schedule has a few more steps, whose
  images are practically pure noise: there every error in eps becomes one
  hundred times as large in x0_hat. So named strides leave them out, except for
  "leading", which follows other libraries. A list of times may name any step.
  On a flow, whose chains are in v, N is T: "trailing", "linspace",
  "linspace_open" and its own strides begin at pure noise. There logsnr and
  karras, which cannot begin at an infinite log-SNR, begin at
  `NOISIEST_LOG_SNR`; the matched ones have the noise levels of the linear
  schedule, which are finite.

  logsnr, karras and the flow's own give fractional times. Where one of the
  others names a step twice (quadratic from K = 30 at T = 1000, the rounded ones close to K = T),
  the later one moves to the next free step, so that no step is wasted. At
  K = 1 linear, leading, uniform and quadratic give 0, the other ones that are
  not matched N - 1.

  Args:
    schedule: the forward process.
    stride: one of `STRIDES`, of `FLOW_STRIDES` on a flow, or the K times
      themselves, strictly decreasing, in [0, T - 1], fractional allowed.
    num_steps: K, from 1 to T.

  Returns:
    float64 [K], strictly decreasing, in [0, T - 1].

  Raises:
    ValueError: unknown name; a stride of flows on another schedule, or
      flow-euler with a shift below 1; K outside [1, T], or above 1000 for a
      matched stride; given times out of order, out of range, or not K.
  """
  total = schedule.num_train_steps
  if not 1 <= num_steps <= total:
    raise ValueError(
        f"num_steps must be from 1 to {total}, the training steps of the "
        f"model. Received: num_steps={num_steps}")
  if not isinstance(stride, str):
    return _given_times(schedule, stride, num_steps)
  if stride in FLOW_STRIDES:
    if not isinstance(schedule, FlowSchedule):
      raise ValueError(f"stride {stride!r} must be on a FlowSchedule. "
                       f"Received: {type(schedule).__name__}")
    return _given_times(
        schedule, _OF_FLOWS[stride](schedule, num_steps), num_steps)
  if stride not in STRIDES:
    raise ValueError(
        f"stride must be one of {', '.join(STRIDES)}, or a list of times. "
        f"Received: {stride!r}")
  count = total if stride == "leading" else max(
      schedule.num_visible_steps, num_steps)
  if stride == "logsnr":
    return _even(schedule, count, num_steps, lambda x: x, lambda x: x)
  if stride == "karras":
    # (sigma / alpha)^(1 / rho), and its inverse.
    return _even(schedule, count, num_steps,
                 lambda x: np.exp(-x / _KARRAS_RHO),
                 lambda x: -_KARRAS_RHO * np.log(x))
  if stride.startswith(_MATCHED):
    tau = _matched(schedule, stride.removeprefix(_MATCHED), num_steps, count)
  else:
    tau = {**_WHOLE, "leading": _linear, "uniform": _uniform}[stride](
        count, num_steps)
  for k in range(1, num_steps):
    tau[k] = max(tau[k], tau[k - 1] + 1)
  # A step can be beyond the last one only if K is close to N. Then the steps
  # are pushed back from the end.
  tau = np.minimum(tau, count - num_steps + np.arange(num_steps))
  return tau[::-1].astype(np.float64)


def _even(schedule: NoiseSchedule, count: int, num_steps: int,
          scale: Callable, log_snr: Callable) -> np.ndarray:
  """Times in equal steps of a function of the log-SNR, noisiest first.

  Args:
    schedule: the forward process.
    count: N.
    num_steps: K.
    scale: the function.
    log_snr: its inverse.
  """
  ends = schedule.log_snr([count - 1, 0])
  noisy, clean = scale(np.where(np.isinf(ends), NOISIEST_LOG_SNR, ends))
  return schedule.time_of_log_snr(
      log_snr(np.linspace(noisy, clean, num_steps))).astype(np.float64)


@functools.cache
def _linear_of_ho() -> NoiseSchedule:
  """The schedule that the default starts were measured on."""
  return NoiseSchedule.linear()


def _matched(schedule, stride, num_steps, count):
  """The steps nearest in log-SNR to the linear schedule's; cleanest first."""
  linear = _linear_of_ho()
  if num_steps > linear.num_train_steps:
    raise ValueError(
        f"num_steps must be at most {linear.num_train_steps} for a matched "
        f"stride. Received: num_steps={num_steps}")
  wanted = linear.log_snr(times_of(linear, stride, num_steps)[::-1])
  noisy, clean = linear.log_snr([linear.num_train_steps - 1, 0])
  own_noisy, own_clean = schedule.log_snr([count - 1, 0])
  if own_noisy > noisy or own_clean < clean:
    own_noisy, own_clean = max(noisy, own_noisy), min(clean, own_clean)
    wanted = own_noisy + (wanted - noisy) * (own_clean - own_noisy) / (
        clean - noisy)
  return np.round(schedule.time_of_log_snr(wanted))


def _given_times(schedule, times, num_steps):
  times = np.asarray(times, np.float64)
  last = schedule.num_train_steps - 1
  if times.shape != (num_steps,):
    raise ValueError(
        f"stride must have {num_steps} times, one a step. "
        f"Received: shape {times.shape}")
  if np.any(np.diff(times) >= 0) or times[0] > last or times[-1] < 0:
    raise ValueError(
        f"times of a stride must decrease strictly and lie in [0, {last}]. "
        f"Received: {times.tolist()}")
  return times

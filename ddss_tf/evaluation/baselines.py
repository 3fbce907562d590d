"""Baselines of an evaluation or a comparison: samplers that nothing searches."""

from typing import Any, Callable, Sequence

from ddss_tf.errors import UserError
from ddss_tf.samplers.families import make_sampler
from ddss_tf.samplers.sampler import Sampler
from ddss_tf.samplers.solvers import ALL_SOLVERS
from ddss_tf.samplers.strides import FLOW_STRIDES, STRIDES
from ddss_tf.schedules import NoiseSchedule

# A name such as "ddim linear", a function from the forward process, a sampler.
Baseline = str | Sampler | Callable[[NoiseSchedule], Sampler]


def check(root: str, baselines: Any) -> None:
  """Checks a list of baselines before anything is loaded.

  Args:
    root: the function that takes them, for the message.
    baselines: what should be a list of `Baseline`s.

  Raises:
    UserError: it is no list, or a baseline has an unknown name.
  """
  if isinstance(baselines, str) or not isinstance(baselines, Sequence):
    raise UserError(f"{root}.baselines must be a list, such as "
                    f"['ddim linear']. Received: {baselines!r}")
  for baseline in baselines:
    if not (callable(baseline) or _is_name(baseline)):
      raise UserError(
          f"{root}.baselines must be functions from a noise schedule to a "
          "sampler, or names of a solver, a space and a stride, such as 'ddim "
          f"quadratic'. The solvers are {', '.join(ALL_SOLVERS)}. The strides are "
          f"{', '.join((*STRIDES, *FLOW_STRIDES))}. Received: {baseline!r}")


def _is_name(baseline) -> bool:
  """Whether a baseline is the name of a solver, a space and a stride."""
  if not isinstance(baseline, str):
    return False
  solver, _, stride = baseline.partition(" ")
  return solver in ALL_SOLVERS and stride in (*STRIDES, *FLOW_STRIDES)


def make_baseline(baseline: Baseline, schedule: NoiseSchedule,
                  num_steps: int | None) -> Sampler:
  """Makes one baseline.

  Args:
    baseline: what `check` has checked.
    schedule: the forward process of the denoiser.
    num_steps: K of a baseline that is given by name.

  Returns:
    The sampler.

  Raises:
    UserError: a baseline is given by name and K is None, or the solver cannot
      take K steps on the stride.
  """
  if isinstance(baseline, Sampler):
    return baseline
  if not isinstance(baseline, str):
    return baseline(schedule)
  if num_steps is None:
    raise UserError(
        f"the baseline {baseline!r} takes K from the searched sampler, and there "
        "is none: run --mode=search first, or give a card (evaluate.sampler) or "
        "K (evaluate.num_steps)")
  solver, _, stride = baseline.partition(" ")
  return make_sampler(schedule, family=solver, num_steps=num_steps,
                      stride=stride)

"""Baselines of an evaluation or a comparison: samplers that nothing searches."""

from typing import Any, Callable, Sequence

from absl import logging

from ddss_tf import storage
from ddss_tf import zoo
from ddss_tf.runs import fingerprint
from ddss_tf.samplers import card as card_lib
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.samplers.families import make_sampler
from ddss_tf.samplers.learned import best_start
from ddss_tf.samplers.sampler import FixedSampler, Sampler
from ddss_tf.samplers.solvers import ALL_SOLVERS
from ddss_tf.samplers.strides import FLOW_STRIDES, STRIDES
from ddss_tf.schedules import NoiseSchedule

# The best solver known for K, and the sampler that the search began at.
BEST, START = "best", "start"
# What an evaluation shows beside a sampler unless it is told otherwise.
DEFAULT = ("ddim linear", BEST, START)
# A name such as "ddim linear", a card's path or name, one of the words above, a
# function from the forward process, a sampler.
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
    if not (callable(baseline) or is_solver(baseline)
            or isinstance(baseline, Sampler)
            or root == "evaluate" and (
                baseline == START or _is_card(baseline))):
      more = ", 'start', cards or names of the zoo" if root == "evaluate" else ""
      raise UserError(
          f"{root}.baselines must be samplers, functions from a noise schedule to "
          "a sampler, or names of a solver, a space and a stride, such as 'ddim "
          f"quadratic', or 'best'{more}. The solvers are {', '.join(ALL_SOLVERS)}. The strides are "
          f"{', '.join((*STRIDES, *FLOW_STRIDES))}. Received: {baseline!r}")


def is_solver(baseline) -> bool:
  """Whether a baseline is the name of a solver, a space and a stride."""
  if baseline == BEST:
    return isinstance(baseline, str)
  if not isinstance(baseline, str):
    return False
  solver, _, stride = baseline.partition(" ")
  return solver in ALL_SOLVERS and stride in (*STRIDES, *FLOW_STRIDES)


def _is_card(baseline) -> bool:
  """Whether a baseline is the path of a card, or a name in the zoo."""
  return isinstance(baseline, str) and (
      storage.isfile(storage.expanded(baseline)) or baseline in card_lib.names())


def rows(baselines: Sequence[Baseline], run, denoiser: Denoiser,
         num_steps: int | None, x0_bound: str | None, force: bool = False
         ) -> list[tuple[Sampler, str | None]]:
  """The baselines of an evaluation, each with its bound on x0_hat.

  Of `DEFAULT`, what cannot be made is left out: a solver that cannot take K
  steps, the start if there was no search.

  Args:
    baselines: what `check` has checked.
    run: the run directory.
    denoiser: the model.
    num_steps: see `make_baseline`.
    x0_bound: the bound of all that are not read from cards.
    force: see `zoo.load_searched`.

  Raises:
    UserError: see `make_baseline` and `zoo.load_searched`; or the start is asked
      for and not known.
  """
  found = []
  for baseline in baselines:
    try:
      if _is_card(baseline) and not is_solver(baseline):
        sampler, bound = zoo.load_searched(run, denoiser, baseline, force)
        sampler.label += f" ({zoo.short_name(baseline)})"
      elif baseline == START and isinstance(baseline, str):
        sampler, bound = _start(run, denoiser)
      else:
        sampler, bound = make_baseline(
            baseline, denoiser.schedule, num_steps), x0_bound
    except UserError as error:
      if baselines is not DEFAULT:
        raise
      logging.info("no row of %r: %s", baseline, error)
      continue
    found.append((sampler, bound))
  return found


def _start(run, denoiser: Denoiser) -> tuple[Sampler, str | None]:
  """The sampler at which the search of a run began, and its bound on x0_hat.

  Raises:
    UserError: there was none, or its start is not known any more.
  """
  path = run.path(zoo.SAMPLER)
  if not storage.exists(path):
    raise UserError("the baseline 'start' is that of a search, and there is "
                    "none: run --mode=search first")
  found = card_lib.read(path)
  config = found.search.get("config", {})
  steps = found.coefficients.num_steps
  options = {name: config.get(name)
             for name in ("parameterisation", "init", "stride", "eta")}
  try:
    learned = make_sampler(denoiser.schedule, found.family, steps, **{
        name: value for name, value in options.items() if value is not None})
    start = learned.start.numpy()
  except (UserError, AttributeError) as error:
    raise UserError("the baseline 'start' must be known: the card of the search "
                    f"has no start that can be made anew ({error})") from error
  if fingerprint.coefficients_sha256(start) != config.get("start_sha256"):
    raise UserError("the baseline 'start' must be known: what the card names has "
                    "other coefficients now")
  init, stride = learned.init, config.get("stride")
  if init is None:
    init, stride = learned.default_start()[0], stride or learned.default_start()[1]
  try:
    named = make_sampler(denoiser.schedule, init, steps,
                         stride="linear" if stride is None else stride)
    label = named.label
    if fingerprint.coefficients_sha256(
        named.coefficients().numpy()) == config["start_sha256"]:
      return named, found.x0_bound
  except UserError:
    label = f"{found.label} ({zoo.short_name(str(init))})"
  return FixedSampler(
      denoiser.schedule, start, f"{label}, start"), found.x0_bound


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
  if baseline == BEST:
    solver, stride = best_start(schedule, num_steps)
  return make_sampler(schedule, family=solver, num_steps=num_steps,
                      stride=stride)

"""The samplers from which a comparison starts each search."""

import itertools
import os
from typing import Callable

import numpy as np

from ddss_tf.runs import fingerprint
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import families as families_lib
from ddss_tf.errors import UserError
from ddss_tf.samplers.sampler import Sampler, SolverSampler


class Ranking:
  """Ranks samplers by FID, on images that no table uses.

  Args:
    evaluator: measures the samplers, with a seed of its own.
    num_samples: images by which samplers are ranked.
    strides: names of strides to try.
  """

  def __init__(self, evaluator, num_samples: int, strides):
    self._evaluator, self._num_samples = evaluator, num_samples
    self._strides = strides

  def rank(self, sampler: Sampler, x0_bound: str | None = None) -> float:
    """The FID by which samplers are sorted; infinity if it is not finite."""
    return self._of(self._num_samples, sampler, x0_bound)

  def _of(self, num_samples, sampler, x0_bound=None):
    return records_lib.rank(
        self._evaluator.record(sampler, num_samples, x0_bound))

  def best_strides(self, make: Callable[..., SolverSampler]
                   ) -> list[SolverSampler]:
    """Samplers on the best strides, the best first.

    All strides are tried on a quarter of the images, the best two on all. If
    the times of these two are nearly the same (`told_apart`), the best stride
    with other times is added.

    Args:
      make: makes the sampler of a stride.

    Raises:
      UserError: no stride fits.
    """
    candidates = {}
    for stride in self._strides:
      try:
        sampler = make(stride=stride)
      except UserError:
        continue  # The stride does not fit this K.
      # Different strides may give the same times: the first name counts.
      candidates.setdefault(fingerprint.coefficients_sha256(
          sampler.coefficients().numpy()), sampler)
    candidates = list(candidates.values())
    if not candidates:
      raise UserError(f"none of the strides {', '.join(self._strides)} fits")
    if len(candidates) == 1:
      return candidates
    candidates.sort(key=lambda s: self._of(self._num_samples // 4, s))
    kept = candidates[:2]
    if not told_apart(*kept):
      kept += [s for s in candidates[2:] if told_apart(kept[0], s)][:1]
    return sorted(kept, key=self.rank)


class Starts:
  """The possible starts of all searches at one number of steps.

  A family starts at the best of its default, of DDPM and DDIM on their best
  strides, and of the searched samplers of the families that it contains. The
  first family that contains multistep solvers may also start at the best
  solver, and is searched again from the best solver at other times.

  Args:
    ranking: ranks samplers.
    ranked: the samplers of each solver, the best stride first.
    default_only: whether each family starts at its default only.
  """

  def __init__(self, ranking: Ranking, ranked: list[list[SolverSampler]],
               default_only: bool):
    self._default_only = default_only
    # Any family may start at these, besides its default.
    self._simple = [as_start(sampler) for sampler, *_ in ranked
                    if sampler.solver in ("ddpm", "ddim")]
    self._best, *others = sorted(
        itertools.chain(*ranked), key=ranking.rank) or [None]
    self._other = next(
        (s for s in others if told_apart(self._best, s)), None)
    self._ends = {}

  def ended(self, family: str, folders: list[str]) -> None:
    """Notes the folders of a family's searches, for the families after it."""
    self._ends[family] = folders

  def rounds(self, family: str, folder: str) -> dict[str, list[dict]]:
    """The searches of a family: its possible starts, by the search's folder."""
    if self._default_only:
      return {folder: [{}]}
    inside = [name for name in families_lib.contained(family)
              if name in self._ends]
    # A family that another one contains was a start of that one already.
    inside = [name for name in inside if not any(
        name in families_lib.contained(other) for other in inside)]
    candidates = [{}, *self._simple, *(
        {"init": os.path.join(path, run_dir_lib.SAMPLER)}
        for name in inside for path in self._ends[name])]
    rounds = {folder: candidates}
    if families_lib.is_multistep(family) and not any(
        map(families_lib.is_multistep, inside)):
      if self._best:
        rounds[folder] = [*candidates, as_start(self._best)]
      if self._other:
        rounds[f"{folder}-{self._other.stride}"] = [as_start(self._other)]
    return rounds


def as_start(sampler: SolverSampler) -> dict:
  """The options with which a family starts at this solver."""
  return {"init": sampler.solver, "stride": sampler.stride}


def told_apart(sampler: Sampler, other: Sampler) -> bool:
  """Whether their times differ by more than half a step somewhere."""
  times, others = (s.coefficients().numpy().times for s in (sampler, other))
  return np.max(np.abs(times - others)) > np.max(times) / (2 * len(times))

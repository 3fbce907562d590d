"""From which samplers a comparison starts each search."""

import numpy as np

from ddss_tf.runs import fingerprint
from ddss_tf.runs import records as records_lib
from ddss_tf.errors import UserError


def as_start(sampler):
  """The options of a family that starts at this solver."""
  return {"init": sampler.solver, "stride": sampler.stride}


def best_strides(make, strides, evaluator, num_samples):
  """Samplers on the best strides: the best two, and one with other times."""
  candidates = {}
  for stride in strides:
    try:
      sampler = make(stride=stride)
    except UserError:
      continue  # Not a stride for this K.
    # Strides of several names may be the same times: the first name counts.
    candidates.setdefault(fingerprint.coefficients_sha256(
        sampler.coefficients().numpy()), sampler)
  candidates = list(candidates.values())
  if not candidates:
    raise UserError(f"none of the strides {', '.join(strides)} fits")
  if len(candidates) == 1:
    return candidates
  candidates.sort(
      key=lambda s: records_lib.rank(evaluator.record(s, num_samples // 4)))
  kept = candidates[:2]
  if not told_apart(*kept):
    kept += [s for s in candidates[2:] if told_apart(kept[0], s)][:1]
  return sorted(
      kept, key=lambda s: records_lib.rank(evaluator.record(s, num_samples)))


def told_apart(sampler, other):
  """Whether their times differ by more than half a step somewhere."""
  times, others = (s.coefficients().numpy().times for s in (sampler, other))
  return np.max(np.abs(times - others)) > np.max(times) / (2 * len(times))

"""Where a search starts: every solver on every stride, tried on fixed noise."""

import functools
from typing import Callable, Mapping, Sequence

from absl import logging
import numpy as np

from ddss_tf import storage
from ddss_tf.runs import fingerprint
from ddss_tf.samplers import solvers
from ddss_tf.errors import UserError
from ddss_tf.samplers.coefficients import Coefficients
from ddss_tf.samplers.sampler import Sampler
from ddss_tf.samplers.strides import FLOW_STRIDES, STRIDES
from ddss_tf.schedules import FlowSchedule, NoiseSchedule

_FIELDS = ("start", "samples", "sha256", "distance")
_AGAIN = 8


def suited(schedule: NoiseSchedule) -> list[dict]:
  """What `init="auto"` tries on a schedule, unless it is told what to.

  That is every solver on every stride. On a flow it is Heun's method and the
  strides of flows, too: they have the noise levels of its own schedulers.

  Returns:
    Options of `make_sampler`, "init" and "stride".
  """
  names, grids = solvers.SOLVERS, STRIDES
  if isinstance(schedule, FlowSchedule):
    names, grids = solvers.ALL_SOLVERS, (*STRIDES, *FLOW_STRIDES)
  return [{"init": name, "stride": grid} for name in names for grid in grids]


def possible(make: Callable[..., Sampler], candidates: Sequence[Mapping]
             ) -> list[tuple[dict, Sampler]]:
  """The starts that a family allows, before any of them is tried.

  Args:
    make: makes the sampler to be searched from `init` and `stride`.
    candidates: options of `make`, a list of dicts such as {"init": "ddim",
      "stride": "linear"}; for instance those of `suited`.

  Returns:
    Options and the sampler that starts there, in the order of the candidates.

  Raises:
    UserError: there is none among them.
  """
  found = []
  for start in candidates:
    try:
      found.append((start, make(**{"init": None, **start})))
    except UserError as error:
      # Not a start of this family, or not a stride for this K.
      if start.get("init") not in solvers.ALL_SOLVERS:
        logging.warning("no start: %s", error)
  if not found:
    raise UserError("init='auto' must have a start that the family allows. "
                    f"Received: {str(candidates)[:200]}")
  return found


def choose(candidates: list[tuple[dict, Sampler]],
           distance: Callable[[int], Callable[[Coefficients], float]],
           num_samples: int, path: str, conditions: dict) -> Sampler:
  """Ranks starts, and takes the best.

  The ranking is logged and written to a file, each entry as soon as it is
  known; entries that are there already under the same conditions are kept.

  Samplers without step noise make their images from the same x_T, so chance
  affects them alike, and few images tell them apart. A sampler that adds noise
  has a chance of its own. So the best of either kind are compared once more, on
  `_AGAIN` times as many images.

  Args:
    candidates: what `possible` returns.
    distance: function from a number of images to the search's objective, itself
      a function of coefficients, on that many images.
    num_samples: the number of images of the ranking.
    path: the path of the file.
    conditions: all else that decides the figures, as JSON.

  Returns:
    The sampler, at its best start.

  Raises:
    UserError: no start has a finite distance, or the file is damaged.
  """
  known = _read(path, conditions)
  distance = functools.cache(distance)

  def measured(start, sampler, samples):
    coefficients = sampler.start.numpy()
    images = {"samples": samples,
              "sha256": fingerprint.coefficients_sha256(coefficients)}
    # Strides of different names may have the same times.
    same = [entry for entry in known
            if {name: entry[name] for name in images} == images]
    for entry in same:
      if entry["start"] == start:
        return entry
    if same:
      value = same[0]["distance"]
    else:
      value = distance(samples)(coefficients)
      if not np.isfinite(value):
        value = None  # JSON has no NaN.
    entry = {"start": start, **images, "distance": value}
    known.append(entry)
    known.sort(key=_worse)
    storage.write_json(path, {"conditions": conditions, "ranking": known})
    return entry

  # The file may also have entries of candidates that are not given any more.
  ranking = [(measured(start, sampler, num_samples), sampler)
             for start, sampler in candidates]
  ranking.sort(key=lambda pair: _worse(pair[0]))
  for rank, (entry, _) in enumerate(ranking, 1):
    logging.info("start %d: %s, distance %s", rank, entry["start"],
                 entry["distance"])
  ranking = [pair for pair in ranking if pair[0]["distance"] is not None]
  if not ranking:
    raise UserError("init='auto' found no start with a finite distance")
  best = [next((pair for pair in ranking if noisy == bool(np.any(
      pair[1].start.numpy().noise_scales))), None) for noisy in (False, True)]
  if None in best:
    return ranking[0][1]
  again = [(measured(entry["start"], sampler, _AGAIN * num_samples), sampler)
           for entry, sampler in best]
  again.sort(key=lambda pair: _worse(pair[0]))
  for entry, _ in again:
    logging.info("on %d images: %s, distance %s", entry["samples"],
                 entry["start"], entry["distance"])
  return again[0][1]


def _worse(entry):
  """Sorts by the number of images, then by distance; no distance comes last.

  A distance on more images may be lower because of their number alone.
  """
  value = entry["distance"]
  return entry["samples"], value is None, value or 0.0


def _read(path, conditions):
  if not storage.exists(path):
    return []
  try:
    values = storage.read_json(path)
    if values["conditions"] != conditions:
      return []
    return [{name: entry[name] for name in _FIELDS}
            for entry in values["ranking"]]
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is damaged: {error!r}. Delete it to rank anew"
                    ) from error

"""Where a search starts: every solver on every stride, tried on fixed noise."""

import json
import os
from typing import Callable

from absl import logging
import numpy as np

from ddss_tf import fingerprint
from ddss_tf import solvers
from ddss_tf import storage
from ddss_tf.coefficients import Coefficients
from ddss_tf.errors import UserError
from ddss_tf.samplers import Sampler
from ddss_tf.schedules import STRIDES

FILE = "starts.json"


def possible(make: Callable[..., Sampler], candidates=None
             ) -> list[tuple[dict, Sampler]]:
  """The starts that a family allows, none of them tried.

  Args:
    make: makes the sampler to be searched from `init` and `stride`.
    candidates: options of `make`, a list of dicts such as {"init": "ddim",
      "stride": "linear"}; None is every solver on every stride.

  Returns:
    Options and the sampler that starts there, in the order of the candidates.

  Raises:
    UserError: there is none among them.
  """
  if candidates is None:
    candidates = [{"init": solver, "stride": stride}
                  for solver in solvers.SOLVERS for stride in STRIDES]
  found = []
  for start in candidates:
    try:
      found.append((start, make(**{"init": None, **start})))
    except UserError as error:
      # Not a start of this family, or not a stride for this K.
      if start.get("init") not in solvers.SOLVERS:
        logging.warning("no start: %s", error)
  if not found:
    raise UserError("init='auto' must have a start that the family allows. "
                    f"Received: {str(candidates)[:200]}")
  return found


def choose(candidates: list[tuple[dict, Sampler]],
           distance: Callable[[Coefficients], float], path: str,
           conditions: dict) -> Sampler:
  """Ranks starts, and takes the best.

  The ranking is logged and written to a file, each entry as soon as it is
  known; entries that are there already under the same conditions are kept.

  Args:
    candidates: as of `possible`.
    distance: the search's objective, of the images of coefficients.
    path: of the file.
    conditions: all else that decides the figures; JSON.

  Returns:
    The sampler, at its best start.

  Raises:
    UserError: no start has a finite distance, or the file is damaged.
  """
  ranking = _read(path, conditions)
  known = [(entry["start"], entry["sha256"]) for entry in ranking]
  mine = []  # Others may be of candidates that there no longer are.
  for start, sampler in candidates:
    coefficients = sampler.start.numpy()
    sha256 = fingerprint.coefficients_sha256(coefficients)
    mine.append((start, sha256))
    if (start, sha256) in known:
      continue
    value = distance(coefficients)
    # JSON has no NaN.
    ranking.append({"start": start, "sha256": sha256,
                    "distance": value if np.isfinite(value) else None})
    ranking.sort(key=_worse)
    storage.write_json(path, {"conditions": conditions, "ranking": ranking})
  ranking = [entry for entry in ranking
             if (entry["start"], entry["sha256"]) in mine]
  for rank, entry in enumerate(ranking, 1):
    logging.info("start %d: %s, distance %s", rank, entry["start"],
                 entry["distance"])
  if ranking[0]["distance"] is None:
    raise UserError("init='auto' found no start with a finite distance")
  best = ranking[0]["start"], ranking[0]["sha256"]
  return candidates[mine.index(best)][1]


def _worse(entry):
  """Sorts by distance, those that have none last."""
  value = entry["distance"]
  return (value is None, value or 0.0)


def _read(path, conditions):
  if not os.path.exists(path):
    return []
  try:
    with open(path) as f:
      values = json.load(f)
    if values["conditions"] != conditions:
      return []
    return list(values["ranking"])
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is damaged: {error!r}. Delete it to rank anew"
                    ) from error

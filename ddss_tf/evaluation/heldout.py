"""Figures on held-out features that no matching of moments can flatter."""

from typing import Sequence

from ddss_tf import metrics
from ddss_tf import neighbours
from ddss_tf.features import reference as reference_lib
from ddss_tf.runs import records as records_lib
from ddss_tf.errors import UserError

# Nearest neighbours of 10 000 samples take seconds.
DEFAULT = ("coverage", "recall", "sliced_wasserstein")


def check(root: str, names) -> None:
  """Checks names of figures.

  Args:
    root: the function whose option they are, for the message.
    names: a list of names out of `records.HELDOUT_MEASURES`.

  Raises:
    UserError: a name is unknown, or they are no list.
  """
  known = ", ".join(records_lib.HELDOUT_MEASURES)
  if not isinstance(names, (list, tuple)) or not set(names) <= set(
      records_lib.HELDOUT_MEASURES):
    raise UserError(f"{root}.heldout_measures must be a list out of {known}. "
                    f"Received: {names!r}")


class HeldoutMeasures:
  """Measures generated features against those of the real images.

  What is needed of the real images alone is computed once, when it is first needed.

  Args:
    names: see `check`.
    references: the real images' features by each held-out network.
  """

  def __init__(self, names: Sequence[str],
               references: Sequence[reference_lib.Reference]):
    self._names, self._references = tuple(names), list(references)
    self._balls = [None] * len(self._references)

  def __call__(self, pools) -> dict[str, list[float | None]]:
    """The figures of a sampler's images.

    Args:
      pools: float32 [M, D], their features by each network.

    Returns:
      Lists with a figure for each network, by the names of records; a figure is None
      if there are too few samples for it, NaN of features that are not finite. It is
      empty without held-out networks.
    """
    if not self._references:
      return {}
    near = [self._neighbours(i, pool) for i, pool in enumerate(pools)]
    values = {}
    for name in self._names:
      if name == "sliced_wasserstein":
        found = [metrics.sliced_wasserstein(real.pool, pool)
                 for real, pool in zip(self._references, pools)]
      else:
        found = [figures and getattr(figures, name) for figures in near]
      values[records_lib.HELDOUT_MEASURES[name].key] = found
    return values

  def _neighbours(self, number, pool):
    """Figures of the nearest neighbours; None if they are not asked for, or too few."""
    real = self._references[number].pool
    if (not set(self._names) & set(neighbours.Figures._fields)
        or min(len(real), len(pool)) <= neighbours.COVERAGE_K):
      return None
    if self._balls[number] is None:
      self._balls[number] = neighbours.balls(real)
    return neighbours.figures(self._balls[number], pool)

"""Published figures of a table, to stand beside measured ones."""

import csv
import dataclasses
import io
from typing import Mapping

import gin

from ddss_tf import bindings
from ddss_tf import storage
from ddss_tf.errors import UserError

_TABLES = "gin_configs/papers/iclr2022/published.csv"
_COLUMNS = ("dataset", "row", "stride", "num_steps", "fid", "inception_score",
            "source", "note")


@dataclasses.dataclass(frozen=True)
class Published:
  """The published cells of one data set, from one source.

  Attributes:
    dataset: the data set, as the file names it.
    source: where the cells were published, as the file names it.
    cells: (row, stride, K) to the figures of a cell: "fid",
      "inception_score" (None where it is not published), "source" and "note".
  """
  dataset: str
  source: str
  cells: Mapping[tuple[str, str, int], dict]

  def of(self, row: str, stride: str, num_steps: int) -> dict | None:
    """The figures of a row at K steps; None if none are published.

    Args:
      row: the solver or the family.
      stride: its stride. Where a source does not tell the stride, its figures
        stand beside every stride.
      num_steps: K.
    """
    row = row.replace("+", "_")
    return self.cells.get((row, stride, num_steps)) or self.cells.get(
        (row, "", num_steps))


@bindings.register
def load_published(dataset: str = gin.REQUIRED, source: str = gin.REQUIRED,
                   path: str = _TABLES) -> Published:
  """Reads published figures from a CSV file.

  Its columns are `dataset`, `row` (a solver, a family with "_" for "+", or
  "full_chain"), `stride`, `num_steps`, `fid`, `inception_score`, `source` and
  `note`. Stride, score and note may be empty.

  Args:
    dataset: the data set whose cells are read.
    source: the source whose cells are read. Cells of two sources are never
      mixed.
    path: the file. The default has the tables of the paper and of the authors'
      slides.

  Returns:
    The figures.

  Raises:
    UserError: the file is missing or damaged, or has no such cell.
  """
  found = storage.found(path)
  if not storage.isfile(found):
    raise UserError(f"load_published.path must exist. Received: {path!r}")
  cells, known = {}, set()
  try:
    with storage.open(found, "rb") as f:
      rows = csv.DictReader(io.StringIO(f.read().decode("utf-8")))
      for cell in rows:
        known.add((cell["dataset"], cell["source"]))
        if (cell["dataset"], cell["source"]) == (dataset, source):
          cells[cell["row"], cell["stride"], int(cell["num_steps"])] = {
              "fid": float(cell["fid"]),
              "inception_score": _number(cell["inception_score"]),
              "source": source, "note": cell["note"]}
  except (KeyError, TypeError, ValueError, csv.Error) as error:
    raise UserError(f"load_published.path must be a CSV with the columns "
                    f"{', '.join(_COLUMNS)}. Received: {path!r} ({error!r})"
                    ) from error
  if not cells:
    raise UserError(
        "load_published.dataset and source must be out of "
        f"{', '.join(f'{name!r} of {where!r}' for name, where in sorted(known))}."
        f" Received: {dataset!r} of {source!r}")
  return Published(dataset, source, cells)


def _number(text):
  """A number; None for an empty text."""
  return float(text) if text else None

"""What a network is conditioned on, row by row: a prompt is a row of a table.

A class-conditional network is told a label, and looks it up in a table of its
own. A network of texts is told the embeddings that a text encoder has made. With
their table, a prompt is a class like any other: it is drawn, guided and sampled
by its number.
"""

import os
from typing import Mapping, Sequence

import numpy as np
import tensorflow as tf

from ddss_tf import errors
from ddss_tf import storage
from ddss_tf.denoisers import conditions
from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError

SUFFIX = ".npz"
# What a file holds beside the arrays.
_PROMPTS, _WEIGHTS, _NULL = _OTHERS = ("prompts", "weights", "null_row")


class ConditionTable:
  """The inputs of a network that are neither state nor time, for N conditions.

  Args:
    arrays: by the names of the network's inputs, float16 or float32 [N, ...]:
      for Stable Diffusion "context" [N, 77, 768]. They are kept as they are; the
      network is given float32.
    prompts: N texts that the rows stand for; None: rows have no text.
    weights: N numbers, how often each row is drawn, in any unit; None: all as
      often. Rows that stand for no condition are never drawn.
    null_row: the row of the negative prompt, which guidance needs. One for all
      rows, or a list of N with one for each; None: there is no guidance.

  Attributes:
    names: the names of the arrays.
    num_rows: N.
    prompts: a tuple of N texts, or None.
    frequencies: float64 [N], how often each row is drawn, of sum 1.
    null_row: the first row's negative prompt, or None.
    sha256: hash of all that was given.

  Raises:
    ValueError: there is no array, the arrays are not of N rows or not finite
      floating-point numbers, or a list is not of N of what it must be.
  """

  def __init__(self, arrays: Mapping[str, np.ndarray],
               prompts: Sequence[str] | None = None,
               weights: Sequence[float] | None = None,
               null_row: int | Sequence[int] | None = None):
    arrays = {name: _checked(name, value) for name, value in arrays.items()}
    rows = {name: len(value) for name, value in arrays.items()}
    if len(set(rows.values())) != 1:
      raise ValueError("a table of conditions must have arrays of the same number "
                       f"of rows. Received: {rows}")
    self.names = tuple(arrays)
    (self.num_rows,) = set(rows.values())
    self.shapes = {name: value.shape[1:] for name, value in arrays.items()}
    self.prompts = None if prompts is None else _texts(prompts, self.num_rows)
    self._null_rows = _null_rows(null_row, self.num_rows)
    self.null_row = None if null_row is None else int(self._null_rows[0])
    self.frequencies = conditions.frequencies(
        np.ones(self.num_rows) if weights is None else weights, self.num_rows,
        () if null_row is None else np.unique(self._null_rows))
    self.weights = None if weights is None else np.array(weights, np.float64)
    self.bytes = sum(value.nbytes for value in arrays.values())
    # In the order of the names, for that of a file means nothing.
    self.sha256 = fingerprint.arrays_sha256([
        *(value for _, value in sorted(arrays.items())), self.frequencies,
        self._null_rows])
    with tf.init_scope():
      self._variables = {
          name: tf.Variable(value, trainable=False, name=name)
          for name, value in arrays.items()}

  @property
  def drawn_alike(self) -> bool:
    """Whether all rows but a single null one are drawn as often."""
    return self.weights is None and len(np.unique(self._null_rows)) <= 1

  @property
  def variables(self) -> list[tf.Variable]:
    """What a SavedModel that looks rows up must hold."""
    return list(self._variables.values())

  @property
  def description(self) -> str:
    """What it is, in words."""
    inputs = ", ".join(
        f"{name} {' x '.join(map(str, shape))}" for name, shape in
        self.shapes.items())
    return f"{self.num_rows} rows of {inputs} ({self.bytes / 2**20:.1f} MiB)"

  def rows(self, labels: tf.Tensor) -> dict[str, tf.Tensor]:
    """The inputs for rows by name, float32 [B, ...] each.

    Args:
      labels: int32 [B].
    """
    return {name: tf.cast(tf.gather(variable, labels), tf.float32)
            for name, variable in self._variables.items()}

  def null_rows(self, labels: tf.Tensor) -> tf.Tensor:
    """The rows of the negative prompts of rows, int32 [B].

    Args:
      labels: int32 [B].
    """
    return tf.gather(tf.constant(self._null_rows, tf.int32), labels)

  def row_of(self, prompt: str) -> int:
    """The row of a text.

    Raises:
      UserError: no row has exactly this text.
    """
    if self.prompts is None or prompt not in self.prompts:
      known = ("none, for its rows have no texts" if self.prompts is None else
               ", ".join(map(repr, self.prompts[:5])) + (
                   f" and {self.num_rows - 5} more" if self.num_rows > 5 else ""))
      raise UserError(
          f"a prompt must be one of the table's: {known}. tools/encode_prompts.py "
          f"makes a table of others. Received: {prompt!r}")
    return self.prompts.index(prompt)

  def save(self, path: str) -> None:
    """Writes a `.npz` file, which `load` reads."""
    others = {_PROMPTS: None if self.prompts is None else np.array(self.prompts),
              _WEIGHTS: self.weights,
              _NULL: None if self.null_row is None else self._null_rows}
    storage.save_arrays(path, {
        **{name: variable.numpy()
           for name, variable in self._variables.items()},
        **{name: value for name, value in others.items() if value is not None}})

  @classmethod
  def load(cls, path: str) -> "ConditionTable":
    """Reads a `.npz` file.

    It holds an array for each input, by its name, and optionally `prompts` [N],
    `weights` [N] and `null_row`, a number or [N].

    Raises:
      UserError: the file is missing or damaged, or does not hold this.
    """
    path = storage.expanded(path)
    if not storage.isfile(path):
      raise UserError(f"a table of conditions must be a file {SUFFIX}, as "
                      f"tools/encode_prompts.py makes it. Received: {path!r}")
    try:
      arrays = storage.read_arrays(path)
    except ValueError as error:
      raise UserError(f"{path} must be a file of arrays that is not damaged: "
                      f"{errors.one_line(error)}") from error
    given = {name: arrays.pop(name) for name in _OTHERS if name in arrays}
    try:
      return cls(arrays, **{name: value.tolist()
                            for name, value in given.items()})
    except ValueError as error:
      raise UserError(f"{os.path.basename(path)}: {error}") from error


def _checked(name, value) -> np.ndarray:
  value = np.asarray(value)
  if value.dtype not in (np.float16, np.float32):
    value = value.astype(np.float32) if np.issubdtype(
        value.dtype, np.number) else value
  if value.ndim < 2 or not len(value) or value.dtype not in (
      np.float16, np.float32) or not np.all(np.isfinite(value)):
    raise ValueError(f"{name} of a table of conditions must be finite numbers "
                     f"[N, ...]. Received: {value.dtype} {list(value.shape)}")
  return value


def _texts(prompts, num_rows) -> tuple[str, ...]:
  prompts = [prompts] if isinstance(prompts, str) else list(prompts)
  if len(prompts) != num_rows or not all(
      isinstance(prompt, str) for prompt in prompts):
    raise ValueError(f"prompts must be {num_rows} texts, one for each row. "
                     f"Received: {len(prompts)}")
  return tuple(prompts)


def _null_rows(null_row, num_rows) -> np.ndarray:
  """The null row of each row, int64 [N]; an empty array without any."""
  if null_row is None:
    return np.zeros([0], np.int64)
  rows = np.asarray(null_row)
  if (not np.issubdtype(rows.dtype, np.integer)
      or rows.shape not in ((), (num_rows,))
      or np.any(rows < 0) or np.any(rows >= num_rows)):
    raise ValueError(f"null_row must be a row from 0 to {num_rows - 1}, or one for "
                     f"each of {num_rows} rows. Received: {null_row!r}")
  return np.broadcast_to(rows, [num_rows]).astype(np.int64)

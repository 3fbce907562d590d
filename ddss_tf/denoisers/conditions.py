"""What a conditional network is told, a class or a row of a table, and its draw."""

from absl import logging
import numpy as np
import tensorflow as tf

from ddss_tf.datasets.dataset import ImageDataset
from ddss_tf.errors import UserError

UNIFORM = "uniform"


def label_input(name: str, num_classes: int | None, labels,
                batch_size: tf.Tensor) -> list[tf.Tensor]:
  """The third input of a network, int32 [B], in a list; empty without one.

  Args:
    name: the denoiser's name, for messages.
    num_classes: the number of classes; None: unconditional.
    labels: see `Denoiser.network`.
    batch_size: B.

  Raises:
    ValueError: labels are missing, must not be given, are not whole numbers
      or out of range.
  """
  if num_classes is None:
    if labels is not None:
      raise ValueError(f"labels must be None: {name!r} is unconditional."
                       f" Received: {type(labels).__name__}")
    return []
  if labels is None:
    raise ValueError(f"labels must be given: {name!r} has "
                     f"{num_classes} classes. Received: None")
  labels = tf.convert_to_tensor(labels)
  if not labels.dtype.is_integer:
    raise ValueError("labels must be whole numbers. "
                     f"Received: {labels.dtype.name}")
  known = tf.get_static_value(labels)
  if known is not None and not np.all(
      (0 <= known) & (known < num_classes)):
    raise ValueError(f"labels must be in [0, {num_classes - 1}]. "
                     f"Received: {known.min()} to {known.max()}")
  labels = tf.cast(labels, tf.int32)
  return [tf.repeat(labels[None], batch_size) if labels.shape.rank == 0
          else labels]


def given(names, values) -> list[tf.Tensor]:
  """The conditions themselves, float32 [B, ...] each, in a list.

  Args:
    names: names of the inputs.
    values: a tuple of arrays, one for each name.

  Raises:
    ValueError: there are not as many arrays as names.
  """
  if len(values) != len(names):
    raise ValueError(f"conditions must be {', '.join(names)}. "
                     f"Received: {len(values)} arrays")
  return [tf.convert_to_tensor(value, tf.float32) for value in values]


def of_table(names, table, num_classes, null_label, label_weights):
  """The number of classes, the null class and the weights of a table's rows.

  Args:
    names: the inputs that the network takes.
    table: a `table.ConditionTable`, or None.
    num_classes, null_label, label_weights: must be None.

  Raises:
    ValueError: one of them is given, or the table is of other inputs.
  """
  told = {"num_classes": num_classes, "null_label": null_label,
          "label_weights": label_weights}
  for name, value in told.items():
    if value is not None:
      raise ValueError(f"{name} must not be given for a network of conditions, "
                       f"whose table tells it. Received: {value!r}")
  if table is None:
    return None, None, None
  if sorted(table.names) != sorted(names):
    raise ValueError(f"a table of conditions must hold {', '.join(names)}. "
                     f"Received: {', '.join(table.names)}")
  return (table.num_rows, table.null_row,
          None if table.drawn_alike else table.frequencies)


def frequencies(weights, num_classes: int, never=()) -> np.ndarray:
  """How often each class is drawn, float64 [num_classes], of sum 1.

  Args:
    weights: a number for each class, in any unit.
    num_classes: the number of classes.
    never: classes that are never drawn, whatever their weights.

  Raises:
    ValueError: there are not as many weights as classes; one is negative or not
      finite, or no class is left to draw.
  """
  try:
    result = np.array(weights, np.float64)
  except (TypeError, ValueError):
    result = np.zeros([0])
  if good := result.shape == (num_classes,) and np.all(
      np.isfinite(result) & (result >= 0)):
    result[list(never)] = 0
    good = np.any(result)
  if not good:
    raise ValueError(
        f"weights must be {num_classes} numbers, one for each class, not negative "
        f"and not all 0 but for the null class. Received: {weights!r}")
  total = result.sum()
  # What is of sum 1 already must not change by rounding, and its hash with it.
  return result if abs(total - 1.0) < 1e-12 else result / total


def told_weights(weights, num_classes: int | None, null_label: int | None):
  """What a network of classes is told of their frequencies, checked.

  Args:
    weights: a number for each class, in any unit; "uniform", or None.
    num_classes: the number of classes; None: unconditional.
    null_label: the class that is never drawn, or None.

  Returns:
    What `frequencies` gives, "uniform" or None.

  Raises:
    ValueError: the network has no classes, or see `frequencies`.
  """
  if weights is None:
    return None
  if num_classes is None:
    raise ValueError("label_weights must be of a class-conditional network. "
                     f"Received: {weights!r}")
  if isinstance(weights, str):
    if weights != UNIFORM:
      raise ValueError(f"label_weights must be {num_classes} numbers, 'uniform' or "
                       f"None. Received: {weights!r}")
    return weights
  return frequencies(
      weights, num_classes, () if null_label is None else [null_label])


def draw_labels(num_classes: int | None, null_label: int | None,
                seed: tf.Tensor, indices: tf.Tensor,
                weights: np.ndarray | None = None):
  """Draws a class for every sample, from its own seed.

  Without weights, all classes but the null one are equally frequent.

  Args:
    num_classes: the number of classes; None: unconditional.
    null_label: the class that is never drawn, or None.
    seed: int32 [2].
    indices: int [B], the global indices of the samples.
    weights: what `frequencies` gives, or None.

  Returns:
    int32 [B]; None for an unconditional network.
  """
  if num_classes is None:
    return None
  count = num_classes - (null_label is not None)

  def one(index):
    own = tf.random.experimental.stateless_fold_in(
        tf.cast(seed, tf.int32), index, alg="philox")
    # The noise is drawn from `own` itself and from 1, see chain.draw_noise.
    own = tf.random.experimental.stateless_fold_in(own, 2, alg="philox")
    if weights is not None:
      return tf.random.stateless_uniform([], own, alg="philox")
    return tf.random.stateless_uniform(
        [], own, 0, count, tf.int32, alg="philox")

  if weights is not None:
    uniform = tf.map_fn(one, tf.cast(indices, tf.int32),
                        fn_output_signature=tf.float32)
    return tf.searchsorted(_cumulative(weights), uniform, side="right")
  labels = tf.map_fn(one, tf.cast(indices, tf.int32))
  if null_label is None:
    return labels
  return labels + tf.cast(labels >= null_label, tf.int32)


def _cumulative(weights: np.ndarray) -> np.ndarray:
  """The upper ends of the classes' shares of [0, 1), float32."""
  ends = np.cumsum(weights).astype(np.float32)
  # Rounding must leave no gap below 1, which no class would answer.
  ends[np.flatnonzero(weights)[-1]:] = 1.0
  return ends


class Conditional:
  """What a `Denoiser`, which inherits this, is told beside state and time."""

  def for_dataset(self, dataset: ImageDataset):
    """The same network, its classes drawn as often as a data set has them.

    FID compares with that data set, so other frequencies would count as a fault of
    the sampler. This method alone decides how often classes are drawn where a
    network and a data set meet: in `search`, `evaluate` and `compare`.

    The classes are drawn as told if `label_weights` were given. They are drawn
    uniformly, as without a data set, if it has no labels or equally many images of
    each class, or if a label of it is no class of the network: a warning says so.

    Args:
      dataset: the images that the network's are compared with.

    Returns:
      A denoiser with `label_weights`; this one where nothing changes.
    """
    if (self.num_classes is None or self.conditions
        or self.told_weights is not None or dataset.labels is None):
      return self
    kept = [label for label in range(self.num_classes) if label != self.null_label]
    if not np.all(np.isin(dataset.labels, kept)):
      logging.warning(
          "labels of %r are from %d to %d and do not fit the classes of %r, which "
          "has %d%s: its classes are drawn uniformly, unless label_weights say "
          "how often", dataset.name, dataset.labels.min(), dataset.labels.max(),
          self.name, self.num_classes, "" if self.null_label is None else
          f" with the null label {self.null_label}")
      return self
    counts = np.array(dataset.label_counts(self.num_classes))
    if len(set(counts[kept])) == 1:
      return self  # As without weights, whose draws are others than these weights'.
    if missing := int(np.sum(counts[kept] == 0)):
      logging.warning("%d of the %d classes of %r have no image in %r and are never "
                      "drawn", missing, len(kept), self.name, dataset.name)
    return self.with_label_weights(counts)

  @property
  def card_weights(self) -> dict:
    """`told_weights` of classes as cards in JSON have them; {} if not told."""
    if self.conditions or self.told_weights is None:
      return {}
    return {"label_weights": np.asarray(self.told_weights).tolist()}

  def null_labels(self, labels, batch_size):
    """The label that stands for none, for each of these, int32 [B]."""
    if self.table is None or isinstance(labels, tuple):
      return tf.fill([batch_size], self.null_label)
    (rows,) = label_input(
        self.name, self.num_classes, labels, batch_size)
    return self.table.null_rows(rows)

  def example_labels(self, batch_size: int, tokens: int = 77):
    """Labels of any kind that the network takes, as zeros.

    Args:
      batch_size: how many.
      tokens: the length of the inputs that may have any.

    Returns:
      int32 [B]; None for an unconditional network; a tuple of float32 [B, ...]
      for one that needs a table and has none.
    """
    if self.num_classes is not None:
      return tf.zeros([batch_size], tf.int32)
    if not self.conditions:
      return None
    return tuple(tf.zeros([batch_size, *(size or tokens for size in value.shape[1:])])
                 for value in self.model.inputs[2:])

  def told_to(self, labels, batch_size) -> list[tf.Tensor]:
    """What the network takes beside x and t for these labels, [B, ...] each."""
    if self.conditions and isinstance(labels, tuple):
      return given(self.conditions, labels)
    if not self.conditions:
      return label_input(self.name, self.num_classes, labels, batch_size)
    if self.table is None:
      raise UserError(
          f"denoiser {self.name!r} needs a table of {', '.join(self.conditions)}: "
          "load_denoiser.conditions = 'FILE.npz', which tools/encode_prompts.py "
          "makes of prompts. Received: none")
    (rows,) = label_input(self.name, self.num_classes, labels, batch_size)
    found = self.table.rows(rows)
    return [found[name] for name in self.conditions]

  def draw_labels(self, seed: tf.Tensor, indices: tf.Tensor):
    """Draws a class, or a row of the table, for every sample.

    See `conditions.draw_labels`.

    Args:
      seed: int32 [2].
      indices: int [B], the global indices of the samples.

    Returns:
      int32 [B]; None for an unconditional network.
    """
    return draw_labels(
        self.num_classes, self.null_label, seed, indices, self.label_weights)

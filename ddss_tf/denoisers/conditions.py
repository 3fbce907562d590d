"""The classes of a class-conditional network: its input, and their draw."""

import numpy as np
import tensorflow as tf


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


def draw_labels(num_classes: int | None, null_label: int | None,
                seed: tf.Tensor, indices: tf.Tensor):
  """Draws a class for every sample, from its own seed.

  All classes but the null one are equally frequent. That is our choice, and
  right for a data set with as many images of each.

  Args:
    num_classes: the number of classes; None: unconditional.
    null_label: the class that is never drawn, or None.
    seed: int32 [2].
    indices: int [B], the global indices of the samples.

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
    return tf.random.stateless_uniform(
        [], own, 0, count, tf.int32, alg="philox")

  labels = tf.map_fn(one, tf.cast(indices, tf.int32))
  if null_label is None:
    return labels
  return labels + tf.cast(labels >= null_label, tf.int32)

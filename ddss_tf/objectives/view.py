"""What an objective sees of images: features of all networks, then pixels.

A population's view is one array of rows, which caches, micro-batches and
replicas can cut as they like. Only this module knows how a row is laid out.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf


class View(NamedTuple):
  """The parts of rows.

  Attributes:
    features: [N, D] of each network.
    pixels: [N, H W C], or None.
  """
  features: list
  pixels: tf.Tensor | np.ndarray | None


class ViewLayout:
  """Where the parts of a view are in a row.

  Args:
    sizes: D of each network.
    num_pixels: H W C if pixels are seen, else 0.

  Attributes:
    width: the width of a row.
    feature_width: D of the first network, whose features open every row.
  """

  def __init__(self, sizes: list[int], num_pixels: int):
    self._sizes, self._num_pixels = list(sizes), num_pixels
    self.width = sum(self._sizes) + num_pixels
    self.feature_width = self._sizes[0]

  def join(self, features: list, images: tf.Tensor) -> tf.Tensor:
    """Rows [N, width]: the features of images, and their pixels if seen."""
    parts = list(features)
    if self._num_pixels:
      parts.append(tf.reshape(images, [-1, self._num_pixels]))
    return tf.concat(parts, axis=1)

  def split(self, rows) -> View:
    """The parts of rows [N, width], NumPy or TensorFlow."""
    total = sum(self._sizes)
    if isinstance(rows, np.ndarray):
      features = np.split(rows[:, :total], np.cumsum(self._sizes)[:-1], axis=1)
    else:
      features = tf.split(rows[:, :total], self._sizes, axis=1)
    return View(features, rows[:, total:] if self._num_pixels else None)

  def first_only(self, cotangents: tf.Tensor) -> tf.Tensor:
    """Rows of the first network's cotangents [N, D], with 0 for all else."""
    return tf.pad(cotangents, [[0, 0], [0, self.width - self.feature_width]])

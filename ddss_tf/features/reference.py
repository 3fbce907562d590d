"""Reference statistics of a data set: what generated images are compared with.

They are computed once and cached under a hash of all they depend on: the
images, the feature network with its preprocessing, and the rounding to bytes.
So statistics of two protocols are never mixed.
"""

import json
import os
from typing import NamedTuple
import zipfile
import zlib

from absl import logging
import numpy as np

from ddss_tf import metrics
from ddss_tf import storage
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.runs import fingerprint
from ddss_tf.features.network import FeatureNetwork


class Reference(NamedTuple):
  """What a feature network makes of the images of a data set.

  Attributes:
    pool: float32 [N, D], in the order of the data set.
    logits: float32 [N, classes]; [N, 0] of a network without logits.
    moments: mean and covariance of `pool`.
  """
  pool: np.ndarray
  logits: np.ndarray
  moments: metrics.Moments


def reference(features: FeatureNetwork, dataset: dataset_lib.ImageDataset, *,
              quantise: bool, cache_dir: str | None,
              batch_size: int | None = None) -> Reference:
  """Features of all images of a data set, computed once.

  Args:
    features: the network.
    dataset: the images.
    quantise: whether to round the images to bytes first, as image files do.
    cache_dir: folder of the cache, made if need be. Its files are named after
      a hash of all that the features depend on. None for no cache.
    batch_size: images at a time, `features.batch_size` if None.

  Returns:
    The reference. If features or logits are not finite, a warning says so, and
    they are not cached.

  Raises:
    UserError: images of a shape that the network does not take.
  """
  count = len(dataset.images)
  path = None
  if cache_dir is not None:
    key = fingerprint.text_sha256(
        json.dumps([dataset.sha256, features.key, bool(quantise)]))
    path = os.path.join(cache_dir, f"reference-{key[:32]}.npz")
    cached = _read_cache(path, count)
    if cached is not None:
      return cached
  batch_size = batch_size or features.batch_size

  def batches():
    for start in range(0, count, batch_size):
      images = dataset.images[start:start + batch_size]
      yield dataset_lib.to_float(dataset_lib.to_uint8(images)) if quantise else images

  pool, logits = collect(
      ((network["pool"], network.get("logits", network["pool"][:, :0]))
       for network in map(features, batches())), count)
  result = Reference(pool, logits, metrics.moments(pool))
  for name, values in (("features", pool), ("logits", logits)):
    if not np.all(np.isfinite(values)):
      logging.warning("%s %r of %r have NaN or infinity", name, features.name,
                      dataset.name)
      path = None
  if path is not None:
    storage.save_arrays(path, {
        "pool": pool, "logits": logits, "mean": result.moments.mean,
        "covariance": result.moments.covariance,
        "protocol": f"{dataset.name}, {features.name}, {features.protocol}"
                    f"{', rounded to bytes' if quantise else ''}"})
  return result


def collect(batches, count: int) -> list[np.ndarray]:
  """Puts batches of several arrays one below the other, in one copy each.

  Args:
    batches: an iterable of tuples of arrays [B, ...], `count` rows in all.
    count: rows of the results.

  Returns:
    float32 arrays [count, ...].

  Raises:
    ValueError: fewer or more rows.
  """
  arrays, start = None, 0
  for batch in batches:
    batch = [np.asarray(values) for values in batch]
    if arrays is None:
      arrays = [np.empty((count, *values.shape[1:]), np.float32)
                for values in batch]
    stop = start + len(batch[0])
    if stop > count:
      raise ValueError(f"there must be {count} rows. Received: {stop} or more")
    for array, values in zip(arrays, batch):
      array[start:stop] = values
    start = stop
  if start < count:
    raise ValueError(f"there must be {count} rows. Received: {start}")
  return arrays


def _read_cache(path: str, count: int) -> Reference | None:
  """What a cache file holds; None if it is missing or damaged."""
  if not storage.exists(path):
    return None
  try:
    with storage.load_arrays(path) as file:
      found = Reference(file["pool"], file["logits"], metrics.Moments(
          file["mean"], file["covariance"]))
    if len(found.pool) != count or len(found.logits) != count:
      raise ValueError(f"there must be {count} rows")
    return found
  except (OSError, EOFError, ValueError, KeyError, TypeError,
          zipfile.BadZipFile, zlib.error) as error:
    logging.warning("Cache %s is damaged and computed again: %s", path, error)
    return None

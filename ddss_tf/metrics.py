"""FID, KID and Inception Score from activations, by TF-GAN.

This module alone imports TF-GAN. Its package `__init__` needs
`tensorflow.estimator`, which TensorFlow dropped in 2.16, so that
`import tensorflow_gan` fails; the evaluation modules themselves are fine, and
are loaded past it.
"""

import functools
import importlib
import importlib.util
import os
import sys
import types
from typing import NamedTuple

import numpy as np
import tensorflow as tf


FULL_SAMPLES = 50_000  # Of published values.
HELDOUT = "held-out"
_BLOCK_ROWS = 4096


@functools.cache
def _tfgan():
  """`tensorflow_gan.python.eval.classifier_metrics`."""
  spec = importlib.util.find_spec("tensorflow_gan")
  root = spec.submodule_search_locations[0]
  parents = {
      "tensorflow_gan": root,
      "tensorflow_gan.python": os.path.join(root, "python"),
      "tensorflow_gan.python.eval": os.path.join(root, "python", "eval"),
  }
  added = []
  try:
    for name, path in parents.items():
      if name not in sys.modules:
        # An empty package: sub-modules are found, its `__init__` never runs.
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]
        added.append(name)
    return importlib.import_module(
        "tensorflow_gan.python.eval.classifier_metrics")
  finally:
    # Leave no hollow package behind for whoever imports TF-GAN after us.
    for name in added:
      del sys.modules[name]


class Moments(NamedTuple):
  """Mean and covariance of activations.

  Attributes:
    mean: float64 [D].
    covariance: float64 [D, D], unbiased.
  """
  mean: np.ndarray
  covariance: np.ndarray


def moments(activations: np.ndarray) -> Moments:
  """Mean and unbiased covariance, in float64.

  A block of rows at a time, so that beside the activations themselves memory
  does not grow with their number; TF-GAN's own call makes several float64
  copies of all of them.

  Args:
    activations: float [N, D], N at least 2.

  Raises:
    ValueError: fewer than 2 rows.
  """
  count, width = activations.shape
  if count < 2:
    raise ValueError(f"a covariance needs at least 2 rows. Received: {count}")
  mean = np.mean(activations, axis=0, dtype=np.float64)
  covariance = np.zeros((width, width))
  for start in range(0, count, _BLOCK_ROWS):
    centred = activations[start:start + _BLOCK_ROWS] - mean
    covariance += centred.T @ centred
  return Moments(mean, covariance / (count - 1))


def fid(real: np.ndarray | Moments, generated: np.ndarray | Moments) -> float:
  """Frechet distance of two sets of activations.

  Heusel et al. (2017, https://arxiv.org/abs/1706.08500). Biased upwards by few
  samples: compare only values of the same counts (`fid_label` names them).

  Args:
    real: float [N, D], or its moments.
    generated: float [M, D], or its moments.

  Returns:
    The distance, at least 0 up to rounding.
  """
  a, b = (values if isinstance(values, Moments) else moments(values)
          for values in (real, generated))
  root = float(_tfgan().trace_sqrt_product(
      tf.constant(a.covariance), tf.constant(b.covariance)))
  return float(np.sum((a.mean - b.mean) ** 2)
               + np.trace(a.covariance + b.covariance) - 2 * root)


def fid_label(num_samples: int) -> str:
  """What to call an FID: "FID", but "FID-10k" of fewer than 50 000 samples.

  Published values are of 50 000. One of fewer is biased upwards and must not
  be read beside them.

  Args:
    num_samples: generated images.
  """
  if num_samples >= FULL_SAMPLES:
    return "FID"
  if num_samples % 1000 == 0:
    return f"FID-{num_samples // 1000}k"
  return f"FID-{num_samples}"


def heldout_fids(record: dict) -> dict[str, float]:
  """The FIDs of a record's held-out networks, by what to call them.

  Args:
    record: of `metrics.json`. Its `fid_heldout` is a number if there is one
      such network, a list in the order of `features_heldout` if there are
      several, else None.

  Returns:
    "held-out" for one network; of several also the name of each. A name that
    comes again is numbered.

  Raises:
    ValueError: not as many values as networks.
  """
  values = record.get("fid_heldout")
  if values is None:
    return {}
  if not isinstance(values, list):
    return {HELDOUT: values}
  names = [network["name"] for network in record["features_heldout"]]
  fids = {}
  for i, (name, value) in enumerate(zip(names, values, strict=True)):
    before = names[:i].count(name)
    number = f" ({before + 1})" if before else ""
    fids[f"{HELDOUT} {name}{number}"] = value
  return fids


def kid(real: np.ndarray, generated: np.ndarray,
        block_size: int = 1000) -> tuple[float, float]:
  """Kernel Inception Distance with the cubic kernel, and its standard error.

  Binkowski et al. (2018, https://arxiv.org/abs/1801.01401): unbiased, so it
  can be negative. The error comes from the spread between blocks: at least two,
  since one has none, and few enough to hold two samples of each set. Samples
  are dealt to the blocks at random, with a fixed seed: images come class by class
  from many a folder.

  Args:
    real: float [N, D], N at least 4.
    generated: float [M, D], M at least 4.
    block_size: samples of the larger set per block, at the most.

  Returns:
    The distance and its standard error.

  Raises:
    ValueError: fewer than 4 samples.
  """
  smallest = min(len(real), len(generated))
  if smallest < 4:
    raise ValueError(f"KID with an error needs at least 4 samples. "
                     f"Received: {smallest}")
  largest = max(len(real), len(generated))
  blocks = max(2, min(-(-largest // block_size), smallest // 2))
  real, generated = (
      values[np.random.default_rng(seed).permutation(len(values))]
      for seed, values in enumerate((real, generated)))
  value, error = (
      _tfgan().kernel_classifier_distance_and_std_from_activations(
          tf.constant(real, tf.float32), tf.constant(generated, tf.float32),
          max_block_size=-(-largest // blocks)))
  return float(value), float(error)


def inception_score(logits: np.ndarray, splits: int = 1
                    ) -> tuple[float, float]:
  """exp E KL(p(y|x) || p(y)) of a classifier's logits, at least 1.

  Salimans et al. (2016, https://arxiv.org/abs/1606.03498) give mean and
  standard deviation over 10 splits. A smaller split has a smaller score.

  Args:
    logits: float [N, classes].
    splits: parts of as equal size as can be, in order.

  Returns:
    The mean score of the splits and its standard deviation, 0 for one split.

  Raises:
    ValueError: more splits than samples, or fewer than 1.
  """
  if not 1 <= splits <= len(logits):
    raise ValueError(f"splits must be from 1 to the {len(logits)} samples. "
                     f"Received: {splits}")
  scores = [float(_tfgan().classifier_score_from_logits(
      tf.constant(part, tf.float32)))
            for part in np.array_split(logits, splits)]
  return float(np.mean(scores)), float(np.std(scores))

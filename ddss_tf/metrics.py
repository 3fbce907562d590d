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

import numpy as np
import tensorflow as tf


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


def fid(real: np.ndarray, generated: np.ndarray) -> float:
  """Frechet distance of two sets of activations.

  Heusel et al. (2017, https://arxiv.org/abs/1706.08500). Biased upwards by few
  samples: compare only values of the same counts.

  Args:
    real: float [N, D].
    generated: float [M, D].

  Returns:
    The distance, at least 0 up to rounding.
  """
  return float(_tfgan().frechet_classifier_distance_from_activations(
      tf.constant(real, tf.float32), tf.constant(generated, tf.float32)))


def kid(real: np.ndarray, generated: np.ndarray,
        block_size: int = 1000) -> tuple[float, float]:
  """Kernel Inception Distance with the cubic kernel, and its standard error.

  Binkowski et al. (2018, https://arxiv.org/abs/1801.01401): unbiased, so it
  can be negative. The error comes from the spread between blocks: at least two,
  since one has none, and few enough to hold two samples of each set.

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
  value, error = (
      _tfgan().kernel_classifier_distance_and_std_from_activations(
          tf.constant(real, tf.float32), tf.constant(generated, tf.float32),
          max_block_size=-(-largest // blocks)))
  return float(value), float(error)


def inception_score(logits: np.ndarray) -> float:
  """exp E KL(p(y|x) || p(y)) of a classifier's logits, at least 1.

  Salimans et al. (2016, https://arxiv.org/abs/1606.03498), in one split.

  Args:
    logits: float [N, classes].

  Returns:
    The score.
  """
  return float(_tfgan().classifier_score_from_logits(
      tf.constant(logits, tf.float32)))

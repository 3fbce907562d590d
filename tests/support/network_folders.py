"""Folders of networks in diffusers' layout, and how near outputs are."""

import json
import os
import shutil

import numpy as np
import safetensors.numpy

from ddss_tf.formats import diffusers


class NetworkFolder:
  """A folder with configuration and weights, and others like it.

  Args:
    folder: its path.
  """

  def __init__(self, folder):
    self._config, self._weights = (
        os.path.join(folder, name)
        for name in (diffusers.CONFIG, diffusers.WEIGHTS))

  def config(self):
    with open(self._config, encoding="utf-8") as f:
      return json.load(f)

  def tensors(self):
    return safetensors.numpy.load_file(self._weights)

  def write(self, folder, config=None, weights=None):
    """A folder with these files, or what is given instead."""
    folder = str(folder)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, diffusers.CONFIG), "w",
              encoding="utf-8") as f:
      json.dump(self.config() if config is None else config, f)
    target = os.path.join(folder, diffusers.WEIGHTS)
    if weights is None:
      shutil.copy(self._weights, target)
    else:
      safetensors.numpy.save_file(
          {name: np.ascontiguousarray(v) for name, v in weights.items()},
          target)
    return folder


def error(value, truth):
  """The largest difference, in standard deviations of the truth."""
  value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
  assert value.shape == truth.shape
  return np.max(np.abs(value - truth)) / np.std(truth)

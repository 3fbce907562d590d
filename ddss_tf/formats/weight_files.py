"""The files with the weights of a folder in the diffusers layout.

There is one file, or several and an index, as large networks have them. A folder
that has only half-precision files, whose names have "fp16" in them, is read from
these.
"""

import os

import numpy as np

from ddss_tf import storage
from ddss_tf.formats import cards
from ddss_tf.formats import diffusers
from ddss_tf.errors import UserError

_STEM = "diffusion_pytorch_model"
_HALF = f"{_STEM}.fp16.safetensors"
# In the order in which they are preferred.
_WHOLE = (diffusers.WEIGHTS, diffusers.PICKLED_WEIGHTS)
_INDICES = (f"{diffusers.WEIGHTS}.index.json",
            f"{_STEM}.safetensors.index.fp16.json")


def files(folder: str) -> list[str]:
  """The files that hold the weights, those that may be missing too.

  Args:
    folder: the path of the network's folder.

  Returns:
    Their paths: the file for all weights, in both formats, or the index of
    several files and these.

  Raises:
    UserError: the index is damaged.
  """
  whole = [os.path.join(folder, name) for name in _WHOLE]
  if any(map(storage.exists, whole)):
    return whole
  index, half, half_index = (
      os.path.join(folder, name) for name in (_INDICES[0], _HALF, _INDICES[1]))
  for source in (index, half, half_index):
    if storage.exists(source):
      return [source] if source == half else [source, *(
          os.path.join(folder, name)
          for name in sorted(set(_places(source).values())))]
  return whole


def read(folder: str) -> dict[str, np.ndarray]:
  """Reads the weights.

  Args:
    folder: see `files`.

  Returns:
    float32 arrays by diffusers' names.

  Raises:
    UserError: see `diffusers.read_weights`; or the index, or a file that it
      names, is missing or damaged.
  """
  source, *several = files(folder)
  if os.path.basename(source) == _HALF:
    return diffusers.read_weights(source)
  if os.path.basename(source) not in _INDICES:
    return diffusers.read_weights(folder)
  weights = {}
  for file in several:
    if not storage.exists(file):
      raise UserError(f"{source} needs {os.path.basename(file)} beside it. "
                      f"Received: {sorted(storage.listdir(folder))}")
    weights |= diffusers.read_weights(file)
  return weights


def _places(source: str) -> dict[str, str]:
  """The file of each tensor, as an index has it."""
  places = cards.read_json_object(source).get("weight_map")
  if not isinstance(places, dict) or not places or not all(
      isinstance(name, str) and name == os.path.basename(name)
      and name.endswith(".safetensors") for name in places.values()):
    raise UserError(f"{source}: weight_map must give the .safetensors file "
                    f"beside it for each tensor. Received: {str(places)[:80]}")
  return places

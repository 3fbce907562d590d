"""Random weights that take little room, for the fixtures of other tools.

The published networks have 32 groups in every normalisation. So 32 channels is
the smallest width, and float32 weights of that width would fill megabytes.
Weights here are small whole numbers times a scale, one scale per tensor.
"""

import json

import numpy as np


def draw(name: str, shape, rng) -> tuple[np.ndarray, float]:
  """Draws a tensor that keeps activations near unit variance.

  Args:
    name: the tensor's name; gains ("gamma", or one-dimensional "weight") are
      drawn around one, all others around zero.
    shape: the tensor's shape.
    rng: `np.random.Generator`.

  Returns:
    int8 whole numbers of `shape`, and their scale.
  """
  values = np.round(1.4 * rng.standard_normal(shape)).astype(np.int8)
  if len(shape) == 1:
    gain = name.endswith(("gamma", "weight"))
    return values + np.int8(8 if gain else 0), 0.125
  # The fan-in, whether inputs or outputs come first in the shape, if their
  # numbers are about equal.
  fan = np.prod(shape) / max(shape[-1], shape[0])
  return values, float(2.0 ** np.round(np.log2(0.8 / np.sqrt(fan))))


def save(path: str, tensors: dict, **arrays) -> None:
  """Writes drawn tensors and golden arrays.

  Args:
    path: the path of the npz file.
    tensors: by name, what `draw` gave.
    **arrays: the golden arrays.
  """
  index = [(name, values.shape, scale)
           for name, (values, scale) in tensors.items()]
  np.savez_compressed(
      path, index=json.dumps(index),
      weights=np.concatenate([v.ravel() for v, _ in tensors.values()]),
      **arrays)


def seeded(shapes: dict, seed: int) -> tuple[dict, list]:
  """Draws weights that need not be stored: their seed gives them again.

  They come from `RandomState`, whose stream of whole numbers NumPy has frozen.

  Args:
    shapes: shapes by name, in the order of the draws.
    seed: the seed of the draws.

  Returns:
    float32 tensors by name; and rows (name, shape, scale, offset). A tensor is
    (whole numbers in [-2, 2] + offset) * scale.
  """
  rng, tensors, index = np.random.RandomState(seed), {}, []
  for name, shape in shapes.items():
    scale, offset = 0.125, 0
    if len(shape) > 1:
      fan = np.prod(shape) / max(shape[-1], shape[0])
      scale = float(2.0 ** np.round(np.log2(0.8 / np.sqrt(fan))))
    elif name.endswith("weight"):
      offset = 8
    values = rng.randint(-2, 3, shape) + offset
    tensors[name] = (values * scale).astype(np.float32)
    index.append((name, tuple(shape), scale, offset))
  return tensors, index


def fill(model, seed: int) -> list:
  """Gives a PyTorch model the weights of `seeded`.

  Args:
    model: a `torch.nn.Module`.
    seed: the seed of the draws.

  Returns:
    What `seeded` gives beside the weights, to store in their place.
  """
  import torch  # pylint: disable=g-import-not-at-top
  tensors, index = seeded(
      {key: tuple(value.shape) for key, value in model.state_dict().items()},
      seed)
  model.load_state_dict({
      key: torch.from_numpy(value) for key, value in tensors.items()})
  return index

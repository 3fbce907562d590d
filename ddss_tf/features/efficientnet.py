"""EfficientNet-Lite0 with weights of ImageNet, as features.

The weights are read from a safetensors file with the names of the package
`efficientnet-lite-pytorch`, in float16 or float32.
"""

import os
import re

import numpy as np

from ddss_tf import storage
from ddss_tf.features import keras_models
from ddss_tf.formats import diffusers
from ddss_tf.formats import tensors
from ddss_tf.networks import efficientnet
from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError

PREFIX = "efficientnet-lite0:"
# The side to which images are resized unless told: a third of the work of 224, at
# which the network was trained. Our choice.
IMAGE_SIZE = 128
# What it was trained on: RGB, standardised.
VALUE_RANGE = "torch"
_FILE = "model.safetensors"
_EPSILON = 1e-3  # Of its batch normalisations.
# The file's names of the convolution and the normalisation of our layers; those of a
# block's layers lie in "_blocks.N".
_TOP = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
_IN_BLOCK = {"expand": ("_expand_conv", "_bn0"),
             "depthwise": ("_depthwise_conv", "_bn1"),
             "project": ("_project_conv", "_bn2")}
_NORM = ("weight", "bias", "running_mean", "running_var")


def load(path: str) -> keras_models.KerasNetwork:
  """Reads the network, frozen.

  Args:
    path: a safetensors file, or the folder of `model.safetensors`.

  Returns:
    The network. Its hash is that of the file's tensors in the order of their names,
    as float32.

  Raises:
    UserError: the file is missing, damaged, or not of this network.
  """
  source = storage.expanded(path)
  if storage.isdir(source):
    source = os.path.join(source, _FILE)
  if not storage.isfile(source):
    raise UserError(f"features {PREFIX}PATH must name a safetensors file, or the folder "
                    f"of {_FILE}. Received: {path!r}")
  weights = diffusers.read_weights(source)
  (classes,) = tensors.shape_of(weights, "_fc.bias", 1, "EfficientNet-Lite0")
  model = tensors.frozen(source, efficientnet.build_lite0, classes)
  values = tensors.matched(
      folded(weights), [(v.path, tuple(v.shape)) for v in model.weights],
      lambda name: name, _relayout)
  tensors.fill(model, values)
  return keras_models.KerasNetwork(
      model, PREFIX + path, fingerprint.arrays_sha256(
          [weights[name] for name in sorted(weights)]),
      f"{model.name}, {classes} classes, batch normalisations folded")


def folded(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Folds batch normalisations into the convolutions before them.

  With scale = weight / sqrt(running_var + 1e-3), a convolution by k and its
  normalisation are one by scale k with the bias bias - scale running_mean. It is
  computed in float64.

  Args:
    weights: float32 arrays by the file's names.

  Returns:
    float32 arrays by the paths of our variables, kernels still in PyTorch's layout.
    What is not of a convolution with a normalisation keeps its name.

  Raises:
    UserError: a convolution has no normalisation of its channels.
  """
  rest, result = dict(weights), {}
  for name in weights:
    if (layer := _layer_of(name)) is None:
      continue
    ours, norm = layer
    names = [f"{norm}.{part}" for part in _NORM]
    kernel = rest.pop(name)
    for each in names:
      if weights.get(each, kernel).shape != kernel.shape[:1]:
        raise UserError(f"EfficientNet-Lite0 must have {each} with {len(kernel)} numbers. "
                        f"Received: {weights.get(each, np.zeros(0)).shape}")
    scale, bias, mean, variance = (rest.pop(each).astype(np.float64) for each in names)
    scale = scale / np.sqrt(variance + _EPSILON)
    result[f"{ours}/kernel"] = (
        scale.reshape(-1, *[1] * (kernel.ndim - 1)) * kernel).astype(np.float32)
    result[f"{ours}/bias"] = (bias - scale * mean).astype(np.float32)
  for leaf, name in (("kernel", "_fc.weight"), ("bias", "_fc.bias")):
    if name in rest:
      result[f"logits/{leaf}"] = rest.pop(name)
  return {**result, **rest}


def _layer_of(name: str) -> tuple[str, str] | None:
  """Our layer of a convolution's tensor, and the name of its normalisation."""
  block = re.fullmatch(r"(_blocks\.(\d+)\.)(_\w+)\.weight", name)
  known = _IN_BLOCK if block else _TOP
  convolution = block[3] if block else name.removesuffix(".weight")
  for layer, (theirs, norm) in known.items():
    if theirs == convolution and name.endswith(".weight"):
      return (f"block_{block[2]}_{layer}", block[1] + norm) if block else (layer, norm)
  return None


def _relayout(path, value, shape):
  if path.endswith("_depthwise/kernel") and value.ndim == 4:
    return value.transpose(2, 3, 0, 1)  # Keras has the channels before the multiplier.
  return tensors.torch_layout(path, value, shape)

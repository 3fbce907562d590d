"""Reads the TensorFlow checkpoints of Ho et al. (2020), the original DDPM.

The source is https://github.com/hojonathanho/diffusion; its networks are
unconditional. There is no configuration file. Names and shapes give the
architecture, except for the size of the images. Layouts are those of Keras
already.
"""

import glob
import os
import re
from typing import Mapping

from absl import logging
import keras
import numpy as np
import tensorflow as tf

from ddss_tf import errors
from ddss_tf import storage
from ddss_tf.formats import tensors
from ddss_tf.errors import UserError
from ddss_tf.networks.unet import UNetConfig

_ROOT = "model/"
_EMA = "/ExponentialMovingAverage"
# What Adam and the training loop leave beside the network's variables.
_TRAINING = re.compile(r"(.*/Adam(_\d+)?|(.*/)?(global_step|beta\d_power\w*))")
# All published models have attention at this resolution and no other.
_ATTENTION_SIZE = 16


def find_prefix(path: str) -> str | None:
  """The checkpoint prefix that `path` means.

  Args:
    path: a prefix, such as "folder/model.ckpt-790000", or the folder of one.

  Returns:
    The prefix, or None if there is no checkpoint.

  Raises:
    UserError: the folder holds several checkpoints.
  """
  if storage.exists(path + ".index"):
    return path
  found = sorted(storage.glob(os.path.join(glob.escape(path), "*.index")))
  if len(found) > 1:
    raise UserError(
        "a checkpoint folder must hold one checkpoint; name its prefix. "
        f"Received: {path!r} with {[os.path.basename(f) for f in found]}")
  return found[0].removesuffix(".index") if found else None


def read_weights(prefix: str) -> dict[str, np.ndarray]:
  """Reads the network's variables, the averaged ones if there are any.

  Args:
    prefix: path of the checkpoint without ".index".

  Returns:
    float32 arrays by their names, without the suffix of the average. Adam's
    slots and step counters are left out.

  Raises:
    UserError: the checkpoint is truncated, has values that are not finite, or
      has averages of some variables only.
  """
  try:
    reader = tf.train.load_checkpoint(prefix)
    names = sorted(name for name in reader.get_variable_to_shape_map()
                   if not _TRAINING.fullmatch(name))
    averaged = {name.removesuffix(_EMA): name
                for name in names if name.endswith(_EMA)}
    chosen = {name: name for name in names if not name.endswith(_EMA)}
    missing = sorted(set(chosen) - set(averaged))
    if not missing:
      chosen = averaged
    elif averaged:  # Averages of some variables only do not make a network.
      raise UserError(f"{prefix} must have the {_EMA[1:]} of all variables, or "
                      f"of none. Received: none of {len(missing)}, among them "
                      f"{missing[0]}")
    else:
      logging.warning(
          "%s has no %s: the raw weights are read, whose images are worse (FID "
          "12 instead of 3 on CIFAR-10)", prefix, _EMA[1:])
    weights = {name: reader.get_tensor(stored)
               for name, stored in chosen.items()}
  except UserError:
    raise
  # These are IndexError and RuntimeError, too, beside those of tf.errors.
  except Exception as error:
    raise UserError(f"{prefix} is not a complete TensorFlow checkpoint: "
                    f"{errors.one_line(error)}") from error
  return tensors.finite_float32(prefix, weights)


def infer_config(weights: Mapping[str, np.ndarray],
                 image_size: int | None = None) -> UNetConfig:
  """The architecture that names and shapes tell.

  Args:
    weights: as `read_weights` gives them.
    image_size: height and width; None: such that attention is at 16x16, as in
      all published models.

  Raises:
    UserError: it is not such a network, or its image size cannot be inferred.
  """
  input_shape = _shape(weights, "conv_in/W", 4)
  output_shape = _shape(weights, "conv_out/W", 4)
  if input_shape[2] != output_shape[3]:
    # None of the original's published models has a learned variance.
    raise UserError(
        f"{_ROOT}conv_out/W must have {input_shape[2]} outputs, as many as "
        f"conv_in has inputs. Received: {output_shape[3]}")
  places = [re.match(_ROOT + r"down_(\d+)/(block|attn)_(\d+)/", name)
            for name in weights]
  places = [(int(p[1]), p[2], int(p[3])) for p in places if p]
  blocks = [(level, i) for level, kind, i in places if kind == "block"]
  if not blocks:
    raise UserError(f"a DDPM checkpoint must hold {_ROOT}down_0/block_0. "
                    f"Received: {sorted(weights)[:5]}")
  levels = 1 + max(level for level, _ in blocks)
  attention = sorted({level for level, kind, _ in places if kind == "attn"})
  if image_size is None:
    if len(attention) != 1:
      raise UserError(
          "image_size must be given for a checkpoint with attention at another "
          f"number of levels than one. Received: levels {attention}")
    image_size = _ATTENTION_SIZE * 2 ** attention[0]
  return UNetConfig(
      image_size=image_size,
      in_channels=input_shape[2],
      out_channels=output_shape[3],
      channels=tuple(_shape(weights, f"down_{level}/block_0/conv1/W", 4)[3]
                     for level in range(levels)),
      blocks_per_level=1 + max(i for _, i in blocks),
      attention_levels=tuple(attention))


def _shape(weights, name: str, rank: int) -> tuple[int, ...]:
  """Shape of a tensor that every such checkpoint has."""
  return tensors.shape_of(weights, _ROOT + name, rank, "a DDPM checkpoint")


_FIXED = {
    "conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "norm_out",
    "time_1": "temb/dense0", "time_2": "temb/dense1",
    "mid_block_0": "mid/block_1", "mid_attention": "mid/attn_1",
    "mid_block_1": "mid/block_2",
}
_INSIDE = {
    "norm1": "norm1", "conv1": "conv1", "time_projection": "temb_proj",
    "norm2": "norm2", "conv2": "conv2", "shortcut": "nin_shortcut",
    "norm": "norm", "query": "q", "key": "k", "value": "v",
    "output_projection": "proj_out",
}
_LEAF = {"kernel": "W", "bias": "b", "gamma": "gamma", "beta": "beta"}


def _source_name(path: str, levels: int) -> str:
  """The checkpoint's name of our variable `path`."""
  *layers, leaf = path.split("/")
  place = layers[0]
  if place in _FIXED:
    names = [_FIXED[place]]
  else:
    side, level, kind, *number = re.fullmatch(
        r"(down|up)_(\d+)_([a-z]+)(?:_(\d+))?", place).groups()
    # On the way up, our numbers count from the coarsest level; theirs are level
    # indices.
    level = int(level) if side == "down" else levels - 1 - int(level)
    layer = {"block": f"block_{number[0]}", "attention": f"attn_{number[0]}",
             "downsample": "downsample/conv", "upsample": "upsample/conv"}
    names = [f"{side}_{level}", layer[kind]]
  inside = [_INSIDE[layer] for layer in layers[1:]]
  return _ROOT + "/".join([*names, *inside, _LEAF[leaf]])


def _relayout(path, value, shape):
  del path
  # Their 1x1 shortcuts are matrices, ours convolutions.
  if value.ndim == 2 and len(shape) == 4:
    return value[None, None]
  return value


def convert(prefix: str, weights: Mapping[str, np.ndarray],
            image_size: int | None = None) -> keras.Model:
  """Makes the network.

  Args:
    prefix: what the weights were read from, for messages.
    weights: as `read_weights` gives them.
    image_size: see `infer_config`.

  Returns:
    A frozen network. It maps images and times in [0, 999] to eps.

  Raises:
    UserError: see `infer_config`; weights and architecture do not match.
  """
  config = infer_config(weights, image_size)
  levels = len(config.channels)
  return tensors.build_frozen(
      prefix, config,
      lambda variables: tensors.matched(
          weights, variables, lambda path: _source_name(path, levels),
          _relayout))

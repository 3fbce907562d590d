"""Reads state dicts (`.pt`) of improved-diffusion, unconditional ones.

Nichol and Dhariwal (2021, https://arxiv.org/abs/2102.09672),
https://github.com/openai/improved-diffusion. Names and shapes give the
architecture; the rest, which there are command-line flags, is in a card of the
same words: `<file>.json`, or arguments. That of cifar10_uncond_50M_500K.pt is

  {"image_size": 32, "num_heads": 4, "diffusion_steps": 4000,
   "noise_schedule": "cosine", "rescale_timesteps": true}

PyTorch is needed to read the file, and only for that. Of a training run of your
own, take `ema_*.pt`, not `model*.pt`: the file does not say which it is.
"""

import os
import re
from typing import Mapping

import keras
import numpy as np

from ddss_tf import checkpoints
from ddss_tf import schedules
from ddss_tf.errors import UserError
from ddss_tf.unet import UNetConfig

SUFFIX = ".pt"

_SCHEDULES = ("linear", "cosine")
# What names and shapes do not tell: (the type, what the message says).
_NEEDED = {
    "image_size": (int, "a whole number"),
    "num_heads": (int, "a whole number"),
    "diffusion_steps": (int, "a whole number"),
    "noise_schedule": (str, f"one of {', '.join(_SCHEDULES)}"),
    "rescale_timesteps": (bool, "true or false"),
}
# Flags with a single implemented value, which absent ones have.
_REQUIRED = {
    "class_cond": False,
    "num_heads_upsample": -1,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
_OPTIONAL = {"predict_xstart": False}
CARD_KEYS = tuple(_NEEDED)


def read_weights(path: str) -> dict[str, np.ndarray]:
  """Reads a state dict. Runs no code from the file.

  Args:
    path: of the `.pt` file.

  Returns:
    float32 arrays by the file's names.

  Raises:
    UserError: PyTorch is not installed; the file is truncated, not a state
      dict, or has values that are not finite.
  """
  try:
    import torch  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise UserError("PyTorch must be installed to read a .pt file (pip install "
                    f"torch; the CPU build will do). Received: {path!r}"
                    ) from error
  try:
    state = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # PyTorch raises many kinds for a damaged file.
    raise UserError(f"{path} is not a complete PyTorch state dict: "
                    f"{checkpoints.one_line(error)}") from error
  if not isinstance(state, dict) or not all(
      isinstance(value, torch.Tensor) for value in state.values()):
    raise UserError(f"{path} must hold a state dict, tensors by name. "
                    f"Received: {type(state).__name__}")
  # float() first: NumPy has no bfloat16.
  return checkpoints.finite_float32(path, {
      name: value.float().numpy() for name, value in state.items()})


def read_card(path: str, given: Mapping[str, object]) -> dict:
  """Reads what the tensors do not tell.

  Args:
    path: of the `.pt` file; `<path>.json` is read if it is there.
    given: values of `CARD_KEYS` that take precedence; None: not given.

  Returns:
    Every key of `CARD_KEYS`, and "predict_xstart".

  Raises:
    UserError: keys that are missing, unknown, or of a value that is not
      implemented.
  """
  source = path + ".json"
  card = {}
  if os.path.exists(source):
    card = checkpoints.read_json_object(source)
  known = {**_NEEDED, **_REQUIRED, **_OPTIONAL}
  unknown = sorted(set(card) - set(known))
  if unknown:
    raise UserError(f"{source}: keys must be among {', '.join(known)}. "
                    f"Received: {', '.join(unknown)}")
  card |= {key: value for key, value in given.items() if value is not None}
  for key, value in _REQUIRED.items():
    if card.get(key, value) != value:
      raise UserError(
          f"{source}: {key} must be {value!r}. Received: {card[key]!r}")
  missing = [key for key in _NEEDED if key not in card]
  if missing:
    raise UserError(
        f"{', '.join(missing)} must be given, by {source} or as arguments: the "
        f"tensors do not tell. Received: {sorted(card)}")
  for key, (kind, words) in _NEEDED.items():
    value = card[key]
    # type(), because True is an int.
    if type(value) is not kind or (kind is int and value < 1) or (
        kind is str and value not in _SCHEDULES):
      raise UserError(f"{source}: {key} must be {words}. Received: {value!r}")
  result = {key: card[key] for key in _NEEDED}
  for key, value in _OPTIONAL.items():
    result[key] = card.get(key, value)
    if not isinstance(result[key], bool):
      raise UserError(
          f"{source}: {key} must be true or false. Received: {result[key]!r}")
  return result


def betas(card: Mapping[str, object]) -> np.ndarray:
  """float64 [T]; the linear ones are those of T = 1000, scaled by 1000 / T."""
  steps = card["diffusion_steps"]
  scale = 1000 / steps
  try:
    return schedules.make_schedule(
        card["noise_schedule"], steps, scale * 1e-4, scale * 0.02).betas
  except ValueError as error:
    raise UserError(
        f"diffusion_steps = {steps} gives no {card['noise_schedule']} schedule:"
        f" {error}") from error


def infer_config(weights: Mapping[str, np.ndarray],
                 card: Mapping[str, object]) -> UNetConfig:
  """The architecture that names, shapes and card tell.

  Args:
    weights: as `read_weights` gives them.
    card: as `read_card` gives it.

  Raises:
    UserError: not such a network, or a variant that is not implemented; with
      the tensor that tells.
  """
  if "label_emb.weight" in weights:
    raise UserError("the network must be unconditional. Received: tensor "
                    "label_emb.weight of a class-conditional one")
  base, in_channels = _shape(weights, "input_blocks.0.0.weight", 4)[:2]
  if in_channels not in (1, 3):
    raise UserError(
        "input_blocks.0.0.weight must read images of 1 or 3 channels. Received:"
        f" {in_channels}, as in a super-resolution network")
  out_channels = _shape(weights, "out.2.weight", 4)[0]
  if out_channels not in (in_channels, 2 * in_channels):
    raise UserError(
        f"out.2.weight must have {in_channels} outputs, or twice as many with "
        f"learned variances. Received: {out_channels}")

  last = max(int(match[1]) for match in (
      re.match(r"input_blocks\.(\d+)\.", name) for name in weights) if match)
  channels, blocks, attention = [], [0], set()
  for n in range(1, last + 1):
    if f"input_blocks.{n}.0.op.weight" in weights:
      blocks.append(0)
      continue
    level = len(blocks) - 1
    # Two convolutions of stride one, where a strided one is due, are what
    # resblock_updown leaves; pooling without weights leaves nothing.
    width = _shape(weights, f"input_blocks.{n}.0.in_layers.2.weight", 4)[0]
    if not blocks[level]:
      channels.append(width)
    blocks[level] += 1
    if f"input_blocks.{n}.1.qkv.weight" in weights:
      attention.add(level)
  if len(blocks) == 1:
    raise UserError(
        "resblock_updown must be false, and conv_resample true. Received: a "
        "network without any tensor input_blocks.N.0.op.weight, the strided "
        "convolution between two levels")
  if len(set(blocks)) != 1 or not blocks[0]:
    raise UserError("every level must have the same number of residual blocks. "
                    f"Received: {blocks}")
  width = _shape(weights, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
  return UNetConfig(
      image_size=card["image_size"],
      in_channels=in_channels,
      # Of learned variances nothing is used: a sampler brings its own.
      out_channels=in_channels,
      channels=tuple(channels),
      blocks_per_level=blocks[0],
      attention_levels=tuple(sorted(attention)),
      num_heads=card["num_heads"],
      norm_epsilon=1e-5,
      sin_first=False,
      frequency_shift=0.0,
      symmetric_downsample=True,
      scale_shift=width == 2 * channels[0],
      time_scale=(1000.0 / card["diffusion_steps"]
                  if card["rescale_timesteps"] else 1.0))


def _shape(weights, name: str, rank: int) -> tuple[int, ...]:
  """Shape of a tensor that every such network has."""
  if name not in weights:
    raise UserError(f"an improved-diffusion state dict must hold {name}. "
                    f"Received: {sorted(weights)[:5]}")
  shape = weights[name].shape
  if len(shape) != rank:
    raise UserError(
        f"tensor {name} must have {rank} dimensions. Received: shape {shape}")
  return shape


_FIXED = {
    "conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2",
    "time_1": "time_embed.0", "time_2": "time_embed.2",
    "mid_block_0": "middle_block.0", "mid_attention": "middle_block.1",
    "mid_block_1": "middle_block.2",
}
_INSIDE = {
    "norm1": "in_layers.0", "conv1": "in_layers.2",
    "time_projection": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "shortcut": "skip_connection", "norm": "norm",
    "query": "qkv", "key": "qkv", "value": "qkv",
    "output_projection": "proj_out",
}
_LEAF = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}


def _source_name(path: str, config: UNetConfig) -> str:
  """The state dict's name of our variable `path`.

  Its blocks are numbered through all levels. Each level takes one number more
  than it has blocks: going down for the downsampling, going up for one more
  block, whose last member is the upsampling.
  """
  *layers, leaf = path.split("/")
  place = layers[0]
  if place in _FIXED:
    prefix = _FIXED[place]
  else:
    side, stage, kind, number = re.fullmatch(
        r"(down|up)_(\d+)_([a-z]+)(?:_(\d+))?", place).groups()
    blocks = config.blocks_per_level
    start = int(stage) * (blocks + 1) + (1 if side == "down" else 0)
    index = start + (blocks if number is None else int(number))
    level = len(config.channels) - 1 - int(stage)  # Of the way up.
    member = {
        "block": "0",
        "attention": "1",
        "downsample": "0.op",
        "upsample": f"{2 if level in config.attention_levels else 1}.conv",
    }[kind]
    prefix = f"{'in' if side == 'down' else 'out'}put_blocks.{index}.{member}"
  inside = "".join(f".{_INSIDE[layer]}" for layer in layers[1:])
  return f"{prefix}{inside}.{_LEAF[leaf]}"


def convert(source: str, weights: Mapping[str, np.ndarray],
            card: Mapping[str, object]) -> keras.Model:
  """Makes the network, without PyTorch.

  Args:
    source: what the weights were read from, for messages.
    weights: as `read_weights` gives them.
    card: as `read_card` gives it.

  Returns:
    A frozen network, from images and training-step indices t in [0, T - 1] to
    the prediction; without the channels of a learned variance.

  Raises:
    UserError: see `infer_config`; weights and architecture do not match.
  """
  config = infer_config(weights, card)
  return checkpoints.build_frozen(
      source, config, lambda variables: _to_keras(weights, config, variables))


def _to_keras(weights, config, variables):
  """Renames and re-lays weights, see `checkpoints.matched`."""
  learned_sigma = weights["out.2.weight"].shape[0] == 2 * config.in_channels

  def relayout(path, value, shape):
    parts = path.split("/")
    if parts[-2] in ("query", "key", "value"):
      # Head by head, each [query, key, value].
      width = shape[-1]
      if value.shape[:1] == (3 * width,):
        split = value.reshape(
            config.num_heads, 3, width // config.num_heads, *value.shape[1:])
        value = split[:, ("query", "key", "value").index(parts[-2])].reshape(
            width, *value.shape[1:])
    if parts[0] == "conv_out" and learned_sigma:
      if value.shape[:1] != (2 * config.in_channels,):
        raise UserError(
            f"tensor out.2.{_LEAF[parts[-1]]} must have "
            f"{2 * config.in_channels} outputs, as out.2.weight has. "
            f"Received: shape {value.shape}")
      value = value[:config.in_channels]
    return checkpoints.torch_layout(path, value, shape)

  return checkpoints.matched(
      weights, variables, lambda path: _source_name(path, config), relayout)

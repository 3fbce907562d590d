"""Reads state dicts (`.pt`) of improved-diffusion and guided-diffusion.

Sources: Nichol and Dhariwal (2021, https://arxiv.org/abs/2102.09672),
https://github.com/openai/improved-diffusion; Dhariwal and Nichol (2021,
https://arxiv.org/abs/2105.05233), https://github.com/openai/guided-diffusion.
Their networks are unconditional or class-conditional.

Names and shapes of the tensors give the architecture. The original takes the
rest as command-line flags. Here it is given by the same names, as arguments or
in a card, `<file>.json`. The cards of cifar10_uncond_50M_500K.pt and
64x64_diffusion.pt are

  {"image_size": 32, "num_heads": 4, "diffusion_steps": 4000,
   "noise_schedule": "cosine", "rescale_timesteps": true}
  {"image_size": 64, "num_head_channels": 64, "diffusion_steps": 1000,
   "noise_schedule": "cosine", "rescale_timesteps": false,
   "use_new_attention_order": true}

PyTorch is needed only to read the file. From a training run of your own, take
`ema_*.pt`, not `model*.pt`: the file does not say which it is.
"""

import re
from typing import Mapping

import keras
import numpy as np

from ddss_tf import schedules
from ddss_tf import storage
from ddss_tf.formats import cards
from ddss_tf.formats import tensors
from ddss_tf.errors import UserError
from ddss_tf.networks.unet import UNetConfig

SUFFIX = ".pt"

_SCHEDULES = ("linear", "cosine")
_WHOLE, _FLAG = (int, "a whole number"), (bool, "true or false")
# What names and shapes do not tell: (the type, what the message says).
_NEEDED = {
    "image_size": _WHOLE,
    "num_heads": _WHOLE,  # Unless there is num_head_channels.
    "diffusion_steps": _WHOLE,
    "noise_schedule": (str, f"one of {', '.join(_SCHEDULES)}"),
    "rescale_timesteps": _FLAG,
}
_OPTIONAL = {
    "num_head_channels": _WHOLE,
    "num_heads_upsample": _WHOLE,
    "use_new_attention_order": _FLAG,
    "predict_xstart": _FLAG,
}
# Flags that the tensors tell too. A card must agree with them.
_CHECKED = ("class_cond", "learn_sigma", "resblock_updown",
            "use_scale_shift_norm")


def read_card(path: str, given: Mapping[str, object]) -> dict:
  """Reads what the tensors do not tell.

  Args:
    path: the path of the `.pt` file; `<path>.json` is read if it is there.
    given: values that take precedence.

  Returns:
    The card. It always has `predict_xstart`, and one of `num_heads` and
    `num_head_channels`. It has the other optional keys if they are given.

  Raises:
    UserError: a key is missing or unknown, or has a value that is not
      implemented.
  """
  source = path + ".json"
  card = {}
  if storage.exists(source):
    card = cards.read_json_object(source)
  known = {**_NEEDED, **_OPTIONAL, **dict.fromkeys(_CHECKED, _FLAG)}
  unknown = sorted(set(card) - set(known))
  if unknown:
    raise UserError(f"{source}: keys must be among {', '.join(known)}. "
                    f"Received: {', '.join(unknown)}")
  if "num_heads" in given:
    card.pop("num_head_channels", None)
  card |= given
  for key in ("num_head_channels", "num_heads_upsample"):
    if card.get(key) == -1:  # The original's word for None.
      del card[key]
  if "num_head_channels" in card:  # It takes precedence, as in the original.
    card.pop("num_heads", None)
    card.pop("num_heads_upsample", None)
  missing = [key for key in _NEEDED if key not in card and not (
      key == "num_heads" and "num_head_channels" in card)]
  if missing:
    raise UserError(
        f"{', '.join(missing)} must be given, by {source} or as arguments: the "
        f"tensors do not tell. Received: {sorted(card)}")
  for key, value in card.items():
    kind, words = known[key]
    # type(), because True is an int.
    if type(value) is not kind or (kind is int and value < 1) or (
        kind is str and value not in _SCHEDULES):
      raise UserError(f"{source}: {key} must be {words}. Received: {value!r}")
  return {"predict_xstart": False, **card}


def betas(card: Mapping[str, object]) -> np.ndarray:
  """Betas, float64 [T]; linear ones are those of T = 1000 times 1000 / T."""
  steps = card["diffusion_steps"]
  scale = 1000 / steps
  try:
    return schedules.make_schedule(
        card["noise_schedule"], steps, scale * 1e-4, scale * 0.02).betas
  except ValueError as error:
    raise UserError(
        f"diffusion_steps = {steps} gives no {card['noise_schedule']} schedule:"
        f" {error}") from error


def num_classes(weights: Mapping[str, np.ndarray]) -> int | None:
  """The number of classes; None if the network is unconditional."""
  if "label_emb.weight" not in weights:
    return None
  return _shape(weights, "label_emb.weight", 2)[0]


def infer_config(weights: Mapping[str, np.ndarray],
                 card: Mapping[str, object],
                 keep_variance: bool = False) -> UNetConfig:
  """The architecture that names, shapes and card tell.

  Args:
    weights: as `tensors.read_state_dict` gives them.
    card: as `read_card` gives it.
    keep_variance: keep the channels of a learned variance.

  Raises:
    UserError: it is not such a network, or a variant that is not implemented;
      the message names the tensor that tells. Or tensors and card do not agree.
  """
  in_channels = _shape(weights, "input_blocks.0.0.weight", 4)[1]
  if in_channels not in (1, 3):
    raise UserError(
        "input_blocks.0.0.weight must read images of 1 or 3 channels. Received:"
        f" {in_channels}, as in a super-resolution network")
  out_channels = _shape(weights, "out.2.weight", 4)[0]
  if out_channels not in (in_channels, 2 * in_channels):
    raise UserError(
        f"out.2.weight must have {in_channels} outputs, or twice as many with "
        f"learned variances. Received: {out_channels}")
  if keep_variance and out_channels == in_channels:
    raise UserError("learned_variance must not be given for a network that "
                    f"predicts none. Received: {out_channels} outputs")
  time_features = _shape(weights, "time_embed.0.weight", 2)[1]

  last = max(int(match[1]) for match in (
      re.match(r"input_blocks\.(\d+)\.", name) for name in weights) if match)
  downs = {n for n in range(1, last + 1)
           if f"input_blocks.{n}.0.op.weight" in weights}
  updown = not downs
  if updown:
    downs = _residual_downs(weights, last)
  channels, blocks, attention = [], [0], set()
  for n in range(1, last + 1):
    if n in downs:
      blocks.append(0)
      continue
    level = len(blocks) - 1
    width = _shape(weights, f"input_blocks.{n}.0.in_layers.2.weight", 4)[0]
    if not blocks[level]:
      channels.append(width)
    blocks[level] += 1
    if f"input_blocks.{n}.1.qkv.weight" in weights:
      attention.add(level)
  if len(set(blocks)) != 1 or not blocks[0]:
    raise UserError("every level must have the same number of residual blocks. "
                    f"Received: {blocks}")
  width = _shape(weights, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
  told = {
      "class_cond": num_classes(weights) is not None,
      "learn_sigma": out_channels != in_channels,
      "resblock_updown": updown,
      "use_scale_shift_norm": width == 2 * channels[0],
  }
  for key, value in told.items():
    if card.get(key, value) != value:
      raise UserError(f"{key} must be {str(value).lower()}, as the tensors say."
                      f" Received: {str(card[key]).lower()}")
  if updown and "use_new_attention_order" not in card:
    raise UserError(
        "use_new_attention_order must be given for guided-diffusion: true for "
        "64x64_diffusion.pt, false for the other published ones; the tensors "
        f"do not tell. Received: {sorted(card)}")
  levels = range(len(channels))
  return UNetConfig(
      image_size=card["image_size"],
      in_channels=in_channels,
      # A learned variance is left out unless it is asked for, because a sampler
      # of few steps brings its own.
      out_channels=out_channels if keep_variance else in_channels,
      channels=tuple(channels),
      blocks_per_level=blocks[0],
      attention_levels=tuple(sorted(attention)),
      head_channels=card.get("num_head_channels"),
      num_heads=card.get("num_heads"),
      num_heads_up=card.get("num_heads_upsample"),
      norm_epsilon=1e-5,
      sin_first=False,
      frequency_shift=0.0,
      symmetric_downsample=True,
      residual_down_levels=tuple(levels[:-1]) if updown else (),
      residual_up_levels=tuple(levels[1:]) if updown else (),
      scale_shift=told["use_scale_shift_norm"],
      time_scale=(1000.0 / card["diffusion_steps"]
                  if card["rescale_timesteps"] else 1.0),
      # Not the width of the first level: that may be half of it.
      time_features=time_features,
      time_width=4 * time_features,
      num_classes=num_classes(weights))


def _residual_downs(weights, last: int) -> set[int]:
  """Numbers of the input blocks of resblock_updown that end a level.

  Their names are as those of other blocks. The way up tells which they are: the
  number of its first block with a second residual block is the number of blocks
  per level.
  """
  ups = [int(match[1]) for match in (
      re.fullmatch(r"output_blocks\.(\d+)\.[12]\.in_layers\.2\.weight", name)
      for name in weights) if match]
  if not ups:
    raise UserError(
        "conv_resample must be true. Received: a network that neither has a "
        "tensor input_blocks.N.0.op.weight, the strided convolution between "
        "two levels, nor the second residual block of resblock_updown, "
        "output_blocks.N.1.in_layers.2.weight")
  per_level = min(ups) + 1
  return set(range(per_level, last + 1, per_level))


def _shape(weights, name: str, rank: int) -> tuple[int, ...]:
  """Shape of a tensor that every such network has."""
  return tensors.shape_of(
      weights, name, rank, "an OpenAI diffusion state dict")


_FIXED = {
    "conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2",
    "time_1": "time_embed.0", "time_2": "time_embed.2",
    "mid_block_0": "middle_block.0", "mid_attention": "middle_block.1",
    "mid_block_1": "middle_block.2", "label_embedding": "label_emb",
}
_INSIDE = {
    "norm1": "in_layers.0", "conv1": "in_layers.2",
    "time_projection": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "shortcut": "skip_connection", "norm": "norm",
    "query": "qkv", "key": "qkv", "value": "qkv",
    "output_projection": "proj_out",
}
_LEAF = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias",
         "embeddings": "weight"}


def _source_name(path: str, config: UNetConfig) -> str:
  """The state dict's name of our variable `path`.

  The state dict numbers blocks through all levels. Each level takes one number
  more than `blocks_per_level`. On the way down, that one is the downsampling.
  On the way up, it is one more block, whose last member is the upsampling.
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
    level = len(config.channels) - 1 - int(stage)  # Counted on the way up.
    residual = bool(layers[1:])  # Convolutions have no layers inside.
    member = {
        "block": "0",
        "attention": "1",
        "downsample": "0" if residual else "0.op",
        "upsample": ("2" if level in config.attention_levels else "1") + (
            "" if residual else ".conv"),
    }[kind]
    prefix = f"{'in' if side == 'down' else 'out'}put_blocks.{index}.{member}"
  inside = "".join(f".{_INSIDE[layer]}" for layer in layers[1:])
  return f"{prefix}{inside}.{_LEAF[leaf]}"


def convert(source: str, weights: Mapping[str, np.ndarray],
            card: Mapping[str, object],
            keep_variance: bool = False) -> keras.Model:
  """Makes the network, without PyTorch.

  Args:
    source: what the weights were read from, for messages.
    weights: as `tensors.read_state_dict` gives them.
    card: as `read_card` gives it.
    keep_variance: keep the channels of a learned variance.

  Returns:
    A frozen network. It maps images, training-step indices t in [0, T - 1] and,
    if it is class-conditional, labels to the prediction.

  Raises:
    UserError: see `infer_config`; weights and architecture do not match.
  """
  config = infer_config(weights, card, keep_variance)
  return tensors.build_frozen(
      source, config, lambda variables: _to_keras(
          weights, config, variables,
          bool(card.get("use_new_attention_order"))))


def _to_keras(weights, config, variables, new_attention_order):
  """Renames and re-lays weights, see `tensors.matched`."""
  learned_sigma = weights["out.2.weight"].shape[0] == 2 * config.in_channels

  def relayout(path, value, shape):
    parts = path.split("/")
    if parts[-2] in ("query", "key", "value"):
      width = shape[-1]
      if value.shape[:1] == (3 * width,):
        # The old order has [query, key, value] head by head. The new one has
        # them once, as if there were a single head.
        heads = 1 if new_attention_order else _heads(config, parts[0], width)
        split = value.reshape(heads, 3, width // heads, *value.shape[1:])
        value = split[:, ("query", "key", "value").index(parts[-2])].reshape(
            width, *value.shape[1:])
    if parts[0] == "conv_out" and learned_sigma:
      if value.shape[:1] != (2 * config.in_channels,):
        raise UserError(
            f"tensor out.2.{_LEAF[parts[-1]]} must have "
            f"{2 * config.in_channels} outputs, as out.2.weight has. "
            f"Received: shape {value.shape}")
      value = value[:config.out_channels]
    return tensors.torch_layout(path, value, shape)

  return tensors.matched(
      weights, variables, lambda path: _source_name(path, config), relayout)


def _heads(config: UNetConfig, place: str, width: int) -> int:
  """Heads of the attention layer at a place, as `unet.build_unet` has them."""
  if config.head_channels is not None:
    return width // config.head_channels
  if place.startswith("up_") and config.num_heads_up is not None:
    return config.num_heads_up
  return config.num_heads

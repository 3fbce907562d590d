"""Reads a `UNet2DConditionModel` in the diffusers folder layout.

The folder, `unet/` of a pipeline of Stable Diffusion 1, 2 or XL, holds
`config.json` and the weights. Every config key is either honoured or required
to have the one value we implement; everything else is refused by name.
"""

import os

import keras

from ddss_tf.errors import UserError
from ddss_tf.formats import cards
from ddss_tf.formats import diffusers
from ddss_tf.formats import tensors
from ddss_tf.formats import weight_files
from ddss_tf.networks import condition_unet
from ddss_tf.networks import layers
from ddss_tf.networks.condition_unet import ConditionUNetConfig

_CLASS = "UNet2DConditionModel"

# The keys that `ConditionUNetConfig` has, in its words, their types, diffusers'
# defaults, and the least value.
_FIELDS = {
    "in_channels": ("in_channels", int, 4, 1),
    "out_channels": ("out_channels", int, 4, 1),
    "norm_num_groups": ("norm_groups", int, 32, 1),
    "norm_eps": ("norm_epsilon", float, 1e-5, 1),
    "freq_shift": ("frequency_shift", float, 0, 0),
    "center_input_sample": ("center_input", bool, False, 1),
    "conv_in_kernel": ("kernel_in", int, 3, 1),
    "conv_out_kernel": ("kernel_out", int, 3, 1),
    "mid_block_scale_factor": ("mid_divisor", float, 1, 1),
}
# Keys with a single implemented value, which is also the class's default.
_REQUIRED = {
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    # diffusers has it, but refuses any other value itself.
    "num_attention_heads": None,
    "num_class_embeds": None,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
}
# Keys that change nothing: dropout is off when a network is used, attention is
# in float32 unless a policy says otherwise, a linear projection is what a
# convolution of one pixel is, and no block that we read has the others.
_IGNORED = {
    "addition_embed_type_num_heads", "cross_attention_norm", "dropout",
    "mid_block_only_cross_attention", "resnet_out_scale_factor",
    "resnet_skip_time_act", "upcast_attention", "use_linear_projection",
}
_USED = {
    "act_fn", "addition_embed_type", "addition_time_embed_dim",
    "attention_head_dim", "block_out_channels", "cross_attention_dim",
    "down_block_types", "downsample_padding", "flip_sin_to_cos",
    "layers_per_block", "mid_block_type", "only_cross_attention",
    "projection_class_embeddings_input_dim", "resnet_time_scale_shift",
    "reverse_transformer_layers_per_block", "sample_size",
    "time_embedding_act_fn", "time_embedding_dim", "timestep_post_act",
    "transformer_layers_per_block", "up_block_types",
}

# Types of blocks without and with transformers.
_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
_MIDDLES = {"UNetMidBlock2DCrossAttn": "attention", "UNetMidBlock2D": "block",
            None: "none"}
_DOWN_DEFAULT = [_DOWN[1]] * 3 + [_DOWN[0]]
_UP_DEFAULT = [_UP[0]] + [_UP[1]] * 3
_CHANNELS_DEFAULT = [320, 640, 1280, 1280]
_DEPTHS = "transformer_layers_per_block"

# Our names of the layers inside a transformer, and theirs.
_INSIDE = {
    "norm": "norm", "projection_in": "proj_in", "projection_out": "proj_out",
    "norm1": "norm1", "norm2": "norm2", "norm3": "norm3",
    "attention1": "attn1", "attention2": "attn2", "query": "to_q",
    "key": "to_k", "value": "to_v", "output_projection": "to_out.0",
    "mlp_1": "ff.net.0.proj", "mlp_2": "ff.net.2",
}
_ADDED = {"added_1": "add_embedding.linear_1",
          "added_2": "add_embedding.linear_2"}


def is_condition_unet(folder: str) -> bool:
  """Whether a folder holds the configuration of such a network."""
  return diffusers.class_name(folder) == _CLASS


def read_config(folder: str, image_size: int | tuple[int, int] | None = None,
                num_sizes: int = 6) -> ConditionUNetConfig:
  """Reads `config.json`.

  Args:
    folder: the path of the network's folder.
    image_size: height and width of the latents; None: as `sample_size` says.
      The network fits any size, and many pipelines use another than it was
      trained with.
    num_sizes: the number of sizes that a network with a pooled text is told.
      The file has only the width of text and sizes together. SDXL has 6, its
      refiner 5: a score in place of the size asked for.

  Returns:
    The architecture, for a text of any number of tokens.

  Raises:
    UserError: the file is missing or damaged; a key is not known, or has a
      value that is not implemented; `image_size` is not a size, or needed.
  """
  source = os.path.join(folder, diffusers.CONFIG)
  config = diffusers.read_json(source)
  _check_keys(source, config)
  values = {ours: cards.json_value(source, key, config.get(key, default), kind,
                                   least)
            for key, (ours, kind, default, least) in _FIELDS.items()}
  channels = cards.json_value(
      source, "block_out_channels",
      config.get("block_out_channels", _CHANNELS_DEFAULT), tuple)
  down = _blocks(source, config, "down_block_types", _DOWN, _DOWN_DEFAULT,
                 len(channels))
  up = _blocks(source, config, "up_block_types", _UP, _UP_DEFAULT,
               len(channels))
  blocks = _levels(source, config, "layers_per_block", 2, len(channels))
  middle = _choice(source, config, "mid_block_type", _MIDDLES,
                   "UNetMidBlock2DCrossAttn")
  of_down, of_up = _transformers(source, config, blocks, down, up)
  # In order of the levels, finest first.
  attends = [a or b for a, b in zip(down, reversed(up), strict=True)]
  attends[-1] = attends[-1] or middle == "attention"
  return ConditionUNetConfig(
      image_size=diffusers.latents_size(
          source, config.get("sample_size"), image_size, "image_size",
          "latents"),
      channels=channels,
      blocks_per_level=blocks,
      down_transformers=of_down,
      up_transformers=of_up,
      # The key means what its name says in other networks only.
      num_heads=_levels(source, config, "attention_head_dim", 8, len(channels)),
      context_width=_context_width(source, config, attends),
      only_context_levels=_only_context(source, config, len(channels)),
      middle=middle,
      mid_transformer=(
          _of_middle(source, config) if middle == "attention" else 1),
      sin_first=not cards.json_value(
          source, "flip_sin_to_cos", config.get("flip_sin_to_cos", True), bool),
      symmetric_downsample=_choice(
          source, config, "downsample_padding", {0: False, 1: True}, 1),
      scale_shift=_choice(
          source, config, "resnet_time_scale_shift",
          {"default": False, "scale_shift": True}, "default"),
      activation=_activation(source, config, "act_fn", "silu"),
      time_width=_optional(source, config, "time_embedding_dim"),
      time_activation=_activation(source, config, "timestep_post_act"),
      embedding_activation=_activation(
          source, config, "time_embedding_act_fn"),
      **_sizes(source, config, num_sizes), **values)


def read(folder: str, image_size: int | tuple[int, int] | None = None,
         num_sizes: int = 6) -> tuple[keras.Model, ConditionUNetConfig]:
  """Reads the network.

  Args:
    folder: see `read_config`.
    image_size: see `read_config`.
    num_sizes: see `read_config`.

  Returns:
    The network of `condition_unet.build_condition_unet`, frozen, and its
    architecture.

  Raises:
    UserError: see `read_config`; or the weights are missing, damaged or not
      finite, or do not match the architecture.
  """
  config = read_config(folder, image_size, num_sizes)
  weights = weight_files.read(folder)
  model = tensors.frozen(folder, condition_unet.build_condition_unet, config)
  tensors.fill(model, tensors.matched(
      weights, [(v.path, tuple(v.shape)) for v in model.weights], source_name,
      tensors.torch_layout))
  return model, config


def source_name(path: str) -> str:
  """diffusers' name of the variable `path` of `build_condition_unet`."""
  place, *inside, leaf = path.split("/")
  leaf = "bias" if leaf in ("bias", "beta") else "weight"
  if place in _ADDED:
    return f"{_ADDED[place]}.{leaf}"
  if "attention" not in place:
    return diffusers.source_name(path)
  prefix = diffusers.source_name(f"{place}/kernel").removesuffix(".weight")
  names = [f"transformer_blocks.{name.removeprefix('block_')}"
           if name.startswith("block_") else _INSIDE[name] for name in inside]
  return ".".join([prefix, *names, leaf])


def _check_keys(source: str, config: dict) -> None:
  """Refuses what is not implemented, by name."""
  name = config.get("_class_name")
  if name != _CLASS:
    raise UserError(f"{source}: _class_name must be {_CLASS!r}. "
                    f"Received: {name!r}")
  cards.check_keys(source, config, {*_FIELDS, *_IGNORED, *_USED}, _REQUIRED)


def _choice(source, config, key, known, default=None):
  """What a key's value, or its default, stands for in the dictionary `known`."""
  return known[cards.choice(source, config, key, known, default)]


def _activation(source, config, key, default=None) -> str | None:
  known = {name: name for name in layers.ACTIVATIONS} | {"swish": "silu"}
  if default is None:
    known |= {None: None}
  return _choice(source, config, key, known, default)


def _optional(source, config, key) -> int | None:
  value = config.get(key)
  return None if value is None else cards.json_value(source, key, value, int)


def _check_length(source, key, value, count, of="level") -> None:
  if len(value) != count:
    raise UserError(f"{source}: {key} must have {count} entries, one for each "
                    f"{of}. Received: {value!r}")


def _levels(source, config, key, default, count) -> tuple[int, ...]:
  """Whole numbers, one for each level, of a list or of one number for all."""
  value = config.get(key, default)
  if not isinstance(value, list):
    return (cards.json_value(source, key, value, int),) * count
  _check_length(source, key, value, count)
  return cards.json_value(source, key, value, tuple)


def _blocks(source, config, key, known, default, count) -> list[bool]:
  """Which of the levels have transformers, in the order of the file."""
  value = config.get(key, default)
  if not isinstance(value, list):
    raise UserError(f"{source}: {key} must be a list. Received: {value!r}")
  for name in value:
    if name not in known:
      raise UserError(f"{source}: {key} must be among {', '.join(known)}. "
                      f"Received: {name!r}")
  _check_length(source, key, value, count)
  return [name == known[1] for name in value]


def _transformers(source, config, blocks, down, up):
  """The number of blocks of every transformer on the ways down and up."""
  key = _DEPTHS
  value = config.get(key, 1)
  if not isinstance(value, list):
    value = [value] * len(blocks)
  _check_length(source, key, value, len(blocks))
  of_down = tuple(
      _of_level(source, key, depths, count) if there else ()
      for depths, count, there in zip(value, blocks, down, strict=True))
  key_up = f"reverse_{key}"
  value_up = config.get(key_up)
  if value_up is None and any(isinstance(depths, list) for depths in value):
    raise UserError(f"{source}: {key_up} must be given, because the way up has "
                    f"more blocks than {key} says. Received: None")
  if value_up is None:
    key_up, value_up = key, value[::-1]
  if not isinstance(value_up, list):
    raise UserError(f"{source}: {key_up} must be a list. "
                    f"Received: {value_up!r}")
  _check_length(source, key_up, value_up, len(blocks))
  of_up = tuple(
      _of_level(source, key_up, depths, count + 1) if there else ()
      for depths, count, there in zip(value_up, blocks[::-1], up, strict=True))
  return of_down, of_up


def _of_middle(source, config) -> int:
  """The number of blocks of the middle's transformer."""
  value = config.get(_DEPTHS, 1)
  depth, = _of_level(
      source, _DEPTHS, value[-1] if isinstance(value, list) else value, 1)
  return depth


def _of_level(source, key, value, count) -> tuple[int, ...]:
  """A number for each residual block, of a list or of one number for all.

  A list may be longer: the middle has fewer blocks than the coarsest level.
  """
  if not isinstance(value, list):
    return (cards.json_value(source, key, value, int, least=0),) * count
  value = cards.json_value(source, key, value, tuple, least=0)
  if len(value) < count:
    raise UserError(f"{source}: {key} must have at least {count} entries, one "
                    f"for each residual block of a level. "
                    f"Received: {list(value)!r}")
  return value[:count]


def _context_width(source, config, attends) -> int:
  """The width of the context, one for all levels that attend to it."""
  key = "cross_attention_dim"
  widths = _levels(source, config, key, 1280, len(attends))
  used = {width for width, there in zip(widths, attends, strict=True) if there}
  if not used:
    raise UserError(f"{source}: a block type must be {_DOWN[1]}, {_UP[1]} or "
                    "UNetMidBlock2DCrossAttn, because no other attends to a "
                    "text. Received: none")
  if len(used) > 1:
    raise UserError(f"{source}: {key} must be the same for all levels with "
                    f"cross-attention. Received: {config[key]!r}")
  return used.pop()


def _only_context(source, config, count) -> tuple[int, ...]:
  """The levels without attention of pixels to pixels."""
  key = "only_cross_attention"
  value = config.get(key, False)
  if not isinstance(value, list):
    value = [value] * count
  _check_length(source, key, value, count)
  return tuple(level for level, only in enumerate(value)
               if cards.json_value(source, key, only, bool))


def _sizes(source, config, num_sizes) -> dict[str, int]:
  """The fields of a pooled text and of sizes; {} without them."""
  if not _choice(source, config, "addition_embed_type",
                 {None: False, "text_time": True}):
    return {}
  key = "projection_class_embeddings_input_dim"
  together, features = (
      cards.json_value(source, name, config.get(name), int)
      for name in (key, "addition_time_embed_dim"))
  if together <= num_sizes * features:
    raise UserError(f"{source}: {key} must be more than the "
                    f"{num_sizes * features} of {num_sizes} sizes with "
                    f"addition_time_embed_dim {features}. Received: {together}")
  return {"pooled_width": together - num_sizes * features,
          "num_sizes": num_sizes, "size_features": features}

"""Reads a `UNet2DModel` in the diffusers folder layout.

`config.json` and `scheduler_config.json` become a `UNetConfig`, the betas and
the prediction type; the weights become a dictionary by our variable names.
Every config key is either honoured or required to have the one value we
implement; everything else is refused by name.
"""

import os
import re

import numpy as np
import safetensors
import safetensors.numpy

from ddss_tf import checkpoints
from ddss_tf import schedules
from ddss_tf.errors import UserError
from ddss_tf.unet import UNetConfig

CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"

_DOWN = ("DownBlock2D", "AttnDownBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D")
# Their names for schedules, and ours.
_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear",
                   "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}

# Keys with a single implemented value; absent ones have it as their default.
_REQUIRED = {
    "act_fn": "silu",
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_type": "conv",
    "dropout": 0.0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "num_class_embeds": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
_USED = {
    "add_attention", "attention_head_dim", "block_out_channels",
    "down_block_types", "downsample_padding", "flip_sin_to_cos", "freq_shift",
    "in_channels", "layers_per_block", "norm_eps", "norm_num_groups",
    "num_train_timesteps", "out_channels", "resnet_time_scale_shift",
    "sample_size", "up_block_types",
}


def _read_json(folder: str, name: str) -> dict:
  path = os.path.join(folder, name)
  if not os.path.exists(path):
    raise UserError(f"a diffusers folder must hold {name}. "
                    f"Received: {folder!r} with {sorted(os.listdir(folder))}")
  return checkpoints.read_json_object(path)


def read_config(folder: str) -> tuple[UNetConfig, np.ndarray, str]:
  """Reads both configuration files.

  Args:
    folder: path of the diffusers folder.

  Returns:
    The architecture, the betas (float64 [T]) and the prediction type in our
    words.

  Raises:
    UserError: a file is missing or damaged; a key has a value that is not
      implemented, or is not known.
  """
  config = _read_json(folder, CONFIG)
  source = os.path.join(folder, CONFIG)
  if config.get("_class_name") != "UNet2DModel":
    raise UserError(f"{source}: _class_name must be 'UNet2DModel'. "
                    f"Received: {config.get('_class_name')!r}")
  for key, value in config.items():
    if key in _REQUIRED and value != _REQUIRED[key]:
      raise UserError(f"{source}: {key} must be {_REQUIRED[key]!r}. "
                      f"Received: {value!r}")
    if key not in _REQUIRED and key not in _USED and not key.startswith("_"):
      raise UserError(f"{source}: unknown key {key!r} (value {value!r})")
  try:
    down, up = config["down_block_types"], config["up_block_types"]
    for name, known in [(n, _DOWN) for n in down] + [(n, _UP) for n in up]:
      if name not in known:
        raise UserError(f"{source}: block types must be among "
                        f"{', '.join(known)}. Received: {name!r}")
    attention = tuple(i for i, n in enumerate(down) if n.startswith("Attn"))
    attention_up = tuple(
        len(up) - 1 - i for i, n in enumerate(up) if n.startswith("Attn"))
    if attention != tuple(sorted(attention_up)):
      raise UserError(
          f"{source}: down and up blocks must have attention at the same "
          f"levels. Received: {attention} and {attention_up}")
    scale_shift = config.get("resnet_time_scale_shift", "default")
    if scale_shift not in ("default", "scale_shift"):
      raise UserError(f"{source}: resnet_time_scale_shift must be 'default' or "
                      f"'scale_shift'. Received: {scale_shift!r}")
    size = config["sample_size"]
    if not isinstance(size, int):
      raise UserError(f"{source}: sample_size must be one whole number, for "
                      f"square images. Received: {size!r}")
    unet_config = UNetConfig(
        image_size=size,
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        channels=tuple(config["block_out_channels"]),
        blocks_per_level=config["layers_per_block"],
        attention_levels=attention,
        head_channels=config.get("attention_head_dim", 8),
        norm_groups=config.get("norm_num_groups", 32),
        norm_epsilon=config.get("norm_eps", 1e-5),
        sin_first=not config.get("flip_sin_to_cos", True),
        frequency_shift=float(config.get("freq_shift", 0)),
        symmetric_downsample=bool(config.get("downsample_padding", 1)),
        scale_shift=scale_shift == "scale_shift",
        mid_attention=config.get("add_attention", True),
        # With scale-shift, diffusers leaves out just this normalisation.
        mid_attention_norm=scale_shift == "default",
    )
  except KeyError as error:
    raise UserError(f"{source}: key {error} is missing") from error
  betas, prediction = _read_scheduler(folder)
  return unet_config, betas, prediction


def _read_scheduler(folder: str) -> tuple[np.ndarray, str]:
  """Betas and prediction type of `scheduler_config.json`."""
  config = _read_json(folder, SCHEDULER)
  source = os.path.join(folder, SCHEDULER)
  if config.get("rescale_betas_zero_snr"):
    raise UserError(f"{source}: rescale_betas_zero_snr must be False: eps-"
                    "prediction has no image at zero signal. Received: True")
  kind = config.get("prediction_type", "epsilon")
  if kind not in _PREDICTIONS:
    raise UserError(f"{source}: prediction_type must be among "
                    f"{', '.join(_PREDICTIONS)}. Received: {kind!r}")
  if config.get("trained_betas") is not None:
    return np.asarray(config["trained_betas"], np.float64), _PREDICTIONS[kind]
  name = config.get("beta_schedule", "linear")
  if name not in _BETA_SCHEDULES:
    raise UserError(f"{source}: beta_schedule must be among "
                    f"{', '.join(_BETA_SCHEDULES)}, or given as trained_betas. "
                    f"Received: {name!r}")
  schedule = schedules.make_schedule(
      _BETA_SCHEDULES[name], config.get("num_train_timesteps", 1000),
      config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
  return schedule.betas, _PREDICTIONS[kind]


def read_weights(folder: str) -> dict[str, np.ndarray]:
  """Reads the safetensors file.

  Args:
    folder: path of the diffusers folder.

  Returns:
    float32 arrays by diffusers' names.

  Raises:
    UserError: missing, truncated, or with values that are not finite.
  """
  path = os.path.join(folder, WEIGHTS)
  if not os.path.exists(path):
    raise UserError(f"a diffusers folder must hold {WEIGHTS}. "
                    f"Received: {folder!r} with {sorted(os.listdir(folder))}")
  try:
    weights = safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise UserError(
        f"{path} is not a complete safetensors file: {error}") from error
  return checkpoints.finite_float32(path, weights)


# Our names of the layers inside a block, and theirs.
_INSIDE = {
    "norm1": "norm1", "conv1": "conv1", "time_projection": "time_emb_proj",
    "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut",
    "norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v",
    "output_projection": "to_out.0",
}
# Older files name the attention layers so.
_OLD_ATTENTION = {
    "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn",
}
_LEAF = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}


def _source_name(path: str) -> str:
  """diffusers' name of our variable `path`."""
  *layers, leaf = path.split("/")
  place = layers[0]
  fixed = {
      "conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out",
      "time_1": "time_embedding.linear_1", "time_2": "time_embedding.linear_2",
      "mid_block_0": "mid_block.resnets.0",
      "mid_block_1": "mid_block.resnets.1",
      "mid_attention": "mid_block.attentions.0",
  }
  if place in fixed:
    prefix = fixed[place]
  else:
    side, level, kind, *number = re.fullmatch(
        r"(down|up)_(\d+)_([a-z]+)(?:_(\d+))?", place).groups()
    layer = {
        "block": f"resnets.{number[0]}",
        "attention": f"attentions.{number[0]}",
        "downsample": "downsamplers.0.conv",
        "upsample": "upsamplers.0.conv",
    }[kind]
    prefix = f"{side}_blocks.{level}.{layer}"
  inside = "".join(f".{_INSIDE[layer]}" for layer in layers[1:])
  return f"{prefix}{inside}.{_LEAF[leaf]}"


def to_keras(
    weights: dict[str, np.ndarray],
    variables: list[tuple[str, tuple[int, ...]]],
) -> dict[str, np.ndarray]:
  """Renames and re-lays weights for the network of `unet.build_unet`.

  Args:
    weights: as `read_weights` gives them.
    variables: (path, shape) of every variable to fill.

  Returns:
    Arrays by our paths.

  Raises:
    UserError: a variable finds no tensor or one of another shape, or a tensor
      finds no variable; with the names.
  """

  def source_name(path):
    name = _source_name(path)
    for new, old in _OLD_ATTENTION.items():
      if name not in weights:
        old_name = name.replace(f".{new}.", f".{old}.")
        name = old_name if old_name in weights else name
    return name

  return checkpoints.matched(
      weights, variables, source_name, checkpoints.torch_layout)

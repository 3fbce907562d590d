"""Reads a `UNet2DModel` in the diffusers folder layouts.

Configuration, scheduler and weights lie in one folder, or in `unet/` and
`scheduler/` of a pipeline. `config.json` and `scheduler_config.json` become a
`UNetConfig`, the betas and the prediction type; the weights become a dictionary
by our variable names. Every config key is either honoured or required to have
the one value we implement; everything else is refused by name. `.bin` weights
need PyTorch.
"""

import os
import re

import numpy as np
import safetensors.numpy

from ddss_tf import errors
from ddss_tf import schedules
from ddss_tf import storage
from ddss_tf.formats import cards
from ddss_tf.formats import tensors
from ddss_tf.errors import UserError
from ddss_tf.networks.unet import UNetConfig

CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
PIPELINE = "model_index.json"
_UNET, _SCHEDULER_FOLDER = "unet", "scheduler"
SUFFIXES = (".safetensors", ".bin")
WEIGHTS, PICKLED_WEIGHTS = (
    "diffusion_pytorch_model" + suffix for suffix in SUFFIXES)

_DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
# diffusers' names, and ours.
_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear",
                   "squaredcos_cap_v2": "cosine"}
# Schedulers of a process with betas, and the defaults of their configuration:
# beta_schedule, beta_start and beta_end.
_SCHEDULERS = {
    **dict.fromkeys((
        "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler",
        "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
        "RePaintScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
    ), ("linear", 1e-4, 0.02)),
    **dict.fromkeys((
        "DPMSolverSDEScheduler", "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    ), ("linear", 0.00085, 0.012)),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"),
                    ("scaled_linear", 0.00085, 0.012)),
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "mish": "mish", "gelu": "gelu",
                "relu": "relu"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}

# Keys with a single implemented value, which is also their default.
_REQUIRED = {
    "mid_block_type": "UNetMidBlock2D",
    "time_embedding_type": "positional",
}
_USED = {
    "act_fn", "add_attention", "attention_head_dim", "attn_norm_num_groups",
    "block_out_channels", "center_input_sample", "class_embed_type",
    "down_block_types", "downsample_padding", "downsample_type",
    "dropout",  # It is off when a network is used.
    "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block",
    "mid_block_scale_factor", "norm_eps", "norm_num_groups", "num_class_embeds",
    "num_train_timesteps",  # Only a learned time embedding uses it.
    "out_channels", "resnet_time_scale_shift", "sample_size",
    "time_embedding_dim", "up_block_types", "upsample_type",
}


def is_diffusers(path: str) -> bool:
  """Whether a path is such a folder, a pipeline, or a file of weights."""
  if storage.isfile(path):
    return path.endswith(SUFFIXES)
  return storage.exists(os.path.join(path, PIPELINE)) or storage.exists(
      os.path.join(path, CONFIG))


def find_network(path: str) -> str:
  """The folder or file of the network itself.

  Args:
    path: the path of a pipeline, of a network's folder or of a file of weights.

  Returns:
    The folder `unet/` of a pipeline; any other path as it is.

  Raises:
    UserError: the pipeline has other parts, as a latent one has.
  """
  if not storage.exists(os.path.join(path, PIPELINE)):
    return path
  index = os.path.join(path, PIPELINE)
  parts = {name for name, value in cards.read_json_object(index).items()
           if isinstance(value, list) and value != [None, None]}
  if parts != {_UNET, _SCHEDULER_FOLDER}:
    raise UserError(f"{index} must be of a pipeline of {_UNET} and "
                    f"{_SCHEDULER_FOLDER}. Received: {sorted(parts)}")
  return os.path.join(path, _UNET)


def config_files(path: str) -> tuple[str, str]:
  """Where a network's configuration and its scheduler's should be.

  Args:
    path: as `find_network` gives it. A scheduler that is not beside the weights
      is looked for where pipelines have it.
  """
  folder = os.path.dirname(path) or "." if storage.isfile(path) else path
  scheduler = os.path.join(folder, SCHEDULER)
  other = os.path.join(os.path.dirname(os.path.abspath(folder)),
                       _SCHEDULER_FOLDER, SCHEDULER)
  if not storage.exists(scheduler) and storage.exists(other):
    scheduler = other
  return os.path.join(folder, CONFIG), scheduler


def class_name(folder: str) -> str | None:
  """The class that a folder's configuration names; None: there is none."""
  source = os.path.join(folder, CONFIG)
  return (cards.read_json_object(source).get("_class_name")
          if storage.isfile(source) else None)


def read_json(path: str) -> dict:
  """Reads a configuration of a diffusers folder.

  Raises:
    UserError: the file is missing, or not a JSON object.
  """
  folder, name = os.path.split(path)
  if not storage.exists(path):
    received = (f"{folder!r} with {sorted(storage.listdir(folder))}"
                if storage.isdir(folder) else f"no folder {folder!r}")
    raise UserError(f"a diffusers folder must hold {name} beside the weights. "
                    f"Received: {received}")
  return cards.read_json_object(path)


def _list(source, config, key) -> list:
  """The value of a key; refused if it is not a list."""
  if not isinstance(config[key], list):
    raise UserError(f"{source}: {key} must be a list. "
                    f"Received: {config[key]!r}")
  return config[key]


def read_config(path: str, image_size: int | tuple[int, int] | None = None
                ) -> tuple[UNetConfig, np.ndarray, str]:
  """Reads both configuration files.

  Args:
    path: the path of the network's folder, or of a weights file in it.
    image_size: height and width, needed if `sample_size` is null.

  Returns:
    The architecture, the betas (float64 [T]) and the prediction type in our
    words.

  Raises:
    UserError: a file is missing or damaged; a key is not known, or has a value
      that is not implemented.
  """
  source, _ = config_files(path)
  config = read_json(source)
  if config.get("_class_name") != "UNet2DModel":
    raise UserError(f"{source}: _class_name must be 'UNet2DModel'. "
                    f"Received: {config.get('_class_name')!r}")
  cards.check_keys(source, config, _USED, _REQUIRED)
  downsample = cards.choice(
      source, config, "downsample_type", ("conv", "resnet"), "conv")
  upsample = cards.choice(
      source, config, "upsample_type", ("conv", "resnet"), "conv")
  try:
    down, up, channels = (
        _list(source, config, key)
        for key in ("down_block_types", "up_block_types", "block_out_channels"))
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
    scale_shift = cards.choice(source, config, "resnet_time_scale_shift",
                          ("default", "scale_shift"), "default")
    # DownBlock2D ignores downsample_type, UpBlock2D ignores upsample_type.
    residual_down = tuple(
        i for i, n in enumerate(down) if n.startswith("Resnet")
        or n.startswith("Attn") and downsample == "resnet")
    residual_up = tuple(
        len(up) - 1 - i for i, n in enumerate(up) if n.startswith("Resnet")
        or n.startswith("Attn") and upsample == "resnet")
    mid_groups = config.get("attn_norm_num_groups")
    num_classes, label_embedding = _classes(source, config)
    size = _image_size(source, config.get("sample_size"), image_size)
    if config["out_channels"] not in (
        config["in_channels"], 2 * config["in_channels"]):
      raise UserError(
          f"{source}: out_channels must be {config['in_channels']}, as "
          "in_channels is, or twice as many, with a learned variance. Received: "
          f"{config['out_channels']!r}")
    unet_config = UNetConfig(
        image_size=size,
        in_channels=config["in_channels"],
        # A learned variance is not used, because a sampler brings its own.
        out_channels=config["in_channels"],
        channels=tuple(channels),
        blocks_per_level=config["layers_per_block"],
        attention_levels=attention,
        head_channels=config.get("attention_head_dim", 8),
        norm_groups=config.get("norm_num_groups", 32),
        norm_epsilon=config.get("norm_eps", 1e-5),
        sin_first=not config.get("flip_sin_to_cos", True),
        frequency_shift=float(config.get("freq_shift", 0)),
        symmetric_downsample=bool(cards.choice(
            source, config, "downsample_padding", (0, 1), 1)),
        residual_down_levels=residual_down,
        residual_up_levels=residual_up,
        scale_shift=scale_shift == "scale_shift",
        activation=_ACTIVATIONS[
            cards.choice(source, config, "act_fn", tuple(_ACTIVATIONS), "silu")],
        time_width=config.get("time_embedding_dim"),
        num_classes=num_classes,
        label_embedding=label_embedding,
        center_input=bool(config.get("center_input_sample", False)),
        mid_attention=config.get("add_attention", True),
        # With scale-shift, diffusers leaves out just this normalisation,
        # unless its groups are given.
        mid_attention_norm=scale_shift == "default" or mid_groups is not None,
        mid_attention_groups=mid_groups,
        mid_divisor=config.get("mid_block_scale_factor", 1),
    )
  except KeyError as error:
    raise UserError(f"{source}: key {error} is missing") from error
  except UserError:
    raise
  except (TypeError, ValueError) as error:  # A word where a number should be.
    raise UserError(f"{source}: {errors.one_line(error)}") from error
  betas, prediction = read_scheduler(path)
  return unet_config, betas, prediction


def _image_size(source, sample_size, told):
  """Height and width as one number or, if they differ, as a pair."""
  known = None if sample_size is None else side_or_sides(sample_size)
  if sample_size is not None and known is None:
    raise UserError(f"{source}: sample_size must be a whole number, or height "
                    f"and width, or null. Received: {sample_size!r}")
  if known is None and told is None:
    raise UserError(f"{source}: sample_size is null, for images of any size: "
                    "image_size must be given. Received: None")
  if None not in (known, told) and known != told:
    raise UserError(f"image_size must be {sample_size}, as sample_size is in "
                    f"{source}. Received: {told}")
  return told if known is None else known


def side_or_sides(size) -> int | tuple[int, int] | None:
  """A size as one number if it is square, else (height, width).

  Args:
    size: a number, or a list or tuple of height and width.

  Returns:
    That; None if `size` is not a size.
  """
  sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
  # type(), because True is an int.
  if len(sides) != 2 or any(
      type(side) is not int or side < 1 for side in sides):
    return None
  return sides[0] if sides[0] == sides[1] else sides


def latents_size(source: str, sample_size, told, argument: str, of: str
                 ) -> int | tuple[int, int]:
  """Height and width of a network that fits any size, see `side_or_sides`.

  Args:
    source: the file of the configuration, for the messages.
    sample_size: what it says.
    told: what the caller says instead; None: nothing.
    argument: the name of `told`, for the messages.
    of: what has the size, for the messages.

  Raises:
    UserError: neither is a size.
  """
  size = side_or_sides(sample_size if told is None else told)
  if size is not None:
    return size
  if told is not None:
    raise UserError(f"{argument} must be a whole number, or height and width. "
                    f"Received: {told!r}")
  if sample_size is None:
    raise UserError(f"{source}: sample_size is null, for {of} of any size: "
                    f"{argument} must be given. Received: None")
  raise UserError(f"{source}: sample_size must be a whole number, or height and "
                  f"width, or null. Received: {sample_size!r}")


def _classes(source, config) -> tuple[int | None, str]:
  """The number of classes and the kind of label embedding, in our words."""
  kind, count = config.get("class_embed_type"), config.get("num_class_embeds")
  if kind not in (None, "timestep"):
    raise UserError(
        f"{source}: class_embed_type must be None, with num_class_embeds, or "
        f"'timestep': others take no labels. Received: {kind!r}")
  # type(), because True is an int.
  if count is not None and (type(count) is not int or count < 1):
    raise UserError(f"{source}: num_class_embeds must be a whole number or "
                    f"None. Received: {count!r}")
  if kind == "timestep" and count is None:
    raise UserError(
        f"{source}: num_class_embeds must be set with class_embed_type "
        "'timestep': no weight tells the number of classes. Received: None")
  return count, "table" if kind is None else "sinusoidal"


def read_scheduler(path: str) -> tuple[np.ndarray, str]:
  """Reads `scheduler_config.json`.

  Keys that only say how to sample, such as `use_karras_sigmas`, are ignored.

  Args:
    path: see `read_config`.

  Returns:
    The betas, float64 [T], and the prediction type in our words.

  Raises:
    UserError: see `read_config`.
  """
  _, source = config_files(path)
  config = read_json(source)
  scheduler = config.get("_class_name", "DDPMScheduler")
  if scheduler not in list(_SCHEDULERS):
    raise UserError(f"{source}: _class_name must be of a scheduler with betas, "
                    f"such as DDPMScheduler. Received: {scheduler!r}")
  usual_name, usual_start, usual_end = _SCHEDULERS[scheduler]
  if config.get("use_flow_sigmas"):
    raise UserError(f"{source}: use_flow_sigmas must be False. Received: "
                    f"{config['use_flow_sigmas']!r}")
  if config.get("timestep_type", "discrete") != "discrete":
    raise UserError(f"{source}: timestep_type must be 'discrete'. "
                    f"Received: {config['timestep_type']!r}")
  kind = config.get("prediction_type", "epsilon")
  if kind not in list(PREDICTIONS):  # list(): the value may have no hash.
    raise UserError(f"{source}: prediction_type must be among "
                    f"{', '.join(PREDICTIONS)}. Received: {kind!r}")
  zero_snr = config.get("rescale_betas_zero_snr")
  if zero_snr and kind == "epsilon":
    raise UserError(
        f"{source}: rescale_betas_zero_snr must be False with prediction_type "
        "'epsilon': the noise of a state without signal tells nothing of the "
        f"image. Received: {zero_snr!r}")
  trained = config.get("trained_betas")
  name = config.get("beta_schedule", usual_name)
  if trained is None and name not in list(_BETA_SCHEDULES):
    raise UserError(f"{source}: beta_schedule must be among "
                    f"{', '.join(_BETA_SCHEDULES)}, or given as trained_betas. "
                    f"Received: {name!r}")
  try:
    schedule = (
        schedules.NoiseSchedule(trained) if trained is not None else
        schedules.make_schedule(
            _BETA_SCHEDULES[name], config.get("num_train_timesteps", 1000),
            config.get("beta_start", usual_start),
            config.get("beta_end", usual_end)))
    # DDPMScheduler and others rescale trained_betas as well.
    if zero_snr and schedule.betas[-1] < 1:
      schedule = schedule.rescaled_to_zero_snr()
  except (TypeError, ValueError) as error:
    raise UserError(f"{source}: {errors.one_line(error)}") from error
  return schedule.betas, PREDICTIONS[kind]


def read_weights(path: str) -> dict[str, np.ndarray]:
  """Reads the weights.

  Args:
    path: the path of the network's folder, whose safetensors file is preferred,
      or of a file.

  Returns:
    float32 arrays by diffusers' names.

  Raises:
    UserError: the file is missing, truncated, or has values that are not
      finite; or it is a .bin file, and PyTorch is not installed.
  """
  if storage.isdir(path):
    found = [name for name in (WEIGHTS, PICKLED_WEIGHTS)
             if storage.exists(os.path.join(path, name))]
    if not found:
      raise UserError(
          f"a diffusers folder must hold {WEIGHTS} or {PICKLED_WEIGHTS}. "
          f"Received: {path!r} with {sorted(storage.listdir(path))}")
    path = os.path.join(path, found[0])
  if path.endswith(".bin"):
    return tensors.read_state_dict(path)
  try:
    weights = safetensors.numpy.load_file(path)
  except Exception as error:  # safetensors has types that NumPy has not.
    raise UserError(f"{path} is not a complete safetensors file of floats: "
                    f"{errors.one_line(error)}") from error
  return tensors.finite_float32(path, weights)


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
_LEAF = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias",
         "embeddings": "weight"}


def source_name(path: str) -> str:
  """diffusers' name of the variable `path` of `unet.build_unet`."""
  *layers, leaf = path.split("/")
  place = layers[0]
  fixed = {
      "conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out",
      "time_1": "time_embedding.linear_1", "time_2": "time_embedding.linear_2",
      "label_embedding": "class_embedding",
      "label_1": "class_embedding.linear_1",
      "label_2": "class_embedding.linear_2",
      "mid_block_0": "mid_block.resnets.0",
      "mid_block_1": "mid_block.resnets.1",
      "mid_attention": "mid_block.attentions.0",
  }
  if place in fixed:
    prefix = fixed[place]
  else:
    side, level, kind, *number = re.fullmatch(
        r"(down|up)_(\d+)_([a-z]+)(?:_(\d+))?", place).groups()
    conv = "" if layers[1:] else ".conv"  # Residual blocks have layers inside.
    layer = {
        "block": f"resnets.{number[0]}",
        "attention": f"attentions.{number[0]}",
        "downsample": f"downsamplers.0{conv}",
        "upsample": f"upsamplers.0{conv}",
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
    UserError: see `tensors.matched`.
  """

  def in_file(path):
    name = source_name(path)
    for new, old in _OLD_ATTENTION.items():
      if name not in weights:
        old_name = name.replace(f".{new}.", f".{old}.")
        name = old_name if old_name in weights else name
    return name

  return tensors.matched(
      weights, variables, in_file, tensors.torch_layout)

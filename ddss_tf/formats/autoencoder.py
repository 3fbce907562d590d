"""Reads the decoder of an autoencoder in the diffusers layout.

The folder `vae/` or `vqvae/` of a latent pipeline holds `config.json` and
weights. Two classes are read, `AutoencoderKL` and `VQModel`. Every config key
is honoured, of the encoder only, or required to have the one value we
implement; everything else is refused by name. Of the tensors, only those of the
encoder are left out.
"""

import os

import keras
import numpy as np

from ddss_tf import errors
from ddss_tf import storage
from ddss_tf.formats import cards
from ddss_tf.formats import diffusers
from ddss_tf.formats import tensors
from ddss_tf.formats import weight_files
from ddss_tf.networks import autoencoder
from ddss_tf.networks import layers
from ddss_tf.errors import UserError
from ddss_tf.networks.autoencoder import DecoderConfig

KL, VQ = "AutoencoderKL", "VQModel"

# By class, the values of keys that a configuration lacks. They are diffusers'
# own but for VQ's scaling factor, 0.18215 there: files without one are older
# than that number, and their latents have not been scaled by it.
_SHARED = {
    "act_fn": "silu", "block_out_channels": [64], "layers_per_block": 1,
    "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 32, "up_block_types": ["UpDecoderBlock2D"],
}
_DEFAULTS = {
    KL: {**_SHARED, "latent_channels": 4, "scaling_factor": 0.18215,
         "shift_factor": None, "latents_mean": None, "latents_std": None,
         "use_post_quant_conv": True},
    VQ: {**_SHARED, "latent_channels": 3, "scaling_factor": 1.0,
         "num_vq_embeddings": 256, "vq_embed_dim": None, "norm_type": "group",
         "lookup_from_codebook": False},
}
# Of the encoder, or of the number format of other libraries.
_IGNORED = ("down_block_types", "in_channels", "use_quant_conv", "force_upcast")
_CHOICES = {
    "act_fn": (*layers.ACTIVATIONS, "swish"),
    "mid_block_add_attention": (True, False),
    "use_post_quant_conv": (True, False),
    "norm_type": ("group",),
    "lookup_from_codebook": (False,),
}

# Tensors of the encoder.
_SKIPPED = ("encoder.", "quant_conv.")
_DECODER = "decoder."
# Our variables of what comes before diffusers' decoder, and their names.
_BEFORE = {
    "codebook/embeddings": "quantize.embedding.weight",
    "post_quant_conv/kernel": "post_quant_conv.weight",
    "post_quant_conv/bias": "post_quant_conv.bias",
}

# A number, or one for each channel of the latents.
Scaling = float | tuple[float, ...]


def read_config(folder: str, latent_size: int | tuple[int, int] | None = None
                ) -> tuple[DecoderConfig, Scaling, Scaling]:
  """Reads the configuration of an autoencoder.

  Args:
    folder: the path of its folder.
    latent_size: height and width of the latents; None: as `sample_size`, which
      is that of the images, says. A decoder fits any size, and many pipelines
      use another than the autoencoder was trained with.

  Returns:
    The architecture of the decoder; `scale` and `shift`, each a number or one
    for each channel of the latents. The decoder's input is z / scale + shift
    for the latents z of the pipeline's network. A VQModel without a
    `scaling_factor` has scale 1.

  Raises:
    UserError: the file is missing or damaged; a key is not known, or has a
      value that is not implemented; `latent_size` is not a size, or needed.
  """
  source = os.path.join(folder, diffusers.CONFIG)
  kind, config = _read_json(source)
  for key, known in _CHOICES.items():
    if key in config and config[key] not in known:
      raise UserError(f"{source}: {key} must be one of "
                      f"{', '.join(map(repr, known))}. "
                      f"Received: {config[key]!r}")
  channels = _levels(source, config)
  for key in ("latent_channels", "out_channels", "layers_per_block",
              "norm_num_groups", "num_vq_embeddings"):
    if key in config:
      errors.check_whole(f"{source}: {key}", config[key], 1)
  vectors = config.get("vq_embed_dim")
  errors.check_whole(f"{source}: vq_embed_dim", vectors, 1, optional=True)
  width = config["latent_channels"]
  decoder = DecoderConfig(
      latent_size=_latent_size(source, config["sample_size"], len(channels),
                               latent_size),
      latent_channels=vectors or width,
      out_channels=config["out_channels"],
      channels=channels,
      layers_per_block=config["layers_per_block"],
      norm_groups=config["norm_num_groups"],
      activation={"swish": "silu"}.get(config["act_fn"], config["act_fn"]),
      mid_attention=config["mid_block_add_attention"],
      post_quant_conv=config.get("use_post_quant_conv", True),
      post_quant_channels=width if kind == VQ else None,
      num_codes=config.get("num_vq_embeddings"),
  )
  return decoder, *_scaling(source, config)


def read(folder: str, latent_size: int | tuple[int, int] | None = None
         ) -> tuple[keras.Model, Scaling, Scaling]:
  """Reads a decoder.

  Args:
    folder: as in `read_config`.
    latent_size: as in `read_config`.

  Returns:
    The network of `autoencoder.build_decoder`, frozen; `scale` and `shift` as
    `read_config` gives them.

  Raises:
    UserError: what `read_config` and `weight_files.read` raise; the
      network cannot be built; weights and architecture do not match.
  """
  config, scale, shift = read_config(folder, latent_size)
  weights = {name: value
             for name, value in weight_files.read(folder).items()
             if not name.startswith(_SKIPPED)}
  model = tensors.frozen(folder, autoencoder.build_decoder, config)
  try:
    values = to_keras(
        weights, [(v.path, tuple(v.shape)) for v in model.weights])
  except UserError as error:
    raise UserError(f"{folder}: {error}") from error
  tensors.fill(model, values)
  return model, scale, shift


def to_keras(
    weights: dict[str, np.ndarray],
    variables: list[tuple[str, tuple[int, ...]]],
) -> dict[str, np.ndarray]:
  """Renames and re-lays weights for `autoencoder.build_decoder`.

  Args:
    weights: arrays by diffusers' names, without those of the encoder.
    variables: (path, shape) of every variable to fill.

  Returns:
    Arrays by our paths.

  Raises:
    UserError: see `tensors.matched`.
  """
  inside = {name.removeprefix(_DECODER): value
            for name, value in weights.items() if name.startswith(_DECODER)}
  before = {name: value for name, value in weights.items()
            if not name.startswith(_DECODER)}
  values = tensors.matched(
      before, [v for v in variables if v[0] in _BEFORE], _BEFORE.get,
      tensors.torch_layout)
  try:  # The layers have the names of those of the U-Nets.
    return values | diffusers.to_keras(
        inside, [v for v in variables if v[0] not in _BEFORE])
  except UserError as error:
    raise UserError(f"of the tensors {_DECODER}*, {error}") from error


def _read_json(source: str) -> tuple[str, dict]:
  """The class, and the value of each of its keys that are used."""
  if not storage.exists(source):
    raise UserError(f"an autoencoder's folder must hold {diffusers.CONFIG}. "
                    f"Received: {os.path.dirname(source)!r} without")
  config = cards.read_json_object(source)
  kind = config.get("_class_name")
  if kind not in list(_DEFAULTS):  # list(): the value may have no hash.
    raise UserError(f"{source}: _class_name must be one of "
                    f"{', '.join(map(repr, _DEFAULTS))}. Received: {kind!r}")
  cards.check_keys(source, config, {*_DEFAULTS[kind], *_IGNORED})
  return kind, {key: config.get(key, default)
                for key, default in _DEFAULTS[kind].items()}


def _levels(source, config) -> tuple[int, ...]:
  """The width of each level, finest first."""
  for key in ("block_out_channels", "up_block_types"):
    if not isinstance(config[key], list):
      raise UserError(f"{source}: {key} must be a list. "
                      f"Received: {config[key]!r}")
  channels, blocks = config["block_out_channels"], config["up_block_types"]
  for name in blocks:
    if name != "UpDecoderBlock2D":
      raise UserError(f"{source}: up_block_types must be 'UpDecoderBlock2D'. "
                      f"Received: {name!r}")
  if not channels or len(blocks) != len(channels):
    raise UserError(
        f"{source}: block_out_channels and up_block_types must have one entry "
        f"for each level. Received: {len(channels)} and {len(blocks)}")
  for width in channels:
    errors.check_whole(f"{source}: block_out_channels", width, 1)
  return tuple(channels)


def _latent_size(source, sample_size, levels, told) -> tuple[int, int]:
  """Height and width of the latents."""
  size = diffusers.latents_size(
      source, sample_size, told, "latent_size", "images")
  sides = (size, size) if isinstance(size, int) else size
  factor = 1 if told is not None else 2 ** (levels - 1)
  if any(side % factor for side in sides):
    raise UserError(f"{source}: sample_size must be a multiple of {factor} for "
                    f"{levels} levels, or latent_size be given. "
                    f"Received: {sample_size!r}")
  return tuple(side // factor for side in sides)


def _scaling(source, config) -> tuple[Scaling, Scaling]:
  """What latents are divided by, and what is added afterwards."""
  factor, shift = config["scaling_factor"], config.get("shift_factor")
  errors.check_positive(f"{source}: scaling_factor", factor)
  if shift is not None:
    errors.check_number(f"{source}: shift_factor", shift)
  mean, std = config.get("latents_mean"), config.get("latents_std")
  if mean is None and std is None:
    return float(factor), float(shift or 0.0)
  count = config["latent_channels"]
  for key, values in (("latents_mean", mean), ("latents_std", std)):
    if not isinstance(values, list) or len(values) != count:
      raise UserError(f"{source}: {key} must be a list of {count} numbers, as "
                      "many as there are latent_channels, where either of "
                      f"latents_mean and latents_std is. Received: {values!r}")
    for value in values:
      check = (errors.check_number if key == "latents_mean"
               else errors.check_positive)
      check(f"{source}: {key}", value)
  if shift:
    raise UserError(f"{source}: shift_factor must be null with latents_mean. "
                    f"Received: {shift!r}")
  return (tuple(factor / value for value in std),
          tuple(float(value) for value in mean))

"""Reads the network of Stable Diffusion 3 from diffusers' folder.

The folder, `transformer/` of a pipeline, holds the `config.json` of a
`SD3Transformer2DModel` and its weights, in one file or in several, which are
put into KerasHub's network.
Every config key is either honoured or required to have the one value we
implement; everything else is refused by name.
"""

import os

import keras
import numpy as np

from ddss_tf.formats import cards
from ddss_tf.formats import diffusers
from ddss_tf.formats import tensors
from ddss_tf.formats import weight_files
from ddss_tf.networks import keras_hub
from ddss_tf.errors import UserError
from ddss_tf.networks.keras_hub import MMDiTConfig

_CLASS = "SD3Transformer2DModel"

# The keys that `MMDiTConfig` has, in its words, and diffusers' defaults.
_FIELDS = {
    "sample_size": ("image_size", 128),
    "patch_size": ("patch_size", 2),
    "in_channels": ("in_channels", 16),
    "num_layers": ("num_layers", 18),
    "attention_head_dim": ("head_channels", 64),
    "num_attention_heads": ("num_heads", 18),
    "joint_attention_dim": ("context_width", 4096),
    "pooled_projection_dim": ("pooled_width", 2048),
    "pos_embed_max_size": ("position_size", 96),
}
_DUAL, _NORM, _CAPTION, _OUT = (
    "dual_attention_layers", "qk_norm", "caption_projection_dim",
    "out_channels")
_KNOWN = {*_FIELDS, _DUAL, _NORM, _CAPTION, _OUT}

# KerasHub's places outside of blocks, and diffusers' names.
_PLACES = {
    "patch_embedding/patch_embedding": "pos_embed.proj",
    "position_embedding": "pos_embed.pos_embed",
    "context_embedding": "context_embedder",
    "vector_embedding/dense1": "time_text_embed.text_embedder.linear_1",
    "vector_embedding/dense2": "time_text_embed.text_embedder.linear_2",
    "timestep_embedding/mlp/dense1":
        "time_text_embed.timestep_embedder.linear_1",
    "timestep_embedding/mlp/dense2":
        "time_text_embed.timestep_embedder.linear_2",
    "output_ada_layer_norm/dense": "norm_out.linear",
    "output_dense": "proj_out",
}
# The same inside a block: of the latents, and of the prompt.
_LATENTS = {
    "ada_layer_norm/dense": "norm1.linear",
    "attention_proj": "attn.to_out.0", "attention_proj2": "attn2.to_out.0",
    "q_norm": "attn.norm_q", "k_norm": "attn.norm_k",
    "q_norm2": "attn2.norm_q", "k_norm2": "attn2.norm_k",
    "mlp/dense1": "ff.net.0.proj", "mlp/dense2": "ff.net.2",
}
_PROMPT = {
    "ada_layer_norm/dense": "norm1_context.linear",
    "attention_proj": "attn.to_add_out",
    "q_norm": "attn.norm_added_q", "k_norm": "attn.norm_added_k",
    "mlp/dense1": "ff_context.net.0.proj", "mlp/dense2": "ff_context.net.2",
}
_INSIDE = {"x_block": _LATENTS, "context_block": _PROMPT}
# KerasHub has one layer where diffusers has three: query, key and value.
_FUSED = {
    ("x_block", "attention_qkv"): "attn.to_{}",
    ("x_block", "attention_qkv2"): "attn2.to_{}",
    ("context_block", "attention_qkv"): "attn.add_{}_proj",
}
_PARTS = "qkv"


def is_sd3(folder: str) -> bool:
  """Whether a folder holds the configuration of such a network."""
  return diffusers.class_name(folder) == _CLASS


def read_config(folder: str, latent_size: int | tuple[int, int] | None = None
                ) -> MMDiTConfig:
  """Reads `config.json`.

  Args:
    folder: the path of the network's folder.
    latent_size: height and width of the latents; None: as `sample_size` says.
      The network takes any size for which it has positions.

  Returns:
    The architecture.

  Raises:
    UserError: the file is missing or damaged; a key is not known, or has a
      value that is not implemented; `latent_size` is not a size.
  """
  source = os.path.join(folder, diffusers.CONFIG)
  config = diffusers.read_json(source)
  if config.get("_class_name") != _CLASS:
    raise UserError(f"{source}: _class_name must be {_CLASS!r}. "
                    f"Received: {config.get('_class_name')!r}")
  cards.check_keys(source, config, _KNOWN)
  values = {ours: cards.json_value(source, key, config.get(key, default), int)
            for key, (ours, default) in _FIELDS.items()}
  channels, layers = values["in_channels"], values["num_layers"]
  out_channels = config.get(_OUT, 16)
  if out_channels is not None and (
      type(out_channels) is not int or out_channels != channels):
    raise UserError(f"{source}: {_OUT} must be {channels}, as in_channels is, "
                    f"or null. Received: {out_channels!r}")
  width = values["num_heads"] * values["head_channels"]
  caption = config.get(_CAPTION, 1152)
  if type(caption) is not int or caption != width:
    raise UserError(
        f"{source}: {_CAPTION} must be {width}, num_attention_heads times "
        f"attention_head_dim. Received: {caption!r}")
  norm = config.get(_NORM)
  if norm not in (None, "rms_norm"):
    raise UserError(f"{source}: {_NORM} must be 'rms_norm' or null. "
                    f"Received: {norm!r}")
  dual = cards.json_value(source, _DUAL, config.get(_DUAL, []), tuple, 0)
  if any(i >= layers for i in dual):
    raise UserError(f"{source}: {_DUAL} must be among the {layers} layers, "
                    f"counted from 0. Received: {list(dual)}")
  size = diffusers.latents_size(
      source, values.pop("image_size"), latent_size, "latent_size", "latents")
  return MMDiTConfig(
      image_size=size if isinstance(size, tuple) else (size, size),
      query_key_norm=norm is not None, dual_attention=tuple(sorted(set(dual))),
      **values)


def read(folder: str, latent_size: int | tuple[int, int] | None = None
         ) -> tuple[keras.Model, MMDiTConfig]:
  """Reads the network.

  Args:
    folder: see `read_config`.
    latent_size: see `read_config`.

  Returns:
    The network of `keras_hub.build_mmdit`, frozen, and its architecture.

  Raises:
    UserError: see `read_config`; or KerasHub is not installed; or the network
      cannot be built; or the weights are missing, damaged or not finite, or do
      not match the architecture.
  """
  config = read_config(folder, latent_size)
  keras_hub.require()
  model = tensors.frozen(folder, keras_hub.build_mmdit, config)
  try:
    values = to_keras(
        weight_files.read(folder),
        [(v.path, tuple(v.shape)) for v in model.weights], config.num_layers)
  except UserError as error:
    raise UserError(f"{folder}: {error}") from error
  tensors.fill(model, values)
  return model, config


def to_keras(
    weights: dict[str, np.ndarray],
    variables: list[tuple[str, tuple[int, ...]]],
    num_layers: int,
) -> dict[str, np.ndarray]:
  """Renames and re-lays weights for the network of `keras_hub.build_mmdit`.

  Args:
    weights: arrays by diffusers' names.
    variables: (path, shape) of every variable to fill.
    num_layers: number of blocks.

  Returns:
    Arrays by KerasHub's paths.

  Raises:
    UserError: see `tensors.matched`.
  """
  # A fused variable is three, by its path and one letter, until they are found.
  split = []
  for path, (*rest, last) in variables:
    if _fused(path):
      split += [(f"{path}/{part}", (*rest, last // 3)) for part in _PARTS]
    else:
      split.append((path, (*rest, last)))
  # Of these diffusers has the scale first, KerasHub the shift.
  swapped = ("output_ada_layer_norm/dense/",
             f"joint_block_{num_layers - 1}/context_block/ada_layer_norm/")

  def relayout(path, value, shape):
    if path.startswith("position_embedding/"):
      return value[0] if value.shape[:1] == (1,) else value
    kernel = path.rsplit("/", 1)[0] if _fused(path) else path
    value = tensors.torch_layout(kernel, value, shape)
    if path.startswith(swapped):
      value = np.roll(value, value.shape[-1] // 2, axis=-1)
    return value

  found = tensors.matched(weights, split, _source_name, relayout)
  return {path: np.concatenate([found[f"{path}/{part}"] for part in _PARTS], -1)
          if _fused(path) else found[path] for path, _ in variables}


def _fused(path: str) -> str | None:
  """diffusers' names of what fills a fused layer; None for other paths."""
  _, *inside = path.split("/")
  return _FUSED.get(tuple(inside[:2]))


def _source_name(path: str) -> str:
  """diffusers' name of what fills the variable `path` of KerasHub."""
  if fused := _fused(path):
    block, _, _, leaf, part = path.split("/")
    inside = fused.format(part)
  else:
    place, leaf = path.rsplit("/", 1)
    if place == "position_embedding":
      return _PLACES[place]
    if place in _PLACES:
      return f"{_PLACES[place]}.{'bias' if leaf == 'bias' else 'weight'}"
    block, side, place = place.split("/", 2)
    inside = _INSIDE[side][place]
  number = block.removeprefix("joint_block_")
  leaf = "bias" if leaf == "bias" else "weight"
  return f"transformer_blocks.{number}.{inside}.{leaf}"

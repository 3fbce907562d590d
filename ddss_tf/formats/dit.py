"""Reads a `DiTTransformer2DModel` in the diffusers folder layout.

The folder, `transformer/` of a pipeline, holds `config.json` and the weights.
Every config key is either honoured or required to have the one value we
implement; everything else is refused by name. The files published first call
the network `Transformer2DModel`, and have that class's other keys as well.
"""

import dataclasses
import os

import keras
import numpy as np

from ddss_tf import storage
from ddss_tf.errors import UserError
from ddss_tf.formats import cards
from ddss_tf.formats import diffusers
from ddss_tf.formats import tensors
from ddss_tf.formats import weight_files
from ddss_tf.networks import dit
from ddss_tf.networks.dit import DiTConfig

_CLASS = "DiTTransformer2DModel"
# The class of both DiT and PixArt before they had their own.
_OLD_CLASS = "Transformer2DModel"

# The keys that `DiTConfig` has, in its words, their types and diffusers'
# defaults.
_FIELDS = {
    "sample_size": ("image_size", int, 32),
    "in_channels": ("in_channels", int, 4),
    "patch_size": ("patch_size", int, 2),
    "num_layers": ("num_layers", int, 28),
    "num_attention_heads": ("num_heads", int, 16),
    "attention_head_dim": ("head_channels", int, 72),
    "num_embeds_ada_norm": ("num_classes", int, 1000),
    "norm_eps": ("norm_epsilon", float, 1e-5),
}
# Keys with a single implemented value, which is also the class's default.
_REQUIRED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
# Likewise of the old class, whose other keys they are.
_OLD_REQUIRED = {
    "attention_type": "default",
    "caption_channels": None,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "interpolation_scale": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
}
# Keys that change nothing: dropout is off when a network is used, attention is
# in float32 unless a policy says otherwise, and no layer has the others.
_IGNORED = {"dropout", "norm_num_groups", "upcast_attention"}
_OLD_IGNORED = {"use_additional_conditions", "use_linear_projection"}

# A block's own copy of the embedding of time and class: diffusers' names of its
# layers, and ours.
_EMBEDDER = {
    "time_1": "timestep_embedder.linear_1",
    "time_2": "timestep_embedder.linear_2",
    "label_embedding": "class_embedder.embedding_table",
}
_BLOCK = {
    "modulation": "norm1.linear", "query": "attn1.to_q", "key": "attn1.to_k",
    "value": "attn1.to_v", "output_projection": "attn1.to_out.0",
    "mlp_1": "ff.net.0.proj", "mlp_2": "ff.net.2",
}
_PLACES = {
    "patch_embedding/projection": "pos_embed.proj",
    "output/modulation": "proj_out_1",
    "output/projection": "proj_out_2",
}
_OUT = ("proj_out_2.weight", "proj_out_2.bias")


def is_dit(folder: str) -> bool:
  """Whether a folder holds the configuration of such a network."""
  source = os.path.join(folder, diffusers.CONFIG)
  if not storage.isfile(source):
    return False
  config = cards.read_json_object(source)
  return config.get("_class_name") == _CLASS or (
      config.get("_class_name") == _OLD_CLASS
      and config.get("norm_type") == _REQUIRED["norm_type"])


def read_config(folder: str, learned_variance: bool = False) -> DiTConfig:
  """Reads `config.json`.

  Args:
    folder: the path of the network's folder.
    learned_variance: whether to keep the channels of a learned variance, behind
      those of the prediction.

  Returns:
    The architecture. Its last class, `num_classes` - 1, is the null label.
    `shared_embedding` is False, for every block has its own embedding in the
    file; `read` knows whether they are equal.

  Raises:
    UserError: the file is missing or damaged; a key is not known, or has a
      value that is not implemented; there is no learned variance to keep.
  """
  return _asked_for(folder, _as_in_file(folder), learned_variance)


def read(folder: str,
         learned_variance: bool = False) -> tuple[keras.Model, DiTConfig]:
  """Reads the network.

  Args:
    folder: see `read_config`.
    learned_variance: see `read_config`.

  Returns:
    The network of `dit.build_dit`, frozen, and its architecture. All blocks
    share one embedding of time and class if those in the file are equal.

  Raises:
    UserError: see `read_config`; or the weights are missing, damaged or not
      finite, or do not match the architecture.
  """
  in_file = _as_in_file(folder)
  config = _asked_for(folder, in_file, learned_variance)
  weights = weight_files.read(folder)
  weights = _with_outputs(folder, weights, in_file, config.out_channels)
  if _equal_embedders(weights, config.num_layers):
    config = dataclasses.replace(config, shared_embedding=True)
    copies = {name for i in range(1, config.num_layers)
              for name in _embedder(i)}
    weights = {name: value for name, value in weights.items()
               if name not in copies}
  model = tensors.frozen(folder, dit.build_dit, config)
  tensors.fill(model, tensors.matched(
      weights, [(v.path, tuple(v.shape)) for v in model.weights],
      _source_name, tensors.torch_layout))
  return model, config


def _as_in_file(folder: str) -> DiTConfig:
  """The architecture, with all output channels that the file has."""
  source = os.path.join(folder, diffusers.CONFIG)
  config = diffusers.read_json(source)
  _check_keys(source, config)
  values = {
      ours: cards.json_value(source, key, config.get(key, default), kind)
      for key, (ours, kind, default) in _FIELDS.items()}
  channels = values["in_channels"]
  out_channels = config.get("out_channels")
  if out_channels is None:
    out_channels = channels
  if type(out_channels) is not int or (
      out_channels not in (channels, 2 * channels)):
    raise UserError(
        f"{source}: out_channels must be {channels}, as in_channels is, or "
        "twice as many, with a learned variance. "
        f"Received: {out_channels!r}")
  side = values.pop("image_size")
  classes = values.pop("num_classes")
  return DiTConfig(
      image_size=(side, side), out_channels=out_channels,
      num_classes=classes + 1, shared_embedding=False, **values)


def _check_keys(source: str, config: dict) -> None:
  """Refuses what is not implemented, by name."""
  name = config.get("_class_name")
  if name not in (_CLASS, _OLD_CLASS):
    raise UserError(f"{source}: _class_name must be {_CLASS!r}. "
                    f"Received: {name!r}")
  required, ignored = dict(_REQUIRED), set(_IGNORED)
  if name == _OLD_CLASS:
    if "norm_type" not in config:
      raise UserError(f"{source}: norm_type must be given for {_OLD_CLASS}. "
                      f"Received: {sorted(config)}")
    required |= _OLD_REQUIRED
    ignored |= _OLD_IGNORED
  cards.check_keys(
      source, config, {*ignored, *_FIELDS, "out_channels"}, required)


def _asked_for(folder: str, config: DiTConfig,
               learned_variance: bool) -> DiTConfig:
  """Takes the channels of a learned variance away, unless asked for."""
  if not learned_variance:
    return dataclasses.replace(config, out_channels=config.in_channels)
  if config.out_channels == config.in_channels:
    raise UserError(
        f"learned_variance must not be given for {folder!r}, whose network "
        f"predicts none. Received: {config.out_channels} out_channels")
  return config


def _with_outputs(
    folder: str, weights: dict[str, np.ndarray], in_file: DiTConfig,
    kept: int) -> dict[str, np.ndarray]:
  """Keeps the first channels of each pixel that the last layer predicts."""
  if kept == in_file.out_channels:
    return weights
  pixels, channels = in_file.patch_size**2, in_file.out_channels
  result = dict(weights)
  for name in _OUT:
    value = weights.get(name)
    if value is None:
      continue  # `tensors.matched` says what is missing.
    if value.shape[:1] != (pixels * channels,):
      raise UserError(
          f"{folder}: tensor {name} must have {pixels * channels} outputs, as "
          f"{diffusers.CONFIG} says. Received: shape {value.shape}")
    rest = value.shape[1:]
    value = value.reshape(pixels, channels, *rest)[:, :kept]
    result[name] = value.reshape(pixels * kept, *rest)
  return result


def _embedder(i: int) -> list[str]:
  """The names of a block's own embedding of time and class."""
  return [f"transformer_blocks.{i}.norm1.emb.{layer}.{leaf}"
          for layer in _EMBEDDER.values() for leaf in ("weight", "bias")
          if (layer, leaf) != (_EMBEDDER["label_embedding"], "bias")]


def _equal_embedders(weights: dict[str, np.ndarray], num_layers: int) -> bool:
  """Whether all blocks have the same embedding, number for number."""
  first = _embedder(0)
  return all(
      name in weights and other in weights
      and np.array_equal(weights[name], weights[other])
      for i in range(1, num_layers)
      for name, other in zip(first, _embedder(i), strict=True))


def _source_name(path: str) -> str:
  """diffusers' name of our variable `path`; a shared one is block 0's."""
  place, leaf = path.rsplit("/", 1)
  leaf = "bias" if leaf == "bias" else "weight"
  if place in _PLACES:
    return f"{_PLACES[place]}.{leaf}"
  layer, _, inside = place.partition("/")
  number = "0"
  if layer.startswith("block_"):
    _, number, *words = layer.split("_", 2)
    layer = words[0] if words else ""
  inside = _BLOCK[inside] if inside else f"norm1.emb.{_EMBEDDER[layer]}"
  return f"transformer_blocks.{number}.{inside}.{leaf}"

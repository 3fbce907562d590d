"""Reads weights of EDM networks (https://github.com/NVlabs/edm).

The published pickles hold source code, and unpickling would run it, so this
library never unpickles. `tools/convert_edm.py` does, on a machine where the
pickle is trusted, and writes what is read here: the tensors of its `ema` in a
`.npz` or `.safetensors` file, and beside it a card, `<file>.json`, of the
arguments with which the original built the network:

  {"class_name": "EDMPrecond", "init_kwargs": {...}}

The weights keep the licence of the pickle (CC BY-NC-SA 4.0 for the published
ones).
"""

from typing import Mapping

import keras
import numpy as np
import safetensors.numpy

from ddss_tf import errors
from ddss_tf import schedules
from ddss_tf import storage
from ddss_tf.formats import cards
from ddss_tf.formats import tensors
from ddss_tf.networks import edm_unet
from ddss_tf.errors import UserError
from ddss_tf.networks.edm_unet import EDMConfig

SUFFIXES = (".npz", ".safetensors")

# The least and the largest sigma of the original's samplers. A network may
# narrow them.
_SIGMAS = (0.002, 80.0)
_NUM_STEPS = 1000

# Arguments of both networks that `EDMConfig` has under the same names, and
# their types.
_SHARED = {
    "model_channels": int, "channel_mult": tuple, "channel_mult_emb": int,
    "num_blocks": int, "attn_resolutions": tuple, "label_dropout": float,
}
_ARCHITECTURES = {
    "SongUNet": {
        **_SHARED, "channel_mult_noise": int, "resample_filter": tuple},
    "DhariwalUNet": _SHARED,
}
# The original's defaults where they differ from those of `EDMConfig`.
_DEFAULTS = {
    "DhariwalUNet": dict(
        model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
        attn_resolutions=(32, 16, 8)),
}
# Switches of the SongUNet: the values that are implemented, the default first.
_SWITCHES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "residual"),
    "decoder_type": ("standard",),
}
_PRECONDITIONINGS = {
    "EDMPrecond": {"sigma_data": float},
    "VPPrecond": {"beta_d": float, "beta_min": float, "M": int},
    "VEPrecond": {},
}
_DEFAULT_MODEL = {"EDMPrecond": "DhariwalUNet"}
# The sigmas that a preconditioning allows by default, if not all.
_DEFAULT_SIGMAS = {"VEPrecond": (0.02, 100.0)}
# Arguments that do not change an image. They are of training, of precision, and
# of the augmentation, whose labels are zero when images are made.
_IGNORED = ("use_fp16", "augment_dim", "dropout", "epsilon_t")


def is_edm(path: str) -> bool:
  """Whether a path is such a file; a safetensors file must have a card."""
  return path.endswith(SUFFIXES) and storage.isfile(path) and (
      path.endswith(".npz") or storage.exists(path + ".json"))


def read_card(path: str) -> tuple[EDMConfig, schedules.ExplodingSchedule]:
  """Reads what the tensors do not tell.

  Args:
    path: the path of the weights; `<path>.json` is read.

  Returns:
    The architecture, and 1000 sigmas in equal ratios. They go from 0.002 to 80,
    as in the original's samplers, within what the network allows.

  Raises:
    UserError: there is no card, or its network is not implemented.
  """
  source = path + ".json"
  if not storage.exists(source):
    raise UserError(f"{path} must have a card, {source}, as "
                    "tools/convert_edm.py writes it. Received: none")
  return read_config(source)


def read_config(
    source: str) -> tuple[EDMConfig, schedules.ExplodingSchedule]:
  """Reads a card.

  Args:
    source: its path.

  Returns:
    See `read_card`.

  Raises:
    UserError: the network is not implemented.
  """
  card = cards.read_json_object(source)
  if set(card) != {"class_name", "init_kwargs"} or not isinstance(
      card["init_kwargs"], dict):
    raise UserError(f"{source} must have the keys class_name and init_kwargs. "
                    f"Received: {sorted(card)}")
  kind, words = card["class_name"], dict(card["init_kwargs"])
  if kind not in list(_PRECONDITIONINGS):
    raise UserError(
        f"{source}: class_name must be one of {', '.join(_PRECONDITIONINGS)}. "
        f"Received: {kind!r}")
  model = words.pop("model_type", _DEFAULT_MODEL.get(kind, "SongUNet"))
  if model not in list(_ARCHITECTURES):
    raise UserError(
        f"{source}: model_type must be one of {', '.join(_ARCHITECTURES)}. "
        f"Received: {model!r}")
  low, high = _DEFAULT_SIGMAS.get(kind, (0.0, float("inf")))
  low, high = words.pop("sigma_min", low), words.pop("sigma_max", high)
  switches = {}
  for key, known in _SWITCHES.items() if model == "SongUNet" else ():
    switches[key] = words.pop(key, known[0])
    if switches[key] not in known:
      raise UserError(f"{source}: {key} must be one of {', '.join(known)}. "
                      f"Received: {switches[key]!r}")
  for key in _IGNORED:
    words.pop(key, None)
  types = {"img_resolution": int, "img_channels": int, "label_dim": int,
           **_ARCHITECTURES[model], **_PRECONDITIONINGS[kind]}
  unknown = sorted(set(words) - set(types))
  if unknown:
    raise UserError(
        f"{source}: init_kwargs of {kind} and {model} must be among "
        f"{', '.join(types)}. Received: {', '.join(unknown)}")
  ours = {"img_resolution": "image_size", "img_channels": "image_channels",
          "M": "timesteps"}
  values = dict(_DEFAULTS.get(model, {}))
  for key, value in words.items():
    values[ours.get(key, key)] = cards.json_value(
        source, key, value, types[key],
        0 if key in ("label_dim", "label_dropout") else 1)
  missing = [key for key in ("img_resolution", "img_channels")
             if key not in words]
  if missing:
    raise UserError(f"{source}: init_kwargs must have {', '.join(missing)}. "
                    f"Received: {sorted(words)}")
  try:
    schedule = sigmas(low, high)
  except (TypeError, ValueError) as error:
    raise UserError(f"{source}: {error}") from error
  return EDMConfig(
      architecture=model, preconditioning=kind,
      fourier=switches.get("embedding_type") == "fourier",
      residual_encoder=switches.get("encoder_type") == "residual",
      **values), schedule


def sigmas(low: float = 0.0,
           high: float = float("inf")) -> schedules.ExplodingSchedule:
  """The sigmas of the original's samplers, as far as a network allows.

  Args:
    low: the least sigma that the network allows.
    high: the largest.

  Raises:
    ValueError: nothing is left between them.
  """
  return schedules.ExplodingSchedule.geometric(
      max(low, _SIGMAS[0]), min(high, _SIGMAS[1]), _NUM_STEPS)


def read_schedule(path: str, value) -> schedules.ExplodingSchedule:
  """Reads sigmas that replace a network's own; see `cards.read_schedule`.

  Raises:
    UserError: it is not a schedule, or not one of sigmas.
  """
  schedule = cards.read_schedule(path, value)
  if not isinstance(schedule, schedules.ExplodingSchedule):
    raise UserError(f"{path}: schedule must be of sigmas, 'geometric' or "
                    f"'sigmas'. Received: {value!r}")
  return schedule


def read_weights(path: str) -> dict[str, np.ndarray]:
  """Reads the tensors, without those that make no difference to images.

  Args:
    path: the path of the file.

  Returns:
    float32 arrays by the original's names, without the leading "model.".

  Raises:
    UserError: the file is truncated, or has values that are not finite.
  """
  try:
    if path.endswith(".npz"):
      with storage.load_arrays(path) as file:
        weights = dict(file)
    else:
      weights = safetensors.numpy.load_file(path)
  except Exception as error:  # A damaged zip file alone raises five kinds.
    raise UserError(f"{path} is not a complete {path.rsplit('.', 1)[-1]} file: "
                    f"{errors.one_line(error)}") from error
  weights = {name.removeprefix("model."): value
             for name, value in weights.items()}
  weights.pop("map_augment.weight", None)
  return tensors.finite_float32(path, weights)


def convert(source: str, weights: Mapping[str, np.ndarray],
            config: EDMConfig) -> keras.Model:
  """Makes the network.

  Args:
    source: what the weights were read from, for messages.
    weights: as `read_weights` gives them.
    config: the architecture.

  Returns:
    A frozen network, see `edm_unet.build_edm`.

  Raises:
    UserError: the network cannot be built, or weights or resampling filters do
      not match the architecture.
  """
  model = tensors.frozen(source, edm_unet.build_edm, config)
  size = config.image_size
  out = ("out_norm", "out_conv")
  if config.architecture == "SongUNet":
    out = (f"dec.{size}x{size}_aux_norm", f"dec.{size}x{size}_aux_conv")

  def source_name(path):
    *layers, leaf = path.split("/")
    place = layers[0]
    if place in ("out_norm", "out_conv"):
      place = out[place == "out_conv"]
    else:
      place = place.replace("enc_", "enc.").replace("dec_", "dec.")
    leaf = {"kernel": "weight", "gamma": "weight", "beta": "bias"}.get(
        leaf, leaf)
    return ".".join([place, *layers[1:], leaf])

  taps = np.asarray(config.resample_filter, np.float64)
  expected = np.outer(taps, taps)[None, None] / taps.sum() ** 2
  learned = {}
  for key, value in weights.items():
    if not key.endswith(".resample_filter"):
      learned[key] = value
    elif value.shape != expected.shape or not np.allclose(value, expected):
      raise UserError(f"{source}: {key} must be that of the taps "
                      f"{taps.tolist()}. Received: {value.tolist()}")
  values = tensors.matched(
      learned, [(v.path, tuple(v.shape)) for v in model.weights], source_name,
      tensors.torch_layout)
  tensors.fill(model, values)
  return model

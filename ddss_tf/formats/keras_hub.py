"""Reads Stable Diffusion 3 from KerasHub: its presets, its files, its objects.

A preset is the folder that `save_to_preset` writes: `config.json` names the
class of the model, weights and tokenizers lie beside it. The text encoders are
asked once, for a table of prompts, and are not kept.
"""

import json
import os
from typing import Mapping, NamedTuple, Sequence
import zipfile

import keras
import numpy as np

from ddss_tf import errors
from ddss_tf import storage
from ddss_tf.denoisers import conditions
from ddss_tf.formats import cards
from ddss_tf.formats import converted
from ddss_tf.formats import flow_scheduler
from ddss_tf.formats import saved_model
from ddss_tf.networks import files as network_files
from ddss_tf.networks import frozen
from ddss_tf.networks import keras_hub as networks
from ddss_tf.denoisers.decoder import Decoder
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.denoisers.table import ConditionTable
from ddss_tf.errors import UserError
from ddss_tf.networks.keras_hub import MMDiTConfig
from ddss_tf.schedules import FlowSchedule

# Arguments of `load_denoiser`.
PROMPTS = ("prompts", "negative_prompt")
ARGUMENTS = ("image_size", *PROMPTS)
_CONFIG = "config.json"
# A preset with one of these has tokenizers.
_TOKENIZERS = ("task.json", "preprocessor.json")
_BACKBONE = "StableDiffusion3Backbone"
_READ = (_BACKBONE, "StableDiffusion3TextToImage", "StableDiffusion3ImageToImage",
         "StableDiffusion3Inpaint")


class KerasHubParts(NamedTuple):
  """What `parts` finds in a model of KerasHub.

  Attributes:
    network: as `keras_hub.build_mmdit` gives it.
    config: its architecture.
    decoder: of its latents.
    schedule: its process.
    convention: the arguments of `conventions.Convention` by name.
  """

  network: keras.Model
  config: MMDiTConfig
  decoder: Decoder
  schedule: FlowSchedule
  convention: dict


def parts(model) -> KerasHubParts:
  """Takes a model of KerasHub apart.

  Args:
    model: see `of_keras_hub`.

  Raises:
    UserError: see `of_keras_hub`.
  """
  backbone = networks.backbone_of(model)
  network, config = networks.of_backbone(backbone)
  frozen.freeze(network)
  return KerasHubParts(
      network, config, Decoder(*networks.decoder_of_backbone(backbone)),
      FlowSchedule(backbone.num_train_timesteps, float(backbone.shift)),
      flow_scheduler.convention(backbone.num_train_timesteps))


def of_keras_hub(
    model,
    prompts: Sequence[str] | Mapping[str, np.ndarray] | None = None,
    negative_prompt: str | Mapping[str, np.ndarray] | None = "",
    guidance_scale: float | None = None,
    weights: Sequence[float] | None = None,
    name: str | None = None,
) -> Denoiser:
  """The denoiser of a Stable Diffusion 3 of KerasHub.

    model = keras_hub.models.StableDiffusion3TextToImage.from_preset(preset)
    denoiser = ddss_tf.of_keras_hub(model, ["a cat", "a dog"], guidance_scale=7.0)

  Network and model share their layers: the model's `diffuser` is frozen, for
  gradients too, and computes times in float32 from now on. The decoder is
  copied. The denoiser does not refer to the text encoders. Their memory is free
  as soon as the caller lets the model go.

  Args:
    model: a `StableDiffusion3Backbone`; or a task with one, such as
      `StableDiffusion3TextToImage`, whose preprocessor has the tokenizers.
    prompts: N texts. The model encodes them; its tokenizers cut long ones. They
      become the rows 0 to N - 1 of the denoiser's table, and a label is a row.
      For a backbone, which has no tokenizers, token ids by the
      encoders' names "clip_l", "clip_g" and, if there is one, "t5", whole
      numbers [N, tokens]. None: there is no table yet, see
      `Denoiser.with_table`.
    negative_prompt: a text, or token ids [1, tokens]: row N, which guidance
      needs and which is never drawn. None: no such row, no guidance.
    guidance_scale: see `Denoiser`; KerasHub's own default is 7. None: none.
    weights: how often each prompt is drawn, N numbers in any unit; None: all
      as often.
    name: what results call it; None: the model's name.

  Returns:
    The denoiser, frozen, with its decoder. Of the same weights its identity is
    that of a denoiser from `load_denoiser`, and of one from diffusers' folder.

  Raises:
    UserError: KerasHub is not installed; the model is something else; the
      prompts are not such texts or token ids.
    ValueError: guidance without prompts and a negative one, or weights that are
      not these.
  """
  backbone = networks.backbone_of(model)
  table = None
  if prompts is not None:
    table = encoded(model, prompts, negative_prompt, weights)
  elif weights is not None:
    raise ValueError("weights must be those of prompts. Received: no prompts")
  denoiser = _denoiser(backbone, backbone.name if name is None else name)
  if table is not None:
    denoiser = denoiser.with_table(table)
  return denoiser if guidance_scale is None else denoiser.guided(guidance_scale)


def _denoiser(backbone, name: str) -> Denoiser:
  """The denoiser of a backbone, with its decoder, without a table."""
  found = parts(backbone)
  denoiser = converted.converted(
      "KerasHub", found.network, found.config, found.schedule,
      **found.convention).with_decoder(found.decoder)
  denoiser.name = name
  return denoiser


def encoded(model, prompts, negative_prompt,
            weights: Sequence[float] | None = None) -> ConditionTable:
  """The table of prompts as a model of KerasHub encodes them.

  See `of_keras_hub` for the arguments and what is raised.
  """
  arrays = networks.encode(model, prompts, negative_prompt)
  texts = None
  if not isinstance(prompts, Mapping):
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
  num_rows = len(arrays["pooled"])
  count = num_rows - (negative_prompt is not None)
  if weights is not None:
    weights = conditions.frequencies(weights, count)
  if negative_prompt is None:
    return ConditionTable(arrays, texts, weights)
  if texts is not None:
    texts.append(negative_prompt if isinstance(negative_prompt, str) else "")
  return ConditionTable(
      arrays, texts, None if weights is None else [*weights, 0.0], count)


def _config(path: str) -> dict:
  """What a preset's folder or a Keras file says of its model; {}: nothing."""
  if saved_model.is_keras_file(path):
    try:
      with storage.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        config = json.loads(archive.read(_CONFIG))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
      return {}  # The reader of Keras files says what is wrong with it.
    return config if isinstance(config, dict) else {}
  source = os.path.join(path, _CONFIG)
  return cards.read_json_object(source) if storage.isfile(source) else {}


def is_keras_hub(path: str) -> bool:
  """Whether a path is a preset of KerasHub, or a Keras file of its model."""
  module = _config(path).get("module")
  return isinstance(module, str) and module.split(".")[0] == "keras_hub"


def convert(path: str, given: dict) -> Denoiser:
  """Reads a preset or a Keras file.

  Args:
    path: the folder or the file.
    given: arguments of `load_denoiser`: prompts, negative_prompt, and for a
      preset image_size, of the latents.

  Raises:
    UserError: see `load_denoiser`.
  """
  kind = _config(path).get("class_name")
  if kind not in list(_READ):  # list(): the value may have no hash.
    raise UserError(f"{path}: a model of KerasHub must be one of "
                    f"{', '.join(_READ)}. Received: {kind!r}")
  if "negative_prompt" in given and "prompts" not in given:
    raise UserError("negative_prompt must be given with prompts. Received: "
                    f"{given['negative_prompt']!r} alone")
  name = os.path.basename(os.path.normpath(path))
  if saved_model.is_keras_file(path):
    cards.check_given(path, given, PROMPTS)
    networks.require()
    model = network_files.load_keras(path)
    name = name.removesuffix(saved_model.KERAS_SUFFIX)
  else:
    model = _load_preset(path, given)
  network_files.check_finite(path, model)
  denoiser = _denoiser(networks.backbone_of(model), name)
  if "prompts" not in given:
    return denoiser
  return denoiser.with_table(encoded(
      model, given["prompts"], given.get("negative_prompt", "")))


def _load_preset(path, given):
  """The model of a preset, with tokenizers if there are prompts."""
  networks.require()
  texts = "prompts" in given
  if texts and not any(storage.isfile(os.path.join(path, name))
                       for name in _TOKENIZERS):
    raise UserError(
        f"prompts must be of a preset with tokenizers, {' or '.join(_TOKENIZERS)}. "
        f"Received: {path!r} with {sorted(storage.listdir(path))}")
  size = given.get("image_size")
  if size is not None:
    size = (size, size) if isinstance(size, int) else tuple(size)
    _check_size(path, size)
  try:
    return networks.load_preset(path, texts, size)
  except UserError:
    raise
  except Exception as error:  # KerasHub and Keras raise many kinds.
    raise UserError(f"{path} is not a complete preset of KerasHub: "
                    f"{errors.one_line(error)}") from error


def _check_size(path, size):
  """Refuses a size that the network of a preset has no patches for."""
  config = _config(path).get("config")
  patch, positions = (
      cards.json_value(os.path.join(path, _CONFIG), key,
                       (config if isinstance(config, dict) else {}).get(key), int)
      for key in ("mmdit_patch_size", "mmdit_position_size"))
  if any(side % patch or side > patch * positions for side in size):
    raise UserError(
        f"image_size of {path!r} must be multiples of {patch}, at most "
        f"{patch * positions}, in pixels of the latents. Received: {size}")

"""Reads networks and latent pipelines in the diffusers folder layout.

A pipeline is a folder with `model_index.json` and a folder for each part. Of a
latent one, network, decoder and scheduler are found together. Its text encoders
are not read: `tools/encode_prompts.py` makes a table of what they say of prompts.
"""

import os
from typing import Callable, NamedTuple

from ddss_tf import storage
from ddss_tf.formats import autoencoder
from ddss_tf.formats import cards
from ddss_tf.formats import condition_unet
from ddss_tf.formats import converted
from ddss_tf.formats import diffusers
from ddss_tf.formats import dit
from ddss_tf.formats import flow_scheduler
from ddss_tf.formats import learned_variance
from ddss_tf.formats import sd3
from ddss_tf.formats import tensors
from ddss_tf.formats import weight_files
from ddss_tf.denoisers.decoder import Decoder
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.schedules import NoiseSchedule

# The folders of network and decoder, by the class of a pipeline.
_PARTS = {"LDMPipeline": ("unet", "vqvae"),
          "DiTPipeline": ("transformer", "vae"),
          "StableDiffusionPipeline": ("unet", "vae"),
          "StableDiffusionXLPipeline": ("unet", "vae"),
          "StableDiffusion3Pipeline": ("transformer", "vae")}
_DECODERS = ("vae", "vqvae")


def _index(path: str) -> dict:
  """What `model_index.json` says; {} without the file."""
  source = os.path.join(path, diffusers.PIPELINE)
  return cards.read_json_object(source) if storage.isfile(source) else {}


def is_latent(path: str) -> bool:
  """Whether a path is a pipeline with a decoder."""
  index = _index(path)
  return any(isinstance(index.get(name), list)
             and index[name] != [None, None] for name in _DECODERS)


def _folders(path: str) -> tuple[str, str]:
  """The folders of network and decoder.

  Raises:
    UserError: the pipeline is of a class that is not read.
  """
  kind = _index(path).get("_class_name")
  if kind not in list(_PARTS):  # list(): the value may have no hash.
    raise UserError(
        f"{os.path.join(path, diffusers.PIPELINE)}: _class_name of a pipeline "
        f"with a decoder must be one of {', '.join(_PARTS)}. A network and a "
        "decoder that we read can be put together by Denoiser.with_decoder. "
        f"Received: {kind!r}")
  network, decoder = (os.path.join(path, name) for name in _PARTS[kind])
  return network, decoder


def files(path: str) -> list[str]:
  """The files that make up a latent pipeline, those that may be missing too."""
  network, decoder = _folders(path)
  _, scheduler = diffusers.config_files(network)
  return [scheduler, *(
      file for folder in (network, decoder) for file in (
          os.path.join(folder, diffusers.CONFIG), *weight_files.files(folder)))]


def convert(path: str, given: dict) -> Denoiser:
  """Reads network, decoder and scheduler of a latent pipeline.

  Args:
    path: the folder with `model_index.json`.
    given: arguments of `load_denoiser`: learned_variance, and image_size, of the
      latents.

  Raises:
    UserError: see `load_denoiser`.
  """
  network, decoder = _folders(path)
  kind = next((known for known in NETWORKS if known.recognises(network)), None)
  cards.check_given(path, given, kind.arguments if kind else _UNET_ARGUMENTS)
  denoiser = (kind.convert if kind else convert_unet)(network, given)
  height, width, _ = denoiser.state_shape
  model, scale, shift = autoencoder.read(decoder, (height, width))
  try:
    return denoiser.with_decoder(Decoder(model, scale, shift))
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


def _process(path: str, state_shape, patch_size: int = 1) -> dict:
  """The schedule and the convention of a network's scheduler, by name."""
  if flow_scheduler.is_flow(path):
    schedule, convention = flow_scheduler.read(path, state_shape, patch_size)
    return {"schedule": schedule, **convention}
  betas, prediction = diffusers.read_scheduler(path)
  return {"schedule": NoiseSchedule(betas), "prediction": prediction}


def _of_model(model, config, path: str, patch_size: int = 1, **rest) -> Denoiser:
  """The denoiser of a network that was read from a folder."""
  return converted.converted(
      "diffusers", model, config,
      **_process(path, model.input_shape[0][1:], patch_size), **rest)


def convert_dit(path: str, given: dict) -> Denoiser:
  """Reads the folder of a DiT; its last class is the null label."""
  model, config = dit.read(path, bool(given.get("learned_variance")))
  return _of_model(model, config, path, config.patch_size,
                   null_label=config.num_classes - 1)


def convert_condition_unet(path: str, given: dict) -> Denoiser:
  """Reads the folder of a `UNet2DConditionModel`."""
  return _of_model(
      *condition_unet.read(path, given.get("image_size")), path)


def convert_sd3(path: str, given: dict) -> Denoiser:
  """Reads the folder of a `SD3Transformer2DModel`."""
  model, config = sd3.read(path, given.get("image_size"))
  return _of_model(model, config, path, config.patch_size)


def convert_unet(path: str, given: dict) -> Denoiser:
  """Reads a diffusers folder, or a weights file in it, into our U-Net."""
  path = diffusers.find_network(path)
  config, betas, prediction = diffusers.read_config(
      path, given.get("image_size"))
  weights = diffusers.read_weights(path)
  if given.get("learned_variance"):
    config = learned_variance.with_variance(path, config)
  else:
    weights = learned_variance.without_variance(path, weights)
  model = tensors.build_frozen(
      path, config,
      lambda variables: diffusers.to_keras(weights, variables))
  return converted.converted(
      "diffusers", model, config, NoiseSchedule(betas), prediction)


class Network(NamedTuple):
  """A network with a folder of its own.

  Attributes:
    name: what messages call it.
    recognises: whether a folder holds it.
    convert: a function of the folder and of arguments of `load_denoiser` to a
      `Denoiser`.
    arguments: names of those arguments.
  """
  name: str
  recognises: Callable[[str], bool]
  convert: Callable[[str, dict], Denoiser]
  arguments: tuple[str, ...]


# All but our U-Net, which may also be a file of weights.
NETWORKS = (
    Network("DiT", dit.is_dit, convert_dit, ("learned_variance",)),
    Network("U-Net of conditions", condition_unet.is_condition_unet,
            convert_condition_unet, ("image_size",)),
    Network("SD3", sd3.is_sd3, convert_sd3, ("image_size",)),
)
_UNET_ARGUMENTS = ("image_size", "learned_variance")

"""Reads networks and latent pipelines in the diffusers folder layout.

A pipeline is a folder with `model_index.json` and a folder for each part. Of a
latent one, network, decoder and scheduler are found together. Text encoders,
tokenizers and safety checkers are not needed for a network of classes.
"""

import os

from ddss_tf import storage
from ddss_tf.formats import autoencoder
from ddss_tf.formats import cards
from ddss_tf.formats import converted
from ddss_tf.formats import diffusers
from ddss_tf.formats import dit
from ddss_tf.formats import learned_variance
from ddss_tf.formats import tensors
from ddss_tf.denoisers.decoder import Decoder
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.schedules import NoiseSchedule

# The folders of network and decoder, by the class of a pipeline.
_PARTS = {"LDMPipeline": ("unet", "vqvae"),
          "DiTPipeline": ("transformer", "vae")}
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
        f"{os.path.join(path, diffusers.PIPELINE)}: _class_name of a pipeline with a decoder "
        f"must be one of {', '.join(_PARTS)}, because networks with text "
        f"conditions are not read. Received: {kind!r}")
  network, decoder = (os.path.join(path, name) for name in _PARTS[kind])
  return network, decoder


def files(path: str) -> list[str]:
  """The files that make up a latent pipeline, those that may be missing too."""
  network, decoder = _folders(path)
  _, scheduler = diffusers.config_files(network)
  return [scheduler, *(os.path.join(folder, name)
                       for folder in (network, decoder) for name in (
                           diffusers.CONFIG, diffusers.WEIGHTS,
                           diffusers.PICKLED_WEIGHTS))]


def convert(path: str, given: dict) -> Denoiser:
  """Reads network, decoder and scheduler of a latent pipeline.

  Args:
    path: the folder with `model_index.json`.
    given: arguments of `load_denoiser`: learned_variance.

  Raises:
    UserError: see `load_denoiser`.
  """
  network, decoder = _folders(path)
  denoiser = (convert_dit if dit.is_dit(network) else convert_unet)(
      network, given)
  height, width, _ = denoiser.state_shape
  model, scale, shift = autoencoder.read(decoder, (height, width))
  try:
    return denoiser.with_decoder(Decoder(model, scale, shift))
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


def convert_dit(path: str, given: dict) -> Denoiser:
  """Reads the folder of a DiT; its last class is the null label."""
  model, config = dit.read(path, bool(given.get("learned_variance")))
  betas, prediction = diffusers.read_scheduler(path)
  return converted.converted(
      "diffusers", model, config, NoiseSchedule(betas), prediction,
      null_label=config.num_classes - 1)


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

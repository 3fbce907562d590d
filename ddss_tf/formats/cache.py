"""Converted models, kept between processes."""

import hashlib
import json
import os

from absl import logging

from ddss_tf import errors
from ddss_tf import storage
from ddss_tf import version
from ddss_tf.formats import ddpm
from ddss_tf.formats import diffusers
from ddss_tf.formats import own
from ddss_tf.formats import pipelines
from ddss_tf.formats import weight_files
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.schedules import NoiseSchedule

# Counts changes to what is kept: copies of another revision are not taken.
_CACHE_REVISION = 4


def default_cache_dir() -> str:
  """The folder of the cache; "" if there is none.

  It is $DDSS_TF_CACHE ("" turns the cache off), or else the folder ddss_tf in
  $XDG_CACHE_HOME or in ~/.cache. It is "" too if the home folder is not known.
  """
  folder = os.environ.get("DDSS_TF_CACHE")
  if folder is None:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.path.join(base, "ddss_tf")
  try:
    return storage.expanded(folder)
  except UserError as error:
    logging.warning("converted networks are not kept: %s", error)
    return ""


def cached(cache_dir: str, path: str, given: dict, convert) -> Denoiser:
  """Takes a converted checkpoint from the cache, or converts it and keeps it.

  Args:
    cache_dir: the folder of the cache; "" for none.
    path: the path of the checkpoint.
    given: arguments of the conversion.
    convert: a function of `path` and `given` to a `Denoiser`.

  Raises:
    UserError: see `load_denoiser`. A copy that is damaged, or cannot be
      written, causes a warning only.
  """
  if not cache_dir:
    return convert(path, given)
  folder = os.path.join(cache_dir, "denoisers", _cache_key(path, given))
  if storage.exists(os.path.join(folder, own.CARD)):
    try:
      return Denoiser.load(folder)
    except UserError as error:
      logging.warning("%s; it is converted again", error)
  denoiser = convert(path, given)
  try:
    denoiser.save(folder)
  except OSError as error:
    logging.warning("the converted network cannot be kept: %s",
                    errors.one_line(error))
  return denoiser


def _cache_key(path: str, given: dict) -> str:
  """Hash of all that a conversion depends on."""

  def plain(value):
    # The repr of an architecture has all its fields.
    return value.card() if isinstance(value, NoiseSchedule) else repr(value)

  digest = hashlib.sha256(json.dumps(
      [version.__version__, _CACHE_REVISION, given], sort_keys=True,
      default=plain).encode())
  for file in _files(path):
    with storage.open(file, "rb") as f:
      content = hashlib.file_digest(f, "sha256").hexdigest()
    # The name of a single file means nothing. Names of several files tell which
    # is which.
    name = os.path.basename(file).removeprefix(os.path.basename(path))
    digest.update(f"{name}\0{content}\0".encode())
  return digest.hexdigest()


def _files(path: str) -> list[str]:
  """The files that make up a checkpoint."""
  prefix = None if storage.isfile(path) else ddpm.find_prefix(path)
  if prefix is not None:
    folder, start = os.path.split(os.path.abspath(prefix))
    return [os.path.join(folder, name) for name in sorted(storage.listdir(folder))
            if name.startswith((f"{start}.index", f"{start}.data-"))]
  if pipelines.is_latent(path):
    return [file for file in pipelines.files(path) if storage.exists(file)]
  path = diffusers.find_network(path)
  files = ([path, path + ".json"] if storage.isfile(path)
           else weight_files.files(path))
  files += diffusers.config_files(path)
  return [file for file in files if storage.exists(file)]

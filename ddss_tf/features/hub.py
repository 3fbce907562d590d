"""Models of TensorFlow Hub, fetched once."""

import hashlib
import os
import tempfile
import warnings

from absl import logging

from ddss_tf import bindings
from ddss_tf import storage
from ddss_tf.networks import files as network_files
from ddss_tf.errors import UserError

INCEPTION_HANDLE = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
INCEPTION_SIZE = 299


def _fetched(handle: str) -> str:
  """Has tensorflow_hub download a handle into its cache."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pkg_resources, which it imports, warns.
    import tensorflow_hub  # pylint: disable=g-import-not-at-top
  logging.info("fetching %s", handle)
  return tensorflow_hub.resolve(handle)


def hub_folder(handle: str) -> str:
  """The folder of a handle's SavedModel in TF-Hub's cache; fetched if missing.

  It is the folder named by the SHA-1 of the handle in $TFHUB_CACHE_DIR, or in
  `tfhub_modules` of the system's folder for temporary files, as
  tensorflow_hub 0.16 has it (`compressed_module_resolver.py`).

  Raises:
    UserError: it is not there and cannot be fetched; the line says how to get
      it.
  """
  cache = storage.expanded(os.getenv("TFHUB_CACHE_DIR"))
  if cache:
    os.environ["TFHUB_CACHE_DIR"] = cache  # tensorflow_hub expands no "~".
  else:
    cache = os.path.join(tempfile.gettempdir(), "tfhub_modules")
  folder = os.path.join(cache, hashlib.sha1(handle.encode()).hexdigest())
  if not storage.isdir(folder):
    lock = folder + ".lock"
    if storage.exists(lock):
      state = f"a download that has not ended, {lock}"
    else:
      try:
        return _fetched(handle)
      except Exception as error:  # No network, no package, no space.
        state = ("no such folder, and it cannot be fetched: "
                 f"{network_files.reason(error)}")
    raise UserError(
        f"{handle} must be in TF-Hub's cache, in the folder {folder} (cache: "
        f"TFHUB_CACHE_DIR). Received: {state}. Download "
        f"{handle}?tf-hub-format=compressed and unpack it there with tar -xzf, "
        f"or anywhere and set {bindings.working('load_features.path')} to that "
        "folder")
  return folder

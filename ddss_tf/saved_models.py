"""Classifiers in SavedModels, and TF-Hub's cache of them."""

import hashlib
import os
import tempfile
import warnings

from absl import logging
import numpy as np
import tensorflow as tf

from ddss_tf import storage
from ddss_tf.errors import UserError, shape_text
from ddss_tf.frozen import frozen_variables

INCEPTION_HANDLE = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
INCEPTION_SIZE = 299


def _reason(error: Exception, limit: int = 200) -> str:
  return " ".join(str(error).split())[:limit]


class SavedModelNetwork:
  """A SavedModel with a dictionary of outputs, loaded once.

  To `features.FeatureNetwork` it looks as `keras_models.KerasNetwork` does.

  Called as TensorFlow 2 calls it, or else through its signature
  "serving_default" (or "default", as TF-Hub's first format has it). A
  SavedModel is a program: load only those that you trust.

  Args:
    folder: with saved_model.pb and variables.

  Raises:
    UserError: in one line, a folder that is not a complete SavedModel, or one
      that takes anything but one batch of float images.
  """

  graph = ""  # The hash is of the files, which hold weights and graph.

  def __init__(self, folder: str):
    self._folder = folder
    # Kept: its variables live only as long as it does.
    self._loaded = load(folder)
    self.weights_sha256 = sha256(folder)
    self._ways, refused = [], []
    for name, function, specs in _entry_points(self._loaded):
      if (len(specs) == 1 and specs[0].dtype.is_floating
          and specs[0].shape.rank in (None, 4)):
        self._ways.append((name, function, specs[0]))
      else:
        refused.append(f"{name}({', '.join(map(str, specs))})")
    if not self._ways:
      raise UserError(
          f"{folder} must be callable, or have the signature serving_default, "
          "with one input, float images [B, H, W, C]. Received: "
          f"{'; '.join(refused)[:200] or 'neither'}")
    shape = self._ways[0][2].shape
    height, width, channels = shape[1:] if shape.rank else (None, None, None)
    self.input_shape = (height, width, channels or 3)

  def select(self, pool_key: str, logits_key: str, size=None):
    """Reads two outputs, after a trial on two images of (height, width) `size`.

    Returns:
      As `KerasNetwork.select` does; an output [B, 1, 1, D] is flattened to
      [B, D], as TF-GAN does.

    Raises:
      UserError: no way to call it works, there is no such output, or its output
        is of another shape or not finite.
    """
    # If any size does, it is one that no network is too deep for.
    height, width = size or (n or INCEPTION_SIZE for n in self.input_shape[:2])
    images = tf.stack([tf.fill([height, width, self.input_shape[2]], value)
                       for value in (-0.5, 0.5)])
    failures = []
    for name, function, spec in self._ways:
      try:
        outputs = function(tf.cast(images, spec.dtype))
        break
      except Exception as error:  # Whatever the graph raises.
        failures.append(f"{name}: {_reason(error, 100)}")
    else:
      raise UserError(f"{self._folder} must take images "
                      f"{shape_text(images.shape)}: {'; '.join(failures)}")
    if not isinstance(outputs, dict):
      raise UserError(
          f"{self._folder} must give a dictionary with the outputs "
          f"{pool_key!r} and {logits_key!r}. "
          f"Received: {type(outputs).__name__}")
    sizes = []
    for key in (pool_key, logits_key):
      if key not in outputs:
        raise UserError(f"features {self._folder} must be read from one of its "
                        f"outputs {', '.join(sorted(outputs))}. "
                        f"Received: {key!r}")
      shape = outputs[key].shape
      sizes.append(int(np.prod(shape[1:])))
      if shape[0] != 2 or len(shape) < 2 or sizes[-1] != shape[-1]:
        raise UserError(
            f"output {key!r} of {self._folder} must be [B, features] or "
            f"[B, 1, 1, features]. Received: {shape_text(shape)} for 2 images")
      if not np.all(np.isfinite(outputs[key])):
        raise UserError(f"output {key!r} of {self._folder} must be finite")

    def call(images):
      outputs = function(tf.cast(images, spec.dtype))
      return tuple(tf.reshape(outputs[key], [-1, size])
                   for key, size in zip((pool_key, logits_key), sizes))

    return call, self._loaded, sizes[0]


def _entry_points(loaded):
  """Yields (name, function of one tensor, specs of all tensor inputs)."""
  if callable(loaded):
    for concrete in getattr(loaded.__call__, "concrete_functions", []):
      specs = [spec for spec in tf.nest.flatten(
          concrete.structured_input_signature)
               if isinstance(spec, tf.TensorSpec)]
      yield "__call__", loaded, specs
      break  # The call itself finds the trace that fits.
  signatures = getattr(loaded, "signatures", {})
  for name in ("serving_default", "default"):
    if name in signatures:
      signature = signatures[name]
      freeze_signature(signature)
      arguments = signature.structured_input_signature[1]
      if len(arguments) == 1:
        [key] = arguments
        function = lambda x, key=key, call=signature: call(**{key: x})
      else:
        function = signature
      yield name, function, list(arguments.values())


def load(folder: str):
  """Loads a SavedModel with all variables frozen.

  Args:
    folder: with saved_model.pb and variables.

  Returns:
    What TensorFlow makes of it; its variables live only as long as it does.

  Raises:
    UserError: not a complete SavedModel; in one line.
  """
  _check_complete(folder)
  # TF-Hub's first format has no tags.
  tags = ([] if os.path.exists(os.path.join(folder, "tfhub_module.pb"))
          else None)
  try:
    with frozen_variables():
      return tf.saved_model.load(folder, tags=tags)
  except Exception as error:  # TensorFlow raises many kinds for damage.
    hint = ""
    if not os.path.exists(os.path.join(folder, "variables",
                                       "variables.index")):
      hint = "variables/variables.index is missing; "
    raise UserError(f"{folder} is not a complete SavedModel: {hint}"
                    f"{_reason(error)}") from error


def freeze_signature(signature) -> None:
  """Freezes TensorFlow 1's variables, which come out of a collection.

  They come past `frozen_variables`; there is no public way to freeze them.
  """
  for variable in signature.graph.variables:
    variable._trainable = False  # pylint: disable=protected-access


def _check_complete(folder: str) -> None:
  """Refuses what an interrupted download or copy leaves."""
  files = set(os.listdir(folder))
  if not files & {"saved_model.pb", "saved_model.pbtxt"}:
    raise UserError(
        f"{folder} must be a SavedModel. Received: a folder without "
        "saved_model.pb, perhaps half-written: delete it and unpack it again")
  variables = os.path.join(folder, "variables")
  shards = os.listdir(variables) if os.path.isdir(variables) else []
  present = [name for name in shards if name.startswith("variables.data-")]
  if "variables.index" in shards or present:
    count = int(present[0].rsplit("-", 1)[-1]) if present else 1
    if len(present) != count or "variables.index" not in shards:
      raise UserError(
          f"{variables} must hold variables.index and all its data files. "
          f"Received: {', '.join(sorted(shards))}: half-written, delete the "
          "SavedModel and unpack it again")


def sha256(folder: str) -> str:
  """Hash of the names and contents of what a SavedModel computes with."""
  paths = ["saved_model.pb", "saved_model.pbtxt", "tfhub_module.pb"]
  for part in ("variables", "assets"):
    for root, _, files in os.walk(os.path.join(folder, part)):
      paths += [os.path.relpath(os.path.join(root, file), folder)
                for file in files]
  digest = hashlib.sha256()
  for path in sorted(paths):
    if os.path.isfile(os.path.join(folder, path)):
      with open(os.path.join(folder, path), "rb") as f:
        part = hashlib.file_digest(f, "sha256").hexdigest()
      digest.update(f"{path} {part}\n".encode())
  return digest.hexdigest()


def _fetched(handle: str) -> str:
  """Has tensorflow_hub download a handle into its cache."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of pkg_resources, which it imports.
    import tensorflow_hub  # pylint: disable=g-import-not-at-top
  logging.info("fetching %s", handle)
  return tensorflow_hub.resolve(handle)


def hub_folder(handle: str) -> str:
  """Where TF-Hub keeps the SavedModel of a handle, which it fetches if need be.

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
  if not os.path.isdir(folder):
    lock = folder + ".lock"
    if os.path.exists(lock):
      state = f"a download that has not ended, {lock}"
    else:
      try:
        return _fetched(handle)
      except Exception as error:  # No network, no package, no space.
        state = ("no such folder, and it cannot be fetched: "
                 f"{_reason(error)}")
    raise UserError(
        f"{handle} must be in TF-Hub's cache, in the folder {folder} (cache: "
        f"TFHUB_CACHE_DIR). Received: {state}. Download "
        f"{handle}?tf-hub-format=compressed and unpack it there with tar -xzf, "
        "or anywhere and set load_features.path to that folder")
  return folder

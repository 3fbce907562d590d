"""Networks in files: Keras files and SavedModels, read and identified."""

import hashlib
import os
import re

import keras
import numpy as np
import tensorflow as tf

from ddss_tf import errors
from ddss_tf import storage
# Keras finds layers by the names under which these modules register them.
from ddss_tf.errors import UserError
from ddss_tf.networks import autoencoder  # pylint: disable=unused-import
from ddss_tf.networks import condition_layers  # pylint: disable=unused-import
from ddss_tf.networks import dit  # pylint: disable=unused-import
from ddss_tf.networks import edm_layers  # pylint: disable=unused-import
from ddss_tf.networks import group_norm  # pylint: disable=unused-import
from ddss_tf.networks import layers  # pylint: disable=unused-import
from ddss_tf.networks.frozen import frozen_variables


def load_keras(path: str) -> keras.Model:
  """Loads a Keras file, frozen.

  Raises:
    UserError: it is not a complete Keras file, or nobody has registered its
      classes.
  """
  try:
    with frozen_variables():
      model = keras.saving.load_model(path, compile=False, safe_mode=True)
  except Exception as error:  # Keras raises many kinds for a damaged file.
    raise UserError(f"{path} is not a complete and safe Keras file: "
                    f"{errors.one_line(error)}") from error
  model.trainable = False
  return model


def check_finite(what: str, model) -> None:
  """Checks the weights of a model that Keras has read.

  Args:
    what: what the message calls it.
    model: a Keras model.

  Raises:
    UserError: a weight is NaN or infinite.
  """
  for variable in model.weights:
    if not np.all(np.isfinite(variable)):
      raise UserError(f"{what} must have finite weights. Received: NaN or "
                      f"infinity in {variable.path}")


def graph_text(model: keras.Model) -> str:
  """Text that tells models of equal weights apart, as JSON.

  The modules of our own layers are left out: where a class lies does not change
  what it computes.
  """
  return re.sub(r'"module": "ddss_tf[^"]*"', '"module": "ddss_tf"',
                model.to_json())


def reason(error: Exception, limit: int = 200) -> str:
  """An error's message in one line, cut short."""
  return " ".join(str(error).split())[:limit]


def load(folder: str):
  """Loads a SavedModel with all variables frozen.

  Args:
    folder: the folder with saved_model.pb and variables.

  Returns:
    The object that TensorFlow loads. Its variables live only as long as it
    does.

  Raises:
    UserError: it is not a complete SavedModel; in one line.
  """
  _check_complete(folder)
  # TF-Hub's first format has no tags.
  tags = ([] if storage.exists(os.path.join(folder, "tfhub_module.pb"))
          else None)
  try:
    with frozen_variables():
      return tf.saved_model.load(folder, tags=tags)
  except Exception as error:  # TensorFlow raises many kinds for damage.
    hint = ""
    if not storage.exists(os.path.join(folder, "variables",
                                       "variables.index")):
      hint = "variables/variables.index is missing; "
    raise UserError(f"{folder} is not a complete SavedModel: {hint}"
                    f"{reason(error)}") from error


def freeze_signature(signature) -> None:
  """Freezes the variables of a signature of TensorFlow 1.

  They come out of a collection, so `frozen_variables` does not reach them.
  There is no public way to freeze them.
  """
  for variable in signature.graph.variables:
    variable._trainable = False  # pylint: disable=protected-access


def _check_complete(folder: str) -> None:
  """Refuses what an interrupted download or copy leaves behind."""
  files = set(storage.listdir(folder))
  if not files & {"saved_model.pb", "saved_model.pbtxt"}:
    raise UserError(
        f"{folder} must be a SavedModel. Received: a folder without "
        "saved_model.pb, perhaps half-written: delete it and unpack it again")
  variables = os.path.join(folder, "variables")
  shards = storage.listdir(variables) if storage.isdir(variables) else []
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
    for root, _, files in storage.walk(os.path.join(folder, part)):
      paths += [os.path.relpath(os.path.join(root, file), folder)
                for file in files]
  digest = hashlib.sha256()
  for path in sorted(paths):
    if storage.isfile(os.path.join(folder, path)):
      with storage.open(os.path.join(folder, path), "rb") as f:
        part = hashlib.file_digest(f, "sha256").hexdigest()
      digest.update(f"{path} {part}\n".encode())
  return digest.hexdigest()

"""Frozen networks that turn images into features, and a cache of theirs."""

import json
import os
import zipfile
import zlib

from absl import logging
import gin
import keras
import numpy as np
import tensorflow as tf

from ddss_tf import data
from ddss_tf import fingerprint
from ddss_tf import storage
from ddss_tf.errors import UserError
from ddss_tf.frozen import frozen_variables

_ASSETS = os.path.join(os.path.dirname(__file__), "assets")
_SUFFIX = ".keras"
_KEYS = ("pool", "logits")


class FeatureNetwork:
  """A frozen classifier of which two layers are read.

  Args:
    model: a Keras model with one input, images [B, H, W, C] in [-1, 1].
    name: what results call it.
    pool_layer: the layer whose output [B, D] are the features.
    logits_layer: the layer whose output [B, classes] are the logits.

  Attributes:
    model: maps images to the pair of outputs, in this order.
    num_features: D.
    sha256: hash of all weights of the model given.
    key: hash of the weights, the architecture and the choice of layers: equal
      keys give equal features.

  Raises:
    UserError: there is no such layer, or its output has another rank.
  """

  def __init__(self, model: keras.Model, name: str = "features",
               pool_layer: str = "pool", logits_layer: str = "logits"):
    outputs = [_layer_output(model, name, layer)
               for layer in (pool_layer, logits_layer)]
    model.trainable = False
    self.name = name
    self.model = keras.Model(model.inputs, outputs, name=model.name)
    self.num_features = outputs[0].shape[-1]
    self.sha256 = fingerprint.arrays_sha256(model.get_weights())
    # The weights alone would not tell a network from the same one with
    # another activation, or from another layer of it.
    self.key = fingerprint.text_sha256(json.dumps(
        [self.sha256, pool_layer, logits_layer, model.to_json()]))

  def __call__(self, images) -> dict[str, tf.Tensor]:
    """Features of a batch; differentiable with respect to the images.

    Args:
      images: float [B, H, W, C], meant in [-1, 1]. They are clipped to that
        range, as samplers overshoot it and image files cannot.

    Returns:
      {"pool": float32 [B, num_features], "logits": float32 [B, classes]}.

    Raises:
      UserError: images of another shape.
    """
    images = tf.cast(tf.convert_to_tensor(images), tf.float32)
    expected = self.model.inputs[0].shape
    if not images.shape.is_compatible_with(expected):
      raise UserError(
          f"images for the features {self.name!r} must have the shape "
          f"{_shape(expected)}. Received: {_shape(images.shape)}")
    # training=False: neither dropout nor statistics of the batch.
    outputs = self.model(tf.clip_by_value(images, -1.0, 1.0), training=False)
    return {key: tf.cast(value, tf.float32)
            for key, value in zip(_KEYS, outputs)}


def _shape(shape) -> str:
  sizes = ", ".join("?" if size is None else str(size) for size in shape)
  return f"[{sizes}]"


def _layer_output(model: keras.Model, name: str, layer: str):
  """Symbolic output [B, features] of a layer."""
  names = [each.name for each in model.layers]
  if layer not in names:
    raise UserError(f"features {name!r} must be read from one of its layers "
                    f"{', '.join(names)}. Received: {layer!r}")
  try:
    output = model.get_layer(layer).output
  except (AttributeError, ValueError) as error:
    raise UserError(f"layer {layer!r} of {name!r} must be called exactly once, "
                    f"in a functional or sequential model: {error}") from error
  if len(output.shape) != 2:
    raise UserError(f"layer {layer!r} of {name!r} must give [B, features]. "
                    f"Received: {_shape(output.shape)}")
  return output


def embedded_features() -> list[str]:
  """Names of the networks that come with the package."""
  return sorted(name.removesuffix(_SUFFIX) for name in os.listdir(_ASSETS)
                if name.endswith(_SUFFIX))


@gin.register
def load_features(path: str = gin.REQUIRED, pool_layer: str = "pool",
                  logits_layer: str = "logits") -> FeatureNetwork:
  """Loads a feature network.

  Args:
    path: of a `.keras` file, or the name of an embedded network:
      "digits_cnn" (for the loss) and "digits_resnet" (for reports only, so
      that what is reported is not what was optimised).
    pool_layer: see `FeatureNetwork`.
    logits_layer: see `FeatureNetwork`.

  Returns:
    The network, frozen. If a `.json` of the same name with a "sha256" lies
    beside the file, the weights have been checked against it.

  Raises:
    UserError: in one line, for a missing or damaged file, code inside it,
      weights that are not those of its `.json`, or a missing layer.
  """
  if path in embedded_features():
    path = os.path.join(_ASSETS, path + _SUFFIX)
  # Other formats that Keras reads can run code of their own.
  if not path.endswith(_SUFFIX) or not os.path.isfile(path):
    raise UserError(
        f"features must be the path of a {_SUFFIX} file or the name of an "
        f"embedded network ({', '.join(embedded_features())}). "
        f"Received: {path!r}")
  try:
    with frozen_variables():
      model = keras.saving.load_model(path, compile=False, safe_mode=True)
  except Exception as error:  # Keras raises many kinds for a damaged file.
    raise UserError(f"{path} is not a complete and safe Keras file: "
                    f"{' '.join(str(error).split())[:200]}") from error
  name = os.path.basename(path).removesuffix(_SUFFIX)
  features = FeatureNetwork(model, name, pool_layer, logits_layer)
  _check_card(path, features.sha256)
  return features


def _check_card(path: str, sha256: str) -> None:
  """Compares the weights' hash with the one on record."""
  card_path = path.removesuffix(_SUFFIX) + ".json"
  if not os.path.exists(card_path):
    if os.path.dirname(path) == _ASSETS:
      raise UserError(f"{path} must have {os.path.basename(card_path)} beside "
                      "it. Received: no such file")
    return
  try:
    with open(card_path, encoding="utf-8") as f:
      expected = json.load(f)["sha256"]
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{card_path} must be a JSON object with 'sha256'. "
                    f"Received: {error!r}") from error
  if sha256 != expected:
    raise UserError(f"weights in {path} must have the SHA-256 {expected} of "
                    f"{os.path.basename(card_path)}. Received: {sha256}")


def dataset_features(features: FeatureNetwork, dataset: data.ImageDataset, *,
                     quantise: bool, cache_dir: str | None,
                     batch_size: int = 500) -> dict[str, np.ndarray]:
  """Features of all images of a data set, computed once.

  Args:
    features: the network.
    dataset: the images.
    quantise: whether to round the images to bytes first, as image files do.
    cache_dir: folder, made if need be, of files named after a hash of
      everything that the features depend on; None for no cache.
    batch_size: images at a time.

  Returns:
    {"pool": float32 [N, D], "logits": float32 [N, classes]}, in the order of
    the data set.

  Raises:
    UserError: images of a shape that the network does not take.
  """
  path = None
  if cache_dir is not None:
    key = fingerprint.text_sha256(
        json.dumps([dataset.sha256, features.key, bool(quantise)]))
    path = os.path.join(cache_dir, f"features-{key[:32]}.npz")
    cached = _read_cache(path, len(dataset.images))
    if cached is not None:
      return cached
  batches = []
  for start in range(0, len(dataset.images), batch_size):
    images = dataset.images[start:start + batch_size]
    if quantise:
      images = data.to_float(data.to_uint8(images))
    batches.append(features(images))
  arrays = {key: np.concatenate([batch[key].numpy() for batch in batches])
            for key in _KEYS}
  if path is not None:
    with storage.replacing(path) as temporary:
      np.savez(temporary, **arrays)
  return arrays


def _read_cache(path: str, count: int) -> dict[str, np.ndarray] | None:
  """The arrays of a cache file; None if there is none, or no sound one."""
  if not os.path.exists(path):
    return None
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {key: file[key] for key in _KEYS}
    if any(len(value) != count for value in arrays.values()):
      raise ValueError(f"there must be {count} rows")
    return arrays
  except (OSError, EOFError, ValueError, KeyError, TypeError,
          zipfile.BadZipFile, zlib.error) as error:
    logging.warning("Cache %s is damaged and computed again: %s", path, error)
    return None

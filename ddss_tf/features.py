"""Frozen networks that turn images into features."""

import json
import os

from absl import logging
import gin
import keras
import numpy as np
import tensorflow as tf

from ddss_tf import keras_models
from ddss_tf import saved_models
from ddss_tf import storage
from ddss_tf.networks import files as network_files
from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError, shape_text
from ddss_tf.preprocessing import Preprocessing

_ASSETS = os.path.join(os.path.dirname(__file__), "assets")
_SUFFIX = ".keras"
_KEYS = ("pool", "logits")
# 22 images of Inception's size at a time, 500 of 64x64 or smaller.
_PIXELS_AT_A_TIME = 2_000_000


class FeatureNetwork:
  """A frozen classifier of which two layers are read.

  Args:
    model: with one input, images [B, H, W, C]: a Keras model, or a
      `saved_models.SavedModelNetwork`.
    name: what results call it.
    pool_layer: the layer, or a SavedModel's output, whose values [B, D] are the
      features.
    logits_layer: the one whose values [B, classes] are the logits.
    preprocessing: from images in [-1, 1] to what the model takes.
    source: the protocol's first words.

  Attributes:
    model: what computes the pair of outputs.
    num_features: D.
    image_shape: (H, W, C) of the images it takes, None for any.
    protocol: in words, what happens to images before the network.
    batch_size: images at a time that leave room in a few GiB of memory.
    key: hash of the weights, the architecture, the choice of layers and the
      preprocessing: equal keys give equal features.
    sha256: hash of the weights, which results record beside the protocol.
    embedded: whether it is one of those that come with the package.

  Raises:
    UserError: there is no such layer, its output has another rank, or the
      preprocessing does not fit the model.
  """

  def __init__(self, model, name: str = "features", pool_layer: str = "pool",
               logits_layer: str = "logits",
               preprocessing: Preprocessing = Preprocessing(),
               source: str = "keras model"):
    if isinstance(model, keras.Model):
      model = keras_models.KerasNetwork(model, name)
    self.name = name
    self.protocol = (
        f"{source}: images clipped to [-1, 1], {preprocessing}; features "
        f"{pool_layer}, logits {logits_layer}")
    self._preprocessing = preprocessing
    self._input_shape = model.input_shape
    if preprocessing.size is not None and not _fits(
        preprocessing.size, self._input_shape[:2]):
      raise UserError(
          f"features {name!r} must have images resized to "
          f"{self._input_shape[:2]}. Received: {preprocessing.size}")
    if not preprocessing.takes_channels(self._input_shape[2]):
      raise UserError(
          f"value_range {preprocessing.value_range!r} of features {name!r} must "
          "be of a network of 3 channels. Received: one of "
          f"{self._input_shape[2]}")
    self.image_shape = self._input_shape
    if preprocessing.size is not None:
      self.image_shape = (None, None, self._input_shape[2])
    self._function, self.model, self.num_features = model.select(
        pool_layer, logits_layer, preprocessing.size)
    height, width = preprocessing.size or (
        n or saved_models.INCEPTION_SIZE for n in self._input_shape[:2])
    self.batch_size = int(np.clip(
        _PIXELS_AT_A_TIME // (height * width), 1, 500))
    # The weights alone would not tell a network from the same one with
    # another activation, or from another layer of it.
    parts = [model.weights_sha256, pool_layer, logits_layer, model.graph]
    if preprocessing != Preprocessing():
      parts.append(str(preprocessing))
    self.key = fingerprint.text_sha256(json.dumps(parts))
    self.sha256 = model.weights_sha256
    self.embedded = False

  @property
  def identity(self) -> dict[str, str]:
    """How results name it: name, "sha256", "protocol".

    And the `key`, for the weights do not tell an activation; what comes with
    the package is known by its weights.
    """
    told = {"name": self.name, "sha256": self.sha256, "protocol": self.protocol}
    return told if self.embedded else {**told, "key": self.key}

  def accepts(self, image_shape) -> bool:
    """Whether it takes images (H, W, C); None in it stands for any."""
    return _fits(
        self._preprocessing.output_shape(image_shape), self._input_shape
        ) and self._preprocessing.takes_channels(image_shape[2])

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
    if images.shape.rank != 4 or not self.accepts(images.shape[1:]):
      raise UserError(
          f"images for the features {self.name!r} must have the shape "
          f"{shape_text((None, *self.image_shape))}. "
          f"Received: {shape_text(images.shape)}")
    images = self._preprocessing(tf.clip_by_value(images, -1.0, 1.0))
    return {key: tf.cast(value, tf.float32)
            for key, value in zip(_KEYS, self._function(images))}


def as_networks(what: str, value, several: bool = True,
                optional: bool = False) -> list[FeatureNetwork]:
  """The feature networks of an argument that takes one or a list of them.

  Args:
    what: the argument's name, for the message.
    value: a network; a list or tuple of them; None.
    several: whether a list is allowed.
    optional: whether None, or an empty list, is.

  Returns:
    The networks, in order.

  Raises:
    UserError: the argument is something else.
  """
  if optional and value is None:
    return []
  networks = [value]
  if several and isinstance(value, (list, tuple)):
    networks = list(value)
  strangers = [each for each in networks
               if not isinstance(each, FeatureNetwork)]
  if strangers or not (networks or optional):
    raise UserError(
        f"{what} must be {'a' if several else 'one'} feature network, as "
        f"load_features gives{', or a list of them' if several else ''}. "
        f"Received: {_described(strangers[0] if strangers else value)}")
  return networks


def _described(value) -> str:
  """What an argument is, in a few words."""
  if isinstance(value, (list, tuple)) and value:
    return f"a {type(value).__name__} of {len(value)}"
  return repr(value)[:80]


def _fits(sizes, expected) -> bool:
  return tf.TensorShape(sizes).is_compatible_with(expected)


def embedded_features() -> list[str]:
  """Names of the networks that come with the package."""
  return sorted(name.removesuffix(_SUFFIX) for name in os.listdir(_ASSETS)
                if name.endswith(_SUFFIX))


@gin.register
def load_features(path: str = gin.REQUIRED, pool_layer: str | None = None,
                  logits_layer: str | None = None, resize: str | None = None,
                  image_size: int | tuple[int, int] | None = None,
                  value_range: str | None = None,
                  weights: str | None = "imagenet",
                  seed: int = 0) -> FeatureNetwork:
  """Loads a feature network.

  Args:
    path: one of, with `~` for the home folder,
      the name of an embedded network: "digits_cnn" (for the loss) and
        "digits_resnet" (for reports only, so that what is reported is not what
        was optimised);
      a `.keras` file, which gets images as they are if no rule is given;
      "https://tfhub.dev/tensorflow/tfgan/eval/inception/1", TF-GAN's Inception
        which TF-Hub fetches once (`saved_models.hub_folder`), or another one;
      the folder of a SavedModel, TF-GAN's Inception or any other;
      "keras:NAME" for `keras.applications.NAME`.
    pool_layer: see `FeatureNetwork`. None: "pool" of a file, "pool_3" of a
      SavedModel, "avg_pool" of an application.
    logits_layer: None: "logits", or "predictions" of an application, which is
      built without a softmax.
    resize: one of `preprocessing.RESIZES`. None: "bilinear", but "none" for a
      file without `image_size`.
    image_size: number or (height, width) to resize to; None for what the
      network itself says, or else 299 for TF-GAN's outputs.
    value_range: what the network expects, one of `preprocessing.VALUE_RANGES`.
      None: what an application was trained with, or "[-1, 1]".
    weights: of an application: a file, "imagenet" (downloaded by Keras), or
      None for random ones.
    seed: of random weights.

  Returns:
    The network, frozen. If a `.json` of the same name with a "sha256" lies
    beside a file, the weights have been checked against it.

  Raises:
    UserError: in one line, for a missing or damaged file or folder, code inside
      a file, weights that are not those of its `.json`, a missing layer or
      output, or rules that do not fit together.
  """
  size = None
  if image_size is not None:
    size = (tuple(image_size) if isinstance(image_size, (tuple, list))
            else (image_size, image_size))
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
      raise UserError("image_size of features must be a positive number or "
                      f"(height, width). Received: {image_size!r}")
  path, weights = map(storage.expanded, (path, weights))
  embedded = path in embedded_features()
  if embedded:
    path = os.path.join(_ASSETS, path + _SUFFIX)
  is_handle = path.startswith(("https://", "http://"))
  if path.startswith(keras_models.APPLICATION_PREFIX):
    application = path.removeprefix(keras_models.APPLICATION_PREFIX)
    value_range = value_range or keras_models.application_range(application)
    network, source = keras_models.keras_application(
        application, weights, seed, size, value_range)
    name = path if weights is not None else f"{path}-random"
    layers = ("avg_pool", "predictions")
  elif is_handle or os.path.isdir(path):
    folder = saved_models.hub_folder(path) if is_handle else path
    network = saved_models.SavedModelNetwork(folder)
    name = os.path.basename(os.path.normpath(path))
    layers = ("pool_3", "logits")
    tfgan = (pool_layer or layers[0], logits_layer or layers[1]) == layers
    source = "tfgan" if tfgan else "saved model"
    if path == saved_models.INCEPTION_HANDLE:
      name = "tfgan_inception"
    if tfgan and size is None and None in network.input_shape and (
        resize != "none"):
      size = (saved_models.INCEPTION_SIZE,) * 2
  else:
    network, name = _load_file(path)
    layers, source = _KEYS, "keras file"
    if resize is None and size is None:
      resize = "none"
  resize = resize or "bilinear"
  if resize != "none" and size is None:
    size = network.input_shape[:2]
    if None in size:
      raise UserError(f"features {name!r} take images of any size: image_size "
                      "must say which, or resize must be 'none'")
  plain = resize == "none" and value_range is None and source == "keras file"
  preprocessing = Preprocessing() if plain else Preprocessing(
      resize, size, value_range or "[-1, 1]",
      grey_to_rgb=network.input_shape[2] == 3)
  features = FeatureNetwork(
      network, name, pool_layer or layers[0], logits_layer or layers[1],
      preprocessing, source)
  features.embedded = embedded
  if source == "keras file":
    _check_card(path, network.weights_sha256)
  logging.info("features %s: %s, %d features", name, features.protocol,
               features.num_features)
  return features


def _load_file(path: str) -> tuple[keras_models.KerasNetwork, str]:
  """The network of a `.keras` file, and its name."""
  # Other formats that Keras reads can run code of their own.
  if not path.endswith(_SUFFIX) or not os.path.isfile(path):
    raise UserError(
        f"features must be the path of a {_SUFFIX} file or of a SavedModel's "
        "folder, a TF-Hub handle, keras:NAME, or the name of an embedded "
        f"network ({', '.join(embedded_features())}). Received: {path!r}")
  model = network_files.load_keras(path)
  for variable in model.weights:
    if not np.all(np.isfinite(variable)):
      raise UserError(f"features {path} must have finite weights. Received: "
                      f"NaN or infinity in {variable.path}")
  name = os.path.basename(path).removesuffix(_SUFFIX)
  return keras_models.KerasNetwork(model, name), name


def _check_card(path: str, sha256: str) -> None:
  """Compares the weights' hash with the one on record."""
  card_path = path.removesuffix(_SUFFIX) + ".json"
  if not os.path.exists(card_path):
    if os.path.dirname(path) == _ASSETS:
      raise UserError(f"{path} must have {os.path.basename(card_path)} beside "
                      "it. Received: no such file")
    return
  try:
    expected = storage.read_json(card_path)["sha256"]
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{card_path} must be a JSON object with 'sha256'. "
                    f"Received: {error!r}") from error
  if sha256 != expected:
    raise UserError(f"weights in {path} must have the SHA-256 {expected} of "
                    f"{os.path.basename(card_path)}. Received: {sha256}")

"""Frozen networks that turn images into features."""

import os
from typing import Callable

from absl import logging
import gin

from ddss_tf import bindings
from ddss_tf import storage
from ddss_tf.features import efficientnet
from ddss_tf.features import hub
from ddss_tf.features import keras_models
from ddss_tf.features import network as network_lib
from ddss_tf.features import saved_models
from ddss_tf.networks import files as network_files
from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError
from ddss_tf.features.network import FeatureNetwork
from ddss_tf.features.preprocessing import Preprocessing

# Registered factories of networks, by name.
_registered = {}
_ASSETS = os.path.join(os.path.dirname(__file__), "assets")
_SUFFIX = ".keras"
_NO_LOGITS = "none"


def embedded_features() -> list[str]:
  """Names of the networks that come with the package."""
  return sorted(name.removesuffix(_SUFFIX) for name in storage.listdir(_ASSETS)
                if name.endswith(_SUFFIX))


def register_features(name: str) -> Callable:
  """Adds feature networks, which `load_features` then takes by name.

    @ddss_tf.register_features("mine")
    def make_mine(argument):  # "large" of the path "mine:large"; or "".
      return ddss_tf.FeatureNetwork(keras_model, "mine")

  Args:
    name: the path of `load_features`, or what stands before its colon.

  Returns:
    A decorator of a function that takes what stands behind the colon and
    returns a `FeatureNetwork`.

  Raises:
    ValueError: the name is taken.
  """
  def register(make):
    known = _registered.get(name)
    if (f"{name}:" in (keras_models.APPLICATION_PREFIX, efficientnet.PREFIX)
        or name in embedded_features() or known is not None
        and fingerprint.definition(known) != fingerprint.definition(make)):
      raise ValueError("a name of feature networks must be new. "
                       f"Received: {name!r}")
    _registered[name] = make
    return make

  return register


def _from_outside(path: str, rules: dict) -> FeatureNetwork:
  """A network of a registered factory, which has its own rules."""
  name, _, argument = path.partition(":")
  given = [key for key, value in rules.items() if value is not None]
  if given:
    raise UserError(f"{', '.join(given)} must not be given for the registered "
                    f"features {path!r}, which have their own")
  features = _registered[name](argument)
  if not isinstance(features, FeatureNetwork):
    raise UserError(f"features {path!r} must be a FeatureNetwork. Received: "
                    f"{type(features).__name__} from the function that was "
                    "registered")
  return features


@bindings.register
def load_features(path: str = gin.REQUIRED, pool_layer: str | None = None,
                  logits_layer: str | None = None, resize: str | None = None,
                  image_size: int | tuple[int, int] | None = None,
                  value_range: str | None = None,
                  weights: str | None = "imagenet",
                  seed: int = 0) -> FeatureNetwork:
  """Loads a feature network.

  Args:
    path: one of these, with `~` for the home folder:
      the name of an embedded network: "digits_cnn" (for the loss) and
        "digits_resnet" (for reports only, so that what is reported is not what
        was optimised);
      a `.keras` file, which gets images as they are if no rule is given;
      "https://tfhub.dev/tensorflow/tfgan/eval/inception/1", TF-GAN's Inception
        which TF-Hub fetches once (`hub.hub_folder`), or another one;
      the folder of a SavedModel, TF-GAN's Inception or any other;
      "keras:NAME" for `keras.applications.NAME`;
      "efficientnet-lite0:PATH", PATH the safetensors file of its weights or the
        folder of `model.safetensors` (`efficientnet.load`);
      a name of `register_features`, or such a name, ":" and its argument.
    pool_layer: see `FeatureNetwork`. None: "pool" of a file, "pool_3" of a
      SavedModel, "avg_pool" of an application.
    logits_layer: None: "logits", or "predictions" of an application, which is
      built without a softmax; "none": there are no logits, and no Inception score.
    resize: one of `preprocessing.RESIZES`. None: "bilinear", but "none" for a
      file without `image_size`.
    image_size: number or (height, width) to resize to; None for what the
      network itself says, or else 299 for TF-GAN's outputs and 128 for
      EfficientNet-Lite0.
    value_range: what the network expects, one of `preprocessing.VALUE_RANGES`.
      None: what an application or EfficientNet-Lite0 was trained with, or
      "[-1, 1]".
    weights: the weights of an application: a file, "imagenet" (downloaded by
      Keras), or None for random ones.
    seed: the seed of random weights.

  Returns:
    The network, frozen. If a `.json` of the same name with a "sha256" lies
    beside a file, the weights have been checked against it.

  Raises:
    UserError: in one line, for a missing or damaged file or folder, code inside
      a file, weights that are not those of its `.json`, a missing layer or
      output, or rules that do not fit together.
  """
  if path.partition(":")[0] in _registered:
    return _from_outside(path, dict(
        pool_layer=pool_layer, logits_layer=logits_layer, resize=resize,
        image_size=image_size, value_range=value_range))
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
  elif path.startswith(efficientnet.PREFIX):
    network = efficientnet.load(path.removeprefix(efficientnet.PREFIX))
    name, layers = efficientnet.PREFIX[:-1], network_lib.KEYS
    source, value_range = "efficientnet-lite0", value_range or efficientnet.VALUE_RANGE
    if size is None and resize != "none":
      size = (efficientnet.IMAGE_SIZE,) * 2
  elif is_handle or storage.isdir(path):
    folder = hub.hub_folder(path) if is_handle else path
    network = saved_models.SavedModelFeatures(folder)
    name = os.path.basename(os.path.normpath(path))
    layers = ("pool_3", "logits")
    tfgan = (pool_layer or layers[0]) == layers[0] and (
        logits_layer in (None, _NO_LOGITS, layers[1]))
    source = "tfgan" if tfgan else "saved model"
    if path == hub.INCEPTION_HANDLE:
      name = "tfgan_inception"
    if tfgan and size is None and None in network.input_shape and (
        resize != "none"):
      size = (hub.INCEPTION_SIZE,) * 2
  else:
    network, name = _load_file(path)
    layers, source = network_lib.KEYS, "keras file"
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
      network, name, pool_layer or layers[0],
      None if logits_layer == _NO_LOGITS else logits_layer or layers[1],
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
  if not path.endswith(_SUFFIX) or not storage.isfile(path):
    raise UserError(
        f"features must be the path of a {_SUFFIX} file or of a SavedModel's "
        "folder, a TF-Hub handle, keras:NAME, efficientnet-lite0:PATH, or the "
        "name of an embedded "
        f"network ({', '.join(embedded_features())}). Received: {path!r}")
  model = network_files.load_keras(path)
  network_files.check_finite(f"features {path}", model)
  name = os.path.basename(path).removesuffix(_SUFFIX)
  return keras_models.KerasNetwork(model, name), name


def _check_card(path: str, sha256: str) -> None:
  """Compares the weights' hash with the one on record."""
  card_path = path.removesuffix(_SUFFIX) + ".json"
  if not storage.exists(card_path):
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

"""Classifiers of Keras: any model, and those of `keras.applications`."""

from absl import logging
import keras
import numpy as np
import tensorflow as tf

from ddss_tf import bindings
from ddss_tf import storage
from ddss_tf.features import preprocessing
from ddss_tf.networks import files as network_files
from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError, shape_text
from ddss_tf.networks.frozen import frozen_variables

APPLICATION_PREFIX = "keras:"

# The value range that Keras's applications expect, by the beginning of their
# names; the first match counts. Tests compare it with their `preprocess_input`.
_APPLICATION_RANGES = {
    "ResNet50V2": "[-1, 1]", "ResNet101V2": "[-1, 1]",
    "ResNet152V2": "[-1, 1]", "Inception": "[-1, 1]", "Xception": "[-1, 1]",
    "NASNet": "[-1, 1]", "MobileNetV3": "[0, 255]", "MobileNet": "[-1, 1]",
    "EfficientNet": "[0, 255]", "ConvNeXt": "[0, 255]", "ResNet": "caffe",
    "VGG": "caffe", "DenseNet": "torch",
}
_CALIBRATION_IMAGES = 8


class KerasNetwork:
  """A Keras model that gives the values of two of its layers.

  Args:
    model: with one input, images [B, H, W, C]; it is frozen.
    name: what errors call it.
    weights_sha256: hash of the weights; that of their arrays if None.
    graph: description of the architecture; the model's JSON if None.

  Attributes:
    input_shape: (H, W, C) of the images, None for any.
    weights_sha256: hash of the weights.
    graph: text that tells models of equal weights apart.
  """

  def __init__(self, model: keras.Model, name: str,
               weights_sha256: str | None = None, graph: str | None = None):
    model.trainable = False
    self._model = model
    self._name = name
    self.input_shape = tuple(model.inputs[0].shape[1:])
    self.weights_sha256 = weights_sha256 or fingerprint.arrays_sha256(
        model.get_weights())
    self.graph = graph or network_files.graph_text(model)

  def select(self, pool_layer: str, logits_layer: str | None, size=None):
    """Reads two layers, or one.

    Args:
      pool_layer: the one that gives the features.
      logits_layer: the one that gives the logits; None: there are none.
      size: unused, because symbolic shapes tell all; SavedModels need it.

    Returns:
      A function from float32 [B, H, W, C] to the pair ([B, D], [B, classes]), or
      to ([B, D],) without logits; the Keras model of the same; D.

    Raises:
      UserError: there is no such layer, or its output has another rank.
    """
    outputs = [self._output(layer) for layer in (pool_layer, logits_layer)
               if layer is not None]
    model = keras.Model(self._model.inputs, outputs, name=self._model.name)
    # training=False turns dropout and the statistics of the batch off. Keras gives a
    # single output without a list.
    return (lambda images: tf.nest.flatten(model(images, training=False)), model,
            outputs[0].shape[-1])

  def _output(self, name: str):
    """The symbolic output [B, features] of a layer."""
    rank_2 = []
    for layer in self._model.layers:
      try:
        if len(layer.output.shape) == 2:
          rank_2.append(layer.name)
      except (AttributeError, ValueError):  # Never called, or more than once.
        pass
    if name not in [layer.name for layer in self._model.layers]:
      raise UserError(
          f"features {self._name!r} must be read from one of its layers that "
          f"give [B, features]: {', '.join(rank_2)}. Received: {name!r}")
    try:
      output = self._model.get_layer(name).output
    except (AttributeError, ValueError) as error:
      raise UserError(
          f"layer {name!r} of {self._name!r} must be called exactly once, in a "
          f"functional or sequential model: {error}") from error
    if len(output.shape) != 2:
      raise UserError(f"layer {name!r} of {self._name!r} must give "
                      f"[B, features]. Received: {shape_text(output.shape)}")
    return output


def keras_application(name: str, weights: str | None, seed: int,
                      image_size: tuple[int, int] | None,
                      value_range: str | None) -> tuple[KerasNetwork, str]:
  """One of `keras.applications`, with logits.

  Args:
    name: the name of the function, such as "InceptionV3".
    weights: path of a file; "imagenet", which Keras downloads into its cache;
      or None for random ones, see `randomise`.
    seed: the seed of random weights.
    image_size: (height, width), or None for the network's own.
    value_range: what it expects, one of `preprocessing.VALUE_RANGES`.

  Returns:
    The network and a label that says which weights it has.

  Raises:
    UserError: no such application or weights, or an unknown range.
  """
  known = sorted(
      key for key, value in vars(keras.applications).items()
      if key[0].isupper() and callable(value))
  if name not in known:
    raise UserError(f"features {APPLICATION_PREFIX}NAME must name one of "
                    f"{', '.join(known)}. Received: {name!r}")
  if value_range not in preprocessing.VALUE_RANGES:
    raise UserError(
        f"value_range of features {APPLICATION_PREFIX}{name} must be one of "
        f"{', '.join(map(repr, preprocessing.VALUE_RANGES))}. "
        f"Received: {value_range!r}")
  if weights not in (None, "imagenet") and not storage.isfile(weights):
    raise UserError(
        "weights of features must be a file, 'imagenet', or None for random "
        f"ones. Received: {weights!r}")
  shape = None if image_size is None else (*image_size, 3)
  try:
    with frozen_variables():
      model = getattr(keras.applications, name)(
          weights=weights, input_shape=shape, classifier_activation=None)
  except Exception as error:  # No network, another architecture, no file.
    reason = " ".join(str(error).split())[:200]
    hint = ("; Keras downloads it once: copy it into ~/.keras/models, or give "
            f"{bindings.working('load_features.weights')} a file" if weights == "imagenet" else "")
    raise UserError(
        f"{APPLICATION_PREFIX}{name} cannot be built with the weights "
        f"{weights!r}: {reason}{hint}") from error
  label = f"{APPLICATION_PREFIX}{name}"
  sha256 = None
  if weights is None:
    label += f" with RANDOM weights, seed {seed}"
    logging.warning(
        "features %s: they compare images, but their FID and Inception Score "
        "mean nothing beside published ones", label)
    # The hash is of the seed's weights, which are the same on all machines.
    # What `calibrate` adds follows from them up to rounding.
    randomise(model, seed)
    sha256 = fingerprint.arrays_sha256(model.get_weights())
    calibrate(model, value_range, seed)
  # Not the JSON: its names count the layers of all models built before.
  graph = f"{name} {model.input_shape} Keras {keras.__version__}"
  if weights is None:
    graph += ", calibrated"  # The hash is from before.
  return KerasNetwork(model, label, sha256, graph), label


def application_range(name: str) -> str | None:
  """The key of `preprocessing.VALUE_RANGES` that an application expects."""
  return next((value for prefix, value in _APPLICATION_RANGES.items()
               if name.startswith(prefix)), None)


def randomise(model: keras.Model, seed: int) -> None:
  """Draws all kernels anew (He et al. 2015, https://arxiv.org/abs/1502.01852).

  The draws are NumPy's, because Keras's own would depend on what was built
  before. Biases and the parameters of normalisations stay as they are.
  """
  rng = np.random.default_rng(seed)
  for layer in model.layers:
    for variable in layer.weights:
      if len(variable.shape) < 2:
        continue
      depthwise = "Depthwise" in type(layer).__name__
      fan_in = np.prod(variable.shape[:2 if depthwise else -1])
      variable.assign((rng.standard_normal(variable.shape)
                       * np.sqrt(2 / fan_in)).astype(np.float32))


def calibrate(model: keras.Model, value_range: str, seed: int) -> None:
  """Sets batch normalisations to the statistics of some smooth random images.

  With random kernels and the statistics (0, 1) that a new model has, signals
  fade layer by layer: features of EfficientNetB0 end near 1e-14. One pass in
  training mode, without memory of older statistics, sets this right.
  """
  images = smooth_images(_CALIBRATION_IMAGES, model.input_shape[1:3], seed)
  images = preprocessing.VALUE_RANGES[value_range](images)
  kept = []
  for layer in model.layers:
    for kind, attribute in ((keras.layers.BatchNormalization, "momentum"),
                            (keras.layers.Dropout, "rate")):
      if isinstance(layer, kind):
        kept.append((layer, attribute, getattr(layer, attribute)))
        setattr(layer, attribute, 0.0)
  model(images, training=True)
  for layer, attribute, value in kept:
    setattr(layer, attribute, value)


def smooth_images(count: int, size, seed: int) -> tf.Tensor:
  """Float32 [count, *size, 3] in [-1, 1]: 8x8 uniform noise, enlarged."""
  small = np.random.default_rng([seed, 1]).uniform(-1, 1, (count, 8, 8, 3))
  return tf.image.resize(small.astype(np.float32), size)

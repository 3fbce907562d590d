"""Where frozen classifiers come from: Keras, Keras's applications, SavedModels.

`KerasNetwork` and `SavedModelNetwork` look alike to `features.FeatureNetwork`:

  input_shape      (H, W, C) of the images, None for any
  weights_sha256   hash of the weights, or of all files of a SavedModel
  graph            text that tells networks of equal weights apart
  select(pool, logits, size)
                   -> function images -> (pool, logits); the model that computes
                   it; how many features pool has
"""

import hashlib
import os
import tempfile

from absl import logging
import keras
import numpy as np
import tensorflow as tf

from ddss_tf import fingerprint
from ddss_tf import preprocessing
from ddss_tf.errors import UserError
from ddss_tf.frozen import frozen_variables

INCEPTION_HANDLE = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
INCEPTION_SIZE = 299
KERAS_PREFIX = "keras:"

# What Keras's applications expect, by how their names begin; the first counts.
# It is their `preprocess_input`, which tests compare.
_APPLICATION_RANGES = {
    "ResNet50V2": "[-1, 1]", "ResNet101V2": "[-1, 1]",
    "ResNet152V2": "[-1, 1]", "Inception": "[-1, 1]", "Xception": "[-1, 1]",
    "NASNet": "[-1, 1]", "MobileNetV3": "[0, 255]", "MobileNet": "[-1, 1]",
    "EfficientNet": "[0, 255]", "ConvNeXt": "[0, 255]", "ResNet": "caffe",
    "VGG": "caffe", "DenseNet": "torch",
}
_CALIBRATION_IMAGES = 8


def _reason(error: Exception, limit: int = 200) -> str:
  return " ".join(str(error).split())[:limit]


def _shape(shape) -> str:
  sizes = ", ".join("?" if size is None else str(size) for size in shape)
  return f"[{sizes}]"


class KerasNetwork:
  """A Keras model of which two layers are read.

  Args:
    model: with one input, images [B, H, W, C]; it is frozen.
    name: what errors call it.
    weights_sha256: hash of the weights if it is not that of the arrays.
    graph: description of the architecture, if not the model's JSON.
  """

  def __init__(self, model: keras.Model, name: str,
               weights_sha256: str | None = None, graph: str | None = None):
    model.trainable = False
    self._model = model
    self._name = name
    self.input_shape = tuple(model.inputs[0].shape[1:])
    self.weights_sha256 = weights_sha256 or fingerprint.arrays_sha256(
        model.get_weights())
    self.graph = graph or model.to_json()

  def select(self, pool_layer: str, logits_layer: str, size=None):
    """Reads two layers; `size` is for SavedModels.

    Returns:
      A function of float32 [B, H, W, C] to the pair ([B, D], [B, classes]); the
      Keras model of that pair; D.

    Raises:
      UserError: there is no such layer, or its output has another rank.
    """
    outputs = [self._output(layer) for layer in (pool_layer, logits_layer)]
    model = keras.Model(self._model.inputs, outputs, name=self._model.name)
    # training=False: neither dropout nor statistics of the batch.
    return (lambda images: model(images, training=False), model,
            outputs[0].shape[-1])

  def _output(self, name: str):
    """Symbolic output [B, features] of a layer."""
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
                      f"[B, features]. Received: {_shape(output.shape)}")
    return output


class SavedModelNetwork:
  """A SavedModel with a dictionary of outputs, loaded once.

  Called as TensorFlow 2 calls it, or else through its signature
  "serving_default" (or "default", as TF-Hub's first format has it). A SavedModel
  is a program: load only those that you trust.

  Args:
    folder: with saved_model.pb and variables.

  Raises:
    UserError: in one line, a folder that is not a complete SavedModel, or one
      that takes anything but one batch of float images.
  """

  graph = ""  # The hash is of the files, which hold weights and graph.

  def __init__(self, folder: str):
    _check_complete(folder)
    self._folder = folder
    self.weights_sha256 = _saved_model_sha256(folder)
    # TF-Hub's first format has no tags.
    tags = ([] if os.path.exists(os.path.join(folder, "tfhub_module.pb"))
            else None)
    try:
      with frozen_variables():
        # Kept: its variables live only as long as it does.
        self._loaded = tf.saved_model.load(folder, tags=tags)
    except Exception as error:  # TensorFlow raises many kinds for damage.
      hint = ""
      if not os.path.exists(os.path.join(folder, "variables",
                                         "variables.index")):
        hint = "variables/variables.index is missing; "
      raise UserError(f"{folder} is not a complete SavedModel: {hint}"
                      f"{_reason(error)}") from error
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
                      f"{_shape(images.shape)}: {'; '.join(failures)}")
    if not isinstance(outputs, dict):
      raise UserError(
          f"{self._folder} must give a dictionary with the outputs "
          f"{pool_key!r} and {logits_key!r}. Received: {type(outputs).__name__}")
    sizes = []
    for key in (pool_key, logits_key):
      if key not in outputs:
        raise UserError(f"features {self._folder} must be read from one of its "
                        f"outputs {', '.join(sorted(outputs))}. "
                        f"Received: {key!r}")
      shape = outputs[key].shape
      sizes.append(int(np.prod(shape[1:])))
      if shape[0] != 2 or len(shape) < 2 or sizes[-1] != shape[-1]:
        raise UserError(f"output {key!r} of {self._folder} must be [B, features]"
                        f" or [B, 1, 1, features]. Received: {_shape(shape)} "
                        "for 2 images")
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
      # TensorFlow 1's variables come out of a collection, past
      # `frozen_variables`; there is no public way to freeze them.
      for variable in signature.graph.variables:
        variable._trainable = False  # pylint: disable=protected-access
      arguments = signature.structured_input_signature[1]
      if len(arguments) == 1:
        [key] = arguments
        function = lambda x, key=key, call=signature: call(**{key: x})
      else:
        function = signature
      yield name, function, list(arguments.values())


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


def _saved_model_sha256(folder: str) -> str:
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


def hub_folder(handle: str) -> str:
  """Where TF-Hub keeps the SavedModel of a handle; nothing is downloaded.

  It is the folder named by the SHA-1 of the handle in $TFHUB_CACHE_DIR, or in
  `tfhub_modules` of the system's folder for temporary files, as
  tensorflow_hub 0.16 has it (`compressed_module_resolver.py`).

  Raises:
    UserError: it is not there; the line says how to get it.
  """
  cache = os.getenv("TFHUB_CACHE_DIR") or os.path.join(
      tempfile.gettempdir(), "tfhub_modules")
  folder = os.path.join(cache, hashlib.sha1(handle.encode()).hexdigest())
  if not os.path.isdir(folder):
    lock = folder + ".lock"
    state = (f"a download that has not ended, {lock}" if os.path.exists(lock)
             else "no such folder")
    raise UserError(
        f"{handle} must be in TF-Hub's cache, in the folder {folder} (cache: "
        f"TFHUB_CACHE_DIR). Received: {state}. Download "
        f"{handle}?tf-hub-format=compressed and unpack it there with tar -xzf, "
        "or anywhere and set load_features.path to that folder")
  return folder


def keras_application(name: str, weights: str | None, seed: int,
                      image_size: tuple[int, int] | None,
                      value_range: str | None) -> tuple[KerasNetwork, str]:
  """One of `keras.applications`, with logits.

  Args:
    name: of the function, such as "InceptionV3".
    weights: path of a file; "imagenet", which Keras downloads into its cache;
      or None for random ones, see `randomise`.
    seed: of random weights.
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
    raise UserError(f"features {KERAS_PREFIX}NAME must name one of "
                    f"{', '.join(known)}. Received: {name!r}")
  if value_range not in preprocessing.VALUE_RANGES:
    raise UserError(
        f"value_range of features {KERAS_PREFIX}{name} must be one of "
        f"{', '.join(map(repr, preprocessing.VALUE_RANGES))}. "
        f"Received: {value_range!r}")
  if weights not in (None, "imagenet") and not os.path.isfile(weights):
    raise UserError(
        "weights of features must be a file, 'imagenet', or None for random "
        f"ones. Received: {weights!r}")
  shape = None if image_size is None else (*image_size, 3)
  try:
    with frozen_variables():
      model = getattr(keras.applications, name)(
          weights=weights, input_shape=shape, classifier_activation=None)
  except Exception as error:  # No network, another architecture, no file.
    hint = ("; Keras downloads it once: copy it into ~/.keras/models, or give "
            "load_features.weights a file" if weights == "imagenet" else "")
    raise UserError(f"{KERAS_PREFIX}{name} cannot be built with the weights "
                    f"{weights!r}: {_reason(error)}{hint}") from error
  label = f"{KERAS_PREFIX}{name}"
  sha256 = None
  if weights is None:
    label += f" with RANDOM weights, seed {seed}"
    logging.warning(
        "features %s: they compare images, but their FID and Inception Score "
        "mean nothing beside published ones", label)
    # Of what the seed gives, which is the same on all machines; what
    # `calibrate` adds follows from it up to rounding.
    randomise(model, seed)
    sha256 = fingerprint.arrays_sha256(model.get_weights())
    calibrate(model, value_range, seed)
  # Not the JSON: it counts layers of all models that the process has built.
  graph = f"{name} {model.input_shape} Keras {keras.__version__}"
  return KerasNetwork(model, label, sha256, graph), label


def application_range(name: str) -> str | None:
  """The key of `preprocessing.VALUE_RANGES` that an application expects."""
  return next((value for prefix, value in _APPLICATION_RANGES.items()
               if name.startswith(prefix)), None)


def randomise(model: keras.Model, seed: int) -> None:
  """Draws all kernels anew: He et al. (2015), https://arxiv.org/abs/1502.01852.

  From NumPy's generator, for Keras's own would depend on what was built before.
  Biases and the parameters of normalisations stay as they are.
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
  training mode with no memory of older statistics mends it.
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

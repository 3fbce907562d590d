"""Classifiers in SavedModels, and TF-Hub's cache of them."""

import numpy as np
import tensorflow as tf

from ddss_tf.features import hub
from ddss_tf.networks import files as network_files
from ddss_tf.errors import UserError, shape_text


class SavedModelFeatures:
  """A SavedModel with a dictionary of outputs, loaded once.

  It has the interface of `keras_models.KerasNetwork`, which
  `network.FeatureNetwork` uses.

  It is called as TensorFlow 2 calls it, or else through its signature
  "serving_default" (or "default", as in TF-Hub's first format). A SavedModel is
  a program: load only those that you trust.

  Args:
    folder: the folder with saved_model.pb and variables.

  Raises:
    UserError: in one line, a folder that is not a complete SavedModel, or one
      that takes anything but one batch of float images.
  """

  graph = ""  # The hash of the files covers weights and graph.

  def __init__(self, folder: str):
    self._folder = folder
    # Kept, because its variables live only as long as it does.
    self._loaded = network_files.load(folder)
    self.weights_sha256 = network_files.sha256(folder)
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

  def select(self, pool_key: str, logits_key: str | None, size=None):
    """Reads two outputs, after a trial on two images of (height, width) `size`.

    Without logits, `logits_key` None, it reads one.

    Returns:
      The same as `KerasNetwork.select`; an output [B, 1, 1, D] is flattened to
      [B, D], as in TF-GAN.

    Raises:
      UserError: no way to call it works, an output is missing, or it is of
        another shape or not finite.
    """
    keys = [pool_key] if logits_key is None else [pool_key, logits_key]
    # A network that takes any size is tried at one large enough for any depth.
    height, width = size or (n or hub.INCEPTION_SIZE for n in self.input_shape[:2])
    images = tf.stack([tf.fill([height, width, self.input_shape[2]], value)
                       for value in (-0.5, 0.5)])
    failures = []
    for name, function, spec in self._ways:
      try:
        outputs = function(tf.cast(images, spec.dtype))
        break
      except Exception as error:  # A graph may raise anything.
        failures.append(f"{name}: {network_files.reason(error, 100)}")
    else:
      raise UserError(f"{self._folder} must take images "
                      f"{shape_text(images.shape)}: {'; '.join(failures)}")
    if not isinstance(outputs, dict):
      raise UserError(
          f"{self._folder} must give a dictionary with the outputs "
          f"{' and '.join(map(repr, keys))}. "
          f"Received: {type(outputs).__name__}")
    sizes = []
    for key in keys:
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
                   for key, size in zip(keys, sizes))

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
      network_files.freeze_signature(signature)
      arguments = signature.structured_input_signature[1]
      if len(arguments) == 1:
        [key] = arguments
        function = lambda x, key=key, call=signature: call(**{key: x})
      else:
        function = signature
      yield name, function, list(arguments.values())

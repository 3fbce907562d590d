"""Denoisers in TensorFlow SavedModels and Keras files."""

import os

import numpy as np
import tensorflow as tf

from ddss_tf import errors
from ddss_tf import storage
from ddss_tf.denoisers import inputs as inputs_lib
from ddss_tf.networks import files as network_files
from ddss_tf.errors import UserError, shape_text

KERAS_SUFFIX = ".keras"


def is_keras_file(path: str) -> bool:
  """Whether a path is a Keras model in one file."""
  return path.endswith(KERAS_SUFFIX) and storage.isfile(path)


def is_saved_model(path: str) -> bool:
  """Whether a path is a folder with a SavedModel, perhaps a damaged one."""
  return any(storage.exists(os.path.join(path, name))
             for name in ("saved_model.pb", "saved_model.pbtxt", "variables"))


class SavedModelNetwork:
  """A SavedModel from images and times to a prediction, loaded once.

  To `Denoiser` it looks as a Keras model does.

  Args:
    folder: the folder with saved_model.pb and variables.
    signature: the signature to call, or "__call__" for the object itself; None:
      "__call__", or else "serving_default", or else the only one.
    image_shape: (H, W, C), needed if the signature does not say.
    num_classes: the number of classes, given exactly if it takes labels too.

  Attributes:
    continuous_time: False if it takes whole numbers as times. Other times are
      then rounded.
    sha256: hash of the files, which hold weights and graph.
    variables: all variables.

  Raises:
    UserError: the folder is not a complete SavedModel, has no such signature,
      or has one that takes other inputs; in one line.
  """

  def __init__(self, folder: str, signature: str | None = None,
               image_shape=None, num_classes: int | None = None):
    self._loaded = network_files.load(folder)
    self.sha256 = network_files.sha256(folder)
    found = list(_entry_points(self._loaded))
    names = list(dict.fromkeys(name for name, *_ in found))
    if signature is not None and signature not in names:
      raise UserError(f"{folder}: signature must be one of {', '.join(names)}. "
                      f"Received: {signature!r}")
    if signature is None and len(names) > 1:
      known = [name for name in ("__call__", "serving_default")
               if name in names]
      found = [way for way in found if way[0] in known]
    elif signature is not None:
      found = [way for way in found if way[0] == signature]
    fitting = [(way, inputs_lib.input_places(way[2], num_classes)) for way in found]
    fitting = [(way, places) for way, places in fitting if places]
    if not fitting:
      refused = "; ".join(f"{name}({', '.join(map(str, specs))})"
                          for name, _, specs in found)
      raise UserError(
          f"{folder} must be callable, or have a signature, with "
          f"{inputs_lib.wanted_inputs(num_classes)}. Received: {refused[:300] or 'neither'}"
          + (f"; name one of the signatures {', '.join(names)}"
             if names and not found else ""))
    (self.entry_point, self._function, specs), places = fitting[0]
    self._places = places
    self._image, self._time, *self._label = (specs[i] for i in places)
    self.continuous_time = self._time.dtype.is_floating
    shape = self._image.shape[1:] if self._image.shape.rank else [None] * 3
    known = image_shape or (None,) * 3
    if any(None not in (a, b) and a != b for a, b in zip(shape, known)):
      raise UserError(f"{folder}: image_shape must be {shape_text(shape)}. "
                      f"Received: {shape_text(known)}")
    shape = tuple(a or b for a, b in zip(shape, known))
    if None in shape:
      raise UserError(f"{folder}: image_shape must be given, because its "
                      f"{self.entry_point} takes {shape_text(shape)}")
    self.input_shape = ((None, *shape), *[(None,)] * (len(places) - 1))
    self.variables = _variables(self._loaded)
    # What `inspect` counts, and what a SavedModel that calls this must hold.
    self.weights = self.variables
    self.layers = [self]
    self.tracked = [self._loaded]

  def __call__(self, inputs, training: bool = False):
    del training  # It was decided when the model was exported.
    x, t, *labels = inputs
    x = tf.cast(x, self._image.dtype)
    t = tf.cast(t if self.continuous_time else tf.round(t), self._time.dtype)
    if self._time.shape.rank == 2:
      t = t[:, None]
    fed = dict(zip(self._places, (x, t, *map(inputs_lib.as_input, labels, self._label))))
    outputs = self._function(*(fed[place] for place in sorted(fed)))
    flat = tf.nest.flatten(outputs)
    if len(flat) != 1:
      raise UserError(f"{self.entry_point} of the SavedModel must give one "
                      f"output, the prediction. Received: {len(flat)}")
    return flat[0]

  def count_params(self) -> int:
    """Number of weights."""
    return sum(int(np.prod(v.shape)) for v in self.variables)


def _entry_points(loaded):
  """Yields (name, function of the tensor inputs in order, their specs)."""
  if callable(loaded):
    concretes = getattr(loaded.__call__, "concrete_functions", [])
    # A Keras model has several. The one without dropout comes first.
    for concrete in sorted(concretes, key=lambda c: True in tf.nest.flatten(
        c.structured_input_signature)):
      structure = concrete.structured_input_signature
      flat = tf.nest.flatten(structure)
      places = [i for i, spec in enumerate(flat)
                if isinstance(spec, tf.TensorSpec)]

      def function(*tensors, structure=structure, flat=flat, places=places):
        values = list(flat)
        for place, tensor in zip(places, tensors):
          values[place] = tensor
        args, kwargs = tf.nest.pack_sequence_as(structure, values)
        return loaded(*args, **kwargs)

      yield "__call__", function, [flat[place] for place in places]
  for name, signature in getattr(loaded, "signatures", {}).items():
    network_files.freeze_signature(signature)
    specs = signature.structured_input_signature[1]

    def call(*tensors, signature=signature, names=tuple(specs)):
      return signature(**dict(zip(names, tensors)))

    yield name, call, list(specs.values())


def _variables(loaded) -> list[tf.Variable]:
  """All variables, each once, wherever the SavedModel keeps them."""
  found = list(getattr(loaded, "variables", []))
  for signature in getattr(loaded, "signatures", {}).values():
    found += signature.graph.variables
  for concrete in getattr(
      getattr(loaded, "__call__", None), "concrete_functions", []):
    found += concrete.graph.variables
  return list({id(v.handle): v for v in found}.values())


def check(denoiser, source: str) -> bool:
  """Tries a foreign network at four times, on two images in each call.

  Args:
    denoiser: the `Denoiser`.
    source: what the messages call it.

  Returns:
    Whether its prediction depends on the time in a differentiable way.

  Raises:
    UserError: the network fails, its output has another shape or is not finite,
      or it has no finite gradient with respect to its images; in one line.
  """
  last = denoiser.schedule.num_train_steps - 1
  by_time = False
  classes = denoiser.num_classes
  labels = (denoiser.example_labels(2) if classes is None
            else tf.constant([0, classes - 1]))
  taken = "" if classes is None else ", and labels [2]"
  for times in ([0, last // 3], [2 * last // 3, last]):
    x, t = denoiser.convention.inputs(
        denoiser.schedule,
        tf.random.stateless_normal([2, *denoiser.state_shape], [0, last]),
        tf.constant(times, tf.float32))
    try:
      with tf.GradientTape() as tape:
        tape.watch([x, t])
        output = denoiser.network(x, t, labels)
    except UserError:
      raise
    except Exception as error:  # Whatever the graph raises.
      raise UserError(
          f"{source} must take images {shape_text((2, *denoiser.state_shape))} "
          f"and times [2]{taken}: {errors.one_line(error)}") from error
    if not np.all(np.isfinite(output)):
      raise UserError(f"{source} must give finite predictions. Received: NaN "
                      f"or infinity at the times {np.asarray(t).tolist()}")
    try:
      by_x, by_t = tape.gradient(output, [x, t])
    except Exception as error:  # TensorFlow raises many kinds.
      raise UserError(
          f"{source} must have a gradient with respect to its images: "
          f"{errors.one_line(error)}") from error
    # A called function without a gradient gives zeros, not None.
    if by_x is None or not np.any(by_x):
      raise UserError(f"{source} must have a gradient with respect to its "
                      "images. Received: none")
    if not np.all(np.isfinite(by_x)):
      raise UserError(f"{source} must have a finite gradient with respect to "
                      "its images. Received: NaN or infinity")
    by_time |= (by_t is not None and bool(np.any(by_t))
                and bool(np.all(np.isfinite(by_t))))
  return by_time

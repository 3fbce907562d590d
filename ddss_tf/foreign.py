"""Denoisers of any maker: TensorFlow SavedModels and Keras models.

Such a file says what is computed, not what it means: prediction and schedule
are arguments of `load_denoiser`, or in a card beside it, `<path>.json`, of the
same words, such as

  {"prediction": "v", "schedule": {"name": "cosine", "num_train_steps": 1000},
   "time_scale": 0.001}

and, where a third input takes classes, "num_classes" and perhaps "null_label".
A SavedModel and a Keras file are programs: load only those that you trust.
"""

import os
from typing import Mapping

import numpy as np
import tensorflow as tf

from ddss_tf import checkpoints
from ddss_tf import errors
from ddss_tf import schedules
from ddss_tf.denoisers import conventions
from ddss_tf.denoisers import inputs as inputs_lib
from ddss_tf.networks import files as network_files
from ddss_tf.errors import UserError, check_whole, shape_text

KERAS_SUFFIX = ".keras"

CONVENTION_KEYS = ("process", "time_input", "time_scale", "time_offset")
CARD_KEYS = ("prediction", "schedule", "image_shape", "signature",
             "num_classes", "null_label", *CONVENTION_KEYS)


def is_keras_file(path: str) -> bool:
  """Whether it is a Keras model in one file."""
  return path.endswith(KERAS_SUFFIX) and os.path.isfile(path)


def is_saved_model(path: str) -> bool:
  """Whether it is a folder with a SavedModel, perhaps a damaged one."""
  return any(os.path.exists(os.path.join(path, name))
             for name in ("saved_model.pb", "saved_model.pbtxt", "variables"))


def read_card(path: str, given: Mapping[str, object]) -> dict:
  """Reads what the file does not tell.

  Args:
    path: of the model; `<path>.json` is read if it is there.
    given: values of `CARD_KEYS` that take precedence.

  Returns:
    See `parsed_card`; and "image_shape", "signature" and "num_classes", None if
    not given.

  Raises:
    UserError: keys that are missing, unknown, or of a value that is none.
  """
  card = merged_card(path, given, CARD_KEYS)
  return {
      **parsed_card(path, card),
      "image_shape": _image_shape(path, card.get("image_shape")),
      "signature": card.get("signature"),
      "num_classes": _whole_number(path, card, "num_classes", 1),
  }


def _card_path(path: str) -> str:
  return os.path.normpath(path) + ".json"


def merged_card(path: str, given: Mapping[str, object],
                keys: tuple[str, ...]) -> dict:
  """The card beside a file, if there is one, and what was given.

  Args:
    path: of the file.
    given: values that take precedence.
    keys: those that it may have.

  Raises:
    UserError: unknown keys, or not JSON.
  """
  source = _card_path(path)
  card = {}
  if os.path.exists(source):
    card = checkpoints.read_json_object(source)
  unknown = sorted(set(card) - set(keys))
  if unknown:
    raise UserError(f"{source}: keys must be among {', '.join(keys)}. "
                    f"Received: {', '.join(unknown)}")
  return card | given


def parsed_card(path: str, card: Mapping[str, object]) -> dict:
  """What a network means, by the words of a card.

  Args:
    path: of the model.
    card: as `merged_card` gives it.

  Returns:
    "prediction"; "schedule", a `NoiseSchedule`; "convention", the rest of
    `conventions.Convention`; "null_label", None if not given.

  Raises:
    UserError: keys that are missing, or of a value that is none.
  """
  missing = [key for key in ("prediction", "schedule") if key not in card]
  if missing:
    raise UserError(
        f"{', '.join(missing)} must be given, by {_card_path(path)} or as "
        f"arguments: the network does not tell. Received: {sorted(card)}")
  convention = {key: card[key] for key in CONVENTION_KEYS if key in card}
  try:
    conventions.Convention(card["prediction"], **convention)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  return {
      "prediction": card["prediction"],
      "schedule": read_schedule(path, card["schedule"]),
      "convention": convention,
      "null_label": _whole_number(path, card, "null_label", 0),
  }


def read_schedule(path: str, value) -> schedules.NoiseSchedule:
  """A schedule from itself or from the arguments of `make_schedule`.

  Args:
    path: of the model, for messages.
    value: a `NoiseSchedule`, or a dictionary.

  Raises:
    UserError: neither, or no such arguments.
  """
  if isinstance(value, schedules.NoiseSchedule):
    return value
  if not isinstance(value, dict):
    raise UserError(
        f"{path}: schedule must be a NoiseSchedule, or the arguments of "
        f"make_schedule by name. Received: {value!r}")
  try:
    return schedules.make_schedule(**value)
  except (TypeError, ValueError) as error:
    raise UserError(f"{path}: schedule: {errors.one_line(error)}"
                    ) from error


def _image_shape(path, value):
  if value is None:
    return None
  if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(
      type(size) is int and size > 0 for size in value):
    raise UserError(f"{path}: image_shape must be (height, width, channels). "
                    f"Received: {value!r}")
  return tuple(value)


def _whole_number(path, card, key, least):
  value = card.get(key)
  check_whole(f"{path}: {key}", value, least, optional=True)
  return value


# --- SavedModels ---


class SavedModelNetwork:
  """A SavedModel from images and times to a prediction, loaded once.

  To `Denoiser` it looks as a Keras model does.

  Args:
    folder: with saved_model.pb and variables.
    signature: the one to call, "__call__" for the object itself; None: that
      one, or else "serving_default", or else the only one.
    image_shape: (H, W, C) where the signature does not say.
    num_classes: given exactly if it takes labels too.

  Attributes:
    continuous_time: False if it takes whole numbers for times; those given are
      rounded.
    sha256: hash of the files, which hold weights and graph.
    variables: all of them.

  Raises:
    UserError: in one line, a folder that is not a complete SavedModel, without
      such a signature, or with one that takes anything else.
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
      raise UserError(f"{folder}: image_shape must be given, for its "
                      f"{self.entry_point} takes {shape_text(shape)}")
    self.input_shape = ((None, *shape), *[(None,)] * (len(places) - 1))
    self.variables = _variables(self._loaded)
    # What `inspect` counts, and what a SavedModel that calls this must hold.
    self.weights = self.variables
    self.layers = [self]
    self.tracked = [self._loaded]

  def __call__(self, inputs, training: bool = False):
    del training  # Decided when it was exported.
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
    # Of a Keras model, that without dropout first.
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


# --- Keras models ---


# --- Both ---


def check(denoiser, source: str) -> bool:
  """Tries a network that nobody knows, on two images at four times.

  Args:
    denoiser: the `Denoiser`.
    source: what the messages call it.

  Returns:
    Whether its prediction depends on the time in a differentiable way.

  Raises:
    UserError: in one line, a network that fails, whose output has another shape
      or is not finite, or without a gradient with respect to its images.
  """
  last = denoiser.schedule.num_train_steps - 1
  by_time = False
  classes = denoiser.num_classes
  labels = None if classes is None else tf.constant([0, classes - 1])
  taken = "" if classes is None else ", and labels [2]"
  for times in ([0, last // 3], [2 * last // 3, last]):
    x, t = denoiser.convention.inputs(
        denoiser.schedule,
        tf.random.stateless_normal([2, *denoiser.image_shape], [0, last]),
        tf.constant(times, tf.float32))
    try:
      with tf.GradientTape() as tape:
        tape.watch([x, t])
        output = denoiser.network(x, t, labels)
    except UserError:
      raise
    except Exception as error:  # Whatever the graph raises.
      raise UserError(
          f"{source} must take images {shape_text((2, *denoiser.image_shape))} "
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
    # A called function without one gives zeros, not None.
    if by_x is None or not np.any(by_x):
      raise UserError(f"{source} must have a gradient with respect to its "
                      "images. Received: none")
    if not np.all(np.isfinite(by_x)):
      raise UserError(f"{source} must have a finite gradient with respect to "
                      "its images. Received: NaN or infinity")
    by_time |= (by_t is not None and bool(np.any(by_t))
                and bool(np.all(np.isfinite(by_t))))
  return by_time

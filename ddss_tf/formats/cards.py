"""Denoisers of any maker: TensorFlow SavedModels and Keras models.

Such a file says what is computed, not what it means: prediction and schedule
are arguments of `load_denoiser`, or in a card beside it, `<path>.json`, of the
same words, such as

  {"prediction": "v", "schedule": {"name": "cosine", "num_train_steps": 1000},
   "time_scale": 0.001}

and, where a third input takes classes, "num_classes" and perhaps "null_label".
A SavedModel and a Keras file are programs: load only those that you trust.
"""

import math
import os
from typing import Mapping


from ddss_tf import errors
from ddss_tf import schedules
from ddss_tf import storage
from ddss_tf.denoisers import conventions
from ddss_tf.errors import UserError, check_whole

# More of anything is a slip; a network of 10**9 blocks would be built all day.
_LARGEST = 2**16


CONVENTION_KEYS = ("process", "time_input", "time_scale", "time_offset")
CARD_KEYS = ("prediction", "schedule", "image_shape", "signature",
             "num_classes", "null_label", *CONVENTION_KEYS)


def read_card(path: str, given: Mapping[str, object]) -> dict:
  """Reads what the file does not tell.

  Args:
    path: the path of the model; `<path>.json` is read if it is there.
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
    path: the path of the file.
    given: values that take precedence.
    keys: those that it may have.

  Raises:
    UserError: unknown keys, or not JSON.
  """
  source = _card_path(path)
  card = {}
  if storage.exists(source):
    card = read_json_object(source)
  unknown = sorted(set(card) - set(keys))
  if unknown:
    raise UserError(f"{source}: keys must be among {', '.join(keys)}. "
                    f"Received: {', '.join(unknown)}")
  return card | given


def parsed_card(path: str, card: Mapping[str, object]) -> dict:
  """What a network means, by the words of a card.

  Args:
    path: the path of the model.
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
    path: the path of the model, for messages.
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


# --- Keras models ---


# --- Both ---


def read_json_object(path: str) -> dict:
  """Reads a JSON file that holds an object.

  Raises:
    UserError: not JSON, or not an object.
  """
  try:
    values = storage.read_json(path)
  except ValueError as error:
    raise UserError(f"{path} is not JSON: {error}") from error
  if not isinstance(values, dict):
    raise UserError(f"{path} must be a JSON object")
  return values


def json_value(source: str, key: str, value, kind: type, least: int = 1):
  """A value of a JSON file as a field of an architecture.

  Args:
    source: the file, for the message.
    key: the key of the value, for messages.
    value: as JSON has it.
    kind: int; float; bool; str; or tuple, of whole numbers.
    least: whether numbers are positive, 1, or may be 0.

  Raises:
    UserError: of another kind, or out of range.
  """
  # type(), because True is an int.
  whole = lambda n: type(n) is int and least <= n <= _LARGEST
  if kind is tuple and isinstance(value, list) and all(map(whole, value)):
    return tuple(value)
  if kind is float and type(value) in (int, float) and (
      math.isfinite(value) and (value > 0 or value == least == 0)):
    return float(value)
  if kind is int and whole(value) or (
      kind in (bool, str) and type(value) is kind):
    return value
  whole_numbers = f"from {least} to {_LARGEST}"
  words = {int: f"a whole number {whole_numbers}",
           float: "a number, at least 0" if least == 0 else "a positive number",
           bool: "true or false", str: "a word",
           tuple: f"a list of whole numbers {whole_numbers}"}[kind]
  raise UserError(f"{source}: {key} must be {words}. Received: {value!r}")

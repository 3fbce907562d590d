"""Cards: what the file of a network does not tell, in JSON.

A TensorFlow SavedModel or a Keras file says what is computed, not what it
means. Prediction and schedule are given as arguments of `load_denoiser`, or by
the same names in a card beside the file, `<path>.json`, such as

  {"prediction": "v", "schedule": {"name": "cosine", "num_train_steps": 1000},
   "time_scale": 0.001}

If a third input takes classes, the card has "num_classes" too, and perhaps
"null_label". A SavedModel and a Keras file are programs: load only those that
you trust.
"""

import math
import os
from typing import Mapping

from ddss_tf import errors
from ddss_tf import schedules
from ddss_tf import storage
from ddss_tf.denoisers import conventions
from ddss_tf.errors import UserError, check_whole

# The largest whole number of an architecture. A larger one is a mistake, and a
# network of 10**9 blocks would take all day to build.
_LARGEST = 2**16

CONVENTION_KEYS = ("process", "time_input", "time_scale", "time_offset")
CARD_KEYS = ("prediction", "schedule", "image_shape", "signature",
             "num_classes", "null_label", "image_mean", "image_std",
             *CONVENTION_KEYS)


def read_card(path: str, given: Mapping[str, object]) -> dict:
  """Reads what the file does not tell.

  Args:
    path: the path of the model; `<path>.json` is read if it is there.
    given: values of `CARD_KEYS` that take precedence.

  Returns:
    What `parsed_card` gives, and "image_shape", "signature", "num_classes",
    "image_mean" and "image_std", each None if not given.

  Raises:
    UserError: a key is missing or unknown, or has a value that is not allowed.
  """
  card = merged_card(path, given, CARD_KEYS)
  return {
      **parsed_card(path, card),
      "image_shape": _image_shape(path, card.get("image_shape")),
      "signature": card.get("signature"),
      "num_classes": _whole_number(path, card, "num_classes", 1),
      "image_mean": card.get("image_mean"), "image_std": card.get("image_std"),
  }


def _card_path(path: str) -> str:
  return os.path.normpath(path) + ".json"


def merged_card(path: str, given: Mapping[str, object],
                keys: tuple[str, ...]) -> dict:
  """Merges what was given into the card beside a file, if there is one.

  Args:
    path: the path of the file.
    given: values that take precedence.
    keys: the keys that the card may have.

  Raises:
    UserError: the card has unknown keys, or is not JSON.
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
  """Reads from a card what a network's output means.

  Args:
    path: the path of the model.
    card: as `merged_card` gives it.

  Returns:
    "prediction"; "schedule", a `NoiseSchedule`; "convention", the other
    arguments of `conventions.Convention`; "null_label", None if not given.

  Raises:
    UserError: a key is missing, or has a value that is not allowed.
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
  """A schedule, made from the arguments of `make_schedule` if need be.

  Args:
    path: the path of the model, for messages.
    value: a `NoiseSchedule`, or a dictionary of those arguments.

  Raises:
    UserError: the value is neither, or `make_schedule` refuses the arguments.
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


def read_json_object(path: str) -> dict:
  """Reads a JSON file that holds an object.

  Raises:
    UserError: the file is not JSON, or not an object.
  """
  try:
    values = storage.read_json(path)
  except ValueError as error:
    raise UserError(f"{path} is not JSON: {error}") from error
  if not isinstance(values, dict):
    raise UserError(f"{path} must be a JSON object")
  return values


def check_given(path: str, given: Mapping[str, object], allowed) -> None:
  """Refuses arguments of `load_denoiser` that a path itself answers.

  Args:
    path: the path of the model.
    given: what was given, by name.
    allowed: names of the arguments that it takes.

  Raises:
    UserError: another argument was given.
  """
  for key, value in given.items():
    if key not in allowed:
      raise UserError(f"{key} must not be given for {path!r}, which has its "
                      f"own. Received: {key}={value!r}")


def check_keys(source: str, config: Mapping[str, object], known,
               required: Mapping[str, object] | None = None) -> None:
  """Refuses by name what a configuration has and we do not implement.

  Args:
    source: the file, for the message.
    config: what it holds. Keys that begin with "_" are let pass.
    known: the keys that may have any value.
    required: keys with a single value that is implemented.

  Raises:
    UserError: a key is not known, or has another value than is required.
  """
  required = required or {}
  for key, value in config.items():
    if key in required and value != required[key]:
      raise UserError(f"{source}: {key} must be {required[key]!r}. "
                      f"Received: {value!r}")
    if key not in required and key not in known and not key.startswith("_"):
      raise UserError(f"{source}: unknown key {key!r} (value {value!r})")


def choice(source: str, config: Mapping[str, object], key: str, known,
           default=None):
  """The value of a key, or its default.

  Raises:
    UserError: the value is not in `known`.
  """
  value = config.get(key, default)
  if value not in list(known):  # list(): the value may have no hash.
    raise UserError(f"{source}: {key} must be one of "
                    f"{', '.join(map(repr, known))}. Received: {value!r}")
  return value


def json_value(source: str, key: str, value, kind: type, least: int = 1):
  """Turns a value of a JSON file into a field of an architecture.

  Args:
    source: the file, for the message.
    key: the key of the value, for the message.
    value: as JSON has it.
    kind: int; float; bool; str; or tuple, for a list of whole numbers.
    least: 1 if numbers must be positive, 0 if they may be 0.

  Raises:
    UserError: the value is of another kind, or out of range.
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

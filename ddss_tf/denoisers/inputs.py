"""How a network of any maker is called: the order, kind and shape of its inputs."""

import itertools

import keras
from keras import ops
import tensorflow as tf

from ddss_tf.networks import layers
from ddss_tf.errors import shape_text


def wanted_inputs(num_classes: int | None) -> str:
  """The inputs of a denoiser, for messages."""
  text = "float images [B, H, W, C] of any B and a time for each, [B]"
  if num_classes is None:
    return "two inputs: " + text
  return (f"three inputs: {text}, and a label, in whole numbers [B] or as "
          f"[B, {num_classes}] or [B, {num_classes - 1}] of zeros and a one")


def _kinds(spec, num_classes: int | None) -> str:
  """What an input may be: "x" images, "t" times, "y" labels."""
  shape, dtype = tf.TensorShape(spec.shape), tf.as_dtype(spec.dtype)
  if shape.rank is not None and (shape.rank == 0 or shape[0] is not None):
    return ""
  if shape.rank == 2 and num_classes and shape[1] in (
      num_classes, num_classes - 1) and shape[1] > 1:
    return "y"
  if not (dtype.is_floating or dtype.is_integer):
    return ""
  if shape.rank is None:
    return "xt" if dtype.is_floating else "ty"
  if shape.rank == 1 or (shape.rank == 2 and shape[1] == 1):
    return "t" if dtype.is_floating else "ty"
  if dtype.is_floating and shape[1:].as_list() == [1, 1, 1]:
    return "xt"  # Times to be multiplied with images, or images of one pixel.
  return "x" if shape.rank == 4 and dtype.is_floating else ""


def _is_named_label(spec) -> bool:
  name = (spec.name or "").lower()
  return name == "y" or "label" in name or "class" in name


def input_places(specs, num_classes: int | None = None) -> tuple[int, ...] | None:
  """Which inputs are the images, the times and the labels.

  Args:
    specs: things with `name`, `shape` and `dtype`.
    num_classes: the number of classes of a class-conditional network, else
      None.

  Returns:
    Their indices in this order; None if they are not `wanted_inputs`, or cannot
    be told apart by dtype and rank. If two inputs may each be times or labels
    (whole numbers [B]), labels are the one whose name is "y" or has "label" or
    "class" in it, or else the one that comes last.
  """
  roles = "xt" if num_classes is None else "xty"
  if len(specs) != len(roles):
    return None
  kinds = [_kinds(spec, num_classes) for spec in specs]
  orders = [order for order in itertools.permutations(range(len(specs)))
            if all(role in kinds[place] for role, place in zip(roles, order))]
  if len({order[0] for order in orders}) != 1:
    return None
  return min(orders, key=lambda order: (
      len(orders) > 1 and not _is_named_label(specs[order[2]]), order))


def as_input(labels, spec):
  """Labels, int32 [B], in the form that an input takes."""
  if spec.shape.rank == 2 and spec.shape[1] > 1:
    return tf.one_hot(labels, spec.shape[1], dtype=spec.dtype)
  labels = tf.cast(labels, spec.dtype)
  return labels[:, None] if spec.shape.rank == 2 else labels


@keras.saving.register_keras_serializable(package="ddss_tf")
class TimeInput(keras.layers.Layer):
  """Times in the form that another model takes.

  Args:
    integer: the integer type that they are rounded to; None: floats.
    column: [B, 1] if True, [B] if False.
    axes: how many axes of length 1 follow the first; None: as `column` says.

  Call arguments:
    t: float [B].
  """

  def __init__(self, integer=None, column=False, axes=None, **kwargs):
    # Times reach 1000 and more: see `layers.TimeEmbedding`.
    kwargs.setdefault("dtype", "float32")
    super().__init__(**kwargs)
    self.integer = integer
    self.column = column
    self.axes = int(column) if axes is None else axes

  def call(self, t):
    if self.integer is not None:
      t = ops.cast(ops.round(t), self.integer)
    return t[(slice(None), *[None] * self.axes)]

  def get_config(self):
    return {**super().get_config(), "integer": self.integer,
            "column": self.column,
            **({} if self.axes == self.column else {"axes": self.axes})}


def adapted(model, num_classes: int | None = None):
  """Makes a Keras model one of [x_t, t] or [x_t, t, labels].

  Args:
    model: one that takes these in any order. Its times may be integers, [B, 1]
      or [B, 1, 1, 1], and its labels [B, 1], or [B, classes] of zeros and a
      one. A subclassed model, which does not tell its inputs, and one with more
      than one but another number of inputs pass as they are.
    num_classes: the number of classes, given exactly if it takes labels.

  Returns:
    A model from float32 [B, H, W, C], float32 [B] and, if it takes labels,
    int32 [B].

  Raises:
    ValueError: the inputs are not these; see `input_places`.
  """
  inputs = getattr(model, "inputs", None)
  if inputs is None or (len(inputs) > 1 and
                        len(inputs) != 2 + (num_classes is not None)):
    return model
  places = input_places(inputs, num_classes)
  if places is None:
    raise ValueError(
        f"a denoiser must have {wanted_inputs(num_classes)}. Received: "
        + ", ".join(f"{i.name} {shape_text(i.shape)} {i.dtype}"
                    for i in inputs))
  image, time, *label = (inputs[place] for place in places)
  floating = keras.backend.is_float_dtype(time.dtype)
  if (places == tuple(range(len(inputs))) and floating
      and all(len(i.shape) == 1 for i in inputs[1:])
      and isinstance(model.input, (list, tuple))):
    return model
  x = keras.Input(image.shape[1:], name="x_t")
  t = keras.Input((), name="t")
  outer = [x, t]
  axes = len(time.shape) - 1
  fed = [x, TimeInput(None if floating else time.dtype, axes == 1, axes,
                      name="time_input")(t)]
  if label:
    labels = keras.Input((), dtype="int32", name="labels")
    outer.append(labels)
    *_, width = label[0].shape
    if len(label[0].shape) == 1:
      fed.append(labels)
    elif width == 1:
      fed.append(keras.layers.Reshape((1,), name="label_input")(labels))
    else:
      fed.append(layers.OneHot(width, name="label_input")(labels))
  by_place = dict(zip(places, fed))
  ordered = [by_place[place] for place in sorted(by_place)]
  return keras.Model(outer, model(keras.tree.pack_sequence_as(
      model.input, ordered)), name=model.name)


def conditional(model, names):
  """Checks that a model maps [x_t, t, *conditions], and gives it back.

  Args:
    model: a Keras model, or any function, which does not tell its inputs.
    names: names of the conditions.

  Raises:
    ValueError: the model's inputs are not these, in this order.
  """
  inputs = getattr(model, "inputs", None)
  if inputs is None:
    return model
  _, *rest = inputs
  if (len(inputs) != 2 + len(names) or not isinstance(model.input, (list, tuple))
      or len(inputs[0].shape) != 4 or len(rest[0].shape) != 1
      or any(not keras.backend.is_float_dtype(i.dtype) for i in inputs)):
    raise ValueError(
        "a network of conditions must take float images [B, H, W, C], times [B] "
        f"and {', '.join(names)}, in this order. Received: "
        + ", ".join(f"{i.name} {shape_text(i.shape)} {i.dtype}" for i in inputs))
  return model


def is_continuous(model) -> bool:
  """Whether a network takes fractional times, as far as its inputs tell."""
  if hasattr(model, "continuous_time"):
    return model.continuous_time
  return not any(isinstance(layer, TimeInput) and layer.integer is not None
                 for layer in getattr(model, "layers", ()))


def state_shape(model, told) -> tuple[int, int, int]:
  """(H, W, C) of a model; where the model leaves it open, as told.

  Raises:
    ValueError: what is told is not the model's shape, or must be told and is
      not.
  """
  shape = model.input_shape[0][1:] if hasattr(model, "input_shape") else None
  shape = tuple(shape or (None,) * 3)
  told = tuple(told or shape)
  if len(told) != 3 or any(
      None not in (a, b) and a != b for a, b in zip(shape, told)):
    raise ValueError(f"image_shape must be {shape_text(shape)}. "
                     f"Received: {shape_text(told)}")
  if None in told:
    raise ValueError("image_shape must be given, because the model takes "
                     f"{shape_text(shape)}")
  return told

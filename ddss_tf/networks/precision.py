"""The number format in which a frozen network computes.

Weights, coefficients and losses stay float32; see
https://keras.io/api/mixed_precision/. In bfloat16 the activations take half the
memory. It is faster on hardware that has bfloat16, and slower on other
hardware.
"""

import keras

from ddss_tf.errors import UserError
from ddss_tf.networks.frozen import frozen_variables

FLOAT32 = "float32"
BFLOAT16 = "mixed_bfloat16"
# What can be asked for. float16 cannot, because its gradients would need a loss
# scale. A network that was saved in it is used as it is.
POLICIES = (FLOAT32, BFLOAT16)
FLOAT16 = "mixed_float16"


def policy(model) -> str:
  """A model's policy, one of `POLICIES` or `FLOAT16`.

  It is not float32 if any layer computes in another of them.
  """
  layers = model.layers if isinstance(model, keras.Model) else ()
  computed = {layer.compute_dtype for outer in layers
              for layer in outer._flatten_layers()}  # pylint: disable=protected-access
  for name, dtype in ((BFLOAT16, "bfloat16"), (FLOAT16, "float16")):
    if dtype in computed:
      return name
  return FLOAT32


def with_policy(model, name: str) -> keras.Model:
  """A functional Keras model that computes in another format.

  Two kinds of layers stay in float32 (our choice). The first take one number
  for each image, such as a time: bfloat16 would merge neighbouring times beyond
  256. The others give the outputs.

  Args:
    model: the model, which stays as it is.
    name: one of `POLICIES`.

  Returns:
    A copy with the same weights, frozen; the model itself if it has the policy.

  Raises:
    UserError: the policy is unknown; the model is not a functional Keras model
      (the format of a SavedModel was decided when it was written); its weights
      are not float32.
  """
  if name not in POLICIES:
    raise UserError(f"dtype_policy must be one of {', '.join(POLICIES)}. "
                    f"Received: {name!r}")
  if policy(model) == name:
    return model
  if not isinstance(model, keras.Model) or getattr(model, "inputs", None) is (
      None):
    raise UserError("dtype_policy must be that of a functional Keras model. "
                    f"Received: {name!r} for a {type(model).__name__}")
  kept = {variable.dtype for variable in model.variables
          if "float" in variable.dtype} - {FLOAT32}
  if kept:
    raise UserError("dtype_policy must be None for a network whose weights are "
                    f"not float32. Received: {name!r} for weights in "
                    f"{', '.join(sorted(kept))}")
  with frozen_variables():
    copy = keras.models.clone_model(model)
  copy.trainable = False
  for variable, value in zip(copy.variables, model.variables, strict=True):
    variable.assign(value)
  _set_policy(copy, name)
  return copy


def _set_policy(model: keras.Model, name: str) -> None:
  """Changes the policy of a model's layers, in place."""
  outputs = {id(tensor) for tensor in keras.tree.flatten(model.output)}
  for layer in model.layers:
    if isinstance(layer, keras.Model):
      if policy(layer) != name:
        _set_policy(layer, name)
      continue
    nodes = layer._inbound_nodes  # pylint: disable=protected-access
    inputs = [tensor for node in nodes for tensor in node.input_tensors]
    last = any(id(tensor) in outputs for node in nodes
               for tensor in node.outputs)
    if name == BFLOAT16 and (last or any(map(_is_a_number, inputs))):
      continue
    for inner in layer._flatten_layers():  # pylint: disable=protected-access
      inner.dtype_policy = name


def _is_a_number(tensor) -> bool:
  """Whether a tensor has one number for each image: [B] or [B, 1]."""
  return len(tensor.shape) < 2 or tuple(tensor.shape[1:]) == (1,)

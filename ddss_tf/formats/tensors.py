"""What the readers of foreign checkpoints share.

A reader knows its format's names and layouts. This module checks for all of
them that no tensor is left over, no variable is left unfilled, and no weight is
NaN.
"""

from typing import Callable, Iterable, Mapping

import keras
import numpy as np

from ddss_tf import errors
from ddss_tf.networks import unet
from ddss_tf.errors import UserError
from ddss_tf.networks.frozen import frozen_variables

# From (path of a variable, tensor, shape of the variable) to its value.
Relayout = Callable[[str, np.ndarray, tuple[int, ...]], np.ndarray]


def read_state_dict(path: str) -> dict[str, np.ndarray]:
  """Reads a state dict of PyTorch. Runs no code from the file.

  Args:
    path: the path of the file, ".pt" or ".bin".

  Returns:
    float32 arrays by the file's names.

  Raises:
    UserError: PyTorch is not installed; the file is truncated, not a state
      dict, or has values that are not finite.
  """
  try:
    import torch  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise UserError("PyTorch must be installed to read a .pt or .bin file (pip "
                    f"install torch; the CPU build will do). Received: {path!r}"
                    ) from error
  try:
    state = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # PyTorch raises many kinds for a damaged file.
    raise UserError(f"{path} is not a complete PyTorch state dict: "
                    f"{errors.one_line(error)}") from error
  if not isinstance(state, dict) or not all(
      isinstance(value, torch.Tensor) for value in state.values()):
    raise UserError(f"{path} must hold a state dict, tensors by name. "
                    f"Received: {type(state).__name__}")
  for name, value in state.items():
    if not value.is_floating_point():
      raise UserError(f"{path}: {name} must hold floats. "
                      f"Received: {value.dtype}")
  try:
    # float() first: NumPy has no bfloat16.
    arrays = {name: value.detach().float().numpy()
              for name, value in state.items()}
  except Exception as error:  # A sparse or quantised tensor.
    raise UserError(f"{path} must hold plain tensors: {errors.one_line(error)}"
                    ) from error
  return finite_float32(path, arrays)


def finite_float32(
    source: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Casts weights to float32.

  Args:
    source: what they were read from, for the message.
    weights: arrays by name.

  Raises:
    UserError: an array does not hold floats, or holds NaN, infinity or a value
      that float32 cannot hold. The message names the array.
  """
  result = {}
  for name, value in weights.items():
    # bfloat16 is not NumPy's own (ml_dtypes adds it), so its kind is not "f".
    if value.dtype.kind != "f" and value.dtype.name != "bfloat16":
      raise UserError(f"{source}: {name} must hold floats. "
                      f"Received: {value.dtype.name}")
    with np.errstate(over="ignore"):
      result[name] = value.astype(np.float32)
    if not np.all(np.isfinite(result[name])):
      raise UserError(f"{source}: {name} holds NaN or infinite weights")
  return result


def torch_layout(path: str, value: np.ndarray,
                 shape: tuple[int, ...]) -> np.ndarray:
  """Re-lays a tensor of PyTorch for a variable of Keras.

  Convolutions go from OIHW to HWIO, dense layers from [out, in] to [in, out].
  For some dense layers the checkpoint has 1x1 convolutions of one or two
  dimensions. What does not fit passes unchanged, and `matched` refuses it.

  Args:
    path: the path of the variable; only kernels change.
    value: the tensor.
    shape: the shape of the variable.
  """
  if not path.endswith("/kernel"):
    return value
  if len(shape) == 2 and value.ndim > 2 and set(value.shape[2:]) == {1}:
    value = value.reshape(value.shape[:2])
  if value.ndim == 4:
    return value.transpose(2, 3, 1, 0)
  return value.T if value.ndim == 2 else value


def shape_of(weights: Mapping[str, np.ndarray], name: str, rank: int,
             source: str) -> tuple[int, ...]:
  """Shape of a tensor that every checkpoint of a kind has.

  Args:
    weights: the tensors of the checkpoint by its names.
    name: the tensor's name.
    rank: its number of dimensions.
    source: the kind, for the message, such as "a DDPM checkpoint".

  Raises:
    UserError: there is no such tensor, or it has another rank.
  """
  if name not in weights:
    raise UserError(f"{source} must hold {name}. "
                    f"Received: {sorted(weights)[:5]}")
  shape = weights[name].shape
  if len(shape) != rank:
    raise UserError(
        f"tensor {name} must have {rank} dimensions. Received: shape {shape}")
  return shape


def matched(
    weights: Mapping[str, np.ndarray],
    variables: Iterable[tuple[str, tuple[int, ...]]],
    source_name: Callable[[str], str],
    relayout: Relayout,
) -> dict[str, np.ndarray]:
  """Finds and re-lays the value of every variable.

  Args:
    weights: the tensors of the checkpoint by its names.
    variables: (path, shape) of every variable to fill.
    source_name: the checkpoint's name of what fills the variable `path`.
      Several variables may share a tensor.
    relayout: from (path, tensor, shape of the variable) to its value.

  Returns:
    Values by our paths.

  Raises:
    UserError: a variable finds no tensor or one of another shape, or a tensor
      finds no variable. The message has the names.
  """
  names = {path: source_name(path) for path, _ in variables}
  missing = list(dict.fromkeys(
      name for name in names.values() if name not in weights))
  unused = sorted(set(weights) - set(names.values()))
  if missing or unused:
    raise UserError("weights and architecture must match. "
                    f"Missing: {_some(missing)}. Unused: {_some(unused)}")
  values = {}
  for path, shape in variables:
    value = relayout(path, weights[names[path]], shape)
    if value.shape != shape:
      raise UserError(
          f"tensor {names[path]} must have the shape {shape} (ours). "
          f"Received: {value.shape}")
    values[path] = value
  return values


def _some(names: list[str]) -> str:
  shown = ", ".join(names[:5]) or "none"
  return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def frozen(source: str, build: Callable[..., keras.Model],
           config) -> keras.Model:
  """Builds a network, frozen, with weights that mean nothing yet.

  Args:
    source: what is read, for the message.
    build: a function from the architecture to the network.
    config: the architecture.

  Raises:
    UserError: it cannot be built.
  """
  try:
    with frozen_variables():
      model = build(config)
  except (TypeError, ValueError) as error:  # TypeError: "32" for 32.
    raise UserError(
        f"{source} describes a network that cannot be built: "
        f"{errors.one_line(error)}") from error
  model.trainable = False
  return model


def fill(model: keras.Model, values: Mapping[str, np.ndarray]) -> None:
  """Gives every variable its value, by its path."""
  for variable in model.weights:
    variable.assign(values[variable.path])


def build_frozen(
    source: str,
    config: unet.UNetConfig,
    to_keras: Callable[[list[tuple[str, tuple[int, ...]]]],
                       dict[str, np.ndarray]],
) -> keras.Model:
  """Builds the U-Net of a checkpoint, frozen, with its weights.

  Args:
    source: what is read, for the message.
    config: the architecture.
    to_keras: a function from the list of (path, shape) of every variable to
      their values by path.

  Raises:
    UserError: the architecture cannot be built, or what `to_keras` raises.
  """
  model = frozen(source, unet.build_unet, config)
  fill(model, to_keras([(v.path, tuple(v.shape)) for v in model.weights]))
  return model

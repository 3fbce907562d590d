"""The exported sampler for other runtimes: ONNX and TensorFlow Lite.

Both are one file with sampler and network. Like `from_noise` of the SavedModel
it takes x_T and step_noise (and labels) and gives images. The caller draws the
noise, because these formats lack TensorFlow's stateless random generators.
"""

import importlib.util
import warnings

import numpy as np
import tensorflow as tf

from ddss_tf import storage
from ddss_tf.errors import UserError

# Modules that a format needs besides this package. The extra of the same name
# installs them.
_MODULES = {"onnx": ("tf2onnx", "onnxruntime"), "tflite": ()}
FORMATS = tuple(_MODULES)
# Formats for which the network is traced K times. TensorFlow Lite's converter
# loses the image's height, and then fails at a convolution, if a function that
# holds a `tf.repeat`, as in Keras' UpSampling2D, is called twice.
INLINED = ("tflite",)
_OPSET = 17
_PARITY_TOLERANCE = 1e-4


def check_installed(name: str) -> None:
  """Checks that a format can be written and run here.

  Args:
    name: one of `FORMATS`.

  Raises:
    UserError: says what to install.
  """
  missing = [module for module in _MODULES[name]
             if importlib.util.find_spec(module) is None]
  if missing:
    raise UserError(f"export to {name!r} needs {' and '.join(missing)}: "
                    f"pip install 'ddss_tf[{name}]'")


def write(path: str, name: str, module: tf.Module, from_noise,
          inputs: dict[str, np.ndarray], expected: np.ndarray) -> None:
  """Writes one file, after its own runtime has reproduced the images.

  The unrolled chain has the network K times, so converting a large network
  takes minutes. The weights are in the file once.

  Args:
    path: the path of the file; what is there stays if anything fails.
    name: one of `FORMATS`.
    module: the owner of the weights.
    from_noise: the `tf.function` to write, with a signature.
    inputs: arguments of it, by name.
    expected: float32 [B, H, W, C], the images it makes of them.

  Raises:
    UserError: a package is missing, the format lacks an operation, or the
      images differ.
  """
  check_installed(name)
  convert, run = {"onnx": (_to_onnx, _run_onnx),
                  "tflite": (_to_tflite, _run_tflite)}[name]
  try:
    content = convert(module, from_noise)
    received = run(content, inputs)
  except Exception as error:  # Converters and runtimes raise many kinds.
    raise UserError(f"the sampler cannot be written as {name}: "
                    f"{' '.join(str(error).split())[:300]}") from error
  difference = float(np.max(np.abs(expected - received)))
  if not difference <= _PARITY_TOLERANCE:
    raise UserError(
        f"images of the {name} file must equal those in memory to "
        f"{_PARITY_TOLERANCE:g}. Received: a difference of {difference:g}")
  with storage.replacing(path) as temporary:
    with storage.open(temporary, "wb") as f:
      f.write(content)


def _to_onnx(module, from_noise) -> bytes:
  del module
  import tf2onnx  # pylint: disable=g-import-not-at-top
  signature = from_noise.input_signature
  proto, _ = tf2onnx.convert.from_function(
      from_noise, input_signature=signature, opset=_OPSET,
      custom_op_handlers={
          name: _handler(formula) for name, formula in _MISSING.items()})
  # TensorFlow's graph has the names in lower case: restore those as given.
  names = {spec.name.lower(): spec.name for spec in signature}
  for value in proto.graph.input:
    value.name = names.get(value.name, value.name)
    value.type.tensor_type.shape.dim[0].dim_param = "batch"
  for node in proto.graph.node:
    for i, name in enumerate(node.input):
      node.input[i] = names.get(name, name)
  for value in proto.graph.output:
    value.type.tensor_type.shape.dim[0].dim_param = "batch"
  return proto.SerializeToString()


def _handler(formula):
  """What tf2onnx calls for an operation of one input that ONNX lacks.

  Args:
    formula: (add, x) -> y, where x and y are names of tensors. `add(kind,
      *inputs)` adds an operation of ONNX on names and numbers, and gives the
      name of its output.
  """

  def handle(graph, node, name, args):
    del args
    (x,), outputs = list(node.input), list(node.output)
    shapes, dtypes = node.output_shapes, node.output_dtypes

    from tf2onnx import utils  # pylint: disable=g-import-not-at-top

    def add(kind, *inputs):
      inputs = [
          value if isinstance(value, str) else graph.make_const(
              utils.make_name(f"{name}/{kind}"), np.float32(value)).output[0]
          for value in inputs]
      return graph.make_node(
          kind, inputs, shapes=shapes, dtypes=dtypes).output[0]

    y = formula(add, x)
    graph.remove_node(node.name)
    graph.make_node("Identity", [y], outputs=outputs, shapes=shapes,
                    dtypes=dtypes, name=name)

  return handle, []


def _expm1(add, x):
  """exp(x) - 1 as tanh(x / 2) (exp(x) + 1), which is accurate near 0 as well.

  sigma_t of models that predict x0 or v needs it there.
  """
  return add("Mul", add("Tanh", add("Mul", x, 0.5)),
             add("Add", add("Exp", x), 1.0))


def _log1p(add, x):
  """log(1 + x), corrected for the rounding of 1 + x.

  Networks whose time input is log(sigma), such as EDM's, take it of small x.
  """
  rounded = add("Add", x, 1.0)
  lost = add("Sub", x, add("Sub", rounded, 1.0))
  return add("Add", add("Log", rounded), add("Div", lost, rounded))


def _erfc(add, x):
  """1 - erf(x), inaccurate where it is near 0: GELU, its user, allows that."""
  return add("Sub", 1.0, add("Erf", x))


_MISSING = {"Expm1": _expm1, "Log1p": _log1p, "Erfc": _erfc}


def _run_onnx(content: bytes, inputs: dict[str, np.ndarray]) -> np.ndarray:
  import onnxruntime  # pylint: disable=g-import-not-at-top
  session = onnxruntime.InferenceSession(
      content, providers=["CPUExecutionProvider"])
  # A sampler of one step adds no noise: the converter drops that input.
  names = [value.name for value in session.get_inputs()]
  return session.run(["images"], {name: inputs[name] for name in names})[0]


def _to_tflite(module, from_noise) -> bytes:
  return tf.lite.TFLiteConverter.from_concrete_functions(
      [from_noise.get_concrete_function()], module).convert()


def _run_tflite(content: bytes, inputs: dict[str, np.ndarray]) -> np.ndarray:
  with warnings.catch_warnings():
    # The warning is that this class moves to the package ai-edge-litert.
    warnings.simplefilter("ignore")
    interpreter = tf.lite.Interpreter(model_content=content)
  return interpreter.get_signature_runner("serving_default")(**inputs)["images"]

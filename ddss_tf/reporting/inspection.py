"""A description of a model, and an estimate of a search's memory."""

import collections
import itertools
import math

import gin
import numpy as np
import tensorflow as tf

from ddss_tf import bindings
from ddss_tf.datasets.dataset import ImageDataset, as_dataset
from ddss_tf.denoisers import wiring
from ddss_tf.denoisers.decoder import Decoder
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.features.network import FeatureNetwork, as_networks, check_shapes
from ddss_tf.formats.saved_model import SavedModelNetwork
from ddss_tf.schedules import ExplodingSchedule, FlowSchedule

# Operations whose results are views, or are not kept for backpropagation.
_NOT_KEPT = {"Const", "ReadVariableOp", "Placeholder", "Identity", "IdentityN",
             "Reshape", "Shape", "StridedSlice", "NoOp", "ExpandDims"}
# The share of the activations that a call, compiled together with its gradient,
# holds at once. Measured with XLA on a CPU: 0.33 for 32 to 256 images of the
# digits model, 0.38 for 2 to 12 images of a CIFAR-10 model.
HELD_SHARE = 0.4
_SHOWN_CLASSES = 20  # The most classes whose frequencies are told one by one.
COMPILER_BYTES = 0.7 * 2**30  # What the compiler itself takes.


def activation_bytes(denoiser: Denoiser) -> int:
  """Bytes of the activations of one call for one image.

  This is the sum of all floating-point results in the call's graph, the most
  that backpropagation through it keeps. The graph of a SavedModel is closed:
  there it is what backpropagation does keep, about a fifth less.
  """
  specs = [tf.TensorSpec((1, *denoiser.state_shape)), tf.TensorSpec((1,))]
  labels = denoiser.example_labels(1)
  if labels is not None:
    specs.append(tf.nest.map_structure(tf.TensorSpec.from_tensor, labels))
  if isinstance(denoiser.model, SavedModelNetwork):
    return _kept_bytes(denoiser, specs)
  graph = tf.function(denoiser.eps).get_concrete_function(*specs).graph
  return sum(
      output.dtype.size * int(np.prod(output.shape))
      for operation in graph.get_operations()
      if operation.type not in _NOT_KEPT for output in operation.outputs
      if output.dtype.is_floating and output.shape.is_fully_defined())


def _kept_bytes(denoiser: Denoiser, specs) -> int:
  """Bytes that function calls in the denoiser hand to their gradients."""

  def gradient(x, t, labels=None):
    with tf.GradientTape() as tape:
      tape.watch([x, t])
      eps = denoiser.eps(x, t, labels)
    return tape.gradient(eps, [x, t])

  graph = tf.function(gradient).get_concrete_function(*specs).graph
  # Weights are handed over, too. They are told apart by their shapes, which are
  # fully known, while the batch size of activations is open.
  return sum(
      output.dtype.size * int(np.prod([size or 1 for size in output.shape]))
      for operation in graph.get_operations()
      if operation.type in ("PartitionedCall", "StatefulPartitionedCall")
      for output in operation.outputs
      if output.dtype.is_floating and output.shape.rank is not None
      and not output.shape.is_fully_defined())


def feature_bytes(features: FeatureNetwork,
                  image_shape: tuple[int, int, int]) -> int:
  """Bytes of the activations of a feature network for one image.

  This is the sum of all floating-point results in its graph and in the
  functions that it calls, the most that a gradient in the image keeps.

  Args:
    features: the network, with the preprocessing of its images.
    image_shape: (H, W, C) of the denoiser's images.
  """
  return _graph_bytes(lambda images: features(images)["pool"],
                      (1, *image_shape))


def decoder_bytes(decoder: Decoder) -> int:
  """Bytes of what a decoder keeps for the gradient of the images it makes at once.

  This is the sum of all floating-point results in its graph. It does not grow
  with the batch.
  """
  return _graph_bytes(
      lambda latents: decoder.model(latents, training=False),
      (decoder.batch_size, *decoder.state_shape))


def _graph_bytes(function, shape) -> int:
  """Bytes of all floating-point results in a function's graph."""
  graph = tf.function(function).get_concrete_function(
      tf.TensorSpec(shape)).graph.as_graph_def(add_shapes=True)
  total = 0
  for node in itertools.chain(
      graph.node, *(each.node_def for each in graph.library.function)):
    dtype = tf.dtypes.as_dtype(
        node.attr["T"].type or node.attr["dtype"].type or tf.float32)
    if node.op in _NOT_KEPT or not dtype.is_floating:
      continue
    total += dtype.size * sum(
        # An open batch size is -1, and counts as one image.
        math.prod(abs(size.size) for size in shape.dim)
        for shape in node.attr["_output_shapes"].list.shape
        if not shape.unknown_rank)
  return total


def _process(denoiser: Denoiser) -> str:
  """The forward process, in one line."""
  schedule = denoiser.schedule
  steps = schedule.num_train_steps
  if isinstance(schedule, FlowSchedule):
    return f"T = {steps}, flow, shift = {schedule.shift:.4g}"
  noise = (f"sigma from {schedule.sigmas[0]:.3g} to {schedule.sigmas[-1]:.3g}"
           if isinstance(schedule, ExplodingSchedule) else
           f"beta from {schedule.betas[0]:.3g} to {schedule.betas[-1]:.3g}")
  return (f"T = {steps}, {noise}, "
          f"alpha_bar_T = {float(schedule.abar(steps - 1)):.3g}")


def _times(denoiser: Denoiser) -> str:
  """What the network gets as its time, in one line."""
  fed = denoiser.convention.non_default()
  fed.pop("prediction", None)
  parts = [f"{name} = {value:.4g}" if isinstance(value, float) else
           f"{name} = {value}" for name, value in fed.items()]
  parts.append("may be learned" if denoiser.continuous_time else
               "whole steps, or without gradient: no +time")
  return ", ".join(parts)


def _images(denoiser):
  """The shape of the images, and of the latents if there are any."""
  shape = " x ".join(map(str, denoiser.image_shape)) + ", in [-1, 1]"
  if denoiser.decoder is None:
    return shape
  return f"{shape}, {denoiser.decoder.description}"


def _classes(denoiser):
  """The number of classes and the guidance, in one line."""
  if denoiser.conditions and denoiser.table is None:
    return f"a table of {', '.join(denoiser.conditions)} is needed"
  if denoiser.num_classes is None:
    return "none: unconditional"
  null = ("" if denoiser.null_label is None
          else f", label {denoiser.null_label} stands for none")
  if denoiser.table is not None:
    null = ("" if denoiser.null_label is None else ", with negative prompts")
  guidance = ("" if denoiser.guidance_scale is None else
              f", guidance {denoiser.guidance_scale:g}: 2 calls a step")
  classes = (denoiser.num_classes if denoiser.table is None
             else denoiser.table.description)
  weights = ""
  if not denoiser.conditions:
    weights = ", drawn as often as the data set has them, uniformly without one"
  if isinstance(denoiser.told_weights, str):
    weights = ", drawn uniformly, as told"
  elif denoiser.label_weights is not None:
    weights = ", drawn as often as told"
    if not denoiser.conditions and denoiser.num_classes <= _SHOWN_CLASSES:
      weights += " (" + ", ".join(
          f"{100 * share:.1f}" for share in denoiser.label_weights) + " %)"
  return f"{classes}{null}{guidance}{weights}"


def _architecture(denoiser: Denoiser) -> str:
  """What is known of the network's architecture, in one line."""
  known = denoiser.architecture
  if not known:
    return "not told: see the layers"
  return "; ".join(
      f"{name.replace('_', ' ')} " + (
          ", ".join(map(str, value)) if isinstance(value, (list, tuple))
          else str(value))
      for name, value in known.items())


@bindings.configurable(denylist=["run_dir"])
def inspect(run_dir: str | None = None, denoiser: Denoiser = gin.REQUIRED,
            features: FeatureNetwork | list[FeatureNetwork] | None = None,
            num_steps: int = 10, micro_batch_size: int = 64,
            dataset: ImageDataset | np.ndarray | None = None) -> str:
  """Says what a denoiser is and what a search of it would need.

  Args:
    run_dir: not used; nothing is written.
    denoiser: the model.
    features: the network or networks of the search's loss, whose memory counts.
    num_steps: K of the search.
    micro_batch_size: images per chain of the search.
    dataset: images that the network was trained on, or like these; with them it
      is checked whether it is called and read as it was trained to be, see
      `wiring`.

  Returns:
    Lines of text: architecture, prediction, image shape, times, parameters,
    hash, kinds of layers, schedule, and an estimate of the memory of a search
    step that is rematerialised and compiled by XLA. The estimate is the largest
    of three parts, plus the states of K steps. The parts are what a network
    call and its gradient hold, what the feature networks hold, and what the
    decoder holds, if there is one. They run one after another and are freed.

  Raises:
    UserError: `num_steps` or `micro_batch_size` below 1.
  """
  del run_dir
  if num_steps < 1 or micro_batch_size < 1:
    raise UserError("inspect.num_steps and micro_batch_size must be at least "
                    f"1. Received: {num_steps} and {micro_batch_size}")
  model = denoiser.model
  layers = collections.Counter(type(layer).__name__ for layer in model.layers)
  state = 4 * int(np.prod(denoiser.state_shape))
  network = activation_bytes(denoiser)
  networks = as_networks("inspect.features", features, optional=True)
  seen = sum(feature_bytes(each, denoiser.image_shape) for each in networks)
  decoded = (decoder_bytes(denoiser.decoder)
             if isinstance(denoiser.decoder, Decoder) else 0)
  needed = COMPILER_BYTES + max(
      micro_batch_size * HELD_SHARE * network, micro_batch_size * seen, decoded
  ) + micro_batch_size * 2 * num_steps * state
  rows = {
      "name": denoiser.name,
      "architecture": _architecture(denoiser),
      "prediction": denoiser.prediction,
      "images": _images(denoiser),
      "classes": _classes(denoiser),
      "parameters": f"{model.count_params():,} in {len(model.weights)} "
                    "variables",
      "sha256": denoiser.sha256 or "none: no weights",
      "layers": ", ".join(f"{count} {name}" for name, count
                          in layers.most_common()),
      "computes in": denoiser.dtype_policy,
      "times": _times(denoiser),
      "schedule": _process(denoiser),
      "a search": f"K = {num_steps}, micro-batch {micro_batch_size}: about "
                  f"{needed / 2**30:.2f} GiB above the idle process "
                  f"({network / 2**20:.1f} MiB of activations an image"
                  + (f", {decoded / 2**20:.1f} MiB of the decoder's at once"
                     if decoded else "")
                  + (f", {seen / 2**20:.1f} MiB of the features'" if networks
                     else "; its feature network is not told") + ")",
  }
  if dataset is not None:
    dataset = as_dataset(dataset)
    check_shapes(denoiser, dataset)
    rows["wiring"] = wiring.check(
        denoiser, dataset.images, dataset.labels, micro_batch_size).text
  return "\n".join(f"{name:<12} {value}" for name, value in rows.items())

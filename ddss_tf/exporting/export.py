"""A sampler with its network as a SavedModel, and in other formats."""

from typing import Sequence

import gin
import numpy as np
import tensorflow as tf

from ddss_tf import bindings
from ddss_tf import distribution
from ddss_tf import storage
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.exporting import diffusers_scheduler
from ddss_tf.exporting import portable
from ddss_tf.networks import precision
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.samplers.coefficients import Coefficients
from ddss_tf.zoo import drawn_as_searched, load_searched

_PARITY_TOLERANCE = 1e-3


class SamplerModule(tf.Module):
  """What is exported: functions, the coefficients, the network's weights.

  Args:
    denoiser: the frozen model.
    coefficients: the coefficients of the sampler.
    x0_bound: see `chain.bound_x0`.
    jit_compile: have XLA compile the network where it is served.
    inline: trace the network K times, not once; see `portable.INLINED`.
  """

  def __init__(self, denoiser: Denoiser, coefficients: Coefficients,
               x0_bound: str | None = None, jit_compile: bool = False,
               inline: bool = False):
    super().__init__(name="sampler")
    self._denoiser = denoiser
    self.weights = denoiser.tracked
    # NumPy arrays become constants of the graph. Eager tensors would become
    # hidden inputs, which other formats show.
    coefficients = denoiser.for_chain(coefficients.numpy())
    height, width, channels = denoiser.state_shape
    steps = coefficients.num_steps

    conditional = denoiser.num_classes is not None
    label_spec = [tf.TensorSpec([None], tf.int32, "labels")]
    seed_spec = tf.TensorSpec([2], tf.int32, "seed")

    # A compiled function is traced once and called K times.
    eps_fn = (denoiser.output if inline
              else denoiser.compiled_output(jit_compile))

    def run(x_T, step_noise, labels):
      return generator_lib.decoded_chain(
          denoiser, eps_fn, coefficients, x_T, step_noise, labels,
          x0_bound=x0_bound)

    def of_indices(seed, indices, labels):
      return {"images": dataset_lib.to_uint8(generator_lib.sample_chain(
          denoiser, eps_fn, coefficients, seed, indices, labels,
          x0_bound=x0_bound))}

    @tf.function(autograph=False, input_signature=[
        seed_spec, tf.TensorSpec([], tf.int32, "batch_size")])
    def serve(seed, batch_size):
      indices = tf.range(batch_size)
      return of_indices(seed, indices, denoiser.draw_labels(seed, indices))

    @tf.function(autograph=False, input_signature=[
        tf.TensorSpec([None, height, width, channels], tf.float32, "x_T"),
        tf.TensorSpec([None, steps - 1, height, width, channels], tf.float32,
                      "step_noise"), *(label_spec if conditional else [])])
    def from_noise(x_T, step_noise, labels=None):
      return {"images": tf.clip_by_value(
          run(x_T, step_noise, labels), -1.0, 1.0)}

    self.endpoints = {"serving_default": serve, "from_noise": from_noise}
    if conditional:

      @tf.function(autograph=False, input_signature=[seed_spec, *label_spec])
      def of_classes(seed, labels):
        return of_indices(seed, tf.range(tf.size(labels)), labels)

      self.endpoints["of_classes"] = of_classes

    if denoiser.table is not None:

      @tf.function(autograph=False, input_signature=[seed_spec, *(
          tf.TensorSpec([None, *denoiser.table.shapes[name]], tf.float32, name)
          for name in denoiser.conditions)])
      def of_conditions(seed, *conditions):
        return of_indices(
            seed, tf.range(tf.shape(conditions[0])[0]), conditions)

      self.endpoints["of_conditions"] = of_conditions


@bindings.configurable(denylist=["run_dir"])
def export(run_dir: str, denoiser: Denoiser = gin.REQUIRED,
           also: Sequence[str] = (),
           integer_timesteps: bool = False, sampler: str | None = None,
           force: bool = False, jit_compile: bool = False) -> str:
  """Exports the searched sampler of a run as a SavedModel, and more.

  The signatures need nothing but `tensorflow`:
    serving_default(seed int32 [2], batch_size int32 []) -> images, uint8
      [B, H, W, C]; image i depends on the seed and i only.
    from_noise(x_T [B, h, w, c], step_noise [B, K - 1, h, w, c]) -> images,
      float32 [B, H, W, C] in [-1, 1]. The noise has the shape of the states,
      which is that of the images unless there is a decoder.
  With a class-conditional network, serving_default draws a class for each
  image, as often as in the search (`zoo.drawn_as_searched`), from_noise also takes
  labels int32 [B], and there is
    of_classes(seed int32 [2], labels int32 [B]) -> images, as serving_default.
  A network with a table of conditions has rows for classes, and beside these
    of_conditions(seed int32 [2], one float32 [B, ...] for each input by its
      name) -> images, for prompts that are not in the table. Guidance takes the
      negative prompt of the table's first row.

  The folder appears whole or not at all, and only after its images have been
  compared with those made in memory.

  Args:
    run_dir: folder of the run, with `sampler.json`.
    denoiser: the frozen model.
    also: other forms to write, under the names in `run_dir.ALSO`: "diffusers",
      a folder with the sampler alone as a scheduler for PyTorch
      (`diffusers_scheduler.write`), and guidance for its pipelines; "onnx" and "tflite", sampler and network as
      one file with the signature of from_noise (`portable.write`).
    integer_timesteps: round the times of the "diffusers" form, for a model that
      takes no fractions.
    sampler: path of a card, or its name in the zoo, instead of the sampler in
      the run directory.
    force: take a card that was found for other weights.
    jit_compile: have XLA compile the network where the SavedModel is served, at
      the first call with each batch size. Images are then faster, on CPU too,
      after a slow start. Not every server has XLA, so it is not the default.

  Returns:
    Path of the SavedModel.

  Raises:
    UserError: there is no sampler, it was found for another model, the exported
      images differ, or a form is unknown or needs a package that is missing.
  """
  also = [also] if isinstance(also, str) else list(also)
  for name in also:
    if name not in run_dir_lib.ALSO:
      raise UserError(f"export.also must be among {', '.join(run_dir_lib.ALSO)}. "
                      f"Received: {name!r}")
    if name in portable.FORMATS:
      portable.check_installed(name)
  with run_dir_lib.RunDir(run_dir).locked() as run:
    found, x0_bound = load_searched(run, denoiser, sampler, force)
    denoiser = drawn_as_searched(run, denoiser, sampler)
    run.keep_config()
    if not distribution.is_chief():
      return run.path(run_dir_lib.EXPORT)
    coefficients = found.coefficients().numpy()
    module = SamplerModule(denoiser, coefficients, x0_bound, jit_compile)
    inputs, expected = _golden(denoiser, coefficients, x0_bound)
    with storage.replacing_folder(run.path(run_dir_lib.EXPORT)) as temporary:
      try:
        tf.saved_model.save(module, temporary, signatures=module.endpoints)
      except tf.errors.OpError as error:  # A full disk, say.
        raise UserError(f"{run.path(run_dir_lib.EXPORT)} cannot be written: "
                        f"{' '.join(str(error).split())[:200]}") from error
      _check(temporary, inputs, expected)
    for name in also:
      path = run.path(run_dir_lib.ALSO[name])
      if name == "diffusers":
        diffusers_scheduler.write(path, card.SamplerCard(
            found.label, coefficients, denoiser.identity, {}, x0_bound),
                                  denoiser, integer_timesteps)
      else:
        # Other runtimes compile in their own way.
        inline = name in portable.INLINED
        written = module if not (inline or jit_compile) else SamplerModule(
            denoiser, coefficients, x0_bound, inline=inline)
        portable.write(
            path, name, written, written.endpoints["from_noise"],
            {key: value.numpy() for key, value in inputs.items()}, expected)
    return run.path(run_dir_lib.EXPORT)


def _golden(denoiser, coefficients, x0_bound):
  """Inputs of from_noise by name, and the 4 images made of them in memory."""
  seed, indices = generator_lib.seed_pair(0), tf.range(4)
  x_T, step_noise = chain.draw_noise(
      seed, indices, denoiser.state_shape, coefficients.num_steps)
  labels = denoiser.draw_labels(seed, indices)

  def run():
    return tf.clip_by_value(generator_lib.decoded_chain(
        denoiser, denoiser.output, denoiser.for_chain(coefficients), x_T,
        step_noise, labels, x0_bound=x0_bound), -1.0, 1.0)

  if denoiser.dtype_policy != precision.FLOAT32:
    # In half precision, a graph keeps fused values in float32 where single
    # calls round them. Images of single calls would differ too much.
    run = tf.function(run, autograph=False)
  images = run()
  inputs = {"x_T": x_T, "step_noise": step_noise}
  if labels is not None:
    inputs["labels"] = labels
  return inputs, images.numpy()


def _check(path, inputs, expected):
  """Compares the exported sampler with the one in memory."""

  def serve():
    return tf.saved_model.load(path).signatures["from_noise"](**inputs)

  # As served: outside the distribution strategy, which changes how variables
  # are loaded.
  received = distribution.outside(serve)["images"]
  difference = float(np.max(np.abs(expected - received.numpy())))
  if not difference <= _PARITY_TOLERANCE:
    raise UserError(
        f"exported images must equal those in memory to {_PARITY_TOLERANCE:g}. "
        f"Received: a difference of {difference:g}")

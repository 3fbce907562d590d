"""Many images from a sampler, in batches, without gradient."""

from typing import Iterator, Sequence

import numpy as np
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.runs import progress
from ddss_tf.samplers import chain
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.samplers.coefficients import Coefficients


# Longer chains run step by step: tracing one as a single graph would take
# longer than making the images.
_UNROLLED = 100


def seed_pair(seed: int) -> tf.Tensor:
  """An integer as the int32 [2] seed of TensorFlow's stateless generators."""
  return tf.constant([seed, 0], tf.int32)


def sample_chain(denoiser: Denoiser, output, coefficients: Coefficients,
                 seed: tf.Tensor, indices: tf.Tensor,
                 labels: tf.Tensor | None = None, **options):
  """Draws the noise of samples, runs their chains and decodes what they give.

  Args:
    denoiser: the frozen network; it gives the image shape and the classes.
    output: `denoiser.output`, compiled or not.
    coefficients: the coefficients of `denoiser.for_chain`.
    seed: int32 [2].
    indices: int32 [B], the global indices of the samples.
    labels: int32 [B], their classes; None draws them, if there are classes.
    **options: options of `chain.run_chain`.

  Returns:
    What `chain.run_chain` returns, decoded.
  """
  if labels is None:
    labels = denoiser.draw_labels(seed, indices)
  x_T, step_noise = chain.draw_noise(
      seed, indices, denoiser.state_shape, coefficients.num_steps)
  return decoded_chain(denoiser, output, coefficients, x_T, step_noise, labels,
                       **options)


def decoded_chain(denoiser: Denoiser, output, coefficients: Coefficients,
                  x_T: tf.Tensor, step_noise: tf.Tensor,
                  labels: tf.Tensor | None = None, **options):
  """Runs chains from given noise and decodes what they give.

  Args:
    denoiser: see `sample_chain`.
    output: see `sample_chain`.
    coefficients: see `sample_chain`.
    x_T: see `chain.run_chain`.
    step_noise: see `chain.run_chain`.
    labels: int32 [B], the classes; None exactly if there are none.
    **options: options of `chain.run_chain`.

  Returns:
    What `chain.run_chain` returns, decoded.
  """
  return tf.nest.map_structure(denoiser.decode, chain.run_chain(
      denoiser_lib.with_labels(output, labels), coefficients, x_T, step_noise,
      **options))


class Generator:
  """Samples a denoiser; image i of a seed does not depend on its batch.

  The coefficients are an input, so that one traced function serves every
  sampler of the same number of steps. Chains of more than 100 steps run step by
  step, through the same compiled network; the noise of all their steps is in
  memory.

  Args:
    denoiser: the frozen network.
    batch_size: images per call, rounded up to a multiple of the number of
      replicas. The last batch of a request is filled up with images that are
      thrown away, since a new shape means a new compilation.
    jit_compile: compile the network with XLA.
    x0_bound: see `chain.bound_x0`.
  """

  def __init__(self, denoiser: Denoiser, batch_size: int = 250,
               jit_compile: bool = True, x0_bound: str | None = None):
    denoiser.check_latents("a sampler", x0_bound)
    self.denoiser = denoiser
    self.batch_size = distribution.filled(batch_size)
    self.x0_bound = x0_bound
    self._jit_compile = jit_compile
    self._rows_outputs = {}
    self._sample = distribution.replicated(self._sample_batch)
    self._walk = distribution.replicated(self._walk_path)
    self._draw = tf.function(denoiser.draw_labels, autograph=False)

  def _tensors(self, coefficients):
    return self.denoiser.for_chain(coefficients.numpy()).map(tf.constant)

  def _output(self, coefficients):
    """What the chain of these coefficients is fed with."""
    if coefficients.noise_ratios is None:
      return self.denoiser.compiled_output(self._jit_compile)
    return self.denoiser.compiled_output_and_variance(self._jit_compile)

  def _rows_output(self, coefficients):
    """The same, with the rows shared by the replicas; traced once."""
    output = self._output(coefficients)
    if output not in self._rows_outputs:
      self._rows_outputs[output] = distribution.row_wise(output)
    return self._rows_outputs[output]

  def _run(self, output, coefficients, seed, indices, labels=None, **options):
    return sample_chain(self.denoiser, output, coefficients, seed, indices,
                        labels, x0_bound=self.x0_bound, **options)

  def _sample_batch(self, coefficients, seed, indices, labels=None):
    if labels is not None:
      labels = distribution.own_rows(labels)
    return distribution.all_rows(self._run(
        self._output(coefficients), coefficients, seed,
        distribution.own_rows(indices), labels))

  def _sample_long(self, coefficients, seed, indices, labels=None):
    # NumPy coefficients, so that states without weight cost nothing.
    return self._run(
        self._rows_output(coefficients), coefficients.numpy(), seed, indices,
        labels)

  def _walk_path(self, coefficients, seed, indices):
    # Not compiled by XLA, which would take longer for so few images.
    image, states, x0_hats = self._run(
        self.denoiser.compiled_output(False), coefficients, seed, indices,
        trajectory=True)
    return image[0], tf.concat(states, axis=0), tf.concat(x0_hats, axis=0)

  def path(self, coefficients: Coefficients, seed: int, index: int = 0
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image, and the states and predictions on the way to it.

    Args:
      coefficients: the coefficients of the sampler.
      seed: as in `batches`.
      index: the index of the image.

    Returns:
      Three float32 arrays: the image [H, W, C], which is image `index` of
      `batches` to float precision; the states [K, H, W, C] before it, the
      noisiest first; and the predicted images [K, H, W, C] in the same order.
      If there is a decoder, all are decoded.
    """
    found = self._walk(self._tensors(coefficients), seed_pair(seed),
                       tf.constant([index]))
    return tuple(value.numpy() for value in found)

  def batches(self, coefficients: Coefficients, num_images: int, seed: int,
              description: str = "",
              label: int | Sequence[int] | None = None
              ) -> Iterator[tf.Tensor]:
    """Yields images 0 ... num_images - 1 of a seed.

    Args:
      coefficients: the coefficients of the sampler.
      num_images: how many.
      seed: the seed of the run; image i depends on it and on i only.
      description: text of the progress bar; none is shown if empty.
      label: the class of all images of a class-conditional network; or a list,
        of which image i has number i modulo its length; None draws the class of
        each image (`Denoiser.draw_labels`).

    Yields:
      float32 [B, H, W, C], nominally in [-1, 1]; the last batch may be smaller.

    Raises:
      UserError: the sampler has a learned variance, and the network predicts
        none.
    """
    coefficients = self._tensors(coefficients)
    if coefficients.noise_ratios is not None:
      self.denoiser.check_variance()
    pair = seed_pair(seed)
    classes = None if label is None else np.atleast_1d(label)
    sample = (self._sample if coefficients.num_steps <= _UNROLLED
              else self._sample_long)
    with progress.bar(num_images, description, "image") as bar:
      for start in range(0, num_images, self.batch_size):
        indices = tf.range(start, start + self.batch_size)
        count = min(self.batch_size, num_images - start)
        labels = None if classes is None else tf.constant(
            classes[indices % len(classes)], tf.int32)
        yield sample(coefficients, pair, indices, labels)[:count]
        bar.update(count)

  def labels(self, num_images: int, seed: int) -> np.ndarray | None:
    """The classes, or rows of a table, of the images of a seed.

    Args:
      num_images: how many.
      seed: as in `batches`.

    Returns:
      int32 [N]: what `batches` draws where it is given no label; None for an
      unconditional network.
    """
    drawn = self._draw(seed_pair(seed), tf.range(num_images))
    return None if drawn is None else drawn.numpy()

  def images(self, coefficients: Coefficients, num_images: int, seed: int,
             description: str = "",
             label: int | Sequence[int] | None = None) -> np.ndarray:
    """All of `batches` as one array, float32 [N, H, W, C]."""
    return np.concatenate([batch.numpy() for batch in self.batches(
        coefficients, num_images, seed, description, label)])

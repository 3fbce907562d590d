"""The gradient of the variational bound (ELBO)."""

import numpy as np
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf.objectives import elbo
from ddss_tf.samplers import chain
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.searching.pools import Pool, filled
from ddss_tf.searching.variables import SamplerVariables


class BoundGradient:
  """The ELBO objective of training images, averaged over micro-batches.

  The variance of the last step is fitted to each micro-batch, so the value
  depends a little on their size. Replicas share the images of each.

  Args:
    denoiser: the frozen model.
    variables: the variables of the sampler that is learned.
    pool: the samples of every step.
    images: float32 [R, H, W, C], the training set.
    gradient_samples: images per step.
    micro_batch_size: images at a time, which divides `gradient_samples`.
    seed: the seed of the run. The images and the noise of a step depend on it
      and on the step only.
    jit_compile: compile the network with XLA.
    remat: recompute the network's activations; False keeps them all.
  """

  def __init__(self, denoiser, variables: SamplerVariables, pool: Pool, images,
               *, gradient_samples: int, micro_batch_size: int, seed: int,
               jit_compile: bool = True, remat: bool = True):
    self._denoiser, self._images = denoiser, images
    self._variables, self._pool = variables, pool
    self._gradient_samples = gradient_samples
    self._micro_batch_size = micro_batch_size
    self._seed, self._pair = seed, generator_lib.seed_pair(seed)
    self._output = denoiser.compiled_output(jit_compile, remat)
    self._differentiate = distribution.replicated(self._loss_and_gradient)

  def __call__(self, step: int) -> tuple[float, np.ndarray]:
    """The bound and float32 [n], its gradient in all variables."""
    indices = self._pool.indices(step)
    chosen = np.random.default_rng([self._seed, step]).integers(
        len(self._images), size=self._gradient_samples)
    size = self._micro_batch_size
    rows = distribution.filled(size)
    weights = tf.constant((np.arange(rows) < size) / size, tf.float32)
    results = [
        self._differentiate(
            filled(indices[i:i + size], rows), tf.constant(
                self._images[filled(chosen[i:i + size], rows).numpy()]),
            weights)
        for i in range(0, self._gradient_samples, size)]
    return (float(np.mean([float(loss) for loss, _ in results])),
            np.mean([gradient.numpy() for _, gradient in results], axis=0))

  def _loss_and_gradient(self, indices, x_0, weights):
    """The bound of images, averaged with weights [B], and its gradient."""
    sampler = self._variables.sampler
    first_noise, step_noise = chain.draw_noise(
        self._pair, distribution.own_rows(indices), self._denoiser.state_shape,
        sampler.num_steps)
    with tf.GradientTape() as tape:
      squares = elbo.squares(
          self._output, sampler.coefficients(), distribution.own_rows(x_0),
          first_noise, step_noise, self._denoiser.for_chain)
      share = tf.linalg.matvec(
          squares, distribution.own_rows(weights), transpose_a=True)
    # The bound is not a mean over samples, because the last step's variance is
    # fitted to them. It is a function of means, and each replica pulls the
    # gradient in these back through its own part of them.
    means = distribution.total(share)
    with tf.GradientTape(persistent=True) as outer:
      outer.watch(means)
      loss = elbo.bound(sampler.coefficients(), means)
    inner = self._variables.gradient(tape, share, outer.gradient(loss, means))
    return loss, self._variables.gradient(outer, loss) + distribution.total(
        inner)

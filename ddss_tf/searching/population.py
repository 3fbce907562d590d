"""The gradient of an objective of a whole population of images.

  noise of (seed, sample) -> the K-step chain -> features -> objective
                                  ^                              |
  variables -> coefficients ------+   <------- pulled back ------+
"""

import numpy as np
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.searching.pools import Pool, filled
from ddss_tf.searching.variables import SamplerVariables


class PopulationGradient:
  """The objective of the population of a step, and its gradient.

  If the images that the gradient passes through fit into one chain, this is
  plain backpropagation. Otherwise it takes two passes, because a distance is
  not a mean over micro-batches. The first pass makes the features of all
  images, without gradient. The second pass makes the micro-batches again, one
  after the other from the same seeds, and pulls the objective's gradient in
  their features back through their chains. The result is the gradient of one
  large batch.

  With fewer `gradient_samples` the gradient passes through a part of the
  population only and is scaled up. This is an unbiased estimate, and the
  distance itself still comes from the whole population.

  Args:
    denoiser: the frozen model.
    variables: the variables of the sampler that is learned.
    objective: what is minimised, an `objectives.Objective` other than the ELBO.
    pool: the samples of every step.
    gradient_samples: how many of a step's samples the gradient passes through.
    micro_batch_size: images per chain. If it does not divide the population,
      the last chain is filled up with images that do not count.
    seed: the seed of the run. An image depends on it and on its index only.
    x0_bound: see `chain.bound_x0`.
    jit_compile: compile the network with XLA.
    remat: recompute the network's activations; False keeps them all.
  """

  def __init__(self, denoiser, variables: SamplerVariables, objective,
               pool: Pool, *, gradient_samples: int, micro_batch_size: int,
               seed: int, x0_bound: str | None = None, jit_compile: bool = True,
               remat: bool = True):
    self._denoiser, self._objective = denoiser, objective
    self._variables, self._sampler = variables, variables.sampler
    self._pool = pool
    self._gradient_samples = gradient_samples
    self._micro_batch_size = micro_batch_size
    self._pair = generator_lib.seed_pair(seed)
    self._x0_bound, self._remat = x0_bound, remat
    self._outputs = {kind: denoiser.compiled_output(jit_compile, kind)
                     for kind in {False, remat}}
    self.views = distribution.row_wise(
        lambda indices: self._view(indices, remat=False))
    self.differentiate = tf.function(self._differentiate, autograph=False)
    self._one_pass = distribution.replicated(self._loss_of_one_pass)
    self.pull_back = distribution.summed(self._pull_back)
    self._pull_back_each = distribution.replicated(self._gradients_of_samples)
    self._jacobian = distribution.replicated(variables.jacobian)

  def __call__(self, step: int) -> tuple[float, np.ndarray]:
    """The objective and its gradient.

    Args:
      step: the step of the search, which decides the noise.

    Returns:
      The loss and float32 [n], the gradient in all variables as one vector.
    """
    indices = self._pool.indices(step)
    teacher, control = self._pool.targets(indices)
    fresh = self._pool.fresh_reals(step)
    scale = len(indices) / self._gradient_samples
    # The rows that all replicas make together, with one chain each.
    most = self._micro_batch_size * distribution.num_replicas()
    count = self._gradient_samples
    if count <= most and count == distribution.filled(count):
      loss, gradient = self._one_pass(
          tf.constant(indices[:count]), self._all_views(indices[count:], most),
          teacher, control, fresh)
      return float(loss), scale * gradient.numpy()
    loss, cotangents = self.differentiate(
        self._all_views(indices, most), teacher, control, fresh)
    size = distribution.filled(min(most, count))
    # The samples that fill the last micro-batch up get no gradient.
    cotangents = tf.pad(cotangents[:count], [[0, size], [0, 0]])
    gradient = self.pull_back([
        (filled(indices[i:min(i + size, count)], size),
         cotangents[i:i + size]) for i in range(0, count, size)])
    return float(loss), scale * gradient.numpy()

  def jacobian(self) -> np.ndarray:
    """The derivative of all coefficients, float64 [coefficients, n]."""
    return self._jacobian().numpy().astype(np.float64)

  def per_sample(self, indices: np.ndarray, cotangents: tf.Tensor
                 ) -> np.ndarray:
    """The gradient of each sample in all coefficients.

    Args:
      indices: [B] of samples.
      cotangents: float32 [B, width], the gradient in each sample's view.

    Returns:
      float64 [B, coefficients]. Its product with `jacobian` is the gradient in
      all variables.
    """
    count = len(indices)
    rows = distribution.filled(count)
    each = self._pull_back_each(
        filled(indices, rows), tf.pad(cotangents, [[0, rows - count], [0, 0]]))
    return each.numpy()[:count].astype(np.float64)

  def _view(self, indices, remat, coefficients=None):
    """What the objective sees of samples, made by the chain."""
    if coefficients is None:
      coefficients = self._sampler.coefficients()
    return self._objective.view(generator_lib.sample_chain(
        self._denoiser, self._outputs[remat],
        self._denoiser.for_chain(coefficients), self._pair, indices,
        x0_bound=self._x0_bound))

  def _all_views(self, indices, most):
    """The views of samples, without gradient, in chains of at most `most`."""
    size = min(most, len(indices))
    views = [self.views(filled(indices[i:i + size], size))
             for i in range(0, len(indices), max(size, 1))]
    return tf.concat(
        [*views, tf.zeros([0, self._objective.width])], axis=0)[:len(indices)]

  def _differentiate(self, view, teacher, control, fresh=()):
    """The objective of views, and its gradient in them."""
    with tf.GradientTape() as tape:
      tape.watch(view)
      loss = self._objective.value(view, teacher, control, fresh)
    return loss, tape.gradient(loss, view, unconnected_gradients="zero")

  def _loss_of_one_pass(self, indices, others, teacher, control, fresh):
    """Loss of these samples and of others' views; gradient through these."""
    with tf.GradientTape() as tape:
      view = self._view(distribution.own_rows(indices), self._remat)
    # The loss is that of all replicas' samples; each replica then pulls the
    # gradient of its own samples back.
    loss, cotangents = self.differentiate(
        tf.concat([distribution.all_rows(view), others], axis=0), teacher,
        control, fresh)
    return loss, distribution.total(self._variables.gradient(
        tape, view, distribution.own_rows(cotangents[:indices.shape[0]])))

  def _pull_back(self, indices, cotangents):
    """Gradient of sum(view * cotangents), of the replica's own rows."""
    with tf.GradientTape() as tape:
      view = self._view(distribution.own_rows(indices), self._remat)
    return self._variables.gradient(
        tape, view, distribution.own_rows(cotangents))

  def _gradients_of_samples(self, indices, cotangents):
    """As `_pull_back`, but each sample's gradient in the coefficients."""
    rows = distribution.own_rows(indices)
    own = self._sampler.coefficients().map(lambda value: tf.broadcast_to(
        tf.reshape(value, [*value.shape, 1, 1, 1, 1]),
        [*value.shape, rows.shape[0], 1, 1, 1]))
    with tf.GradientTape() as tape:
      tape.watch(own.arrays())
      view = self._view(rows, self._remat, own)
    gradients = tape.gradient(
        view, list(own.arrays().values()), unconnected_gradients="zero",
        output_gradients=distribution.own_rows(cotangents))
    return distribution.all_rows(tf.transpose(tf.concat(
        [tf.reshape(g, [-1, rows.shape[0]]) for g in gradients], axis=0)))

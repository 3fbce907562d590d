"""The objective on fixed noise, and the best sampler by it."""

import math

import numpy as np
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf.objectives import elbo
from ddss_tf.samplers import chain
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.searching.pools import filled
from ddss_tf.searching.variables import SamplerVariables


class Validation:
  """The objective of a sampler's images on fixed noise.

  Args:
    objective: an `objectives.Objective`.
    denoiser: the frozen model.
    images: float32 [R, H, W, C], the training set; the ELBO takes a fixed draw.
    num_samples: the number of images.
    teacher: the teacher's views of these samples, or None.
    control: a control variate on them, as `Objective.value` takes it, or None.
    batch_size: images at a time.
    seed: the seed of the noise.
    x0_bound: see `chain.bound_x0`.
    jit_compile: compile the network with XLA.

  Attributes:
    generator: a generator of images without gradient.
  """

  def __init__(self, objective, denoiser, images, num_samples, teacher,
               control, *, batch_size, seed, x0_bound, jit_compile):
    self._objective, self._denoiser = objective, denoiser
    self._num_samples = num_samples
    self._seed = seed
    self._teacher = None if teacher is None else tf.constant(teacher)
    self._control = control
    self.generator = generator_lib.Generator(
        denoiser, min(batch_size, num_samples), jit_compile, x0_bound)
    self._view = distribution.row_wise(objective.view)
    self._value = tf.function(objective.value, autograph=False)
    order = np.random.default_rng(seed).permutation(len(images))
    self._images = images[order[:num_samples]]
    self._output = denoiser.compiled_output(jit_compile)
    self._squares = distribution.replicated(self._squares_of_rows)

  def __call__(self, coefficients) -> float:
    """The value of a sampler's coefficients (NumPy)."""
    if self._objective.is_elbo:
      return self._bound(coefficients)
    view = tf.concat(
        [self._view(images) for images in self.generator.batches(
            coefficients, self._num_samples, self._seed)], axis=0)
    teacher = tf.zeros([1]) if self._teacher is None else self._teacher
    return float(self._value(view, teacher, self._control))

  def _bound(self, coefficients) -> float:
    """The ELBO objective of the fixed draw of images."""
    if not np.all(coefficients.noise_scales[:-1]):
      return math.inf  # The bound's value, without network calls.
    coefficients = coefficients.map(tf.constant)
    count, size = len(self._images), self.generator.batch_size
    rows = []
    for start in range(0, count, size):
      indices = np.arange(start, min(start + size, count))
      padded = filled(indices, size)
      rows.append(self._squares(
          coefficients, padded, tf.constant(self._images[padded.numpy()])
          )[:len(indices)])
    # The variance of the last step is fitted to all of the images.
    return float(elbo.bound(
        coefficients, tf.reduce_mean(tf.concat(rows, axis=0), axis=0)))

  def _squares_of_rows(self, coefficients, indices, x_0):
    first_noise, step_noise = chain.draw_noise(
        generator_lib.seed_pair(self._seed), distribution.own_rows(indices),
        self._denoiser.state_shape, coefficients.num_steps)
    return distribution.all_rows(elbo.squares(
        self._output, coefficients, distribution.own_rows(x_0), first_noise,
        step_noise, self._denoiser.for_chain))


class BestSoFar:
  """The variables of the lowest validation so far.

  Args:
    variables: the variables of the sampler that is learned.
  """

  def __init__(self, variables: SamplerVariables):
    self._variables = variables
    self._value = tf.Variable(np.inf, dtype=tf.float32, trainable=False)
    self._step = tf.Variable(-1, dtype=tf.int64, trainable=False)
    self._best = [
        tf.Variable(v.value, trainable=False) for v in variables.variables]

  @property
  def state(self) -> dict:
    """What a checkpoint holds, by name."""
    return {"best": self._best, "best_value": self._value,
            "best_step": self._step}

  @property
  def value(self) -> float:
    """The lowest validation value; infinity before the first."""
    return float(self._value.numpy())

  @property
  def step(self) -> int:
    """After how many steps it was reached; -1 before the first."""
    return int(self._step.numpy())

  def judge(self, value: float, step: int) -> bool:
    """Remembers the variables if `value` is the lowest so far.

    Returns:
      Whether the search must go back to the best variables: there are some, and
      `value` is not lower than theirs, or not a number.
    """
    back = np.isfinite(self.value) and not value < self.value
    if value < self.value:
      self._value.assign(value)
      self._step.assign(step)
      for best, variable in zip(self._best, self._variables.variables):
        best.assign(variable.value)
    return bool(back)

  def restore(self) -> None:
    """Puts the best variables back into the sampler."""
    for best, variable in zip(self._best, self._variables.variables):
      variable.assign(best)

"""All variables of a sampler as one vector."""

from typing import Iterator, Mapping

import numpy as np
import tensorflow as tf

from ddss_tf.samplers.sampler import Sampler


class SamplerVariables:
  """The variables of a sampler, in the order of its kinds.

  Args:
    sampler: the family whose variables are learned.

  Attributes:
    sampler: the argument.
    variables: the Keras variables.
    kinds: the kind of each, out of `samplers.sampler.KINDS`.
    sizes: the number of entries of each; n is their sum.
    kind_of_entry: [n], the kind of each entry.
    constrained: bool [n], whether an entry's variable has a constraint.
  """

  def __init__(self, sampler: Sampler):
    self.sampler = sampler
    self.kinds, self.variables = [], []
    for kind, variables in sampler.variables_by_kind.items():
      self.kinds += [kind] * len(variables)
      self.variables += variables
    self.sizes = [int(np.prod(v.shape)) for v in self.variables]
    self.kind_of_entry = np.repeat(self.kinds, self.sizes)
    self.constrained = np.repeat(
        [v.constraint is not None for v in self.variables], self.sizes)

  @property
  def values(self) -> list[tf.Variable]:
    """TensorFlow's variables inside of Keras'."""
    return [v.value for v in self.variables]

  def by_entry(self, by_kind: Mapping[str, float]) -> np.ndarray:
    """The number of every entry's kind, float32 [n]."""
    return np.array([by_kind[kind] for kind in self.kind_of_entry], np.float32)

  def split(self, vector: np.ndarray) -> Iterator[tuple]:
    """The parts of a vector [n], each with its variable."""
    return zip(np.split(vector, np.cumsum(self.sizes)[:-1]), self.variables)

  def add(self, step: np.ndarray) -> None:
    """Adds a vector [n], and then applies the constraints."""
    for part, variable in self.split(step):
      value = variable.value + np.float32(np.reshape(part, variable.shape))
      if variable.constraint is not None:
        value = variable.constraint(value)
      variable.assign(value)

  def gradient(self, tape: tf.GradientTape, target, output_gradients=None
               ) -> tf.Tensor:
    """The gradient of a target in all variables, float32 [n]."""
    gradients = tape.gradient(
        target, self.values, output_gradients=output_gradients,
        unconnected_gradients="zero")  # A single step has no noise scale.
    return tf.concat([tf.reshape(g, [-1]) for g in gradients], axis=0)

  def jacobian(self) -> tf.Tensor:
    """The derivative of all coefficients, float32 [coefficients, n]."""
    with tf.GradientTape() as tape:
      flat = tf.concat([tf.reshape(value, [-1]) for value in
                        self.sampler.coefficients().arrays().values()], axis=0)
    return tf.concat([
        tf.reshape(part, [flat.shape[0], -1]) for part in tape.jacobian(
            flat, self.values, unconnected_gradients="zero")], axis=1)

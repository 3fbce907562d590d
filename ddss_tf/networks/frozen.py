"""Networks whose weights no gradient ever reaches."""

import contextlib

import tensorflow as tf


@contextlib.contextmanager
def frozen_variables():
  """Makes every variable created inside non-trainable for TensorFlow itself.

  `layer.trainable = False` tells Keras only: the `tf.Variable` beneath stays
  trainable. Tapes and `tf.recompute_grad` then watch it and compute gradients
  of weights that nobody needs, at about a third of the cost of a search step.
  """

  def creator(next_creator, **kwargs):
    return next_creator(**{**kwargs, "trainable": False})

  with tf.variable_creator_scope(creator):
    yield


def freeze(model) -> None:
  """Freezes a Keras model that was not made under `frozen_variables`.

  There is no public way to tell a variable that exists.
  """
  model.trainable = False
  for variable in model.variables:
    variable.value._trainable = False  # pylint: disable=protected-access

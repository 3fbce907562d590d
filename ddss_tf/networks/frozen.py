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

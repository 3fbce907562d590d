"""Networks whose weights no gradient ever reaches."""

import contextlib

import tensorflow as tf


@contextlib.contextmanager
def frozen_variables():
  """Makes every variable created inside non-trainable for TensorFlow itself.

  `layer.trainable = False` is Keras's word only: the `tf.Variable` beneath
  stays trainable, so tapes and `tf.recompute_grad` watch it and compute
  gradients of weights that nobody needs, at about a third of the cost of a
  search step.
  """

  def creator(next_creator, **kwargs):
    return next_creator(**{**kwargs, "trainable": False})

  with tf.variable_creator_scope(creator):
    yield

"""What a search minimises."""

import tensorflow as tf


def kid_linear(features: tf.Tensor, real_mean: tf.Tensor) -> tf.Tensor:
  """Unbiased Kernel Inception Distance with the linear kernel, as a loss.

  With k(a, b) = a . b, N generated features f_i and the mean m of the features
  of the whole training set,

    sum_{i != j} f_i . f_j / (N (N - 1)) - 2/N sum_i f_i . m + |m|^2

  (Watson et al. 2022, section 3.1; Binkowski et al. 2018,
  https://arxiv.org/abs/1801.01401). It is an unbiased estimate of
  |E f - m|^2, the squared distance of the mean features, and so sees nothing of
  their spread; it can be negative and is never clamped. The gradient passes
  in graph mode, which that of TF-GAN's own KID does not.

  Args:
    features: float [N, D], N at least 2.
    real_mean: float [D].

  Returns:
    float32 scalar.
  """
  features = tf.cast(features, tf.float32)
  count = tf.cast(tf.shape(features)[0], tf.float32)
  # The distance is a small difference of large numbers: shift by m first.
  centred = features - real_mean
  total = tf.reduce_sum(centred, axis=0)
  return (tf.reduce_sum(total**2) - tf.reduce_sum(centred**2)) / (
      count * (count - 1.0))

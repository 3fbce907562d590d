"""Theorem 1: the marginals of a GGDM, and the x0_hat that they imply."""

import tensorflow as tf

# Least magnitude of a state's mean, by which x0_hat is divided, and least
# variance of a state of VARS, by which its posterior is divided.
MEAN_FLOOR = 1e-6


def marginals(state_weights, x0_weights, noise_scales, first_mean, first_std):
  """Theorem 1: the marginals q(state_k | x_0) = N(a_k x_0, v_k I) of a GGDM.

  With M the strictly triangular matrix of the weights of earlier states, one
  triangular solve replaces the paper's recursion (Watson et al. 2022):
  X = (I - M)^{-1} [mu_0 | diag(sigma)], a = X[:, 0], v = sum_j X[:, j]^2.

  Args:
    state_weights: [K, K]; row k makes state k + 1, the last row is not used.
    x0_weights: [K]; the last one is not used.
    noise_scales: [K]; the last one is not used.
    first_mean: scalar, weight of x_0 in the noisiest state.
    first_std: scalar, standard deviation of the noisiest state.

  Returns:
    a and v, float32 [K] each, noisiest state first; solved in float64.
  """
  state_weights, x0_weights, noise_scales, first_mean, first_std = (
      tf.cast(value, tf.float64) for value in (
          state_weights, x0_weights, noise_scales, first_mean, first_std))
  num_steps = state_weights.shape[0]
  # Row k of M belongs to state k, made by row k - 1 of the coefficients.
  first_row = tf.zeros([1, num_steps], tf.float64)
  lower = tf.concat([first_row, state_weights[:-1]], axis=0)
  mean = tf.concat([tf.reshape(first_mean, [1]), x0_weights[:-1]], axis=0)
  std = tf.concat([tf.reshape(first_std, [1]), noise_scales[:-1]], axis=0)
  solution = tf.linalg.triangular_solve(
      tf.eye(num_steps, dtype=tf.float64) - lower,
      tf.concat([mean[:, None], tf.linalg.diag(std)], axis=1))
  return (tf.cast(solution[:, 0], tf.float32),
          tf.cast(tf.reduce_sum(solution[:, 1:] ** 2, axis=1), tf.float32))


def x0_of_marginals(mean, variance, in_v: bool = False):
  """x0_hat = (x_t - sqrt(v) eps) / a, as its two coefficients.

  Args:
    mean: [K], a.
    variance: [K], v.
    in_v: give those of x_t and the network's v. With n = sqrt(a^2 + v), x_t / n
      is the state of a variance-preserving process whose alpha is a / n and
      whose sigma is sqrt(v) / n; so x0_hat = alpha x_t / n - sigma v (our
      choice). It is finite where a is 0.
  """
  if in_v:
    square = tf.maximum(mean**2 + variance, MEAN_FLOOR**2)
    return mean / square, -tf.sqrt(variance / square)
  # A search may move a mean through 0. No schedule comes near this floor.
  mean = tf.where(mean < 0.0, tf.minimum(mean, -MEAN_FLOOR),
                  tf.maximum(mean, MEAN_FLOOR))
  return 1.0 / mean, -tf.sqrt(variance) / mean

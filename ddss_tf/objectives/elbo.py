"""The variational bound of a K-step sampler: likelihood instead of looks.

A sampler can be searched for likelihood, as work before the paper does, or for
perceptual quality, as the paper does. This objective is the likelihood.
"""

from typing import Callable

import numpy as np
import tensorflow as tf

from ddss_tf.samplers import chain
from ddss_tf.samplers.coefficients import Coefficients


def negative_elbo(eps_fn: chain.EpsFn, coefficients: Coefficients,
                  x_0: tf.Tensor, first_noise: tf.Tensor,
                  step_noise: tf.Tensor) -> tf.Tensor:
  """An upper bound of -log p(x_0), estimated with one draw of the states.

  States are drawn from q given the image, by the sampler's own rows with x_0 in
  the place of x0_hat,

    state_{k+1} = x0_weights[k] x_0 + sum_{u <= k} state_weights[k, u] state_u
                  + noise_scales[k] z_k,

  and p is the sampler itself. Both are Gaussians of one variance, so a step
  costs x0_weights[k]^2 |x_0 - x0_hat_k|^2 / (2 noise_scales[k]^2)
  (Watson et al. 2022; Ho et al. 2020, equation 5). The first state
  is N(a x_0, v) in q, with a = 1 / x0_from_state[0] and
  v = (x0_from_eps[0] a)^2 (in v, a = x0_from_state[0] and v = x0_from_v[0]^2),
  and N(0, 1) in p. The last step is a Gaussian around
  x0_hat whose variance is the best one for the batch: our choice, because the
  paper does not say.

  Gradients reach every coefficient through states and network. The estimate is
  unbiased but for the last step's variance, which is fitted to the batch.

  The bound depends on the images through means only: it is `bound` of the mean
  of `squares`, whose rows may be computed separately.

  Args:
    eps_fn: (x_t [B, H, W, C], t [B]) -> predicted noise [B, H, W, C].
    coefficients: the coefficients of K steps. A noise scale of 0 before the
      last step makes the bound infinite: a deterministic sampler has no
      likelihood of this kind.
    x_0: float32 [B, H, W, C], images.
    first_noise: float32 [B, H, W, C], standard normal.
    step_noise: float32 [B, K - 1, H, W, C], standard normal.

  Returns:
    float32 scalar, nats per dimension, the mean of the batch.
  """
  return bound(coefficients, tf.reduce_mean(squares(
      eps_fn, coefficients, x_0, first_noise, step_noise), axis=0))


def squares(eps_fn: chain.EpsFn, coefficients: Coefficients, x_0: tf.Tensor,
            first_noise: tf.Tensor, step_noise: tf.Tensor,
            for_chain: Callable[[Coefficients], Coefficients] = lambda c: c
            ) -> tf.Tensor:
  """The squares of each image that the bound depends on.

  Args:
    eps_fn: see `negative_elbo`, also for the shapes of the others.
    coefficients: the coefficients of K steps.
    x_0: the images.
    first_noise: the noise of the first states.
    step_noise: the noise of the others.
    for_chain: `Denoiser.for_chain`, if `eps_fn` is an `output` of a denoiser.

  Returns:
    float32 [B, 1 + K]: the mean square of each image, and of x_0 - x0_hat_k for
    each step.
  """
  a, v = _first_state(coefficients)
  mean_square = lambda x: tf.reduce_mean(x**2, axis=[1, 2, 3])
  _, _, x0_hats = chain.run_chain(
      eps_fn, for_chain(coefficients), a * x_0 + tf.sqrt(v) * first_noise,
      step_noise, trajectory=True, x_0=x_0)
  return tf.stack([mean_square(x_0), *(
      mean_square(x_0 - x0_hat) for x0_hat in x0_hats)], axis=1)


def bound(coefficients: Coefficients, means: tf.Tensor) -> tf.Tensor:
  """`negative_elbo` of a batch, from the mean of its `squares`.

  Args:
    coefficients: the coefficients of K steps.
    means: float32 [1 + K].

  Returns:
    float32 scalar, nats per dimension.
  """
  a, v = _first_state(coefficients)
  loss = 0.5 * (a**2 * means[0] + v - 1.0 - tf.math.log(v))
  for k in range(coefficients.num_steps - 1):
    ratio = coefficients.x0_weights[k] / coefficients.noise_scales[k]
    loss += 0.5 * ratio**2 * means[1 + k]
  # The last step: -log N with the variance that fits best.
  return loss + 0.5 * (tf.math.log(2.0 * np.pi * means[-1]) + 1.0)


def _first_state(coefficients):
  """The first state given x_0: the factor of x_0, and the variance."""
  if coefficients.in_v:
    return coefficients.x0_from_state[0], coefficients.x0_from_v[0] ** 2
  a = 1.0 / coefficients.x0_from_state[0]
  return a, (coefficients.x0_from_eps[0] * a) ** 2

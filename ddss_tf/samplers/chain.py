"""The K-step sampling chain: the only loop over sampling steps.

                        coefficients (a family's, differentiable)
                              |
  x_T = state_0 --> state_k --> eps(state_k, t_k) --> x0_hat_k --> state_{k+1}
                      |          [rematerialised]                     ^
                      +-- every visited state, noise_scales[k] z_k ---+

and state_K is the image.

The loop is unrolled in Python: `tf.recompute_grad` does not work inside a
`tf.while_loop`, and each step reads a different number of states.
"""

from typing import Callable

import numpy as np
import tensorflow as tf

from ddss_tf.errors import UserError
from ddss_tf.samplers.coefficients import Coefficients

X0_BOUNDS = ("clip", "dynamic")
_DYNAMIC_QUANTILE = 0.995

EpsFn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor | tuple]


def bound_x0(x0_hat: tf.Tensor, x0_bound: str | None) -> tf.Tensor:
  """Keeps predicted images near [-1, 1].

  Args:
    x0_hat: float32 [B, H, W, C].
    x0_bound: None changes nothing. "clip" clips to [-1, 1]. "dynamic" is the
      dynamic threshold of Saharia et al. (2022,
      https://arxiv.org/abs/2205.11487, appendix): each image is clipped to
      [-s, s] and divided by s, with s the 0.995 quantile of its |x0_hat|, at
      least 1.

  Returns:
    float32 [B, H, W, C].

  Raises:
    ValueError: unknown `x0_bound`.
  """
  if x0_bound is None:
    return x0_hat
  if x0_bound == "clip":
    return tf.clip_by_value(x0_hat, -1.0, 1.0)
  if x0_bound != "dynamic":
    raise ValueError(f"x0_bound must be None, {' or '.join(X0_BOUNDS)}. "
                     f"Received: {x0_bound!r}")
  size = np.prod(x0_hat.shape[1:])
  ordered = tf.sort(tf.abs(tf.reshape(x0_hat, [-1, size])), axis=1)
  position = _DYNAMIC_QUANTILE * (size - 1)
  left = int(position)
  right = min(left + 1, int(size) - 1)
  quantile = ordered[:, left] + (position - left) * (
      ordered[:, right] - ordered[:, left])
  s = tf.maximum(quantile, 1.0)[:, None, None, None]
  return tf.clip_by_value(x0_hat, -s, s) / s


def run_chain(
    eps_fn: EpsFn,
    coefficients: Coefficients,
    x_T: tf.Tensor,
    step_noise: tf.Tensor | None = None,
    trajectory: bool = False,
    x0_bound: str | None = None,
    x_0: tf.Tensor | None = None,
) -> tf.Tensor | tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor]]:
  """Samples: from pure noise to images, through K network calls.

  Differentiable in every coefficient, the times included, through all states.

  Args:
    eps_fn: (x_t [B, H, W, C], t [B]) -> predicted noise [B, H, W, C], or v
      where the coefficients are written in v. If the
      coefficients have guidance scales, it takes that of the step as a third
      argument, float32 [B]. It may be `Denoiser.output`, with coefficients that
      have gone through `Denoiser.for_chain`. If the coefficients have noise
      ratios, it also gives the exponent v [B, H, W, C] of the learned variance,
      as `Denoiser.output_and_variance` does.
    coefficients: the coefficients of the K steps, float32. NumPy arrays are
      constants: a state with the weight 0 is not read, and a state is released
      after its last use. So every step of a Markovian sampler costs the same,
      and the images do not change. Tensors may have trailing dimensions
      [B, 1, 1, 1]; each sample then has coefficients of its own.
    x_T: float32 [B, H, W, C], standard normal.
    step_noise: float32 [B, K - 1, H, W, C], standard normal: the noise of every
      step but the last. None adds none, which is right only for a sampler whose
      noise scales are all zero.
    trajectory: also return the states and the predicted images.
    x0_bound: see `bound_x0`, applied to every predicted image before it is
      used. A solver written in eps then uses the eps of the bounded image.
    x_0: float32 [B, H, W, C], clean images from which the states are made,
      instead of the predicted ones. The states are then those of q given these
      images, and x_T is the first of them; the variational bound needs them.

  Returns:
    Images, float32 [B, H, W, C], nominally in [-1, 1] but not clipped. With
    `trajectory`, a tuple (images, states, x0_hats) of the images and two lists
    of K tensors [B, H, W, C].
  """
  num_steps = coefficients.num_steps
  batch = tf.shape(x_T)[0]
  x_T = tf.convert_to_tensor(x_T)
  one, terms, last_reads = _taken_apart(coefficients, x_T.dtype)
  states, x0_hats = [x_T], []
  x0_from_output = one.x0_from_output
  for k in range(num_steps):
    x_t = states[-1]
    t = _of_samples(one.times[k], batch, x_T.dtype)
    guidance = ()
    if one.guidance_scales is not None:
      guidance = _of_samples(one.guidance_scales[k], batch, x_T.dtype),
    # By position, see `rematerialise`.
    eps = eps_fn(x_t, t, *guidance)
    noise_scale = one.noise_scales[k]
    if one.noise_ratios is not None:
      eps, exponent = eps
      noise_scale *= tf.exp(exponent * tf.math.log(one.noise_ratios[k]))
    x0_hat = one.x0_from_state[k] * x_t + x0_from_output[k] * eps
    x0_hat = bound_x0(x0_hat, x0_bound)
    x_s = one.x0_weights[k] * (x0_hat if x_0 is None else x_0)
    for u, weight in terms[k]:
      x_s += weight * states[u]
    if step_noise is not None and k < num_steps - 1:
      x_s += noise_scale * step_noise[:, k]
    states.append(x_s)
    if trajectory:
      x0_hats.append(x0_hat)
    else:
      for u in last_reads[k]:
        states[u] = None
  images = states.pop()
  return (images, states, x0_hats) if trajectory else images


def _of_samples(value, batch, dtype):
  """One number, or one for each sample [B, 1, 1, 1], as [B]."""
  value = tf.convert_to_tensor(value, dtype)
  return tf.broadcast_to(tf.reshape(value, [-1]), [batch])


def _taken_apart(coefficients, dtype):
  """The coefficients step by step.

  Returns:
    The coefficients, whose entries can be indexed by k; for each k the pairs
    (u, weight) of the states u that make state k + 1; and for each k the states
    that nothing reads after it.
  """
  num_steps = coefficients.num_steps
  if isinstance(coefficients.times, np.ndarray):
    # Python's numbers take the type of what they multiply.
    one = coefficients.map(lambda value: value.tolist())
    terms = [[(u, weight) for u, weight in enumerate(row[:k + 1]) if weight]
             for k, row in enumerate(one.state_weights)]
    # The network reads state k at step k.
    last = {k: k for k in range(num_steps)}
    last.update((u, k) for k, pairs in enumerate(terms) for u, _ in pairs)
    last_reads = [[] for _ in range(num_steps)]
    for u, k in last.items():
      last_reads[k].append(u)
    return one, terms, last_reads
  # Unstacked at once: K^2 slices would be most of the graph, and the gradient
  # of each slice is an array of its own.
  one = coefficients.map(
      lambda value: tf.unstack(tf.convert_to_tensor(value, dtype)))
  terms = [list(enumerate(tf.unstack(row)[:k + 1]))
           for k, row in enumerate(one.state_weights)]
  return one, terms, [()] * num_steps


def draw_noise(
    seed: tf.Tensor,
    indices: tf.Tensor,
    image_shape: tuple[int, int, int],
    num_steps: int,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Draws all the noise of a batch of chains, each sample from its own seed.

  Sample i of a seed has the same noise in every batch, on every replica and in
  every order. Its `x_T` is the same for every K and family, so that samplers
  can be compared on the same noise.

  Args:
    seed: int32 [2].
    indices: int32 [B], the global indices of the samples.
    image_shape: (H, W, C).
    num_steps: K.

  Returns:
    `x_T` [B, H, W, C] and `step_noise` [B, K - 1, H, W, C], float32 standard
    normal.
  """
  return _draw(tf.cast(seed, tf.int32), tf.cast(indices, tf.int32),
               tuple(image_shape), num_steps)


# Drawing sample by sample is slow outside of a graph. The function is traced
# for every batch size, because what follows may need to know the size.
@tf.function(autograph=False)
def _draw(seed, indices, image_shape, num_steps):

  def one(index):
    # Philox by name: the default generator differs between device types.
    own = tf.random.experimental.stateless_fold_in(seed, index, alg="philox")
    x_T = tf.random.stateless_normal(image_shape, own, alg="philox")
    steps = tf.random.experimental.stateless_fold_in(own, 1, alg="philox")
    step_noise = tf.random.stateless_normal(
        (num_steps - 1, *image_shape), steps, alg="philox")
    return x_T, step_noise

  return tf.map_fn(one, indices, fn_output_signature=(tf.float32, tf.float32))


def check_x0_bound(root: str, x0_bound: str | None) -> None:
  """Checks the name of a bound before a chain uses it.

  Raises:
    UserError: unknown `x0_bound`; the message names gin's `root`.x0_bound.
  """
  if x0_bound not in (None, *X0_BOUNDS):
    raise UserError(f"{root}.x0_bound must be None, "
                    f"{' or '.join(X0_BOUNDS)}. Received: {x0_bound!r}")

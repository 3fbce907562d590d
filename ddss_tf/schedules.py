"""The forward process and the grids of times that samplers visit.

Notation, used in the whole package: `alpha_t` and `sigma_t` are the scale of
the image and the standard deviation of the noise in
q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I); the process is variance preserving,
alpha_t^2 + sigma_t^2 = 1, and `abar` = alpha_t^2. `t` is the index of a
training step, 0 ... T - 1 (0 the cleanest), which is also what the network is
fed with; fractional values are allowed. A step goes from the noisier `t` to the
cleaner `s`. The clean image itself has abar = 1.

Tables are float64 NumPy. Only what a gradient must pass through is TensorFlow.
"""

import numpy as np
import tensorflow as tf

STRIDES = ("linear", "quadratic")


class NoiseSchedule:
  """A discrete variance-preserving forward process, continued between steps.

  Between training steps log abar is interpolated linearly, exact at integers
  (our choice; so do the DPM-Solver family's discrete schedules).

  Args:
    betas: float [T], the variances of the T training steps, each in (0, 1).

  Raises:
    ValueError: `betas` is empty, not one-dimensional, or leaves (0, 1).
  """

  def __init__(self, betas):
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not betas.size:
      raise ValueError(
          f"betas must be a non-empty list. Received: shape {betas.shape}")
    if not np.all((betas > 0) & (betas < 1)):
      raise ValueError(
          "betas must lie strictly between 0 and 1. Received: "
          f"{betas.min():g} ... {betas.max():g}")
    self.betas = betas
    self._log_abar = np.cumsum(np.log1p(-betas))

  @classmethod
  def linear(cls, num_train_steps: int = 1000, beta_start: float = 1e-4,
             beta_end: float = 0.02) -> "NoiseSchedule":
    """Betas in equal steps (Ho et al. 2020, section 4)."""
    return cls(np.linspace(beta_start, beta_end, num_train_steps))

  @property
  def num_train_steps(self) -> int:
    """T."""
    return len(self.betas)

  def abar(self, t) -> np.ndarray:
    """alpha_t^2 in float64 at times `t`, each in [0, T - 1]."""
    t = np.asarray(t, np.float64)
    return np.exp(np.interp(t, np.arange(self.num_train_steps),
                            self._log_abar))

  def alpha_sigma(self, t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(alpha_t, sigma_t) in float32 at times `t`, differentiable in `t`."""
    t = tf.convert_to_tensor(t, tf.float32)
    table = tf.constant(self._log_abar, tf.float32)
    last = max(self.num_train_steps - 2, 0)
    left = tf.clip_by_value(tf.cast(tf.floor(t), tf.int32), 0, last)
    right = tf.minimum(left + 1, self.num_train_steps - 1)
    fraction = tf.clip_by_value(t - tf.cast(left, tf.float32), 0.0, 1.0)
    lower = tf.gather(table, left)
    log_abar = lower + fraction * (tf.gather(table, right) - lower)
    # expm1 keeps sigma exact where abar is close to one.
    return tf.exp(0.5 * log_abar), tf.sqrt(-tf.math.expm1(log_abar))

  def stride(self, name: str, num_steps: int) -> np.ndarray:
    """Times tau of a K-step sampler, noisiest first.

    The paper names a linear and a quadratic stride without formula; these are
    our choice, after those of Song et al. (2021,
    https://arxiv.org/abs/2010.02502): for i = 0 ... K-1,

      linear:    floor(i T / K)
      quadratic: floor(linspace(0, sqrt(0.8 T), K)_i ** 2)

    Where the quadratic one names a step twice (K >= 30 at T = 1000), the later
    one moves to the next free step, so that no step is wasted.

    Args:
      name: "linear" or "quadratic".
      num_steps: K, from 1 to T.

    Returns:
      float64 [K], integers, strictly decreasing, in [0, T - 1].

    Raises:
      ValueError: unknown name; K outside [1, T].
    """
    total = self.num_train_steps
    if not 1 <= num_steps <= total:
      raise ValueError(
          f"num_steps must be from 1 to {total}, the training steps of the "
          f"model. Received: num_steps={num_steps}")
    if name == "linear":
      tau = np.arange(num_steps) * total // num_steps
    elif name == "quadratic":
      tau = np.floor(np.linspace(0, np.sqrt(0.8 * total), num_steps) ** 2)
      for i in range(1, num_steps):
        tau[i] = max(tau[i], tau[i - 1] + 1)
      # Beyond the last step only if K is close to T: push back from the end.
      tau = np.minimum(tau, total - num_steps + np.arange(num_steps))
    else:
      raise ValueError(
          f"stride must be one of {', '.join(STRIDES)}. Received: {name!r}")
    return tau[::-1].astype(np.float64)

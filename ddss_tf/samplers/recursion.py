"""Solvers as recursions on rows, and their elimination into `Coefficients`."""

import numpy as np

from ddss_tf.samplers.coefficients import Coefficients


class History:
  """All that a solver has seen when it makes step k, as rows.

  Attributes:
    k: the step, from 0.
    num_steps: K.
    lower_order_final: whether the last steps may be of lower order.
    alpha, sigma: [K + 1], of the K states and of the image.
    log_snr: [K + 1]; the last is infinite if the image is clean.
    x: rows of the states 0 ... k.
    begins_at_noise: whether the first of them is pure noise.
    x0: rows of x0_hat_0 ... x0_hat_k.
    eps: rows of the noises predicted at the same states.
  """

  def __init__(self, alpha, sigma, lower_order_final):
    self.alpha, self.sigma = alpha, sigma
    self.lower_order_final = lower_order_final
    with np.errstate(divide="ignore"):
      self.log_snr = np.log(alpha) - np.log(sigma)
    self.num_steps = len(alpha) - 1
    self.begins_at_noise = alpha[0] == 0
    self.k = -1
    self.x, self.x0, self.eps = [], [], []
    self._unit = np.eye(self.num_steps + 1)
    # Corrected states, for the solvers that have a corrector.
    self.corrected = []

  def visit(self, x):
    """The network is called at the state `x`."""
    self.k += 1
    k = self.k
    self.x.append(x)
    self.x0.append(self._unit[k + 1])
    self.eps.append((x - self.alpha[k] * self.x0[k]) / self.sigma[k])

  def transfer(self, x, eps, k=None):
    """DDIM's step from time k to the next one, with a given noise."""
    k = self.k if k is None else k
    ratio = self.alpha[k + 1] / self.alpha[k]
    return ratio * x + (self.sigma[k + 1] - ratio * self.sigma[k]) * eps

  def first_order(self):
    """DDIM's step in x0_hat, which divides by sigma alone."""
    k = self.k
    ratio = self.sigma[k + 1] / self.sigma[k]
    return ratio * self.x[k] + (
        self.alpha[k + 1] - ratio * self.alpha[k]) * self.x0[k]

  def is_noise(self):
    """Whether the newest state is pure noise."""
    return self.alpha[self.k] == 0


def linear_recursion(schedule, times, step, abar_end,
                     lower_order_final) -> Coefficients:
  """Runs a solver on rows and eliminates all predictions but the newest.

  Args:
    schedule: the forward process.
    times: [K], noisiest first.
    step: function from a `History` to the row of the next state.
    abar_end: alpha^2 of the image: 1, or less to stop early.
    lower_order_final: see `solver_coefficients`.

  Returns:
    Coefficients in float64 NumPy.
  """
  times = np.asarray(times, np.float64)
  num_steps = len(times)
  abar = np.append(schedule.abar(times), abar_end)
  alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
  history = History(alpha, sigma, lower_order_final)
  state_weights = np.zeros((num_steps, num_steps))
  x0_weights = np.zeros(num_steps)
  x = np.eye(num_steps + 1)[0]
  for k in range(num_steps):
    history.visit(x)
    x = step(history)
    # x = x0_weight x0_hat_k + weights . (states 0 ... k), and the states span
    # x_T, x0_hat_0 ... x0_hat_{k-1}, each with its newest prediction last.
    x0_weights[k] = x[k + 1]
    states = np.array(history.x)[:, :k + 1]
    weights = np.linalg.solve(states.T, x[:k + 1])
    # Weights that are 0 in exact arithmetic should be 0.
    weights[np.abs(weights) < 1e-12 * np.abs(weights).max(initial=1)] = 0
    state_weights[k, :k + 1] = weights
  return Coefficients(
      times=times,
      **Coefficients.x0_of(schedule, alpha[:-1], sigma[:-1]),
      state_weights=state_weights,
      x0_weights=x0_weights,
      noise_scales=np.zeros(num_steps))


def order_of(history, order, step=None, lower_end=True):
  """The order of a step: lower at the start, which lacks history, and the end.

  At the end it falls by one in each of the last steps, for stability (Lu et al.
  2022), if both `lower_end` and `lower_order_final` are set. A first state of
  pure noise is no part of the history.
  """
  step = history.k if step is None else step
  if lower_end and history.lower_order_final:
    order = min(order, history.num_steps - step)
  return min(order, max(step + 1 - history.begins_at_noise, 1))

"""Training-free samplers, written as `Coefficients`.

DDIM, DPM-Solver++, DEIS, Adams-Bashforth, PNDM and UniPC are usually written as
loops over a history of predictions. All of them are linear in what they have
seen: every quantity, a state as well as a prediction or a corrected state, is a
row of weights over

  x_T, x0_hat_0, x0_hat_1, ..., x0_hat_{K-1}.

So a solver here is a function that computes the row of the next state from rows
(`recursion.History`) by its published formula, in float64 NumPy. One
elimination then turns the rows into `Coefficients`: the weights of state k + 1
on x0_hat_k and on the states 0 ... k. It needs a non-zero weight of x0_hat_k in
every state, which all of these have. GGDM+PRED therefore holds the
deterministic ones exactly.

A flow begins at pure noise: alpha is 0 there, the log-SNR minus infinity and
sigma / alpha infinite. The first step of every solver is then DDIM's, which is
what it tends to. The first prediction, a node at infinity, leaves the
polynomials of all later steps, whose orders are those of a chain that begins
one step later; so do its weights in DEIS and AB as alpha tends to 0. That is
our choice: diffusers starts a little below pure noise instead. UniPC with
B(h) = h leaves its first correction out, where B is infinite, and PNDM, which
cannot step away from pure noise with another noise than its own, is iPNDM.
"""

import functools

import numpy as np
import numpy.typing as npt

from ddss_tf.samplers import recursion
from ddss_tf.samplers import strides
from ddss_tf.samplers.coefficients import Coefficients
from ddss_tf.schedules import NoiseSchedule


def ddim_coefficients(schedule: NoiseSchedule, times, eta: float = 0.0,
                      variance: str = "posterior") -> Coefficients:
  """DDIM on a grid of times; eta = 1 is DDPM, eta = 0 is deterministic.

  Song et al. (2021, https://arxiv.org/abs/2010.02502), equations 12 and 16,
  with eps replaced by its expression in x_t and x0_hat, so that the step is
  written in states and x0_hat alone. The last step goes to abar = 1.

  Args:
    schedule: the forward process.
    times: [K], strictly decreasing, in [0, T - 1].
    eta: scale of the noise, at least 0. Above 1 the noise of a step is cut
      where it would exceed the whole deviation of its state.
    variance: one of `VARIANCES`. "posterior" is the above. "fixed_large" adds
      noise of the variance 1 - abar_t / abar_s instead, which is beta_t if no
      training step is left out, and keeps the weights (Ho et al. 2020, section
      3.2; the sigma-hat of Song et al., section 5.1). "learned" is between the
      two, pixel by pixel, as the network says (Nichol and Dhariwal 2021,
      equation 15); it needs a network that predicts a variance.

  Returns:
    Coefficients in float64 NumPy.
  """
  times = np.asarray(times, np.float64)
  num_steps = len(times)
  abar_t = schedule.abar(times)
  abar_s = np.append(abar_t[1:], 1.0)
  sigma = eta * np.sqrt((1 - abar_s) / (1 - abar_t)) * np.sqrt(
      1 - abar_t / abar_s)
  sigma = np.minimum(sigma, np.sqrt(1 - abar_s))
  # At abar_s = 1 this is 0 up to rounding, so the last step returns x0_hat.
  eps_weight = np.sqrt(np.maximum(1 - abar_s - sigma**2, 0))
  from_state = eps_weight / np.sqrt(1 - abar_t)
  largest, ratios = np.sqrt(1 - abar_t / abar_s), None
  if variance == "fixed_large":
    sigma = largest
  elif variance == "learned":
    ratios = np.append(largest[:-1] / sigma[:-1], 1.0)
  return Coefficients(
      times=times,
      **Coefficients.x0_of(schedule, np.sqrt(abar_t), np.sqrt(1 - abar_t)),
      state_weights=np.diag(from_state),
      x0_weights=np.sqrt(abar_s) - from_state * np.sqrt(abar_t),
      noise_scales=np.where(np.arange(num_steps) < num_steps - 1, sigma, 0),
      noise_ratios=ratios,
  )


def _short(history):
  """DPM-Solver++ and DEIS lower their final order in short chains only.

  The 15 is that of Lu et al.'s code, and of diffusers.
  """
  return history.num_steps < 15


def _dpm_solver_pp(history, order, exact=False):
  """DPM-Solver++, multistep (Lu et al. 2022, https://arxiv.org/abs/2211.01095).

  Integrates the polynomial through the last predictions of x0 over log-SNR
  against its exact exponential weight. The published third order gives the
  second difference half of its Taylor weight, so that it is of second order
  only; `exact` gives it the whole weight. The step to a clean image, where
  log-SNR is infinite, returns x0_hat.
  """
  k, x0, lam = history.k, history.x0, history.log_snr
  alpha, sigma = history.alpha[k + 1], history.sigma[k + 1]
  if sigma == 0:
    return alpha * x0[k]
  order = recursion.order_of(history, order, lower_end=_short(history))
  h = lam[k + 1] - lam[k]
  phi_1 = -np.expm1(-h)
  x = sigma / history.sigma[k] * history.x[k] + alpha * phi_1 * x0[k]
  if order == 1:
    return x
  r0 = (lam[k] - lam[k - 1]) / h
  first = (x0[k] - x0[k - 1]) / r0
  if order == 2:
    return x + 0.5 * alpha * phi_1 * first
  r1 = (lam[k - 1] - lam[k - 2]) / h
  second = (first - (x0[k - 1] - x0[k - 2]) / r1) / (r0 + r1)
  phi_2 = 1 - phi_1 / h
  phi_3 = 0.5 - phi_2 / h
  return x + alpha * (phi_2 * (first + r0 * second)
                      + (2 if exact else 1) * phi_3 * second)


def _integrals_of_log_basis(nodes, rho):
  """Integrals over rho of the Lagrange polynomials in log rho at `nodes`.

  The antiderivatives of (log rho)^m, m = 0, 1, 2, are rho, rho (l - 1) and
  rho (l^2 - 2 l + 2), with l = log rho; all are 0 at rho = 0.
  """
  def antiderivative(value):
    if value == 0:
      return np.zeros(3)
    l = np.log(value)
    return value * np.array([1, l - 1, l**2 - 2 * l + 2])

  moments = (antiderivative(rho[1]) - antiderivative(rho[0]))[:len(nodes)]
  # Weights w with sum_i w_i p(node_i) exact for p = 1, log, log^2.
  return np.linalg.solve(
      np.vander(np.log(nodes), increasing=True).T, moments)


def _integrals_of_basis(nodes, rho):
  """Integrals over rho of the Lagrange polynomials in rho at `nodes`."""
  powers = np.arange(1, len(nodes) + 1)
  moments = (rho[1] ** powers - rho[0] ** powers) / powers
  return np.linalg.solve(np.vander(nodes, increasing=True).T, moments)


def _adams_bashforth(history, order, integrals, lower_end):
  """Solves d(x / alpha) / d rho = eps, rho = sigma / alpha, extrapolating eps.

  It integrates the polynomial through the last predicted noises exactly (Zhang
  and Chen 2023, https://arxiv.org/abs/2204.13902). Rho is finite on the way to
  a clean image, so the last steps need no lower order; `lower_end` asks for it.
  """
  k = history.k
  if history.is_noise():
    return history.first_order()
  with np.errstate(divide="ignore"):
    rho = history.sigma / history.alpha
  order = recursion.order_of(
      history, order, lower_end=lower_end and _short(history))
  used = range(k, k - order, -1)
  weights = integrals(rho[list(used)], rho[k:k + 2])
  x = history.x[k] / history.alpha[k]
  for weight, j in zip(weights, used):
    x = x + weight * history.eps[j]
  return history.alpha[k + 1] * x


_LINEAR_MULTISTEP = (
    (1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _multistep_eps(eps):
  """The classical Adams-Bashforth mean of up to four noises, oldest first."""
  weights = _LINEAR_MULTISTEP[min(len(eps), 4) - 1]
  return sum(w * e for w, e in zip(weights, eps[::-1]))


def _ipndm(history):
  """DDIM with the Adams-Bashforth mean of the last four noises.

  It is PNDM with a lower-order start (Zhang and Chen 2023, section 4). The
  constants are those of equal steps whatever the stride, so it is of second
  order on strides with equal steps.
  """
  if history.is_noise():
    return history.first_order()
  return history.transfer(history.x[-1], _multistep_eps(history.eps))


def _pndm(history):
  """PNDM, its linear multistep part (Liu et al. 2022, arXiv:2202.09778).

  The second time is visited twice: after a first DDIM step the step is made
  again from x_T, with the mean of both noises. So K network calls cover K - 1
  times, and the noise of the first visit is not used again.
  """
  k = history.k
  if k == 0:
    return history.transfer(history.x[0], history.eps[0])
  if k == 1:
    # From x_T again, to the same time, which the history has at 1 and at 2.
    mean = 0.5 * (history.eps[0] + history.eps[1])
    return history.transfer(history.x[0], mean, k=0)
  return history.transfer(
      history.x[k], _multistep_eps([history.eps[0], *history.eps[2:]]))


def _unipc_weights(order, history, k, bh, corrector):
  """The weights of UniPC's differences: (weights, ratios, B(h), e^-h - 1)."""
  lam = history.log_snr
  h = lam[k + 1] - lam[k]
  ratios = np.array([(lam[k - i] - lam[k]) / h for i in range(1, order)] + [1.])
  hh = -h
  phi_1 = np.expm1(hh)
  scale = hh if bh == "bh1" else phi_1
  if corrector:
    size = order
    simple = order == 1
  else:
    ratios = ratios[:-1]
    size = order - 1
    simple = order == 2
  if simple:
    # Any weight gives the right order here; 1/2 is the published one.
    return np.array([0.5]), ratios, scale, phi_1
  # b_i = i! phi_{i+1}(hh) hh / B(h), by the recursion of the phi functions.
  b, phi, factorial = [], phi_1 / hh - 1, 1
  for i in range(1, size + 1):
    b.append(phi * factorial / scale)
    factorial *= i + 1
    phi = phi / hh - 1 / factorial
  powers = np.vander(ratios, size, increasing=True).T
  return np.linalg.solve(powers, np.array(b)), ratios, scale, phi_1


def _unipc(history, order, bh):
  """UniPC (Zhao et al. 2023, https://arxiv.org/abs/2302.04867), x0 prediction.

  Each prediction is first used to correct the state it was made at (UniC, no
  further network call), and the next step starts at the corrected state (UniP).
  The order falls by one in each of the last steps; the last one returns x0_hat
  where the image is clean.
  """
  k, x0 = history.k, history.x0
  x = history.x[k]
  if k > 0 and not (bh == "bh1" and np.isinf(history.log_snr[k - 1])):
    # Correct with the order of the step that made this state.
    p = recursion.order_of(history, order, k - 1)
    weights, ratios, scale, phi_1 = _unipc_weights(
        p, history, k - 1, bh, corrector=True)
    differences = [(x0[k - 1 - i] - x0[k - 1]) / ratios[i - 1]
                   for i in range(1, p)] + [x0[k] - x0[k - 1]]
    x = (history.sigma[k] / history.sigma[k - 1] * history.corrected[k - 1]
         - history.alpha[k] * (phi_1 * x0[k - 1] + scale * sum(
             w * d for w, d in zip(weights, differences))))
  history.corrected.append(x)

  p = recursion.order_of(history, order)
  alpha, sigma = history.alpha[k + 1], history.sigma[k + 1]
  if sigma == 0:
    return alpha * x0[k]
  h = history.log_snr[k + 1] - history.log_snr[k]
  x = sigma / history.sigma[k] * x - alpha * np.expm1(-h) * x0[k]
  if p > 1:
    weights, ratios, scale, _ = _unipc_weights(
        p, history, k, bh, corrector=False)
    x = x - alpha * scale * sum(
        w * (x0[k - i] - x0[k]) / ratios[i - 1]
        for i, w in enumerate(weights, 1))
  return x


def _heun(history):
  """Heun's method on dz / ds = u, with two network calls a step.

  Karras et al. (2022, https://arxiv.org/abs/2206.00364), algorithm 1, in the
  variables of a flow: z = x / (alpha + sigma), s = sigma / (alpha + sigma) and
  u = eps - x0 = (z - x0) / s. Every process has them. A step by Euler's method
  is made again from its begin, with the mean of u at both ends. The last one,
  to a clean image, is Euler's, because there is no network to call at s = 0;
  where K is even, the one before is Euler's too (our choice).
  """
  k = history.k
  if k % 2 == 0 or k == history.num_steps - 1:
    return history.first_order()
  norm = history.alpha + history.sigma
  s = history.sigma / norm
  # States k and k + 1 are at the same time.
  z = [history.x[j] / norm[j] for j in (k - 1, k)]
  mean = sum((z[i] - history.x0[k - 1 + i]) / s[k - 1 + i] for i in (0, 1)) / 2
  return norm[k] * (z[0] + (s[k] - s[k - 1]) * mean)


_STEPS = {
    "dpm++2m": functools.partial(_dpm_solver_pp, order=2),
    "dpm++3m": functools.partial(_dpm_solver_pp, order=3),
    "dpm++3m-exact": functools.partial(_dpm_solver_pp, order=3, exact=True),
    "deis2": functools.partial(_adams_bashforth, order=2, lower_end=True,
                               integrals=_integrals_of_log_basis),
    "deis3": functools.partial(_adams_bashforth, order=3, lower_end=True,
                               integrals=_integrals_of_log_basis),
    "ab2": functools.partial(_adams_bashforth, order=2, lower_end=False,
                             integrals=_integrals_of_basis),
    "ab3": functools.partial(_adams_bashforth, order=3, lower_end=False,
                             integrals=_integrals_of_basis),
    "ipndm": _ipndm,
    "pndm": _pndm,
    "unipc2-bh1": functools.partial(_unipc, order=2, bh="bh1"),
    "unipc2-bh2": functools.partial(_unipc, order=2, bh="bh2"),
    "unipc3-bh1": functools.partial(_unipc, order=3, bh="bh1"),
    "unipc3-bh2": functools.partial(_unipc, order=3, bh="bh2"),
}
# What searches and comparisons try, unless they are told what to; on a flow
# searches try all.
SOLVERS = ("ddpm", "ddim", *_STEPS)
_STEPS["heun"] = _heun
ALL_SOLVERS = (*SOLVERS, "heun")
# What the noise of a DDPM may have.
VARIANCES = ("posterior", "fixed_large", "learned")


def solver_coefficients(schedule: NoiseSchedule, solver: str, num_steps: int,
                        stride: str | npt.ArrayLike = "linear",
                        eta: float | None = None,
                        abar_end: float = 1.0,
                        lower_order_final: bool = True,
                        variance: str = "posterior") -> Coefficients:
  """The coefficients of a training-free sampler.

    ddpm, ddim: Song et al. 2021, with `eta` 1 and 0 unless given.
    dpm++2m, dpm++3m: DPM-Solver++ as published. As published, dpm++3m is of
      second order with a small constant; dpm++3m-exact differs in one factor 2
      and is of third order (our choice).
    deis2, deis3: Adams-Bashforth on eps over sigma / alpha, with polynomials in
      log(sigma / alpha) and a lower order in the last steps if K < 15, as in
      diffusers.
    ab2, ab3: the same with polynomials in sigma / alpha and the full order to
      the end (Zhang and Chen's rho-AB-DEIS).
    pndm: visits its second time twice, so the stride has K - 1 times. For K < 3
      there is no second time to visit twice and it is ipndm.
    ipndm: constants of up to fourth order for equal steps; it is of second
      order.
    unipc2-bh1 ... unipc3-bh2: UniPC with B(h) = h or e^h - 1.
    heun: Heun's method in the variables of a flow. It calls the network twice a
      step and once in the last, so the stride has (K + 1) / 2 times, or K / 2 +
      1 where K is even.

  All but ddpm and ddim with eta > 0 are deterministic. All visit K states.

  Args:
    schedule: the forward process.
    solver: one of `ALL_SOLVERS`.
    num_steps: K, the network calls.
    stride: a name or the times, see `strides.times_of`.
    eta: scale of the noise, for ddim and ddpm only.
    abar_end: alpha^2 of the image, 1 for a clean one. Less stops early, as
      other libraries do for some solvers; not for ddim and ddpm.
    lower_order_final: lower the order in the last steps, as published: UniPC
      always, DPM-Solver++ and DEIS if K < 15; the others never do. The way to a
      clean image is of first order in log-SNR regardless.
    variance: see `ddim_coefficients`; other than "posterior" for ddpm only.

  Returns:
    Coefficients in float64 NumPy.

  Raises:
    ValueError: unknown solver, an argument that it does not have, or a stride
      that does not fit.
  """
  if solver not in ALL_SOLVERS:
    raise ValueError(f"solver must be one of {', '.join(ALL_SOLVERS)}. "
                     f"Received: {solver!r}")
  if variance not in VARIANCES:
    raise ValueError(f"variance must be one of {', '.join(VARIANCES)}. "
                     f"Received: {variance!r}")
  if variance != "posterior" and (solver != "ddpm" or eta not in (None, 1.0)):
    raise ValueError(f"variance must be 'posterior' but for ddpm with eta=1. "
                     f"Received: {variance!r} for {solver} with eta={eta}")
  if solver in ("ddpm", "ddim"):
    if abar_end != 1:
      raise ValueError(f"{solver} goes to abar_end=1. Received: {abar_end}")
    eta = (1.0 if solver == "ddpm" else 0.0) if eta is None else eta
    if eta < 0:
      raise ValueError(f"eta must be at least 0. Received: eta={eta}")
    return ddim_coefficients(
        schedule, strides.times_of(schedule, stride, num_steps), eta, variance)
  if eta:
    raise ValueError(f"{solver} has no noise to scale. Received: eta={eta}")
  step = _STEPS[solver]
  if solver == "heun":
    times = strides.times_of(schedule, stride, num_steps // 2 + 1)
    times = np.repeat(times, 2)[1:num_steps + 1]
  elif solver == "pndm" and num_steps >= 3:
    times = strides.times_of(schedule, stride, num_steps - 1)
    times = np.insert(times, 1, times[1])
    if schedule.abar(times[0]) == 0:
      times, step = strides.times_of(schedule, stride, num_steps), _ipndm
  else:
    times = strides.times_of(schedule, stride, num_steps)
    step = _ipndm if solver == "pndm" else step
  return recursion.linear_recursion(
      schedule, times, step, abar_end, lower_order_final)

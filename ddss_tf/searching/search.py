"""The search: gradient descent on a sampler's coefficients.

  seeds (step, sample) -> chain.draw_noise -> chain.run_chain -> features
                                                   ^                 |
  variables ------------> coefficients ------------+                 v
      ^                                              objective <- real ones
      +------- Adam, in the features' metric <-----------+
"""

import functools
import json
import math
import os
import signal
import time
from typing import Any, Callable, Mapping

from absl import logging
import gin
import keras
import numpy as np
from tensorboard.plugins.hparams import api as hparams
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf import metrics
from ddss_tf import storage
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.features import network as network_lib
from ddss_tf.features import reference
from ddss_tf.networks import precision
from ddss_tf.objectives import distances
from ddss_tf.objectives import elbo
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.objectives import teacher as teacher_lib
from ddss_tf.reporting import grids
from ddss_tf.reporting import sampler as sampler_figures
from ddss_tf.runs import checkpoints as checkpoints_lib
from ddss_tf.runs import progress
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.runs import signals
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.searching import starts
from ddss_tf.datasets.dataset import ImageDataset
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import (
    MAX_SEED, Interrupted, Terminated, UserError, check_positive, check_whole)
from ddss_tf.features.network import FeatureNetwork, as_networks
from ddss_tf.samplers.sampler import KINDS, Sampler
from ddss_tf.schedules import NoiseSchedule


# The least value of each of a search's whole numbers.
_LEAST = {
    "num_search_steps": 1, "batch_size": 2, "gradient_samples": 1,
    "micro_batch_size": 1, "start_samples": 2, "pool_samples": 2,
    "validation_samples": 2, "validate_every": 1, "checkpoint_every": 1,
    "log_every": 1, "max_skipped": 0, "sampling_batch_size": 1}
_OPTIONAL = ("gradient_samples", "micro_batch_size", "sampling_batch_size")


def check_search(arguments: Mapping[str, Any]) -> None:
  """Checks all that can be said of a search before anything is loaded.

  Args:
    arguments: of `search`, by name; others, and the parts, are not looked at.

  Raises:
    UserError: one is out of range, or they do not fit together.
  """
  values = dict(arguments)
  for name, least in _LEAST.items():
    check_whole(f"search.{name}", values[name], least,
                optional=name in _OPTIONAL)
  check_whole("search.seed", values["seed"], 0, most=MAX_SEED)
  for name in ("learning_rate", "rate_of_distance"):
    check_positive(f"search.{name}", values[name])
  whole = values["batch_size"]
  part = values["gradient_samples"] or whole
  micro = values["micro_batch_size"] or part
  for name, value in (("gradient_samples", part), ("micro_batch_size", micro)):
    if value > whole:
      raise UserError(f"search.{name} must be at most batch_size, {whole}. "
                      f"Received: {value}")
  x0_bound = values["x0_bound"]
  chain.check_x0_bound("search", x0_bound)
  multipliers = values["rate_multipliers"] or {}
  if not isinstance(multipliers, Mapping) or not set(multipliers) <= set(KINDS):
    raise UserError("search.rate_multipliers must be numbers by kind, for "
                    f"{', '.join(KINDS)}. Received: {multipliers!r}")
  for kind, value in multipliers.items():
    if value != 0:  # Which holds a kind where it starts.
      check_positive(f"search.rate_multipliers[{kind!r}]", value)
  candidates = values["start_candidates"]
  if candidates is not None and not (
      isinstance(candidates, (list, tuple)) and candidates
      and all(isinstance(start, Mapping) for start in candidates)):
    raise UserError("search.start_candidates must be a list of options by "
                    f"name. Received: {candidates!r}")
  if not isinstance(values["teacher"] or {}, Mapping):
    raise UserError("search.teacher must be options by name. "
                    f"Received: {values['teacher']!r}")
  try:
    terms = objective_lib.weights_of_terms(values["objective"])
  except (TypeError, ValueError) as error:
    raise UserError(f"search: {error}") from error
  pooled = objective_lib.uses(terms, objective_lib.MATCHING) or (
      values["control_variate"] and objective_lib.uses(terms, distances.MOMENTS))
  if pooled and values["pool_samples"] < whole:
    raise UserError("search.pool_samples must be at least batch_size, "
                    f"{whole}. Received: {values['pool_samples']}")
  if objective_lib.ELBO in terms and part % micro:
    raise UserError("search.micro_batch_size must divide gradient_samples, "
                    f"{part}, for the objective 'elbo', a mean over "
                    f"micro-batches. Received: {micro}")
  if objective_lib.ELBO in terms and x0_bound is not None:
    raise UserError("search.x0_bound must be None for the objective 'elbo', "
                    f"whose states are not sampled. Received: {x0_bound!r}")


# Of Adam's moments. The second is short, for searches are short. Our choice.
_BETA_1, _BETA_2 = 0.9, 0.99
# Of a gradient: the first one's square must be a float64 still, and that of a
# later one, in units of those before, must not outlast the search.
_LARGEST_NORM = 1e150
_LARGEST_GROWTH = 1e18
_METRIC_DRAWS = 8
_METRIC_ROWS = 4  # At least, for every variable.
_SENSITIVITY_FLOOR = 0.03
_LEAST_EFFECT = 1e-3


class Search:
  """One search: its compiled step, its optimiser, its checkpointed state.

  Adam, but in the metric of the features (`measure_metric`): the gradient is
  multiplied by the metric's inverse, and the second moment is one number, of
  the whole step, so that none of this depends on axes. The states of a chain
  resemble each other, so the weights of a step do nearly the same: by
  themselves they would all move that together, and drown their differences,
  which are what a multistep solver is made of. One learning rate then serves
  weights, times and noise scales alike, and every K.

  Far from where the metric was measured, what hardly mattered may matter. So a
  validation that is worse than the best one takes the search back there, with
  half the rate, and the metric is the mean of what it was and is there.

  Args:
    denoiser: the frozen model.
    sampler: the family whose variables are learned.
    objective: what is minimised, an `objective.Objective`.
    batch_size: images per step, which is the population of the objective.
    gradient_samples: how many of them the gradient passes through.
    micro_batch_size: images per chain. Where it does not divide both, the last
      one is filled up with images that count nothing.
    num_search_steps: steps in all; the learning rate rises over a tenth of them
      and then decays to 0 (cosine).
    learning_rate: Adam's highest rate, in feature standard deviations for all
      variables together.
    rate_multipliers: factors on it by kind of variable.
    seed: of the run; the images of a step depend on it and on the step only.
    teacher: float32 [M, width], the teacher's views of the first M samples of
      the seed, for an objective that uses them; then the samples of all steps
      are among these.
    control: float32 [M, width], a control variate's views of the same samples,
      see `distances.Control`, or None.
    images: float32 [R, H, W, C], the training set, for the ELBO.
    x0_bound: see `chain.bound_x0`.
    jit_compile: compile the network with XLA.
    remat: recompute the network's activations; False keeps them all.
  """

  def __init__(self, denoiser, sampler, objective, *, batch_size,
               gradient_samples, micro_batch_size, num_search_steps,
               learning_rate, rate_multipliers, seed, teacher=None,
               control=None, images=None, x0_bound=None, jit_compile=True,
               remat=True):
    self.sampler = sampler
    self.kinds, self.variables = [], []
    for kind, variables in sampler.variables_by_kind.items():
      self.kinds += [kind] * len(variables)
      self.variables += variables
    self._batch_size = batch_size
    self._gradient_samples = gradient_samples
    self._micro_batch_size = micro_batch_size
    self._objective = objective
    self._teacher = teacher
    self._control = control
    self._control_moments = (
        None if control is None else objective.control_moments(control))
    self._images = images
    self._seed = seed
    self._pair = generator_lib.seed_pair(seed)
    # Of the vector of all variables: entries of each, the kind of each entry.
    self._sizes = [int(np.prod(v.shape)) for v in self.variables]
    self._kind_of_entry = np.repeat(self.kinds, self._sizes)
    self._multipliers = np.array(
        [rate_multipliers[kind] for kind in self._kind_of_entry], np.float32)

    size = len(self._multipliers)
    # How often the metric was measured. The moments: the first, the second, and
    # how many steps they are of. All of this is the host's, in float64, which
    # not every accelerator has.
    (self.metric, self.preconditioner, self._measured, self._factor,
     *self.moments) = distribution.outside(lambda: [
         tf.Variable(value, dtype=tf.float64, trainable=False)
         for value in (np.zeros([size, size]), np.eye(size), 0.0, 1.0,
                       np.zeros(size), 0.0, 0.0)])
    # Adam's first steps are as long whatever the noise, so they come slowly.
    warmup = num_search_steps // 10
    self._schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else learning_rate, num_search_steps - warmup,
        warmup_target=learning_rate if warmup else None, warmup_steps=warmup)
    self._step = tf.Variable(0, dtype=tf.int64, trainable=False)
    self._skipped = tf.Variable(0, dtype=tf.int64, trainable=False)
    self._best_value = tf.Variable(np.inf, dtype=tf.float32, trainable=False)
    self._best_step = tf.Variable(-1, dtype=tf.int64, trainable=False)
    self.best = [tf.Variable(v.value, trainable=False) for v in self.variables]
    self.not_finite = ""  # What was not, in the last step that was skipped.
    self.checkpoint = tf.train.Checkpoint(
        variables=[v.value for v in self.variables], best=self.best,
        preconditioner=self.preconditioner, metric=self.metric,
        measured=self._measured, moments=self.moments, factor=self._factor,
        step=self._step, skipped=self._skipped, best_value=self._best_value,
        best_step=self._best_step)

    eps_fns = {kind: denoiser.compiled_output(jit_compile, kind)
               for kind in {False, remat}}

    def make_view(indices, remat, coefficients=None):
      x_T, step_noise = chain.draw_noise(
          self._pair, indices, denoiser.image_shape, sampler.num_steps)
      eps_fn = denoiser_lib.with_labels(
          eps_fns[remat], denoiser.draw_labels(self._pair, indices))
      if coefficients is None:
        coefficients = sampler.coefficients()
      return objective.view(chain.run_chain(
          eps_fn, denoiser.for_chain(coefficients), x_T, step_noise,
          x0_bound=x0_bound))

    def flat_gradient(tape, target, output_gradients=None):
      gradients = tape.gradient(
          target, [v.value for v in self.variables],
          output_gradients=output_gradients,
          unconnected_gradients="zero")  # Noise scales where K is 1.
      return tf.concat([tf.reshape(g, [-1]) for g in gradients], axis=0)

    @tf.function(autograph=False)
    def differentiate(view, teacher, control):
      with tf.GradientTape() as tape:
        tape.watch(view)
        loss = objective.value(view, teacher, control)
      # The bound is no function of a view: a gradient of 0.
      return loss, tape.gradient(loss, view, unconnected_gradients="zero")

    def one_pass(indices, others, teacher, control):
      """Loss of these samples and of others' views; gradient of the former."""
      with tf.GradientTape() as tape:
        view = make_view(distribution.own_rows(indices), remat)
      # Of all replicas' samples, of which each then pulls its own back.
      loss, cotangents = differentiate(
          tf.concat([distribution.all_rows(view), others], axis=0), teacher,
          control)
      return loss, distribution.total(flat_gradient(
          tape, view, distribution.own_rows(cotangents[:indices.shape[0]])))

    def pull_back(indices, cotangents):
      """Gradient of sum(view * cotangents), of the replica's own rows."""
      with tf.GradientTape() as tape:
        view = make_view(distribution.own_rows(indices), remat)
      return flat_gradient(tape, view, distribution.own_rows(cotangents))

    def pull_back_each(indices, cotangents):
      """As `pull_back`, but the gradient of every sample in coefficients."""
      rows = distribution.own_rows(indices)
      own = sampler.coefficients().map(lambda value: tf.broadcast_to(
          tf.reshape(value, [*value.shape, 1, 1, 1, 1]),
          [*value.shape, rows.shape[0], 1, 1, 1]))
      with tf.GradientTape() as tape:
        tape.watch(own.arrays())
        view = make_view(rows, remat, own)
      gradients = tape.gradient(
          view, list(own.arrays().values()), unconnected_gradients="zero",
          output_gradients=distribution.own_rows(cotangents))
      return distribution.all_rows(tf.transpose(tf.concat(
          [tf.reshape(g, [-1, rows.shape[0]]) for g in gradients], axis=0)))

    def jacobian():
      """Of all coefficients in all variables, [coefficients, n]."""
      with tf.GradientTape() as tape:
        flat = tf.concat([tf.reshape(value, [-1]) for value in
                          sampler.coefficients().arrays().values()], axis=0)
      return tf.concat([
          tf.reshape(part, [flat.shape[0], -1]) for part in tape.jacobian(
              flat, [v.value for v in self.variables],
              unconnected_gradients="zero")], axis=1)

    def bound(indices, x_0, weights):
      """The ELBO objective of images, of which weights [B] make the mean."""
      first_noise, step_noise = chain.draw_noise(
          self._pair, distribution.own_rows(indices), denoiser.image_shape,
          sampler.num_steps)
      with tf.GradientTape() as tape:
        squares = elbo.squares(
            eps_fns[remat], sampler.coefficients(),
            distribution.own_rows(x_0), first_noise, step_noise,
            denoiser.for_chain)
        share = tf.linalg.matvec(
            squares, distribution.own_rows(weights), transpose_a=True)
      # No mean over samples, for the last step's variance is fitted to them; a
      # function of their means, whose own parts replicas pull back.
      means = distribution.total(share)
      with tf.GradientTape(persistent=True) as outer:
        outer.watch(means)
        loss = elbo.bound(sampler.coefficients(), means)
      inner = flat_gradient(tape, share, outer.gradient(loss, means))
      return loss, flat_gradient(outer, loss) + distribution.total(inner)

    self._population = distribution.row_wise(
        lambda indices: make_view(indices, remat=False))
    self._differentiate = differentiate
    self._one_pass = distribution.replicated(one_pass)
    self._pull_back = distribution.summed(pull_back)
    self._pull_back_each = distribution.replicated(pull_back_each)
    self._jacobian = distribution.replicated(jacobian)
    self._bound = distribution.replicated(bound)

  @property
  def step(self) -> int:
    """How many steps have been made, skipped ones too."""
    return int(self._step.numpy())

  @property
  def skipped(self) -> int:
    """How many of them were not taken, for values that were not finite."""
    return int(self._skipped.numpy())

  @property
  def best_value(self) -> float:
    """The lowest validation value; infinity before the first."""
    return float(self._best_value.numpy())

  @property
  def best_step(self) -> int:
    """How many steps it took."""
    return int(self._best_step.numpy())

  @property
  def rate(self) -> float:
    """Of the next step."""
    return float(self._factor.numpy()) * float(self._schedule(self.step + 0.5))

  def loss_and_gradient(self, step: int) -> tuple[float, np.ndarray]:
    """The objective of the population of a step, and its gradient.

    Where the images that the gradient passes through fit into one chain this is
    plain backpropagation. Else it takes two passes, since a distance is no mean
    over micro-batches. The first makes the features of all images, without
    gradient; the objective's gradient in them is then pulled back through the
    chain of one micro-batch after the other, made again from the same seeds:
    the gradient of one large batch. With fewer `gradient_samples` it passes
    through a part of the population only, scaled up: an unbiased estimate of
    that gradient, in which the population's distance is as sharp as ever.

    Args:
      step: of the search, which decides the noise.

    Returns:
      The loss and float32 [n], the gradient in all variables as one vector.
    """
    indices = self._indices(step)
    if self._objective.is_elbo:
      return self._bound_and_gradient(step, indices)
    targets, controls = self._targets(indices), self._controls(indices)
    scale = self._batch_size / self._gradient_samples
    # As many rows as all replicas make in one chain each.
    most = self._micro_batch_size * distribution.num_replicas()
    count = self._gradient_samples
    if count <= most and count == distribution.filled(count):
      loss, gradient = self._one_pass(
          tf.constant(indices[:count]), self._views(indices[count:], most),
          targets, controls)
      return float(loss), scale * gradient.numpy()
    loss, cotangents = self._differentiate(
        self._views(indices, most), targets, controls)
    size = distribution.filled(min(most, self._gradient_samples))
    # What a last micro-batch is filled up with gets no gradient.
    cotangents = tf.pad(
        cotangents[:self._gradient_samples], [[0, size], [0, 0]])
    gradient = self._pull_back([
        (_filled(indices[i:min(i + size, self._gradient_samples)], size),
         cotangents[i:i + size])
        for i in range(0, self._gradient_samples, size)])
    return float(loss), scale * gradient.numpy()

  def _views(self, indices, most):
    """The views of samples, without gradient, in chains of at most so many."""
    size = min(most, len(indices))
    views = [self._population(_filled(indices[i:i + size], size))
             for i in range(0, len(indices), max(size, 1))]
    return tf.concat(
        [*views, tf.zeros([0, self._objective.width])], axis=0)[:len(indices)]

  def _indices(self, step):
    """The samples of a step; of a pool, each once before any comes again.

    Later rounds are in other orders, for the first of a population alone pass
    the gradient on.
    """
    size = self._batch_size
    pool = min((len(known) for known in (self._teacher, self._control)
                if known is not None), default=None)
    if pool is None or (step + 1) * size <= pool:
      return step * size + np.arange(size)
    number, place = divmod(step, pool // size)
    order = np.random.default_rng([self._seed, number]).permutation(pool)
    return order[place * size:(place + 1) * size]

  def _targets(self, indices):
    """The teacher's views of samples, or zeros where there is no teacher."""
    if self._teacher is None:
      return tf.zeros([len(indices), self._objective.width])
    return tf.constant(self._teacher[np.asarray(indices)])

  def _controls(self, indices):
    """The control variate on samples, as `Objective.value` takes it."""
    if self._control is None:
      return None
    return (tf.constant(self._control[np.asarray(indices)]),
            self._control_moments)

  def _bound_and_gradient(self, step, indices):
    """The ELBO objective, averaged over micro-batches.

    The variance of the last step is fitted to each of them, so it depends a
    little on their size; replicas share the images of each.
    """
    chosen = np.random.default_rng([self._seed, step]).integers(
        len(self._images), size=self._gradient_samples)
    size = self._micro_batch_size
    rows = distribution.filled(size)
    weights = tf.constant((np.arange(rows) < size) / size, tf.float32)
    results = [
        self._bound(
            _filled(indices[i:i + size], rows), tf.constant(
                self._images[_filled(chosen[i:i + size], rows).numpy()]),
            weights)
        for i in range(0, self._gradient_samples, size)]
    return (float(np.mean([float(loss) for loss, _ in results])),
            np.mean([gradient.numpy() for _, gradient in results], axis=0))

  def measure_metric(self) -> None:
    """Measures how the features move with all variables, besides before.

    For standard normal r and the Jacobian J of an image's features, the rows
    r . J have the second moment E J' J (Hutchinson's estimate): the metric of
    the variables, of which one backward pass gives a row for every image.
    """
    size, objective = self._micro_batch_size, self._objective
    rows = distribution.filled(size)
    count = len(self._multipliers)
    jacobian = self._jacobian().numpy().astype(np.float64)
    metric = 0.0
    draws = max(_METRIC_DRAWS, -(-_METRIC_ROWS * count // size))
    before = int(self._measured.numpy())
    for draw in range(draws * before, draws * (before + 1)):
      # Noise of its own: indices from the far end, below 2^31.
      indices = 2**31 - 1 - size * (1 + draw) + np.arange(size)
      # Of the first network's features only, whatever else the view holds.
      r = tf.pad(
          tf.random.stateless_normal(
              [size, objective.feature_width], [draw, 0], alg="philox"),
          [[0, 0], [0, objective.width - objective.feature_width]])
      each = self._pull_back_each(
          _filled(indices, rows), tf.pad(r, [[0, rows - size], [0, 0]]))
      each = each.numpy()[:size].astype(np.float64) @ jacobian
      metric = metric + each.T @ each
    metric = metric / (draws * size) / objective.feature_std**2
    if not np.all(np.isfinite(metric)) or not np.any(metric):
      if before:
        logging.warning("step %d: the metric of before is kept, for this one "
                        "is not finite", self.step)
        return
      raise UserError("the search's start must have finite, non-zero "
                      "sensitivities: the denoiser or the feature network "
                      "gives NaN, infinity or a constant")
    metric = (before * self.metric.numpy() + metric) / (before + 1)
    self.metric.assign(metric)
    self._measured.assign_add(1)
    self.preconditioner.assign(_preconditioner(
        metric, self._kind_of_entry, np.repeat(
            [v.constraint is not None for v in self.variables], self._sizes),
        self._multipliers > 0))

  def advance(self) -> tuple[float, float, bool]:
    """Makes one step.

    Returns:
      The loss, the norm of its gradient in u, and whether the step was taken:
      one with a value that is not finite, or that would end at coefficients
      that are not, changes nothing but the counters.
    """
    loss, gradient = self.loss_and_gradient(self.step)
    with np.errstate(over="ignore", invalid="ignore"):
      move = self.preconditioner.numpy() @ gradient
      # Rounding may leave less than 0 of nothing; NaN stays.
      norm = float(np.sqrt(np.maximum(move @ self.metric.numpy() @ move, 0)))
    taken = bool(np.isfinite(loss) and norm < self._largest_norm())
    if taken:
      taken = self._take(move, norm)
    else:
      self.not_finite = self._not_finite(loss, gradient)
    if not taken:
      self._skipped.assign_add(1)
    self._step.assign_add(1)
    return loss, norm, taken

  def _largest_norm(self) -> float:
    """The norm of a gradient from which on its step is not taken.

    In the objective's own unit, where that is large: a kernel's cube is far
    from 1.
    """
    _, second, count = self.moments
    if not count.numpy():
      return _LARGEST_NORM
    return _LARGEST_GROWTH * max(1.0, self._root_of_square(second, count))

  @staticmethod
  def _root_of_square(second, count) -> float:
    """Root of the mean square so far, which began at 0; never 0 itself."""
    square = second.numpy() / (1 - _BETA_2 ** count.numpy())
    return float(max(square, np.finfo(np.float64).tiny)) ** 0.5

  def _take(self, move: np.ndarray, norm: float) -> bool:
    """Adam's step, inside the constraints; whether the sampler allows it."""
    changed = [*self.variables, *self.moments]
    before = [tf.convert_to_tensor(variable) for variable in changed]
    first, second, count = self.moments
    first.assign(_BETA_1 * first + (1 - _BETA_1) * move)
    second.assign(_BETA_2 * second + (1 - _BETA_2) * norm**2)
    count.assign_add(1)
    # The mean of those so far, which began at 0.
    mean = first.numpy() / (1 - _BETA_1 ** count.numpy())
    step = (-self.rate * self._multipliers * mean
            / self._root_of_square(second, count))
    for part, variable in self._by_variable(step):
      value = variable.value + np.float32(np.reshape(part, variable.shape))
      if variable.constraint is not None:
        value = variable.constraint(value)
      variable.assign(value)
    try:
      self.sampler.coefficients().validate()
    except ValueError:
      self.not_finite = "the coefficients it would lead to"
      for variable, value in zip(changed, before):
        variable.assign(value)
      return False
    return True

  def _by_variable(self, vector: np.ndarray):
    """The parts of a vector of all variables, each with its variable."""
    return zip(np.split(vector, np.cumsum(self._sizes)[:-1]), self.variables)

  def _not_finite(self, loss, gradient) -> str:
    """Names what is NaN or infinite."""
    parts = [] if np.isfinite(loss) else ["the loss"]
    parts += [f"the gradient of {variable.name}"
              for part, variable in self._by_variable(gradient)
              if not np.all(np.isfinite(part))]
    return ", ".join(parts) or "the norm of the gradient"

  def judge(self, value: float) -> bool:
    """Remembers the variables if `value` is the lowest validation so far.

    Otherwise goes back to the best ones, with half the rate.

    Returns:
      Whether it went back: not where there is no best one yet.
    """
    back = np.isfinite(self.best_value) and not value < self.best_value
    if value < self.best_value:
      self._best_value.assign(value)
      self._best_step.assign(self.step)
      for best, variable in zip(self.best, self.variables):
        best.assign(variable.value)
    if back:
      self.restore_best()
      for moment in self.moments:
        moment.assign(tf.zeros_like(moment))
      self._factor.assign(0.5 * self._factor)
    return back

  def restore_best(self) -> None:
    """Puts the best variables back into the sampler."""
    for best, variable in zip(self.best, self.variables):
      variable.assign(best)


def _preconditioner(
    metric: np.ndarray, kinds, constrained, free) -> np.ndarray:
  """The metric's inverse, where it is known.

  In units in which all variables have the same effect. Variables to which
  hardly anything reacts are treated as if they had 3 % of the root mean square
  of their kind, and what hardly moves anything is moved less instead of more,
  or it would be thrown far. Constrained variables stand alone: at a bound they
  stay behind, and others that should go with them must not go alone.

  Args:
    metric: float64 [n, n], the second moment of the effects of the variables.
    kinds: [n], the kind of every variable, for each has units of its own.
    constrained: bool [n].
    free: bool [n], of those that are not held where they are.

  Returns:
    float64 [n, n], symmetric.
  """
  squares = np.diag(metric)
  scales = np.empty_like(squares)
  for kind in set(kinds):
    own = kinds == kind
    floor = _SENSITIVITY_FLOOR**2 * np.mean(squares[own]) + 1e-30
    scales[own] = 1 / np.sqrt(squares[own] + floor)
  inverse = np.diag(np.where(constrained & free, 1.0, 0.0))
  joint = np.ix_(*[np.flatnonzero(free & ~constrained)] * 2)
  values, vectors = np.linalg.eigh(
      (metric * scales[:, None] * scales)[joint])
  values = np.maximum(values, 0.0)
  inverse[joint] = (
      vectors * (values / (values + _LEAST_EFFECT) ** 2)) @ vectors.T
  return inverse * scales[:, None] * scales


def _filled(indices, size: int) -> tf.Tensor:
  """Indices with the last one repeated: another shape would be compiled."""
  return tf.constant(np.pad(indices, (0, size - len(indices)), mode="edge"))


class _Validation:
  """The objective of a sampler's images on fixed noise.

  Args:
    objective: an `objective.Objective`.
    denoiser: the frozen model.
    images: float32 [R, H, W, C], the training set; the ELBO takes a fixed draw.
    num_samples: how many.
    teacher: the teacher's views of these samples, or None.
    control: a control variate on them, as `Objective.value` takes it, or None.
    batch_size: images at a time.
    seed: of the noise.
    x0_bound: see `chain.bound_x0`.
    jit_compile: compile the network with XLA.

  Attributes:
    generator: of images without gradient.
  """

  def __init__(self, objective, denoiser, images, num_samples, teacher,
               control, *, batch_size, seed, x0_bound, jit_compile):
    self._objective = objective
    self._num_samples = num_samples
    self._seed = seed
    self._teacher = None if teacher is None else tf.constant(teacher)
    self._control = control
    self.generator = generator_lib.Generator(
        denoiser, min(batch_size, num_samples), jit_compile, x0_bound)
    self._view = distribution.row_wise(objective.view)
    self._value = tf.function(objective.value, autograph=False)
    order = np.random.default_rng(seed).permutation(len(images))
    self._images = images[order[:num_samples]]
    self._shape = denoiser.image_shape
    self._output = denoiser.compiled_output(jit_compile)
    self._for_chain = denoiser.for_chain

    def squares(coefficients, indices, x_0):
      first_noise, step_noise = chain.draw_noise(
          generator_lib.seed_pair(seed), distribution.own_rows(indices),
          self._shape, coefficients.num_steps)
      return distribution.all_rows(elbo.squares(
          self._output, coefficients, distribution.own_rows(x_0), first_noise,
          step_noise, self._for_chain))

    self._squares = distribution.replicated(squares)

  def __call__(self, coefficients) -> float:
    """The value of a sampler's coefficients (NumPy)."""
    if self._objective.is_elbo:
      if not np.all(coefficients.noise_scales[:-1]):
        return math.inf  # As `elbo.bound` says of it, without the network.
      coefficients = coefficients.map(tf.constant)
      count, size = len(self._images), self.generator.batch_size
      rows = []
      for start in range(0, count, size):
        indices = np.arange(start, min(start + size, count))
        filled = _filled(indices, size)
        rows.append(self._squares(
            coefficients, filled, tf.constant(self._images[filled.numpy()])
            )[:len(indices)])
      # The variance of the last step is fitted to all of them.
      return float(elbo.bound(
          coefficients, tf.reduce_mean(tf.concat(rows, axis=0), axis=0)))
    view = tf.concat(
        [self._view(images) for images in self.generator.batches(
            coefficients, self._num_samples, self._seed)], axis=0)
    teacher = tf.zeros([1]) if self._teacher is None else self._teacher
    return float(self._value(view, teacher, self._control))


@gin.configurable(denylist=["run_dir"])
@run_dir_lib.releasing_locks
def search(
    denoiser: Denoiser = gin.REQUIRED,
    sampler: Sampler | Callable[[NoiseSchedule], Sampler] = gin.REQUIRED,
    features: FeatureNetwork | list[FeatureNetwork] = gin.REQUIRED,
    dataset: ImageDataset | np.ndarray = gin.REQUIRED,
    *,
    run_dir: str,
    num_search_steps: int = gin.REQUIRED,
    batch_size: int = gin.REQUIRED,
    gradient_samples: int | None = None,
    micro_batch_size: int | None = None,
    sampling_batch_size: int | None = None,
    objective: str | dict[str, float] = "kid_linear",
    feature_weights: list[float] | None = None,
    teacher: dict | None = None,
    control_variate: bool = True,
    pool_samples: int = 8192,
    learning_rate: float = 0.15,
    rate_of_distance: float = 1.0,
    rate_multipliers: dict[str, float] | None = None,
    seed: int = 0,
    x0_bound: str | None = None,
    start_samples: int = 250,
    start_candidates: list[dict] | None = None,
    validation_samples: int = 1000,
    validate_every: int = 25,
    checkpoint_every: int = 25,
    log_every: int = 5,
    max_skipped: int = 20,
    restart: bool = False,
    cache_dir: str | None = None,
    jit_compile: bool = True,
) -> Sampler:
  """Searches a sampler, or goes on where an earlier call stopped.

  Writes checkpoints, TensorBoard events, `sampler.json` and pictures of the
  sampler (`PICTURES`) into the run directory; with `init="auto"` also
  `starts.json`. Killed at any moment and called again, it ends with the
  coefficients of an uninterrupted run. It never ends worse than it starts, by
  the objective on its validation images.

  Args:
    denoiser: the frozen model.
    sampler: the sampler to learn; or a function from a noise schedule to it,
      such as `@make_sampler` in gin, which `init="auto"` needs.
    features: the network of the loss, or a list of networks.
    dataset: its training set; or images, float32 [N, H, W, C] in [-1, 1].
    run_dir: folder of the run.
    num_search_steps: steps in all.
    batch_size: images per step, at least 2: the population of the objective.
    gradient_samples: how many of them the gradient passes through; all if
      None. Fewer are cheaper: the rest only sharpens the estimate of where the
      population stands, at the cost of a forward chain. See
      `Search.loss_and_gradient`.
    micro_batch_size: images per chain; `gradient_samples` if None. The last
      chain is filled up with images that count nothing. Smaller ones need less
      memory; the gradient is the same, but for the ELBO, whose last variance is
      fitted to each of them.
    sampling_batch_size: images per chain without gradient, of the validation,
      the starts and the pools; None: four times `micro_batch_size`, for they
      need less memory, but not above 250.
    objective: what is minimised, out of `objective.OBJECTIVES`: a name, or
      weights by name. The best step is chosen by the same on the validation
      images.
    feature_weights: weights of the networks in it; 1 each if None.
    teacher: of the matching objectives: solver, stride and num_steps; those
      left out keep `teacher.DEFAULT`.
    control_variate: whether the start's images from the same noise correct the
      moments of the population, for objectives made of moments
      (`distances.MOMENTS`): more precise, for the price of `pool_samples`
      images before the first step.
    pool_samples: how many images the teacher and the control variate make
      beforehand; the steps take their samples from these in turn. Validation
      has half as many of its own to know the control variate's moments by.
    learning_rate: Adam's highest rate, as the share of the features' standard
      deviation by which one step of all variables together moves them. It
      serves every K.
    rate_of_distance: the rate is at most this times the start's distance, the
      root of the Frechet distance in the same unit; a start with little way to
      go would be thrown off it first. It is measured on the control variate's
      images, and without one there is no such limit.
    rate_multipliers: factors on the rate by kind of variable
      (`sampler.KINDS`), 1 for kinds left out.
    seed: of the search's noise; validation uses seed + 1.
    x0_bound: see `chain.bound_x0`.
    start_samples: images by which `init="auto"` chooses; see `starts.choose`.
    start_candidates: what it chooses from, see `starts.possible`.
    validation_samples: images of the validation, on fixed noise.
    validate_every: steps between validations. One that is worse than the best
      takes the search back to the best step, with half the rate.
    checkpoint_every: steps between checkpoints.
    log_every: steps between TensorBoard scalars.
    max_skipped: steps with non-finite values after which the search stops.
    restart: where `run_dir` holds another search, begin anew instead of
      refusing; what the other one left is deleted.
    cache_dir: folder of the real images' features, which runs may share;
      run_dir/cache if None.
    jit_compile: compile the network with XLA.

  Returns:
    The sampler, with the best coefficients by validation.

  Raises:
    UserError: arguments out of range or that do not fit together; a run
      directory of another search; too many non-finite steps.
    Interrupted: Ctrl-C, or a notebook's stop button, during the steps: the step
      was finished and a checkpoint saved. A second one ends the call at once.
      It is a KeyboardInterrupt, as Ctrl-C before or after the steps raises.
    Terminated: SIGTERM during the steps, likewise.
  """
  check_search(locals())
  if gradient_samples is None:
    gradient_samples = batch_size
  if micro_batch_size is None:
    micro_batch_size = gradient_samples
  if sampling_batch_size is None:
    sampling_batch_size = min(250, 4 * micro_batch_size)
  dataset = dataset_lib.as_dataset(dataset)
  networks = as_networks("search.features", features)
  network_lib.check_shapes(denoiser, dataset, *networks)
  if len(dataset.images) < 2:
    raise UserError(f"data set {dataset.name!r} must have at least 2 images, "
                    "for the spread of their features. Received: "
                    f"{len(dataset.images)}")
  if denoiser.dtype_policy == precision.FLOAT16:
    logging.warning(
        "denoiser %r computes in float16, whose gradients are 0 below 6e-8 and "
        "whose times beyond 512 are halves: a search may stand still. In "
        "float32 or bfloat16 it would not", denoiser.name)
  multipliers = {**dict.fromkeys(KINDS, 1.0), **(rate_multipliers or {})}
  make_sampler, sampler = sampler, (
      sampler if isinstance(sampler, Sampler) else sampler(denoiser.schedule))
  if make_sampler is sampler and getattr(sampler, "init", None) == "auto":
    raise UserError("search.sampler must be a function from a schedule to a "
                    "sampler where init is 'auto'. Received: a sampler")
  if not sum(math.prod(variable.shape) for variables
             in sampler.variables_by_kind.values() for variable in variables):
    raise UserError(f"sampler {sampler.label!r} has nothing to learn: search "
                    "a learned family, such as ggdm+pred+time")
  sampler.reset()  # An object may have been searched before.
  denoiser_lib.check_times(denoiser, sampler)
  denoiser_lib.check_guidance(denoiser, sampler.coefficients())

  terms = objective_lib.weights_of_terms(objective)
  if objective_lib.ELBO in terms and denoiser.num_classes is not None:
    raise UserError("objective 'elbo' needs an unconditional denoiser: images "
                    f"come without their classes. Received: {denoiser.name!r}")
  teacher = {**teacher_lib.DEFAULT, **(teacher or {})}
  uses_teacher = objective_lib.uses(terms, objective_lib.MATCHING)
  control_variate = control_variate and objective_lib.uses(
      terms, distances.MOMENTS)
  try:
    objective_lib.weights_of_networks(feature_weights, networks)
  except (TypeError, ValueError) as error:
    raise UserError(f"search: {error}") from error
  try:
    teacher_coefficients = uses_teacher and teacher_lib.coefficients(
        denoiser.schedule, **teacher)
  except (TypeError, ValueError) as error:
    raise UserError(f"search.teacher: {error}") from error
  # All that decides the result: another one cannot go on from its checkpoint.
  setting = {
      "denoiser": denoiser.key, "dataset": dataset.sha256,
      "features": [network.key for network in networks],
      "feature_weights": feature_weights, "objective": terms,
      "x0_bound": x0_bound}
  if uses_teacher:
    setting["teacher"] = teacher
  identity = {
      **setting, "num_search_steps": num_search_steps,
      "batch_size": batch_size, "gradient_samples": gradient_samples,
      "pool_samples": (
          pool_samples if uses_teacher or control_variate else None),
      "control_variate": control_variate,
      "learning_rate": learning_rate, "rate_of_distance": rate_of_distance,
      "rate_multipliers": multipliers,
      "seed": seed, "validation_samples": validation_samples,
      "validate_every": validate_every}
  if objective_lib.ELBO in terms:  # To which alone it makes a difference.
    identity["micro_batch_size"] = micro_batch_size

  run = run_dir_lib.RunDir(run_dir, cache_dir)
  run.lock()
  # Before anything that takes long: the sampler is not known with "auto", but
  # what it may become is.
  candidates = [({}, sampler)]
  if getattr(sampler, "init", None) == "auto":
    candidates = starts.possible(
        functools.partial(make_sampler, denoiser.schedule), start_candidates)
  run.check("search", identity, restart, open_to={
      "sampler": [candidate.get_config() for _, candidate in candidates]})
  reals = [reference.reference(
      network, dataset, quantise=False, cache_dir=run.cache).pool
           for network in networks]
  for network, real in zip(networks, reals):
    network_lib.check_features(network, dataset, real)
  goal = objective_lib.Objective(
      terms, networks, reals, denoiser.image_shape, feature_weights)

  make_views = functools.partial(
      teacher_lib.views, goal, denoiser, cache_dir=run.cache,
      batch_size=sampling_batch_size,
      identity=[n.key for n in networks] + ["teacher_pixels" in goal.terms],
      x0_bound=x0_bound, jit_compile=jit_compile)

  def views_of_teacher(num_samples, noise_seed):
    if not uses_teacher:
      return None
    return make_views(
        teacher_coefficients, num_samples=num_samples, seed=noise_seed)

  make_value = functools.partial(
      _Validation, goal, denoiser, dataset.images, seed=seed + 1,
      batch_size=sampling_batch_size,
      x0_bound=x0_bound, jit_compile=jit_compile)

  if getattr(sampler, "init", None) == "auto":
    sampler = starts.choose(
        candidates, lambda count: make_value(
            count, views_of_teacher(count, seed + 1), None),
        start_samples, run.path(run_dir_lib.STARTS),
        {**setting, "family": sampler.get_config(), "seed": seed + 1})

  run.claim("search", {**identity, "sampler": sampler.get_config()}, restart,
            (run_dir_lib.SAMPLER, *run_dir_lib.PICTURES, run_dir_lib.PICTURE_EVENTS))
  run.keep_config()
  first = sampler.coefficients().numpy()

  def make_state(**pools):
    state = Search(
        denoiser, sampler, goal, batch_size=batch_size,
        gradient_samples=gradient_samples, micro_batch_size=micro_batch_size,
        num_search_steps=num_search_steps, rate_multipliers=multipliers,
        seed=seed, images=dataset.images, x0_bound=x0_bound,
        jit_compile=jit_compile, **pools)
    checkpoints = checkpoints_lib.Checkpoints(
        state.checkpoint, run.path("checkpoints"), run.path("tensorboard"))
    checkpoints.restore()
    return state, checkpoints

  def finish(state, generator):
    # The chief knows what there is.
    if distribution.everyones(not all(
        os.path.exists(run.path(name))
        for name in (*run_dir_lib.PICTURES, run_dir_lib.PICTURE_EVENTS)))[0]:
      _draw(run, sampler, first, generator, seed + 1, state.best_step)
    distribution.everyones(0)  # All workers find what the chief has written.
    return sampler

  if distribution.everyones(os.path.exists(run.path(run_dir_lib.SAMPLER)))[0]:
    # Without the pools, which only further steps would need.
    state, _ = make_state(learning_rate=learning_rate)
    if state.step == num_search_steps:
      state.restore_best()
      return finish(
          state, make_value(validation_samples, None, None).generator)
  control, known, rate = None, None, learning_rate
  if control_variate:
    # Validation has a pool of its own: what the steps owe to the chance of
    # theirs must not look like progress.
    control, other = (
        make_views(sampler.coefficients().numpy(), num_samples=count,
                   seed=noise_seed, description="control variate")
        for count, noise_seed in (
            (pool_samples, seed),
            (max(pool_samples // 2, validation_samples), seed + 1)))
    known = other[:validation_samples], goal.control_moments(other)
    distance = metrics.fid(reals[0], other[:, :goal.feature_width])
    rate = min(rate, rate_of_distance * max(distance, 0.0) ** 0.5
               / goal.feature_std)
    logging.info("Frechet distance of the start %.3f, rate %.4f", distance,
                 rate)
  state, checkpoints = make_state(
      learning_rate=rate, teacher=views_of_teacher(pool_samples, seed),
      control=control)
  if checkpoints.latest:
    logging.info("going on from step %d", state.step)
  validation = make_value(
      validation_samples, views_of_teacher(validation_samples, seed + 1), known)

  seconds = checkpoints.seconds  # Of the steps alone.

  def validate() -> float:
    # The chief's, lest rounding should part the workers.
    return distribution.everyones(
        validation(sampler.coefficients().numpy()))[0]

  with checkpoints.writer().as_default(), progress.bar(
      num_search_steps, f"search {sampler.label} K={sampler.num_steps}", "step",
      initial=state.step) as bar, (
          signals.deferred()) as termination:
    start = state.step
    if start == 0:
      tf.summary.text("config", f"```\n{gin.config_str()}\n```", step=0)
      _summarise_hparams(sampler, goal.terms, {
          "num_search_steps": num_search_steps, "batch_size": batch_size,
          "gradient_samples": gradient_samples,
          "learning_rate": learning_rate, "seed": seed,
          "x0_bound": x0_bound or "none", "dataset": dataset.name})
      state.judge(validate())
      _summarise_state(sampler, validation.generator, seed, 0,
                       state.best_value)
      logging.info("validation at the start: %.4f", state.best_value)
      state.measure_metric()
      if os.path.exists(run.path(run_dir_lib.STARTS)):
        with open(run.path(run_dir_lib.STARTS), encoding="utf-8") as f:
          tf.summary.text("starts", f"```\n{f.read()}\n```", step=0)
    clock, since = time.monotonic(), start
    while state.step < num_search_steps:
      began = time.monotonic()
      loss, norm, taken = state.advance()
      seconds += time.monotonic() - began
      step = state.step
      bar.update(1)
      if not taken:
        logging.warning("step %d skipped: loss %s, gradient norm %s", step,
                        loss, norm)
        if state.skipped > max_skipped:
          raise UserError(
              f"search stopped at step {step}: {state.skipped} steps had "
              f"values that are not finite, this one in {state.not_finite}; "
              f"the last good checkpoint is {checkpoints.latest}")
      if step % log_every == 0 or step == num_search_steps:
        pace = (time.monotonic() - clock) / (step - since)
        clock, since = time.monotonic(), step
        for name, value in (
            ("search/loss", loss), ("search/gradient_norm", norm),
            ("search/rate", state.rate), ("search/seconds_per_step", pace),
            ("search/skipped_steps", state.skipped)):
          tf.summary.scalar(name, value, step=step)
        bar.set_postfix(loss=f"{loss:.3f}",
                        best=f"{state.best_value:.3f}")
      if step % validate_every == 0 or step == num_search_steps:
        value = validate()
        _summarise_state(sampler, validation.generator, seed, step, value)
        back = state.judge(value)
        logging.info(
            "step %d: validation %.4f%s", step, value,
            f", back to {state.best_value:.4f} at step {state.best_step} with "
            "half the rate" if back else "")
        if back and step < num_search_steps:
          state.measure_metric()
        clock, since = time.monotonic(), step
      # By the signal of whichever worker.
      signum = int(max(distribution.everyones(termination.signum)))
      if step % checkpoint_every == 0 or step == num_search_steps or signum:
        checkpoints.save(step, seconds)
        clock, since = time.monotonic(), step
      if signum:
        message = (f"search ended by {signals.name(signum)} after step {step} "
                   f"of {num_search_steps}, with checkpoint "
                   f"{checkpoints.latest}; called again it goes on")
        raise (Interrupted(message) if signum == signal.SIGINT
               else Terminated(message))

  if not np.isfinite(state.best_value):
    raise UserError("no step of the search had a finite validation value: the "
                    "denoiser or the feature network gives NaN or infinity")
  state.restore_best()
  best = sampler.coefficients().numpy()
  run.remove(*run_dir_lib.PICTURES, run_dir_lib.PICTURE_EVENTS)  # Those of another search.
  card.write(run.path(run_dir_lib.SAMPLER), card.SamplerCard(
      label=sampler.label, coefficients=best,
      denoiser=denoiser.identity,
      search={
          "config": sampler.get_config(),
          "steps": num_search_steps, "best_step": state.best_step,
          "skipped_steps": state.skipped, "batch_size": batch_size,
          "gradient_samples": gradient_samples, "objective": goal.terms,
          "control_variate": control_variate,
          "learning_rate": learning_rate, "rate": rate,
          "rate_multipliers": multipliers,
          "seed": seed, "seconds": round(seconds, 3),
          "validation": state.best_value,
          "validation_samples": validation_samples,
          "features": [{"name": network.name, "sha256": network.sha256}
                       for network in networks],
          "dataset": dataset.name}, x0_bound=x0_bound))
  return finish(state, validation.generator)


def _draw(run, sampler, first, generator, seed, step):
  """Draws the sampler into the run directory, and into TensorBoard.

  Args:
    run: the run directory.
    sampler: with its best coefficients.
    first: coefficients of its start.
    generator: of images.
    seed: of their noise.
    step: of the best coefficients.
  """
  best, label = sampler.coefficients().numpy(), sampler.label
  sampler_figures.coefficients_png(
      run.path(run_dir_lib.COEFFICIENTS), best, label, first, sampler.schedule)
  image, states, x0_hats = generator.path(best, seed)
  sampler_figures.path_png(run.path(run_dir_lib.PATH), states, x0_hats, image, best.times, label)
  # As many as the generator makes at a time, in a square of at most 8 x 8.
  side = min(8, max(1, int(generator.batch_size ** 0.5)))
  grids.samples_png(run.path(run_dir_lib.BEFORE_AFTER), [
      (title, generator.images(coefficients, side * side, seed))
      for title, coefficients in (
          (f"before the search, K = {sampler.num_steps}", first),
          (f"after {step} steps of it: {label}", best))], side)
  if not distribution.is_chief():
    return
  # Drawn again after a kill: those before are no other step's.
  with storage.replacing_folder(run.path(run_dir_lib.PICTURE_EVENTS)) as events:
    writer = tf.summary.create_file_writer(events)
    with writer.as_default():
      for name in run_dir_lib.PICTURES:
        with open(run.path(name), "rb") as f:
          pixels = tf.io.decode_png(f.read(), channels=3)
        tf.summary.image(name.removesuffix(".png"), pixels[None], step=step)
    writer.close()


def _summarise_hparams(sampler, objective, values):
  """Writes what TensorBoard's table of hyper-parameters shows of a run."""
  # What there is to show TensorBoard finds itself; told of one search of a
  # folder, it would show no other's.
  config = sampler.get_config()
  hparams.hparams({
      "family": sampler.label, "num_steps": sampler.num_steps,
      "init": str(config.get("init")), "stride": str(config.get("stride")),
      "objective": json.dumps(objective), **values})


def _summarise_state(sampler, generator, seed, step, value):
  """Writes the sampler's state to TensorBoard."""
  coefficients = sampler.coefficients().numpy()
  tf.summary.scalar("validation/objective", value, step=step)
  for name, value in coefficients.named_scalars().items():
    tf.summary.scalar(f"coefficients/{name}", value, step=step)
  for name, values in coefficients.arrays().items():
    if name == "state_weights":
      values = values[np.tril_indices(coefficients.num_steps)]
    tf.summary.histogram(f"coefficients/{name}", values, step=step)
  images = generator.images(coefficients, 64, seed + 1)
  grid = grids.image_grid(images, columns=8)
  tf.summary.image("samples", grid[None], step=step)

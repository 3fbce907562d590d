"""Fixed samplers on the run's noise: the teacher and the control variate.

Both are made before the first step. What the objective sees of their images is
kept in pools, from which the steps of the search take their samples in turn.
"""

import json
import os
import zipfile

import numpy as np
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf import storage
from ddss_tf.runs import fingerprint
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers.coefficients import Coefficients


class Pool:
  """The samples of every step, and what is known of them beforehand.

  Args:
    objective: an `objectives.Objective`.
    batch_size: samples of a step.
    seed: the seed of the run.
    teacher: float32 [M, width], the teacher's views of the first M samples of
      the seed, or None.
    control: float32 [M, width], a control variate's views of the same samples,
      see `distances.Control`, or None.
    real_samples: fresh real images of every step; None: all of them, always.
  """

  def __init__(self, objective, batch_size: int, seed: int,
               teacher: np.ndarray | None = None,
               control: np.ndarray | None = None,
               real_samples: int | None = None):
    self._objective, self._real_samples = objective, real_samples
    self._batch_size, self._seed, self._width = (
        batch_size, seed, objective.width)
    self._teacher, self._control = teacher, control
    self._moments = (
        None if control is None else objective.control_moments(control))

  def indices(self, step: int) -> np.ndarray:
    """The samples of a step, int [batch_size].

    Without a pool every step has samples of its own. With a pool, none of its
    samples comes twice in one round through it. Later rounds have other orders,
    because the gradient passes through the first samples of a step only.
    """
    size = self._batch_size
    pool = min((len(known) for known in (self._teacher, self._control)
                if known is not None), default=None)
    if pool is None or (step + 1) * size <= pool:
      return step * size + np.arange(size)
    number, place = divmod(step, pool // size)
    order = np.random.default_rng([self._seed, number]).permutation(pool)
    return order[place * size:(place + 1) * size]

  def fresh_reals(self, step: int) -> tuple[tf.Tensor, ...]:
    """The real features of a step, as `Objective.value` takes them."""
    if self._real_samples is None:
      return ()
    rows = np.random.default_rng([self._seed, step, 1]).choice(
        self._objective.num_reals, self._real_samples, replace=False)
    return self._objective.fresh_reals(rows)

  def targets(self, indices: np.ndarray
              ) -> tuple[tf.Tensor, tuple | None]:
    """What is known of samples, as `Objective.value` takes it.

    Returns:
      The teacher's views [B, width], zeros without a teacher; the control
      variate's views and moments, None without it.
    """
    rows = np.asarray(indices)
    teacher = (tf.zeros([len(rows), self._width]) if self._teacher is None
               else tf.constant(self._teacher[rows]))
    control = (None if self._control is None
               else (tf.constant(self._control[rows]), self._moments))
    return teacher, control


def filled(indices: np.ndarray, size: int) -> tf.Tensor:
  """Indices, filled up to `size` by repeating the last one.

  A batch of another shape would be compiled anew.
  """
  return tf.constant(np.pad(indices, (0, size - len(indices)), mode="edge"))


def views(objective, denoiser, known: Coefficients, *, num_samples: int,
          seed: int, cache_dir: str, identity: list, batch_size: int = 250,
          x0_bound: str | None = None, jit_compile: bool = True,
          description: str = "teacher") -> np.ndarray:
  """What an objective sees of a fixed sampler's images, made once and cached.

  Args:
    objective: its `view` is taken.
    denoiser: the frozen model.
    known: the sampler's coefficients, NumPy.
    num_samples: images 0 ... num_samples - 1 of the seed.
    seed: the seed of the noise.
    cache_dir: folder of the cache.
    identity: all else that decides a view, such as the networks' keys, as JSON.
    batch_size: images at a time.
    x0_bound: see `chain.bound_x0`.
    jit_compile: compile the network with XLA.
    description: the text of the progress bar.

  Returns:
    float32 [num_samples, width].
  """
  key = fingerprint.text_sha256(json.dumps([
      fingerprint.coefficients_sha256(known), denoiser.key, num_samples,
      seed, x0_bound, *identity]))
  path = os.path.join(cache_dir, f"views-{key[:32]}.npz")
  if storage.exists(path):
    try:
      with storage.load_arrays(path) as file:
        found = file["views"]
      if len(found) == num_samples:
        return found
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
      pass  # A damaged file is made again.
  generator = generator_lib.Generator(
      denoiser, min(batch_size, num_samples), jit_compile, x0_bound)
  view = distribution.row_wise(objective.view)
  found = np.concatenate([view(images).numpy() for images in generator.batches(
      known, num_samples, seed, description)])
  storage.save_arrays(path, {"views": found})
  return found


class Pools:
  """Makes the pools of a search.

  Args:
    parts: `SearchParts`.
    goal: the objective.
    cache: folder of the pools' files.
  """

  def __init__(self, parts, goal, cache: str):
    self._parts, self._goal, self._cache = parts, goal, cache

  def _views(self, coefficients, num_samples, seed, description):
    options = self._parts.options
    return views(
        self._goal, self._parts.denoiser, coefficients,
        num_samples=num_samples, seed=seed, cache_dir=self._cache,
        batch_size=options.sampling_batch_size,
        identity=[network.key for network in self._parts.networks] + [
            "teacher_pixels" in self._goal.terms],
        x0_bound=options.x0_bound, jit_compile=options.jit_compile,
        description=description)

  def teacher(self, num_samples: int, seed: int) -> np.ndarray | None:
    """The teacher's views, None without a teacher."""
    if self._parts.teacher is None:
      return None
    return self._views(self._parts.teacher, num_samples, seed, "teacher")

  def control(self, start: Coefficients) -> tuple[np.ndarray, np.ndarray]:
    """The views of the search's start on the steps' and the validation's noise.

    The validation has a pool of its own, so that a gain that the steps owe to
    the chance of their pool does not look like progress.
    """
    options = self._parts.options
    most = max(options.pool_samples // 2, options.validation_samples)
    return tuple(
        self._views(start, count, seed, "control variate")
        for count, seed in ((options.pool_samples, options.seed),
                            (most, options.seed + 1)))

"""A many-step sampler whose images a few-step one can be matched to.

Past the paper, which needs no teacher. Both start at the same noise, so every
image has a target of its own and the gradient has little noise; what a few
steps cannot reach comes out too smooth (see `objectives.Objective`).
"""

import json
import os
import zipfile

import numpy as np
import tensorflow as tf

from ddss_tf import fingerprint
from ddss_tf import sampling
from ddss_tf import solvers
from ddss_tf import storage

DEFAULT = {"solver": "dpm++3m", "stride": "logsnr", "num_steps": 25}


def teacher_views(objective, denoiser, *, solver: str, stride, num_steps: int,
                  num_samples: int, seed: int, cache_dir: str,
                  identity: list, x0_bound: str | None = None,
                  jit_compile: bool = True) -> np.ndarray:
  """What an objective sees of the teacher's images, made once and cached.

  Args:
    objective: its `view` is taken.
    denoiser: the frozen model, which the teacher shares.
    solver: a deterministic one of `solvers.SOLVERS`.
    stride: see `NoiseSchedule.stride`.
    num_steps: of the teacher.
    num_samples: images 0 ... num_samples - 1 of the seed.
    seed: of the noise.
    cache_dir: folder of the cache.
    identity: all else that decides a view, such as the networks' keys; JSON.
    x0_bound: see `chain.bound_x0`.
    jit_compile: compile the network with XLA.

  Returns:
    float32 [num_samples, width].

  Raises:
    ValueError: unknown solver or stride, or a teacher that adds noise, whose
      images the noise of the first state does not decide.
  """
  coefficients = solvers.solver_coefficients(
      denoiser.schedule, solver, num_steps, stride).numpy()
  if np.any(coefficients.noise_scales):
    raise ValueError(
        f"the teacher must be deterministic. Received: solver={solver!r}")
  key = fingerprint.text_sha256(json.dumps([
      fingerprint.arrays_sha256(coefficients), denoiser.sha256, num_samples,
      seed, x0_bound, *identity]))
  path = os.path.join(cache_dir, f"teacher-{key[:32]}.npz")
  if os.path.exists(path):
    try:
      with np.load(path, allow_pickle=False) as file:
        views = file["views"]
      if len(views) == num_samples:
        return views
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
      pass  # Damaged: made again.
  generator = sampling.Generator(
      denoiser, min(250, num_samples), jit_compile, x0_bound)
  view = tf.function(objective.view)
  views = np.concatenate([view(images).numpy() for images in generator.batches(
      coefficients, num_samples, seed, f"teacher, {num_steps} steps")])
  os.makedirs(cache_dir, exist_ok=True)
  with storage.replacing(path) as temporary:
    np.savez(temporary, views=views)
  return views

"""A many-step sampler whose images a few-step one can be matched to.

Past the paper, which needs no teacher. Both start at the same noise, so every
image has a target of its own and the gradient has little noise; what a few
steps cannot reach comes out too smooth (see `objective.Objective`).
"""

import json
import os
import zipfile

import numpy as np

from ddss_tf import distribution
from ddss_tf import storage
from ddss_tf.runs import fingerprint
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import solvers
from ddss_tf.samplers.coefficients import Coefficients

DEFAULT = {"solver": "dpm++3m", "stride": "logsnr", "num_steps": 25}


def coefficients(schedule, solver: str, stride, num_steps: int) -> Coefficients:
  """The teacher's coefficients, NumPy.

  Args:
    schedule: of the denoiser, which the teacher shares.
    solver: a deterministic one of `solvers.SOLVERS`.
    stride: see `NoiseSchedule.stride`.
    num_steps: of the teacher.

  Raises:
    ValueError: unknown solver or stride, or a teacher that adds noise, whose
      images the noise of the first state does not decide.
  """
  result = solvers.solver_coefficients(
      schedule, solver, num_steps, stride).numpy()
  if np.any(result.noise_scales):
    raise ValueError(
        f"the teacher must be deterministic. Received: solver={solver!r}")
  return result


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
    seed: of the noise.
    cache_dir: folder of the cache.
    identity: all else that decides a view, such as the networks' keys; JSON.
    batch_size: images at a time.
    x0_bound: see `chain.bound_x0`.
    jit_compile: compile the network with XLA.
    description: of the progress bar.

  Returns:
    float32 [num_samples, width].
  """
  key = fingerprint.text_sha256(json.dumps([
      fingerprint.coefficients_sha256(known), denoiser.key, num_samples,
      seed, x0_bound, *identity]))
  path = os.path.join(cache_dir, f"views-{key[:32]}.npz")
  if os.path.exists(path):
    try:
      with np.load(path, allow_pickle=False) as file:
        found = file["views"]
      if len(found) == num_samples:
        return found
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
      pass  # Damaged: made again.
  generator = generator_lib.Generator(
      denoiser, min(batch_size, num_samples), jit_compile, x0_bound)
  view = distribution.row_wise(objective.view)
  found = np.concatenate([view(images).numpy() for images in generator.batches(
      known, num_samples, seed, description)])
  with storage.replacing(path) as temporary:
    np.savez(temporary, views=found)
  return found

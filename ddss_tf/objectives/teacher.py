"""A many-step sampler whose images a few-step one can be matched to.

The paper has no teacher. Both samplers start at the same noise, so every image
has a target of its own and the gradient has little noise. What a few steps
cannot reach comes out too smooth (see `objective.Objective`).
"""

import numpy as np

from ddss_tf.samplers import solvers
from ddss_tf.samplers.coefficients import Coefficients

DEFAULT = {"solver": "dpm++3m", "stride": "logsnr", "num_steps": 25}


def coefficients(schedule, solver: str, stride, num_steps: int) -> Coefficients:
  """The teacher's coefficients, NumPy.

  Args:
    schedule: the schedule of the denoiser, which the teacher shares.
    solver: a deterministic one of `solvers.SOLVERS`.
    stride: see `strides.times_of`.
    num_steps: the number of steps of the teacher.

  Raises:
    ValueError: unknown solver or stride, or a teacher that adds noise: its
      first state alone does not decide its images.
  """
  result = solvers.solver_coefficients(
      schedule, solver, num_steps, stride).numpy()
  if np.any(result.noise_scales):
    raise ValueError(
        f"the teacher must be deterministic. Received: solver={solver!r}")
  return result

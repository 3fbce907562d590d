"""A found sampler as a scheduler of diffusers, for people who use PyTorch.

It is written as a folder of files. `scheduling_ddss.py` has a class that needs
PyTorch and diffusers only (`assets/scheduling_ddss.py`, never imported here).
`scheduler_config.json` has the coefficients. Guidance is not a scheduler's
business there but the pipeline's, so of a sampler with guidance there is also
`guidance.py`, whose function gives a pipeline the scale of every step.
"""

import os

from ddss_tf import storage
from ddss_tf.formats import diffusers
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.samplers.card import SamplerCard
from ddss_tf.schedules import FlowSchedule

MODULE = "scheduling_ddss.py"
_CLASS = "DDSSScheduler"
_FLOW = "flow_prediction"
_ASSETS = os.path.join(os.path.dirname(__file__), "assets")
_TEMPLATE = os.path.join(_ASSETS, MODULE)


def config(card: SamplerCard, denoiser: Denoiser,
           integer_timesteps: bool = False) -> dict:
  """The scheduler's configuration.

  Args:
    card: the card of the sampler.
    denoiser: the model that the scheduler is used with in PyTorch; its process,
      what it predicts and its guidance scale are written.
    integer_timesteps: round the times, for models that cannot take fractions.
      The images then differ from ours.

  Returns:
    JSON, with the arguments of the class in `scheduling_ddss.py`. With guidance
    it has "guidance_scales", one a step, also where they are all the same.

  Raises:
    UserError: the sampler is in v and the model not of a flow, or the other way
      round; or the states or times of the model are not those of diffusers.
  """
  coefficients, schedule = card.coefficients, denoiser.schedule
  if coefficients.in_v != schedule.in_v:
    words = {False: "in eps, on a process with betas", True: "in v, on a flow"}
    raise UserError(
        "sampler and model of a scheduler must be of one process. Received: "
        f"{card.label!r} {words[coefficients.in_v]}, and {denoiser.name!r} "
        f"{words[schedule.in_v]}")
  process = (_flow(denoiser) if isinstance(schedule, FlowSchedule)
             else _variance_preserving(denoiser))
  found = {
      "_class_name": _CLASS,
      **coefficients.to_dict(),
      "denoiser": card.denoiser,
      "integer_timesteps": integer_timesteps,
      "label": card.label,
      "num_train_timesteps": schedule.num_train_steps,
      **process,
      "x0_bound": card.x0_bound,
  }
  # A chain does not look at the model's own scale where the steps have theirs.
  if "guidance_scales" not in found and denoiser.guidance_scale is not None:
    found["guidance_scales"] = (
        [float(denoiser.guidance_scale)] * coefficients.num_steps)
  return found


def _variance_preserving(denoiser: Denoiser) -> dict:
  """The process of a model with betas, and what it predicts."""
  names = {ours: theirs for theirs, ours
           in diffusers.PREDICTIONS.items()}
  other = denoiser.convention.non_default()
  if other.pop("prediction", "eps") not in names or other:
    raise UserError(
        "a scheduler of diffusers needs a variance-preserving model of training "
        f"steps that predicts {', '.join(names)}. Received: {denoiser.name!r} "
        f"with {denoiser.convention.non_default()}")
  return {"prediction_type": names[denoiser.prediction],
          "trained_betas": denoiser.schedule.betas.tolist()}


def _flow(denoiser: Denoiser) -> dict:
  """The process of a flow; pipelines feed T s, or divide it by T themselves."""
  convention, steps = denoiser.convention, denoiser.schedule.num_train_steps
  if (convention.prediction, convention.process, convention.time_input,
      convention.time_offset) != ("flow", "flow", "flow", 0) or (
          convention.time_scale not in (1, steps)):
    raise UserError(
        "a scheduler of diffusers needs a model of a flow that has process, "
        f"time_input and prediction 'flow', and a time_scale of {steps} or 1. "
        f"Received: {denoiser.name!r} with {convention.non_default()}")
  return {"flow_shift": denoiser.schedule.shift, "prediction_type": _FLOW}


def write(folder: str, card: SamplerCard, denoiser: Denoiser,
          integer_timesteps: bool = False) -> None:
  """Writes the files; the folder appears whole or not at all.

  Args:
    folder: its path; only a folder of such files is replaced.
    card: see `config`.
    denoiser: see `config`.
    integer_timesteps: see `config`.

  Raises:
    UserError: something else is there, or see `config`.
  """
  if storage.exists(folder) and not (
      storage.isdir(folder)
      and set(storage.listdir(folder)) <= {
          MODULE, run_dir_lib.GUIDANCE, diffusers.SCHEDULER, "__pycache__"}):
    raise UserError(
        f"folder of a scheduler must be new, or hold {MODULE}, {run_dir_lib.GUIDANCE} and "
        f"{diffusers.SCHEDULER} only. Received: {folder!r}")
  values = config(card, denoiser, integer_timesteps)
  names = [MODULE] + [run_dir_lib.GUIDANCE] * ("guidance_scales" in values)
  with storage.replacing_folder(folder) as temporary:
    for name in names:
      storage.copy(os.path.join(_ASSETS, name), os.path.join(temporary, name))
    storage.write_json(os.path.join(temporary, diffusers.SCHEDULER), values)

"""A found sampler as a scheduler of diffusers, for people who use PyTorch.

It is written as a folder of two files. `scheduling_ddss.py` has a class that
needs PyTorch and diffusers only (`assets/scheduling_ddss.py`, never imported
here). `scheduler_config.json` has the coefficients.
"""

import os

from ddss_tf import storage
from ddss_tf.formats import diffusers
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.samplers.card import SamplerCard

MODULE = "scheduling_ddss.py"
_CLASS = "DDSSScheduler"
_TEMPLATE = os.path.join(
    os.path.dirname(__file__), "assets", MODULE)


def config(card: SamplerCard, denoiser: Denoiser,
           integer_timesteps: bool = False) -> dict:
  """The scheduler's configuration.

  Args:
    card: the card of the sampler.
    denoiser: the model that the scheduler is used with in PyTorch; its betas
      and what it predicts are written.
    integer_timesteps: round the times, for models that cannot take fractions.
      The images then differ from ours.

  Returns:
    JSON, with the arguments of the class in `scheduling_ddss.py`.

  Raises:
    UserError: the sampler or the model has guidance, which a scheduler cannot
      apply, or the states or times of the model are not those of diffusers.
  """
  if card.coefficients.guidance_scales is not None:
    raise UserError("a scheduler of diffusers cannot guide. Received: a sampler "
                    f"with guidance_scales, {card.label!r}")
  if denoiser.guidance_scale is not None:
    raise UserError("a scheduler of diffusers cannot guide. Received: a "
                    f"denoiser with guidance_scale {denoiser.guidance_scale}, "
                    f"{denoiser.name!r}")
  if card.coefficients.in_v or denoiser.schedule.in_v:
    raise UserError("a scheduler of diffusers must be of a sampler in eps. "
                    f"Received: one of a flow, {card.label!r}")
  names = {ours: theirs for theirs, ours
           in diffusers.PREDICTIONS.items()}
  other = denoiser.convention.non_default()
  if other.pop("prediction", "eps") not in names or other:
    raise UserError(
        "a scheduler of diffusers needs a variance-preserving model of training "
        f"steps that predicts {', '.join(names)}. Received: {denoiser.name!r} "
        f"with {denoiser.convention.non_default()}")
  betas = denoiser.schedule.betas
  return {
      "_class_name": _CLASS,
      **card.coefficients.to_dict(),
      "denoiser": card.denoiser,
      "integer_timesteps": integer_timesteps,
      "label": card.label,
      "num_train_timesteps": len(betas),
      "prediction_type": names[denoiser.prediction],
      "trained_betas": betas.tolist(),
      "x0_bound": card.x0_bound,
  }


def write(folder: str, card: SamplerCard, denoiser: Denoiser,
          integer_timesteps: bool = False) -> None:
  """Writes the two files; the folder appears whole or not at all.

  Args:
    folder: its path; only a folder of such files is replaced.
    card: see `config`.
    denoiser: see `config`.
    integer_timesteps: see `config`.

  Raises:
    UserError: something else is there.
  """
  if storage.exists(folder) and not (
      storage.isdir(folder)
      and set(storage.listdir(folder)) <= {
          MODULE, diffusers.SCHEDULER, "__pycache__"}):
    raise UserError(
        f"folder of a scheduler must be new, or hold {MODULE} and "
        f"{diffusers.SCHEDULER} only. Received: {folder!r}")
  with storage.replacing_folder(folder) as temporary:
    storage.copy(_TEMPLATE, os.path.join(temporary, MODULE))
    storage.write_json(
        os.path.join(temporary, diffusers.SCHEDULER),
        config(card, denoiser, integer_timesteps))

"""Differentiable diffusion sampler search in TensorFlow and Keras.

A frozen diffusion model comes in, a sampler of few steps comes out:

  denoiser = ddss_tf.load_denoiser("path/to/diffusers_folder")
  images = ddss_tf.load_dataset("folder:my_images", crop="center", resize=64)
  features = ddss_tf.load_features("keras:InceptionV3")
  sampler = ddss_tf.make_sampler(
      denoiser.schedule, "ggdm+pred+time", num_steps=10)
  ddss_tf.search(denoiser, sampler, features, images, run_dir="runs/mine",
                 num_search_steps=500, batch_size=128)
  ddss_tf.evaluate("runs/mine", denoiser, images, features, num_samples=5000)
  ddss_tf.export("runs/mine", denoiser, also=["diffusers"])

Every stage leaves its files in the run directory and goes on where it stopped.
The public names are imported on first use, so that `import ddss_tf` is quick.
"""

import functools
import importlib
import inspect as _inspect
import typing

from ddss_tf.version import __version__

_PUBLIC = {
    "Coefficients": "samplers.coefficients",
    "Denoiser": "denoisers.denoiser",
    "FeatureNetwork": "features.network",
    "FixedSampler": "samplers.sampler",
    "GGDM": "samplers.families",
    "ImageDataset": "datasets.dataset",
    "LearnedSampler": "samplers.learned",
    "NoiseSchedule": "schedules",
    "Sampler": "samplers.sampler",
    "SamplerCard": "samplers.card",
    "SolverSampler": "samplers.sampler",
    "UserError": "errors",
    "compare": "evaluation.compare",
    "draw_noise": "samplers.chain",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "gaussian_denoiser": "denoisers.gaussian",
    "inspect": "reporting.inspection",
    "load_dataset": "datasets.load",
    "load_denoiser": "formats.load",
    "load_features": "features.load",
    "make_sampler": "samplers.families",
    "make_schedule": "schedules",
    "on_schedule": "denoisers.clocks",
    "register_family": "samplers.families",
    "register_features": "features.load",
    "register_format": "formats.load",
    "register_objective": "objectives.objective",
    "report": "reporting.report",
    "run_chain": "samplers.chain",
    "sample": "exporting.sample",
    "search": "searching.search",
    "solver_coefficients": "samplers.solvers",
}
_MODULES = ("zoo",)

__all__ = sorted([*_PUBLIC, *_MODULES])

if typing.TYPE_CHECKING:  # For editors and type checkers: the same names.
  from ddss_tf import zoo
  from ddss_tf.datasets.dataset import ImageDataset
  from ddss_tf.datasets.load import load_dataset
  from ddss_tf.denoisers.clocks import on_schedule
  from ddss_tf.denoisers.denoiser import Denoiser
  from ddss_tf.denoisers.gaussian import gaussian_denoiser
  from ddss_tf.errors import UserError
  from ddss_tf.evaluation.compare import compare
  from ddss_tf.evaluation.evaluate import evaluate
  from ddss_tf.exporting.export import export
  from ddss_tf.exporting.sample import sample
  from ddss_tf.features.load import load_features, register_features
  from ddss_tf.features.network import FeatureNetwork
  from ddss_tf.formats.load import load_denoiser, register_format
  from ddss_tf.objectives.objective import register_objective
  from ddss_tf.reporting.inspection import inspect
  from ddss_tf.reporting.report import report
  from ddss_tf.samplers.card import SamplerCard
  from ddss_tf.samplers.chain import draw_noise, run_chain
  from ddss_tf.samplers.coefficients import Coefficients
  from ddss_tf.samplers.families import GGDM, make_sampler, register_family
  from ddss_tf.samplers.learned import LearnedSampler
  from ddss_tf.samplers.sampler import FixedSampler, Sampler, SolverSampler
  from ddss_tf.samplers.solvers import solver_coefficients
  from ddss_tf.schedules import NoiseSchedule, make_schedule
  from ddss_tf.searching.search import search


def __getattr__(name):
  if name in _MODULES:
    return importlib.import_module(f"ddss_tf.{name}")
  if name not in _PUBLIC:
    raise AttributeError(f"module 'ddss_tf' has no attribute {name!r}")
  value = getattr(importlib.import_module(f"ddss_tf.{_PUBLIC[name]}"), name)
  return _without_gin(value) if _inspect.isfunction(value) else value


def __dir__():
  return sorted([*globals(), *_PUBLIC, *_MODULES])


class _Required:
  """What `help` shows where an argument must be given."""

  def __repr__(self):
    return "REQUIRED"


@functools.cache
def _without_gin(function):
  """A function with a signature that reads well: gin's mark is an object()."""
  import gin  # pylint: disable=g-import-not-at-top
  signature = _inspect.signature(function)
  marked = [name for name, parameter in signature.parameters.items()
            if parameter.default is gin.REQUIRED]
  if not marked:
    return function

  @functools.wraps(function)
  def public(*args, **kwargs):
    return function(*args, **kwargs)

  public.__signature__ = signature.replace(parameters=[
      parameter.replace(default=_Required()) if parameter.name in marked
      else parameter for parameter in signature.parameters.values()])
  return public

"""Differentiable diffusion sampler search in TensorFlow and Keras.

The public names are imported on first use, so that `import ddss_tf` is quick.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Coefficients": "coefficients",
    "Denoiser": "denoisers",
    "FeatureNetwork": "features",
    "FixedSampler": "samplers",
    "GGDM": "families",
    "LearnedSampler": "families",
    "NoiseSchedule": "schedules",
    "Sampler": "samplers",
    "SolverSampler": "samplers",
    "UserError": "errors",
    "compare": "comparing",
    "draw_noise": "chain",
    "evaluate": "evaluation",
    "export": "exporting",
    "gaussian_denoiser": "denoisers",
    "inspect": "inspecting",
    "load_dataset": "data",
    "load_denoiser": "loading",
    "load_features": "features",
    "make_sampler": "families",
    "make_schedule": "schedules",
    "report": "reporting",
    "run_chain": "chain",
    "sample": "exporting",
    "search": "searching",
    "solver_coefficients": "solvers",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name):
  if name not in _PUBLIC:
    raise AttributeError(f"module 'ddss_tf' has no attribute {name!r}")
  return getattr(importlib.import_module(f"ddss_tf.{_PUBLIC[name]}"), name)


def __dir__():
  return sorted([*globals(), *_PUBLIC])

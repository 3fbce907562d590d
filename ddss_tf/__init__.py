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
import inspect as _inspect

import lazy_loader

from ddss_tf.version import __version__

# The names and their modules are listed once, in `__init__.pyi`.
_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name):
  if name not in __all__:
    raise AttributeError(f"module 'ddss_tf' has no attribute {name!r}")
  value = _attribute(name)
  if _inspect.isfunction(value):
    value = _without_gin(value)
  globals()[name] = value  # The next access does not come here.
  return value


class _Required:
  """What `help` shows as the default of an argument that must be given."""

  def __repr__(self):
    return "REQUIRED"


@functools.cache
def _without_gin(function):
  """A function as Python has it: a signature, and errors of one kind.

  `help` would show gin's mark of what is required as an unnamed object. A
  required argument that is missing is a `UserError`, and errors are one line,
  without the names of the calls that gin appends.
  """
  import gin  # pylint: disable=g-import-not-at-top
  signature = _inspect.signature(function)
  marked = [name for name, parameter in signature.parameters.items()
            if parameter.default is gin.REQUIRED]
  if not marked:
    return function

  @functools.wraps(function)
  def public(*args, **kwargs):
    from ddss_tf import errors  # pylint: disable=g-import-not-at-top
    name = function.__name__
    given = {*kwargs, *list(signature.parameters)[:len(args)]}
    missing = [each for each in marked if each not in {
        *given, *(gin.get_bindings(name, resolve_references=False)
                  if set(marked) - given else ())}]
    if missing:
      raise errors.UserError(
          f"{name}: {', '.join(missing)} must be given. Received: "
          f"{', '.join(sorted(given)) or 'no arguments'}")
    try:
      return function(*args, **kwargs)
    except errors.UserError as error:
      line, *calls = str(error).split("\n  In call to configurable")
      if not calls:
        raise
      raise errors.UserError(line).with_traceback(error.__traceback__) from None

  public.__signature__ = signature.replace(parameters=[
      parameter.replace(default=_Required()) if parameter.name in marked
      else parameter for parameter in signature.parameters.values()])
  return public

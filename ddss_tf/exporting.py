"""A sampler with its network as a SavedModel, and images as files."""

import os
import shutil
import tempfile

import gin
import numpy as np
import tensorflow as tf

from ddss_tf import chain
from ddss_tf import data
from ddss_tf import figures
from ddss_tf import run_dir as run_dir_lib
from ddss_tf import sampling
from ddss_tf import storage
from ddss_tf.coefficients import Coefficients
from ddss_tf.denoisers import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.evaluation import load_searched

EXPORT = "export"
_PARITY_TOLERANCE = 1e-3


class SamplerModule(tf.Module):
  """What is exported: two functions, the coefficients, the network's weights.

  Args:
    denoiser: the frozen model.
    coefficients: of the sampler.
    x0_bound: see `chain.bound_x0`.
  """

  def __init__(self, denoiser: Denoiser, coefficients: Coefficients,
               x0_bound: str | None = None):
    super().__init__(name="sampler")
    self._denoiser = denoiser
    self.weights = denoiser.tracked
    coefficients = Coefficients(
        *(tf.convert_to_tensor(v, tf.float32) for v in coefficients))
    height, width, channels = shape = denoiser.image_shape
    steps = coefficients.num_steps

    @tf.function(input_signature=[
        tf.TensorSpec([2], tf.int32, "seed"),
        tf.TensorSpec([], tf.int32, "batch_size")])
    def serve(seed, batch_size):
      x_T, step_noise = chain.draw_noise(
          seed, tf.range(batch_size), shape, steps)
      images = chain.run_chain(denoiser.eps, coefficients, x_T, step_noise,
                               x0_bound=x0_bound)
      return {"images": data.to_uint8(images)}

    @tf.function(input_signature=[
        tf.TensorSpec([None, height, width, channels], tf.float32, "x_T"),
        tf.TensorSpec([None, steps - 1, height, width, channels], tf.float32,
                      "step_noise")])
    def from_noise(x_T, step_noise):
      images = chain.run_chain(denoiser.eps, coefficients, x_T, step_noise,
                               x0_bound=x0_bound)
      return {"images": tf.clip_by_value(images, -1.0, 1.0)}

    self.serve = serve
    self.from_noise = from_noise


@gin.configurable(denylist=["run_dir"])
def export(run_dir: str, denoiser: Denoiser = gin.REQUIRED) -> str:
  """Exports the searched sampler of a run as a SavedModel.

  The signatures need nothing but `tensorflow`:
    serving_default(seed int32 [2], batch_size int32 []) -> images, uint8
      [B, H, W, C]; image i depends on the seed and i only.
    from_noise(x_T [B, H, W, C], step_noise [B, K - 1, H, W, C]) -> images,
      float32 [B, H, W, C] in [-1, 1].

  The folder appears whole or not at all, and only after its images have been
  compared with those made in memory.

  Args:
    run_dir: folder of the run, with `sampler.json`.
    denoiser: the frozen model.

  Returns:
    Path of the SavedModel.

  Raises:
    UserError: there is no sampler, it is for another model, or the exported
      images differ.
  """
  run = run_dir_lib.RunDir(run_dir)
  sampler, x0_bound = load_searched(run, denoiser)
  coefficients = sampler.coefficients().numpy()
  module = SamplerModule(denoiser, coefficients, x0_bound)
  temporary = tempfile.mkdtemp(dir=run.root, prefix=".export-")
  try:
    tf.saved_model.save(module, temporary, signatures={
        "serving_default": module.serve, "from_noise": module.from_noise})
    _check(temporary, denoiser, coefficients, x0_bound)
    os.chmod(temporary, 0o755)
    target = run.path(EXPORT)
    if os.path.exists(target):
      shutil.rmtree(target)
    os.replace(temporary, target)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return run.path(EXPORT)


def _check(path, denoiser, coefficients, x0_bound):
  """Compares the exported sampler with the one in memory, on 4 images."""
  x_T, step_noise = chain.draw_noise(
      sampling.seed_pair(0), tf.range(4), denoiser.image_shape,
      coefficients.num_steps)
  expected = tf.clip_by_value(chain.run_chain(
      denoiser.eps, coefficients, x_T, step_noise, x0_bound=x0_bound), -1.0,
                              1.0)
  loaded = tf.saved_model.load(path)
  received = loaded.signatures["from_noise"](
      x_T=x_T, step_noise=step_noise)["images"]
  difference = float(tf.reduce_max(tf.abs(expected - received)))
  if not difference <= _PARITY_TOLERANCE:
    raise UserError(
        f"exported images must equal those in memory to {_PARITY_TOLERANCE:g}. "
        f"Received: a difference of {difference:g}")


@gin.configurable(denylist=["run_dir"])
def sample(run_dir: str, denoiser: Denoiser = gin.REQUIRED,
           num_images: int = 64, seed: int = 0, batch_size: int = 250,
           jit_compile: bool = True) -> str:
  """Writes images of the searched sampler: `generated.npz` and `.png`.

  Args:
    run_dir: folder of the run, with `sampler.json`.
    denoiser: the frozen model.
    num_images: how many; the grid shows the first 64.
    seed: of their noise.
    batch_size: images per call.
    jit_compile: compile the network with XLA.

  Returns:
    Path of the npz file, with `images`, uint8 [N, H, W, C].

  Raises:
    UserError: there is no sampler, it is for another model, or num_images < 1.
  """
  if num_images < 1:
    raise UserError(
        f"sample.num_images must be at least 1. Received: {num_images}")
  run = run_dir_lib.RunDir(run_dir)
  sampler, x0_bound = load_searched(run, denoiser)
  generator = sampling.Generator(
      denoiser, min(batch_size, num_images), jit_compile, x0_bound)
  images = data.to_uint8(generator.images(
      sampler.coefficients(), num_images, seed, "sample"))
  path = run.path("generated.npz")
  with storage.replacing(path) as temporary:
    with open(temporary, "wb") as f:
      np.savez_compressed(f, images=images)
  figures.samples_png(
      run.path("generated.png"),
      [(f"{sampler.label}, K = {sampler.num_steps}, seed {seed}",
        images[:64])])
  return path

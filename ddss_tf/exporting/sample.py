"""Samples of a searched or given sampler, as files."""

from typing import Any, Mapping, Sequence

from absl import logging
import gin
import numpy as np

from ddss_tf import bindings
from ddss_tf import storage
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.reporting import grids
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import MAX_SEED, UserError, check_whole
from ddss_tf.zoo import drawn_as_searched, load_searched


def check_sample(arguments: Mapping[str, Any]) -> None:
  """Checks the numbers that `sample` is given.

  Args:
    arguments: the arguments of `sample`, by name. The denoiser is not looked
      at.

  Raises:
    UserError: a number is out of range.
  """
  for name in ("num_images", "batch_size"):
    check_whole(f"sample.{name}", arguments[name], 1)
  check_whole("sample.seed", arguments["seed"], 0, most=MAX_SEED)
  check_whole("sample.label", arguments["label"], 0, optional=True)


@bindings.configurable(denylist=["run_dir"])
def sample(run_dir: str, denoiser: Denoiser = gin.REQUIRED,
           num_images: int = 64, seed: int = 0, batch_size: int = 250,
           jit_compile: bool = True, label: int | None = None,
           prompt: str | Sequence[str] | None = None,
           sampler: str | None = None, force: bool = False) -> str:
  """Writes images of the searched sampler to `generated.npz` and `.png`.

  Args:
    run_dir: folder of the run, with `sampler.json`.
    denoiser: the frozen model.
    num_images: how many; the grid shows the first 64.
    seed: the seed of their noise.
    batch_size: images per call.
    jit_compile: compile the network with XLA.
    label: the class of all images, for a class-conditional denoiser, or the row
      of a table of conditions; None: a class is drawn for each image, as often as
      in the search (`zoo.drawn_as_searched`).
    prompt: a text of the table of conditions, instead of a label; or a list of
      texts, of which image i has the text i modulo their number.
    sampler: path of a card, or its name in the zoo, instead of the sampler in
      the run directory.
    force: take a card that was found for other weights.

  Returns:
    Path of the npz file, with `images`, uint8 [N, H, W, C].

  Raises:
    UserError: there is no sampler, it was found for another model, a number is
      out of range, or the denoiser does not have the label or the text.
  """
  check_sample(locals())
  if label is not None and not 0 <= label < (denoiser.num_classes or 0):
    raise UserError(f"sample.label must be one of the {denoiser.num_classes or 0}"
                    f" classes of {denoiser.name!r}. Received: {label}")
  labels = label if prompt is None else _rows(denoiser, prompt, label)
  with run_dir_lib.RunDir(run_dir).locked() as run:
    found, x0_bound = load_searched(run, denoiser, sampler, force)
    denoiser = drawn_as_searched(run, denoiser, sampler)
    run.keep_config()
    generator = generator_lib.Generator(
        denoiser, min(batch_size, num_images), jit_compile, x0_bound)
    images = generator.images(
        found.coefficients(), num_images, seed, "sample", labels)
    broken = np.sum(~np.all(np.isfinite(images), axis=(1, 2, 3)))
    if broken:
      logging.warning("%d of %d images have NaN or infinity, for which there is no "
                      "byte: their pixels mean nothing", broken, num_images)
    images = dataset_lib.to_uint8(images)
    path = run.path(f"{run_dir_lib.GENERATED}.npz")
    storage.save_arrays(path, {"images": images}, compressed=True)
    grids.samples_png(
        run.path(f"{run_dir_lib.GENERATED}.png"),
        [(f"{found.label}, K = {found.num_steps}, seed {seed}",
          images[:64])])
    return path


def _rows(denoiser: Denoiser, prompt, label) -> list[int]:
  """The rows of texts."""
  if label is not None:
    raise UserError("sample.label must not be given with sample.prompt. "
                    f"Received: {label}")
  if denoiser.table is None:
    raise UserError("sample.prompt needs a denoiser with a table of conditions: "
                    "load_denoiser.conditions. Received: "
                    f"{denoiser.name!r} without")
  texts = [prompt] if isinstance(prompt, str) else list(prompt)
  if not texts:
    raise UserError("sample.prompt must be a text, or a list of texts. Received: []")
  return [denoiser.table.row_of(text) for text in texts]

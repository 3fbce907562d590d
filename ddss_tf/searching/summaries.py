"""What a search shows: TensorBoard while it works, pictures at its end."""

import json

import gin
import numpy as np
from PIL import Image
from tensorboard.plugins.hparams import api as hparams
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf import storage
from ddss_tf.reporting import grids
from ddss_tf.reporting import sampler as sampler_figures
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers.sampler import Sampler
from ddss_tf.searching.loop import Event, Hook, Search
from ddss_tf.searching.options import SearchOptions

_SHOWN = 64  # Images of the grid "samples".


class WriteTensorBoard(Hook):
  """Writes scalars of the steps, and the sampler at every validation.

  It writes to the default writer.

  Args:
    run: the run directory.
    options: the options of the search.
    dataset: the name of the data set.
    generator: a generator of images.
  """

  def __init__(self, run: run_dir_lib.RunDir, options: SearchOptions,
               dataset: str, generator: generator_lib.Generator):
    self._run, self._options, self._dataset = run, options, dataset
    self._generator = generator
    self._seconds = []

  def begin(self, state: Search) -> None:
    tf.summary.text("config", f"```\n{gin.config_str()}\n```", step=0)
    self._hparams(state.sampler)
    if storage.exists(self._run.path(run_dir_lib.STARTS)):
      ranking = storage.read_text(self._run.path(run_dir_lib.STARTS))
      tf.summary.text("starts", f"```\n{ranking}\n```", step=0)

  def after_step(self, state: Search, event: Event) -> None:
    self._seconds.append(event.seconds)
    step = state.step
    if step % self._options.log_every and not state.is_over:
      return
    for name, value in (
        ("search/loss", event.result.loss),
        ("search/gradient_norm", event.result.norm),
        ("search/rate", state.rate),
        ("search/seconds_per_step", np.mean(self._seconds)),
        ("search/skipped_steps", state.skipped)):
      tf.summary.scalar(name, value, step=step)
    self._seconds.clear()

  def after_validation(self, state: Search, value: float) -> None:
    coefficients, step = state.sampler.coefficients().numpy(), state.step
    tf.summary.scalar("validation/objective", value, step=step)
    for name, scalar in coefficients.named_scalars().items():
      tf.summary.scalar(f"coefficients/{name}", scalar, step=step)
    for name, values in coefficients.arrays().items():
      if name == "state_weights":
        values = values[np.tril_indices(coefficients.num_steps)]
      tf.summary.histogram(f"coefficients/{name}", values, step=step)
    images = self._generator.images(
        coefficients, _SHOWN, self._options.seed + 1)
    tf.summary.image(
        "samples", grids.image_grid(images, columns=8)[None], step=step)

  def _hparams(self, sampler: Sampler) -> None:
    """Writes what TensorBoard's table of hyper-parameters shows of a run."""
    # TensorBoard finds the metrics itself. If it were told those of one search
    # in a folder, it would show those of no other.
    config, options = sampler.get_config(), self._options
    hparams.hparams({
        "family": sampler.label, "num_steps": sampler.num_steps,
        "init": str(config.get("init")), "stride": str(config.get("stride")),
        "objective": json.dumps(options.objective),
        "num_search_steps": options.num_search_steps,
        "batch_size": options.batch_size,
        "gradient_samples": options.gradient_samples,
        "learning_rate": options.learning_rate, "seed": options.seed,
        "x0_bound": options.x0_bound or "none", "dataset": self._dataset})


def draw(run: run_dir_lib.RunDir, sampler: Sampler, first,
         generator: generator_lib.Generator, seed: int, step: int) -> None:
  """Draws the sampler into the run directory, and into TensorBoard.

  Args:
    run: the run directory.
    sampler: with its best coefficients.
    first: coefficients of its start.
    generator: a generator of images.
    seed: the seed of their noise.
    step: the step of the best coefficients.
  """
  best, label = sampler.coefficients().numpy(), sampler.label
  sampler_figures.coefficients_png(
      run.path(run_dir_lib.COEFFICIENTS), best, label, first, sampler.schedule)
  image, states, x0_hats = generator.path(best, seed)
  sampler_figures.path_png(
      run.path(run_dir_lib.PATH), states, x0_hats, image, best.times, label)
  # No more than one batch of the generator, in a square of at most 8 x 8.
  side = min(8, max(1, int(generator.batch_size ** 0.5)))
  grids.samples_png(run.path(run_dir_lib.BEFORE_AFTER), [
      (title, generator.images(coefficients, side * side, seed))
      for title, coefficients in (
          (f"before the search, K = {sampler.num_steps}", first),
          (f"after {step} steps of it: {label}", best))], side)
  if not distribution.is_chief():
    return
  # After a kill they are drawn again and replace those before.
  with storage.replacing_folder(
      run.path(run_dir_lib.PICTURE_EVENTS)) as events:
    writer = tf.summary.create_file_writer(events)
    with writer.as_default():
      for name in run_dir_lib.PICTURES:
        with Image.open(run.path(name)) as picture:
          pixels = np.asarray(picture.convert("RGB"))
        tf.summary.image(name.removesuffix(".png"), pixels[None], step=step)
    writer.close()

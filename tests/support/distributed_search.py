"""Searches over several logical CPU devices; run by `distribution_test.py`.

Usage: distributed_search.py OUTPUT.npz all|quick REPLICAS...
"""

import functools
import json
import os
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf

# This must come before TensorFlow starts its devices.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 4)

import ddss_tf  # pylint: disable=g-import-not-at-top
from ddss_tf import distribution
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import solvers
import gaussian_parts

# A gradient in one pass; one in two passes, whose last micro-batch is not full;
# an objective that is a bound, not a distance.
SEARCHES = {
    "one_pass": dict(batch_size=24, gradient_samples=12,
                     objective="kid_cubic"),
    "two_passes": dict(batch_size=30, gradient_samples=15, micro_batch_size=3,
                       objective="frechet", pool_samples=90),
    "elbo": dict(batch_size=8, objective="elbo"),
    # The shares of the replicas are not full.
    "elbo_in_parts": dict(batch_size=6, micro_batch_size=3, objective="elbo",
                          sampling_batch_size=17),
}


def noting_rows(make, rows):
  """A `compiled_eps` that notes how many images each call is traced for."""

  def compiled_eps(*args):
    eps = make(*args)

    def call(x_t, t):
      rows.add(x_t.shape[0])
      return eps(x_t, t)

    return call

  return compiled_eps


def export(folder):
  """Images of an exported sampler whose network has weights."""
  keras.utils.set_random_seed(0)
  x_t, t = keras.Input(gaussian_parts.SHAPE), keras.Input(())
  scaled = keras.layers.Reshape((1, 1, 1))(t / 1000.0)
  eps = keras.layers.Conv2D(1, 3, padding="same")(
      keras.layers.Conv2D(4, 3, padding="same", activation="silu")(
          x_t + scaled))
  denoiser = ddss_tf.Denoiser(
      keras.Model([x_t, t], eps), ddss_tf.NoiseSchedule.linear())
  card.write(os.path.join(folder, run_dir_lib.SAMPLER), card.SamplerCard(
      "DDPM", solvers.solver_coefficients(
          denoiser.schedule, "ddpm", 3, "linear").numpy(),
      denoiser.identity, {}))
  path = ddss_tf.export(folder, denoiser)

  def serve():
    return tf.saved_model.load(path).signatures["serving_default"](
        seed=tf.constant([3, 0]), batch_size=tf.constant(5))["images"]

  return path, distribution.outside(serve).numpy()


def main(output, extent, *replicas):
  """Searches with each number of replicas, and writes all results to a file.

  Args:
    output: the npz file.
    extent: "all"; or "quick": the first search only, not compiled by XLA, no
      long chain and no export.
    *replicas: the numbers of replicas.
  """
  results = {}
  quick = extent == "quick"
  searches = dict(list(SEARCHES.items())[:1 if quick else None])
  for count in map(int, replicas):
    devices = [f"CPU:{i}" for i in range(count)]
    strategy = (distribution.make_strategy() if count == 1 else
                distribution.make_strategy("mirrored", devices))
    with strategy.scope():
      assert distribution.num_replicas() == count
      parts = gaussian_parts.make()
      compiled_eps = parts["denoiser"].compiled_eps
      for name, options in searches.items():
        rows = set()
        parts["denoiser"].compiled_eps = noting_rows(compiled_eps, rows)
        with tempfile.TemporaryDirectory() as run:
          sampler = ddss_tf.search(
              run_dir=run, **parts, **options, num_search_steps=20,
              learning_rate=0.05, validation_samples=50, validate_every=5,
              jit_compile=name == "one_pass" and not quick, sampler=functools.partial(
                  families.make_sampler, family="ggdm+pred+time", num_steps=3,
                  init="ddpm"))
          results[f"{name}/rows/{count}"] = sorted(rows)
          for field, value in sampler.coefficients().numpy().arrays().items():
            results[f"{name}/{field}/{count}"] = value
          if name == "one_pass":
            (record,) = ddss_tf.evaluate(
                run, **parts, num_samples=101, batch_size=50,
                baselines=[], page=False, jit_compile=not quick)
            results[f"{name}/record/{count}"] = json.dumps(record)
            with np.load(ddss_tf.sample(
                run, parts["denoiser"], num_images=7,
                jit_compile=not quick)) as images:
              results[f"{name}/images/{count}"] = images["images"]
      if quick:
        continue
      denoiser = parts["denoiser"]  # This chain is too long for one graph.
      results[f"long/images/{count}"] = generator_lib.Generator(
          denoiser, 4, False).images(ddss_tf.SolverSampler(
              denoiser.schedule, 101, "ddpm").coefficients(), 5, 1)
      path = os.path.join(os.path.dirname(output), f"export{count}")
      os.makedirs(path)
      path, images = export(path)
      results[f"export/images/{count}"] = images
      results[f"export/path/{count}"] = path
  np.savez(output, **results)


if __name__ == "__main__":
  main(*sys.argv[1:])

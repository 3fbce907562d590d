"""Our side of the timings: parts that run in a process of their own.

It prints one JSON object as its last line.
"""

import argparse
import json
import tempfile
import time

import numpy as np
import tensorflow as tf

from benchmarks import networks
from benchmarks import records
import ddss_tf
from ddss_tf.exporting import export as export_lib
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.samplers import families
from ddss_tf.searching import loop
from ddss_tf.searching import options as options_lib
from ddss_tf.searching import search as search_lib


def timed(functions: dict, runs: int) -> dict[str, list[float]]:
  """Seconds of each run by function, after a first run that is not counted.

  The functions take turns.
  """
  for function in functions.values():
    function()
  seconds = {name: [] for name in functions}
  for _ in range(runs):
    for name, function in functions.items():
      start = time.perf_counter()
      function()
      seconds[name].append(time.perf_counter() - start)
  return seconds


def _inputs(denoiser, batch_size):
  x = tf.random.stateless_normal([batch_size, *denoiser.image_shape], [0, 1])
  return x, tf.linspace(10.0, 900.0, batch_size)


def _gradient(denoiser):
  """A function that gives the gradient of a call in images and times."""

  def gradient(x, t):
    with tf.GradientTape() as tape:
      tape.watch([x, t])
      eps = denoiser.eps(x, t)
    return tape.gradient(eps, [x, t], output_gradients=eps)

  return gradient


class _Means:
  """A feature network that gives the mean pixels of squares."""

  name, sha256, key = "means", "none", "means"

  def __call__(self, images):
    pooled = tf.nn.avg_pool2d(images, networks.POOL, networks.POOL, "VALID")
    return {"pool": tf.reshape(pooled, [
        tf.shape(pooled)[0], int(np.prod(pooled.shape[1:]))])}


def forward(folder: str, batch_size: int, runs: int) -> dict:
  """Times a call of the network, and one with gradients in images and times."""
  denoiser = ddss_tf.load_denoiser(folder)
  inputs = _inputs(denoiser, batch_size)
  functions = {}
  for jit in (True, False):
    call = denoiser.compiled_eps(jit)
    gradient = tf.function(_gradient(denoiser), jit_compile=jit)
    kind = "xla" if jit else "graph"
    functions[f"forward_{kind}"] = lambda call=call: call(*inputs)[0].numpy()
    functions[f"backward_{kind}"] = (
        lambda gradient=gradient: gradient(*inputs)[0].numpy())
  return timed(functions, runs)


def make_search(denoiser, batch_size: int, num_steps: int, *,
                remat: bool = True,
                jit_compile: bool = True) -> loop.Search:
  """A search of GGDM+PRED+TIME with the linear KID of mean pixels."""
  features = _Means()
  real = tf.random.stateless_uniform(
      [1000, *denoiser.image_shape], [0, 2], -1.0, 1.0)
  return search_lib.assemble(
      denoiser,
      families.make_sampler(denoiser.schedule, "ggdm+pred+time", num_steps),
      objective_lib.Objective("kid_linear", [features],
                           [features(real)["pool"].numpy()],
                           denoiser.image_shape),
      options_lib.SearchOptions(
          batch_size=batch_size, num_search_steps=10, jit_compile=jit_compile),
      remat=remat)


def step(folder: str, batch_size: int, num_steps: int, runs: int,
         graph: bool = False, keep: bool = False) -> dict:
  """Times a search step, and bare calls and gradients of the network."""
  denoiser = ddss_tf.load_denoiser(folder)
  inputs = _inputs(denoiser, batch_size)
  before = records.peak_gib()
  search = make_search(denoiser, batch_size, num_steps, remat=not keep,
                       jit_compile=not graph)
  start = time.perf_counter()
  search.gradient(0)
  set_up = time.perf_counter() - start
  search.gradient(1)
  gib = records.peak_gib()
  functions = {"step": lambda: search.gradient(2)}
  for jit in (True, False):
    kind = "xla" if jit else "graph"
    call = denoiser.compiled_eps(jit)
    gradient = tf.function(_gradient(denoiser), jit_compile=jit)
    functions[f"forward_{kind}"] = lambda call=call: call(*inputs)[0].numpy()
    functions[f"gradient_{kind}"] = (
        lambda gradient=gradient: gradient(*inputs)[0].numpy())
  return {"set_up": set_up, "before": before, "gib": gib,
          **timed(functions, runs)}


def sample(folder: str, batch_size: int, num_steps: int, runs: int) -> dict:
  """Times images of an exported DDIM, and of the same chain run eagerly."""
  denoiser = ddss_tf.load_denoiser(folder)
  coefficients = families.make_sampler(
      denoiser.schedule, "ddim", num_steps).coefficients().numpy()
  served = {}
  for jit in (True, False):
    with tempfile.TemporaryDirectory() as exported:
      module = export_lib.SamplerModule(
          denoiser, coefficients, jit_compile=jit)
      tf.saved_model.save(module, exported, signatures=module.endpoints)
      served[jit] = tf.saved_model.load(exported)
  seed, size = tf.constant([0, 1]), tf.constant(batch_size)

  def images_of(jit):
    serve = served[jit].signatures["serving_default"]
    return lambda: serve(seed=seed, batch_size=size)["images"].numpy()

  def python_loop():
    x_T, noise = ddss_tf.draw_noise(
        seed, tf.range(batch_size), denoiser.image_shape, num_steps)
    ddss_tf.run_chain(denoiser.eps, coefficients, x_T, noise).numpy()

  return timed({"exported_xla": images_of(True), "exported": images_of(False),
                "python": python_loop}, runs)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("part", choices=["forward", "step", "sample"])
  parser.add_argument("folder")
  parser.add_argument("--batch_size", type=int)
  parser.add_argument("--num_steps", type=int)
  parser.add_argument("--runs", type=int)
  parser.add_argument("--graph", action="store_true", default=None)
  parser.add_argument("--keep", action="store_true", default=None)
  arguments = vars(parser.parse_args())
  part = globals()[arguments.pop("part")]
  print(json.dumps(part(**{
      key: value for key, value in arguments.items() if value is not None})))


if __name__ == "__main__":
  main()

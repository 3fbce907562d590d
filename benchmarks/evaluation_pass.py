"""An evaluation's one pass beside its parts, each alone.

  python -m benchmarks.evaluation_pass [--runs=3]

The pass is `Evaluator.record`: it samples, calls both feature networks, and
computes FID, KID and IS. The parts are the same calls one after another: all
images, then all features, then the metrics.
"""

import argparse
import json
import os
import sys
import tempfile
import time

import numpy as np
import tensorflow as tf

from benchmarks import records
import ddss_tf
from ddss_tf import metrics
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.evaluation import evaluator as evaluator_lib
from ddss_tf.runs import run_dir as run_dir_lib

SAMPLES, BATCH, NUM_STEPS = 4000, 250, 5


def measure() -> dict:
  """Seconds of the pass and of its parts, and processor seconds of the pass."""
  denoiser = ddss_tf.load_denoiser("digits16-ddpm")
  dataset = ddss_tf.load_dataset("ddss_digits", pad=2, downsample=2)
  networks = [ddss_tf.load_features(name)
              for name in ("digits_cnn", "digits_resnet")]
  sampler = ddss_tf.SolverSampler(denoiser.schedule, NUM_STEPS, "dpm++2m")
  with tempfile.TemporaryDirectory() as folder:
    evaluator = evaluator_lib.Evaluator(
        run_dir_lib.RunDir(folder), denoiser, dataset, *networks,
        batch_size=BATCH)
    evaluator.record(sampler, 2 * BATCH)  # Compiles everything.
    start, processors = time.perf_counter(), time.process_time()
    found = evaluator.record(sampler, SAMPLES)
    seconds = time.perf_counter() - start
    processors = time.process_time() - processors

    start = time.perf_counter()
    images = evaluator.images(sampler, SAMPLES)
    sampled = time.perf_counter() - start
    references = evaluator._reference  # pylint: disable=protected-access
    extract = evaluator._extract  # pylint: disable=protected-access
    start = time.perf_counter()
    images = dataset_lib.to_float(dataset_lib.to_uint8(images))
    outputs = [[network(tf.constant(images[i:i + BATCH]))
                for i in range(0, SAMPLES, BATCH)] for network in extract]
    pools = [np.concatenate([output["pool"] for output in each])
             for each in outputs]
    logits = np.concatenate([output["logits"] for output in outputs[0]])
    embedded = time.perf_counter() - start
    start = time.perf_counter()
    fids = [metrics.fid(reference.moments, pool)
            for reference, pool in zip(references, pools)]
    metrics.kid(references[0].pool, pools[0])
    metrics.inception_score(logits)
    metrics.inception_score(logits, splits=10)
    computed = time.perf_counter() - start
  np.testing.assert_allclose(
      fids, [found["fid"], found["fid_heldout"]], rtol=1e-3)
  return {"seconds": seconds, "processors": processors, "sampled": sampled,
          "embedded": embedded, "computed": computed}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--runs", type=int, default=3)
  parser.add_argument("--part", action="store_true")
  arguments = parser.parse_args()
  if arguments.part:
    print(json.dumps(measure()))
    return
  parts = [records.part("benchmarks.evaluation_pass", "--part")
           for _ in range(arguments.runs)]
  print(parts, file=sys.stderr)
  note = f"{SAMPLES} digits, K = {NUM_STEPS}, two networks; yardstick: "
  cores = len(os.sched_getaffinity(0))
  records.keep([
      records.record(
          "evaluation_pass", [part["seconds"] for part in parts],
          [part["sampled"] + part["embedded"] + part["computed"]
           for part in parts], bound=1.05, of="ratio", unit="s",
          note=note + "sampling, features and metrics one after another"),
      records.record(
          "evaluation_over_sampling", [part["seconds"] for part in parts],
          [part["sampled"] for part in parts], bound=None, of="ratio", unit="s",
          note=note + "sampling alone"),
      records.record(
          "evaluation_idle_cores",
          [cores - part["processors"] / part["seconds"] for part in parts],
          [cores] * len(parts), bound=0.2, of="ratio", unit="cores",
          note=note + "all cores"),
      records.record(
          "evaluation_images_per_second",
          [SAMPLES / part["seconds"] for part in parts], None, bound=None,
          of="value", unit="images/s", note=note + "none"),
  ])


if __name__ == "__main__":
  main()

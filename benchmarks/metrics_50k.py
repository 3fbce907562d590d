"""FID, KID and IS of 50 000 samples of 2048 features, beside TF-GAN's calls.

  python -m benchmarks.metrics_50k [--runs=1]

Each way runs in a process of its own, in turn, on the same numbers. Both also
compute the moments of the real images, which our evaluation does once per data
set.
"""

import argparse
import json
import sys
import time

import numpy as np

from benchmarks import records

COUNT, WIDTH, CLASSES = 50_000, 2048, 1008


def activations(seed: int, offset: float) -> np.ndarray:
  """float32 [COUNT, WIDTH], non-negative and correlated like Inception's."""
  rng = np.random.default_rng(seed)
  mixing = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
  result = np.empty((COUNT, WIDTH), np.float32)
  # In parts, so that no large temporary array adds to the memory peak.
  for start in range(0, COUNT, 5000):
    part = rng.standard_normal((5000, 64), np.float32) @ mixing / 16
    part += rng.standard_normal((5000, WIDTH), np.float32) * 0.3 + offset
    result[start:start + 5000] = np.maximum(part, 0)
  return result


def measure(way: str) -> dict:
  """Seconds and figures of one way, and the peak memory of its process."""
  import tensorflow as tf  # pylint: disable=g-import-not-at-top
  from ddss_tf import metrics  # pylint: disable=g-import-not-at-top
  real, generated = activations(1, 0.0), activations(2, 0.05)
  logits = 3 * np.random.default_rng(3).standard_normal(
      (COUNT, CLASSES), np.float32)
  tfgan = metrics._tfgan()  # pylint: disable=protected-access
  before = records.peak_gib()
  start = time.perf_counter()
  if way == "ours":
    fid = metrics.fid(metrics.moments(real), generated)
    kid, error = metrics.kid(real, generated)
    score, _ = metrics.inception_score(logits)
    metrics.inception_score(logits, splits=10)
  else:
    real, generated = tf.constant(real), tf.constant(generated)
    fid = float(tfgan.frechet_classifier_distance_from_activations(
        real, generated))
    kid, error = map(
        float, tfgan.kernel_classifier_distance_and_std_from_activations(
            real, generated, max_block_size=1000))
    score = float(tfgan.classifier_score_from_logits(tf.constant(logits)))
  return {"seconds": time.perf_counter() - start, "before": before,
          "gib": records.peak_gib(), "fid": fid, "kid": kid, "kid_std": error,
          "is": score}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--runs", type=int, default=1)
  parser.add_argument("--way", choices=("ours", "tfgan"))
  arguments = parser.parse_args()
  if arguments.way:
    print(json.dumps(measure(arguments.way)))
    return
  ways = {"ours": [], "tfgan": []}
  for _ in range(arguments.runs):
    for way, results in ways.items():
      results.append(records.part("benchmarks.metrics_50k", f"--way={way}"))
      print(way, results[-1], file=sys.stderr)
  ours, theirs = ways["ours"], ways["tfgan"]
  for key in ("fid", "is"):
    np.testing.assert_allclose(ours[0][key], theirs[0][key], rtol=1e-3)
  # Our KID deals activations to its blocks at random, so the two are equal only
  # up to the error.
  np.testing.assert_allclose(ours[0]["kid"], theirs[0]["kid"],
                             atol=3 * theirs[0]["kid_std"], rtol=0)
  records.keep([
      records.record(
          "metrics_50k_seconds", [r["seconds"] for r in ours],
          [r["seconds"] for r in theirs], bound=90.0, of="value", unit="s",
          note="FID + KID + IS (also in 10 splits); yardstick: TF-GAN's plain "
          "calls, without the splits"),
      records.record(
          "metrics_50k_memory", [r["gib"] for r in ours],
          [r["gib"] for r in theirs], bound=6.0, of="value", unit="GiB",
          note="peak of the process with all activations; yardstick: TF-GAN's "
          "plain calls")])


if __name__ == "__main__":
  main()

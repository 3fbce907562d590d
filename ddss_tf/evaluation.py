"""The comparison: FID, KID and IS of samplers, side by side."""

import json
import os

from absl import logging
import gin
import numpy as np
import tensorflow as tf

from ddss_tf import card
from ddss_tf import data
from ddss_tf import features as features_lib
from ddss_tf import figures
from ddss_tf import fingerprint
from ddss_tf import metrics
from ddss_tf import run_dir as run_dir_lib
from ddss_tf import sampling
from ddss_tf import storage
from ddss_tf.denoisers import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.samplers import FixedSampler
from ddss_tf.searching import check_shapes

METRICS = "metrics.json"
SAMPLES = "samples.png"


def load_searched(run: run_dir_lib.RunDir, denoiser: Denoiser
                  ) -> tuple[FixedSampler, str | None]:
  """The sampler that a search left in a run directory, and its x0_bound.

  Raises:
    UserError: there is none, or it was found for another model.
  """
  found = card.read(run.path(card.FILE))
  if found.denoiser.get("sha256") != denoiser.sha256:
    raise UserError(
        f"{run.path(card.FILE)} is for the denoiser "
        f"{found.denoiser.get('name')!r} with SHA-256 "
        f"{found.denoiser.get('sha256')}. Received: {denoiser.name!r} with "
        f"{denoiser.sha256}")
  sampler = FixedSampler(denoiser.schedule, found.coefficients, found.label)
  return sampler, found.x0_bound


@gin.configurable(denylist=["run_dir"])
def evaluate(
    run_dir: str,
    denoiser: Denoiser = gin.REQUIRED,
    dataset: data.ImageDataset = gin.REQUIRED,
    features: features_lib.FeatureNetwork = gin.REQUIRED,
    heldout_features: features_lib.FeatureNetwork | None = None,
    baselines=(),
    num_samples: int = gin.REQUIRED,
    seed: int = 1234,
    batch_size: int = 250,
    x0_bound: str | None = None,
    jit_compile: bool = True,
) -> list[dict]:
  """Evaluates the searched sampler beside baselines, on the same noise.

  Generated and real images are both rounded to uint8. Rows that an earlier call
  has measured under the same conditions are kept. Writes `metrics.json` after
  each row, `samples.png`, and TensorBoard scalars.

  Args:
    run_dir: folder of the run, with `sampler.json` if there was a search.
    denoiser: the frozen model.
    dataset: the real images, all of them the reference.
    features: the network of FID, KID and IS.
    heldout_features: an unrelated network for `fid_heldout`, which shows gains
      that merely flatter the first.
    baselines: functions from a noise schedule to a sampler.
    num_samples: generated images of each sampler.
    seed: of their noise.
    batch_size: images per call.
    x0_bound: see `chain.bound_x0`; of the baselines. The searched sampler keeps
      the one it was searched with.
    jit_compile: compile the network with XLA.

  Returns:
    The records of this call, baselines first, the searched one last.

  Raises:
    UserError: parts that do not fit together, no sampler to evaluate, or too
      few samples for a metric.
  """
  networks = [features] + ([heldout_features] if heldout_features else [])
  check_shapes(denoiser, dataset, *networks)
  if num_samples < 4:
    raise UserError("evaluate.num_samples must be at least 4, for KID has an "
                    f"error only then. Received: {num_samples}")
  run = run_dir_lib.RunDir(run_dir)
  # Each with its bound on x0_hat.
  samplers = [(baseline(denoiser.schedule), x0_bound) for baseline in baselines]
  if os.path.exists(run.path(card.FILE)) or not samplers:
    samplers.append(load_searched(run, denoiser))

  reference = [features_lib.dataset_features(
      network, dataset, quantise=True, cache_dir=run.cache)
               for network in networks]
  extract = [tf.function(network) for network in networks]
  generators = {bound: sampling.Generator(
      denoiser, min(batch_size, num_samples), jit_compile, bound)
                for _, bound in samplers}
  known = _read_records(run.path(METRICS))

  records = []
  for sampler, bound in samplers:
    coefficients = sampler.coefficients().numpy()
    conditions = {
        **_conditions(sampler, coefficients, denoiser, dataset, networks,
                      num_samples, seed), "x0_bound": bound}
    record = next((r for r in known if conditions.items() <= r.items()), None)
    if record is None:
      values = _measure(
          generators[bound].batches(
              coefficients, num_samples, seed, sampler.label),
          extract, reference)
      record = {**conditions, **values}
      known.append(record)
      storage.write_json(run.path(METRICS), known)
    logging.info("%s: %s", sampler.label, record)
    records.append(record)

  with tf.summary.create_file_writer(
      run.path("tensorboard", "evaluate")).as_default():
    for record in records:
      for name in ("fid", "kid", "inception_score", "fid_heldout"):
        if record.get(name) is not None:
          tf.summary.scalar(f"{name}/{record['sampler']}", record[name],
                            step=record["num_samples"])
  _draw(run, generators, samplers, records, seed)
  return records


def _conditions(sampler, coefficients, denoiser, dataset, networks, num_samples,
                seed):
  """All that decides a record's values."""
  conditions = {
      "sampler": sampler.label,
      "num_steps": sampler.num_steps,
      "coefficients_sha256": fingerprint.arrays_sha256(coefficients),
      "num_samples": num_samples,
      "num_real": len(dataset.images),
      "seed": seed,
      "features": {"name": networks[0].name, "sha256": networks[0].sha256},
      "features_heldout": None,
      "denoiser": {"name": denoiser.name, "sha256": denoiser.sha256},
      "dataset": dataset.name,
      "dataset_sha256": dataset.sha256,
  }
  if len(networks) > 1:
    conditions["features_heldout"] = {
        "name": networks[1].name, "sha256": networks[1].sha256}
  return conditions


def _measure(batches, extract, reference):
  """Metrics of one sampler's images."""
  pools = [[] for _ in extract]
  logits = []
  for batch in batches:
    images = tf.constant(data.to_float(data.to_uint8(batch.numpy())))
    for i, network in enumerate(extract):
      outputs = network(images)
      pools[i].append(outputs["pool"].numpy())
      if i == 0:
        logits.append(outputs["logits"].numpy())
  pools = [np.concatenate(pool) for pool in pools]
  if not all(np.all(np.isfinite(pool)) for pool in pools):
    raise UserError("generated images must have finite features: the sampler "
                    "or the denoiser produced NaN or infinite values")
  kid, kid_std = metrics.kid(reference[0]["pool"], pools[0])
  return {
      "fid": metrics.fid(reference[0]["pool"], pools[0]),
      "kid": kid,
      "kid_std": kid_std,
      "inception_score": metrics.inception_score(np.concatenate(logits)),
      "fid_heldout": (metrics.fid(reference[1]["pool"], pools[1])
                      if len(extract) > 1 else None),
  }


def _read_records(path):
  if not os.path.exists(path):
    return []
  try:
    with open(path) as f:
      records = json.load(f)
    if not all(isinstance(record, dict) for record in records):
      raise ValueError("not a list of records")
    return records
  except (ValueError, TypeError) as error:
    raise UserError(f"{path} is damaged: {error}. Delete it to measure anew"
                    ) from error


def _draw(run, generators, samplers, records, seed):
  """`samples.png`: best baseline beside the searched sampler, same noise."""
  chosen = [len(samplers) - 1]
  if len(samplers) > 1:
    chosen.insert(0, min(range(len(samplers) - 1),
                         key=lambda i: records[i]["fid"]))
  titled = []
  for i in chosen:
    sampler, bound = samplers[i]
    titled.append((
        f"{sampler.label}, K = {sampler.num_steps}\n"
        f"FID {records[i]['fid']:.2f}",
        generators[bound].images(sampler.coefficients(), 64, seed)))
  figures.samples_png(run.path(SAMPLES), titled)


def table(records: list[dict]) -> str:
  """The records as a text table, also valid Markdown."""
  head = ["sampler", "K", "FID", "FID held-out", "KID", "IS"]
  rows = [[
      record["sampler"], str(record["num_steps"]), f"{record['fid']:.2f}",
      "-" if record["fid_heldout"] is None else f"{record['fid_heldout']:.2f}",
      f"{record['kid']:.4f} ± {record['kid_std']:.4f}",
      f"{record['inception_score']:.2f}"] for record in records]
  widths = [max(map(len, column)) for column in zip(head, *rows)]
  lines = [head, ["-" * width for width in widths], *rows]
  return "\n".join(
      "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths))
      + " |" for line in lines)

"""A run directory as a search leaves it."""

import os
import zlib

import numpy as np

from ddss_tf import schedules
from ddss_tf import storage
from ddss_tf.runs import fingerprint
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import solvers


def coefficients(name="ddpm"):
  return solvers.solver_coefficients(
      schedules.NoiseSchedule.linear(), name, 3, "linear").numpy()


def record(sampler, num_steps=3, **changes):
  rng = np.random.default_rng(zlib.crc32(f"{sampler} {num_steps}".encode()))
  values = {name: float(rng.uniform(0.5, 9)) for name in (
      "fid", "kid", "kid_std", "inception_score", "fid_heldout")}
  network = {"name": "cnn", "sha256": "a" * 64, "protocol": "as is"}
  return {
      "sampler": sampler, "num_steps": num_steps,
      "coefficients_sha256": fingerprint.text_sha256(sampler),
      "x0_bound": None, "num_samples": 2000, "num_real": 517, "seed": 1234,
      "features": network, "features_heldout": {**network, "name": "resnet"},
      "denoiser": {"name": "unet", "sha256": "b" * 64}, "dataset": "digits",
      "dataset_sha256": "c" * 64, **values, "timing": {
          "seconds_per_image": float(rng.uniform(0.01, 0.02)), "batch_size": 25,
          "device": "2 CPU cores"}, **changes}


def write_card(folder, label="GGDM", found=None, **search):
  found = coefficients() if found is None else found
  card.write(os.path.join(folder, run_dir_lib.SAMPLER), card.SamplerCard(
      label, found, {"name": "unet", "sha256": "b" * 64},
      {"steps": 40, "best_step": 31, "seed": 5, "seconds": 12.345,
       "validation": 0.321, "objective": {"frechet": 1.0},
       "config": {"init": "ddim", "stride": "linear"},
       "features": [{"name": "cnn", "sha256": "a" * 64}], **search}))
  return fingerprint.coefficients_sha256(found)


def write_run(folder, label="GGDM", **changes):
  """A run of one sampler; returns its records."""
  sha256 = write_card(folder, label)
  records = [record("DDIM linear", **changes), record("PNDM linear", **changes),
             record(label, **changes, coefficients_sha256=sha256)]
  storage.write_json(os.path.join(folder, "metrics.json"), records)
  storage.write_text(os.path.join(folder, "config.gin"), "search.seed = 5\n")
  return records

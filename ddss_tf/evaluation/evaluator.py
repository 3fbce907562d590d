"""Measures one sampler after the other against the same real images."""

import time

from absl import logging
import numpy as np
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf import metrics
from ddss_tf import storage
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.evaluation import heldout as heldout_lib
from ddss_tf.features import clip as clip_lib
from ddss_tf.features import network as network_lib
from ddss_tf.features import reference as reference_lib
from ddss_tf.runs import fingerprint
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.features.network import check_shapes
from ddss_tf.samplers.sampler import Sampler

_SPLITS = 10  # The Inception Score is published as a mean of 10 parts.
# The fewest images, generated or real, with which KID has a standard error.
LEAST_IMAGES = 4
_TIMED = 4  # Batches that are timed; the first does not count.


class Evaluator:
  """Measures samplers under one set of conditions, on the same noise.

  Generated and real images are both rounded to uint8, as image files are, or
  clipped only. Records are kept in `metrics.json`, which is written after each
  measurement. What it holds under the same conditions is not measured again.

  Args:
    run: the run directory.
    denoiser: the frozen model; its classes are drawn as the data set has them,
      see `Conditional.for_dataset`.
    dataset: the real images; all of them are the reference.
    features: the network of FID, KID and IS. One without logits has no IS.
    heldout_features: an unrelated network for `fid_heldout`, a list of them, or
      None. All see the same images, which are made once.
    seed: the seed of the noise.
    batch_size: images per call.
    jit_compile: compile the network with XLA.
    rounding: round images to bytes before the networks see them. Without it
      they are clipped to [-1, 1], and the records' protocols say so.
    clip: for the CLIP score of each image and the prompt that it was drawn with;
      None: there is no such score.
    heldout_measures: further figures on held-out features, names out of
      `records.HELDOUT_MEASURES`. A record that is known without them stays so.

  Raises:
    UserError: the parts do not fit together, or real images are too few; or
      there is a clip and the denoiser has no prompts.
  """

  def __init__(self, run: run_dir_lib.RunDir, denoiser: Denoiser,
               dataset: dataset_lib.ImageDataset,
               features: network_lib.FeatureNetwork,
               heldout_features: (
                   network_lib.FeatureNetwork
                   | list[network_lib.FeatureNetwork] | None) = None,
               seed: int = 1234, batch_size: int = 250,
               jit_compile: bool = True, rounding: bool = True,
               clip: clip_lib.Clip | None = None,
               heldout_measures=heldout_lib.DEFAULT):
    self._run = run
    self._rounding = rounding
    self._denoiser = denoiser.for_dataset(dataset)
    self._dataset = dataset
    self._networks = [
        *network_lib.as_networks("features", features, several=False),
        *network_lib.as_networks(
            "heldout_features", heldout_features, optional=True)]
    check_shapes(denoiser, dataset, *self._networks)
    self._prompt_scores = (
        None if clip is None else clip_lib.PromptScores(clip, denoiser))
    if len(dataset.images) < LEAST_IMAGES:
      raise UserError(f"data set {dataset.name!r} must have at least "
                      f"{LEAST_IMAGES} images, because KID needs them for its "
                      f"error. Received: {len(dataset.images)}")
    self._seed = seed
    self._batch_size = batch_size
    self._jit_compile = jit_compile
    self._known = records_lib.read_records(run.path(run_dir_lib.METRICS))
    self._reference = [reference_lib.reference(
        network, dataset, quantise=rounding, cache_dir=run.cache)
                       for network in self._networks]
    self._heldout = heldout_lib.HeldoutMeasures(heldout_measures, self._reference[1:])
    self._extract = [distribution.row_wise(network)
                     for network in self._networks]
    self._generators = {}

  @property
  def known(self) -> list[dict]:
    """All records in `metrics.json`."""
    return list(self._known)

  def generator(self, x0_bound: str | None) -> generator_lib.Generator:
    """The generator of images with a bound on x0_hat."""
    if x0_bound not in self._generators:
      self._generators[x0_bound] = generator_lib.Generator(
          self._denoiser, self._batch_size, self._jit_compile, x0_bound)
    return self._generators[x0_bound]

  def record(self, sampler: Sampler, num_samples: int,
             x0_bound: str | None = None, seed: int | None = None) -> dict:
    """Measures one sampler, or gives the record that is known of it.

    Args:
      sampler: a sampler of any family.
      num_samples: generated images, at least 4.
      x0_bound: see `chain.bound_x0`.
      seed: the seed of the noise; None: the evaluator's.

    Returns:
      Its conditions and metrics, as `metrics.json` has them. A metric that is
      not finite is None, and a warning names it.

    Raises:
      UserError: samples are too few.
    """
    if num_samples < 4:
      raise UserError("num_samples must be at least 4, because KID has an error "
                      f"only then. Received: {num_samples}")
    coefficients = sampler.coefficients().numpy()
    seed = self._seed if seed is None else seed
    conditions = self._conditions(
        sampler, coefficients, num_samples, x0_bound, seed)
    for record in self._known:
      if conditions.items() <= record.items():
        return record
    generator = self.generator(x0_bound)
    seconds = []
    values = _measure(
        _timed(generator.batches(
            coefficients, num_samples, seed, sampler.label), seconds),
        self._extract, self._reference, self._heldout, num_samples, sampler.label,
        self._rounding, self._score(generator, num_samples, seed))
    self._known.append({**conditions, **values,
                        "timing": _timing(seconds, generator.batch_size)})
    storage.write_json(self._run.path(run_dir_lib.METRICS), self._known)
    return self._known[-1]

  def timed_record(self, sampler: Sampler, num_samples: int,
                   x0_bound: str | None = None) -> dict:
    """Gives the result of `record`, always with a timing.

    A record lacks a timing if all its images fitted into a single batch, whose
    time includes compilation, or if it was stored before records had timings.
    Such a record is timed now.
    """
    record = self.record(sampler, num_samples, x0_bound)
    if not record.get("timing"):
      generator = self.generator(x0_bound)
      seconds = []
      for _ in _timed(generator.batches(
          sampler.coefficients(), _TIMED * generator.batch_size, self._seed,
          f"time {sampler.label}"), seconds):
        pass
      record["timing"] = _timing(seconds, generator.batch_size)
      storage.write_json(self._run.path(run_dir_lib.METRICS), self._known)
    return record

  def images(self, sampler: Sampler, num_images: int,
             x0_bound: str | None = None) -> np.ndarray:
    """The first images of a sampler's record, float32 [N, H, W, C]."""
    return self.generator(x0_bound).images(
        sampler.coefficients(), num_images, self._seed)

  def real_images(self, num_images: int) -> np.ndarray:
    """The first images of the data set, float32 [N, H, W, C]."""
    return self._dataset.images[:num_images]

  def _score(self, generator, num_samples, seed):
    """A function from images, and the first's index, to CLIP scores; or None."""
    if self._prompt_scores is None:
      return None
    labels = generator.labels(num_samples, seed)
    return lambda images, start: self._prompt_scores(
        images, labels[start:start + len(images)])

  def _conditions(self, sampler, coefficients, num_samples, x0_bound, seed):
    """All that decides a record's values."""
    features = [dict(network.identity) for network in self._networks]
    if not self._rounding:
      for identity in features:
        identity["protocol"] += ", not rounded to bytes"
    clip = {}  # Records without it are what they were before there was one.
    if self._prompt_scores is not None:
      clip["clip"] = dict(self._prompt_scores.identity)
      if not self._rounding:
        clip["clip"]["protocol"] += ", not rounded to bytes"
    return records_lib.Record(
        sampler=sampler.label,
        num_steps=sampler.num_steps,
        coefficients_sha256=fingerprint.coefficients_sha256(coefficients),
        x0_bound=x0_bound,
        num_samples=num_samples,
        num_real=len(self._dataset.images),
        seed=seed,
        features=features[0],
        features_heldout=_one_or_all(features[1:]),
        denoiser=self._denoiser.setting,
        dataset=self._dataset.name,
        dataset_sha256=self._dataset.sha256,
        **clip)


def _timed(batches, seconds):
  """Yields batches as NumPy; appends to a list the seconds that each took."""
  began = time.perf_counter()
  for batch in batches:
    values = batch.numpy()  # Waits for the device.
    seconds.append(time.perf_counter() - began)
    yield values
    began = time.perf_counter()


def _timing(seconds, batch_size):
  """The `timing` of a record: that of the median batch, without the first.

  The time of the first batch includes compilation. If there is no other, the
  timing is None.
  """
  if len(seconds) < 2:
    return None
  return {"seconds_per_image": float(np.median(seconds[1:])) / batch_size,
          "batch_size": batch_size, "device": distribution.device_name()}


def _one_or_all(values):
  """A record's entry for held-out networks: a list, a single value, or None."""
  return values if len(values) > 1 else next(iter(values), None)


def _measure(batches, extract, reference, heldout, num_samples, label, rounding,
             score=None):
  """Metrics of one sampler's images, from one pass over them.

  A metric that is not finite is None. An image or a network that gives NaN
  spoils only the metrics that depend on it.
  """
  broken, start = 0, 0

  def outputs():
    nonlocal broken, start
    for batch in batches:
      images = np.nan_to_num(batch)
      images = tf.constant(
          dataset_lib.to_float(dataset_lib.to_uint8(images)) if rounding
          else np.clip(images, -1, 1))
      found = [network(images) for network in extract]
      # Without logits, an array without columns.
      rows = [found[0].get("logits", np.zeros([len(batch), 0])),
              *(output["pool"] for output in found)]
      if score is not None:
        rows.append(score(images, start)[:, None])
      start += len(batch)
      bad = ~np.all(np.isfinite(batch), axis=(1, 2, 3))
      broken += np.sum(bad)
      # A byte cannot be NaN: after rounding such an image would look valid.
      yield [np.where(bad[:, None], np.nan, values) for values in rows]

  logits, *pools = reference_lib.collect(outputs(), num_samples)
  scores = {} if score is None else {
      "clip_score": float(np.mean(pools.pop(), dtype=np.float64))}
  kid, kid_std = metrics.kid(reference[0].pool, pools[0])
  inception, inception_splits = _inception_score(logits)
  values = {
      "fid": metrics.fid(reference[0].moments, pools[0]),
      "kid": kid,
      "kid_std": kid_std,
      "inception_score": inception,
      "inception_score_splits": inception_splits,
      "fid_heldout": _one_or_all([
          metrics.fid(real.moments, pool)
          for real, pool in zip(reference[1:], pools[1:])]),
      **{name: _one_or_all(found) for name, found in heldout(pools[1:]).items()},
      **scores,
  }
  known = _finite(values)
  lost = [name for name in values if known[name] != values[name]]
  if lost:
    logging.warning(
        "%s: %s not finite, and null in its record: %s", label,
        ", ".join(lost),
        f"{broken} of {num_samples} images have NaN or infinity" if broken else
        "a feature network gives NaN or infinity")
  return known


def _inception_score(logits):
  """The score of all and that of parts; None and None without logits."""
  if not logits.shape[1]:
    return None, None
  splits = min(_SPLITS, len(logits))
  mean, std = metrics.inception_score(logits, splits)
  return (metrics.inception_score(logits)[0],
          {"splits": splits, "mean": mean, "std": std})


def _finite(value):
  """A value, or a dict or list of them, with None where it is not finite."""
  if isinstance(value, dict):
    return {key: _finite(inner) for key, inner in value.items()}
  if isinstance(value, list):
    return [_finite(inner) for inner in value]
  return None if isinstance(value, float) and not np.isfinite(value) else value

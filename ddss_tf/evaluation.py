"""The comparison: FID, KID and IS of samplers, side by side."""

import os
import shutil
import time
from typing import Any, Callable, Mapping, Sequence

from absl import logging
import gin
import numpy as np
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf import metrics
from ddss_tf import storage
from ddss_tf import zoo
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.features import network as network_lib
from ddss_tf.features import reference as reference_lib
from ddss_tf.reporting import grids
from ddss_tf.runs import fingerprint
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.denoisers.denoiser import Denoiser, check_guidance
from ddss_tf.errors import MAX_SEED, UserError, check_whole
from ddss_tf.features.network import check_shapes
from ddss_tf.samplers.chain import check_x0_bound
from ddss_tf.samplers.sampler import FixedSampler, Sampler
from ddss_tf.schedules import NoiseSchedule

_SPLITS = 10  # Of the Inception Score, as published.
_LEAST_IMAGES = 4  # Of KID with an error, generated and real.
_TIMED = 4  # Batches, the first of which does not count.


def load_searched(run: run_dir_lib.RunDir, denoiser: Denoiser,
                  sampler: str | None = None, force: bool = False
                  ) -> tuple[FixedSampler, str | None]:
  """The sampler of a run directory or of a card, and its x0_bound.

  Args:
    run: the run directory.
    denoiser: what it is to be used with.
    sampler: path of a card, or its name in the zoo; None: what a search left in
      the run directory.
    force: take a card that was found for other weights or another guidance.

  Returns:
    The sampler, and the bound on x0_hat it was found with.

  Raises:
    UserError: there is none, it was found for another model, or its times are
      not in this one's range.
  """
  path = run.path(run_dir_lib.SAMPLER) if sampler is None else zoo.find(sampler)
  found = card.read(path)
  mine = denoiser.identity
  for name in sorted({*found.denoiser, *mine} - {"name"}):
    known, own = found.denoiser.get(name), mine.get(name)
    if known == own:
      continue
    difference = (
        f"{path} was found for the denoiser {found.denoiser.get('name')!r} "
        f"with {name} {known}. Received: {denoiser.name!r} with {own}")
    if not force:
      raise UserError(f"{difference}. Use its own, or bind force = True")
    logging.warning("%s", difference)
  try:
    check_guidance(denoiser, found.coefficients)
    fixed = FixedSampler(denoiser.schedule, found.coefficients, found.label)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  return fixed, found.x0_bound


class Evaluator:
  """Measures samplers under one set of conditions, on the same noise.

  Generated and real images are both rounded to uint8. Records are kept in
  `metrics.json`, written after each; what it holds under the same conditions is
  not measured again.

  Args:
    run: the run directory.
    denoiser: the frozen model.
    dataset: the real images, all of them the reference.
    features: the network of FID, KID and IS.
    heldout_features: an unrelated network for `fid_heldout`, a list of them, or
      None. All see the same images, which are made once.
    seed: of the noise.
    batch_size: images per call.
    jit_compile: compile the network with XLA.

  Raises:
    UserError: parts that do not fit together, or too few real images.
  """

  def __init__(self, run: run_dir_lib.RunDir, denoiser: Denoiser,
               dataset: dataset_lib.ImageDataset,
               features: network_lib.FeatureNetwork,
               heldout_features: (
                   network_lib.FeatureNetwork
                   | list[network_lib.FeatureNetwork] | None) = None,
               seed: int = 1234, batch_size: int = 250,
               jit_compile: bool = True):
    self._run = run
    self._denoiser = denoiser
    self._dataset = dataset
    self._networks = [
        *network_lib.as_networks("features", features, several=False),
        *network_lib.as_networks(
            "heldout_features", heldout_features, optional=True)]
    check_shapes(denoiser, dataset, *self._networks)
    if len(dataset.images) < _LEAST_IMAGES:
      raise UserError(f"data set {dataset.name!r} must have at least "
                      f"{_LEAST_IMAGES} images, for the error of KID. "
                      f"Received: {len(dataset.images)}")
    self._seed = seed
    self._batch_size = batch_size
    self._jit_compile = jit_compile
    self._known = records_lib.read_records(run.path(run_dir_lib.METRICS))
    self._reference = [reference_lib.reference(
        network, dataset, quantise=True, cache_dir=run.cache)
                       for network in self._networks]
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
    """Measures one sampler, or remembers it.

    Args:
      sampler: of any family.
      num_samples: generated images, at least 4.
      x0_bound: see `chain.bound_x0`.
      seed: of the noise, in place of the evaluator's.

    Returns:
      Its conditions and metrics, as `metrics.json` has them; None for a metric
      that is not finite, which a warning names.

    Raises:
      UserError: too few samples.
    """
    if num_samples < 4:
      raise UserError("num_samples must be at least 4, for KID has an error "
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
        self._extract, self._reference, num_samples, sampler.label)
    self._known.append({**conditions, **values,
                        "timing": _timing(seconds, generator.batch_size)})
    storage.write_json(self._run.path(run_dir_lib.METRICS), self._known)
    return self._known[-1]

  def timed_record(self, sampler: Sampler, num_samples: int,
                   x0_bound: str | None = None) -> dict:
    """`record`, whose `timing` is measured now if it has none.

    It has none if its images came in one batch, whose time is that of the
    compilation, or if it was written before times were.
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
    """The first images of a record, float32 [N, H, W, C]."""
    return self.generator(x0_bound).images(
        sampler.coefficients(), num_images, self._seed)

  def _conditions(self, sampler, coefficients, num_samples, x0_bound, seed):
    """All that decides a record's values."""
    features = [network.identity for network in self._networks]
    return {
        "sampler": sampler.label,
        "num_steps": sampler.num_steps,
        "coefficients_sha256": fingerprint.coefficients_sha256(coefficients),
        "x0_bound": x0_bound,
        "num_samples": num_samples,
        "num_real": len(self._dataset.images),
        "seed": seed,
        "features": features[0],
        "features_heldout": _one_or_all(features[1:]),
        "denoiser": self._denoiser.identity,
        "dataset": self._dataset.name,
        "dataset_sha256": self._dataset.sha256,
    }


def check_evaluate(arguments: Mapping[str, Any]) -> None:
  """Checks all that can be said of an evaluation before anything is loaded.

  Args:
    arguments: of `evaluate`, by name; the parts are not looked at.

  Raises:
    UserError: one is out of range.
  """
  check_whole("evaluate.num_samples", arguments["num_samples"], _LEAST_IMAGES)
  check_whole("evaluate.batch_size", arguments["batch_size"], 1)
  check_whole("evaluate.seed", arguments["seed"], 0, most=MAX_SEED)
  check_x0_bound("evaluate", arguments["x0_bound"])


@gin.configurable(denylist=["run_dir"])
@run_dir_lib.releasing_locks
def evaluate(
    run_dir: str,
    denoiser: Denoiser = gin.REQUIRED,
    dataset: dataset_lib.ImageDataset | np.ndarray = gin.REQUIRED,
    features: network_lib.FeatureNetwork = gin.REQUIRED,
    heldout_features: (network_lib.FeatureNetwork
                       | list[network_lib.FeatureNetwork] | None) = None,
    baselines: Sequence[Sampler | Callable[[NoiseSchedule], Sampler]] = (),
    num_samples: int = gin.REQUIRED,
    seed: int = 1234,
    batch_size: int = 250,
    x0_bound: str | None = None,
    cache_dir: str | None = None,
    jit_compile: bool = True,
    sampler: str | None = None,
    force: bool = False,
) -> list[dict]:
  """Evaluates the searched sampler beside baselines, on the same noise.

  Writes `metrics.json` after each row (see `Evaluator`), `samples.png`, and
  TensorBoard scalars.

  Args:
    run_dir: folder of the run, with `sampler.json` if there was a search.
    denoiser: the frozen model.
    dataset: the real images, all of them the reference; a data set, or float32
      [N, H, W, C] in [-1, 1].
    features: the network of FID, KID and IS.
    heldout_features: an unrelated network for `fid_heldout`, which shows gains
      that merely flatter the first; or a list of networks, all measured in one
      pass over the samples. Then a record has lists of as many
      `features_heldout` and `fid_heldout`.
    baselines: functions from a noise schedule to a sampler.
    num_samples: generated images of each sampler.
    seed: of their noise.
    batch_size: images per call.
    x0_bound: see `chain.bound_x0`; of the baselines. The searched sampler keeps
      the one it was searched with.
    cache_dir: folder of the real images' features, which runs may share;
      run_dir/cache if None.
    jit_compile: compile the network with XLA.
    sampler: a card instead of the searched sampler, see `load_searched`.
    force: take a card that was found for other weights.

  Returns:
    The records of this call, baselines first, the searched one last.

  Raises:
    UserError: parts that do not fit together, no sampler to evaluate, or too
      few samples for a metric.
  """
  check_evaluate(locals())
  dataset = dataset_lib.as_dataset(dataset)
  run = run_dir_lib.RunDir(run_dir, cache_dir)
  run.lock()
  # Each with its bound on x0_hat.
  samplers = [(baseline(denoiser.schedule), x0_bound) for baseline in baselines]
  if sampler or os.path.exists(run.path(run_dir_lib.SAMPLER)) or not samplers:
    samplers.append(load_searched(run, denoiser, sampler, force))
  evaluator = Evaluator(
      run, denoiser, dataset, features, heldout_features, seed,
      min(batch_size, num_samples), jit_compile)
  run.keep_config()
  records = []
  for row, bound in samplers:
    records.append(evaluator.record(row, num_samples, bound))
    logging.info("%s: %s", row.label, records[-1])

  if distribution.is_chief():
    _summarise(run.path("tensorboard", "evaluate"), evaluator.known)
  _draw(run, evaluator, samplers, records, seed)
  return records


def _summarise(folder, records):
  """Writes all records to TensorBoard, in place of what is there."""
  shutil.rmtree(folder, ignore_errors=True)
  with tf.summary.create_file_writer(folder).as_default():
    for record in records:
      values = {name: record.get(name)
                for name in ("fid", "kid", "inception_score")}
      for label, value in records_lib.heldout_fids(record).items():
        network = label.removeprefix(records_lib.HELDOUT).replace(" ", "/", 1)
        values[f"fid_heldout{network}"] = value
      for name, value in values.items():
        if value is not None:
          tf.summary.scalar(f"{name}/{record['sampler']}", value,
                            step=record["num_samples"])


def _timed(batches, seconds):
  """Passes batches on as NumPy; appends to a list how long each took."""
  began = time.perf_counter()
  for batch in batches:
    values = batch.numpy()  # Waits for the device.
    seconds.append(time.perf_counter() - began)
    yield values
    began = time.perf_counter()


def _timing(seconds, batch_size):
  """The `timing` of a record: of a median batch, the first left out.

  None if there is only that one, which had to be compiled.
  """
  if len(seconds) < 2:
    return None
  return {"seconds_per_image": float(np.median(seconds[1:])) / batch_size,
          "batch_size": batch_size, "device": distribution.device_name()}


def _one_or_all(values):
  """What a record has of held-out networks: one value alone, none as None."""
  return values if len(values) > 1 else next(iter(values), None)


def _measure(batches, extract, reference, num_samples, label):
  """Metrics of one sampler's images, from one pass over them.

  Each is None if it is not finite: one image or one network that gives NaN
  costs the figures that depend on it, and no other.
  """
  broken = 0

  def outputs():
    nonlocal broken
    for batch in batches:
      images = tf.constant(dataset_lib.to_float(dataset_lib.to_uint8(np.nan_to_num(batch))))
      found = [network(images) for network in extract]
      rows = [found[0]["logits"], *(output["pool"] for output in found)]
      bad = ~np.all(np.isfinite(batch), axis=(1, 2, 3))
      broken += np.sum(bad)
      # There is no byte for NaN: what a network sees of it would look fine.
      yield [np.where(bad[:, None], np.nan, values) for values in rows]

  logits, *pools = reference_lib.collect(outputs(), num_samples)
  kid, kid_std = metrics.kid(reference[0].pool, pools[0])
  splits = min(_SPLITS, num_samples)
  split_mean, split_std = metrics.inception_score(logits, splits)
  values = {
      "fid": metrics.fid(reference[0].moments, pools[0]),
      "kid": kid,
      "kid_std": kid_std,
      "inception_score": metrics.inception_score(logits)[0],
      "inception_score_splits": {
          "splits": splits, "mean": split_mean, "std": split_std},
      "fid_heldout": _one_or_all([
          metrics.fid(real.moments, pool)
          for real, pool in zip(reference[1:], pools[1:])]),
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


def _finite(value):
  """A value, or what is in it, with None for numbers that are not finite."""
  if isinstance(value, dict):
    return {key: _finite(inner) for key, inner in value.items()}
  if isinstance(value, list):
    return [_finite(inner) for inner in value]
  return None if isinstance(value, float) and not np.isfinite(value) else value


def _draw(run, evaluator, samplers, records, seed):
  """`samples.png`: best baseline beside the searched sampler, same noise."""
  chosen = [len(samplers) - 1]
  if len(samplers) > 1:
    chosen.insert(0, min(range(len(samplers) - 1),
                         key=lambda i: records_lib.rank(records[i])))
  titled = []
  for i in chosen:
    sampler, bound = samplers[i]
    titled.append((
        f"{sampler.label}, K = {sampler.num_steps}\n"
        f"{records_lib.fid_label(records[i]['num_samples'])} "
        + records_lib.text(records[i]["fid"]),
        evaluator.generator(bound).images(sampler.coefficients(), 64, seed)))
  grids.samples_png(run.path(run_dir_lib.SAMPLES_PNG), titled)

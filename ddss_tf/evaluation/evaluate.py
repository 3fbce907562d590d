"""The comparison: FID and further figures of samplers, side by side."""

from typing import Any, Mapping, Sequence

from absl import logging
import gin
import numpy as np
import tensorflow as tf

from ddss_tf import bindings
from ddss_tf import distribution
from ddss_tf import storage
from ddss_tf import zoo
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.evaluation import baselines as baselines_lib
from ddss_tf.evaluation import evaluator as evaluator_lib
from ddss_tf.evaluation import heldout as heldout_lib
from ddss_tf.features import network as network_lib
from ddss_tf.reporting import grids
from ddss_tf.reporting import report
from ddss_tf.runs import fingerprint
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import MAX_SEED, UserError, check_whole
from ddss_tf.evaluation.baselines import Baseline
from ddss_tf.evaluation.evaluator import Evaluator
from ddss_tf.features.clip import Clip
from ddss_tf.samplers.chain import check_x0_bound


def check_evaluate(arguments: Mapping[str, Any]) -> None:
  """Checks the options of an evaluation before anything is loaded.

  Args:
    arguments: the arguments of `evaluate`, by name. The denoiser, the data set
      and the feature networks are not looked at.

  Raises:
    UserError: an option is out of range, or a baseline has an unknown name.
  """
  baselines_lib.check("evaluate", arguments["baselines"])
  check_whole("evaluate.num_steps", arguments["num_steps"], 1, optional=True)
  check_whole("evaluate.num_samples", arguments["num_samples"],
              evaluator_lib.LEAST_IMAGES)
  check_whole("evaluate.batch_size", arguments["batch_size"], 1)
  check_whole("evaluate.seed", arguments["seed"], 0, most=MAX_SEED)
  check_x0_bound("evaluate", arguments["x0_bound"])
  heldout_lib.check("evaluate", arguments["heldout_measures"])


@bindings.configurable(denylist=["run_dir"])
def evaluate(
    run_dir: str,
    denoiser: Denoiser = gin.REQUIRED,
    dataset: dataset_lib.ImageDataset | np.ndarray = gin.REQUIRED,
    features: network_lib.FeatureNetwork = gin.REQUIRED,
    heldout_features: (network_lib.FeatureNetwork
                       | list[network_lib.FeatureNetwork] | None) = None,
    baselines: Sequence[Baseline] = baselines_lib.DEFAULT,
    num_samples: int = gin.REQUIRED,
    seed: int = 1234,
    batch_size: int = 250,
    x0_bound: str | None = None,
    cache_dir: str | None = None,
    jit_compile: bool = True,
    sampler: str | None = None,
    force: bool = False,
    num_steps: int | None = None,
    rounding: bool = True,
    clip: Clip | None = None,
    heldout_measures: Sequence[str] = heldout_lib.DEFAULT,
    page: bool = True,
) -> list[dict]:
  """Evaluates the searched sampler beside baselines, on the same noise.

  Writes `metrics.json` after each row (see `Evaluator`), `samples.png`,
  TensorBoard scalars and `report.html`. A card that is not of the run leaves the
  run's `samples.png` as it is and is drawn into `samples_<name>.png`; its row
  has its name.

  Args:
    run_dir: folder of the run, with `sampler.json` if there was a search.
    denoiser: the frozen model.
    dataset: the real images, all of them the reference; a data set, or float32
      [N, H, W, C] in [-1, 1].
    features: the network of FID, KID and IS; without logits there is no IS.
    heldout_features: an unrelated network for `fid_heldout`, which reveals
      gains on the first network alone; or a list of networks, all measured in
      one pass over the samples. Given a list, `features_heldout` and
      `fid_heldout` of a record are lists of that length.
    baselines: training-free solvers by name, such as "ddim quadratic", the
      solver "ddim" on the stride "quadratic"; "best", the best solver known for
      K (`learned.best_start`); "start", where the search began; paths of cards or
      names of the zoo; functions from a noise schedule to a sampler; or samplers.
      Of the default, DDIM, "best" and "start", those that cannot be made are left
      out. Rows with the same coefficients are measured once.
    num_samples: generated images of each sampler.
    seed: the seed of their noise.
    batch_size: images per call.
    x0_bound: the bound on x0_hat of the baselines, see `chain.bound_x0`. The
      searched sampler keeps the one it was searched with.
    cache_dir: folder of the real images' features, which runs may share;
      run_dir/cache if None.
    jit_compile: compile the network with XLA.
    sampler: a card instead of the searched sampler, see `load_searched`.
    force: take a card that was found for other weights.
    num_steps: K of the baselines that are given by name; that of the searched
      sampler if None.
    rounding: see `Evaluator`.
    clip: the network of the CLIP score, for a denoiser with prompts; None: it is
      not measured. FID alone misleads where guidance differs: see both.
    heldout_measures: further figures on the held-out features, names out of
      "coverage", "recall", "density", "precision" (`neighbours.figures`) and
      "sliced_wasserstein" (`metrics.sliced_wasserstein`).
    page: write the report, see `report.report`.

  Returns:
    The records of this call, baselines first, the searched one last.

  Raises:
    UserError: the parts do not fit together, a baseline is unknown, there is no
      sampler to evaluate, the samples are too few for a metric, or there is a
      clip and the denoiser has no prompts.
  """
  check_evaluate(locals())
  dataset = dataset_lib.as_dataset(dataset)
  with run_dir_lib.RunDir(run_dir, cache_dir).locked() as run:
    searched, picture = [], run_dir_lib.SAMPLES_PNG
    own = storage.exists(run.path(run_dir_lib.SAMPLER))
    if sampler or own or not baselines or baselines is baselines_lib.DEFAULT:
      searched.append(zoo.load_searched(run, denoiser, sampler, force))
      if num_steps is None:
        num_steps = searched[0][0].num_steps
    if sampler and own and not _is_of(run, searched[0][0]):
      name = zoo.short_name(sampler)
      searched[0][0].label += f" ({name})"
      picture = picture.replace(".", f"_{name}.")
    # Every sampler has its bound on x0_hat beside it.
    samplers = _unlike(baselines_lib.rows(
        baselines, run, denoiser, num_steps, x0_bound, force) + searched)
    evaluator = Evaluator(
        run, denoiser, dataset, features, heldout_features, seed,
        min(batch_size, num_samples), jit_compile, rounding, clip,
        heldout_measures)
    run.keep_config()
    records = []
    for row, bound in samplers:
      records.append(evaluator.record(row, num_samples, bound))
      logging.info("%s: %s", row.label, records[-1])

    if distribution.is_chief():
      _summarise(run.path(run_dir_lib.TENSORBOARD, "evaluate"), evaluator.known)
    _draw(run.path(picture), evaluator, samplers, records, seed)
    if page:
      report.report(run.root)
    return records


def _is_of(run, sampler) -> bool:
  """Whether a sampler is the one that the run's search has found."""
  found = card.read(run.path(run_dir_lib.SAMPLER)).coefficients
  return fingerprint.coefficients_sha256(found) == (
      fingerprint.coefficients_sha256(sampler.coefficients().numpy()))


def _unlike(samplers):
  """Samplers with their bounds, without the earlier of two that are the same.

  So the searched one, which is the last, always stays.
  """
  kept = {}
  for sampler, bound in reversed(samplers):
    key = fingerprint.coefficients_sha256(sampler.coefficients().numpy()), bound
    kept.setdefault((key, sampler.label), (sampler, bound))
  return list(reversed(kept.values()))


def _summarise(folder, records):
  """Writes all records to TensorBoard, in place of what is there."""
  storage.remove_tree(folder, ignore_errors=True)
  with tf.summary.create_file_writer(folder).as_default():
    for record in records:
      values = {name: record.get(name)
                for name in ("fid", "kid", "inception_score", "clip_score")}
      for key in ("fid_heldout", *(
          measure.key for measure in records_lib.HELDOUT_MEASURES.values())):
        for label, value in records_lib.heldout_figures(record, key).items():
          network = label.removeprefix(records_lib.HELDOUT).replace(" ", "/", 1)
          values[f"{key}{network}"] = value
      for name, value in values.items():
        if value is not None:
          tf.summary.scalar(f"{name}/{record['sampler']}", value,
                            step=record["num_samples"])


def _draw(path, evaluator, samplers, records, seed):
  """Draws best baseline and searched sampler, on the same noise."""
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
  grids.samples_png(path, titled)

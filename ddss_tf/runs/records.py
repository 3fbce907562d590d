"""Records of measurements: how they are told apart, read and tabulated."""

import csv
import io
import itertools
import json
from typing import Mapping, NamedTuple, TypedDict

import numpy as np
import tabulate

from ddss_tf import storage
from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError

FULL_SAMPLES = 50_000  # The number of images behind published values.
HELDOUT = "held-out"


class Record(TypedDict, total=False):
  """A sampler's figures and all that decides them, as `metrics.json` has it.

  Records may have further keys, of other versions of the library. In the table
  of a `compare` with objectives they have "objective", "search_rate" and
  "search_seconds", None where the sampler was not searched; in that of one with
  published figures they have "published", None where there are none.

  Attributes:
    sampler: the sampler's label.
    num_steps: K.
    coefficients_sha256: hash of its coefficients.
    x0_bound: see `chain.bound_x0`.
    num_samples: number of generated images.
    num_real: number of images in the data set.
    seed: the seed of the noise.
    features: "name", "sha256" and "protocol" of the feature network.
    features_heldout: the same of a held-out network, a list of several, or None.
    denoiser: what decides the model's images, see `Denoiser.setting`.
    dataset: the data set's name.
    dataset_sha256: its hash.
    fid, kid, kid_std, inception_score: figures; None if not finite. The Inception
      score is None, too, of a feature network without logits.
    inception_score_splits: number of splits, mean and deviation over them; None
      without logits.
    fid_heldout: a figure for each network of `features_heldout`.
    coverage_heldout, recall_heldout, density_heldout, precision_heldout,
    sliced_wasserstein_heldout: the same, only where it was measured.
    clip: "name", "sha256", "protocol" and "key" of the network of the CLIP score,
      and "token_ids", a hash of the prompts' tokens. Only where it was measured.
    clip_score: its mean over the images; None if not finite.
    timing: "seconds_per_image", "batch_size" and "device", or None.
  """
  sampler: str
  num_steps: int
  coefficients_sha256: str
  x0_bound: str | None
  num_samples: int
  num_real: int
  seed: int
  features: dict
  features_heldout: dict | list | None
  denoiser: dict
  dataset: str
  dataset_sha256: str
  fid: float | None
  kid: float | None
  kid_std: float | None
  inception_score: float | None
  inception_score_splits: dict | None
  fid_heldout: float | list | None
  coverage_heldout: float | list | None
  recall_heldout: float | list | None
  density_heldout: float | list | None
  precision_heldout: float | list | None
  sliced_wasserstein_heldout: float | list | None
  clip: dict
  clip_score: float | None
  timing: dict | None


class Measure(NamedTuple):
  """A figure on held-out features.

  Attributes:
    key: the key of records.
    heading: what tables call it.
    form: how they show it, a format of numbers.
  """
  key: str
  heading: str
  form: str


# By the names of `heldout_measures`.
HELDOUT_MEASURES = {
    "coverage": Measure("coverage_heldout", "coverage", ".3f"),
    "recall": Measure("recall_heldout", "recall", ".3f"),
    "density": Measure("density_heldout", "density", ".3f"),
    "precision": Measure("precision_heldout", "precision", ".3f"),
    "sliced_wasserstein": Measure(
        "sliced_wasserstein_heldout", "sliced W2²", ".4f")}
FIGURES = ("fid", "kid", "kid_std", "inception_score")
# Records may be compared if they agree in all of these.
CONDITIONS = ("num_samples", "num_real", "dataset", "dataset_sha256",
              "denoiser", "features", "features_heldout")
# What `Denoiser.setting` has beside the identity: it decides the images, but a
# sampler suits a network whichever it has.
OF_IMAGES = ("decoder", "conditions", "label_weights")
_COUNTS = ("num_samples", "num_steps", "seed")
_OTHERS = ("sampler", "coefficients_sha256", "x0_bound", "fid_heldout")


def sample_key(record: Record) -> str:
  """Hash of all that decides the images of a record: a key of `samples.npz`."""
  return fingerprint.text_sha256(json.dumps([record[key] for key in (
      "coefficients_sha256", "x0_bound", "seed", "denoiser")], sort_keys=True))


def sampler_key(record: Record) -> tuple:
  """What records of one sampler share, whatever their seeds."""
  return tuple(record.get(key) for key in (
      "sampler", "num_steps", "coefficients_sha256", "num_samples", "x0_bound"))


def row_key(row: Mapping) -> tuple[str, ...]:
  """What tells rows apart; equal for a record and its row of `table.csv`."""
  return tuple(str(row.get(key) or "") for key in (
      "sampler", "num_steps", "coefficients_sha256", "x0_bound", "num_samples",
      "seed", "dataset_sha256"))


def condition_key(record: Record) -> str:
  """A text that is equal for records which may be compared."""
  return json.dumps([*(record[key] for key in CONDITIONS), *(
      [record["clip"]] if record.get("clip") else [])], sort_keys=True)


def is_of(record: Record, coefficients_sha256: str, x0_bound: str | None,
          denoiser: dict) -> bool:
  """Whether a record is of these coefficients, this bound and this model.

  Args:
    record: the record.
    coefficients_sha256: see `Record`.
    x0_bound: see `Record`.
    denoiser: see `Denoiser.identity`, which says nothing of `OF_IMAGES`.
  """
  known = record.get("denoiser")
  if isinstance(known, dict):
    known = {key: value for key, value in known.items()
             if key not in OF_IMAGES}
  return (record.get("coefficients_sha256") == coefficients_sha256
          and record.get("x0_bound") == x0_bound
          and known == denoiser)


def heldout_names(record: Record) -> list[str]:
  """Names of a record's held-out networks; ["None"] if there are none."""
  networks = record["features_heldout"]
  networks = networks if isinstance(networks, list) else [networks or {}]
  return [str(network.get("name")) for network in networks]


def check(record: Mapping) -> None:
  """Checks that a record from a file is complete.

  Raises:
    ValueError: a key is missing, a count or a figure is not a number, the
      held-out figures do not match their networks, or a clip has no score.
  """
  for key in (*CONDITIONS, *_OTHERS, *_COUNTS, *FIGURES):
    value = record.get(key)
    good = key in record and (
        key not in (*_COUNTS, *FIGURES) or isinstance(value, (int, float))
        or value is None and key in FIGURES)
    if not good:
      raise ValueError(f"the {key!r} of a record is missing or no number")
  if "clip" in record and not (
      isinstance(record["clip"], dict) and "name" in record["clip"]
      and isinstance(record.get("clip_score", ""), (int, float, type(None)))):
    raise ValueError("the 'clip' of a record must have a name, and 'clip_score' be a "
                     "number beside it")
  try:
    heldout_fids(record)
    measured_heldout([record])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError("the 'fid_heldout' of a record, and other figures on held-out "
                     "features, must be one for each of its 'features_heldout': "
                     f"{error}") from error


def write_table(path: str, records: list[Record]) -> None:
  """Writes `<path>.csv`, with the columns of `metrics.json`, and `<path>.md`.

  Each nested value has a column of its own, such as `features.name`. Values in
  a list are named by their position, such as `fid_heldout.0` and
  `features_heldout.0.name`.
  """
  rows = [_flat(record) for record in records]
  columns = list(dict.fromkeys(key for row in rows for key in row))
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  storage.write_text(f"{path}.csv", text.getvalue())
  storage.write_text(f"{path}.md", table(records) + "\n")


def _flat(value, name=""):
  """Values inside dicts and lists, by the dotted path to each."""
  if isinstance(value, list):
    value = dict(enumerate(value))
  if not isinstance(value, dict):
    return {name: value}
  flat = {}
  for key, inner in value.items():
    flat.update(_flat(inner, f"{name}.{key}" if name else str(key)))
  return flat


def _mean(records, name, form):
  """Mean of a value as text; "-" if a record lacks it."""
  values = [record.get(name) for record in records]
  if None in values:
    return "-"
  return text(float(np.mean(values)), form)


def _spread(records, name):
  """Mean of a value, and its standard deviation if there are several."""
  mean = _mean(records, name, ".2f")
  if len(records) == 1 or mean == "-":
    return mean
  deviation = np.std([record[name] for record in records], ddof=1)
  return f"{mean} ± {text(deviation)}"


def row_name(record: Record) -> str:
  """The sampler's label, with its bound on x0_hat if it has one."""
  bound = record.get("x0_bound")
  return record["sampler"] + (f", x0 bound: {bound}" if bound else "")


def table(records: list[Record]) -> str:
  """The records as a text table, also valid Markdown.

  If FIDs are of fewer than 50 000 samples, their heading says of how many
  (`fid_label`); if the numbers differ, they have a column of their own. A
  bound on x0_hat stands beside the sampler's name. Records of one sampler
  with several seeds are one line with their means, and for FID the standard
  deviation of single seeds. Each of several held-out networks has a column
  with its name, and so has each further figure on its features that was measured;
  the mean CLIP score has one where it was measured. The Inception score has none
  where the features have no logits. "-" stands for a value that was not finite.
  """
  counts = {record["num_samples"] for record in records}
  same = len(counts) == 1
  label = fid_label(records[0]["num_samples"]) if same else "FID"
  groups = [list(group) for _, group in itertools.groupby(
      records, sampler_key)]
  heldout = [[heldout_fids(record) for record in group]
             for group in groups]
  # Tables have this column even without a held-out network, to look alike.
  columns = list(dict.fromkeys(name for group in heldout for fids in group
                               for name in fids)) or [HELDOUT]
  scored = any(record.get("clip") for record in records)
  measured = measured_heldout(records)
  of_logits = 2 * any(has_inception_score(record) for record in records)
  head = ["sampler", "K", label, *(f"{label} {name}" for name in columns),
          *(f"{measure.heading} {name}" for measure, name in measured),
          *["CLIP"][:scored], "KID", *["IS", "IS in 10 parts"][:of_logits]]
  rows = [[
      row_name(group[0]), str(group[0]["num_steps"]), _spread(group, "fid"),
      *(_spread(fids, name) for name in columns),
      *(_mean([heldout_figures(record, measure.key) for record in group], name,
              measure.form) for measure, name in measured),
      *[_spread(group, "clip_score")][:scored],
      f"{_mean(group, 'kid', '.4f')} ± {_mean(group, 'kid_std', '.4f')}",
      *[_mean(group, "inception_score", ".2f"), _in_parts(group)][:of_logits]]
          for group, fids in zip(groups, heldout)]
  if not same:
    head.append("samples")
    for row, (record, *_) in zip(rows, groups):
      row.append(str(record["num_samples"]))
  if any(record.get("search_seconds") for record in records):
    head.append("search, s")
    for row, (record, *_) in zip(rows, groups):
      seconds = record.get("search_seconds")
      row.append("-" if seconds is None else f"{seconds:.0f}")
  _add_published(head, rows, groups)
  return tabulate.tabulate(
      rows, head, "github", disable_numparse=True, stralign="left")


def _in_parts(records):
  """The mean Inception Score of ten parts and its deviation, over records."""
  splits = [record.get("inception_score_splits") or {} for record in records]
  return f"{_mean(splits, 'mean', '.2f')} ± {_mean(splits, 'std', '.2f')}"


def _add_published(head, rows, groups):
  """Adds the published figures of each row, under their source."""
  cells = [group[0].get("published") for group in groups]
  sources = sorted({cell["source"] for cell in cells if cell})
  for source in sources:
    head += [f"FID, {source}", f"IS, {source}"]
    for row, cell in zip(rows, cells):
      cell = cell if cell and cell["source"] == source else {}
      row += [text(cell.get("fid"), "g"), text(cell.get("inception_score"), "g")]


def rank(record: Record) -> float:
  """The FID, by which records are ranked; infinity where there is none."""
  return float("inf") if record["fid"] is None else record["fid"]


def text(value: float | None, form: str = ".2f") -> str:
  """A figure as text: "-" for None, and "0.00" only for 0 itself.

  Args:
    value: a value of a record.
    form: the format. A value that it would show as 0 has three significant
      digits instead, because FIDs of small features are small.
  """
  if value is None:
    return "-"
  shown = format(value, form)
  return shown if value == 0 or float(shown) else f"{value:.3g}"


def fid_label(num_samples: int) -> str:
  """Name of an FID: "FID", or with fewer than 50 000 samples such as "FID-10k".

  Published values are of 50 000 samples. An FID of fewer is biased upwards and
  must not be compared with them.

  Args:
    num_samples: number of generated images.
  """
  if num_samples >= FULL_SAMPLES:
    return "FID"
  if num_samples % 1000 == 0:
    return f"FID-{num_samples // 1000}k"
  return f"FID-{num_samples}"


def heldout_fids(record: Record) -> dict[str, float | None]:
  """The FIDs of a record's held-out networks, by labels for people.

  Args:
    record: a record of `metrics.json`. Its `fid_heldout` is a number if there
      is one such network, a list in the order of `features_heldout` if there
      are several, else None.

  Returns:
    The FIDs by label; None in place of one that was not finite. The label of
    one network is "held-out". If there are several, each label ends with the
    network's name; a repeated name is numbered.

  Raises:
    ValueError: the numbers of values and of networks differ.
  """
  return heldout_figures(record, "fid_heldout")


def heldout_figures(record: Record, key: str) -> dict[str, float | None]:
  """Figures on held-out features by labels for people, as `heldout_fids`.

  Args:
    record: a record of `metrics.json`.
    key: "fid_heldout", or a key of `HELDOUT_MEASURES`; {} if it was not measured.

  Raises:
    ValueError: the numbers of values and of networks differ.
  """
  values = record.get(key)
  if values is None and (not record.get("features_heldout") or key not in record
                         and key != "fid_heldout"):
    return {}
  if not isinstance(values, list):
    return {HELDOUT: values}
  names = [network["name"] for network in record["features_heldout"]]
  fids = {}
  for i, (name, value) in enumerate(zip(names, values, strict=True)):
    before = names[:i].count(name)
    number = f" ({before + 1})" if before else ""
    fids[f"{HELDOUT} {name}{number}"] = value
  return fids


def measured_heldout(records: list[Record]) -> list[tuple[Measure, str]]:
  """The further figures on held-out features that any record has.

  Returns:
    Pairs of a measure and a network's label, in the order of tables.
  """
  return [(measure, label) for measure in HELDOUT_MEASURES.values()
          for label in dict.fromkeys(
              label for record in records
              for label in heldout_figures(record, measure.key))]


def has_inception_score(record: Record) -> bool:
  """Whether the features of a record have logits, of which the score is made.

  One that was not finite was measured, and older records have no scores of parts.
  """
  return (record.get("inception_score") is not None
          or record.get("inception_score_splits", {}) is not None)


def read_records(path: str) -> list[Record]:
  """Reads a list of records, such as `metrics.json`; [] if there is no file.

  Raises:
    UserError: the file is damaged.
  """
  if not storage.exists(path):
    return []
  try:
    records = storage.read_json(path)
    if not all(isinstance(record, dict) for record in records):
      raise ValueError("not a list of records")
    return records
  except (ValueError, TypeError) as error:
    raise UserError(f"{path} is damaged: {error}. Delete it to measure anew"
                    ) from error

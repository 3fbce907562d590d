"""Records of measurements: how they are told apart, read and tabulated."""

import csv
import io
import itertools
import json
import os

import numpy as np
import tabulate

from ddss_tf import storage
from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError

FULL_SAMPLES = 50_000  # Of published values.
HELDOUT = "held-out"


def sample_key(record: dict) -> str:
  """What decides the images of a record, as `samples.npz` names them."""
  return fingerprint.text_sha256(json.dumps([record[key] for key in (
      "coefficients_sha256", "x0_bound", "seed", "denoiser")], sort_keys=True))


def write_table(path: str, records: list[dict]) -> None:
  """Writes `<path>.csv`, with the columns of `metrics.json`, and `<path>.md`.

  Nested values get a column each, such as `features.name`; those of a list by
  their position, such as `fid_heldout.0` and `features_heldout.0.name`.
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
  """Values inside of dicts and lists, by the dotted path to each."""
  if isinstance(value, list):
    value = dict(enumerate(value))
  if not isinstance(value, dict):
    return {name: value}
  flat = {}
  for key, inner in value.items():
    flat.update(_flat(inner, f"{name}.{key}" if name else str(key)))
  return flat


def _mean(records, name, form):
  """Mean of a value as text; "-" if it is not known of all records."""
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


def row_name(record: dict) -> str:
  """The sampler, and how its predictions are bounded if they are."""
  bound = record.get("x0_bound")
  return record["sampler"] + (f", x0 bound: {bound}" if bound else "")


def table(records: list[dict]) -> str:
  """The records as a text table, also valid Markdown.

  An FID of fewer than 50 000 samples says of how many (`records.fid_label`), in
  a column of its own where they differ. A bound of x0 is told beside the name.
  Records of one sampler that differ in their seed are one line: the mean, and
  of FID the standard deviation of single seeds. Of several held-out networks
  each has a column, with its name. "-" is what was not finite.
  """
  counts = {record["num_samples"] for record in records}
  same = len(counts) == 1
  label = fid_label(records[0]["num_samples"]) if same else "FID"
  groups = [list(group) for _, group in itertools.groupby(
      records, lambda record: [record[key] for key in (
          "sampler", "num_steps", "coefficients_sha256", "num_samples")]
      + [record.get("x0_bound")])]
  heldout = [[heldout_fids(record) for record in group]
             for group in groups]
  # A column even where no network is held out: tables then look alike.
  columns = list(dict.fromkeys(name for group in heldout for fids in group
                               for name in fids)) or [HELDOUT]
  head = ["sampler", "K", label, *(f"{label} {name}" for name in columns),
          "KID", "IS"]
  rows = [[
      row_name(group[0]), str(group[0]["num_steps"]), _spread(group, "fid"),
      *(_spread(fids, name) for name in columns),
      f"{_mean(group, 'kid', '.4f')} ± {_mean(group, 'kid_std', '.4f')}",
      _mean(group, "inception_score", ".2f")]
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
  return tabulate.tabulate(
      rows, head, "github", disable_numparse=True, stralign="left")


def rank(record: dict) -> float:
  """By what records are ranked: the FID, infinity where there is none."""
  return float("inf") if record["fid"] is None else record["fid"]


def text(value: float | None, form: str = ".2f") -> str:
  """A figure for people: "-" for none, and never 0 for what is not.

  Args:
    value: of a record.
    form: how it is written, unless nothing would be left of it: FIDs of small
      features are small.
  """
  if value is None:
    return "-"
  shown = format(value, form)
  return shown if value == 0 or float(shown) else f"{value:.3g}"


def fid_label(num_samples: int) -> str:
  """What to call an FID: "FID", but "FID-10k" of fewer than 50 000 samples.

  Published values are of 50 000. One of fewer is biased upwards and must not
  be read beside them.

  Args:
    num_samples: generated images.
  """
  if num_samples >= FULL_SAMPLES:
    return "FID"
  if num_samples % 1000 == 0:
    return f"FID-{num_samples // 1000}k"
  return f"FID-{num_samples}"


def heldout_fids(record: dict) -> dict[str, float | None]:
  """The FIDs of a record's held-out networks, by what to call them.

  Args:
    record: of `metrics.json`. Its `fid_heldout` is a number if there is one
      such network, a list in the order of `features_heldout` if there are
      several, else None.

  Returns:
    "held-out" for one network; of several also the name of each. A name that
    comes again is numbered. None in place of a distance that was not finite.

  Raises:
    ValueError: not as many values as networks.
  """
  values = record.get("fid_heldout")
  if values is None and not record.get("features_heldout"):
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


def read_records(path: str) -> list[dict]:
  """Reads a list of records, such as `metrics.json`; none if it is not there.

  Raises:
    UserError: it is damaged.
  """
  if not os.path.exists(path):
    return []
  try:
    records = storage.read_json(path)
    if not all(isinstance(record, dict) for record in records):
      raise ValueError("not a list of records")
    return records
  except (ValueError, TypeError) as error:
    raise UserError(f"{path} is damaged: {error}. Delete it to measure anew"
                    ) from error

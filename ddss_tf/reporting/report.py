"""One page of HTML about a run or a comparison, made from its folder alone.

Figures are drawn again from `metrics.json` and embedded; nothing is measured or
sampled. The page is one file without scripts that loads nothing. Its texts come
from files, so Jinja escapes all of them. Every number in a table is a `<data>`
element with all its digits in `value`.
"""

import base64
import csv
import json
import os
import shlex
import struct

import jinja2
import markupsafe

from ddss_tf import bindings
from ddss_tf import distribution
from ddss_tf import storage
from ddss_tf import version as version_lib
from ddss_tf.reporting import comparison
from ddss_tf.runs import fingerprint
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import labels
from ddss_tf.errors import UserError

_TEMPLATE = os.path.join(os.path.dirname(__file__), "assets", "report.html")
# Folders of a run that are not searched for samplers.
_NO_SAMPLERS = (run_dir_lib.CACHE, run_dir_lib.CHECKPOINTS,
                run_dir_lib.TENSORBOARD, run_dir_lib.EXPORT)
_NONE = {"fid": None}  # Every record with an FID is better than this one.


@bindings.configurable(denylist=["run_dir"])
def report(run_dir: str, shown: list[str] | None = None) -> str:
  """Writes `report.html` from what a run or a comparison left.

  The figures of its `metrics.json` are drawn again. All other pictures are
  taken from the folder as they are; missing ones are left out.

  Args:
    run_dir: folder of the run or the comparison.
    shown: rows of a comparison whose samples are drawn, see `comparison.draw`.

  Returns:
    Path of the page.

  Raises:
    UserError: the folder holds neither results nor a sampler, a file is
      damaged, or there is no row of a name in `shown`.
  """
  run = run_dir_lib.RunDir(run_dir)
  if not distribution.is_chief():  # Only the chief is sure to have all files.
    return run.path(run_dir_lib.REPORT)
  groups, more = _results(run)
  found = _found_samplers(run)
  if not groups and not found:
    raise UserError(
        f"run_dir must hold {run_dir_lib.METRICS} or {run_dir_lib.SAMPLER}, of a run or a "
        f"comparison. Received: {run_dir!r}")
  names = []
  if groups and len(groups[0]) > 1:
    names = comparison.draw(run.root, groups[0], shown)
  names += [run_dir_lib.SAMPLES_PNG, f"{run_dir_lib.GENERATED}.png"]
  environment = jinja2.Environment(
      autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
      lstrip_blocks=True)
  environment.filters["number"] = _number
  environment.filters["count"] = lambda value: _number(value, "d")
  with storage.open(_TEMPLATE, encoding="utf-8") as f:
    template = environment.from_string(f.read())
  try:
    page = template.render(
        title=_title(groups, found), headlines=_headlines(groups),
        tables=[_table(records) for records in groups], more=more,
        figures=_figures(run.root, names), samplers=found,
        run_dir=run.root, version=version_lib.__version__,
        uses=_uses(run, groups, found), config=_text(run.path(run_dir_lib.CONFIG)))
  except (jinja2.UndefinedError, TypeError) as error:
    raise UserError(f"{run_dir_lib.METRICS} or a {run_dir_lib.SAMPLER} in {run_dir!r} is "
                    f"damaged: {error}") from error
  storage.write_text(run.path(run_dir_lib.REPORT), page)
  return run.path(run_dir_lib.REPORT)


def _number(value, form: str) -> markupsafe.Markup:
  """A number as a `<data>` element; another value as text, None as a dash."""
  if value is None:
    return markupsafe.Markup("&ndash;")
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return markupsafe.escape(value)
  if form == "d" and not isinstance(value, int):
    form = "g"
  return markupsafe.Markup('<data value="{}">{}</data>').format(
      repr(value), records_lib.text(value, form))


def _text(path):
  if not storage.exists(path):
    return ""
  with storage.open(path, encoding="utf-8", errors="replace") as f:
    return f.read()


def _results(run):
  """Lists of comparable records, the list of most samples first.

  `metrics.json` keeps all that was ever measured in a folder. Of a comparison,
  only the rows of its last table are taken. Of a run, records of a searched
  sampler are taken only if it is the one that is there now.

  Returns:
    The lists, and how many records are in none of them.
  """
  everything = records_lib.read_records(run.path(run_dir_lib.METRICS))
  records = everything
  table = run.path(f"{run_dir_lib.TABLE}.csv")
  if storage.exists(table):
    with storage.open(table, newline="", encoding="utf-8") as f:
      rows = [records_lib.row_key(row) for row in csv.DictReader(f)]
    records = sorted((r for r in everything if records_lib.row_key(r) in rows),
                     key=lambda r: rows.index(records_lib.row_key(r)))
  elif storage.exists(run.path(run_dir_lib.SAMPLER)):
    found = card.read(run.path(run_dir_lib.SAMPLER))
    sha256 = fingerprint.coefficients_sha256(found.coefficients)
    records = [r for r in everything if r.get("sampler") != found.label
               or r.get("coefficients_sha256") == sha256]
  groups = {}
  for record in records:
    try:
      records_lib.check(record)
    except ValueError as error:
      raise UserError(f"{run.path(run_dir_lib.METRICS)} is damaged: {error}"
                      ) from error
    groups.setdefault(records_lib.condition_key(record), []).append(record)
  ordered = sorted(groups.values(), key=lambda group: (
      -group[0]["num_samples"], -len(group)))
  return ordered, len(everything) - len(records)


def _found_samplers(run):
  """The searched samplers below a folder, for the template."""
  found = []
  for folder, below, files in storage.walk(run.root):
    below[:] = sorted(set(below) - set(_NO_SAMPLERS))
    if run_dir_lib.SAMPLER not in files:
      continue
    sampler = card.read(os.path.join(folder, run_dir_lib.SAMPLER))
    found.append({
        "label": sampler.label,
        "folder": os.path.relpath(folder, run.root),
        "num_steps": sampler.coefficients.num_steps,
        "x0_bound": sampler.x0_bound,
        "denoiser": sampler.denoiser,
        "search": sampler.search,
        "objective": json.dumps(sampler.search.get("objective")),
        "config": sampler.search.get("config", {}),
        "coefficients": sampler.coefficients.to_dict(),
        "sha256": fingerprint.coefficients_sha256(sampler.coefficients),
        "figures": _figures(folder, run_dir_lib.PICTURES),
    })
  return sorted(found, key=lambda each: (each["num_steps"], each["folder"]))


def _uses(run, groups, found):
  """How to use the sampler of a run, or the best searched one of each K."""
  best = [(line["searched"]["sampler"], line["searched"]["coefficients_sha256"])
          for line in _headlines(groups) if line["searched"]]
  config = run.path(run_dir_lib.CONFIG)
  uses = []
  for each in found:
    if each["folder"] != "." and (each["label"], each["sha256"]) not in best:
      continue
    folder = os.path.normpath(run.path(each["folder"]))
    model = os.path.join(folder, run_dir_lib.EXPORT)
    others = {name: os.path.join(folder, file)
              for name, file in run_dir_lib.ALSO.items()}
    uses.append({
        "label": each["label"], "num_steps": each["num_steps"],
        "exported": storage.isdir(model), "model": repr(model),
        **{name: storage.exists(path) and repr(path)
           for name, path in others.items()},
        "guided": storage.exists(
            os.path.join(others["diffusers"], run_dir_lib.GUIDANCE)),
        "card": os.path.join(folder, run_dir_lib.SAMPLER),
        "command": shlex.join([
            "python", "-m", "ddss_tf.main", "--mode=export",
            f"--gin_file={config}", f"--run_dir={folder}"])
                   if storage.exists(config) else
                   f"ddss_tf.export({folder!r}, denoiser)",
    })
  return uses


def _title(groups, found):
  if not groups:
    return ", ".join(f"{each['label']}, K = {each['num_steps']}"
                     for each in found[:3])
  dataset = groups[0][0]["dataset"]
  if len(found) == 1 and found[0]["folder"] == ".":
    return f"{found[0]['label']}, K = {found[0]['num_steps']}, on {dataset}"
  count = sum(r["seed"] == groups[0][0]["seed"] for r in groups[0])
  return f"{count} samplers on {dataset}"


def _of_first_seed(records):
  """The records from which the best of each K is chosen.

  They all have the first record's seed, or the luckiest seed would win. The
  full chain is left out, because no other sampler has its K.
  """
  return [r for r in records if not labels.is_full_chain(r["sampler"])
          and r["seed"] == records[0]["seed"]]


def _headlines(groups):
  """For each K the best searched sampler, and the best of the others."""
  lines = []
  records = _of_first_seed(groups[0]) if groups else []
  for steps in sorted({r["num_steps"] for r in records}):
    best = {}
    for record in records:
      if record["num_steps"] == steps:
        searched = labels.group(record["sampler"]) == labels.SEARCHED
        if records_lib.rank(record) < records_lib.rank(best.get(searched, _NONE)):
          best[searched] = record
    if best:
      lines.append({"num_steps": steps, "searched": best.get(True),
                    "other": best.get(False)})
  return lines


def _table(records):
  """Comparable records, for the template."""
  best = {}
  for record in _of_first_seed(records):
    steps = record["num_steps"]
    if records_lib.rank(record) < records_lib.rank(best.get(steps, _NONE)):
      best[steps] = record
  # The best sampler of each K is shaded in its rows of all seeds.
  shaded = [(r["coefficients_sha256"], r["x0_bound"]) for r in best.values()]
  networks = records[0]["features_heldout"]
  measured = records_lib.measured_heldout(records)
  return {
      "records": records,
      "label": records_lib.fid_label(records[0]["num_samples"]),
      "names": [records_lib.row_name(r) for r in records],
      "best": [(r["coefficients_sha256"], r["x0_bound"]) in shaded
               for r in records],
      "heldout": list(records_lib.heldout_fids(records[0])),
      "fids_heldout": [records_lib.heldout_fids(r) for r in records],
      "networks_heldout": (
          networks if isinstance(networks, list) else [networks]),
      "measured": measured,
      "figures_measured": [
          [records_lib.heldout_figures(r, measure.key).get(label)
           for measure, label in measured] for r in records],
      "scored": any(map(records_lib.has_inception_score, records)),
      "clip": records[0].get("clip"),
      "timed": any(r.get("timing") for r in records),
      "devices": sorted({f"{r['timing']['device']}, batches of "
                         f"{r['timing']['batch_size']}"
                         for r in records if r.get("timing")}),
      "seeds": sorted({r["seed"] for r in records}),
      **{name: records[0][name] for name in records_lib.CONDITIONS},
  }


def _figures(folder, names):
  """The pictures that exist in a folder, as data, for the template."""
  captions = {file.name: file.caption for file in run_dir_lib.FILES
              if file.caption}
  figures = []
  for name in names:
    path = os.path.join(folder, name)
    if not storage.exists(path):
      continue
    with storage.open(path, "rb") as f:
      content = f.read()
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
      raise UserError(f"{path} is damaged: not a PNG")
    width, height = struct.unpack(">II", content[16:24])
    figures.append({
        "name": name, "width": width, "height": height,
        "caption": captions.get(
            name, "The first samples of each row, on the same noise: a column "
            "shows the same image to be."),
        "data": base64.b64encode(content).decode(),
    })
  return figures

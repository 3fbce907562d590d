"""Pictures that compare samplers: FID against K and time, rows of samples.

What is drawn comes from records of `metrics.json` and from `samples.npz`;
nothing is measured here. Every file appears whole or not at all.
"""

import collections
import functools
import itertools
import math
import os
import zipfile
import zlib

from matplotlib import lines, ticker, transforms
from matplotlib.figure import Figure
import numpy as np
from scipy import optimize

from ddss_tf import storage
from ddss_tf.reporting import grids
from ddss_tf.reporting import style as style_lib
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import labels as labels_lib
from ddss_tf.errors import UserError


def _with_fid(records):
  """The records whose FID is finite, and so can be drawn."""
  return [record for record in records if record["fid"] is not None]


def _curves(records, position, value):
  """The curve of each sampler: {name: [(x, y, lowest y, highest y)]}.

  Records of one sampler at one K have different seeds: x and y are their means.
  A solver with several strides at one K has a curve for each stride.

  Args:
    records: the records of `metrics.json`.
    position: function from a record to x.
    value: function from a record to y.
  """
  labels = {}
  for record in records:
    series = labels_lib.without_stride(record["sampler"])
    labels.setdefault((series, record["num_steps"]), set()).add(
        record["sampler"])
  ambiguous = {series for (series, _), found in labels.items()
               if len(found) > 1}
  groups = {}
  for record in records:
    name = labels_lib.without_stride(record["sampler"])
    name = record["sampler"] if name in ambiguous else name
    groups.setdefault(name, {}).setdefault(record["num_steps"], []).append(
        (position(record), value(record)))
  curves = {}
  for name, by_steps in groups.items():
    curves[name] = []
    for _, points in sorted(by_steps.items()):
      xs, ys = zip(*points)
      curves[name].append((float(np.mean(xs)), float(np.mean(ys)), min(ys),
                           max(ys)))
  return curves


def _best(curves):
  """Names of the best curve of each group of samplers.

  The best is, of those with the most K, the one with the lowest mean logarithm.
  """
  best = {}
  # A relative bound, because 0 has no logarithm and FIDs have a unit, that of
  # squared features.
  least = 1e-12 * max(y for points in curves.values() for _, y, *_ in points)
  for name, points in curves.items():
    if labels_lib.is_full_chain(name):
      continue  # It is a reference for all others.
    rank = (-len(points), float(np.mean(
        [math.log(max(y, least) or 1.0) for _, y, *_ in points])))
    best.setdefault(labels_lib.group(name), []).append((rank, name))
  return {min(found)[1] for found in best.values()}


def _number(value, _=None):
  return f"{value:g}"


def _log_axis(axis, values):
  """Makes a logarithmic axis with plain numbers, around positive values."""
  values = [value for value in values if value > 0] or [1.0]
  low, high = min(values) / 1.15, max(values) * 1.15
  axis.axes.set(**{f"{axis.axis_name}scale": "log",
                   f"{axis.axis_name}lim": (low, high)})
  # Few decades: 1, 2, 5; many: powers of ten only.
  subs = (1, 2, 5) if high / low < 2000 else (1,)
  if high / low < 4:
    subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
  axis.set_major_locator(ticker.LogLocator(subs=subs))
  axis.set_major_formatter(_number)
  axis.set_minor_formatter(ticker.NullFormatter())


def _spread(wanted: np.ndarray, gap: float) -> np.ndarray:
  """The heights in [0, 1] nearest to the wanted ones that are `gap` apart.

  Their order stays. Once the i-th height is lowered by i gaps, the problem is
  an isotonic regression, and the bounds are a clip of its solution.
  """
  order = np.argsort(wanted, kind="stable")
  offsets = gap * np.arange(len(wanted))
  levels = optimize.isotonic_regression(wanted[order] - offsets).x
  placed = np.empty(len(wanted))
  placed[order] = np.clip(levels, 0.0, max(0.0, 1.0 - offsets[-1])) + offsets
  return placed


def _draw_curves(axis, curves):
  """Draws curves with their names at the right, the best of a group strong.

  The limits of y must be set before, and the axis must not move afterwards.
  """
  best = _best(curves)
  low, high = np.log(axis.get_ylim())
  inches = axis.get_position().height * axis.figure.get_figheight()
  ends = [points[-1][1] for points in curves.values()]
  wanted = (np.log(np.maximum(ends, np.exp(low))) - low) / (high - low)
  heights = _spread(wanted, 0.155 / inches)
  column = transforms.offset_copy(
      axis.transAxes, axis.figure, x=16, units="points")
  for (name, points), height in zip(curves.items(), heights):
    strong = name in best
    colour, marker = style_lib.GROUPS[labels_lib.group(name)]
    xs, ys, lows, highs = zip(*points)
    style = dict(color=colour, zorder=3 if strong else 2,
                 alpha=1 if strong else style_lib.PALE)
    if labels_lib.is_full_chain(name) and len(points) > 1:
      marker, style = "", dict(color=style_lib.TEXT, linestyle="--", zorder=1)
    axis.plot(xs, ys, marker=marker, linewidth=2.2 if strong else 1.2,
              markersize=6 if strong else 4.5, gid=name, **style)
    if lows != highs or lows != ys:
      axis.fill_between(xs, lows, highs, color=colour, linewidth=0,
                        alpha=0.25 if strong else 0.1)
      axis.vlines(xs, lows, highs, linewidth=1, **style)
    axis.annotate(
        f"{name}  {records_lib.text(ys[-1])}", (xs[-1], max(ys[-1], np.exp(low))),
        xytext=(1, height),
        textcoords=column, va="center", fontsize=8, zorder=4,
        color=colour if strong else style_lib.TEXT,
        fontweight="bold" if strong else "normal", annotation_clip=False,
        # Dotted, which no line of data is.
        arrowprops=dict(arrowstyle="-", color=colour, shrinkA=1, shrinkB=4,
                        relpos=(0, 0.5), linewidth=0.7, linestyle=":",
                        alpha=0.7), **style_lib.PLAIN)


def _curves_figure(curves):
  """A figure, and its axis with room for all names at the right.

  The axis is placed by hand, because Matplotlib's constrained layout cuts the
  longest name off.
  """
  height = max(4.4, 0.165 * len(curves) + 1.1)
  left, width = 0.76, 6.0
  size = (left + width + max(2.75, 0.8 + grids.text_room(curves)), height)
  figure = Figure(size)
  axis = figure.add_axes((left / size[0], 0.55 / height, width / size[0],
                          (height - 1.15) / height))
  axis.grid(alpha=0.25, which="major")
  axis.spines[["top", "right"]].set_visible(False)
  return figure, axis


def _explain(axis, curves, records, loc="left"):
  """Adds a title with the records' conditions, and a legend of the colours."""
  first = records[0]
  axis.set_title(
      f"{first['dataset']}, {first['num_samples']} samples against "
      f"{first['num_real']} real images, features {first['features']['name']}",
      fontsize=9, loc=loc, pad=20, **style_lib.PLAIN)
  groups = {labels_lib.group(name) for name in curves}
  handles = [lines.Line2D([], [], color=colour, marker=marker, label=group)
             for group, (colour, marker) in style_lib.GROUPS.items() if group in groups]
  handles.append(lines.Line2D([], [], linestyle="none",
                              label="strong: best of its group over all K"))
  axis.legend(handles=handles, loc=f"lower {loc}", ncols=len(handles),
              bbox_to_anchor=(0 if loc == "left" else 1, 1), fontsize=8,
              frameon=False, borderaxespad=0, handletextpad=0.4,
              columnspacing=1.2)


def fid_by_steps_png(path: str, records: list[dict]) -> None:
  """Draws FID against K on a log axis, a line for each sampler.

  The best of each group of samplers is strong, the others are pale. Records of
  one sampler at one K with several seeds become a band around their mean. The
  full chain, if there is one, is a dashed line. If all have the same K, a line
  would be a point: then each sampler has a row, the best on top. The row has
  the held-out FID as an open marker, and those of further held-out networks, up
  to five in all, as half open ones.

  Args:
    path: the path of the PNG.
    records: comparable records of `metrics.json`: of the same data, networks
      and number of samples. Those without an FID are left out; at least one
      must have an FID.
  """
  records = _with_fid(records)
  label = records_lib.fid_label(records[0]["num_samples"])
  steps = sorted({record["num_steps"] for record in records
                  if not labels_lib.is_full_chain(record["sampler"])})
  if len(steps) < 2:
    figure = _ranking(records, label)
  else:
    curves = _curves(records, lambda r: r["num_steps"], lambda r: r["fid"])
    for name in filter(labels_lib.is_full_chain, curves):
      ((_, *y),) = curves[name]  # It has no K: a line across all.
      curves[name] = [(steps[0], *y), (steps[-1], *y)]
    figure, axis = _curves_figure(curves)
    _log_axis(axis.xaxis, steps)
    axis.xaxis.set_major_locator(ticker.FixedLocator(steps))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    _log_axis(axis.yaxis, [record["fid"] for record in records])
    axis.set(xlabel="K (network calls an image)",
             ylabel=f"{label} (log, lower is better)")
    _explain(axis, curves, records)
    _draw_curves(axis, curves)
  style_lib.save_figure(figure, path)


def _few_steps(records):
  """The K of all records. Only the full chain may have a larger one."""
  return min(record["num_steps"] for record in records)


def _ranking(records, label):
  """Draws a row for each sampler of one K, sorted by FID; gives the figure."""
  curves = _curves(records, lambda r: r["num_steps"], lambda r: r["fid"])
  fids = [records_lib.heldout_fids(record) for record in records]
  heldout = {}  # By network, as many as there are markers for.
  for network in list(dict.fromkeys(itertools.chain(*fids)))[:len(style_lib.OPEN)]:
    heldout[network] = _curves(
        [{**record, "fid": own[network]} for record, own in zip(records, fids)
         if own.get(network) is not None],
        lambda r: r["num_steps"], lambda r: r["fid"])
  best = _best(curves)
  names = sorted(curves, key=lambda name: curves[name][0][1])
  below = 0.6 if len(heldout) < 2 else 0.8  # Another line explains them.
  height = 0.24 * len(names) + 0.7 + below
  left, width = max(2.55, grids.text_room(names)), 5.1
  size = (left + width + 0.85, height)
  figure = Figure(size)
  axis = figure.add_axes((left / size[0], below / height, width / size[0],
                          (height - 0.6 - below) / height))
  _log_axis(axis.xaxis, [
      y for found in (curves, *heldout.values())
      for points in found.values() for y in points[0][1:]])
  for row, name in enumerate(names):
    colour, marker = style_lib.GROUPS[labels_lib.group(name)]
    strong = name in best
    style = dict(color=colour, alpha=1 if strong else style_lib.PALE)
    _, y, low, high = curves[name][0]
    axis.hlines(row, low, high, linewidth=3, **style)
    axis.plot([y], [row], marker, markersize=7, gid=name, **style)
    for (network, others), fill in zip(heldout.items(), style_lib.OPEN.values()):
      if name in others:
        _, y_heldout, low, high = others[name][0]
        axis.hlines(row, low, high, linewidth=1, **style)
        axis.plot([y_heldout], [row], marker, markersize=6,
                  gid=f"{name} {network}", **fill, **style)
    axis.annotate(records_lib.text(y), (1, row), xytext=(6, 0),
                  xycoords=axis.get_yaxis_transform(),
                  textcoords="offset points", va="center",
                  fontsize=9, color=colour if strong else style_lib.TEXT,
                  fontweight="bold" if strong else "normal")
  axis.set_yticks(range(len(names)), names, fontsize=9, **style_lib.PLAIN)
  for tick, name in zip(axis.get_yticklabels(), names):
    if name in best:
      tick.set(color=style_lib.GROUPS[labels_lib.group(name)][0], fontweight="bold")
  axis.set_ylim(len(names) - 0.5, -0.5)
  axis.grid(alpha=0.25)
  axis.spines[["top", "right", "left"]].set_visible(False)
  axis.tick_params(axis="y", length=0)
  open_too = "; open: held-out features" if heldout else ""
  if len(heldout) > 1:
    open_too = "\n" + "; ".join(
        f"{word}: {network}" for word, network in zip(style_lib.OPEN, heldout))
  axis.set_xlabel(f"{label} at K = {_few_steps(records)} (log, lower is "
                  f"better){open_too}", **style_lib.PLAIN)
  _explain(axis, curves, records, "right")
  return figure


def quality_by_time_png(path: str, records: list[dict]) -> None:
  """Draws FID against the seconds an image takes, both on log axes.

  Times on different devices or with different batch sizes do not compare. Only
  the device and batch size of most records are drawn, and the axis says how
  many records are left out.

  Args:
    path: the path of the PNG.
    records: as for `fid_by_steps_png`, each with a `timing`.
  """
  records = _with_fid(records)
  timed = collections.defaultdict(list)
  for record in records:
    timing = record["timing"]
    timed[timing["device"], timing["batch_size"]].append(record)
  (device, batch_size), drawn = max(
      timed.items(), key=lambda item: len(item[1]))
  curves = _curves(drawn, lambda r: r["timing"]["seconds_per_image"],
                   lambda r: r["fid"])
  figure, axis = _curves_figure(curves)
  _log_axis(axis.xaxis, [x for points in curves.values() for x, *_ in points])
  _log_axis(axis.yaxis, [record["fid"] for record in drawn])
  left_out = len(records) - len(drawn)
  axis.set_ylabel(f"{records_lib.fid_label(drawn[0]['num_samples'])} "
                  "(log, lower is better)")
  axis.set_xlabel(
      f"seconds an image on {device}, batches of {batch_size} (log)"
      + (f"; left out: {left_out} timed otherwise" if left_out else ""),
      **style_lib.PLAIN)
  _explain(axis, curves, drawn)
  _draw_curves(axis, curves)
  style_lib.save_figure(figure, path)


def draw(folder: str, records: list[dict],
         shown: list[str] | None = None) -> list[str]:
  """Draws a comparison from what it left, without any measurement.

  It draws FID against K, FID against time, for each K a picture of the first
  samples of all rows, and if there are several K one of the best row of each
  group at every K, beside DDPM at many steps and real images. A row without an
  FID is left out of the first two, one without a time out of the second, one
  without samples out of the others.

  Args:
    folder: the folder of the comparison, with its `samples.npz` if there is
      one.
    records: comparable records of its `metrics.json`.
    shown: names of the rows whose samples are drawn, as in the table, with or
      without the stride; None: all.

  Returns:
    Names of the files.

  Raises:
    UserError: `samples.npz` is damaged, or there is no row of a name in
      `shown`.
  """
  if shown is not None and not isinstance(shown, (list, tuple)):
    raise UserError(f"shown must be a list. Received: {shown!r}")
  for name in shown or []:
    if not any(_is_named(record, name) for record in records):
      raise UserError("shown must be rows of the comparison, among them "
                      f"{records[0]['sampler']!r}. Received: {name!r}")
  path = functools.partial(os.path.join, folder)
  names = []
  ranked = [record for record in records if record["fid"] is not None]
  if ranked:
    fid_by_steps_png(path(run_dir_lib.FID_BY_STEPS), records)
    names.append(run_dir_lib.FID_BY_STEPS)
  timed = [record for record in ranked if record.get("timing")]
  if timed:
    quality_by_time_png(path(run_dir_lib.QUALITY_BY_TIME), timed)
    names.append(run_dir_lib.QUALITY_BY_TIME)
  images = read_samples(path(run_dir_lib.SAMPLES_NPZ))
  label = records_lib.fid_label(records[0]["num_samples"])
  for steps in sorted({record["num_steps"] for record in records}):
    rows = [(record["sampler"], f"{label} {records_lib.text(record['fid'])}",
             images[records_lib.sample_key(record)]) for record in records
            if record["num_steps"] == steps and records_lib.sample_key(record) in images
            and (shown is None
                 or any(_is_named(record, name) for name in shown))]
    if rows:
      names.append(f"samples_k{steps}.png")
      grids.sample_rows_png(path(names[-1]), f"K = {steps}", rows)
  rows = _over_steps(records, images, shown)
  if rows:
    names.append(run_dir_lib.SAMPLES_OVER_K)
    grids.sample_rows_png(path(names[-1]), "the same noise at every K", rows)
  return names


def _over_steps(records, images, shown):
  """Rows of samples over K; none if there is but one K or no samples.

  At every K these are the best row of each group, or all in `shown`. DDPM at
  many steps and real images end them.
  """
  drawn = [record for record in records
           if records_lib.sample_key(record) in images]
  few = [record for record in drawn
         if not labels_lib.is_full_chain(record["sampler"])]
  if len({record["num_steps"] for record in few}) < 2:
    return []
  best = {}
  for record in sorted(few, key=records_lib.rank):
    group = labels_lib.group(record["sampler"])
    if shown is not None:
      group = next((name for name in shown if _is_named(record, name)), None)
    if group is not None:
      best.setdefault((record["num_steps"], group), record)
  chosen = [best[key] for key in sorted(best)] + [
      record for record in drawn
      if labels_lib.is_full_chain(record["sampler"])]
  rows = [(record["sampler"], f"K = {record['num_steps']}, "
           f"{records_lib.fid_label(record['num_samples'])} "
           f"{records_lib.text(record['fid'])}",
           images[records_lib.sample_key(record)]) for record in chosen]
  if labels_lib.REAL_IMAGES in images:
    rows.append((labels_lib.REAL_IMAGES, "", images[labels_lib.REAL_IMAGES]))
  return rows


def _is_named(record, name):
  """Whether this is the name of a row, in full or without its stride."""
  label = record["sampler"]
  return name in (label, labels_lib.without_stride(label))


def read_samples(path) -> dict[str, np.ndarray]:
  """Reads images, uint8 [N, H, W, C], by `sample_key`; {} without a file."""
  if not storage.exists(path):
    return {}
  try:
    with storage.load_arrays(path) as arrays:
      return dict(arrays)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile,
          zlib.error) as error:
    raise UserError(f"{path} is damaged: {error}. Delete it to sample anew"
                    ) from error

"""Pictures: grids of samples, inside a sampler, and samplers compared.

Nothing is computed here but positions: what is drawn comes in as records of
`metrics.json`, as `Coefficients`, or as images. Every file appears whole or not
at all.
"""

import collections
import itertools
import math

from matplotlib import font_manager
from matplotlib import lines
from matplotlib import textpath
from matplotlib import ticker
from matplotlib import transforms
from matplotlib.figure import Figure
import numpy as np
from scipy import optimize

from ddss_tf import storage
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.runs import records as records_lib
from ddss_tf.samplers import labels as labels_lib
from ddss_tf.samplers.coefficients import Coefficients
from ddss_tf.schedules import NoiseSchedule

_DPI = 120
# Of Okabe and Ito's set, which colour-blind people can tell apart. Groups also
# differ in their markers, so that they survive a black-and-white print.
_BLUE, _ORANGE, _VERMILION, _GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
_GROUPS = {
    labels_lib.SEARCHED: (_VERMILION, "o"),
    labels_lib.TRAINING_FREE: (_BLUE, "s"),
    labels_lib.BASELINES: (_GREEN, "^"),
}
# Markers of held-out networks, by what to call them.
_OPEN = {"open": {"mfc": "none"}, **{
    f"{name} half": {"fillstyle": style, "markerfacecoloralt": "none"}
    for name, style in (("left", "left"), ("right", "right"),
                        ("upper", "top"), ("lower", "bottom"))}}
_PALE = 0.35
_TEXT = "#444444"
# Names come from files, where a dollar is a dollar.
_PLAIN = {"parse_math": False}
_GAP = 2  # Pixels between images.
_LIGHT = 235  # Their shade.
_MOST_PANELS = 16  # Channels of an image that are drawn.
_MOST_COLUMNS = 11  # Of a path, before it goes on below.


def _pixels(images: np.ndarray) -> np.ndarray:
  """Images as they are drawn: grey or RGB.

  Others than those of one channel or of three have no colours that are known:
  their channels stand side by side, each in grey; of many the first few.

  Args:
    images: float [N, H, W, C] in [-1, 1] or uint8.

  Returns:
    uint8 [N, H, W, 1 or 3], or [N, H, panels (W + 1) - 1, 1].
  """
  if images.dtype != np.uint8:
    images = dataset_lib.to_uint8(images)
  if images.shape[-1] in (1, 3):
    return images
  count, height, width, _ = images.shape
  panels = _panels(images)
  drawn = np.full((count, height, panels, width + 1), _LIGHT, np.uint8)
  drawn[..., :width] = np.moveaxis(images[..., :panels], -1, 2)
  return drawn.reshape(count, height, -1, 1)[:, :, :-1]


def _panels(images) -> int:
  """How many pictures stand side by side for one of the images."""
  channels = images.shape[-1]
  return 1 if channels in (1, 3) else min(channels, _MOST_PANELS)


def image_grid(images: np.ndarray, columns: int, gap: int = _GAP
               ) -> np.ndarray:
  """Tiles images, with a light gap.

  Args:
    images: float [N, H, W, C] in [-1, 1] or uint8. Of other C than 1 or 3 the
      channels stand side by side, in grey: W is then C (W + 1) - 1.
    columns: images in a row.
    gap: pixels between them.

  Returns:
    uint8 [rows (H + gap) - gap, columns (W + gap) - gap, 1 or 3].
  """
  images = _pixels(images)
  count, height, width, channels = images.shape
  rows = -(-count // columns)
  grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap,
                  channels), _LIGHT, np.uint8)
  for i, image in enumerate(images):
    y, x = i // columns * (height + gap), i % columns * (width + gap)
    grid[y:y + height, x:x + width] = image
  return grid


def _save(figure: Figure, path: str) -> None:
  with storage.replacing(path) as temporary:
    figure.savefig(temporary, dpi=_DPI, format="png", facecolor="white")


def _show(axis, images, columns, blank=0):
  """Shows images as a grid, the last few blank, and nothing around it."""
  height, width = images.shape[1:3]
  grid = image_grid(images, columns)
  if blank:
    grid[-height - _GAP:, -blank * (width + _GAP):] = 255
  # Small images show their pixels; large ones are shrunk without moire.
  axis.imshow(grid[..., 0] if grid.shape[-1] == 1 else grid,
              cmap="gray", vmin=0, vmax=255, interpolation=(
                  "nearest" if height <= 64 else "auto"))
  axis.spines[:].set_visible(False)
  axis.set(xticks=[], yticks=[])
  axis.tick_params(length=0)


def _middles(size, count):
  """Pixels in the middle of images of a grid, along one side."""
  return (size + _GAP) * np.arange(count) + (size - 1) / 2


def samples_png(path: str, titled: list[tuple[str, np.ndarray]],
                columns: int = 8) -> None:
  """Draws samples of several samplers side by side.

  Args:
    path: of the PNG.
    titled: (title, images float [N, H, W, C] in [-1, 1]) of each sampler, on
      the same noise, so that the same place shows the same digit to be.
    columns: images in a row of each grid; fewer if each is several panels.
  """
  columns = max(1, round(columns / _panels(titled[0][1]) ** 0.5))
  titled = [(title, _pixels(images)) for title, images in titled]
  rows = -(-max(len(images) for _, images in titled) // columns)
  height, width = titled[0][1].shape[1:3]
  inches = 3.3 * rows * height / (columns * width)  # Of a grid.
  figure = Figure((3.4 * len(titled), inches + 0.6))
  figure.subplots_adjust(0.02, 0.05 / (inches + 0.6), 0.98,
                         1 - 0.5 / (inches + 0.6), wspace=0.06)
  axes = figure.subplots(1, len(titled), squeeze=False)
  for axis, (title, images) in zip(axes[0], titled):
    _show(axis, images, columns)
    axis.set_title(title, fontsize=11, **_PLAIN)
  _save(figure, path)


def _room(texts):
  """Inches for the longest of texts of size 9, which may be bold.

  Figures are not cut to what is in them, so that all of a kind have one scale.
  """
  font = font_manager.FontProperties(size=9, weight="bold")
  return 0.3 + max(textpath.text_to_path.get_text_width_height_descent(
      text, font, ismath=False)[0] for text in texts) / 72


def sample_rows_png(path: str, title: str,
                    titled: list[tuple[str, str, np.ndarray]]) -> None:
  """Draws a row of samples of each of many samplers, one below the other.

  Args:
    path: of the PNG.
    title: of all.
    titled: (name, note, images float [N, H, W, C] in [-1, 1]) of each sampler,
      on the same noise, so that a column shows the same image to be.
  """
  images = _pixels(np.concatenate([images for *_, images in titled]))
  columns, (height, width) = len(titled[0][-1]), images.shape[1:3]
  inches = 0.42  # Of an image's height.
  wide = columns * inches * width / height
  left, right = (_room(texts) for texts in list(zip(*titled))[:2])
  size = (wide + left + right, len(titled) * inches + 0.6)
  figure = Figure(size)
  axis = figure.add_axes((
      left / size[0], 0.1 / size[1], wide / size[0],
      len(titled) * inches / size[1]))
  _show(axis, images, columns)
  axis.set_title(title, fontsize=11, **_PLAIN)
  middles = _middles(height, len(titled))
  axis.set_yticks(middles, [name for name, *_ in titled], fontsize=9, **_PLAIN)
  for tick, (name, *_) in zip(axis.get_yticklabels(), titled):
    tick.set_color(_GROUPS[labels_lib.group(name)][0])
  for y, (_, note, _) in zip(middles, titled):
    axis.annotate(
        note, (1, y), xycoords=axis.get_yaxis_transform(), xytext=(8, 0),
        textcoords="offset points", va="center", fontsize=9, color=_TEXT,
        **_PLAIN)
  _save(figure, path)


# Inside a sampler.


def coefficients_png(path: str, coefficients: Coefficients, label: str,
                     start: Coefficients | None = None,
                     schedule: NoiseSchedule | None = None) -> None:
  """Draws all coefficients of a sampler.

  Args:
    path: of the PNG.
    coefficients: of the sampler.
    label: its name.
    start: where its search started, which is drawn beside it.
    schedule: the forward process; with it, times are drawn by their
      log-SNR (`NoiseSchedule.log_snr`).
  """
  c = coefficients.numpy()
  s = None if start is None else start.numpy()
  # Placed by hand: a layout engine takes longer than the drawing.
  below = ["times", "x0", "noise"]
  if s is None:
    figure = Figure((15, 3.8))
    figure.subplots_adjust(0.04, 0.14, 0.99, 0.82, wspace=0.3)
    axes = figure.subplot_mosaic([["weights", *below]],
                                 width_ratios=[1.6, 1, 1, 1])
  else:
    figure = Figure((11, 7.4))
    figure.subplots_adjust(0.07, 0.07, 0.985, 0.89, wspace=1.5, hspace=0.4)
    axes = figure.subplot_mosaic(
        [["weights"] * 3 + ["change"] * 3,
         [name for name in below for _ in range(2)]])
    _heat_map(figure, axes["change"], _weights(c) - _weights(s))
    axes["change"].set(title="change of these weights by the search")
  figure.suptitle(f"{label}, K = {c.num_steps}", fontsize=12, **_PLAIN)
  _heat_map(figure, axes["weights"], _weights(c))
  axes["weights"].set(title="weights that make the next state")
  _draw_times(axes["times"], c, s, schedule)
  names = ["found", "start"]
  for name, found, before, colour, marker in (
      ("of the state", c.x0_from_state, s and s.x0_from_state, _BLUE, "o"),
      ("of the predicted noise", c.x0_from_eps, s and s.x0_from_eps, _ORANGE,
       "s")):
    _draw_steps(axes["x0"], found, before, colour, marker, [name])
  axes["x0"].set_yscale("symlog", linthresh=1)
  axes["x0"].set(ylabel="coefficient (log beyond 1)",
                 title=r"what makes $\hat x_0$")
  _draw_steps(axes["noise"], c.noise_scales, s and s.noise_scales, _VERMILION,
              "s", names)
  most = max(np.max(each.noise_scales) for each in (c, s) if each is not None)
  axes["noise"].set(ylabel="standard deviation", ylim=(0, 1.08 * most or 1.0),
                    title="fresh noise after the step"
                    + ("" if most else ": none"))
  for name in below:
    axes[name].set(xlabel="step", xlim=(0.5, c.num_steps + 0.5))
    axes[name].grid(alpha=0.3)
    axes[name].xaxis.set_major_locator(ticker.MaxNLocator(
        min(c.num_steps, 12), integer=True))
    if s is not None or name == "x0":
      axes[name].legend(fontsize=8)
  _save(figure, path)


def _weights(c):
  """[K, K + 1]: of the states, and of x0_hat; what no step can use, masked."""
  table = np.concatenate([c.state_weights, c.x0_weights[:, None]], axis=1)
  steps = c.num_steps
  unused = np.triu(np.ones((steps, steps), bool), 1)
  return np.ma.array(table, mask=np.concatenate(
      [unused, np.zeros((steps, 1), bool)], axis=1))


def _heat_map(figure, axis, table):
  """Draws a table of `_weights`, white at 0, with its values if they fit."""
  steps = len(table)
  few = steps <= 12
  limit = max(0.01, np.abs(table).max())  # Below it all is 0.00.
  heat = axis.imshow(table, cmap="PuOr", vmin=-limit, vmax=limit,
                     aspect="auto")
  axis.axvline(steps - 0.5, color="white", linewidth=4)
  if few:
    for k, u in zip(*np.nonzero(~table.mask)):
      dark = abs(table[k, u]) > 0.6 * limit
      # No "-0.00".
      axis.text(u, k, f"{round(table[k, u], 2) + 0.0:.2f}", ha="center",
                va="center", fontsize=8 if steps <= 6 else 6,
                color="white" if dark else "black")
  # As the paper counts: x_K is the noisiest state.
  names = [f"$x_{{{steps - u}}}$" if few else str(steps - u)
           for u in range(steps)]
  axis.set_xticks(range(steps + 1), names + [r"$\hat x_0$"],
                  fontsize=9 if few else 6)
  axis.get_xticklabels()[-1].set_fontsize(9)
  axis.set_yticks(range(steps), [str(k + 1) for k in range(steps)],
                  fontsize=9 if few else 6)
  axis.set(xlabel="weight of" if few else "weight of the state", ylabel="step")
  figure.colorbar(heat, ax=axis, shrink=0.9, pad=0.03)


def _draw_steps(axis, found, before, colour, marker, names):
  """Draws one value a step, that of the start pale."""
  position = np.arange(1, len(found) + 1)
  if before is not None:
    axis.plot(position, before, marker + ":", color=colour, alpha=0.5,
              mfc="none", label=names[1] if len(names) > 1 else None)
  axis.plot(position, found, marker + "-", color=colour, markersize=5,
            label=names[0])


def _draw_times(axis, c, s, schedule):
  """Draws when the network is called, by log-SNR if the schedule is known."""
  place = np.asarray if schedule is None else schedule.log_snr
  _draw_steps(axis, place(c.times), s and place(s.times), _BLUE, "o",
              ["found", "start"])
  axis.set(title="times fed to the network", ymargin=0.12)
  if schedule is None:
    axis.set_ylabel("t (training steps)")
    axis.set_ylim(bottom=0)
    return
  axis.set_ylabel(r"$\log(\alpha_t / \sigma_t)$, half the log-SNR; clean is up")
  for k, t in enumerate(c.times):
    if c.num_steps <= 6:
      # Above the last, which would leave the axis.
      last = k == c.num_steps - 1
      axis.annotate(f"t = {t:.0f}", (k + 1, place(t)),
                    xytext=(0, 6) if last else (5, -9), fontsize=7,
                    ha="center" if last else "left", color=_TEXT,
                    textcoords="offset points")


def path_png(path: str, states: np.ndarray, x0_hats: np.ndarray,
             image: np.ndarray, times: np.ndarray, label: str) -> None:
  """Draws the way of one image through the steps.

  Args:
    path: of the PNG.
    states: float [K, H, W, C], x_k as the network sees it, noisiest first;
      shown clipped to [-1, 1].
    x0_hats: float [K, H, W, C], what it predicts from each.
    image: float [H, W, C], where it ends.
    times: [K], fed to the network.
    label: of the sampler.
  """
  steps = len(states)
  panels = _panels(image)
  # Of the image nothing is predicted.
  above, below = (_pixels(np.concatenate([images, image[None]]))
                  for images in (states, x0_hats))
  names = [f"$x_{{{steps - k}}}$\nt = {t:.0f}" for k, t in enumerate(times)]
  names.append("$x_0$\nimage")
  columns = min(steps + 1, max(1, _MOST_COLUMNS // panels))
  bands = -(-(steps + 1) // columns)
  size = (0.8 * panels * columns + 1, 2.3 * bands + 0.4)
  figure = Figure(size)
  figure.subplots_adjust(0.75 / size[0], 0.1 / size[1], 1 - 0.15 / size[0],
                         1 - 0.7 / size[1], hspace=0.4)
  figure.suptitle(f"{label}: one image through its {steps} steps, clipped to "
                  "[-1, 1]", fontsize=11, **_PLAIN)
  height, width = above.shape[1:3]
  for i, axis in enumerate(np.ravel(figure.subplots(bands, 1, squeeze=False))):
    part = slice(i * columns, (i + 1) * columns)
    count = len(above[part])
    _show(axis, np.concatenate([above[part], below[part]]), count,
          blank=int(i == bands - 1))
    axis.set_xlim(-0.5, columns * (width + _GAP) - _GAP - 0.5)
    axis.xaxis.tick_top()
    axis.set_xticks(_middles(width, count), names[part], fontsize=8)
    axis.set_yticks(_middles(height, 2), ["state", r"$\hat x_0$"], fontsize=9)
  _save(figure, path)


# Samplers compared.


def _with_fid(records):
  """Records without those whose FID was not finite, which has no place."""
  return [record for record in records if record["fid"] is not None]


def _curves(records, position, value):
  """What is drawn of each sampler: {name: [(x, y, lowest y, highest y)]}.

  Records of one sampler at one K are of several seeds: their mean, and how far
  they spread. Where the strides of one solver stand side by side they are
  samplers of their own.

  Args:
    records: of `metrics.json`.
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
  """Names of the best of each group: lowest mean log value, of as many K."""
  best = {}
  # A logarithm of 0 is none; FIDs have the unit of squared features.
  least = 1e-12 * max(y for points in curves.values() for _, y, *_ in points)
  for name, points in curves.items():
    if name == labels_lib.FULL_CHAIN:
      continue  # What all are measured against.
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
  """The nearest heights in [0, 1] to those wanted that are `gap` apart.

  Their order stays. Without the gaps that belong to the order, it is an
  isotonic regression, of which bounds are a clip.
  """
  order = np.argsort(wanted, kind="stable")
  offsets = gap * np.arange(len(wanted))
  levels = optimize.isotonic_regression(wanted[order] - offsets).x
  placed = np.empty(len(wanted))
  placed[order] = np.clip(levels, 0.0, max(0.0, 1.0 - offsets[-1])) + offsets
  return placed


def _draw_curves(axis, curves):
  """Draws curves, the best of each group strong, each with its name beside.

  The limits of y must be set, and the axis must not move afterwards.
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
    colour, marker = _GROUPS[labels_lib.group(name)]
    xs, ys, lows, highs = zip(*points)
    style = dict(color=colour, zorder=3 if strong else 2,
                 alpha=1 if strong else _PALE)
    if name == labels_lib.FULL_CHAIN and len(points) > 1:
      marker, style = "", dict(color=_TEXT, linestyle="--", zorder=1)
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
        color=colour if strong else _TEXT,
        fontweight="bold" if strong else "normal", annotation_clip=False,
        # Dotted, as no line of data is.
        arrowprops=dict(arrowstyle="-", color=colour, shrinkA=1, shrinkB=4,
                        relpos=(0, 0.5), linewidth=0.7, linestyle=":",
                        alpha=0.7), **_PLAIN)


def _curves_figure(curves):
  """A figure with an axis beside which all names have room."""
  height = max(4.4, 0.165 * len(curves) + 1.1)
  left, width = 0.76, 6.0
  size = (left + width + max(2.75, 0.8 + _room(curves)), height)
  figure = Figure(size)
  axis = figure.add_axes((left / size[0], 0.55 / height, width / size[0],
                          (height - 1.15) / height))
  axis.grid(alpha=0.25, which="major")
  axis.spines[["top", "right"]].set_visible(False)
  return figure, axis


def _explain(axis, curves, records, loc="left"):
  """A title with the records' conditions, and what colours stand for."""
  first = records[0]
  axis.set_title(
      f"{first['dataset']}, {first['num_samples']} samples against "
      f"{first['num_real']} real images, features {first['features']['name']}",
      fontsize=9, loc=loc, pad=20, **_PLAIN)
  groups = {labels_lib.group(name) for name in curves}
  handles = [lines.Line2D([], [], color=colour, marker=marker, label=group)
             for group, (colour, marker) in _GROUPS.items() if group in groups]
  handles.append(lines.Line2D([], [], linestyle="none",
                              label="strong: best of its group over all K"))
  axis.legend(handles=handles, loc=f"lower {loc}", ncols=len(handles),
              bbox_to_anchor=(0 if loc == "left" else 1, 1), fontsize=8,
              frameon=False, borderaxespad=0, handletextpad=0.4,
              columnspacing=1.2)


def fid_by_steps_png(path: str, records: list[dict]) -> None:
  """Draws FID against K on a log axis, a line for each sampler.

  The best of each group of samplers is strong, the others are pale; several
  records of one sampler at one K (several seeds) become a band around their
  mean; the full chain, if there is one, is a dashed line. Where all have the
  same K a line would be a point: then each sampler has a row, the best on top,
  with its held-out FID as an open marker, and those of more held-out networks,
  up to five, as half open ones.

  Args:
    path: of the PNG.
    records: of `metrics.json`, comparable ones: of the same data, networks and
      number of samples. Those without an FID are left out; one must have one.
  """
  records = _with_fid(records)
  label = records_lib.fid_label(records[0]["num_samples"])
  steps = sorted({record["num_steps"] for record in records
                  if record["sampler"] != labels_lib.FULL_CHAIN})
  if len(steps) < 2:
    figure = _ranking(records, label)
  else:
    curves = _curves(records, lambda r: r["num_steps"], lambda r: r["fid"])
    if labels_lib.FULL_CHAIN in curves:  # Of no K: a line across all of them.
      ((_, *y),) = curves[labels_lib.FULL_CHAIN]
      curves[labels_lib.FULL_CHAIN] = [(steps[0], *y), (steps[-1], *y)]
    figure, axis = _curves_figure(curves)
    _log_axis(axis.xaxis, steps)
    axis.xaxis.set_major_locator(ticker.FixedLocator(steps))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    _log_axis(axis.yaxis, [record["fid"] for record in records])
    axis.set(xlabel="K (network calls an image)",
             ylabel=f"{label} (log, lower is better)")
    _explain(axis, curves, records)
    _draw_curves(axis, curves)
  _save(figure, path)


def _few_steps(records):
  """The K of records of one K, the full chain aside unless it is alone."""
  return min(record["num_steps"] for record in records)


def _ranking(records, label):
  """A row for each sampler of one K, sorted by FID."""
  curves = _curves(records, lambda r: r["num_steps"], lambda r: r["fid"])
  fids = [records_lib.heldout_fids(record) for record in records]
  heldout = {}  # Of each held-out network, as many as can be told apart.
  for network in list(dict.fromkeys(itertools.chain(*fids)))[:len(_OPEN)]:
    heldout[network] = _curves(
        [{**record, "fid": own[network]} for record, own in zip(records, fids)
         if own.get(network) is not None],
        lambda r: r["num_steps"], lambda r: r["fid"])
  best = _best(curves)
  names = sorted(curves, key=lambda name: curves[name][0][1])
  below = 0.6 if len(heldout) < 2 else 0.8  # Another line explains them.
  height = 0.24 * len(names) + 0.7 + below
  left, width = max(2.55, _room(names)), 5.1
  size = (left + width + 0.85, height)
  figure = Figure(size)
  axis = figure.add_axes((left / size[0], below / height, width / size[0],
                          (height - 0.6 - below) / height))
  _log_axis(axis.xaxis, [
      y for found in (curves, *heldout.values())
      for points in found.values() for y in points[0][1:]])
  for row, name in enumerate(names):
    colour, marker = _GROUPS[labels_lib.group(name)]
    strong = name in best
    style = dict(color=colour, alpha=1 if strong else _PALE)
    _, y, low, high = curves[name][0]
    axis.hlines(row, low, high, linewidth=3, **style)
    axis.plot([y], [row], marker, markersize=7, gid=name, **style)
    for (network, others), fill in zip(heldout.items(), _OPEN.values()):
      if name in others:
        _, y_heldout, low, high = others[name][0]
        axis.hlines(row, low, high, linewidth=1, **style)
        axis.plot([y_heldout], [row], marker, markersize=6,
                  gid=f"{name} {network}", **fill, **style)
    axis.annotate(records_lib.text(y), (1, row), xytext=(6, 0),
                  xycoords=axis.get_yaxis_transform(),
                  textcoords="offset points", va="center",
                  fontsize=9, color=colour if strong else _TEXT,
                  fontweight="bold" if strong else "normal")
  axis.set_yticks(range(len(names)), names, fontsize=9, **_PLAIN)
  for tick, name in zip(axis.get_yticklabels(), names):
    if name in best:
      tick.set(color=_GROUPS[labels_lib.group(name)][0], fontweight="bold")
  axis.set_ylim(len(names) - 0.5, -0.5)
  axis.grid(alpha=0.25)
  axis.spines[["top", "right", "left"]].set_visible(False)
  axis.tick_params(axis="y", length=0)
  open_too = "; open: held-out features" if heldout else ""
  if len(heldout) > 1:
    open_too = "\n" + "; ".join(
        f"{word}: {network}" for word, network in zip(_OPEN, heldout))
  axis.set_xlabel(f"{label} at K = {_few_steps(records)} (log, lower is "
                  f"better){open_too}", **_PLAIN)
  _explain(axis, curves, records, "right")
  return figure


def quality_by_time_png(path: str, records: list[dict]) -> None:
  """Draws FID against the seconds an image takes, both on log axes.

  Times of other devices or batches do not compare: those of most records are
  drawn, and the axis says how many are left out.

  Args:
    path: of the PNG.
    records: as of `fid_by_steps_png`, with a `timing` each.
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
      **_PLAIN)
  _explain(axis, curves, drawn)
  _draw_curves(axis, curves)
  _save(figure, path)

"""Pictures of a sampler: its coefficients and its path."""

from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from ddss_tf.reporting import grids
from ddss_tf.reporting import style as style_lib
from ddss_tf.samplers.coefficients import Coefficients
from ddss_tf.schedules import NoiseSchedule

_MOST_COLUMNS = 11  # A longer path goes on in a second row.


def coefficients_png(path: str, coefficients: Coefficients, label: str,
                     start: Coefficients | None = None,
                     schedule: NoiseSchedule | None = None) -> None:
  """Draws all coefficients of a sampler.

  Args:
    path: the path of the PNG.
    coefficients: the coefficients of the sampler.
    label: its name.
    start: the coefficients its search started from, drawn beside it.
    schedule: the forward process. With it, times are drawn by their log-SNR
      (`NoiseSchedule.log_snr`).
  """
  c = coefficients.numpy()
  s = None if start is None else start.numpy()
  # The panels are placed by hand. Matplotlib's constrained layout takes twice
  # as long, and makes panels so narrow that legends cover lines.
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
  figure.suptitle(f"{label}, K = {c.num_steps}", fontsize=12, **style_lib.PLAIN)
  _heat_map(figure, axes["weights"], _weights(c))
  axes["weights"].set(title="weights that make the next state")
  _draw_times(axes["times"], c, s, schedule)
  names = ["found", "start"]
  for name, found, before, colour, marker in (
      ("of the state", c.x0_from_state, s and s.x0_from_state, style_lib.BLUE, "o"),
      ("of the predicted " + ("v" if c.in_v else "noise"), c.x0_from_output,
       s and s.x0_from_output, style_lib.ORANGE, "s")):
    _draw_steps(axes["x0"], found, before, colour, marker, [name])
  axes["x0"].set_yscale("symlog", linthresh=1)
  axes["x0"].set(ylabel="coefficient (log beyond 1)",
                 title=r"what makes $\hat x_0$")
  _draw_steps(axes["noise"], c.noise_scales, s and s.noise_scales, style_lib.VERMILION,
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
  style_lib.save_figure(figure, path)


def _weights(c):
  """Weights of the K states and of x0_hat, [K, K + 1].

  A step cannot use later states: these weights are masked.
  """
  table = np.concatenate([c.state_weights, c.x0_weights[:, None]], axis=1)
  steps = c.num_steps
  unused = np.triu(np.ones((steps, steps), bool), 1)
  return np.ma.array(table, mask=np.concatenate(
      [unused, np.zeros((steps, 1), bool)], axis=1))


def _heat_map(figure, axis, table):
  """Draws a table of `_weights`, white at 0, with its values if they fit."""
  steps = len(table)
  few = steps <= 12
  limit = max(0.01, np.abs(table).max())  # Smaller weights are shown as 0.00.
  heat = axis.imshow(table, cmap="PuOr", vmin=-limit, vmax=limit,
                     aspect="auto")
  axis.axvline(steps - 0.5, color="white", linewidth=4)
  if few:
    for k, u in zip(*np.nonzero(~table.mask)):
      dark = abs(table[k, u]) > 0.6 * limit
      # Adding 0.0 turns -0.0 into 0.0.
      axis.text(u, k, f"{round(table[k, u], 2) + 0.0:.2f}", ha="center",
                va="center", fontsize=8 if steps <= 6 else 6,
                color="white" if dark else "black")
  # States are numbered as in the paper: x_K is the noisiest.
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
  """Draws one value per step; the start's values are pale."""
  position = np.arange(1, len(found) + 1)
  if before is not None:
    axis.plot(position, before, marker + ":", color=colour, alpha=0.5,
              mfc="none", label=names[1] if len(names) > 1 else None)
  axis.plot(position, found, marker + "-", color=colour, markersize=5,
            label=names[0])


def _draw_times(axis, c, s, schedule):
  """Draws the times of the network calls, by log-SNR if there is a schedule."""
  place = np.asarray if schedule is None else schedule.log_snr
  _draw_steps(axis, place(c.times), s and place(s.times), style_lib.BLUE, "o",
              ["found", "start"])
  axis.set(title="times fed to the network", ymargin=0.12)
  if schedule is None:
    axis.set_ylabel("t (training steps)")
    axis.set_ylim(bottom=0)
    return
  axis.set_ylabel(r"$\log(\alpha_t / \sigma_t)$, half the log-SNR; clean is up")
  for k, t in enumerate(c.times):
    if c.num_steps <= 6:
      # The last label goes above its marker: below it would leave the axis.
      last = k == c.num_steps - 1
      axis.annotate(f"t = {t:.0f}", (k + 1, place(t)),
                    xytext=(0, 6) if last else (5, -9), fontsize=7,
                    ha="center" if last else "left", color=style_lib.TEXT,
                    textcoords="offset points")


def path_png(path: str, states: np.ndarray, x0_hats: np.ndarray,
             image: np.ndarray, times: np.ndarray, label: str) -> None:
  """Draws the way of one image through the steps.

  Args:
    path: the path of the PNG.
    states: float [K, H, W, C], as the network sees them, noisiest first; drawn
      clipped to [-1, 1].
    x0_hats: float [K, H, W, C], the image predicted from each state.
    image: float [H, W, C], the final image.
    times: [K], the times fed to the network.
    label: the label of the sampler.
  """
  steps = len(states)
  panels = grids.num_panels(image)
  # The last column has the final image in both rows: nothing is predicted from
  # it.
  above, below = (grids.as_pixels(np.concatenate([images, image[None]]))
                  for images in (states, x0_hats))
  names = [f"$x_{{{steps - k}}}$\nt = {t:.0f}" for k, t in enumerate(times)]
  names.append("$x_0$\nimage")
  columns = min(steps + 1, max(1, _MOST_COLUMNS // panels))
  bands = -(-(steps + 1) // columns)
  size = (0.8 * panels * columns + 1, 2.3 * bands + 0.4)
  figure = Figure(size, layout="constrained")
  figure.suptitle(f"{label}: one image through its {steps} steps, clipped to "
                  "[-1, 1]", fontsize=11, **style_lib.PLAIN)
  height, width = above.shape[1:3]
  for i, axis in enumerate(np.ravel(figure.subplots(bands, 1, squeeze=False))):
    part = slice(i * columns, (i + 1) * columns)
    count = len(above[part])
    grids.show_images(axis, np.concatenate([above[part], below[part]]), count,
          blank=int(i == bands - 1))
    axis.set_xlim(-0.5, columns * (width + grids.GAP) - grids.GAP - 0.5)
    axis.xaxis.tick_top()
    axis.set_xticks(grids.row_middles(width, count), names[part], fontsize=8)
    axis.set_yticks(grids.row_middles(height, 2), ["state", r"$\hat x_0$"], fontsize=9)
  style_lib.save_figure(figure, path)

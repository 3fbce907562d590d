"""Pictures: grids of samples, and a sampler's coefficients."""

import numpy as np

from ddss_tf import data
from ddss_tf import storage
from ddss_tf.coefficients import Coefficients


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
  """Tiles images, with a light gap.

  Args:
    images: float [N, H, W, C] in [-1, 1] or uint8; C is 1 or 3.
    columns: images in a row.
    gap: pixels between them.

  Returns:
    uint8 [rows (H + gap) - gap, columns (W + gap) - gap, C].
  """
  if images.dtype != np.uint8:
    images = data.to_uint8(images)
  count, height, width, channels = images.shape
  rows = -(-count // columns)
  grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap,
                  channels), 235, np.uint8)
  for i, image in enumerate(images):
    y, x = i // columns * (height + gap), i % columns * (width + gap)
    grid[y:y + height, x:x + width] = image
  return grid


def _plt():
  # Imported here and without a display: only the stages that draw need it.
  import matplotlib  # pylint: disable=g-import-not-at-top
  matplotlib.use("Agg")
  from matplotlib import pyplot  # pylint: disable=g-import-not-at-top
  return pyplot


def _save(figure, path):
  with storage.replacing(path) as temporary:
    figure.savefig(temporary, dpi=120, format="png", bbox_inches="tight")
  _plt().close(figure)


def samples_png(path: str, titled: list[tuple[str, np.ndarray]],
                columns: int = 8) -> None:
  """Draws samples of several samplers side by side.

  Args:
    path: of the PNG.
    titled: (title, images float [N, H, W, C] in [-1, 1]) of each sampler, on
      the same noise, so that the same place shows the same digit to be.
    columns: images in a row of each grid.
  """
  figure, axes = _plt().subplots(
      1, len(titled), figsize=(3.4 * len(titled), 3.8), squeeze=False)
  for axis, (title, images) in zip(axes[0], titled):
    grid = image_grid(images, columns)
    axis.imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=255,
                interpolation="nearest")
    axis.set_title(title, fontsize=11)
    axis.axis("off")
  _save(figure, path)


def coefficients_png(path: str, coefficients: Coefficients, label: str) -> None:
  """Draws all coefficients of a sampler.

  Args:
    path: of the PNG.
    coefficients: of the sampler.
    label: its name.
  """
  c = coefficients.numpy()
  steps = c.num_steps
  plt = _plt()
  figure, axes = plt.subplots(
      1, 4, figsize=(16, 3.9), gridspec_kw={"width_ratios": [1.35, 1, 1, 1]},
      layout="constrained")
  figure.suptitle(f"{label}, K = {steps}", fontsize=12)

  table = np.concatenate([c.state_weights, c.x0_weights[:, None]], axis=1)
  unused = np.triu(np.ones((steps, steps), bool), 1)
  hidden = np.concatenate([unused, np.zeros((steps, 1), bool)], axis=1)
  limit = max(1e-6, np.abs(table).max())
  heat = axes[0].imshow(np.ma.array(table, mask=hidden), cmap="PuOr",
                        vmin=-limit, vmax=limit, aspect="auto")
  if steps <= 12:
    for k, u in zip(*np.nonzero(~hidden)):
      dark = abs(table[k, u]) > 0.6 * limit
      axes[0].text(u, k, f"{table[k, u]:.2f}", ha="center", va="center",
                   fontsize=8, color="white" if dark else "black")
    # As the paper counts: x_K is the noisiest state.
    names = [f"$x_{{{steps - u}}}$" for u in range(steps)]
  else:
    names = [str(steps - u) for u in range(steps)]
  axes[0].set_xticks(range(steps + 1), names + [r"$\hat x_0$"],
                     fontsize=9 if steps <= 12 else 6)
  axes[0].set_yticks(range(steps), [str(k + 1) for k in range(steps)],
                     fontsize=9 if steps <= 12 else 6)
  axes[0].set(xlabel="weight of", ylabel="step",
              title="what makes the next state")
  figure.colorbar(heat, ax=axes[0], shrink=0.9)

  position = np.arange(1, steps + 1)
  axes[1].plot(position, c.times, "o-", color="#0072B2")
  axes[1].set(xlabel="step", ylabel="t (training steps)",
              title="times fed to the network")
  axes[1].set_ylim(bottom=0)
  axes[1].grid(alpha=0.3)
  axes[2].plot(position, c.x0_from_state, "o-", color="#0072B2",
               label="of the state")
  axes[2].plot(position, c.x0_from_eps, "s--", color="#E69F00",
               label="of the predicted noise")
  axes[2].set_yscale("symlog", linthresh=1)
  axes[2].set(xlabel="step", ylabel="coefficient (log beyond 1)",
              title=r"what makes $\hat x_0$")
  axes[2].legend(fontsize=8)
  axes[2].grid(alpha=0.3)
  axes[3].plot(position, c.noise_scales, "s-", color="#D55E00")
  axes[3].set(xlabel="step", ylabel="standard deviation",
              title="fresh noise added after the step")
  axes[3].set_ylim(bottom=0)
  axes[3].grid(alpha=0.3)
  for axis in axes[1:]:
    axis.xaxis.get_major_locator().set_params(integer=True)
  _save(figure, path)

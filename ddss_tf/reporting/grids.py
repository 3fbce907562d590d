"""Grids of images."""

from matplotlib import font_manager, textpath
from matplotlib.figure import Figure
import numpy as np

from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.reporting import style as style_lib
from ddss_tf.samplers import labels as labels_lib

GAP = 2  # Pixels between images.
_LIGHT = 235  # The grey of the gaps, of 255.
_MOST_PANELS = 16  # The most channels of an image that are drawn side by side.


def as_pixels(images: np.ndarray) -> np.ndarray:
  """Images as they are drawn: grey or RGB.

  Images of neither 1 nor 3 channels have no known colours. Their channels stand
  side by side, each in grey; of more than 16, only the first 16.

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
  panels = num_panels(images)
  drawn = np.full((count, height, panels, width + 1), _LIGHT, np.uint8)
  drawn[..., :width] = np.moveaxis(images[..., :panels], -1, 2)
  return drawn.reshape(count, height, -1, 1)[:, :, :-1]


def num_panels(images) -> int:
  """How many panels one of the images takes, side by side."""
  channels = images.shape[-1]
  return 1 if channels in (1, 3) else min(channels, _MOST_PANELS)


def image_grid(images: np.ndarray, columns: int, gap: int = GAP
               ) -> np.ndarray:
  """Tiles images, with a light gap.

  Args:
    images: float [N, H, W, C] in [-1, 1] or uint8, drawn as by `as_pixels`.
    columns: images in a row.
    gap: pixels between them.

  Returns:
    uint8 [rows (H + gap) - gap, columns (W + gap) - gap, 1 or 3], where W is
    the width that `as_pixels` gives.
  """
  images = as_pixels(images)
  count, height, width, channels = images.shape
  rows = -(-count // columns)
  grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap,
                  channels), _LIGHT, np.uint8)
  for i, image in enumerate(images):
    y, x = i // columns * (height + gap), i % columns * (width + gap)
    grid[y:y + height, x:x + width] = image
  return grid


def show_images(axis, images, columns, blank=0):
  """Shows images as a grid without axes, the last `blank` places white."""
  height, width = images.shape[1:3]
  grid = image_grid(images, columns)
  if blank:
    grid[-height - GAP:, -blank * (width + GAP):] = 255
  # Small images show their pixels; large ones are shrunk without moire.
  axis.imshow(grid[..., 0] if grid.shape[-1] == 1 else grid,
              cmap="gray", vmin=0, vmax=255, interpolation=(
                  "nearest" if height <= 64 else "auto"))
  axis.spines[:].set_visible(False)
  axis.set(xticks=[], yticks=[])
  axis.tick_params(length=0)


def row_middles(size, count):
  """Positions in pixels of the middles of a grid's images, along one side."""
  return (size + GAP) * np.arange(count) + (size - 1) / 2


def samples_png(path: str, titled: list[tuple[str, np.ndarray]],
                columns: int = 8) -> None:
  """Draws samples of several samplers side by side.

  Args:
    path: the path of the PNG.
    titled: (title, images float [N, H, W, C] in [-1, 1]) of each sampler. All
      come from the same noise, so places of two grids can be compared.
    columns: images in a row of each grid; fewer if an image has several panels.
  """
  columns = max(1, round(columns / num_panels(titled[0][1]) ** 0.5))
  titled = [(title, as_pixels(images)) for title, images in titled]
  rows = -(-max(len(images) for _, images in titled) // columns)
  height, width = titled[0][1].shape[1:3]
  inches = 3.3 * rows * height / (columns * width)  # The height of a grid.
  figure = Figure((3.4 * len(titled), inches + 0.6))
  figure.subplots_adjust(0.02, 0.05 / (inches + 0.6), 0.98,
                         1 - 0.5 / (inches + 0.6), wspace=0.06)
  axes = figure.subplots(1, len(titled), squeeze=False)
  for axis, (title, images) in zip(axes[0], titled):
    show_images(axis, images, columns)
    axis.set_title(title, fontsize=11, **style_lib.PLAIN)
  style_lib.save_figure(figure, path)


def text_room(texts):
  """Inches for the longest of some texts of size 9, bold or not.

  Figures leave this room instead of being cut to their content, so that all
  figures of one kind have one scale.
  """
  font = font_manager.FontProperties(size=9, weight="bold")
  return 0.3 + max(textpath.text_to_path.get_text_width_height_descent(
      text, font, ismath=False)[0] for text in texts) / 72


def sample_rows_png(path: str, title: str,
                    titled: list[tuple[str, str, np.ndarray]]) -> None:
  """Draws one row of samples for each sampler, one below the other.

  Args:
    path: the path of the PNG.
    title: the title of the picture.
    titled: (name, note, images float [N, H, W, C] in [-1, 1]) of each sampler.
      All come from the same noise, so the images of a column can be compared.
  """
  images = as_pixels(np.concatenate([images for *_, images in titled]))
  columns, (height, width) = len(titled[0][-1]), images.shape[1:3]
  inches = 0.42  # The height of an image.
  wide = columns * inches * width / height
  left, right = (text_room(texts) for texts in list(zip(*titled))[:2])
  size = (wide + left + right, len(titled) * inches + 0.6)
  figure = Figure(size)
  axis = figure.add_axes((
      left / size[0], 0.1 / size[1], wide / size[0],
      len(titled) * inches / size[1]))
  show_images(axis, images, columns)
  axis.set_title(title, fontsize=11, **style_lib.PLAIN)
  middles = row_middles(height, len(titled))
  axis.set_yticks(middles, [name for name, *_ in titled], fontsize=9, **style_lib.PLAIN)
  for tick, (name, *_) in zip(axis.get_yticklabels(), titled):
    if name != labels_lib.REAL_IMAGES:
      tick.set_color(style_lib.GROUPS[labels_lib.group(name)][0])
  for y, (_, note, _) in zip(middles, titled):
    axis.annotate(
        note, (1, y), xycoords=axis.get_yaxis_transform(), xytext=(8, 0),
        textcoords="offset points", va="center", fontsize=9, color=style_lib.TEXT,
        **style_lib.PLAIN)
  style_lib.save_figure(figure, path)

"""Tests that pictures show what they are given, where they should."""

import os

from matplotlib.backends import backend_agg
import matplotlib.text
import numpy as np
import pytest

from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.reporting import comparison
from ddss_tf.reporting import grids
from ddss_tf.reporting import sampler as sampler_figures
from ddss_tf.reporting import style
from ddss_tf.samplers import labels
from ddss_tf.samplers import solvers
from ddss_tf.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()


def record(sampler, num_steps, fid, **changes):
  return {"sampler": sampler, "num_steps": num_steps, "fid": fid,
          "fid_heldout": 1.5 * fid, "num_samples": 2000, "num_real": 500,
          "dataset": "digits", "features": {"name": "cnn"}, "seed": 1,
          **changes}


@pytest.fixture
def drawn(monkeypatch):
  """The figures that are saved, by name of the file."""
  saved = {}
  monkeypatch.setattr(style, "save_figure",
                      lambda figure, path: saved.update({path: figure}))
  return saved


def lines_of(axis):
  return {line.get_gid(): line for line in axis.lines if line.get_gid()}


def names_of(axis):
  return [text.get_text().rsplit("  ", 1)[0] for text in axis.texts]


def test_points_of_fid_by_steps_are_the_records(drawn):
  fids = {"DDIM": [20.0, 8.0, 3.0], "DDPM": [40.0, 20.0, 9.0],
          "UniPC-2 (bh2)": [3.0, 2.5, 2.0], "PNDM": [6.0, 2.6, 2.1],
          "GGDM+TIME": [1.3, 1.2, 1.1], "learned DDIM": [19.0, 7.5, 2.9]}
  strides = {5: "linear", 10: "trailing", 20: "logsnr"}
  records = [
      record(name if name in ("GGDM+TIME", "learned DDIM")
             else f"{name} {stride}", steps, fids[name][i])
      for i, (steps, stride) in enumerate(strides.items()) for name in fids]
  comparison.fid_by_steps_png("a", records)
  (axis,) = drawn["a"].axes
  assert axis.get_yscale() == "log"
  assert [t.get_text() for t in axis.get_xticklabels()] == ["5", "10", "20"]
  assert "K" in axis.get_xlabel() and "FID-2k" in axis.get_ylabel()
  lines = lines_of(axis)
  assert set(lines) == set(fids)
  for name, line in lines.items():
    np.testing.assert_array_equal(
        line.get_xydata(), np.transpose([list(strides), fids[name]]))
  # The best of each group, and no other, is strong.
  strong = {name for name, line in lines.items() if line.get_alpha() == 1}
  assert strong == {"DDIM", "UniPC-2 (bh2)", "GGDM+TIME"}
  colours = {labels.group(n): l.get_color() for n, l in lines.items()}
  assert len(set(colours.values())) == 3
  # Each line has its name and last value beside it.
  assert sorted(t.get_text() for t in axis.texts) == sorted(
      f"{name}  {values[-1]:.2f}" for name, values in fids.items())


def test_several_seeds_are_a_band(drawn):
  records = [record("GGDM", steps, fid, seed=seed)
             for steps, values in ((5, (3.0, 4.0, 8.0)), (10, (1.0, 2.0, 3.0)))
             for seed, fid in enumerate(values)]
  comparison.fid_by_steps_png("a", records)
  (axis,) = drawn["a"].axes
  np.testing.assert_array_equal(
      lines_of(axis)["GGDM"].get_xydata(), [[5, 5], [10, 2]])
  band = {tuple(v) for v in axis.collections[0].get_paths()[0].vertices}
  assert {(5, 3), (5, 8), (10, 1), (10, 3)} <= band


def test_one_k_is_a_ranking(drawn):
  fids = {"DDIM linear": 9.0, "DDIM quadratic": 12.0, "PNDM linear": 4.0,
          "GGDM": 2.0, "VARS": 10.0}
  comparison.fid_by_steps_png("a", [record(n, 5, f) for n, f in fids.items()])
  (axis,) = drawn["a"].axes
  # Strides of one solver side by side are samplers of their own.
  ordered = ["GGDM", "PNDM", "DDIM linear", "VARS", "DDIM quadratic"]
  assert [t.get_text() for t in axis.get_yticklabels()] == ordered
  lines = lines_of(axis)
  for row, (name, fid) in enumerate(zip(ordered, [2, 4, 9, 10, 12])):
    np.testing.assert_array_equal(lines[name].get_xydata(), [[fid, row]])
    np.testing.assert_array_equal(
        lines[f"{name} held-out"].get_xydata(), [[1.5 * fid, row]])
  assert [t.get_text() for t in axis.texts] == [
      "2.00", "4.00", "9.00", "10.00", "12.00"]


def test_the_full_chain_is_a_line_across(drawn):
  few = [record("DDIM", 5, 9.0), record("GGDM", 5, 2.0)]
  full = record("DDPM (full chain)", 1000, 0.5)
  comparison.fid_by_steps_png("a", [
      *few, record("DDIM", 10, 4.0), record("GGDM", 10, 1.0), full])
  (axis,) = drawn["a"].axes
  assert [t.get_text() for t in axis.get_xticklabels()] == ["5", "10"]
  line = lines_of(axis)["DDPM (full chain)"]
  np.testing.assert_array_equal(line.get_xydata(), [[5, 0.5], [10, 0.5]])
  assert line.get_linestyle() == "--"
  # It is no rival of DDIM, which is the best of its group.
  assert lines_of(axis)["DDIM"].get_alpha() == 1
  comparison.fid_by_steps_png("b", [*few, full])
  (axis,) = drawn["b"].axes
  assert [t.get_text() for t in axis.get_yticklabels()] == [
      "DDPM (full chain)", "GGDM", "DDIM"]
  assert "K = 5 " in axis.get_xlabel()
  assert lines_of(axis)["DDIM"].get_alpha() == 1


def test_a_ranking_shows_every_held_out_network(drawn):
  networks = [{"name": "one"}, {"name": "$x$"}]
  comparison.fid_by_steps_png("a", [
      record(name, 5, fid, features_heldout=networks,
             fid_heldout=[2 * fid, 3 * fid])
      for name, fid in (("DDIM linear", 9.0), ("GGDM", 2.0))])
  (axis,) = drawn["a"].axes
  lines = lines_of(axis)
  for row, (name, fid) in enumerate((("GGDM", 2.0), ("DDIM", 9.0))):
    for factor, network in ((2, "one"), (3, "$x$")):
      np.testing.assert_array_equal(
          lines[f"{name} held-out {network}"].get_xydata(),
          [[factor * fid, row]])
  # Told apart by their markers, which the axis explains.
  assert lines["GGDM held-out one"].get_markerfacecolor() == "none"
  assert lines["GGDM held-out $x$"].get_fillstyle() == "left"
  assert axis.get_xlabel().endswith(
      "\nopen: held-out one; left half: held-out $x$")
  low, high = axis.get_xlim()
  assert low < 2 and 27 < high


def test_quality_by_time_is_at_the_measured_times(drawn):
  timing = lambda s: {"seconds_per_image": s, "device": "2 CPU cores",
                      "batch_size": 8}
  comparison.quality_by_time_png("a", [
      record("DDIM linear", 5, 9.0, timing=timing(0.01)),
      record("DDIM trailing", 10, 4.0, timing=timing(0.021)),
      record("GGDM", 5, 2.0, timing=timing(0.012))])
  (axis,) = drawn["a"].axes
  lines = lines_of(axis)
  np.testing.assert_array_equal(
      lines["DDIM"].get_xydata(), [[0.01, 9], [0.021, 4]])
  np.testing.assert_array_equal(lines["GGDM"].get_xydata(), [[0.012, 2]])
  assert axis.get_xscale() == axis.get_yscale() == "log"
  assert "seconds" in axis.get_xlabel() and "2 CPU cores" in axis.get_xlabel()


@pytest.mark.parametrize("other", [
    {"device": "1 CPU core"}, {"batch_size": 250}])
def test_times_of_another_device_are_not_drawn_beside(drawn, other):
  timing = {"seconds_per_image": 0.01, "device": "2 CPU cores", "batch_size": 8}
  comparison.quality_by_time_png("a", [
      record("DDPM", 5, 20.0, timing={**timing, **other}),
      record("DDIM", 5, 9.0, timing=timing),
      record("GGDM", 5, 2.0, timing=timing)])
  (axis,) = drawn["a"].axes
  assert set(lines_of(axis)) == {"DDIM", "GGDM"}
  assert axis.get_xlabel() == ("seconds an image on 2 CPU cores, batches of 8 "
                               "(log); left out: 1 timed otherwise")


@pytest.mark.parametrize("count", [2, 25])
def test_names_do_not_overlap(drawn, count):
  rng = np.random.default_rng(0)
  comparison.fid_by_steps_png("a", [
      record(f"sampler {i}", steps, 2.0 + 0.1 * rng.random())
      for i in range(count) for steps in (5, 10)])
  figure = drawn["a"]
  (axis,) = figure.axes
  renderer = backend_agg.FigureCanvasAgg(figure).get_renderer()
  boxes = [text.get_tightbbox(renderer) for text in axis.texts]
  # Of the texts alone, without the lines that lead to them.
  spans = sorted(
      matplotlib.text.Text.get_window_extent(text, renderer).intervaly.tolist()
      for text in axis.texts)
  assert len(spans) == count
  for (_, top), (bottom, _) in zip(spans, spans[1:]):
    assert bottom > top - 2.0  # Of a box with room for g and H.
  # In the order of what they name, and all of it on the picture.
  ends = [lines_of(axis)[name].get_ydata()[-1] for name in names_of(axis)]
  heights = [text.xyann[1] for text in axis.texts]
  np.testing.assert_array_equal(np.argsort(heights), np.argsort(ends))
  width, height = figure.get_size_inches() * figure.dpi
  for box in boxes:
    assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and (
        box.y1 <= height)


@pytest.mark.parametrize("all_steps", [(5,), (5, 10)])
def test_long_names_are_not_cut(drawn, all_steps):
  longest = "GGDM+PRED+TIME, LINEAR KID + TEACHER'S FEATURES"
  comparison.fid_by_steps_png("a", [
      record(name, steps, fid) for name, fid in (
          (longest, 2.0), ("GGDM+PRED+TIME, ELBO", 50.0), ("DDIM", 9.0))
      for steps in all_steps])
  images = np.zeros((2, 4, 4, 1), np.uint8)
  grids.sample_rows_png("b", "K = 5", [(longest, "FID-10k 12.34", images)])
  for figure in drawn.values():
    (axis,) = figure.axes
    renderer = backend_agg.FigureCanvasAgg(figure).get_renderer()
    texts = [*axis.get_yticklabels(), *axis.texts, axis.title]
    assert any(longest in text.get_text() for text in texts)
    assert figure.bbox.x0 <= min(
        text.get_window_extent(renderer).x0 for text in texts)
    assert figure.bbox.x1 >= max(
        text.get_window_extent(renderer).x1 for text in texts)


def test_names_that_have_room_stay_where_they_belong():
  np.testing.assert_allclose(
      comparison._spread(np.array([0.9, 0.1, 0.5]), 0.1), [0.9, 0.1, 0.5])
  # Two that overlap part evenly; the edge holds the lowest.
  np.testing.assert_allclose(
      comparison._spread(np.array([0.52, 0.5, -1.0]), 0.1), [0.56, 0.46, 0.0])


def coefficients(num_steps, name, stride):
  return solvers.solver_coefficients(SCHEDULE, name, num_steps, stride)


def test_coefficients_beside_their_start(drawn):
  found, start = (coefficients(4, "unipc3-bh2", "linspace"),
                  coefficients(4, "ddpm", "linear"))
  sampler_figures.coefficients_png("a", found, "GGDM", start, SCHEDULE)
  found, start = found.numpy(), start.numpy()
  axes = {axis.get_title(): axis for axis in drawn["a"].axes}
  for title, states, x0 in (
      ("weights that make the next state", found.state_weights,
       found.x0_weights),
      ("change of these weights by the search",
       found.state_weights - start.state_weights,
       found.x0_weights - start.x0_weights)):
    shown = axes[title].images[0].get_array()
    lower = np.tril_indices(4)
    np.testing.assert_array_equal(shown[:, :4][lower], states[lower])
    np.testing.assert_array_equal(shown[:, 4], x0)
    # What no step can use is no weight of 0.
    assert shown.mask[:, :4].sum() == 6 and not shown.mask[:, 4].any()
    low, high = axes[title].images[0].get_clim()
    assert low == -high  # White is 0.
  pairs = {
      "times fed to the network": [SCHEDULE.log_snr(start.times),
                                   SCHEDULE.log_snr(found.times)],
      r"what makes $\hat x_0$": [start.x0_from_state, found.x0_from_state,
                                 start.x0_from_eps, found.x0_from_eps],
      "fresh noise after the step": [start.noise_scales, found.noise_scales]}
  for title, expected in pairs.items():
    lines = axes[title].lines
    assert len(lines) == len(expected)
    for line, values in zip(lines, expected):
      np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
      np.testing.assert_array_equal(line.get_ydata(), values)


@pytest.mark.parametrize("num_steps", [3, 12])
def test_path_shows_every_state_and_ends_in_the_image(drawn, num_steps):
  rng = np.random.default_rng(0)
  states, x0_hats = rng.uniform(-1.3, 1.3, (2, num_steps, 5, 6, 1))
  image = rng.uniform(-1, 1, (5, 6, 1))
  times = np.linspace(999, 0, num_steps)
  sampler_figures.path_png("a", states, x0_hats, image, times, "GGDM")
  shown, names = [], []
  for axis in drawn["a"].axes:
    grid = np.asarray(axis.images[0].get_array())
    columns = (grid.shape[1] + 2) // 8
    shown += [(grid[:5, 8 * c:8 * c + 6], grid[7:, 8 * c:8 * c + 6])
              for c in range(columns)]
    names += [label.get_text() for label in axis.get_xticklabels()]
    np.testing.assert_allclose(  # The names are above their images.
        axis.get_xticks(), 8 * np.arange(columns) + 2.5)
  assert len(shown) == len(names) == num_steps + 1
  for k in range(num_steps):
    np.testing.assert_array_equal(shown[k][0], dataset_lib.to_uint8(states[k])[..., 0])
    np.testing.assert_array_equal(shown[k][1],
                                  dataset_lib.to_uint8(x0_hats[k])[..., 0])
    assert f"_{{{num_steps - k}}}" in names[k] and f"t = {times[k]:.0f}" in (
        names[k])
  np.testing.assert_array_equal(shown[-1][0], dataset_lib.to_uint8(image)[..., 0])
  assert np.all(shown[-1][1] == 255)  # Nothing is predicted from it.


def test_rows_of_samples(drawn):
  images = np.random.default_rng(0).integers(
      0, 256, (3, 4, 5, 6, 3)).astype(np.uint8)
  rows = [("DDIM linear", "FID 2.00", images[0]),
          ("PNDM linear", "FID 1.50", images[1]), ("GGDM", "", images[2])]
  grids.sample_rows_png("a", "K = 5", rows)
  (axis,) = drawn["a"].axes
  grid = np.asarray(axis.images[0].get_array())
  for row in range(3):
    for column in range(4):
      np.testing.assert_array_equal(
          grid[7 * row:7 * row + 5, 8 * column:8 * column + 6],
          images[row, column])
  assert [t.get_text() for t in axis.get_yticklabels()] == [
      name for name, *_ in rows]
  np.testing.assert_allclose(axis.get_yticks(), [2, 9, 16])
  assert [t.get_text() for t in axis.texts] == ["FID 2.00", "FID 1.50", ""]


def test_names_are_no_mathematics(tmp_path):
  name = r"50$ and $\frac{1$"
  path = str(tmp_path / "a.png")
  comparison.fid_by_steps_png(path, [record(name, 5, 1.0, dataset=name)])
  comparison.fid_by_steps_png(
      path, [record(name, steps, 1.0) for steps in (5, 10)])
  grids.sample_rows_png(path, name, [(name, name, np.zeros((2, 4, 4, 1)))])
  grids.samples_png(path, [(name, np.zeros((2, 4, 4, 1)))])
  found = coefficients(2, "ddim", "linear")
  sampler_figures.coefficients_png(path, found, name, found, SCHEDULE)
  with open(path, "rb") as f:
    assert f.read(8) == b"\x89PNG\r\n\x1a\n"
  assert os.listdir(tmp_path) == ["a.png"]


def test_group_of_a_label():
  groups = {
      "DDPM linear": labels.BASELINES, "DDIM given times": labels.BASELINES,
      "DDIM(eta=0.5) karras": labels.BASELINES,
      "DPM-Solver++(3M, exact) linspace_open": labels.TRAINING_FREE,
      "learned DDIM": labels.SEARCHED, "DDIM+PRED": labels.SEARCHED,
      "GGDM, KID": labels.SEARCHED}
  assert {label: labels.group(label) for label in groups} == groups
  assert labels.without_stride("DEIS-2 linspace_open") == "DEIS-2"
  assert labels.without_stride("mine, linear-ish") == "mine, linear-ish"

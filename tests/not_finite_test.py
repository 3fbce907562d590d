"""A metric that is not finite costs its own figure, and never the row."""

import csv
import functools
import json
import re

import keras
from keras import ops
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf import storage
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.features import network as network_lib
from ddss_tf.reporting import comparison
from ddss_tf.reporting import report as report_lib
from ddss_tf.runs import records as records_lib
from ddss_tf.errors import UserError
import gaussian_parts

FIGURES = (*records_lib.FIGURES, "fid_heldout")


class Faulty(keras.layers.Layer):
  """Replaces some values by what is not finite.

  Args:
    fault: it.
    above: images whose mean is above this have the fault.
  """

  def __init__(self, fault, above=-1.0, **kwargs):
    super().__init__(**kwargs)
    self.fault, self.above = fault, above

  def call(self, x, images):
    bad = ops.mean(images, axis=(1, 2, 3)) > self.above
    return ops.where(bad[:, None], self.fault, x)


def network_with(pool=None, logits=None, **options):
  """A feature network with faults in its pool or its logits."""
  model = gaussian_parts.make()["features"].model
  outputs = [
      value if fault is None else Faulty(fault, name=name, **options)(
          value, model.inputs[0])
      for name, value, fault in zip(
          ("bad_pool", "bad_logits"), model.outputs, (pool, logits))]
  return network_lib.FeatureNetwork(
      keras.Model(model.inputs, outputs), "faulty",
      "pool" if pool is None else "bad_pool",
      "logits" if logits is None else "bad_logits")


def evaluate(run_dir, parts, **changes):
  return ddss_tf.evaluate(
      str(run_dir), **{**parts, **changes}, num_samples=40, batch_size=10,
      jit_compile=False, baselines=[functools.partial(
          ddss_tf.make_sampler, family="ddim", num_steps=steps)
                                    for steps in (2, 3)])


def lost(record):
  """Names of the figures that are none; no other value is NaN."""
  json.dumps(record, allow_nan=False)
  return {name for name in FIGURES if record[name] is None}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where,expected", [
    ("pool", {"fid", "kid", "kid_std"}), ("logits", {"inception_score"})])
def test_a_fault_of_the_network_costs_what_depends_on_it(
    fault, where, expected, gaussian_parts, tmp_path, caplog):
  sound = evaluate(tmp_path / "sound", gaussian_parts)
  assert lost(sound[0]) == {"fid_heldout"}  # There is no network.
  # A part of the generated images only, or the real ones, too.
  for name, above in (("some", 0.3), ("all", -1.0)):
    caplog.clear()
    records = evaluate(tmp_path / name, gaussian_parts, features=network_with(
        **{where: fault}, above=above))
    for record, other in zip(records, sound, strict=True):
      assert lost(record) == expected | {"fid_heldout"}
      for figure in set(records_lib.FIGURES) - expected:
        assert record[figure] == pytest.approx(other[figure], rel=1e-6)
    told = [message for message in caplog.messages if "not finite" in message]
    assert len(told) == 2 and all(
        figure in message for message in told for figure in expected)


@pytest.mark.slow
def test_a_held_out_network_costs_its_own_distance(gaussian_parts, tmp_path):
  good = gaussian_parts["features"]
  (record, _) = evaluate(tmp_path / "one", gaussian_parts,
                         heldout_features=network_with(pool=np.nan))
  assert lost(record) == {"fid_heldout"} and record["fid"] > 0
  assert records_lib.heldout_fids(record) == {"held-out": None}
  (record, _) = evaluate(tmp_path / "two", gaussian_parts, heldout_features=[
      good, network_with(pool=np.nan), good])
  first, second, third = record["fid_heldout"]
  assert second is None and first == third == pytest.approx(record["fid"])
  lines = records_lib.table([record]).splitlines()
  # Its FID, coverage, recall and sliced distance.
  assert re.findall(r"\| - ", lines[2]) == ["| - "] * 4
  assert reporting_text(tmp_path / "two").count("&ndash;") == 2 * 4


def reporting_text(folder):
  with open(report_lib.report(str(folder)), encoding="utf-8") as f:
    return f.read()


@pytest.mark.parametrize("bad", [1, 40])
def test_images_that_are_not_finite_are_not_seen_as_black(
    bad, gaussian_parts, tmp_path, caplog):
  """There is no byte for NaN: what a network sees of it would look fine."""
  parts = dict(gaussian_parts)
  exact = parts["denoiser"]

  class Broken(keras.layers.Layer):

    def call(self, x, t):
      index = tf.range(tf.shape(x)[0])[:, None, None, None]
      # The first of a batch, or all.
      return tf.where(index < (1 if bad == 1 else 100), np.nan,
                      exact.model([x, t]))

  x, t = keras.Input(exact.image_shape), keras.Input(())
  parts["denoiser"] = ddss_tf.Denoiser(
      keras.Model([x, t], Broken()(x, t)), exact.schedule, name="broken")
  records = evaluate(tmp_path, parts)
  for record in records:
    assert lost(record) == set(FIGURES)
    assert record["inception_score_splits"] == {
        "splits": 10, "mean": None, "std": None}
  count = 4 if bad == 1 else 40  # Of four batches.
  assert f"{count} of 40 images have NaN" in caplog.text
  assert (tmp_path / "samples.png").exists()
  assert "&ndash;" in reporting_text(tmp_path)
  assert not (tmp_path / "fid_by_steps.png").exists()


def test_a_search_needs_features_that_are_finite(gaussian_parts, tmp_path):
  with pytest.raises(UserError, match="'faulty' of 'gaussian' must be finite"):
    ddss_tf.search(
        run_dir=str(tmp_path), **{
            **gaussian_parts, "features": network_with(pool=np.inf)},
        sampler=functools.partial(
            ddss_tf.make_sampler, family="ggdm+pred", num_steps=2),
        num_search_steps=2, batch_size=8, pool_samples=16,
        validation_samples=16, jit_compile=False)


# --- What is made of records ---


def record(sampler, num_steps=3, **changes):
  return {
      "sampler": sampler, "num_steps": num_steps,
      "coefficients_sha256": f"{sampler} {num_steps}", "x0_bound": None,
      "num_samples": 2000, "num_real": 100, "seed": 1,
      "features": {"name": "f", "sha256": "1", "protocol": "p"},
      "features_heldout": {"name": "h", "sha256": "2", "protocol": "p"},
      "denoiser": {"name": "d", "sha256": "3"}, "dataset": "set",
      "dataset_sha256": "4", "fid": 1.5, "kid": 0.1, "kid_std": 0.01,
      "inception_score": 2.0, "fid_heldout": 2.5, "timing": {
          "seconds_per_image": 0.1, "batch_size": 4, "device": "CPU"},
      **changes}


NOTHING = dict.fromkeys(FIGURES)
ROWS = [
    [record("DDIM linear"), record("GGDM", **NOTHING)],
    [record("DDIM linear", fid=None), record("GGDM"), record("GGDM", 5)],
    [record("DDIM linear", kid=None, kid_std=None), record("VARS", 5)],
    [record("DDIM linear", fid_heldout=None), record("GGDM")],
    [record("DDIM linear", **NOTHING), record("GGDM", **NOTHING)],
    [record("DDIM linear", **NOTHING)],
    [record("GGDM"), record("GGDM", seed=2, fid=None)],
]


@pytest.mark.parametrize("records", ROWS)
def test_tables_reports_and_figures_of_them(records, tmp_path):
  storage.write_json(str(tmp_path / "metrics.json"), records)
  records_lib.write_table(str(tmp_path / "table"), records)
  with open(tmp_path / "table.csv", newline="", encoding="utf-8") as f:
    rows = list(csv.DictReader(f))
  for row, each in zip(rows, records, strict=True):
    for name in FIGURES:
      assert row[name] == ("" if each[name] is None else str(each[name]))
  text = records_lib.table(records)
  assert "nan" not in text.lower() and "None" not in text
  names = comparison.draw(str(tmp_path), records)
  known = [each["fid"] for each in records if each["fid"] is not None]
  assert ("fid_by_steps.png" in names) == bool(known)
  page = reporting_text(tmp_path)
  # All but the pictures' bytes.
  text = re.sub("<[^>]*>", " ", page)
  assert not re.search(r"\b(nan|inf|None)\b", text)
  assert page.count("&ndash;") == sum(
      each[name] is None for each in records for name in FIGURES)
  # The best is one with an FID.
  best = re.findall(r'<tr class="best"><th scope="row">(.*?)<', page)
  assert bool(best) == bool(known)


def test_the_ranking_has_them_last():
  records = [record("a", fid=None), record("b", fid=1e9), record("c", fid=0.0)]
  assert [each["sampler"] for each in sorted(records, key=records_lib.rank)] == [
      "c", "b", "a"]


def test_curves_leave_them_out(tmp_path):
  for records in ROWS[:4]:
    comparison.fid_by_steps_png(str(tmp_path / "a.png"), records)
    comparison.quality_by_time_png(str(tmp_path / "b.png"), records)


@pytest.mark.slow
def test_a_comparison_with_strides_that_fail(gaussian_parts, tmp_path):
  """Those that have no figures are not chosen, and stand in the table."""
  exact = gaussian_parts["denoiser"]

  class Late(keras.layers.Layer):
    """NaN where the time is at its end, which some strides never ask for."""

    def call(self, x, t):
      return tf.where((t > 998.5)[:, None, None, None], np.nan,
                      exact.model([x, t]))

  x, t = keras.Input(exact.image_shape), keras.Input(())
  denoiser = ddss_tf.Denoiser(
      keras.Model([x, t], Late()(x, t)), exact.schedule, name="late")
  options = dict(
      denoiser=denoiser, dataset=gaussian_parts["dataset"],
      features=gaussian_parts["features"], num_steps=[2], solvers=["ddim"],
      families=[], num_samples=16, stride_samples=16, batch_size=8,
      jit_compile=False)
  (row,) = ddss_tf.compare(
      str(tmp_path / "a"), strides=["linspace", "linear"], **options)
  assert row["sampler"] == "DDIM linear" and row["fid"] is not None
  (row,) = ddss_tf.compare(str(tmp_path / "b"), strides=["linspace"], **options)
  assert lost(row) == set(FIGURES)
  table = (tmp_path / "b" / "table.md").read_text(encoding="utf-8")
  assert re.search(r"DDIM linspace +\| 2 +\| - ", table)


def test_one_image_is_told(gaussian_parts, tmp_path):
  one = dataset_lib.as_dataset(gaussian_parts["dataset"].images[:1].clip(-1, 1))
  with pytest.raises(UserError, match="at least 4 images.*Received: 1"):
    evaluate(tmp_path, gaussian_parts, dataset=one)

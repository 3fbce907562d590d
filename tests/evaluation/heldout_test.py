"""Tests of the figures on held-out features, and of features without logits."""

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf import metrics
from ddss_tf import neighbours
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.evaluation import heldout as heldout_lib
from ddss_tf.features import network as network_lib
from ddss_tf.features import reference as reference_lib
from ddss_tf.reporting import report
from ddss_tf.runs import records as records_lib
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.errors import UserError

COUNT = 60


@pytest.fixture(scope="module")
def measured(gaussian_parts, tmp_path_factory):
  """(folder, records) of an evaluation with two held-out networks."""
  run = str(tmp_path_factory.mktemp("heldout"))
  networks = [network_lib.FeatureNetwork(
      gaussian_parts["features"].model, name, "pool", None) for name in ("a", "b")]
  return run, ddss_tf.evaluate(
      run, **gaussian_parts, heldout_features=networks, num_samples=COUNT,
      num_steps=3, baselines=["ddim linear"], jit_compile=False, heldout_measures=[
          "coverage", "recall", "density", "precision", "sliced_wasserstein"])


def test_figures_are_of_the_features(measured, gaussian_parts):
  _, (record,) = measured
  sampler = ddss_tf.make_sampler(
      gaussian_parts["denoiser"].schedule, "ddim", 3, stride="linear")
  images = generator_lib.Generator(gaussian_parts["denoiser"], COUNT, False).images(
      sampler.coefficients(), COUNT, 1234)
  real, made = (gaussian_parts["features"](dataset_lib.to_float(dataset_lib.to_uint8(x)))[
      "pool"].numpy() for x in (gaussian_parts["dataset"].images, images))
  figures = neighbours.figures(neighbours.balls(real), made)
  expected = {**figures._asdict(), "sliced_wasserstein":
              metrics.sliced_wasserstein(real, made)}
  for name, value in expected.items():
    np.testing.assert_allclose(record[f"{name}_heldout"], [value, value], rtol=1e-3)
  assert 0 < figures.coverage < 1
  text = records_lib.table([record])
  assert "coverage held-out a" in text and f"{figures.recall:.3f}" in text


def test_features_without_logits_have_no_inception_score(
    gaussian_parts, measured, tmp_path):
  run, _ = measured
  features = network_lib.FeatureNetwork(
      gaussian_parts["features"].model, "bare", "pool", None)
  assert features.protocol.endswith("features pool, no logits")
  assert features.key != gaussian_parts["features"].key
  images = gaussian_parts["dataset"].images[:7]
  assert list(features(images)) == ["pool"]
  np.testing.assert_array_equal(
      features(images)["pool"], gaussian_parts["features"](images)["pool"])
  (record,) = ddss_tf.evaluate(
      str(tmp_path), **{**gaussian_parts, "features": features}, num_samples=40,
      num_steps=2, baselines=["ddim linear"], jit_compile=False)
  assert record["inception_score"] is None is record["inception_score_splits"]
  assert record["fid"] > 0 and "coverage_heldout" not in record
  records_lib.check(record)
  text = records_lib.table([record])
  assert "| KID" in text and "IS" not in text
  for folder, has_score in ((tmp_path, False), (run, True)):
    page = report.report(str(folder))
    with open(page, encoding="utf-8") as f:
      text = f.read()
    assert ('<th scope="col">IS</th>' in text) == has_score
    assert ("coverage held-out a" in text) == has_score
  # What was cached of the real images is the same without logits.
  first, again = (reference_lib.reference(
      features, gaussian_parts["dataset"], quantise=True, cache_dir=str(tmp_path / "c"))
                  for _ in range(2))
  np.testing.assert_array_equal(first.pool, again.pool)
  assert again.logits.shape == (400, 0)


def test_a_file_is_read_without_logits(gaussian_parts, tmp_path):
  gaussian_parts["features"].model.save(tmp_path / "some.keras")
  features = ddss_tf.load_features(str(tmp_path / "some.keras"), logits_layer="none")
  assert list(features(gaussian_parts["dataset"].images[:3])) == ["pool"]


def test_a_saved_model_is_read_without_logits(tmp_path):

  class Pools(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, 4, 4, 1])])
    def __call__(self, images):
      return {"means": tf.reduce_mean(images, [1, 2])}

  tf.saved_model.save(Pools(), str(tmp_path))
  features = ddss_tf.load_features(
      str(tmp_path), pool_layer="means", logits_layer="none", resize="none")
  images = np.linspace(-1, 1, 48, dtype=np.float32).reshape(3, 4, 4, 1)
  assert list(features(images)) == ["pool"]
  np.testing.assert_allclose(
      features(images)["pool"], images.mean((1, 2)), atol=1e-6)
  with pytest.raises(UserError, match="one of its outputs means. Received: 'logits'"):
    ddss_tf.load_features(str(tmp_path), pool_layer="means", resize="none")


def test_few_samples_and_bad_names():
  rng = np.random.default_rng(0)
  real, few = (rng.normal(size=(n, 3)).astype(np.float32) for n in (20, 5))
  measure = heldout_lib.HeldoutMeasures(
      heldout_lib.DEFAULT, [reference_lib.Reference(real, None, None)])
  found = measure([few])
  assert found["coverage_heldout"] == [None] == found["recall_heldout"]
  assert found["sliced_wasserstein_heldout"][0] > 0
  assert heldout_lib.HeldoutMeasures(heldout_lib.DEFAULT, [])([]) == {}
  for names in (["coverage", "fame"], "coverage"):
    with pytest.raises(UserError, match="evaluate.heldout_measures must be a list"):
      heldout_lib.check("evaluate", names)


def test_records_of_before_and_damaged_ones(measured, gaussian_parts):
  run, (record,) = measured
  before = {key: value for key, value in record.items() if not (
      key.endswith("_heldout") and key not in ("fid_heldout", "features_heldout"))}
  assert records_lib.measured_heldout([before]) == []
  assert "coverage" not in records_lib.table([before])
  records_lib.check(before)
  records_lib.check(record)
  with pytest.raises(ValueError, match="one for each of its 'features_heldout'"):
    records_lib.check({**record, "recall_heldout": [0.5]})
  # A record that is known is not measured again.
  networks = [network_lib.FeatureNetwork(
      gaussian_parts["features"].model, name, "pool", None) for name in ("a", "b")]
  assert ddss_tf.evaluate(
      run, **gaussian_parts, heldout_features=networks, num_samples=COUNT, num_steps=3,
      baselines=["ddim linear"], jit_compile=False) == [record]

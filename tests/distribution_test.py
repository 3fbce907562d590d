"""Tests of work over several replicas, on logical CPU devices."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf.errors import UserError
from project import SUPPORT

FOLDER = SUPPORT
SEARCHES = ("one_pass", "two_passes", "elbo", "elbo_in_parts")


def run(folder, extent, *replicas):
  """What searches with these numbers of replicas found.

  In a process of its own, since devices are set up before TensorFlow starts and
  its collectives know one number of replicas, besides one.
  """
  path = os.path.join(folder, "results.npz")
  done = subprocess.run(
      [sys.executable, os.path.join(FOLDER, "distributed_search.py"), path,
       extent, *map(str, replicas)], capture_output=True, text=True, check=False,
      env=dict(os.environ, PYTHONPATH=os.path.dirname(FOLDER)))
  assert done.returncode == 0, done.stderr[-4000:]
  with np.load(path) as file:
    return dict(file)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
  return run(tmp_path_factory.mktemp("few"), "all", 1, 2)


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
  """Those of one replica and of a number of them, and the number."""
  extent, count = request.param
  if extent == "quick":
    return count, run(tmp_path_factory.mktemp("quick"), extent, 1, count)
  few = request.getfixturevalue("few")
  return count, few if count == 2 else {
      **few, **run(tmp_path_factory.mktemp("many"), extent, count)}


counts = pytest.mark.parametrize("results", [
    ("quick", 2), *(pytest.param(("all", count), marks=pytest.mark.slow)
                    for count in (2, 4))], indirect=True)
all_counts = pytest.mark.parametrize(
    "results", [("all", 2), ("all", 4)], indirect=True)


@counts
@pytest.mark.parametrize("search", [
    SEARCHES[0], *(pytest.param(name, marks=pytest.mark.slow)
                   for name in SEARCHES[1:])])
def test_coefficients_do_not_depend_on_the_replicas(results, search):
  count, found = results
  names = {key.split("/")[1] for key in found if key.startswith(search)}
  names -= {"record", "images", "rows"}
  if not names and search != SEARCHES[0]:
    pytest.skip("not among the quick ones")
  assert "times" in names
  for name in names:
    one, other = (found[f"{search}/{name}/{n}"] for n in (1, count))
    # Times of steps: near 1000, float32 is exact to 6e-5.
    np.testing.assert_allclose(
        other, one, rtol=1e-5, atol=1e-4 if name == "times" else 1e-5,
        err_msg=name)


@pytest.mark.slow
@all_counts
def test_replicas_share_the_images_of_the_bound(results):
  count, found = results
  # Of steps, 8 and 3 images; of validation, 4 times 8, and 17.
  for search, sizes in (("elbo", (8, 32)), ("elbo_in_parts", (3, 17))):
    assert set(sizes) <= set(found[f"{search}/rows/1"])
    rows = set(found[f"{search}/rows/{count}"])
    shares = {-(-size // count) for size in sizes}
    assert shares <= rows and not rows & (set(sizes) - shares), (search, rows)


@pytest.mark.slow
def test_the_searches_moved(few):
  # Or nothing would have been compared.
  for one, other in itertools.pairwise(SEARCHES):
    # The bound has next to no gradient in times.
    assert np.abs(few[f"{one}/x0_weights/1"] -
                  few[f"{other}/x0_weights/1"]).max() > 0.01


@counts
def test_metrics_and_images_do_not_depend_on_the_replicas(results):
  count, found = results
  one, other = (json.loads(str(found[f"one_pass/record/{n}"]))
                for n in (1, count))
  for name in ("fid", "kid", "inception_score"):
    np.testing.assert_allclose(other[name], one[name], rtol=1e-3, atol=1e-4)
  assert other["num_samples"] == one["num_samples"] == 101
  # Bytes: a value on the edge between two may round either way.
  images = found["one_pass/images/1"].astype(int)
  difference = np.abs(images - found[f"one_pass/images/{count}"])
  assert images.shape == (7, 4, 4, 1)
  assert difference.max() <= 1 and np.mean(difference > 0) < 0.05


@pytest.mark.slow
@all_counts
def test_a_long_chain_does_not_depend_on_the_replicas(results):
  count, found = results
  images = found["long/images/1"]
  assert images.shape == (5, 4, 4, 1)
  np.testing.assert_allclose(
      found[f"long/images/{count}"], images, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@all_counts
def test_an_export_does_not_depend_on_the_replicas(results):
  count, found = results
  images = found[f"export/images/{count}"]
  assert images.shape == (5, 4, 4, 1) and np.ptp(images.astype(int)) > 20
  assert np.abs(images - found["export/images/1"].astype(int)).max() <= 1
  # Where there is one device, as anywhere that it may be served.
  served = tf.saved_model.load(str(found[f"export/path/{count}"]))
  again = served.signatures["serving_default"](
      seed=tf.constant([3, 0]), batch_size=tf.constant(5))["images"].numpy()
  assert np.abs(images - again.astype(int)).max() <= 1


@pytest.mark.parametrize("options,message", [
    (dict(name="best"), "none, mirrored, multi_worker, tpu.*'best'"),
    (dict(name="mirrored", devices=["GPU:7"]), "among CPU:0.*'GPU:7'"),
])
def test_bad_strategies(options, message):
  with pytest.raises(UserError, match=message):
    distribution.make_strategy(**options)


@pytest.mark.parametrize("config", [
    "", "{", "[]", '{"cluster": {}}',
    '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker"}}',
    '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
    '{"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
])
def test_bad_tf_config(config, monkeypatch):
  monkeypatch.setenv("TF_CONFIG", config)
  with pytest.raises(UserError, match="TF_CONFIG must be as"):
    distribution.make_strategy("multi_worker")


def test_without_a_strategy_nothing_is_split():
  assert distribution.num_replicas() == 1 and distribution.filled(7) == 7

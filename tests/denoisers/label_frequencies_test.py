"""Tests that classes are drawn as often as the data set has them."""

import functools
import json
import os

from absl import logging
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf import zoo
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.reporting import inspection
from ddss_tf.runs import fingerprint
from ddss_tf.runs import records
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.errors import UserError
from conditional_parts import MEANS, NULL, SHAPE, STD, gaussian, make

PAIR = generator_lib.seed_pair(5)
LABELS = np.repeat([0, 2, 3], [10, 30, 60])
SHARES = [0.1, 0, 0.3, 0.6]


def of_labels(labels):
  count = 6 if labels is None else len(labels)
  return dataset_lib.ImageDataset(
      "some", np.zeros([count, *SHAPE], np.float32),
      None if labels is None else np.array(labels), "0")


def drawn(denoiser, count=3000):
  return tf.function(denoiser.draw_labels)(PAIR, tf.range(count)).numpy()


def warnings_of(function, monkeypatch):
  """What a function returns, and the warnings that it logs."""
  lines = []
  with monkeypatch.context() as patch:
    patch.setattr(logging, "warning", lambda line, *values: lines.append(line % values))
    return function(), lines


def test_classes_are_as_frequent_as_in_the_data():
  denoiser = make(null_label=NULL).for_dataset(of_labels(LABELS))
  np.testing.assert_allclose(denoiser.label_weights, SHARES)
  shares = np.bincount(drawn(denoiser), minlength=4) / 3000
  errors = np.sqrt(np.multiply(SHARES, np.subtract(1, SHARES)) / 3000)
  assert np.all(np.abs(shares - SHARES) <= 5 * errors)
  assert denoiser.for_dataset(of_labels([0, 2])) is denoiser  # It is told now.
  assert "drawn as often as told (10.0, 0.0, 30.0, 60.0 %)" in inspection.inspect(
      denoiser=denoiser)


@pytest.mark.parametrize("null,labels", [
    (NULL, [0, 2, 3, 3, 2, 0]), (None, [0, 1, 2, 3])])
def test_classes_of_equal_size_are_drawn_as_without_a_data_set(null, labels):
  """Bit for bit, because records and caches are of these draws."""
  denoiser = make(null_label=null)
  assert denoiser.for_dataset(of_labels(labels)) is denoiser
  # Numbers that are told have draws of their own.
  told = denoiser.with_label_weights([1.0] * 4)
  assert told.key != denoiser.key and np.any(drawn(told) != drawn(denoiser))


def test_what_was_told_and_what_has_no_classes_stays(tmp_path):
  for denoiser in (make(label_weights="uniform"), make(label_weights=[1, 2, 3, 4]),
                   gaussian(0.5)):
    assert denoiser.for_dataset(of_labels(LABELS)) is denoiser
  assert make().for_dataset(of_labels(None)).label_weights is None
  uniform = make(label_weights="uniform")
  assert uniform.key == make().key and uniform.label_weights is None
  np.testing.assert_array_equal(drawn(uniform), drawn(make()))
  uniform.save(str(tmp_path))
  assert ddss_tf.load_denoiser(str(tmp_path)).told_weights == "uniform"
  again = ddss_tf.load_denoiser(str(tmp_path), label_weights=[1, 2, 3, 4])
  assert again.key == make(label_weights=[1, 2, 3, 4]).key
  again.save(str(tmp_path / "b"))
  assert ddss_tf.load_denoiser(str(tmp_path / "b")).key == again.key
  assert "drawn uniformly, as told" in inspection.inspect(denoiser=uniform)
  assert "as often as the data set has them" in inspection.inspect(denoiser=make())
  with pytest.raises(ValueError, match="'uniform' or None. Received: 'even'"):
    make(label_weights="even")
  with pytest.raises(ValueError, match="class-conditional"):
    gaussian(0.5).with_label_weights("uniform")


@pytest.mark.parametrize("labels", [[0, 4], [-1, 2], [0, NULL, 2, 3]])
def test_labels_that_are_no_classes_of_the_network(labels, monkeypatch):
  denoiser = make(null_label=NULL)
  same, lines = warnings_of(
      lambda: denoiser.for_dataset(of_labels(labels)), monkeypatch)
  assert same is denoiser
  (line,) = lines
  assert "do not fit the classes of 'classes', which has 4 with the null label 1" in line
  assert "drawn uniformly" in line and "\n" not in line


def test_classes_without_an_image(monkeypatch):
  denoiser, lines = warnings_of(
      lambda: make(null_label=NULL).for_dataset(of_labels([0, 2, 2])), monkeypatch)
  assert lines == ["1 of the 3 classes of 'classes' have no image in 'some' and are "
                   "never drawn"]
  assert set(drawn(denoiser)) == {0, 2}


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_data_sets_on_disk_have_frequencies(kind, tmp_path):
  labels = [0, 2, 0, 1, 3, 0]
  if kind == "npz":
    np.savez(tmp_path / "a.npz", images=np.zeros([6, *SHAPE], np.uint8), labels=labels)
    name = f"npz:{tmp_path}/a.npz"
  else:
    for i, label in enumerate(labels):
      (tmp_path / str(label)).mkdir(exist_ok=True)
      Image.new("L", (4, 4)).save(tmp_path / str(label) / f"{i}.png")
    name = f"folder:{tmp_path}"
  denoiser = make().for_dataset(ddss_tf.load_dataset(name))
  np.testing.assert_allclose(denoiser.label_weights, np.array([3, 1, 1, 1]) / 6)


@pytest.fixture(scope="module")
def searched(gaussian_parts, tmp_path_factory):
  """A run, and its parts: images of classes that differ in size."""
  rng = np.random.default_rng(0)
  real = (MEANS[LABELS][:, None, None, None]
          + STD * rng.normal(size=(len(LABELS), *SHAPE))).astype(np.float32)
  parts = dict(
      denoiser=make(null_label=NULL), features=gaussian_parts["features"],
      dataset=dataset_lib.ImageDataset(
          "classes", real, LABELS, fingerprint.arrays_sha256([real])))
  run = str(tmp_path_factory.mktemp("frequencies"))
  ddss_tf.search(
      run_dir=run, **parts, num_search_steps=1, batch_size=10, pool_samples=20,
      validation_samples=20, objective="frechet", jit_compile=False,
      sampler=functools.partial(
          families.make_sampler, family="ddim-learned", num_steps=2, init="ddim"))
  return run, parts


@pytest.mark.slow
def test_a_run_draws_as_the_data_set_has_them(searched, tmp_path):
  run, parts = searched
  told = parts["denoiser"].for_dataset(parts["dataset"])
  found = card.read(os.path.join(run, run_dir_lib.SAMPLER))
  assert found.search["label_weights"] == told.label_weights.tolist()
  (record,) = ddss_tf.evaluate(run, **parts, num_samples=40, jit_compile=False)
  assert record["denoiser"] == {**parts["denoiser"].identity, "label_weights":
                                fingerprint.arrays_sha256([told.label_weights])}
  # The figures are those of images whose classes are drawn so.
  images = generator_lib.Generator(told, 40, False).images(found.coefficients, 40, 1234)
  pool = parts["features"](dataset_lib.to_float(dataset_lib.to_uint8(images)))["pool"]
  real = parts["features"](dataset_lib.to_float(
      dataset_lib.to_uint8(parts["dataset"].images)))["pool"]
  np.testing.assert_allclose(
      record["fid"], ddss_tf.metrics.fid(real.numpy(), pool.numpy()), rtol=1e-4)
  # A card with them can be published.
  zoo.add(run, str(tmp_path), "mine")
  assert records.read_records(os.path.join(run, run_dir_lib.METRICS)) == list(
      zoo.load("mine", str(tmp_path)).metrics)


@pytest.mark.slow
def test_samples_are_drawn_as_in_the_search(searched):
  run, parts = searched
  told = parts["denoiser"].for_dataset(parts["dataset"])
  coefficients = card.read(os.path.join(run, run_dir_lib.SAMPLER)).coefficients
  for denoiser, expected in (
      (parts["denoiser"], told), (make(null_label=NULL, label_weights="uniform"),
                                  parts["denoiser"])):
    path = ddss_tf.sample(run, denoiser, num_images=30, seed=3, jit_compile=False)
    with np.load(path) as file:
      np.testing.assert_array_equal(file["images"], dataset_lib.to_uint8(
          generator_lib.Generator(expected, 30, False).images(coefficients, 30, 3)))
  assert np.any(drawn(told, 30) != drawn(parts["denoiser"], 30))
  path = os.path.join(run, run_dir_lib.SAMPLER)
  with open(path) as f:
    text = f.read()
  try:
    with open(path, "w") as f:
      json.dump({**json.loads(text), "search": {"label_weights": [1, 2]}}, f)
    with pytest.raises(UserError, match="search.label_weights: weights must be 4"):
      ddss_tf.sample(run, parts["denoiser"], num_images=2, jit_compile=False)
  finally:
    with open(path, "w") as f:
      f.write(text)

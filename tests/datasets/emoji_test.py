"""Tests of the emoji, which lie beside the package."""

import os

import numpy as np
import pytest

import ddss_tf
from ddss_tf import storage
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.errors import UserError
from project import ROOT

WORLD = os.path.join(ROOT, "worlds", "emoji32")
here = pytest.mark.skipif(not os.path.exists(WORLD), reason="no worlds beside us")


@here
@pytest.mark.slow  # TFDS writes 8 400 PNG files.
def test_emoji_are_the_file_in_order(tfds_dir):
  dataset = ddss_tf.load_dataset("ddss_emoji", data_dir=tfds_dir)
  with np.load(os.path.join(WORLD, "emoji32.npz")) as file:
    np.testing.assert_array_equal(
        dataset_lib.to_uint8(dataset.images), file["image"])
    np.testing.assert_array_equal(dataset.labels, file["label"])
  assert dataset.label_counts(10) == [
      503, 3886, 475, 390, 654, 255, 789, 671, 777, 0]


@here
def test_the_model_is_pytorchs():
  denoiser = ddss_tf.load_denoiser("worlds:emoji32/emoji32-ddpm", null_label=9)
  assert denoiser.prediction == "v" and denoiser.num_classes == 10
  with np.load(os.path.join(WORLD, "emoji32-ddpm", "golden.npz")) as golden:
    np.testing.assert_allclose(
        denoiser.network(golden["x"], golden["t"], golden["class_labels"].astype(int)),
        golden["eps"], atol=1e-4)
  # Classes are drawn as the data has them, and the null label is none of them.
  images = np.zeros([3, 32, 32, 3], np.float32)
  few = dataset_lib.ImageDataset("few", images, np.array([1, 1, 8]), "0")
  np.testing.assert_allclose(
      denoiser.for_dataset(few).label_weights[[1, 8, 9]], [2 / 3, 1 / 3, 0])


def test_a_world_that_is_missing(tmp_path, monkeypatch):
  monkeypatch.setenv("DDSS_TF_WORLDS", str(tmp_path))
  for load in (lambda: ddss_tf.load_denoiser("worlds:emoji32/emoji32-ddpm"),
               lambda: ddss_tf.load_dataset("ddss_emoji", data_dir=str(tmp_path / "d"))):
    with pytest.raises(UserError, match="must be in the folder worlds.*DDSS_TF_WORLDS "
                       f"to it. Received: nothing at {tmp_path}") as error:
      load()
    assert "\n" not in str(error.value)
  (tmp_path / "mine").mkdir()
  assert storage.expanded("worlds:mine") == str(tmp_path / "mine")

"""Tests of the tool that trains the classifier of the emoji."""

import os

import numpy as np
import pytest
import tensorflow as tf

from project import load_tool


@pytest.fixture(scope="module")
def tool():
  return load_tool("train_emoji_classifier")


def test_what_is_held_out_has_others(tool):
  concepts = np.random.default_rng(0).permutation(np.repeat(np.arange(30), [2, 3, 4] * 10))
  learned, held = tool.split(concepts, 15)
  np.testing.assert_array_equal(
      np.sort(np.concatenate([learned, held])), np.arange(len(concepts)))
  assert len(held) == len(set(concepts[held])) == 15
  for concept in concepts[held]:
    assert np.sum(concepts[learned] == concept) >= 2
  with pytest.raises(ValueError, match="at most 20. Received: 21"):
    tool.split(concepts, 21)


def test_moved_images_have_a_white_background(tool):
  images = -tf.ones([4, 32, 32, 3])
  moved = tool.augmentation_lib.augment(
      images, tf.constant([0, 1]), shift=8.0, rotation=0.0, scale=0.0, background=1.0)
  values = np.unique(np.round(moved.numpy(), 5))
  assert values.min() == -1 and values.max() == 1
  # A shift by d pixels along an axis lets a band of about d in.
  assert 0.02 < np.mean(moved.numpy() == 1) < 0.5
  np.testing.assert_allclose(tool.augmentation_lib.augment(
      images, tf.constant([0, 1]), shift=0.0, rotation=0.0, scale=0.0), images)


@pytest.mark.slow
def test_a_stopped_training_goes_on_to_the_same_weights(tool, tmp_path, monkeypatch):
  monkeypatch.setattr(tool, "_BATCH_SIZE", 8)
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (16, 32, 32, 3)).astype(np.float32)
  concepts = rng.integers(0, 3, 16)
  whole = tool.train(images, concepts, 2, str(tmp_path / "whole"), 3)
  examples = tool.examples

  def stopped(images, concepts, epoch):
    if epoch == 1:
      raise KeyboardInterrupt
    return examples(images, concepts, epoch)

  with monkeypatch.context() as patch:
    patch.setattr(tool, "examples", stopped)
    with pytest.raises(KeyboardInterrupt):
      tool.train(images, concepts, 2, str(tmp_path / "parts"), 3)
  assert tool.newest(str(tmp_path / "parts"))[0] == 1
  again = tool.train(images, concepts, 2, str(tmp_path / "parts"), 3)
  for one, other in zip(whole.get_weights(), again.get_weights(), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
  assert os.listdir(tmp_path / "parts") == ["pass_2.keras"]

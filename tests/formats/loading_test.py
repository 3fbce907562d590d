"""Tests of the cache of converted checkpoints."""

import json
import os
import shutil
import sys

import checkpoint_files
import edm_files
import numpy as np
import pytest

import ddss_tf
from ddss_tf.formats import cache as cache_lib
from ddss_tf.formats import diffusers
from ddss_tf.errors import UserError
from model_cache import cache, conversions, entries  # pylint: disable=unused-import

# Fixtures are found by their names.
fake_torch = checkpoint_files.fake_torch
openai = checkpoint_files.openai
state_dict = checkpoint_files.state_dict
warnings = checkpoint_files.warnings


@pytest.fixture
def folder(tmp_path):
  """A diffusers folder, conditional."""
  path = str(tmp_path / "net")
  checkpoint_files.write_folder(path, "diffusers_classes")
  return path


def test_second_load_converts_nothing(folder, cache, conversions, tmp_path):
  first = ddss_tf.load_denoiser(folder, cache_dir=cache)
  again = ddss_tf.load_denoiser(folder, cache_dir=cache)
  assert conversions == [folder]
  assert (again.name, again.sha256, again.num_classes, again.prediction) == (
      first.name, first.sha256, first.num_classes, first.prediction)
  np.testing.assert_array_equal(again.schedule.betas, first.schedule.betas)
  for ours, theirs in zip(first.model.weights, again.model.weights):
    np.testing.assert_array_equal(ours, theirs)
    assert not theirs.value.trainable
  # A copy of another name is the same network, under its own name.
  other = str(tmp_path / "other")
  shutil.copytree(folder, other)
  copy = ddss_tf.load_denoiser(other, cache_dir=cache)
  assert conversions == [folder] and copy.name == "other"
  # Guidance is not part of the conversion.
  guided = ddss_tf.load_denoiser(
      folder, cache_dir=cache, null_label=4, guidance_scale=2.0)
  assert conversions == [folder] and guided.key != first.key


@pytest.mark.slow
def test_other_content_is_converted(folder, cache, conversions):
  ddss_tf.load_denoiser(folder, cache_dir=cache)
  path = os.path.join(folder, diffusers.SCHEDULER)
  with open(path) as f:
    scheduler = json.load(f)
  with open(path, "w") as f:
    json.dump({**scheduler, "beta_end": 0.019}, f)
  changed = ddss_tf.load_denoiser(folder, cache_dir=cache)
  assert len(conversions) == len(entries(cache)) == 2
  np.testing.assert_allclose(changed.schedule.betas[-1], 0.019)
  # Nothing is taken for a truncated file.
  path = os.path.join(folder, diffusers.WEIGHTS)
  with open(path, "r+b") as f:
    f.truncate(os.path.getsize(path) - 1)
  with pytest.raises(UserError, match="not a complete safetensors file"):
    ddss_tf.load_denoiser(folder, cache_dir=cache)
  assert len(entries(cache)) == 2


@pytest.mark.slow
def test_damaged_cache_is_mended(folder, cache, conversions, warnings):
  first = ddss_tf.load_denoiser(folder, cache_dir=cache)
  [entry] = entries(cache)
  network = os.path.join(cache, "denoisers", entry, "network.keras")
  with open(network, "r+b") as f:
    f.truncate(os.path.getsize(network) // 2)
  again = ddss_tf.load_denoiser(folder, cache_dir=cache)
  assert again.sha256 == first.sha256
  assert len(warnings) == 1 and "converted again" in warnings[0]
  ddss_tf.load_denoiser(folder, cache_dir=cache)
  assert len(conversions) == 2 and len(warnings) == 1


def test_cache_that_cannot_be_written(folder, tmp_path, warnings):
  blocked = tmp_path / "file"
  blocked.write_text("not a folder")
  denoiser = ddss_tf.load_denoiser(folder, cache_dir=str(blocked))
  assert denoiser.num_classes == 5
  assert len(warnings) == 1 and "cannot be kept" in warnings[0]
  assert blocked.read_text() == "not a folder"


def test_where_the_cache_is(folder, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  monkeypatch.delenv("DDSS_TF_CACHE")
  assert cache_lib.default_cache_dir() == str(tmp_path / "xdg" / "ddss_tf")
  monkeypatch.setenv("DDSS_TF_CACHE", str(tmp_path / "own"))
  ddss_tf.load_denoiser(folder)
  assert len(entries(tmp_path / "own")) == 1
  monkeypatch.setenv("DDSS_TF_CACHE", "")
  ddss_tf.load_denoiser(folder)
  assert len(entries(tmp_path / "own")) == 1


def test_pytorch_is_needed_once(state_dict, cache, monkeypatch):
  first = ddss_tf.load_denoiser(state_dict, cache_dir=cache)
  # None there makes `import torch` fail.
  monkeypatch.setitem(sys.modules, "torch", None)
  assert ddss_tf.load_denoiser(
      state_dict, cache_dir=cache).sha256 == first.sha256
  # Another argument is another network.
  with pytest.raises(UserError, match="PyTorch must be installed"):
    ddss_tf.load_denoiser(state_dict, cache_dir=cache, image_size=16)


@pytest.mark.slow
def test_what_was_told_is_kept(tmp_path, cache):
  path, _ = edm_files.write(tmp_path, "edm_song")
  told = {"name": "geometric", "sigma_min": 0.01, "sigma_max": 40.0}
  plain = ddss_tf.load_denoiser(path, cache_dir=cache)
  first, again, other = (
      ddss_tf.load_denoiser(path, cache_dir=cache, schedule={
          **told, "num_train_steps": steps}) for steps in (90, 90, 91))
  assert first.sha256 == again.sha256
  assert len({plain.sha256, first.sha256, other.sha256}) == 3
  assert len(entries(cache)) == 3
  assert again.convention == first.convention
  np.testing.assert_array_equal(again.schedule.sigmas, first.schedule.sigmas)

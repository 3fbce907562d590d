"""Sampler cards on disk."""

import os

import pytest

from ddss_tf.samplers import card


def test_full_disk_loses_nothing(finished, monkeypatch):
  path = os.path.join(finished[0], "sampler.json")
  with open(path) as f:
    before = f.read()

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(OSError, match="No space left"):
    card.write(path, card.read(path))
  with open(path) as f:
    assert f.read() == before
  assert not [n for n in os.listdir(finished[0]) if n.endswith("sampler.json")
              and n != "sampler.json"]

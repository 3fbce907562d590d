"""The cache of converted models, and what was converted for it."""

import os

import pytest

from ddss_tf.formats import load as loading


@pytest.fixture
def cache(tmp_path):
  return str(tmp_path / "cache")


def entries(cache):
  return sorted(os.listdir(os.path.join(cache, "denoisers")))


@pytest.fixture
def conversions(monkeypatch):
  """The paths of the models that were converted."""
  paths = []
  find = loading.find_format

  def counting(path):
    found = find(path)

    def counted(path, given):
      paths.append(path)
      return found.read(path, given)

    return found._replace(read=counted) if found and found.kept else found

  monkeypatch.setattr(loading, "find_format", counting)
  return paths

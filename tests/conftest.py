"""What all tests share."""

import os

# Before TensorFlow is imported, or it has no effect.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest

from ddss_tf import data


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory) -> str:
  """A folder for prepared data sets that no other run has touched."""
  return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="session")
def digits(tfds_dir) -> data.ImageDataset:
  """The 10 000 digits, 16x16."""
  return data.load_dataset(
      "ddss_digits", pad=2, downsample=2, data_dir=tfds_dir)

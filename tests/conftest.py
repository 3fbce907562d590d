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


@pytest.fixture(scope="session")
def gaussian_parts():
  """Denoiser, data set and features of 4x4 Gaussian images."""
  import keras  # pylint: disable=g-import-not-at-top
  import numpy as np  # pylint: disable=g-import-not-at-top
  import ddss_tf  # pylint: disable=g-import-not-at-top
  from ddss_tf import data  # pylint: disable=g-import-not-at-top
  from ddss_tf import features as features_lib  # pylint: disable=g-import-not-at-top
  from ddss_tf import fingerprint  # pylint: disable=g-import-not-at-top

  shape = (4, 4, 1)
  keras.utils.set_random_seed(0)
  rng = np.random.default_rng(0)
  images = (0.3 + 0.25 * rng.normal(size=(400, *shape))).astype(np.float32)
  inputs = keras.Input(shape)
  # Large weights: features must see the spread of the pixels, not their mean.
  large = keras.initializers.RandomNormal(stddev=1.0, seed=0)
  x = keras.layers.Conv2D(
      16, 2, activation="relu", kernel_initializer=large)(inputs)
  x = keras.layers.Flatten()(x)
  x = keras.layers.Dense(12, activation="relu", name="pool",
                         kernel_initializer=large)(x)
  model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))
  return dict(
      denoiser=ddss_tf.gaussian_denoiser(shape, mean=0.3, std=0.25),
      dataset=data.ImageDataset(
          "gaussian", images, None, fingerprint.arrays_sha256([images])),
      features=features_lib.FeatureNetwork(model, "random"))


@pytest.fixture
def main_in_process():
  """Runs the command line here: a process of its own would import TensorFlow.

  Called with the arguments of a command, without the program.
  """
  from absl import flags  # pylint: disable=g-import-not-at-top
  import gin  # pylint: disable=g-import-not-at-top
  from ddss_tf import main  # pylint: disable=g-import-not-at-top

  def run(arguments):
    gin.clear_config()
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["main", *arguments])
    try:
      main.main(["main"])
    finally:
      gin.clear_config()
      flags.FLAGS.unparse_flags()
      for name in ("gin_file", "gin_param", "run_dir", "mode", "dry_run"):
        flags.FLAGS[name].unparse()

  return run

"""Small parts of a search, of which everything is known: Gaussian images."""

import keras
import numpy as np

import ddss_tf
from ddss_tf import data
from ddss_tf import features as features_lib
from ddss_tf import fingerprint

SHAPE = (4, 4, 1)


def make() -> dict:
  """Denoiser, data set and features of 4x4 Gaussian images, by their names."""
  keras.utils.set_random_seed(0)
  rng = np.random.default_rng(0)
  images = (0.3 + 0.25 * rng.normal(size=(400, *SHAPE))).astype(np.float32)
  inputs = keras.Input(SHAPE)
  # Large weights: features must see the spread of the pixels, not their mean.
  large = keras.initializers.RandomNormal(stddev=1.0, seed=0)
  x = keras.layers.Conv2D(
      16, 2, activation="relu", kernel_initializer=large)(inputs)
  x = keras.layers.Flatten()(x)
  x = keras.layers.Dense(12, activation="relu", name="pool",
                         kernel_initializer=large)(x)
  model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))
  return dict(
      denoiser=ddss_tf.gaussian_denoiser(SHAPE, mean=0.3, std=0.25),
      dataset=data.ImageDataset(
          "gaussian", images, None, fingerprint.arrays_sha256([images])),
      features=features_lib.FeatureNetwork(model, "random"))

"""Small parts of a search on Gaussian images, of which everything is known."""

import os

import keras
import numpy as np

import ddss_tf
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.features import network as network_lib
from ddss_tf.runs import fingerprint

SHAPE = (4, 4, 1)


def make() -> dict:
  """Denoiser, data set and features of 4x4 Gaussian images, by their names."""
  keras.utils.set_random_seed(0)
  rng = np.random.default_rng(0)
  images = (0.3 + 0.25 * rng.normal(size=(400, *SHAPE))).astype(np.float32)
  inputs = keras.Input(SHAPE)
  # With large weights the features show the spread of the pixels, not only
  # their mean.
  large = keras.initializers.RandomNormal(stddev=1.0, seed=0)
  x = keras.layers.Conv2D(
      16, 2, activation="relu", kernel_initializer=large)(inputs)
  x = keras.layers.Flatten()(x)
  x = keras.layers.Dense(12, activation="relu", name="pool",
                         kernel_initializer=large)(x)
  model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))
  return dict(
      denoiser=ddss_tf.gaussian_denoiser(SHAPE, mean=0.3, std=0.25),
      dataset=dataset_lib.ImageDataset(
          "gaussian", images, None, fingerprint.arrays_sha256([images])),
      features=network_lib.FeatureNetwork(model, "random"))


# A run with these parts by the command line, which takes seconds.
_CONFIG = """
DENOISER = @denoiser/gin.singleton()
denoiser/gin.singleton.constructor = @gaussian_denoiser
gaussian_denoiser.image_shape = (4, 4, 1)
gaussian_denoiser.mean = 0.3
gaussian_denoiser.std = 0.25

DATASET = @dataset/gin.singleton()
dataset/gin.singleton.constructor = @load_dataset
load_dataset.name = "npz:{folder}/images.npz"

FEATURES = @features/gin.singleton()
features/gin.singleton.constructor = @load_features
load_features.path = "{folder}/features.keras"

NUM_STEPS = 2
search.denoiser = %DENOISER
search.dataset = %DATASET
search.features = %FEATURES
search.sampler = @searched/make_sampler
searched/make_sampler.family = "ggdm+pred+time"
searched/make_sampler.num_steps = %NUM_STEPS
searched/make_sampler.init = "ddpm"
search.num_search_steps = 12
search.batch_size = 16
search.pool_samples = 80
search.validation_samples = 64
search.validate_every = 4
search.checkpoint_every = 4
search.log_every = 2
search.jit_compile = False

evaluate.denoiser = %DENOISER
evaluate.dataset = %DATASET
evaluate.features = %FEATURES
evaluate.num_samples = 40
evaluate.jit_compile = False
evaluate.baselines = [@baseline/make_sampler]
baseline/make_sampler.family = "ddim"
baseline/make_sampler.num_steps = %NUM_STEPS

export.denoiser = %DENOISER
sample.denoiser = %DENOISER
sample.num_images = 5
sample.jit_compile = False
"""


def save(folder: str) -> str:
  """Writes the parts, and a gin file of a run with them; gives its path."""
  parts = make()
  np.savez(os.path.join(folder, "images.npz"),
           images=np.clip(parts["dataset"].images, -1, 1))
  parts["features"].model.save(os.path.join(folder, "features.keras"))
  path = os.path.join(folder, "gaussian.gin")
  with open(path, "w") as f:
    f.write(_CONFIG.format(folder=folder))
  return path

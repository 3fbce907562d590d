"""Makes a SavedModel with the interface of TF-GAN's Inception, random weights.

It serves tests and rehearsals without the trained weights. It is a full-size
Inception (Keras's InceptionV3, close to the graph of 2015 but not equal to it)
that maps images [B, 299, 299, 3] in [-1, 1] to {"pool_3": [B, 2048], "logits":
[B, 1008]}. What it measures is not the FID of any paper.

Kernels are He-normal from a seed. Signals of an Inception with random kernels
fade or grow. So the statistics of its batch normalisations are set to those of
some smooth random images, and over these the 1008 logits are scaled to a
standard deviation of 1. The tool ends with status 1 if the features of fresh
images hardly differ.

Example:
  python tools/make_random_inception.py --output_dir=/tmp/random_inception
"""

import sys

from absl import app
from absl import flags
import keras
import numpy as np
import tensorflow as tf

from ddss_tf.features import hub
from ddss_tf.features import keras_models
from ddss_tf.networks.frozen import frozen_variables

_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Folder of the SavedModel.", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "Of the weights.", 0)

SIZE = hub.INCEPTION_SIZE
CLASSES = 1008
# The smallest standard deviation of features over images, as a share of their
# mean, with which they tell images apart.
_LEAST_SPREAD = 0.05


class RandomInception(tf.Module):
  """Callable on float32 [B, 299, 299, 3] in [-1, 1], as TF-GAN's is.

  Args:
    seed: the seed of the weights.
  """

  def __init__(self, seed: int = 0):
    super().__init__()
    with frozen_variables():
      base = keras.applications.InceptionV3(
          weights=None, include_top=False, input_shape=(SIZE, SIZE, 3),
          pooling="avg")
      logits = keras.layers.Dense(CLASSES, name="logits")
      self.model = keras.Model(base.inputs, [base.output, logits(base.output)])
      keras_models.randomise(self.model, seed)
      keras_models.calibrate(self.model, "[-1, 1]", seed)
    images = keras_models.smooth_images(8, (SIZE, SIZE), seed)
    values = self.model(images, training=False)[1].numpy()
    # The logits are centred. Otherwise the class that the mean feature prefers
    # would win for every image.
    scale = 1 / values.std(axis=0).mean()
    logits.kernel.assign(scale * logits.kernel)
    logits.bias.assign(-scale * values.mean(axis=0))

  @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3])])
  def __call__(self, images):
    pool, logits = self.model(images, training=False)
    return {"pool_3": pool, "logits": logits}


def spread(outputs) -> dict[str, float]:
  """Mean over features of the standard deviation over images, and of |x|."""
  return {f"{key} {name}": float(value) for key in ("pool_3", "logits")
          for name, value in (
              ("std", np.mean(np.std(outputs[key], axis=0))),
              ("mean", np.mean(np.abs(outputs[key]))))}


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  module = RandomInception(_SEED.value)
  tf.saved_model.save(module, _OUTPUT_DIR.value,
                      signatures={"serving_default": module.__call__})
  values = spread(tf.saved_model.load(_OUTPUT_DIR.value)(
      keras_models.smooth_images(16, (SIZE, SIZE), _SEED.value + 1)))
  for name, value in values.items():
    print(f"{name}: {value:.4f}")
  if values["pool_3 std"] < _LEAST_SPREAD * values["pool_3 mean"]:
    sys.exit("the features hardly differ between images: try another seed")


if __name__ == "__main__":
  app.run(main)

"""Trains the two digit classifiers whose features come with the package.

They share the data only. Architecture, seed and augmentation differ, so that a
sampler trained on the features of one can be judged by the other.

Example:
  python tools/train_digit_features.py --network=digits_cnn
"""

import json
import os
import sys

from absl import app
from absl import flags
import keras
from keras import layers
import numpy as np
import tensorflow as tf

import augmentation as augmentation_lib
from ddss_tf.datasets import load as data
from ddss_tf.features import load as features_lib
from ddss_tf.features import network as network_lib
from ddss_tf.runs import fingerprint

_ASSETS = os.path.join(os.path.dirname(__file__), "..", "ddss_tf", "features",
                       "assets")
_NUM_TRAIN = 9000
_BATCH_SIZE = 64
_MIN_ACCURACY = 0.98

_NETWORK = flags.DEFINE_multi_enum(
    "network", ["digits_cnn", "digits_resnet"],
    ["digits_cnn", "digits_resnet"], "What to train.")
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", _ASSETS, "Folder of the .keras and .json files.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS keeps prepared data sets.")
_EPOCHS = flags.DEFINE_integer("epochs", 30, "Passes over the data.", 1)


def digits_cnn() -> keras.Model:
  """A network of plain convolutions with 128 features."""
  x = images = keras.Input((16, 16, 1), name="images")
  for i, (width, stride) in enumerate(
      [(32, 1), (64, 2), (64, 1), (96, 2), (128, 1)]):
    x = layers.Conv2D(width, 3, stride, "same", activation="silu",
                      name=f"conv_{i}")(x)
  x = layers.GlobalAveragePooling2D(name="pool")(x)
  return keras.Model(
      images, layers.Dense(10, name="logits")(x), name="digits_cnn")


def digits_resnet() -> keras.Model:
  """A network of residual blocks after a wide kernel, with 96 features."""
  images = keras.Input((16, 16, 1), name="images")
  x = layers.Conv2D(24, 5, padding="same", name="stem")(images)
  for i, (width, stride) in enumerate([(32, 2), (64, 2), (96, 1)]):
    block = f"block_{i}"
    y = layers.Activation("gelu", name=f"{block}_activation_1")(x)
    y = layers.Conv2D(width, 3, stride, "same", name=f"{block}_conv_1")(y)
    y = layers.Activation("gelu", name=f"{block}_activation_2")(y)
    # Before training each block equals its shortcut, so no normalisation is
    # needed.
    y = layers.Conv2D(width, 3, padding="same", kernel_initializer="zeros",
                      name=f"{block}_conv_2")(y)
    x = layers.Conv2D(width, stride, stride, name=f"{block}_shortcut")(x)
    x = layers.Add(name=f"{block}_sum")([x, y])
  x = layers.Activation("gelu", name="activation")(x)
  x = layers.GlobalAveragePooling2D(name="pool")(x)
  return keras.Model(
      images, layers.Dense(10, name="logits")(x), name="digits_resnet")


# By name: the builder, the seed, and the augmentation's largest shift (pixels
# of 32), rotation (radians) and relative change of scale.
_RECIPES = {
    "digits_cnn": (digits_cnn, 1, dict(shift=3.0, rotation=0.0, scale=0.0)),
    "digits_resnet": (
        digits_resnet, 2, dict(shift=1.5, rotation=0.2, scale=0.15)),
}


def halve(images: tf.Tensor) -> tf.Tensor:
  """Averages blocks of 2x2 pixels."""
  return tf.nn.avg_pool2d(images, 2, 2, "VALID")


def train(name: str, images: np.ndarray, labels: np.ndarray) -> keras.Model:
  """Trains one network.

  Args:
    name: a key of `_RECIPES`.
    images: float32 [N, 32, 32, 1] in [-1, 1]; the network sees them halved in
      size.
    labels: int64 [N].

  Returns:
    The network, uncompiled.
  """
  build, seed, augmentation = _RECIPES[name]
  keras.utils.set_random_seed(seed)
  model = build()
  steps = len(images) // _BATCH_SIZE
  examples = tf.data.Dataset.from_tensor_slices((images, labels))
  examples = examples.shuffle(len(images), seed=seed).repeat()
  examples = tf.data.Dataset.zip(
      tf.data.Dataset.counter(), examples.batch(_BATCH_SIZE))
  examples = examples.map(lambda step, batch: (
      halve(augmentation_lib.augment(
          batch[0], tf.stack([seed, step]), **augmentation)),
      batch[1])).prefetch(2)
  model.compile(
      keras.optimizers.AdamW(
          keras.optimizers.schedules.CosineDecay(
              0.0, steps * _EPOCHS.value, warmup_target=2e-3,
              warmup_steps=steps), weight_decay=0.02),
      keras.losses.SparseCategoricalCrossentropy(from_logits=True),
      metrics=["accuracy"])
  model.fit(examples, epochs=_EPOCHS.value, steps_per_epoch=steps, verbose=2,
            shuffle=False)
  trained = build()  # Without the optimizer, which would double the file.
  trained.set_weights(model.get_weights())
  return trained


def accuracy(features: network_lib.FeatureNetwork, images: np.ndarray,
             labels: np.ndarray) -> float:
  """Share of digits [N, 16, 16, 1] whose largest logit is their label's."""
  predicted = np.argmax(features(images)["logits"], axis=1)
  return float(np.mean(predicted == labels))


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  tf.config.experimental.enable_op_determinism()
  full = data.load_dataset("ddss_digits", pad=2, data_dir=_DATA_DIR.value)
  small = data.load_dataset(
      "ddss_digits", pad=2, downsample=2, data_dir=_DATA_DIR.value)
  failed = False
  for name in _NETWORK.value:
    model = train(name, full.images[:_NUM_TRAIN], full.labels[:_NUM_TRAIN])
    held_out = accuracy(network_lib.FeatureNetwork(model, name),
                        small.images[_NUM_TRAIN:], small.labels[_NUM_TRAIN:])
    print(f"{name}: held-out accuracy {held_out:.4f}", flush=True)
    if held_out < _MIN_ACCURACY:
      print(f"{name}: not written, must be at least {_MIN_ACCURACY}")
      failed = True
      continue
    os.makedirs(_OUTPUT_DIR.value, exist_ok=True)
    path = os.path.join(_OUTPUT_DIR.value, name)
    model.save(f"{path}.keras")
    command = f"python tools/train_digit_features.py --network={name}"
    if _EPOCHS.value != _EPOCHS.default:
      command += f" --epochs={_EPOCHS.value}"
    with open(f"{path}.json", "w", encoding="utf-8") as f:
      json.dump({
          "sha256": fingerprint.arrays_sha256(model.get_weights()),
          "held_out_accuracy": held_out,
          "trained_by": command,
          "seed": _RECIPES[name][1],
      }, f, indent=1)
      f.write("\n")
    features_lib.load_features(f"{path}.keras")  # Checks what was written.
  sys.exit(1 if failed else 0)


if __name__ == "__main__":
  app.run(main)

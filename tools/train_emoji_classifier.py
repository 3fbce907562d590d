"""Trains the classifier of emoji by whose features samplers are judged.

It tells the concepts of the emoji apart ("green_apple"), each drawn by up to three
vendors. It has nothing in common with EfficientNet-Lite0, the network of the loss,
neither architecture nor data. A tenth of the images, whose concepts all have others,
is left out and judges it. A skin tone of a person may be left out while others of
the same drawing are not, so the accuracy says little of new drawings. A run that was
stopped goes on after its last pass, to the same weights.

Example:
  nice python tools/train_emoji_classifier.py --state=runs/emoji_classifier
"""

import json
import os
import re

from absl import app
from absl import flags
import keras
from keras import layers
import numpy as np
import tensorflow as tf

import augmentation as augmentation_lib
from ddss_tf import storage
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.datasets.ddss_emoji import ddss_emoji_dataset_builder as emoji
from ddss_tf.features import load as features_lib
from ddss_tf.runs import fingerprint

NAME = "emoji_resnet"
_WORLD = os.path.join(os.path.dirname(__file__), "..", "worlds", "emoji32")
_BATCH_SIZE = 64
_HELD_OUT = 840
_SEED = 3
_AUGMENTATION = dict(shift=2.0, rotation=0.15, scale=0.1, background=1.0)

_STATE = flags.DEFINE_string(
    "state", None, "Folder of the training's state, to go on from. Needed.")
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", _WORLD, "Folder of the .keras and .json files.")
_EPOCHS = flags.DEFINE_integer("epochs", 16, "Passes over the data.", 1)
_THREADS = flags.DEFINE_integer("threads", 1, "CPU threads of TensorFlow.", 1)


def build(num_concepts: int) -> keras.Model:
  """Residual blocks with batch normalisation and 128 features.

  Args:
    num_concepts: the number of classes.

  Returns:
    A model from images [B, 32, 32, 3] in [-1, 1] to logits [B, num_concepts].
  """
  images = keras.Input((32, 32, 3), name="images")
  x = layers.Conv2D(24, 3, padding="same", name="stem")(images)
  for i, width in enumerate((32, 64, 128)):
    x = _block(x, width, f"block_{i}")
  x = layers.BatchNormalization(name="norm")(x)
  x = layers.Activation("relu", name="activation")(x)
  x = layers.GlobalAveragePooling2D(name="pool")(x)
  return keras.Model(
      images, layers.Dense(num_concepts, name="logits")(x), name=NAME)


def _block(x, width, name):
  """Two convolutions beside a shortcut; both halve the sides."""
  y = x
  for i, stride in enumerate((2, 1)):
    y = layers.BatchNormalization(name=f"{name}_norm_{i}")(y)
    y = layers.Activation("relu", name=f"{name}_activation_{i}")(y)
    y = layers.Conv2D(width, 3, stride, "same", name=f"{name}_conv_{i}")(y)
  x = layers.AveragePooling2D(2, name=f"{name}_halved")(x)
  x = layers.Conv2D(width, 1, name=f"{name}_shortcut")(x)
  return layers.Add(name=f"{name}_sum")([x, y])


def read(path: str) -> tuple[np.ndarray, np.ndarray]:
  """Images float32 [N, 32, 32, 3] in [-1, 1], and concepts int64 [N]."""
  arrays = storage.read_arrays(path)
  _, concepts = np.unique(arrays["concept"], return_inverse=True)
  return dataset_lib.to_float(arrays["image"]), concepts.astype(np.int64)


def split(concepts: np.ndarray, held_out: int) -> tuple[np.ndarray, np.ndarray]:
  """Which images are learned, and which are held out.

  Args:
    concepts: int [N].
    held_out: how many to hold out.

  Returns:
    Two arrays of positions, increasing. At most one image of a concept is held out,
    and only of those that have two more.

  Raises:
    ValueError: there are not so many such concepts.
  """
  order = np.random.default_rng(_SEED).permutation(len(concepts))
  _, first, counts = np.unique(concepts[order], return_index=True, return_counts=True)
  chosen = np.sort(first[counts >= 3])[:held_out]
  if len(chosen) < held_out:
    raise ValueError(f"held_out must be at most {len(chosen)}. Received: {held_out}")
  held = np.sort(order[chosen])
  return np.setdiff1d(np.arange(len(concepts)), held), held


def examples(images: np.ndarray, concepts: np.ndarray, epoch: int) -> tf.data.Dataset:
  """The batches of one pass, which depend on its number only."""
  order = np.random.default_rng([_SEED, epoch]).permutation(len(images))
  steps = len(images) // _BATCH_SIZE
  rows = tf.data.Dataset.from_tensor_slices(
      order[:steps * _BATCH_SIZE].reshape(steps, _BATCH_SIZE))
  images, concepts = tf.constant(images), tf.constant(concepts)
  return tf.data.Dataset.zip(tf.data.Dataset.range(steps), rows).map(
      lambda step, chosen: (augmentation_lib.augment(
          tf.gather(images, chosen), tf.stack([epoch, step]), **_AUGMENTATION),
                            tf.gather(concepts, chosen))).prefetch(2)


def newest(folder: str) -> tuple[int, str | None]:
  """How many passes are done, and the file with the state after them."""
  found = {int(match[1]): os.path.join(folder, match[0])
           for name in (storage.listdir(folder) if storage.isdir(folder) else ())
           if (match := re.fullmatch(r"pass_(\d+)\.keras", name))}
  done = max(found, default=0)
  return done, found.get(done)


def train(images: np.ndarray, concepts: np.ndarray, epochs: int, state: str,
          num_concepts: int) -> keras.Model:
  """Trains the network, from the newest state on.

  Args:
    images: float32 [N, 32, 32, 3] in [-1, 1].
    concepts: int [N].
    epochs: passes in all.
    state: folder of the states.
    num_concepts: the number of classes.

  Returns:
    The network, uncompiled.
  """
  done, path = newest(state)
  if path:
    model = keras.saving.load_model(path)
  else:
    keras.utils.set_random_seed(_SEED)
    model = build(num_concepts)
    steps = len(images) // _BATCH_SIZE
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                0.0, steps * epochs, warmup_target=3e-3, warmup_steps=steps),
            weight_decay=0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"])
  for epoch in range(done, epochs):
    model.fit(examples(images, concepts, epoch), initial_epoch=epoch,
              epochs=epoch + 1, verbose=2, shuffle=False)
    with storage.replacing(os.path.join(state, f"pass_{epoch + 1}.keras")) as temporary:
      model.save(temporary)
    if path:
      storage.remove(path)
    path = os.path.join(state, f"pass_{epoch + 1}.keras")
  trained = build(num_concepts)  # Without the optimizer, which would triple the file.
  trained.set_weights(model.get_weights())
  return trained


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  if not _STATE.value:
    raise app.UsageError("--state must name a folder")
  tf.config.threading.set_intra_op_parallelism_threads(_THREADS.value)
  tf.config.threading.set_inter_op_parallelism_threads(_THREADS.value)
  tf.config.experimental.enable_op_determinism()
  images, concepts = read(storage.expanded(emoji.FILE))
  learned, held = split(concepts, _HELD_OUT)
  model = train(images[learned], concepts[learned], _EPOCHS.value, _STATE.value,
                int(concepts.max()) + 1)
  path = os.path.join(_OUTPUT_DIR.value, NAME)
  storage.makedirs(_OUTPUT_DIR.value, exist_ok=True)
  if storage.exists(f"{path}.json"):
    storage.remove(f"{path}.json")  # It is of earlier weights.
  model.save(f"{path}.keras")
  features = features_lib.load_features(f"{path}.keras")
  found = np.concatenate([np.argmax(features(images[held[i:i + 120]])["logits"], axis=1)
                          for i in range(0, len(held), 120)])
  accuracy = float(np.mean(found == concepts[held]))
  print(f"{NAME}: accuracy on {len(held)} images held out {accuracy:.4f}", flush=True)
  command = "python tools/train_emoji_classifier.py --state=runs/emoji_classifier"
  if _EPOCHS.value != _EPOCHS.default:
    command += f" --epochs={_EPOCHS.value}"
  with open(f"{path}.json", "w", encoding="utf-8") as f:
    json.dump({
        "sha256": fingerprint.arrays_sha256(model.get_weights()),
        "held_out_accuracy": accuracy, "held_out_images": len(held),
        "concepts": int(concepts.max()) + 1, "trained_by": command, "seed": _SEED,
    }, f, indent=1)
    f.write("\n")
  features_lib.load_features(f"{path}.keras")  # Checks what was written.


if __name__ == "__main__":
  app.run(main)

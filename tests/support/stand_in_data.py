"""Small files that stand in for data sets which need a download."""

import numpy as np
import tensorflow_datasets as tfds


def random_bytes(*shape, seed=2):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def prepare(folder, name, config, image_shape, labelled):
  """Writes files where TFDS's own builder expects those of the real data set.

  Returns:
    The images, uint8 [H, W, C], of several sizes if the real set has several.
  """
  full_name = name if config is None else f"{name}/{config}"
  builder = tfds.builder(full_name, data_dir=folder, try_gcs=False)
  features = {"image": tfds.features.Image(
      shape=image_shape, encoding_format="png")}
  if name == "downsampled_imagenet":
    image_shape = (64, 64, 3)
  shapes = [image_shape] * 3
  if None in image_shape:
    shapes = [(300, 256, 3), (256, 341, 3), (256, 256, 3)]
  # Values keep away from 0 and 255, because Pillow clips between its passes and
  # tf.image.resize does not.
  images = [random_bytes(*shape, seed=i) // 2 + 64
            for i, shape in enumerate(shapes)]
  examples = [{"image": image} for image in images]
  if labelled:
    features["label"] = tfds.features.ClassLabel(num_classes=10)
    for i, example in enumerate(examples):
      example["label"] = i + 4
  tfds.dataset_builders.store_as_tfds_dataset(
      name=name, config=config, version=str(builder.version), data_dir=folder,
      features=tfds.features.FeaturesDict(features),
      split_datasets={"train": list(enumerate(examples))},
      disable_shuffling=True)
  return images

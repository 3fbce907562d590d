"""Importing this package registers the data set `ddss_emoji` with TFDS."""

from ddss_tf.datasets.ddss_emoji.ddss_emoji_dataset_builder import Builder

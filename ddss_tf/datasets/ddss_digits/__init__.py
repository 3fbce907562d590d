"""Importing this package registers the data set `ddss_digits` with TFDS."""

from ddss_tf.datasets.ddss_digits.ddss_digits_dataset_builder import Builder

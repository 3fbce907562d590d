"""A tiny CLIP of KerasHub with random weights, and its tokenizer."""

import numpy as np

SIZE, LENGTH, WIDTH = 8, 7, 6
# Letters, letters at the end of a word, two merged words; the end is the largest.
VOCABULARY = {token: i for i, token in enumerate([
    "c", "a", "t", "c</w>", "a</w>", "t</w>", "at</w>", "cat</w>", "d", "o", "g",
    "g</w>", "og</w>", "dog</w>", "<|startoftext|>", "<|endoftext|>"])}
MERGES = ["a t</w>", "c at</w>", "o g</w>", "d og</w>"]
START, END = 14, 15


def backbone(seed=1):
  """A `CLIPBackbone` whose weights are drawn by NumPy."""
  import keras_hub  # pylint: disable=g-import-not-at-top
  models = keras_hub.models
  sizes = dict(hidden_dim=8, num_layers=1, num_heads=2, intermediate_dim=16)
  network = models.CLIPBackbone(
      models.CLIPVisionEncoder(patch_size=4, image_shape=(SIZE, SIZE, 3), **sizes),
      models.CLIPTextEncoder(
          vocabulary_size=len(VOCABULARY), embedding_dim=8,
          max_sequence_length=LENGTH, **sizes),
      projection_dim=WIDTH)
  rng = np.random.default_rng(seed)
  for v in network.weights:
    if np.issubdtype(v.dtype, np.floating):
      v.assign(rng.standard_normal(v.shape) * 0.5 + v.path.endswith("gamma"))
  return network


def tokenizer():
  import keras_hub  # pylint: disable=g-import-not-at-top
  return keras_hub.models.CLIPTokenizer(VOCABULARY, MERGES)

"""Tiny models of KerasHub with random weights, and tokenizers of few words.

Import this only where KerasHub is installed.
"""

import keras_hub
from keras_hub.src.models.vae.vae_backbone import VAEBackbone
import numpy as np

TOKENS = 8
# "a", "cat" and "dog" are words; other texts of their letters are spelt.
_WORDS = ["a</w>", "cat</w>", "dog</w>", "c", "a", "t", "d", "o", "g", "at</w>",
          "t</w>", "og</w>", "g</w>", "o</w>", "<|startoftext|>",
          "<|endoftext|>"]
_MERGES = ["a t</w>", "c at</w>", "o g</w>", "d og</w>"]


def fill(model, seed, scale=0.5):
  """Random weights without zeros: a new network's biases would hide faults."""
  rng = np.random.default_rng(seed)
  for v in model.weights:
    width = np.sqrt(np.prod(v.shape[:-1])) if len(v.shape) > 1 else 1
    value = scale * rng.standard_normal(v.shape) / width
    # Gains of normalisations are around 1.
    v.assign(value + (v.path.endswith(("gamma", "scale"))))


def make_backbone(dtype=None, clip_widths=(8, 8), t5=None, **changes):
  """A `StableDiffusion3Backbone` of images of 32 x 48, with new weights."""
  # KerasHub's decoder has 32 groups, so 32 is its least width.
  vae = VAEBackbone([32] * 4, [1] * 4, [32] * 4, [1] * 4,
                    sampler_method="mode", dtype=dtype)

  def clip(name, activation, width):
    return keras_hub.models.CLIPTextEncoder(
        vocabulary_size=len(_WORDS), embedding_dim=width, hidden_dim=width,
        num_layers=2, num_heads=2, intermediate_dim=8,
        intermediate_activation=activation, intermediate_output_index=-2,
        max_sequence_length=TOKENS, dtype=dtype, name=name)

  return keras_hub.models.StableDiffusion3Backbone(**{**dict(
      mmdit_patch_size=2, mmdit_hidden_dim=16, mmdit_num_layers=1,
      mmdit_num_heads=2, mmdit_position_size=8, mmdit_qk_norm=None,
      mmdit_dual_attention_indices=None, vae=vae,
      clip_l=clip("clip_l", "quick_gelu", clip_widths[0]),
      clip_g=clip("clip_g", "gelu", clip_widths[1]), t5=t5,
      image_shape=(32, 48, 3), shift=2.5, dtype=dtype), **changes})


def filled_backbone(**options):
  """The same with random weights everywhere, texts that differ included."""
  model = make_backbone(**options)
  fill(model.diffuser, 1)
  # Of the context's 4096 numbers, most are zeros.
  fill(model.vae.decoder, 2, 1.0)
  for i, encoder in enumerate((model.clip_l, model.clip_g)):
    fill(encoder, 3 + i, 2.0)
  return model


def make_task(backbone):
  """A `StableDiffusion3TextToImage` with tokenizers."""
  vocabulary = {word: i for i, word in enumerate(_WORDS)}

  def preprocessor(name, pad_with_end_token):
    return keras_hub.models.CLIPPreprocessor(
        keras_hub.models.CLIPTokenizer(
            vocabulary, _MERGES, pad_with_end_token=pad_with_end_token,
            config_file=f"{name}_tokenizer.json"),
        sequence_length=TOKENS, to_lower=False,
        config_file=f"{name}_preprocessor.json")

  return keras_hub.models.StableDiffusion3TextToImage(
      backbone, keras_hub.models.StableDiffusion3TextToImagePreprocessor(
          preprocessor("clip_l", True), preprocessor("clip_g", False)))

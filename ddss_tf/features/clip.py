"""The CLIP score: how well generated images fit the prompts that they were told.

CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020) maps images and texts
to vectors, near each other where a text fits an image. The score of an image is
100 max(cos, 0) of its vector and its prompt's. Hessel et al. (2021,
https://arxiv.org/abs/2104.08718) have the same with 2.5 in place of 100.

KerasHub has the network. It is an optional dependency, which is imported only
when `load_clip` or `Clip` is called.
"""

import json
import os
from typing import Mapping, Sequence

from absl import logging
import gin
import numpy as np
import tensorflow as tf

from ddss_tf import bindings
from ddss_tf import distribution
from ddss_tf import errors
from ddss_tf import storage
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError, shape_text
from ddss_tf.networks import files as network_files
from ddss_tf.networks import keras_hub
from ddss_tf.networks.frozen import frozen_variables
from ddss_tf.runs import fingerprint

# The mean and deviation, in RGB of [0, 1], that OpenAI and OpenCLIP train with.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_TEXTS_AT_A_TIME = 64
_KEYS = ("prompts", "token_ids")  # Of a file of tokens.


class Clip:
  """A frozen CLIP, with all that is done to images and texts before it.

  Images are clipped to [-1, 1] and resized by Pillow's bicubic rule, with
  antialias, until the shorter side is that of the network; the middle square is
  kept. Nothing is rounded on the way, so the score has a gradient, under XLA too.

  Args:
    backbone: a `CLIPBackbone` of KerasHub; it is frozen.
    name: what results call it.
    tokenizer: a `CLIPTokenizer` of KerasHub; None: prompts are looked up in
      `token_ids`.
    token_ids: tokens by prompt, with those of start and end. The network reads a
      text where its largest token stands, so this must be the end. None: the
      tokenizer makes them.
    mean: three numbers, subtracted from RGB in [0, 1].
    std: three numbers, by which what remains is divided.

  Attributes:
    backbone: the network.
    size: height and width of the images that the network sees.
    protocol: in words, what happens to images and texts before the network.
    sha256: hash of the weights.
    key: hash of weights, architecture and preprocessing.

  Raises:
    UserError: KerasHub is not installed, `backbone` is something else or has
      weights that are not finite, or there are both tokenizer and tokens or
      neither; mean or std are not three numbers, or a std is not above 0.
  """

  def __init__(self, backbone, name: str = "clip", tokenizer=None,
               token_ids: Mapping[str, Sequence[int]] | None = None,
               mean: Sequence[float] = MEAN, std: Sequence[float] = STD):
    if not isinstance(backbone, keras_hub.library("the CLIP score").models.CLIPBackbone):
      raise UserError("the network of a CLIP score must be a CLIPBackbone of "
                      f"KerasHub. Received: {type(backbone).__name__}")
    _check_one(name, tokenizer, token_ids)
    network_files.check_finite(f"clip {name!r}", backbone)
    backbone.trainable = False
    self.backbone = backbone
    self.name = name
    self._tokenizer, self._token_ids = tokenizer, token_ids
    self._mean, self._std = _three("mean", mean), _three("std", std)
    if np.min(self._std) <= 0:
      raise UserError(f"std of clip {name!r} must be above 0. Received: {std}")
    self.size = backbone.vision_encoder.image_shape[0]
    text = backbone.text_encoder
    self._length, self._vocabulary = text.max_sequence_length, text.vocabulary_size
    self.protocol = (
        f"KerasHub CLIPBackbone: images clipped to [-1, 1], 1 channel repeated to 3, "
        f"bicubic, half-pixel centres, antialias, the middle {self.size}x{self.size} "
        f"of shorter side {self.size}, clipped to [0, 1], mean {_shown(self._mean)}, "
        f"std {_shown(self._std)}; texts in lower case, cut to {self._length} tokens")
    self.sha256 = fingerprint.arrays_sha256(backbone.get_weights())
    # Weights do not tell an activation, nor the number of heads.
    self.key = fingerprint.text_sha256(json.dumps([
        self.sha256, self.protocol, _architecture(backbone.vision_encoder),
        _architecture(text)]))

  @property
  def identity(self) -> dict[str, str]:
    """How results name it: "name", "sha256", "protocol", "key"."""
    return {"name": self.name, "sha256": self.sha256, "protocol": self.protocol,
            "key": self.key}

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    """The tokens of texts, int32 [N, L], L the longest text of the network.

    A text that is too long loses its end, but not the token of the end.

    Raises:
      UserError: no tokens are given for a text; or tokens are none, more than L,
        or not of the network's vocabulary.
    """
    if self._tokenizer is None:
      lost = [prompt for prompt in prompts if prompt not in self._token_ids]
      if lost:
        raise UserError(
            f"the tokens of clip {self.name!r} must be of all {len(prompts)} "
            f"prompts. Received: none of {lost[0][:80]!r}, and {len(lost)} lost")
      texts, pad = [self._token_ids[prompt] for prompt in prompts], 0
    else:
      own = self._tokenizer
      texts = own([prompt.lower() for prompt in prompts])
      texts = texts.to_list() if hasattr(texts, "to_list") else texts
      texts = [[own.start_token_id, *text[:self._length - 2], own.end_token_id]
               for text in texts]
      pad = own.pad_token_id
    result = np.full([len(prompts), self._length], pad, np.int32)
    for row, prompt, text in zip(result, prompts, texts):
      text = np.asarray(text)
      if (text.ndim != 1 or not 0 < len(text) <= self._length
          or not np.issubdtype(text.dtype, np.integer)
          or text.min() < 0 or text.max() >= self._vocabulary):
        raise UserError(
            f"tokens of clip {self.name!r} must be 1 to {self._length} whole numbers "
            f"from 0 to {self._vocabulary - 1}. Received: {str(text)[:80]} for "
            f"{prompt[:80]!r}")
      row[:len(text)] = text
    return result

  def text_embeddings(self, token_ids: tf.Tensor) -> tf.Tensor:
    """The directions of texts, float32 [B, D] of length 1.

    Args:
      token_ids: int32 [B, L], see `tokens`.
    """
    return _direction(self.backbone.get_text_embeddings(token_ids))

  def image_embeddings(self, images: tf.Tensor) -> tf.Tensor:
    """The directions of images, float32 [B, D] of length 1; differentiable.

    Args:
      images: float [B, H, W, 1 or 3], meant in [-1, 1].

    Raises:
      UserError: images of another shape.
    """
    return _direction(self.backbone.get_vision_embeddings(
        self.preprocessed(images)))

  def preprocessed(self, images: tf.Tensor) -> tf.Tensor:
    """What the network sees of images, float32 [B, size, size, 3].

    See `image_embeddings` for the argument, and what is raised.
    """
    images = tf.cast(tf.convert_to_tensor(images), tf.float32)
    if images.shape.rank != 4 or images.shape[-1] not in (1, 3) or (
        None in images.shape[1:]):
      raise UserError(f"images for clip {self.name!r} must be [B, H, W, 1 or 3]. "
                      f"Received: {shape_text(images.shape)}")
    images = 0.5 * tf.clip_by_value(images, -1.0, 1.0) + 0.5
    height, width = images.shape[1:3]
    shorter = min(height, width)
    # Two products of matrices, because XLA has no resize with antialias.
    rows, columns = (
        _resize_matrix(side, self.size * side // shorter, self.size)
        for side in (height, width))
    for rule, matrix in (("jw,bhwc->bhjc", columns), ("ih,bhjc->bijc", rows)):
      # Pillow's bytes cut off what the cubic overshoots after either pass.
      images = tf.clip_by_value(tf.einsum(rule, matrix, images), 0.0, 1.0)
    if images.shape[-1] == 1:
      images = tf.repeat(images, 3, axis=-1)
    return (images - self._mean) / self._std

  def scores(self, images: tf.Tensor, texts: tf.Tensor) -> tf.Tensor:
    """The scores of images for a text each, float32 [B] in [0, 100].

    Args:
      images: see `image_embeddings`.
      texts: float32 [B, D], see `text_embeddings`.
    """
    cos = tf.reduce_sum(self.image_embeddings(images) * texts, axis=-1)
    return tf.maximum(100.0 * cos, 0.0)


class PromptScores:
  """Scores images for the prompts of a table's rows.

  Args:
    clip: the network.
    denoiser: the network that is told the prompts.

  Attributes:
    identity: that of the clip, and "token_ids", a hash of the prompts' tokens.

  Raises:
    UserError: see `check`; or see `Clip.tokens`.
  """

  def __init__(self, clip: Clip, denoiser: Denoiser):
    prompts = check(clip, denoiser)
    self._tokens = clip.tokens(prompts)
    self.identity = {**clip.identity, "token_ids": fingerprint.arrays_sha256(
        [self._tokens])}
    self._texts = np.empty([len(prompts), clip.backbone.projection_dim], np.float32)
    self._known = np.zeros([len(prompts)], bool)
    self._embed = distribution.row_wise(clip.text_embeddings)
    self._score = distribution.row_wise(clip.scores)

  def __call__(self, images: tf.Tensor, rows: np.ndarray) -> np.ndarray:
    """The scores of images for the prompts of their rows, float32 [B].

    Args:
      images: float32 [B, H, W, C] in [-1, 1].
      rows: int [B], rows of the table.
    """
    fresh = np.unique(rows[~self._known[rows]])
    for start in range(0, len(fresh), _TEXTS_AT_A_TIME):
      some = fresh[start:start + _TEXTS_AT_A_TIME]
      # Always as many, because a new shape means a new trace.
      filled = np.resize(some, [_TEXTS_AT_A_TIME])
      self._texts[some] = self._embed(
          tf.constant(self._tokens[filled])).numpy()[:len(some)]
      self._known[some] = True
    return self._score(images, tf.constant(self._texts[rows])).numpy()


def check(clip: Clip, denoiser: Denoiser) -> tuple[str, ...]:
  """Checks that a CLIP score can be measured, and gives the prompts.

  Raises:
    UserError: `clip` is something else, the denoiser is not told prompts, or its
      images have neither 1 nor 3 channels.
  """
  if not isinstance(clip, Clip):
    raise UserError("clip must be what load_clip gives. "
                    f"Received: {type(clip).__name__}")
  table = denoiser.table
  if table is None or table.prompts is None:
    received = "a table without prompts" if table is not None else (
        "no table" if denoiser.num_classes is None else
        f"{denoiser.num_classes} classes, which have no texts")
    raise UserError(
        f"the CLIP score needs prompts: denoiser {denoiser.name!r} must have a "
        f"table with them (load_denoiser.conditions). Received: {received}")
  if denoiser.image_shape[2] not in (1, 3):
    raise UserError("the CLIP score needs images of 1 or 3 channels. Received: "
                    f"{denoiser.image_shape[2]} of {denoiser.name!r}")
  return table.prompts


@bindings.register
def load_clip(path: str = gin.REQUIRED, token_ids: str | None = None) -> Clip:
  """Loads a CLIP for the column "CLIP" of `evaluate` and `compare`.

  Args:
    path: the folder of a preset of KerasHub's `CLIPBackbone`, as
      `save_to_preset` writes it, with `~` for the home folder; or what else
      KerasHub's `from_preset` takes, such as "clip_vit_base_patch32", which
      KerasHub downloads once. Weights are read as float32. Mean and deviation
      of the images are those of the preset's image converter, or CLIP's own.
    token_ids: an `.npz` file with `prompts` [N], texts, and `token_ids` [N, L],
      the tokens of each with start and end, filled up with zeros. It is for a
      preset without a tokenizer. None: the preset has one.

  Returns:
    The network, frozen.

  Raises:
    UserError: in one line, KerasHub is not installed, the preset is missing,
      damaged or of another network; it has no tokenizer and there are no tokens,
      or it has one and there are tokens; or the file of tokens is damaged.
  """
  library = keras_hub.library("the CLIP score")
  path, token_ids = map(storage.expanded, (path, token_ids))
  # The weights come last: all other faults are cheaper to find.
  tokens = None if token_ids is None else _read_tokens(token_ids)
  tokenizer = _of_preset(library.models.CLIPTokenizer, path, "tokenizer.json")
  converter = _of_preset(
      library.layers.CLIPImageConverter, path, "image_converter.json")
  _check_one(path, tokenizer, tokens)
  rules = {}
  if converter is not None:  # It maps [0, 255] by x scale + offset.
    scale = 1.0 if converter.scale is None else converter.scale
    offset = 0.0 if converter.offset is None else converter.offset
    rules["std"] = np.broadcast_to(1 / (255 * np.asarray(scale)), [3])
    rules["mean"] = -np.asarray(offset) * rules["std"]
  name = os.path.basename(os.path.normpath(path)) if storage.isdir(path) else path
  with frozen_variables():
    backbone = _of_preset(library.models.CLIPBackbone, path, dtype="float32")
  clip = Clip(backbone, name, tokenizer, tokens, **rules)
  logging.info("clip %s: %s", name, clip.protocol)
  return clip


def _check_one(name, tokenizer, token_ids) -> None:
  """Refuses both a tokenizer and tokens, and neither of them."""
  if (tokenizer is None) == (token_ids is None):
    raise UserError(
        f"clip {name!r} must have a tokenizer in its preset, or else tokens by prompt "
        "(load_clip.token_ids). Received: "
        f"{'neither' if tokenizer is None else 'both'}")


def _of_preset(kind, path, file=None, **options):
  """A part of a preset; None if it is one that need not be there, and is not."""
  try:
    return kind.from_preset(path, **options)
  except Exception as error:  # KerasHub raises many kinds.
    if file is not None and isinstance(error, FileNotFoundError) and (
        not storage.exists(os.path.join(path, file))):
      return None
    raise UserError(
        "clip must be the folder or the name of a whole preset of KerasHub's "
        f"CLIPBackbone. Received: {path!r} ({type(error).__name__}: "
        f"{errors.one_line(error)})") from error


def _read_tokens(path: str) -> dict[str, np.ndarray]:
  """Tokens by prompt, of a file of `load_clip`."""
  try:
    arrays = storage.read_arrays(path)
    prompts, tokens = (arrays[key] for key in _KEYS)
    if (prompts.ndim != 1 or prompts.dtype.kind != "U" or tokens.ndim != 2
        or tokens.dtype.kind not in "iu" or len(prompts) != len(tokens)):
      raise ValueError(
          f"prompts of {prompts.dtype} {list(prompts.shape)} and token_ids of "
          f"{tokens.dtype} {list(tokens.shape)}")
  except (ValueError, KeyError) as error:
    raise UserError(
        f"load_clip.token_ids must be a file .npz with prompts, texts [N], and "
        f"token_ids, whole numbers [N, L]. Received: {path!r} "
        f"({errors.one_line(error)})") from error
  return dict(zip(prompts.tolist(), tokens))


def _three(what, values) -> np.ndarray:
  """Three finite numbers, float32 [3]."""
  try:
    result = np.asarray(values, np.float32)
  except (TypeError, ValueError):
    result = np.zeros([0], np.float32)
  if result.shape != (3,) or not np.all(np.isfinite(result)):
    raise UserError(f"{what} of a clip must be three numbers. Received: {values!r}")
  return result


def _shown(values) -> str:
  return f"({', '.join(f'{value:.6g}' for value in values)})"


def _architecture(encoder) -> dict:
  """What fixes an encoder beside its weights, as JSON has it."""
  return {key: value for key, value in sorted(encoder.get_config().items())
          if key not in ("name", "dtype", "trainable")}


def _direction(vectors) -> tf.Tensor:
  return tf.math.l2_normalize(tf.cast(vectors, tf.float32), axis=-1)


def _resize_matrix(size: int, new: int, kept: int) -> np.ndarray:
  """The matrix of Pillow's bicubic resize along one side, then of a crop.

  The kernel is that of Keys (1981) with a = -1/2, as wide as a new pixel where
  the image becomes smaller; at the edges its weights are scaled to the sum 1.

  Args:
    size: pixels of the image.
    new: pixels of the resized image.
    kept: pixels of the middle that is kept.

  Returns:
    float32 [kept, size].
  """
  centres = (np.arange(new) + 0.5) * size / new - 0.5
  x = np.abs(np.arange(size) - centres[:, None]) / max(size / new, 1.0)
  weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1,
                     np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))
  weights /= np.sum(weights, axis=1, keepdims=True)
  first = (new - kept) // 2
  return weights[first:first + kept].astype(np.float32)

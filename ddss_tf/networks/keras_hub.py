"""Stable Diffusion 3's network and decoder, as the library KerasHub has them.

Esser et al. (2024, https://arxiv.org/abs/2403.03206) call the network MMDiT:
tokens of the latents and of the prompt go through blocks of their own and meet
in joint attention. KerasHub is an optional dependency. Only this module imports
it, and only when it is used.

A model is its `StableDiffusion3Backbone`, or a task with one, which has the
tokenizers of the text encoders as well.
"""

import dataclasses
import os
from typing import Mapping, Sequence

import keras
import numpy as np

from ddss_tf import errors
from ddss_tf.networks import layers
from ddss_tf.errors import UserError
from ddss_tf.networks.frozen import frozen_variables

# See `layers.check_sizes`. "width" is heads times channels of a head.
_MOST = {"image_size": 2**13, "in_channels": 2**13, "patch_size": 2**8,
         "num_layers": 2**8, "num_heads": 2**10, "width": 2**14,
         "position_size": 2**12, "context_width": 2**16, "pooled_width": 2**16,
         "mlp_ratio": 2**6}


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
  """Everything that fixes the architecture and its arithmetic.

  Attributes:
    image_size: height and width of `x_t`, multiples of `patch_size`.
    in_channels: channels of `x_t` and of the prediction.
    patch_size: height and width of the square that becomes one token.
    num_layers: number of blocks.
    num_heads: heads of every attention layer.
    head_channels: channels of one head; a token has as many as all heads
      together.
    position_size: rows and columns of the learned table of positions, of which
      the middle is used: at least as many as `x_t` has patches.
    context_width: channels of a token of the prompt.
    pooled_width: numbers that the whole prompt has beside its tokens.
    query_key_norm: whether queries and keys are normalised, as in version 3.5.
    dual_attention: the blocks, counted from 0, whose latents attend to
      themselves once more, as some in version 3.5.
    mlp_ratio: width of the MLPs' hidden layer, in units of that of a token.
  """

  image_size: tuple[int, int]
  in_channels: int
  patch_size: int
  num_layers: int
  num_heads: int
  head_channels: int
  position_size: int
  context_width: int
  pooled_width: int
  query_key_norm: bool = False
  dual_attention: tuple[int, ...] = ()
  mlp_ratio: float = 4.0

  @property
  def conditions(self) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
    """Name and shape of the inputs after `x_t` and `t`; None: any number."""
    return (("context", (None, self.context_width)),
            ("pooled", (self.pooled_width,)))


def require() -> None:
  """Checks that KerasHub can be imported.

  Raises:
    UserError: it cannot; the message says how to install it.
  """
  library()


def library(use: str = "Stable Diffusion 3"):
  """KerasHub itself.

  Args:
    use: what it is needed for, for the message.

  Raises:
    UserError: it cannot be imported; the message says how to install it.
  """
  try:
    import keras_hub  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise UserError(
        f"KerasHub must be installed for {use} (pip install ddss_tf[kerashub]). "
        f"Received: {errors.one_line(error)}") from error
  return keras_hub


def _mmdit_class():
  """KerasHub's class of the network, which it offers under no public name."""
  require()
  from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT  # pylint: disable=g-import-not-at-top
  return MMDiT


def build_mmdit(config: MMDiTConfig, name: str = "mmdit") -> keras.Model:
  """Builds the network `[x_t, t, context, pooled] -> u`, with random weights.

  Args:
    config: the architecture.
    name: name of the model.

  Returns:
    A functional model to float32 [B, H, W, in_channels], the velocity
    u = eps - x0 of a flow. Its inputs are `x_t`, float [B, H, W, in_channels],
    which is (1 - s) x0 + s eps; `t`, float [B], 1000 s for published networks;
    `context`, float [B, N, context_width], N tokens of the prompt, any number;
    and `pooled`, float [B, pooled_width].

  Raises:
    UserError: KerasHub is not installed.
    ValueError: the image size is not such a multiple, or has more patches than
      the table of positions; a block of `dual_attention` does not exist; a size
      is below 1, or larger than any network has.
  """
  mmdit = _mmdit_class()
  height, width = _checked(config)
  return of_mmdit(mmdit(
      patch_size=config.patch_size,
      hidden_dim=config.num_heads * config.head_channels,
      num_layers=config.num_layers,
      num_heads=config.num_heads,
      position_size=config.position_size,
      mlp_ratio=config.mlp_ratio,
      latent_shape=(height, width, config.in_channels),
      context_shape=(None, config.context_width),
      pooled_projection_shape=(config.pooled_width,),
      qk_norm="rms_norm" if config.query_key_norm else None,
      dual_attention_indices=config.dual_attention,
      data_format="channels_last"), name)


def _checked(config: MMDiTConfig) -> tuple[int, int]:
  """Height and width of `x_t`; raises what `build_mmdit` raises."""
  width = config.num_heads * config.head_channels
  layers.check_sizes(
      {key: width if key == "width" else getattr(config, key)
       for key in _MOST}, _MOST)
  size = config.image_size
  if len(size) != 2 or any(side % config.patch_size for side in size):
    raise ValueError(
        f"image_size must be height and width, multiples of "
        f"{config.patch_size}, the patch_size. Received: image_size={size}")
  most = config.position_size * config.patch_size
  if max(size) > most:
    raise ValueError(
        f"image_size must be at most {most}, as there are positions for "
        f"{config.position_size} patches. Received: image_size={size}")
  if any(not 0 <= i < config.num_layers for i in config.dual_attention):
    raise ValueError(
        f"dual_attention must name blocks from 0 to {config.num_layers - 1}. "
        f"Received: {config.dual_attention}")
  return size


def of_mmdit(mmdit, name: str = "mmdit") -> keras.Model:
  """The network of `build_mmdit` around an `MMDiT` of KerasHub.

  Args:
    mmdit: that object. The network has its layers, not copies of them. Those of
      the time compute in float32 from now on, whatever its policy. In bfloat16
      a time of 857 would be rounded to a multiple of 4, and its gradient would
      mean nothing.
    name: name of the model.
  """
  for layer in mmdit.timestep_embedding._flatten_layers():  # pylint: disable=protected-access
    layer.dtype_policy = "float32"
  x = keras.Input(mmdit.latent_shape, name="x_t")
  t = keras.Input((), name="t")
  context = keras.Input(mmdit.context_shape, name="context")
  pooled = keras.Input(mmdit.pooled_projection_shape, name="pooled")
  # As a plain model, because an MMDiT in a file has one policy for all layers.
  inner = keras.Model(mmdit.input, mmdit.output, name="mmdit")
  u = inner({
      "latent": x, "context": context, "pooled_projection": pooled,
      "timestep": keras.layers.Reshape(
          (1,), dtype="float32", name="time_input")(t)})
  # It tells the shape, which KerasHub leaves open, and leaves in float32.
  u = keras.layers.Reshape(mmdit.latent_shape, dtype="float32",
                           name="velocity")(u)
  return keras.Model([x, t, context, pooled], u, name=name)


def backbone_of(model):
  """The `StableDiffusion3Backbone` of a model of KerasHub.

  Args:
    model: the backbone itself, or a task with it.

  Raises:
    UserError: KerasHub is not installed, or `model` is something else.
  """
  models = library().models
  backbone = model.backbone if isinstance(model, models.Task) else model
  if not isinstance(backbone, models.StableDiffusion3Backbone):
    raise UserError("a model of KerasHub must be a StableDiffusion3Backbone, or a "
                    f"task with one. Received: {type(model).__name__}")
  return backbone


def of_backbone(model) -> tuple[keras.Model, MMDiTConfig]:
  """The network of a model of KerasHub.

  Args:
    model: see `backbone_of`, with or without weights of a preset. Network and
      model share layers, see `of_mmdit`.

  Returns:
    The network, see `build_mmdit`, and its architecture.

  Raises:
    UserError: see `backbone_of`.
  """
  mmdit = backbone_of(model).diffuser
  height, width, channels = mmdit.latent_shape
  return of_mmdit(mmdit), MMDiTConfig(
      image_size=(height, width),
      in_channels=channels,
      patch_size=mmdit.patch_size,
      num_layers=mmdit.num_layers,
      num_heads=mmdit.num_heads,
      head_channels=mmdit.hidden_dim // mmdit.num_heads,
      position_size=mmdit.position_size,
      context_width=mmdit.context_shape[-1],
      pooled_width=mmdit.pooled_projection_shape[-1],
      query_key_norm=mmdit.qk_norm is not None,
      dual_attention=tuple(mmdit.dual_attention_indices),
      mlp_ratio=float(mmdit.mlp_ratio))


def decoder_of_backbone(model) -> tuple[keras.Model, float, float]:
  """The decoder of a model of KerasHub, copied and in float32.

  A copy, because the model's own is tied to all the rest of the model, text
  encoders included, which could then never be given back. In float16, in which
  presets may be saved, small gradients would be lost.

  Args:
    model: see `backbone_of`.

  Returns:
    A functional model from latents, float [B, h, w, c], to images, float32
    [B, H, W, C], nominally in [-1, 1]; `scale` and `shift`: its input is
    z / scale + shift for the latents z of the network.

  Raises:
    UserError: see `backbone_of`.
  """
  backbone = backbone_of(model)
  source = backbone.vae.decoder
  latents = keras.Input(backbone.latent_shape[1:], name="latents")
  with frozen_variables():
    decoder = type(source).from_config(
        {**source.get_config(), "dtype": "float32"})
    # Keras keeps arguments, and the backbone's own list of sizes knows all of it.
    images = keras.layers.Reshape(tuple(backbone.image_shape), name="images",
                                  dtype="float32")(decoder(latents))
  for variable, value in zip(decoder.weights, source.weights, strict=True):
    variable.assign(value)
  rescaling = backbone.latent_rescaling
  return (keras.Model(latents, images, name="decoder"),
          float(rescaling.scale), float(rescaling.offset))


def load_preset(folder: str, texts: bool, latent_size: tuple[int, int] | None):
  """Reads a preset, with frozen variables.

  Args:
    folder: the folder that `save_to_preset` of a backbone or a task wrote.
    texts: whether its tokenizers are read, too.
    latent_size: height and width of the latents; None: those of the preset.

  Returns:
    A backbone, or a `StableDiffusion3TextToImage` with `texts`. Its network is
    in float32, its text encoders are in what KerasHub takes for them.

  Raises:
    UserError: KerasHub is not installed.
    Exception: of many kinds, if the folder is not a complete preset.
  """
  models = library().models
  options = {} if latent_size is None else {
      "image_shape": (*(8 * side for side in latent_size), 3)}
  kind = (models.StableDiffusion3TextToImage if texts
          else models.StableDiffusion3Backbone)
  with frozen_variables():
    # An absolute path is never taken for the name of a preset on the internet.
    return kind.from_preset(os.path.abspath(folder), dtype="float32", **options)


Tokens = Mapping[str, np.ndarray]


def encode(model, prompts: Sequence[str] | Tokens,
           negative_prompt: str | Tokens | None,
           batch_size: int = 8) -> dict[str, np.ndarray]:
  """What the text encoders of a model of KerasHub say of prompts.

  Args:
    model: see `backbone_of`. Texts need a task with its preprocessor.
    prompts: N texts; or their token ids by the encoders' names, "clip_l",
      "clip_g" and, if there is one, "t5": whole numbers [N, tokens].
    negative_prompt: a text or token ids [1, tokens], likewise; None: none.
    batch_size: prompts that are encoded at once.

  Returns:
    "context", float32 [M, tokens, context_width], and "pooled", float32
    [M, pooled_width], with M = N without a negative prompt. With one M is N + 1,
    and the last row is the negative prompt's.

  Raises:
    UserError: see `backbone_of`; the prompts are not these, or the model has no
      tokenizers.
  """
  backbone = backbone_of(model)
  tokens = _tokens("prompts", model, prompts)
  negative = tokens if negative_prompt is None else _tokens(
      "negative_prompt", model,
      [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt)
  (count,) = {len(value) for value in tokens.values()}
  first = _tensors(negative, 0, 1)
  context, pooled = [], []
  for start in range(0, count, batch_size):
    given, null, given_pooled, null_pooled = backbone.encode_text_step(
        _tensors(tokens, start, start + batch_size), first)
    context.append(given)
    pooled.append(given_pooled)
  if negative_prompt is not None:
    context.append(null)
    pooled.append(null_pooled)
  return {
      name: np.concatenate([np.asarray(value, np.float32) for value in values])
      for name, values in (("context", context), ("pooled", pooled))}


def _tensors(tokens, start, end):
  """Some rows of token ids. Keras takes no arrays beside tensors."""
  return {name: keras.ops.convert_to_tensor(value[start:end])
          for name, value in tokens.items()}


def _tokens(what, model, prompts) -> dict[str, np.ndarray]:
  """Texts or token ids as int32 [N, tokens] by the names of the encoders."""
  backbone = backbone_of(model)
  names = ["clip_l", "clip_g"] + ["t5"] * (backbone.t5 is not None)
  if not isinstance(prompts, Mapping):
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(text, str) for text in prompts):
      raise UserError(f"{what} must be texts, at least one. Received: {prompts!r}")
    preprocessor = None if model is backbone else model.preprocessor
    if preprocessor is None:
      raise UserError(
          f"{what} must be token ids by {', '.join(names)} for a model without "
          f"tokenizers, a {type(model).__name__}. Received: {prompts[0]!r}")
    prompts = preprocessor.generate_preprocess(prompts)
  arrays = {name: np.asarray(value) for name, value in prompts.items()}
  if sorted(arrays) != sorted(names) or any(
      value.ndim != 2 or not value.size or value.dtype.kind not in "iu"
      for value in arrays.values()) or (
          len({len(value) for value in arrays.values()}) != 1):
    raise UserError(
        f"{what} must be texts, or token ids by {', '.join(names)}, whole numbers "
        "[N, tokens]. Received: " + ", ".join(
            f"{name} {value.dtype} {list(value.shape)}"
            for name, value in arrays.items()))
  return {name: value.astype(np.int32) for name, value in arrays.items()}

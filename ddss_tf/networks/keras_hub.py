"""Stable Diffusion 3's network and decoder, as the library KerasHub has them.

Esser et al. (2024, https://arxiv.org/abs/2403.03206) call the network MMDiT:
tokens of the latents and of the prompt go through blocks of their own and meet
in joint attention. KerasHub is an optional dependency. Only this module imports
it, and only when it is used.
"""

import dataclasses

import keras

from ddss_tf import errors
from ddss_tf.networks import layers
from ddss_tf.errors import UserError

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
  _classes()


def _classes():
  """KerasHub's classes of the network and of the whole model."""
  # pylint: disable=g-import-not-at-top
  try:
    from keras_hub.models import StableDiffusion3Backbone
    # The package offers it under no public name.
    from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT
  except ImportError as error:
    raise UserError(
        "KerasHub must be installed for Stable Diffusion 3 (pip install "
        f"ddss_tf[kerashub]). Received: {errors.one_line(error)}") from error
  return MMDiT, StableDiffusion3Backbone


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
  mmdit, _ = _classes()
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


def of_backbone(backbone) -> tuple[keras.Model, MMDiTConfig]:
  """The network of a `StableDiffusion3Backbone` of KerasHub.

  Args:
    backbone: that object, with or without weights of a preset. Network and
      backbone share layers, see `of_mmdit`.

  Returns:
    The network, see `build_mmdit`, and its architecture.

  Raises:
    UserError: KerasHub is not installed, or `backbone` is something else.
  """
  _check_backbone(backbone)
  mmdit = backbone.diffuser
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


def decoder_of_backbone(backbone) -> tuple[keras.Model, float, float]:
  """The decoder of a `StableDiffusion3Backbone` of KerasHub.

  Args:
    backbone: see `of_backbone`.

  Returns:
    A functional model from latents, float [B, h, w, c], to images, float32
    [B, H, W, C], nominally in [-1, 1]; `scale` and `shift`: the model's input
    is z / scale + shift for the latents z of the network.

  Raises:
    UserError: see `of_backbone`.
  """
  _check_backbone(backbone)
  latents = keras.Input(backbone.latent_shape[1:], name="latents")
  images = keras.layers.Reshape(
      backbone.image_shape, dtype="float32", name="images")(
          backbone.vae.decoder(latents))
  rescaling = backbone.latent_rescaling
  return (keras.Model(latents, images, name="decoder"),
          float(rescaling.scale), float(rescaling.offset))


def _check_backbone(backbone) -> None:
  if not isinstance(backbone, _classes()[1]):
    raise UserError("a model of KerasHub must be a StableDiffusion3Backbone. "
                    f"Received: {type(backbone).__name__}")

"""Architectures by name, for weights that come without one.

A preset is a `UNetConfig` or an `EDMConfig`, which readers of other formats
find out from the file. For a network of your own it is a JSON file: a card of
EDM (see `edm`), or the fields of `UNetConfig`, such as

  {"image_size": 32, "in_channels": 3, "out_channels": 3,
   "channels": [64, 128, 128], "blocks_per_level": 2, "attention_levels": [1]}
"""

import dataclasses
import typing

from ddss_tf import storage
from ddss_tf.formats import cards
from ddss_tf.formats import edm
from ddss_tf.errors import UserError
from ddss_tf.networks.edm_unet import EDMConfig
from ddss_tf.networks.unet import UNetConfig
from ddss_tf.schedules import ExplodingSchedule

# What the networks of improved- and guided-diffusion, made for PyTorch, share.
_OPENAI = dict(
    in_channels=3, out_channels=3, blocks_per_level=3, norm_epsilon=1e-5,
    sin_first=False, frequency_shift=0.0, symmetric_downsample=True,
    scale_shift=True)

# They have no channels of a learned variance, because all readers leave those
# out.
PRESETS = {
    # The embedded model.
    "digits16-ddpm": UNetConfig(
        image_size=16, in_channels=1, out_channels=1, channels=(32, 64, 64),
        blocks_per_level=1, attention_levels=(1,), norm_groups=16),
    # Ho et al. (2020): google/ddpm-cifar10-32 of diffusers; and those of LSUN
    # and CelebA-HQ, google/ddpm-church-256 and its siblings.
    "ddpm-cifar10-32": UNetConfig(
        image_size=32, in_channels=3, out_channels=3,
        channels=(128, 256, 256, 256), blocks_per_level=2,
        attention_levels=(1,)),
    "ddpm-256": UNetConfig(
        image_size=256, in_channels=3, out_channels=3,
        channels=(128, 128, 256, 256, 512, 512), blocks_per_level=2,
        attention_levels=(4,)),
    # Nichol and Dhariwal (2021): cifar10_uncond_50M_500K.pt and
    # imagenet64_uncond_100M_1500K.pt, both of T = 4000.
    "improved-cifar10": UNetConfig(
        image_size=32, channels=(128, 256, 256, 256), attention_levels=(1, 2),
        num_heads=4, time_scale=0.25, time_features=128, time_width=512,
        **_OPENAI),
    "improved-imagenet64": UNetConfig(
        image_size=64, channels=(128, 256, 384, 512), attention_levels=(2, 3),
        num_heads=4, time_scale=0.25, time_features=128, time_width=512,
        **_OPENAI),
    # Dhariwal and Nichol (2021): 64x64_diffusion.pt.
    "guided-imagenet64": UNetConfig(
        image_size=64, channels=(192, 384, 576, 768),
        attention_levels=(1, 2, 3), head_channels=64,
        residual_down_levels=(0, 1, 2), residual_up_levels=(1, 2, 3),
        time_features=192, time_width=768, num_classes=1000, **_OPENAI),
    # Karras et al. (2022): edm-cifar10-32x32-uncond-vp and
    # edm-imagenet-64x64-cond-adm.
    "edm-cifar10": EDMConfig(
        image_size=32, image_channels=3, channel_mult=(2, 2, 2)),
    "edm-imagenet64": EDMConfig(
        image_size=64, image_channels=3, architecture="DhariwalUNet",
        model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
        attn_resolutions=(32, 16, 8), label_dim=1000),
}
# What a preset may be, for messages.
WANTED = (f"one of {', '.join(PRESETS)}, or the path of a JSON file of the "
          "fields of UNetConfig or of a card of EDM")
# Fields that may be 0, or contain it: levels are counted from 0.
_FROM_0 = ("attention_levels", "residual_down_levels", "residual_up_levels",
           "frequency_shift")


def read(preset: str) -> tuple[UNetConfig | EDMConfig,
                               ExplodingSchedule | None]:
  """The architecture that a preset names.

  Args:
    preset: one of `PRESETS`, or the path of a JSON file.

  Returns:
    The architecture; and the sigmas of a network of EDM, or None for another.

  Raises:
    UserError: the preset is neither, or the file has keys that are unknown,
      missing or of another type.
  """
  if isinstance(preset, str) and preset in PRESETS:
    config = PRESETS[preset]
    return config, (edm.sigmas() if isinstance(config, EDMConfig)
                    else None)
  preset = storage.expanded(preset)
  if not isinstance(preset, str) or not storage.isfile(preset):
    raise UserError(f"preset must be {WANTED}. Received: {preset!r}")
  words = cards.read_json_object(preset)
  if "class_name" in words:
    return edm.read_config(preset)
  types = typing.get_type_hints(UNetConfig)
  unknown = sorted(set(words) - set(types))
  if unknown:
    raise UserError(f"{preset}: keys must be among {', '.join(types)}. "
                    f"Received: {', '.join(unknown)}")
  missing = [field.name for field in dataclasses.fields(UNetConfig)
             if field.default is dataclasses.MISSING
             and field.name not in words]
  if missing:
    raise UserError(f"{preset}: {', '.join(missing)} must be given. "
                    f"Received: {sorted(words)}")
  return UNetConfig(**{
      key: _typed(preset, key, value, types[key])
      for key, value in words.items()}), None


def _typed(source, key, value, kind):
  """A value of the file as `UNetConfig` has it."""
  if type(None) in typing.get_args(kind):  # All of them are whole numbers.
    if value is None:
      return None
    kind = int
  elif key == "image_size":  # A whole number, or a pair of them.
    kind = tuple if isinstance(value, list) else int
  return cards.json_value(
      source, key, value, typing.get_origin(kind) or kind,
      0 if key in _FROM_0 else 1)

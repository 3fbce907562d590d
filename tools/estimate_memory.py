"""Estimates what a search of Stable Diffusion takes, without its weights.

  python tools/estimate_memory.py sd15 | sd21 | sdxl | sd3

It builds network and decoder of the published configuration with random weights,
and prints what `ddss_tf.inspect` says of a search of one image at a time with
guidance, at K = 4 and 8. No network is run. SDXL needs 12 GiB of memory, for its
weights.
"""

import sys

import keras
import numpy as np

import ddss_tf
from ddss_tf.networks import autoencoder
from ddss_tf.networks import condition_unet
from ddss_tf.networks import keras_hub
from ddss_tf.networks.frozen import frozen_variables

_SD15 = dict(
    image_size=64, in_channels=4, out_channels=4, channels=(320, 640, 1280, 1280),
    blocks_per_level=(2,) * 4, down_transformers=((1, 1),) * 3 + ((),),
    up_transformers=((),) + ((1, 1, 1),) * 3, num_heads=(8,) * 4, context_width=768)
_UNETS = {
    "sd15": _SD15,
    "sd21": _SD15 | dict(image_size=96, num_heads=(5, 10, 20, 20), context_width=1024),
    "sdxl": dict(
        image_size=128, in_channels=4, out_channels=4, channels=(320, 640, 1280),
        blocks_per_level=(2,) * 3, down_transformers=((), (2, 2), (10, 10)),
        up_transformers=((10,) * 3, (2,) * 3, ()), mid_transformer=10,
        num_heads=(5, 10, 20), context_width=2048, pooled_width=1280),
}
_SD3 = keras_hub.MMDiTConfig(
    image_size=(128, 128), in_channels=16, patch_size=2, num_layers=24, num_heads=24,
    head_channels=64, position_size=192, context_width=4096, pooled_width=2048)
_TOKENS = 77


def build(name: str) -> ddss_tf.Denoiser:
  """The model, with a table of two prompts."""
  if name == "sd3":
    config, build_network = _SD3, keras_hub.build_mmdit
    schedule = ddss_tf.make_schedule("flow", 1000, shift=3.0)
    convention = dict(prediction="flow", process="flow", time_input="flow",
                      time_scale=1000.0)
    side, channels, tokens = 128, 16, 2 * _TOKENS
  else:
    config = condition_unet.ConditionUNetConfig(**_UNETS[name])
    build_network = condition_unet.build_condition_unet
    schedule = ddss_tf.make_schedule("scaled_linear", 1000, 0.00085, 0.012)
    convention, side, channels, tokens = {}, config.image_size, 4, _TOKENS
  table = ddss_tf.ConditionTable(
      {key: np.zeros([2, *(size or tokens for size in shape)], np.float32)
       for key, shape in config.conditions}, null_row=0)
  with frozen_variables():
    network = build_network(config)
    decoder = autoencoder.build_decoder(autoencoder.DecoderConfig(
        latent_size=side, latent_channels=channels, out_channels=3,
        channels=(128, 256, 512, 512), layers_per_block=2,
        post_quant_conv=name != "sd3"))
  return ddss_tf.Denoiser(
      network, schedule, name=name, table=table, guidance_scale=7.0,
      conditions=[key for key, _ in config.conditions], sha256="random weights",
      decoder=ddss_tf.Decoder(decoder), **convention)


def main():
  if len(sys.argv) != 2 or sys.argv[1] not in (*_UNETS, "sd3"):
    sys.exit(__doc__)
  # Weights that cost nothing to make.
  keras.initializers.GlorotUniform.__call__ = (
      lambda self, shape, dtype=None: keras.ops.zeros(shape, dtype))
  denoiser = build(sys.argv[1])
  print(f"weights: {sum(v.numpy().nbytes for v in denoiser.model.variables) / 2**30:.2f}"
        " GiB")
  for num_steps in (4, 8):
    text = ddss_tf.inspect(denoiser=denoiser, num_steps=num_steps, micro_batch_size=1)
    print("\n".join(line for line in text.splitlines() if num_steps == 4 or
                    line.startswith("a search")))


if __name__ == "__main__":
  main()

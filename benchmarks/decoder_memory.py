"""Peak memory of decoding and its gradient, beside that of a single image.

  python -m benchmarks.decoder_memory

Latents of 32x32x4 become images of 256x256x3, by a decoder of the architecture
of Stable Diffusion at a quarter of its width, with random weights. A batch of
16 and one of 1 are decoded with their gradient, each in a process of its own.
"""

from benchmarks import records

BATCH = 16


def measure(batch_size: int) -> dict:
  """Peak memory of decoding a batch, with its gradient."""
  # pylint: disable=g-import-not-at-top
  import tensorflow as tf
  from ddss_tf.denoisers.decoder import Decoder
  from ddss_tf.networks import autoencoder
  from ddss_tf.networks.frozen import frozen_variables
  with frozen_variables():
    decoder = Decoder(autoencoder.build_decoder(autoencoder.DecoderConfig(
        latent_size=32, latent_channels=4, out_channels=3,
        channels=(32, 64, 128, 128), layers_per_block=2)), 0.18215)

  @tf.function
  def pull_back(z):
    with tf.GradientTape() as tape:
      tape.watch(z)
      value = tf.reduce_sum(decoder(z) ** 2)
    return tape.gradient(value, z)

  z = tf.random.stateless_normal([batch_size, 32, 32, 4], [0, 1])
  before = records.peak_gib()
  pull_back(z)
  return {"gib": records.peak_gib(), "before": before}


def main():
  measured = records.of_batch_sizes(
      "benchmarks.decoder_memory", __doc__, measure, (BATCH, 1))
  if measured is None:
    return
  large, small = measured
  above = [part["gib"] - part["before"] for part in (large, small)]
  records.keep([
      records.record(
          "decoder_16_memory", [above[0]], [above[1]], bound=1.3, of="ratio",
          unit="GiB",
          note="peak above the idle process of decoding 16 latents of 32x32x4 "
          "to 256x256x3 with their gradient; yardstick: a single one")])


if __name__ == "__main__":
  main()

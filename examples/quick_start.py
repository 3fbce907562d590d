"""Finds a sampler of 10 steps for your diffusion model and a folder of images.

  python examples/quick_start.py MODEL IMAGES RUN_DIR [FEATURES]

MODEL is a diffusers folder of a `UNet2DModel`, or whatever else `load_denoiser`
reads. IMAGES is a folder of images like those it was trained on. FEATURES is
what `load_features` takes. By default that is InceptionV3 of Keras, whose
ImageNet weights Keras downloads once. To compare figures with published ones,
use TF-GAN's: "https://tfhub.dev/tensorflow/tfgan/eval/inception/1".
"""

import sys

import ddss_tf


def main(model: str, images: str, run_dir: str,
         features: str = "keras:InceptionV3", num_steps: int = 10,
         num_samples: int = 2000, **search_options) -> list[dict]:
  denoiser = ddss_tf.load_denoiser(model)
  size, _, channels = denoiser.image_shape
  dataset = ddss_tf.load_dataset(
      f"folder:{images}", channels=channels, crop="center", resize=size)
  network = ddss_tf.load_features(features)
  sampler = ddss_tf.make_sampler(
      denoiser.schedule, "ggdm+pred+time", num_steps=num_steps)
  ddss_tf.search(denoiser, sampler, network, dataset, run_dir=run_dir, **{
      "num_search_steps": 200, "batch_size": 128, "gradient_samples": 32,
      "objective": "frechet", **search_options})
  records = ddss_tf.evaluate(
      run_dir, denoiser, dataset, network, num_samples=num_samples)
  ddss_tf.export(run_dir, denoiser, also=["diffusers"])
  ddss_tf.sample(run_dir, denoiser, num_images=64)
  return records


if __name__ == "__main__":
  if len(sys.argv) not in (4, 5):
    sys.exit(__doc__)
  try:
    main(*sys.argv[1:])
  except ddss_tf.UserError as error:
    sys.exit(f"error: {error}")

"""Runs samplers as schedulers of diffusers, in its DDPMPipeline, for the tests.

  python tests/support/scheduler_cases.py FOLDER                  # TensorFlow
  python tools/dump_scheduler_fixture.py FOLDER FIXTURE MODEL...  # PyTorch

A MODEL is a folder of a `UNet2DModel` with its weights. FOLDER has a folder of
each model's name, and in it a folder for each case, as
`ddss_tf.exporting.diffusers_scheduler` writes it. The second command needs
torch and diffusers only. The fixture was written with diffusers 0.42.1.

The fixture, an npz file, has these keys for each case:

  <case>/config   text of `scheduler_config.json`
  <case>/x_T      [B, H, W, C] the noise that the pipeline drew first
  <case>/noise    [B, K - 1, H, W, C] the noise that its steps drew; 0 where a
                  step drew none
  <case>/images   [B, H, W, C] what the last step returned

and also `template_sha256`, the hash of `scheduling_ddss.py`.
"""

import hashlib
import importlib.util
import os
import sys

import diffusers
import numpy as np
import torch

_MODULE = "scheduling_ddss.py"
_BATCH = 2
_SEED = 11


def load_scheduler(folder: str):
  """The scheduler of a folder, made by the class in that folder."""
  spec = importlib.util.spec_from_file_location(
      "scheduling_ddss", os.path.join(folder, _MODULE))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.DDSSScheduler.from_pretrained(folder)


def run(unet, scheduler) -> dict[str, np.ndarray]:
  """Samples with diffusers' own pipeline, and draws its noise once more.

  Returns:
    Noise and images, by their keys in the fixture.
  """
  config = scheduler.config
  steps = len(config.times)
  made, step = [], scheduler.step

  def recorded_step(*args, **kwargs):
    made.append(step(*args, **kwargs))
    return made[-1]

  scheduler.step = recorded_step
  pipeline = diffusers.DDPMPipeline(unet, scheduler)
  pipeline.set_progress_bar_config(disable=True)
  shown = pipeline(
      batch_size=_BATCH, generator=torch.Generator().manual_seed(_SEED),
      num_inference_steps=steps, output_type="pt").images
  images = made[-1].prev_sample
  torch.testing.assert_close(shown, (images / 2 + 0.5).clamp(0, 1))

  generator = torch.Generator().manual_seed(_SEED)
  draw = lambda: torch.randn(images.shape, generator=generator)
  x_T = draw()
  noise = [draw() if scale > 0 else torch.zeros(images.shape)
           for scale in config.noise_scales[:-1]]
  return dict(x_T=x_T.movedim(1, -1).numpy(),
              noise=torch.stack(noise, 1).movedim(2, -1).numpy(),
              images=images.movedim(1, -1).numpy())


def main(folder: str, path: str, models: list[str]) -> None:
  arrays = {}
  for model in models:
    unet = diffusers.UNet2DModel.from_pretrained(model).eval()
    parent = os.path.join(folder, os.path.basename(os.path.normpath(model)))
    for name in sorted(os.listdir(parent)):
      case = os.path.join(parent, name)
      with open(os.path.join(case, "scheduler_config.json")) as f:
        arrays[f"{name}/config"] = f.read()
      for key, value in run(unet, load_scheduler(case)).items():
        arrays[f"{name}/{key}"] = value
      with open(os.path.join(case, _MODULE), "rb") as f:
        arrays["template_sha256"] = hashlib.sha256(f.read()).hexdigest()
  np.savez_compressed(path, **arrays)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], sys.argv[3:])

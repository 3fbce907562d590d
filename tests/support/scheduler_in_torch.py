"""Checks of a written scheduler in PyTorch: saving, faults, whole pipelines.

  python tests/support/scheduler_in_torch.py SCHEDULER MODEL PIPELINE

needs torch and diffusers, but not ddss_tf. `scheduler_test.py` calls it.
SCHEDULER is the folder of a written scheduler of 5 steps. MODEL is the folder
of a `UNet2DModel` that predicts v. A whole pipeline is saved to the new folder
PIPELINE.
"""

import importlib
import os
import sys

import diffusers
import torch


def refused(words, function, *args, **kwargs):
  try:
    function(*args, **kwargs)
  except (ValueError, TypeError) as error:
    assert words in str(error), error
  else:
    raise AssertionError(f"not refused: {words}")


def main(folder: str, model: str, pipeline_folder: str) -> None:
  sys.path.insert(0, folder)
  cls = importlib.import_module("scheduling_ddss").DDSSScheduler
  scheduler = cls.from_pretrained(folder)
  config = {key: value for key, value in scheduler.config.items()
            if not key.startswith("_")}
  unet = diffusers.UNet2DModel.from_pretrained(model).eval()

  def sample(unet=unet, scheduler=scheduler, seed=3):
    pipe = diffusers.DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(batch_size=2, num_inference_steps=5, output_type="pt",
                generator=torch.Generator().manual_seed(seed)).images

  images = sample()
  assert torch.equal(images, sample())  # The first chain left no state behind.
  assert not torch.allclose(images, sample(seed=4), atol=0.05)

  # The other pipeline for such models passes options of DDIM.
  pipe = diffusers.DDIMPipeline(unet, scheduler)
  # The pipeline has made a DDIM scheduler of the configuration.
  pipe.scheduler = scheduler
  pipe.set_progress_bar_config(disable=True)
  assert torch.equal(images, pipe(
      batch_size=2, num_inference_steps=5, output_type="pt",
      generator=torch.Generator().manual_seed(3)).images)
  refused("eta must be 0", pipe, num_inference_steps=5, eta=1.0)
  scheduler.set_timesteps(5)

  # The configuration, and a whole pipeline with its code, saved and read again.
  assert torch.equal(images, sample(scheduler=cls.from_config(
      scheduler.config)))
  diffusers.DDPMPipeline(unet, scheduler).save_pretrained(pipeline_folder)
  assert os.path.exists(
      os.path.join(pipeline_folder, "scheduler", "scheduling_ddss.py"))
  sys.path.remove(folder)
  del sys.modules["scheduling_ddss"]
  pipe = diffusers.DiffusionPipeline.from_pretrained(
      pipeline_folder, trust_remote_code=True)
  assert type(pipe.scheduler) is not cls
  pipe.set_progress_bar_config(disable=True)
  assert torch.equal(images, pipe(
      batch_size=2, num_inference_steps=5, output_type="pt",
      generator=torch.Generator().manual_seed(3)).images)

  # Of a model with a learned variance, only the prediction counts.
  class WithVariance(diffusers.UNet2DModel):

    def forward(self, *args, return_dict=True, **kwargs):
      (output,) = super().forward(*args, return_dict=False, **kwargs)
      return diffusers.models.unets.unet_2d.UNet2DOutput(
          sample=torch.cat([output, torch.full_like(output, 9.0)], 1))

  assert torch.equal(images, sample(
      unet=WithVariance.from_pretrained(model).eval()))

  # Input and output have half precision; the chain itself is in float32.
  half = sample(unet=diffusers.UNet2DModel.from_pretrained(
      model, torch_dtype=torch.bfloat16).eval())
  assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()

  # A model that takes whole numbers only.
  whole = cls(**{**config, "integer_timesteps": True})
  assert whole.timesteps.dtype == torch.int64
  assert torch.equal(whole.timesteps, scheduler.timesteps.round().long())
  rounded = cls(**{**config, "times": whole.timesteps.tolist()})
  assert torch.equal(sample(scheduler=whole), sample(scheduler=rounded))

  # The forward process: alpha_bar at training steps, and between them.
  last = len(scheduler) - 1
  one, noise = torch.ones(3, 1, 1, 1), torch.full((3, 1, 1, 1), 2.0)
  times = torch.tensor([0, last, 10.5])
  bars = scheduler.alphas_cumprod[[0, last, 10]].clone()
  bars[2] = (bars[2] * scheduler.alphas_cumprod[11]).sqrt()
  expected = bars.sqrt() + 2 * (1 - bars).sqrt()
  torch.testing.assert_close(
      scheduler.add_noise(one, noise, times).flatten(), expected)

  # Faults.
  refused("must be 5", scheduler.set_timesteps, 50)
  for shape in ((1, 5, 8, 8), (1, 9, 8, 8), (1, 1, 8, 8), (2, 6, 8, 8),
                (1, 6, 8, 4), (1, 6, 8), (6,)):
    refused("learned variance", scheduler.step, torch.zeros(shape),
            scheduler.timesteps[0], torch.zeros(1, 3, 8, 8))
  scheduler.set_timesteps(5)
  refused("step 0 of the chain", scheduler.step, torch.zeros(1, 3, 8, 8),
          scheduler.timesteps[1], torch.zeros(1, 3, 8, 8))
  refused("prediction_type", cls, **{**config, "prediction_type": "flow"})
  refused("x0_bound", cls, **{**config, "x0_bound": "hard"})
  refused("entries", cls, **{**config, "x0_weights": [1.0]})
  refused("trained_betas", cls, **{**config, "trained_betas": [0.1]})


if __name__ == "__main__":
  main(*sys.argv[1:])

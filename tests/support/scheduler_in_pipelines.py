"""Checks of written schedulers in PyTorch: flows, guidance, whole pipelines.

  python tests/support/scheduler_in_pipelines.py FOLDER SD SD3

needs torch, diffusers and transformers, but not ddss_tf.
`scheduler_pipelines_test.py` calls it. FOLDER has the folders of the written
schedulers "sd_guided", "sd3_steps" and "sd3_heun" of `pipeline_cases.py`. SD and
SD3 are folders of pipelines. Whole pipelines are saved in FOLDER.
"""

import importlib.util
import json
import os
import sys

import diffusers
import numpy as np
import torch


def load(folder: str, name: str):
  spec = importlib.util.spec_from_file_location(
      name, os.path.join(folder, f"{name}.py"))
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


def refused(words, function, *args, **kwargs):
  try:
    function(*args, **kwargs)
  except ValueError as error:
    assert words in str(error), error
  else:
    raise AssertionError(f"not refused: {words}")


def absent(folder: str) -> dict:
  """The text encoders and tokenizers that a pipeline has not, each None."""
  with open(os.path.join(folder, "model_index.json")) as f:
    return {key: None for key, part in json.load(f).items()
            if part == [None, None]}


def pipeline(folder: str, scheduler, **options):
  pipe = diffusers.DiffusionPipeline.from_pretrained(
      folder, **absent(folder), **options)
  pipe.scheduler = scheduler
  return pipe


def sampler(folder: str):
  """Latents of a pipeline, by its arguments."""
  with np.load(os.path.join(folder, "golden.npz")) as golden:
    prompts = {name.removeprefix("run_"): torch.from_numpy(golden[name])
               for name in golden if name.endswith("prompt_embeds")}

  def sample(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    return pipe(
        **{**{key: value.to(pipe.dtype) for key, value in prompts.items()},
           **options}, height=8, width=8, output_type="latent",
        num_inference_steps=len(pipe.scheduler.config.times),
        generator=torch.Generator().manual_seed(3)).images

  return sample


def check_guidance(parent: str, sd: str) -> None:
  """A scale that is the same in all steps may be given to the pipeline."""
  folder = os.path.join(parent, "sd_guided")
  guidance = load(folder, "guidance").guidance
  scheduler = load(folder, "scheduling_ddss").DDSSScheduler.from_pretrained(
      folder)
  assert scheduler.init_noise_sigma == 1
  pipe, sample = pipeline(sd, scheduler), sampler(sd)
  latents = sample(pipe, guidance_scale=7.5)
  assert torch.equal(latents, sample(pipe, **guidance(scheduler)))
  assert not torch.allclose(latents, sample(pipe, guidance_scale=1.0), atol=0.1)
  # The scales of one call are not those of the next.
  config = dict(scheduler.config, guidance_scales=[1.0] * 5)
  ones = type(scheduler).from_config(config)
  torch.testing.assert_close(
      sample(pipe, **guidance(ones)), sample(pipe, guidance_scale=1.0),
      atol=1e-2, rtol=1e-3)
  refused("guidance_scales", guidance, type(scheduler).from_config(
      dict(config, guidance_scales=None)))
  refused("entries", type(scheduler).from_config,
          dict(config, guidance_scales=[1.0]))


def check_flow(parent: str, sd3: str) -> None:
  folder = os.path.join(parent, "sd3_steps")
  cls = load(folder, "scheduling_ddss").DDSSScheduler
  guidance = load(folder, "guidance").guidance
  scheduler = cls.from_pretrained(folder)
  pipe, sample = pipeline(sd3, scheduler), sampler(sd3)
  steps = guidance(scheduler)
  latents = sample(pipe, **steps)
  assert torch.equal(latents, sample(pipe, **steps))
  assert not torch.allclose(latents, sample(pipe, guidance_scale=5.0), atol=0.1)

  # Noise levels and shifts of other schedulers are not looked at.
  assert torch.equal(latents, sample(
      pipe, **steps, sigmas=[1.0, 0.7, 0.4, 0.1], mu=0.7))
  refused("must be 4", scheduler.set_timesteps, sigmas=[1.0, 0.5])
  refused("must be 4", scheduler.set_timesteps, 28)
  scheduler.set_begin_index(0)
  refused("begin_index must be 0", scheduler.set_begin_index, 1)

  # A whole pipeline with its code, saved and read again.
  saved = os.path.join(parent, "pipeline")
  pipe.save_pretrained(saved)
  assert {"guidance.py", "scheduling_ddss.py"} <= set(
      os.listdir(os.path.join(saved, "scheduler")))
  again = diffusers.DiffusionPipeline.from_pretrained(
      saved, trust_remote_code=True, **absent(sd3))
  assert type(again.scheduler) is not cls
  assert torch.equal(latents, sample(again, **guidance(again.scheduler)))

  # Input and output have half precision; the chain itself is in float32.
  half = sample(pipeline(sd3, scheduler, torch_dtype=torch.bfloat16), **steps)
  assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
  assert (half.float() - latents).abs().mean() < 0.2 * latents.std()

  # The flow's own noisy image: (1 - s) x_0 + s noise, of 1000 s.
  one = torch.ones(3, 1, 1, 1)
  torch.testing.assert_close(
      scheduler.add_noise(one, 3 * one, torch.tensor([1000, 0, 250.5])
                          ).flatten(), torch.tensor([3.0, 1.0, 1.501]))
  s = float(scheduler.timesteps[0]) / 1000
  assert abs(scheduler.init_noise_sigma - (s**2 + (1 - s)**2)**0.5) < 1e-7

  config = {key: value for key, value in scheduler.config.items()
            if not key.startswith("_")}
  whole = cls(**{**config, "integer_timesteps": True})
  assert torch.equal(whole.timesteps, scheduler.timesteps.round().long())
  # Noisiest: as step 999 it is 1000.
  assert cls(**{**config, "integer_timesteps": True, "times": [
      999.0, 600.0, 300.0, 0.0]}).timesteps[0] == 1000

  refused("step 0 of the chain", scheduler.step, torch.zeros(1, 16, 4, 4),
          scheduler.timesteps[1], torch.zeros(1, 16, 4, 4))
  for changes in (dict(flow_shift=None), dict(x0_from_v=None),
                  dict(trained_betas=[0.1] * 1000),
                  dict(x0_from_eps=config["x0_from_v"]),
                  dict(prediction_type="epsilon")):
    refused("must be given, and not", cls, **{**config, **changes})


def check_heun(parent: str, sd3: str) -> None:
  """Equal times: each step is made once, and the first cannot be left out."""
  folder = os.path.join(parent, "sd3_heun")
  scheduler = load(folder, "scheduling_ddss").DDSSScheduler.from_pretrained(
      folder)
  assert len(set(scheduler.timesteps.tolist())) == 3
  assert scheduler.init_noise_sigma == 1
  sample = sampler(sd3)
  latents = sample(pipeline(sd3, scheduler), guidance_scale=1.0)
  # The textbook method, with the same network at the same noise levels.
  sigmas = scheduler.timesteps[[0, 1, 3]] / 1000
  transformer = pipeline(sd3, scheduler).transformer
  with np.load(os.path.join(sd3, "golden.npz")) as golden:
    prompt, pooled = (torch.from_numpy(golden[f"run_{name}"]) for name in (
        "prompt_embeds", "pooled_prompt_embeds"))

  def u(z, s):
    with torch.no_grad():
      return transformer(
          hidden_states=z, timestep=(1000 * s).expand(2),
          encoder_hidden_states=prompt, pooled_projections=pooled).sample

  z = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(3))
  for s, end in zip(sigmas, sigmas[1:]):
    first = u(z, s)
    z = z + (end - s) * (first + u(z + (end - s) * first, end)) / 2
  z = z - sigmas[-1] * u(z, sigmas[-1])
  torch.testing.assert_close(latents, z, atol=1e-3, rtol=1e-3)


if __name__ == "__main__":
  check_guidance(sys.argv[1], sys.argv[2])
  check_flow(sys.argv[1], sys.argv[3])
  check_heun(sys.argv[1], sys.argv[3])

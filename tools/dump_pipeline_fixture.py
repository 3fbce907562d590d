"""Runs samplers as schedulers of diffusers, in pipelines of latents, for the tests.

  python tests/support/pipeline_cases.py FOLDER                    # TensorFlow
  python tools/dump_pipeline_fixture.py FOLDER FIXTURE PIPELINE... # PyTorch

A PIPELINE is a folder with `model_index.json` and `golden.npz`, whose conditions
are taken. FOLDER has a folder of each pipeline's name, and in it a folder for
each case, as `ddss_tf.exporting.diffusers_scheduler` writes it. The second
command needs torch and diffusers; pipelines of text need transformers, too. The
fixture was written with diffusers 0.42.1 and transformers 5.24.0.

The fixture, an npz file, has these keys for each case:

  <case>/config       text of `scheduler_config.json`
  <case>/x_T          [B, H, W, C] the noise that the chain starts with
  <case>/noise        [B, K - 1, H, W, C] the noise that its steps drew
  <case>/states       [K, B, H, W, C] what the network was fed with
  <case>/times        [K] likewise
  <case>/predictions  [K, 1 or 2, B, H, W, C] its answers to the prompt or class
                      and, with guidance, to no prompt
  <case>/latents      [B, H, W, C] what the last step returned

and also `scheduling_ddss_sha256` and `guidance_sha256`, the hashes of the two files.
Where the case is the pipeline's own run, from its `run_x_T`, only config and
latents are kept.
"""

import functools
import hashlib
import importlib.util
import json
import os
import sys

import diffusers
import numpy as np
import torch

_SEED = 13
_OWN_RUN = "sd3_euler"
_PER_STEP = "_steps"


def load(folder: str, name: str):
  """A module of a written folder."""
  spec = importlib.util.spec_from_file_location(
      name, os.path.join(folder, f"{name}.py"))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def nhwc(value: torch.Tensor) -> np.ndarray:
  return value.detach().movedim(-3, -1).numpy()


def nchw(value: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(value).movedim(-1, -3)


def recorded(network, calls: list):
  """Has a network write down what it is asked and what it answers."""

  def hook(_, args, kwargs, output):
    x, t = (*args, *(kwargs.get(key) for key in ("hidden_states", "timestep")
                     if key in kwargs))[:2]
    prediction = output[0] if isinstance(output, tuple) else output.sample
    calls.append((x, t, prediction))

  return network.register_forward_hook(hook, with_kwargs=True)


def arguments(kind: str, case: str, folder: str, golden: dict) -> dict:
  """Of the pipeline, for a case."""
  if kind == "latent_ldm":
    return {"batch_size": 2}
  if kind == "latent_dit":
    return {"class_labels": golden["run_class_labels"].tolist(),
            "guidance_scale": 1.0}
  found = {name.removeprefix("run_"): torch.from_numpy(golden[name])
           for name in golden if name.endswith("prompt_embeds")}
  own = case == _OWN_RUN
  size = 16 if own else 8
  return {**found, "height": size, "width": size, "output_type": "latent",
          "guidance_scale": float(golden["run_guidance"]) if own or (
              case == "sd_guided") else 1.0}


def run(pipe, kind: str, case: str, folder: str, golden: dict) -> dict:
  """Samples with diffusers' own pipeline; the keys are those of the fixture."""
  scheduler = load(folder, "scheduling_ddss").DDSSScheduler.from_pretrained(
      folder)
  pipe.scheduler = scheduler
  pipe.set_progress_bar_config(disable=True)
  given = arguments(kind, case, folder, golden)
  if case.endswith(_PER_STEP):
    given.update(load(folder, "guidance").guidance(scheduler))
  network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
  config, steps = scheduler.config, len(scheduler.config.times)
  channels = network.config.in_channels
  size = given.get("height", 16) // 2
  shape = (2, channels, size, size)
  generator = torch.Generator().manual_seed(_SEED)
  x_T = torch.randn(shape, generator=generator)
  if case == _OWN_RUN:
    x_T = nchw(golden["run_x_T"])
  if kind == "latent_sd3":
    given["latents"] = x_T * scheduler.init_noise_sigma
  elif kind == "latent_sd":
    given.update(latents=x_T, generator=generator)
  else:  # These draw x_T themselves.
    given["generator"] = torch.Generator().manual_seed(_SEED)
  if kind != "latent_sd":  # These give their generator to no step.
    generator = torch.default_generator.manual_seed(_SEED + 1)
  state = generator.get_state()
  noise = [torch.randn(shape, generator=generator) if scale > 0
           else torch.zeros(shape) for scale in config.noise_scales[:-1]]
  generator.set_state(state)

  calls, made, step = [], [], scheduler.step

  @functools.wraps(step)  # Pipelines look at its arguments' names.
  def recorded_step(*args, **kwargs):
    made.append(step(*args, **kwargs))
    return made[-1]

  scheduler.step = recorded_step
  hook = recorded(network, calls)
  with torch.no_grad():
    pipe(num_inference_steps=steps, **given)
  hook.remove()
  latents = made[-1][0] if isinstance(made[-1], tuple) else made[-1].prev_sample
  if case == _OWN_RUN:
    return {"latents": nhwc(latents)}
  # With guidance, networks are fed with no prompt first.
  parts = [list(reversed(prediction[:, :channels].split(2)))
           for _, _, prediction in calls]
  return dict(
      x_T=nhwc(x_T), noise=nhwc(torch.stack(noise, 1)), latents=nhwc(latents),
      states=nhwc(torch.stack([x[:2] for x, _, _ in calls])),
      times=np.array([float(t.flatten()[0]) for _, t, _ in calls]),
      predictions=nhwc(torch.stack([torch.stack(part) for part in parts])))


def main(folder: str, path: str, pipelines: list[str]) -> None:
  arrays = {}
  for place in pipelines:
    kind = os.path.basename(os.path.normpath(place))
    with open(os.path.join(place, "model_index.json")) as f:
      missing = [key for key, part in json.load(f).items()
                 if part == [None, None]]  # Text encoders and tokenizers.
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        place, **dict.fromkeys(missing))
    with np.load(os.path.join(place, "golden.npz")) as file:
      golden = dict(file)
    for case in sorted(os.listdir(os.path.join(folder, kind))):
      written = os.path.join(folder, kind, case)
      with open(os.path.join(written, "scheduler_config.json")) as f:
        arrays[f"{case}/config"] = f.read()
      for key, value in run(pipe, kind, case, written, golden).items():
        arrays[f"{case}/{key}"] = value
      for name in ("scheduling_ddss", "guidance"):
        file = os.path.join(written, f"{name}.py")
        if os.path.exists(file):
          with open(file, "rb") as f:
            arrays[f"{name}_sha256"] = hashlib.sha256(f.read()).hexdigest()
  np.savez_compressed(path, **arrays)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], sys.argv[3:])

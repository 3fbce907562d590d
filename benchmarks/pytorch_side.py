"""PyTorch's side of `beside_pytorch`: diffusers' U-Net, in eager mode.

It needs the packages of requirements-pytorch.txt, and nothing of ddss_tf. It
prints one JSON object.
"""

import argparse
import json
import os
import resource
import sys
import time

import diffusers
import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import networks  # pylint: disable=wrong-import-position


def peak_gib() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(function, runs: int) -> list[float]:
  """Seconds of each run, after a first one that is not counted."""
  function()
  seconds = []
  for _ in range(runs):
    start = time.perf_counter()
    function()
    seconds.append(time.perf_counter() - start)
  return seconds


def save(folder: str, model: str) -> dict:
  """Writes a network of random weights, and a DDIM scheduler."""
  torch.manual_seed(0)
  unet = diffusers.UNet2DModel(**networks.NETWORKS[model])
  unet.save_pretrained(folder)
  diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder)
  return {"parameters": sum(p.numel() for p in unet.parameters())}


def load(folder: str) -> diffusers.UNet2DModel:
  return diffusers.UNet2DModel.from_pretrained(folder).eval(
      ).requires_grad_(False)


def forward(folder: str, batch_size: int, runs: int) -> dict:
  """Times a call of the network, and one with its gradient in the images."""
  unet = load(folder)
  shape = unet.config.in_channels, *[unet.config.sample_size] * 2
  x = torch.randn(batch_size, *shape)
  t = torch.linspace(10.0, 900.0, batch_size)

  def call():
    with torch.inference_mode():
      unet(x, t).sample

  def backward():
    state = x.clone().requires_grad_(True)
    unet(state, t).sample.square().sum().backward()

  return {"forward": timed(call, runs), "backward": timed(backward, runs)}


def step(folder: str, batch_size: int, num_steps: int, runs: int) -> dict:
  """Times a search step of GGDM+PRED+TIME with checkpointed calls."""
  unet = load(folder)
  shape = unet.config.in_channels, *[unet.config.sample_size] * 2
  times = torch.linspace(
      networks.TIMES_FROM, networks.TIMES_TO, num_steps).requires_grad_(True)
  # Weights of the states, and of x0_hat in the next state; those of the state
  # and of the predicted noise in x0_hat; those of fresh noise.
  weights = [
      (torch.eye(num_steps) * 0.5).requires_grad_(True),
      torch.full((num_steps,), 0.5, requires_grad=True),
      torch.full((num_steps,), 1.1, requires_grad=True),
      torch.full((num_steps,), -0.4, requires_grad=True),
      torch.full((num_steps - 1,), 0.1, requires_grad=True)]
  real = torch.rand(1000, *shape) * 2 - 1

  def features(images):
    return torch.nn.functional.avg_pool2d(images, networks.POOL).flatten(1)

  def network(x, t):
    return unet(x, t.expand(len(x))).sample

  def run():
    state_weights, x0_weights, from_state, from_eps, noise_scales = weights
    states = [torch.randn(batch_size, *shape)]
    for k in range(num_steps):
      eps = checkpoint(network, states[-1], times[k], use_reentrant=False)
      x0 = from_state[k] * states[-1] + from_eps[k] * eps
      x = x0_weights[k] * x0
      for u in range(k + 1):
        x = x + state_weights[k, u] * states[u]
      if k < num_steps - 1:
        x = x + noise_scales[k] * torch.randn_like(x)
      states.append(x)
    ours, theirs = features(states[-1]), features(real)
    # The unbiased KID with a linear kernel, without its constant term.
    count = len(ours)
    total = ours.sum(0)
    loss = ((total @ total - ours.square().sum()) / (count * (count - 1))
            - 2 * ours.mean(0) @ theirs.mean(0))
    return torch.autograd.grad(loss, [times, *weights])

  before = peak_gib()
  seconds = timed(run, runs)
  return {"seconds": seconds, "before": before, "gib": peak_gib()}


def sample(folder: str, batch_size: int, num_steps: int, runs: int) -> dict:
  """Times the images of diffusers' DDIM pipeline."""
  pipeline = diffusers.DDIMPipeline(
      load(folder), diffusers.DDIMScheduler.from_pretrained(folder))
  pipeline.set_progress_bar_config(disable=True)

  def run():
    pipeline(batch_size=batch_size, num_inference_steps=num_steps,
             output_type="np")

  return {"seconds": timed(run, runs)}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("part", choices=["save", "forward", "step", "sample"])
  parser.add_argument("folder")
  parser.add_argument("--model")
  parser.add_argument("--batch_size", type=int)
  parser.add_argument("--num_steps", type=int)
  parser.add_argument("--runs", type=int)
  arguments = vars(parser.parse_args())
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  part = globals()[arguments.pop("part")]
  print(json.dumps(part(**{
      key: value for key, value in arguments.items() if value is not None})))


if __name__ == "__main__":
  main()

"""Dumps random SD3Transformer2DModels and flow schedulers of diffusers.

  pip install torch diffusers safetensors
  python tools/dump_sd3_fixture.py tests/testdata

Run once, outside CI: the tests then need neither PyTorch nor diffusers. The
networks have what tests/testdata/latent_sd3 has not: normalised queries and
keys, dual attention, latents that are not square.
"""

import json
import os
import sys

import diffusers
import numpy as np
import small_fixture
import torch

# By file: the configuration, and height and width of the latents.
_NETWORKS = {
    "sd3_normalised": (dict(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16,
        num_layers=3, num_attention_heads=3, attention_head_dim=4,
        caption_projection_dim=12, joint_attention_dim=9,
        pooled_projection_dim=5, pos_embed_max_size=7, qk_norm="rms_norm",
        dual_attention_layers=(0, 1)), (6, 10)),
    # One block, which is the last, whose prompt goes no further.
    "sd3_one_block": (dict(
        sample_size=9, patch_size=3, in_channels=4, out_channels=None,
        num_layers=1, num_attention_heads=2, attention_head_dim=6,
        caption_projection_dim=12, joint_attention_dim=7,
        pooled_projection_dim=11, pos_embed_max_size=6,
        dual_attention_layers=(0,)), (15, 6)),
}
_EULER, _HEUN = (diffusers.FlowMatchEulerDiscreteScheduler,
                 diffusers.FlowMatchHeunDiscreteScheduler)
_FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
_DYNAMIC = dict(use_dynamic_shifting=True)
# Scheduler, arguments, shape of the latents, patch size.
_SCHEDULERS = [
    (_EULER, {}, (8, 8), 2),
    (_EULER, dict(shift=3.0), (8, 8), 2),
    (_EULER, dict(shift=6.0, num_train_timesteps=400), (8, 8), 2),
    (_EULER, _DYNAMIC, (32, 48), 2),
    (_EULER, dict(_DYNAMIC, shift=3.0, time_shift_type="linear"), (128, 96), 2),
    (_EULER, dict(_DYNAMIC, base_shift=0.25, max_shift=0.95, shift=3.0,
                  base_image_seq_len=64, max_image_seq_len=1024), (50, 21), 3),
    (_HEUN, dict(shift=3.0), (8, 8), 2),
    (diffusers.DPMSolverMultistepScheduler, dict(_FLOW, flow_shift=3.0),
     (8, 8), 2),
    (diffusers.UniPCMultistepScheduler, dict(_FLOW, flow_shift=5.0), (8, 8), 2),
    (diffusers.UniPCMultistepScheduler, dict(_FLOW, **_DYNAMIC), (32, 48), 2),
    (diffusers.DEISMultistepScheduler, dict(_FLOW), (8, 8), 2),
    (diffusers.DPMSolverSinglestepScheduler, dict(_FLOW, flow_shift=2.0),
     (8, 8), 2),
    (diffusers.SASolverScheduler, dict(_FLOW, flow_shift=0.5), (8, 8), 2),
]
_STEPS = 5


def main(folder: str) -> None:
  for seed, (name, (options, size)) in enumerate(_NETWORKS.items()):
    _dump_network(os.path.join(folder, name + ".npz"), options, size, seed)
  with open(os.path.join(folder, "flow_schedulers.json"), "w") as f:
    json.dump([_scheduler(*case) for case in _SCHEDULERS], f, indent=1)
    f.write("\n")


def _dump_network(path: str, options: dict, size: tuple[int, int],
                  seed: int) -> None:
  """Writes configuration, outputs, and a seed in place of the weights."""
  model = diffusers.SD3Transformer2DModel(**options).eval()
  index = small_fixture.fill(model, seed)
  rng = np.random.default_rng(seed)

  def drawn(*shape):
    return (np.round(8 * rng.standard_normal(shape)) / 8).astype(np.float32)

  x = drawn(4, options["in_channels"], *size)
  t = np.array([1, 17.25, 500.5, 1000], np.float32)
  context = drawn(4, 6, options["joint_attention_dim"])
  pooled = drawn(4, options["pooled_projection_dim"])
  with torch.no_grad():
    output = model(*map(torch.from_numpy, (x, context, pooled, t))).sample
  nhwc = (0, 2, 3, 1)
  np.savez_compressed(
      path, index=json.dumps(index), seed=seed, config=model.to_json_string(),
      x=x.transpose(nhwc), t=t, context=context, pooled=pooled,
      output=output.numpy().transpose(nhwc))
  print(path, f"outputs of standard deviation {output.std():.3g}")


def _scheduler(kind, options: dict, size: tuple[int, int],
               patch_size: int) -> dict:
  """The configuration, and the noise levels that are visited."""
  scheduler = kind(**options)
  extra = {}
  if options.get("use_dynamic_shifting"):
    # As `calculate_shift` of StableDiffusion3Pipeline.
    get = scheduler.config.get
    few, many = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    low, high = get("base_shift", 0.5), get("max_shift", 1.15)
    tokens = (size[0] // patch_size) * (size[1] // patch_size)
    slope = (high - low) / (many - few)
    extra["mu"] = tokens * slope + low - slope * few
  scheduler.set_timesteps(_STEPS, **extra)
  return {"config": json.loads(scheduler.to_json_string()), "size": size,
          "patch_size": patch_size, "steps": _STEPS,
          "sigmas": scheduler.sigmas.tolist()}


if __name__ == "__main__":
  main(sys.argv[1])

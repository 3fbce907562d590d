"""Dumps outputs of tiny random networks of guided- and improved-diffusion.

  pip install torch
  git clone https://github.com/openai/improved-diffusion
  git clone https://github.com/openai/guided-diffusion
  PYTHONPATH=improved-diffusion:guided-diffusion \
    python tools/dump_guided_fixture.py tests/testdata

Run once, outside CI, with the original code: the tests then need neither it nor
PyTorch.
"""

import json
import os
import sys

from guided_diffusion import gaussian_diffusion
from guided_diffusion import unet as guided
from improved_diffusion import unet as improved
import numpy as np
import small_fixture
import torch

_STEPS = 50
_CLASSES = 5
# Together they have the switches of the published networks, and the others that
# we read. By name: the code, its flags, those flags that do not follow from the
# weights, and the noise schedule.
_MODELS = {
    # As 64x64_diffusion.pt: pooling in residual blocks, heads after q, k, v.
    "guided_new_order": (
        guided,
        dict(out_channels=6, channel_mult=(1, 2, 1),
             attention_resolutions=(1, 4), use_scale_shift_norm=True,
             num_classes=_CLASSES),
        dict(num_head_channels=16, resblock_updown=True,
             use_new_attention_order=True),
        "cosine"),
    # As 256x256_diffusion_uncond.pt. Here attention is in the middle of three
    # levels of two blocks.
    "guided_old_order": (
        guided,
        dict(out_channels=6, channel_mult=(1, 1, 1), attention_resolutions=(2,),
             use_scale_shift_norm=True, num_res_blocks=2),
        dict(num_head_channels=8, resblock_updown=True,
             use_new_attention_order=False),
        "linear"),
    # The first level has half the width, as in 512x512_diffusion.pt. Resampling
    # is by strided convolutions; the way up has another number of heads.
    "guided_half_width": (
        guided,
        dict(out_channels=3, model_channels=64, channel_mult=(0.5, 1),
             attention_resolutions=(2,), use_scale_shift_norm=False,
             num_classes=_CLASSES),
        dict(num_heads=2, num_heads_upsample=4),
        "linear"),
    # As imagenet64_cond_270M_250K.pt.
    "openai_class_cond": (
        improved,
        dict(out_channels=6, channel_mult=(1, 1), attention_resolutions=(2,),
             use_scale_shift_norm=True, num_classes=_CLASSES),
        dict(num_heads=2, num_heads_upsample=-1),
        "cosine"),
}

# 64x64_diffusion.pt, a sixth as wide.
_PUBLISHED = {
    "imagenet64": dict(
        out_channels=6, channel_mult=(1, 2, 3, 4), num_res_blocks=3,
        attention_resolutions=(2, 4, 8), use_scale_shift_norm=True,
        resblock_updown=True, num_head_channels=32, num_classes=1000),
}


def main(folder: str) -> None:
  for seed, (name, (code, flags, card, schedule)) in enumerate(_MODELS.items()):
    sizes = dict(in_channels=3, model_channels=32, num_res_blocks=1)
    if code is guided:
      sizes["image_size"] = 8
    model = code.UNetModel(**{**sizes, **flags, **card}).eval()
    index = small_fixture.fill(model, seed)
    rng = np.random.default_rng(seed)
    x = np.round(8 * rng.standard_normal((4, 3, 8, 8))).astype(np.float32) / 8
    t = np.array([0, 7.25, 30.5, _STEPS - 1], np.float32)
    labels = np.array([3, 0, _CLASSES - 1, 1])
    inputs = [torch.from_numpy(x), torch.from_numpy(t)]
    golden = {}
    if "num_classes" in flags:
      inputs.append(torch.from_numpy(labels))
      golden["labels"] = labels
    with torch.no_grad():
      output = model(*inputs).numpy()
    nhwc = (0, 2, 3, 1)
    np.savez_compressed(
        os.path.join(folder, name + ".npz"), index=json.dumps(index), seed=seed,
        card=json.dumps(dict(
            card, image_size=8, diffusion_steps=_STEPS, noise_schedule=schedule,
            rescale_timesteps=False)),
        x=x.transpose(nhwc), t=t, output=output.transpose(nhwc),
        betas=gaussian_diffusion.get_named_beta_schedule(schedule, _STEPS),
        **golden)
    print(name, f"outputs of standard deviation {output.std():.3g}")
  shapes = {}
  for name, flags in _PUBLISHED.items():
    model = guided.UNetModel(
        image_size=64, in_channels=3, model_channels=32, **flags)
    shapes[name] = {
        key: list(value.shape) for key, value in model.state_dict().items()}
  with open(os.path.join(folder, "guided_shapes.json"), "w") as f:
    json.dump(shapes, f)


if __name__ == "__main__":
  main(sys.argv[1])

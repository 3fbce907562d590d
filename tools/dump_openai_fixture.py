"""Dumps tiny random networks of improved-diffusion with their outputs.

  pip install torch
  git clone https://github.com/openai/improved-diffusion
  PYTHONPATH=improved-diffusion python tools/dump_openai_fixture.py \
    tests/testdata

Run once, outside CI, with the original code: the tests then need neither it nor
PyTorch.
"""

import json
import os
import sys

from improved_diffusion import gaussian_diffusion
from improved_diffusion import unet
import numpy as np
import small_fixture
import torch

# The two differ in every switch in which the published networks differ. In the
# first, attention ends both levels, so two widths have the same number of
# heads. In the second, the level that is upsampled has no attention.
_MODELS = {
    "openai_learned_sigma": (
        dict(out_channels=6, channel_mult=(1, 2), attention_resolutions=(1, 2),
             use_scale_shift_norm=True),
        dict(image_size=8, num_heads=2, diffusion_steps=50,
             noise_schedule="cosine", rescale_timesteps=True)),
    "openai_plain": (
        dict(out_channels=3, channel_mult=(1, 1), attention_resolutions=(1,),
             use_scale_shift_norm=False),
        dict(image_size=8, num_heads=1, diffusion_steps=50,
             noise_schedule="linear", rescale_timesteps=False)),
}

# The published networks for CIFAR-10, ImageNet and LSUN, a quarter as wide.
_PUBLISHED = {
    "cifar10": dict(
        out_channels=6, channel_mult=(1, 2, 2, 2), num_res_blocks=3,
        attention_resolutions=(2, 4), use_scale_shift_norm=True),
    "imagenet64": dict(
        out_channels=6, channel_mult=(1, 2, 3, 4), num_res_blocks=3,
        attention_resolutions=(4, 8), use_scale_shift_norm=True),
    "lsun": dict(
        out_channels=6, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2,
        attention_resolutions=(16,), use_scale_shift_norm=False),
}


def main(folder: str) -> None:
  for seed, (name, (flags, card)) in enumerate(_MODELS.items()):
    rng = np.random.default_rng(seed)
    model = unet.UNetModel(
        in_channels=3, model_channels=32, num_res_blocks=1,
        num_heads=card["num_heads"], **flags).eval()
    tensors = {key: small_fixture.draw(key, tuple(value.shape), rng)
               for key, value in model.state_dict().items()}
    model.load_state_dict({
        key: torch.from_numpy(values * np.float32(scale))
        for key, (values, scale) in tensors.items()})
    steps = card["diffusion_steps"]
    x = rng.standard_normal((4, 3, 8, 8)).astype(np.float32)
    t = np.array([0, 7.25, 30.5, steps - 1], np.float32)
    scale = 1000.0 / steps if card["rescale_timesteps"] else 1.0
    with torch.no_grad():
      output = model(torch.from_numpy(x), torch.from_numpy(t) * scale).numpy()
    nhwc = (0, 2, 3, 1)
    small_fixture.save(
        os.path.join(folder, name + ".npz"), tensors, card=json.dumps(card),
        x=x.transpose(nhwc), t=t, output=output.transpose(nhwc),
        betas=gaussian_diffusion.get_named_beta_schedule(
            card["noise_schedule"], steps))
  shapes = {}
  for name, flags in _PUBLISHED.items():
    model = unet.UNetModel(in_channels=3, model_channels=32, **flags)
    shapes[name] = {
        key: list(value.shape) for key, value in model.state_dict().items()}
  with open(os.path.join(folder, "openai_shapes.json"), "w") as f:
    json.dump(shapes, f)


if __name__ == "__main__":
  main(sys.argv[1])

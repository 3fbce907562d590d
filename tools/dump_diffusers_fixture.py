"""Dumps a tiny random UNet2DModel of diffusers with its outputs, for the tests.

  pip install torch diffusers safetensors
  python tools/dump_diffusers_fixture.py tests/testdata/tiny_unet2d

Run once, outside CI: its switches are those that the embedded digits model does
not use. The tests then need neither PyTorch nor diffusers.
"""

import os
import sys

import diffusers
import numpy as np
import torch


def main(folder: str) -> None:
  torch.manual_seed(0)
  model = diffusers.UNet2DModel(
      sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16),
      layers_per_block=2, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
      up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
      norm_num_groups=4, norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0,
      downsample_padding=1, resnet_time_scale_shift="scale_shift").eval()
  with torch.no_grad():
    for name, value in model.named_parameters():
      # Biases and gains of a new model are 0 and 1: give them a say.
      if value.ndim == 1:
        value.add_(0.3 * torch.randn_like(value))
    x = torch.randn(4, 3, 8, 8)
    t = torch.tensor([0.0, 17.25, 250.5, 499.0])
    output = model(x, t).sample
  model.save_pretrained(folder)
  diffusers.DDPMScheduler(
      num_train_timesteps=500, beta_schedule="scaled_linear",
      beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
  ).save_pretrained(folder)
  nhwc = (0, 2, 3, 1)
  np.savez(os.path.join(folder, "golden.npz"), x=x.numpy().transpose(nhwc),
           t=t.numpy(), output=output.numpy().transpose(nhwc))


if __name__ == "__main__":
  main(sys.argv[1])

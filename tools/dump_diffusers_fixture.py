"""Dumps tiny random UNet2DModels of diffusers with their outputs.

  pip install torch diffusers safetensors
  python tools/dump_diffusers_fixture.py tests/testdata

Run once, outside CI: the tests then need neither PyTorch nor diffusers. The
models use the switches that the embedded digits model does not use.
"""

import json
import os
import sys

import diffusers
import numpy as np
import small_fixture
import torch

_CLASSES = 5
_COMMON = dict(
    sample_size=8, in_channels=3, out_channels=3, layers_per_block=1,
    block_out_channels=(8, 16, 8), attention_head_dim=4, norm_num_groups=4)
# Together they have every value of every key that we read.
_VARIANTS = {
    # Only blocks with attention obey downsample_type and upsample_type. Those
    # without it keep their convolution.
    "diffusers_classes": dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_type="resnet", upsample_type="resnet",
        num_class_embeds=_CLASSES, act_fn="gelu", time_embedding_dim=24,
        mid_block_scale_factor=1.5, attn_norm_num_groups=2, dropout=0.5),
    "diffusers_timestep": dict(
        down_block_types=("AttnDownBlock2D", "ResnetDownsampleBlock2D",
                          "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        class_embed_type="timestep", num_class_embeds=_CLASSES, act_fn="mish",
        resnet_time_scale_shift="scale_shift", attn_norm_num_groups=2,
        center_input_sample=True, downsample_padding=0),
    "diffusers_relu": dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        act_fn="relu", attention_head_dim=None),
    "diffusers_plain_middle": dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        add_attention=False),
    # The last half of the channels is a variance.
    "diffusers_learned_variance": dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        out_channels=6),
}


def main(folder: str) -> None:
  _dump_folder(os.path.join(folder, "tiny_unet2d"))
  for seed, (name, options) in enumerate(_VARIANTS.items()):
    _dump_variant(os.path.join(folder, name + ".npz"), options, seed)


def _dump_variant(path: str, options: dict, seed: int) -> None:
  """Writes configuration, outputs, and a seed in place of the weights."""
  model = diffusers.UNet2DModel(**{**_COMMON, **options}).eval()
  index = small_fixture.fill(model, seed)
  rng = np.random.default_rng(seed)
  x = np.round(8 * rng.standard_normal((4, 3, 8, 8))).astype(np.float32) / 8
  t = np.array([0, 17.25, 250.5, 999], np.float32)
  golden, labels = {}, None
  if "num_class_embeds" in options:
    golden["labels"] = np.array([3, 0, _CLASSES - 1, 1])
    labels = torch.from_numpy(golden["labels"])
  with torch.no_grad():
    output = model(torch.from_numpy(x), torch.from_numpy(t), labels).sample
  nhwc = (0, 2, 3, 1)
  np.savez_compressed(
      path, index=json.dumps(index), seed=seed,
      config=model.to_json_string(),
      scheduler=diffusers.DDPMScheduler().to_json_string(),
      x=x.transpose(nhwc), t=t, output=output.numpy().transpose(nhwc), **golden)
  print(path, f"outputs of standard deviation {output.std():.3g}")


def _dump_folder(folder: str) -> None:
  """Writes a model folder in diffusers' layout, with outputs."""
  torch.manual_seed(0)
  model = diffusers.UNet2DModel(
      sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16),
      layers_per_block=2, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
      up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
      norm_num_groups=4, norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0,
      downsample_padding=1, resnet_time_scale_shift="scale_shift").eval()
  with torch.no_grad():
    for name, value in model.named_parameters():
      # Biases and gains of a new model are 0 and 1, which would hide faults.
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

"""Dumps tiny random UNet2DConditionModels of diffusers with their outputs.

  pip install torch diffusers safetensors
  python tools/dump_condition_unet_fixture.py tests/testdata

Run once, outside CI: the tests then need neither PyTorch nor diffusers. Beside
the tiny networks, `condition_shapes.npz` has the configurations of published
ones, with names and shapes of their tensors.
"""

import json
import os
import sys

import diffusers
import numpy as np
import small_fixture
import torch

_DOWN, _CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
_UP, _CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
_COMMON = dict(sample_size=8, layers_per_block=1, norm_num_groups=4)
# Attention of random weights picks single tokens, and float32 is not enough for
# the gradient of many such layers.
_CALM = {"to_q.weight": -2, "to_out.0.weight": -2}
# Together they have every value of every key that we read. Of tensors whose
# name ends like a key of "small", all numbers are multiplied by its power of 2,
# so that a wrong epsilon of the normalisation behind shows.
_VARIANTS = {
    # As Stable Diffusion 2.
    "condition_linear": dict(
        block_out_channels=(8, 16, 16), attention_head_dim=(2, 4, 1),
        down_block_types=(_CROSS_DOWN, _CROSS_DOWN, _DOWN),
        up_block_types=(_UP, _CROSS_UP, _CROSS_UP), cross_attention_dim=6,
        use_linear_projection=True, upcast_attention=True, norm_eps=1e-2,
        small={"conv_in.weight": -8, "conv_in.bias": -8,
               "down_blocks.0.resnets.0.conv2.weight": -8,
               "down_blocks.0.resnets.0.conv2.bias": -8}),
    # As SDXL.
    "condition_text_time": dict(
        block_out_channels=(8, 12, 16), attention_head_dim=(1, 3, 4),
        down_block_types=(_DOWN, _CROSS_DOWN, _CROSS_DOWN),
        up_block_types=(_CROSS_UP, _CROSS_UP, _UP), cross_attention_dim=10,
        transformer_layers_per_block=[1, 2, 3],
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=53,
        small={"proj_in.weight": -6, "proj_in.bias": -6, **_CALM}),
    # As the refiner of SDXL, with five sizes.
    "condition_refiner": dict(
        block_out_channels=(8, 16), attention_head_dim=(2, 4),
        down_block_types=(_CROSS_DOWN, _DOWN), up_block_types=(_UP, _CROSS_UP),
        cross_attention_dim=6, transformer_layers_per_block=[1, [2, 7]],
        reverse_transformer_layers_per_block=[1, [2, 0]], act_fn="relu",
        mid_block_scale_factor=1.5, addition_embed_type="text_time",
        addition_time_embed_dim=6, projection_class_embeddings_input_dim=37,
        flip_sin_to_cos=False, freq_shift=1, conv_in_kernel=1),
    "condition_odd": dict(
        sample_size=(7, 10), in_channels=3, out_channels=5,
        block_out_channels=(8, 12, 8), attention_head_dim=2,
        down_block_types=(_DOWN, _CROSS_DOWN, _CROSS_DOWN),
        up_block_types=(_UP, _CROSS_UP, _UP), cross_attention_dim=[5, 9, 9],
        mid_block_type="UNetMidBlock2D", layers_per_block=[1, 2, 1],
        only_cross_attention=[False, True, False], center_input_sample=True,
        downsample_padding=0, resnet_time_scale_shift="scale_shift",
        act_fn="gelu", timestep_post_act="mish", time_embedding_act_fn="relu",
        time_embedding_dim=20, conv_in_kernel=5, conv_out_kernel=1,
        dropout=0.5),
    "condition_no_middle": dict(
        sample_size=(9, 6), block_out_channels=(8, 8, 8), attention_head_dim=4,
        down_block_types=(_CROSS_DOWN, _DOWN, _DOWN),
        up_block_types=(_UP, _UP, _CROSS_UP), cross_attention_dim=4,
        mid_block_type=None, only_cross_attention=True, act_fn="mish"),
}

_SD1 = dict(sample_size=64, cross_attention_dim=768)
_SD2 = dict(sample_size=96, cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20), use_linear_projection=True,
            upcast_attention=True)
_SDXL = dict(
    sample_size=128, block_out_channels=(320, 640, 1280),
    down_block_types=(_DOWN, _CROSS_DOWN, _CROSS_DOWN),
    up_block_types=(_CROSS_UP, _CROSS_UP, _UP), cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)


def main(folder: str) -> None:
  for seed, (name, options) in enumerate(_VARIANTS.items()):
    _dump_variant(os.path.join(folder, name + ".npz"), dict(options), seed)
  _dump_shapes(os.path.join(folder, "condition_shapes.npz"))


def _dump_variant(path: str, options: dict, seed: int) -> None:
  """Writes configuration, outputs, gradients, and a seed for the weights."""
  small = options.pop("small", {})
  model = diffusers.UNet2DConditionModel(**{**_COMMON, **options}).eval()
  tensors, index = small_fixture.seeded(
      {key: tuple(value.shape) for key, value in model.state_dict().items()},
      seed)
  for i, (key, shape, scale, offset) in enumerate(index):
    power = next((p for end, p in small.items() if key.endswith(end)), 0)
    tensors[key] = tensors[key] * np.float32(2.0 ** power)
    index[i] = (key, shape, scale * 2.0 ** power, offset)
  model.load_state_dict({
      key: torch.from_numpy(value) for key, value in tensors.items()})
  inputs, weight = _inputs(model.config, seed)
  # In float64, but for the sines of times and sizes, which are of float32.
  model = model.double()
  given = {key: torch.from_numpy(value).double().requires_grad_()
           for key, value in inputs.items()}
  added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]
           } if "pooled" in given else None
  output = model(given["x"], given["t"], given["context"],
                 added_cond_kwargs=added).sample
  (torch.from_numpy(weight) * output).sum().backward()
  golden = {"weight": weight, "output": output.detach().numpy(),
            **inputs, **{f"d_{key}": v.grad.numpy() for key, v in given.items()}}
  golden = {key: (value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
                  ).astype(np.float32) for key, value in golden.items()}
  np.savez_compressed(path, index=json.dumps(index), seed=seed,
                      config=model.to_json_string(), **golden)
  print(path, os.path.getsize(path), "bytes; standard deviations", {
      key: f"{value.std():.3g}" for key, value in golden.items()})


def _inputs(config, seed: int) -> tuple[dict, np.ndarray]:
  """Inputs by name, images as in PyTorch; and a weight for each output."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return np.round(8 * rng.standard_normal(shape)).astype(np.float32) / 8

  size = config.sample_size
  size = (size, size) if isinstance(size, int) else tuple(size)
  width = config.cross_attention_dim
  inputs = {"x": draw(4, config.in_channels, *size),
            "t": np.array([0, 17.25, 250.5, 999], np.float32),
            "context": draw(4, 5 + seed % 3,
                            width if isinstance(width, int) else width[-1])}
  if config.addition_embed_type is not None:
    count = 5 if config.addition_time_embed_dim == 6 else 6
    inputs["pooled"] = draw(
        4, config.projection_class_embeddings_input_dim
        - count * config.addition_time_embed_dim)
    inputs["time_ids"] = rng.integers(0, 1024, (4, count)).astype(np.float32)
  return inputs, draw(4, config.out_channels, *size)


def _dump_shapes(path: str) -> None:
  """Writes configurations, tensors' names and shapes of published networks."""
  published = {}
  for name, options in dict(sd1=_SD1, sd2=_SD2, sdxl=_SDXL).items():
    with torch.device("meta"):
      model = diffusers.UNet2DConditionModel(**options)
    published[name] = json.dumps({
        "config": json.loads(model.to_json_string()),
        "shapes": {key: tuple(value.shape)
                   for key, value in model.state_dict().items()}})
    print(name, model.num_parameters(), "parameters")
  np.savez_compressed(path, **published)


if __name__ == "__main__":
  main(sys.argv[1])

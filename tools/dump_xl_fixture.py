"""Makes a tiny SDXL pipeline, and runs it from two prompts, for the tests.

  python tools/dump_xl_fixture.py tests/testdata/latent_xl

It needs torch, diffusers and transformers. The fixture was written with diffusers
0.42.1 and transformers 5.24.0. All weights are random. The folder has network,
decoder and scheduler, with weights in float16 alone; `conditions.npz`, which
`tools/encode_prompts.py` makes of the prompts by the text encoders, which are not
kept; and `golden.npz`:

  run_x_T, run_latents  float32 [2, 8, 8, 4], of "a dog" and "a cat"
  run_image             float32 [2, 16, 16, 3], not clipped
  run_guidance, run_timesteps [4], run_abar [5]
"""

import json
import os
import subprocess
import sys
import tempfile

import diffusers
import numpy as np
import torch
import transformers

PROMPTS, NEGATIVE, GUIDANCE, SIZE = ("a cat", "a dog", "a cat"), "blurry", 3.0, 16


def tokenizer(folder):
  """Letters as tokens, at most 8 of them with start and end."""
  letters = "abcdefghijklmnopqrstuvwxyz"
  words = [*letters, *(f"{letter}</w>" for letter in letters),
           "<|startoftext|>", "<|endoftext|>"]
  with open(os.path.join(folder, "vocab.json"), "w", encoding="utf-8") as file:
    json.dump({word: i for i, word in enumerate(words)}, file)
  with open(os.path.join(folder, "merges.txt"), "w", encoding="utf-8") as file:
    file.write("#version: 0.2\n")
  return transformers.CLIPTokenizer(
      os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt"),
      model_max_length=8)


def text_encoder(seed):
  torch.manual_seed(seed)
  return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
      vocab_size=54, hidden_size=6, intermediate_size=16, num_hidden_layers=3,
      num_attention_heads=2, max_position_embeddings=8, bos_token_id=52,
      eos_token_id=53, projection_dim=5, hidden_act="quick_gelu")).eval()


def spread(model):
  """Makes norms and biases random too, and all weights those of float16."""
  with torch.no_grad():
    for name, value in model.named_parameters():
      if value.ndim == 1:
        value += 0.2 * torch.randn_like(value)
      value.copy_(value.half().float())
  return model.eval()


def pipeline(folder):
  torch.manual_seed(0)
  unet = spread(diffusers.UNet2DConditionModel(
      sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
      down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
      up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=4,
      cross_attention_dim=12, attention_head_dim=(2, 4),
      addition_embed_type="text_time", addition_time_embed_dim=4,
      projection_class_embeddings_input_dim=5 + 6 * 4,
      transformer_layers_per_block=(1, 2), use_linear_projection=True))
  vae = spread(diffusers.AutoencoderKL(
      block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1,
      down_block_types=("DownEncoderBlock2D",) * 2,
      up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
      scaling_factor=0.13025))
  words = tokenizer(folder)
  return diffusers.StableDiffusionXLPipeline(
      vae=vae, text_encoder=text_encoder(1), text_encoder_2=text_encoder(2),
      tokenizer=words, tokenizer_2=words, unet=unet,
      scheduler=diffusers.DDIMScheduler(
          beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
          clip_sample=False, set_alpha_to_one=False, steps_offset=1))


def run(pipe):
  """Its own four steps."""
  x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
  options = dict(
      prompt=["a dog", "a cat"], negative_prompt=[NEGATIVE] * 2,
      num_inference_steps=4, guidance_scale=GUIDANCE, height=SIZE, width=SIZE)
  latents = pipe(latents=x_T.clone(), output_type="latent", **options).images
  with torch.no_grad():
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
  times, abar = pipe.scheduler.timesteps.numpy(), pipe.scheduler.alphas_cumprod
  nhwc = lambda value: value.permute(0, 2, 3, 1).numpy()
  return dict(
      run_x_T=nhwc(x_T), run_latents=nhwc(latents), run_image=nhwc(image),
      run_guidance=GUIDANCE, run_timesteps=times,
      run_abar=np.append(abar.numpy()[times], float(abar[0])))


def main(destination):
  with tempfile.TemporaryDirectory() as folder:
    pipe = pipeline(folder)
    pipe.save_pretrained(folder)
    prompts = os.path.join(folder, "prompts.txt")
    with open(prompts, "w", encoding="utf-8") as file:
      file.write("\n".join(PROMPTS))
    os.makedirs(destination, exist_ok=True)
    subprocess.run(
        [sys.executable, os.path.join(os.path.dirname(__file__), "encode_prompts.py"),
         folder, prompts, os.path.join(destination, "conditions.npz"),
         f"--negative={NEGATIVE}", f"--size={SIZE}"], check=True)
    np.savez(os.path.join(destination, "golden.npz"), **run(pipe))
    for name in ("unet", "vae"):
      getattr(pipe, name).half().save_pretrained(
          os.path.join(destination, name), variant="fp16")
    pipe.scheduler.save_pretrained(os.path.join(destination, "scheduler"))
    with open(os.path.join(folder, "model_index.json"), encoding="utf-8") as file:
      index = file.read()
    with open(os.path.join(destination, "model_index.json"), "w",
              encoding="utf-8") as file:
      file.write(index)


if __name__ == "__main__":
  main(*sys.argv[1:])

"""Makes the table of conditions of a text-to-image pipeline of diffusers.

  python tools/encode_prompts.py PIPELINE prompts.txt conditions.npz \
    [--negative="blurry"] [--size=512] [--dtype=float16]

PIPELINE is the folder of a StableDiffusionPipeline, StableDiffusionXLPipeline or
StableDiffusion3Pipeline. The text file has a prompt in each line. A prompt that
is there n times is a row of weight n, so a file of all captions of a data set
gives its frequencies. The last row is the negative prompt.

It needs PyTorch, diffusers and transformers, and neither TensorFlow nor this
library. Only the text encoders are loaded. `load_denoiser.conditions` reads the
file.
"""

import argparse
import collections
import json
import os
import sys
import types

import numpy as np

# The parts of a pipeline that texts do not need.
_NOT_NEEDED = ("unet", "transformer", "vae", "safety_checker", "image_encoder")
_BATCH = 16


def read_prompts(path: str) -> tuple[list[str], list[int]]:
  """The distinct lines of a file, and how often each occurs."""
  with open(path, encoding="utf-8") as file:
    counts = collections.Counter(
        line.strip() for line in file if line.strip())
  if not counts:
    sys.exit(f"{path} must have a prompt in each line. Received: none")
  return list(counts), list(counts.values())


def load(folder: str):
  """A pipeline without the parts that texts do not need, and its index."""
  import diffusers  # pylint: disable=g-import-not-at-top
  index = os.path.join(folder, "model_index.json")
  if not os.path.isfile(index):
    sys.exit(f"PIPELINE must be a folder with model_index.json. Received: {folder}")
  with open(index, encoding="utf-8") as file:
    parts = json.load(file)
  kind = parts.get("_class_name")
  if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline",
                  "StableDiffusion3Pipeline"):
    sys.exit("PIPELINE must be a StableDiffusionPipeline, StableDiffusionXLPipeline "
             f"or StableDiffusion3Pipeline. Received: {kind}")
  missing = {name: None for name in _NOT_NEEDED if name in parts}
  if kind == "StableDiffusion3Pipeline":  # Its third encoder may be left out.
    missing |= {name: None for name in ("text_encoder_3", "tokenizer_3")
                if (parts.get(name) or [None])[0] is None}
  pipeline = getattr(diffusers, kind).from_pretrained(folder, **missing)
  if getattr(pipeline, "text_encoder_3", 0) is None:
    # The pipeline asks its network how wide the zeros for this encoder are.
    with open(os.path.join(folder, "transformer", "config.json"),
              encoding="utf-8") as file:
      config = types.SimpleNamespace(**json.load(file))
    pipeline.transformer = types.SimpleNamespace(config=config, dtype=None)
  return pipeline


def encode(pipeline, prompts: list[str], negative: str | None, size: int,
           crop: tuple[int, int] = (0, 0)) -> dict[str, np.ndarray]:
  """The arrays of prompts, and of the negative prompt as their last row.

  Args:
    pipeline: of diffusers, with text encoders and tokenizers.
    prompts: N texts.
    negative: the negative prompt; None: what the pipeline takes without one.
    size: height and width of the images, which SDXL is told.
    crop: top and left, likewise.

  Returns:
    float32 [N + 1, ...]: "context"; "pooled" and "time_ids" if there are any.
  """
  import torch  # pylint: disable=g-import-not-at-top
  kind = type(pipeline).__name__
  options = dict(device="cpu", num_images_per_prompt=1,
                 do_classifier_free_guidance=True)
  found = collections.defaultdict(list)
  null = {}
  with torch.no_grad():
    for start in range(0, len(prompts), _BATCH):
      texts = prompts[start:start + _BATCH]
      if negative is not None:
        options["negative_prompt"] = [negative] * len(texts)
      # Stable Diffusion 3 has three encoders, and a prompt for each.
      values = pipeline.encode_prompt(
          texts, *([None, None] if kind == "StableDiffusion3Pipeline" else []),
          **options)
      for name, given, without in zip(
          ("context", "pooled"), values[::2], values[1::2]):
        found[name].append(given.float().numpy())
        null[name] = without[:1].float().numpy()
  arrays = {name: np.concatenate([*found[name], null[name]]) for name in found}
  if kind == "StableDiffusionXLPipeline":
    arrays["time_ids"] = np.tile(
        np.float32([size, size, *crop, size, size]), [len(prompts) + 1, 1])
  return arrays


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("pipeline")
  parser.add_argument("prompts", help="a text file with a prompt in each line")
  parser.add_argument("output", help="the .npz file to write")
  parser.add_argument("--negative", help="the negative prompt")
  parser.add_argument("--size", type=int, default=1024,
                      help="height and width of the images, which SDXL is told")
  parser.add_argument("--dtype", choices=("float32", "float16"),
                      default="float32", help="what the arrays are kept in")
  options = parser.parse_args()
  if not options.output.endswith(".npz"):
    parser.error(f"the output must end in .npz. Received: {options.output}")
  prompts, counts = read_prompts(options.prompts)
  arrays = encode(load(options.pipeline), prompts, options.negative, options.size)
  arrays = {name: value if name == "time_ids" else value.astype(options.dtype)
            for name, value in arrays.items()}
  weights = {} if len(set(counts)) == 1 else {"weights": [*counts, 0]}
  temporary = options.output + ".part"
  with open(temporary, "wb") as file:
    np.savez(file, **arrays, prompts=[*prompts, options.negative or ""],
             null_row=len(prompts), **weights)
  os.replace(temporary, options.output)
  shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items())
  print(f"{options.output}: {len(prompts)} prompts and a negative one, {shapes}")


if __name__ == "__main__":
  main()

"""Writes `gin_configs/papers/iclr2022/`: a file per cell of the paper's tables.

  python tools/make_paper_recipes.py

The files are committed; this script is where their numbers are kept. A cell
includes its data set, its sampler and what all share, and binds K.
"""

import os

ROOT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                    "gin_configs", "papers", "iclr2022")
STEPS = (5, 10, 15, 20, 25)
PAPER = "Watson et al. 2022, table of FID / Inception Score"
SLIDES = ("the authors' slides, FID only; an earlier set of runs than the "
          "paper's")

# Published values in the order of the steps.
CELLS = {
    "cifar10": (PAPER, STEPS, {
        "ddpm_linear": "84.27/5.396 43.39/7.034 31.40/7.609 25.94/7.879 "
                       "22.60/8.043",
        "ddpm_quadratic": "76.25/5.435 42.03/6.965 27.78/7.714 20.225/8.128 "
                          "16.17/8.350",
        "ddim_linear": "44.41/6.750 19.11/7.965 14.06/8.190 11.82/8.420 "
                       "10.52/8.512",
        "ddim_quadratic": "32.66/7.090 13.62/8.190 9.318/8.495 7.500/8.641 "
                          "6.560/8.759",
        "ggdm_pred_time": "13.77/8.520 8.227/8.903 6.115/9.050 4.722/9.261 "
                          "4.250/9.186",
    }),
    "imagenet64": (PAPER, STEPS, {
        "ddpm_linear": "122.0/5.878 58.78/10.67 39.30/13.22 31.36/14.72 "
                       "26.36/15.71",
        "ddpm_quadratic": "394.8/1.351 129.5/5.997 80.10/9.595 61.34/11.60 "
                          "49.60/13.01",
        "ddim_linear": "135.4/5.898 40.70/12.225 28.54/13.99 24.225/14.75 "
                       "22.13/15.16",
        "ddim_quadratic": "409.1/1.380 148.6/5.533 67.65/9.842 45.60/11.99 "
                          "36.11/13.225",
        "ggdm_pred_time": "55.14/12.90 37.32/14.76 24.69/17.225 20.69/17.92 "
                          "18.40/18.12",
    }),
    "lsun_bedroom": (SLIDES, (5, 10, 20), {
        "ddpm": "95.38 44.84 16.88",
        "ddim": "168.7 56.33 9.527",
        "ggdm_pred_time": "29.20 11.02 4.854",
    }),
    "lsun_church": (SLIDES, (5, 10, 20), {
        "ddpm": "96.67 51.05 16.53",
        "ddim": "133.1 54.39 14.96",
        # The abstract gives church at 20 steps as 4.82, which fits bedroom's.
        "ggdm_pred_time": "30.14 11.60 6.651|4.82_in_the_paper's_abstract",
    }),
}
NAMES = {
    "cifar10": "CIFAR-10 32x32, Ho et al.'s model (L_simple, linear betas)",
    "imagenet64": "ImageNet 64x64, Nichol and Dhariwal's model (L_hybrid, "
                  "cosine, T = 4000)",
    "lsun_bedroom": "LSUN bedroom 128x128",
    "lsun_church": "LSUN church 128x128",
}
# The published checkpoints: what to know of them, and a path.
_LSUN = ('''\
# No public checkpoint of this size is known to us: that of yours comes below. FID
# is against the 50 000 training images that are read (our choice).
''', "checkpoints/{dataset}")
CHECKPOINTS = {
    "cifar10": ('''\
# load_denoiser reads the original checkpoint, whose folder comes below.
''', "checkpoints/diffusion_cifar10_model"),
    "imagenet64": ('''\
# load_denoiser reads the original checkpoint, whose path comes below, with the
# help of PyTorch and of this card beside it, <path>.json:
#   {{"image_size": 64, "num_heads": 4, "diffusion_steps": 4000,
#    "noise_schedule": "cosine", "rescale_timesteps": true}}
# FID and IS are against the 50 000 training images that are read (our choice).
''', "checkpoints/imagenet64_uncond_100M_1500K.pt"),
    "lsun_bedroom": _LSUN,
    "lsun_church": _LSUN,
}
DEVICES = {
    "cifar10": "one accelerator of 16 GB or more",
    "imagenet64": "one accelerator of 24 GB or more",
    "lsun_bedroom": "one accelerator of 40 GB or more",
    "lsun_church": "one accelerator of 40 GB or more",
}
# Where a stride is not published with a row, it is linear.
SAMPLERS = {
    "ddpm": ("DDPM", "ddpm", "linear"),
    "ddim": ("DDIM", "ddim", "linear"),
    "ddpm_linear": ("DDPM linear", "ddpm", "linear"),
    "ddpm_quadratic": ("DDPM quadratic", "ddpm", "quadratic"),
    "ddim_linear": ("DDIM linear", "ddim", "linear"),
    "ddim_quadratic": ("DDIM quadratic", "ddim", "quadratic"),
    "ggdm_pred_time": ("GGDM+PRED+TIME", None, None),
}

COMMON = '''# What all recipes of the paper's tables share.
#
# Published: KID with the linear kernel on Inception's pool_3, Adam, FID and IS
# of 50 000 samples against the training set. Not published in any text at hand,
# so our choice: batch, steps, learning rate, seeds.
# Required: NUM_STEPS (K), load_denoiser.path (the checkpoint).

include "../../features/inception.gin"

NUM_STEPS = %gin.REQUIRED
NUM_SAMPLES = 50000

DENOISER = @denoiser/gin.singleton()
denoiser/gin.singleton.constructor = @load_denoiser

FEATURES = @features/gin.singleton()
features/gin.singleton.constructor = @loss/load_features

search.denoiser = %DENOISER
search.dataset = %DATASET
search.features = %FEATURES
search.batch_size = 512
search.micro_batch_size = 8
search.num_search_steps = 50000
search.objective = "kid_linear"
search.control_variate = False
search.validation_samples = 5000
search.validate_every = 1000
search.checkpoint_every = 250

evaluate.denoiser = %DENOISER
evaluate.dataset = %DATASET
evaluate.features = %FEATURES
evaluate.num_samples = %NUM_SAMPLES

export.denoiser = %DENOISER
sample.denoiser = %DENOISER
'''

FIXED = '''# The row "{label}" of the paper's and the slides' tables: no search, --mode=evaluate.

evaluate.baselines = [@row/make_sampler]
row/make_sampler.family = "{family}"
row/make_sampler.stride = "{stride}"
row/make_sampler.num_steps = %NUM_STEPS
'''

SEARCHED = '''# The row "GGDM+PRED+TIME" of the paper's tables, and "DDSS" of the slides, with
# the published constraints, from DDIM (the start is our choice).

evaluate.baselines = []
search.sampler = @searched/make_sampler
searched/make_sampler.family = "ggdm+pred+time"
searched/make_sampler.parameterisation = "paper"
searched/make_sampler.num_steps = %NUM_STEPS
'''

DATA = '''# {name}.
{checkpoint}
include "../../datasets/{dataset}.gin"
include "common.gin"

load_denoiser.path = "{path}"
'''

CELL = '''# {name}: {label}, K = {steps}.
# Published ({source}): {published}. Not measured by us.{remarks}
# Device, estimated: {device}.
# python -m ddss_tf.main --mode={mode} --run_dir=runs/{stem} \\
#   --gin_file=gin_configs/papers/iclr2022/{stem}.gin

include "{dataset}.gin"
include "row_{row}.gin"

NUM_STEPS = {steps}
'''


def write(name: str, text: str) -> None:
  with open(os.path.join(ROOT, name), "w") as f:
    f.write(text)


def published(value: str) -> str:
  value, _, other = value.partition("|")
  fid, _, score = value.partition("/")
  return (f"FID {fid}" + (f", IS {score}" if score else "")
          + (f", but {other.replace('_', ' ')}" if other else ""))


def remarks(dataset: str, row: str) -> str:
  """What a reader must know to compare with the published number."""
  lines = []
  if CELLS[dataset][0] == SLIDES:
    lines.append(
        "The slides call this row DDSS, without its family: our choice."
        if row == "ggdm_pred_time" else
        "Its stride is not published: linear is our choice.")
  if dataset != "cifar10":
    lines.append("Here FID is against 50 000 training images (our choice).")
  return "".join(f"\n# {line}" for line in lines)


def main() -> None:
  os.makedirs(ROOT, exist_ok=True)
  write("common.gin", COMMON)
  for row, (label, family, stride) in SAMPLERS.items():
    write(f"row_{row}.gin", SEARCHED if family is None else FIXED.format(
        label=label, family=family, stride=stride))
  for dataset, (source, all_steps, rows) in CELLS.items():
    checkpoint, path = (text.format(dataset=dataset)
                        for text in CHECKPOINTS[dataset])
    write(f"{dataset}.gin", DATA.format(
        name=NAMES[dataset], checkpoint=checkpoint, dataset=dataset, path=path))
    for row, values in rows.items():
      label, family, _ = SAMPLERS[row]
      for steps, value in zip(all_steps, values.split(), strict=True):
        stem = f"{dataset}_{row}_k{steps}"
        write(f"{stem}.gin", CELL.format(
            name=NAMES[dataset], label=label, steps=steps, source=source,
            published=published(value), device=DEVICES[dataset], row=row,
            remarks=remarks(dataset, row),
            mode="evaluate" if family else "run", stem=stem, dataset=dataset))


if __name__ == "__main__":
  main()

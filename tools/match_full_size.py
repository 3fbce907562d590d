"""Compares published architectures in full size with the original libraries.

The networks have random weights, and see an image at each of three times. There
are two steps, because the originals need PyTorch and we do not. FOLDER takes
about 2 GB:

  pip install torch diffusers safetensors
  git clone https://github.com/openai/improved-diffusion
  git clone https://github.com/openai/guided-diffusion
  PYTHONPATH=improved-diffusion:guided-diffusion \
    python tools/match_full_size.py dump FOLDER
  python tools/match_full_size.py match FOLDER

The second step needs an environment with ddss_tf. It prints the largest
difference of each network, and exits with status 1 if one is above 1e-4 of the
output's standard deviation.
"""

import json
import os
import sys

import numpy as np

_TOLERANCE = 1e-4
_CIFAR10 = "ddpm-cifar10-32"  # google/ddpm-cifar10-32, in diffusers' layout.
_CLASSES = 1000
# Published models: the package, its flags, and the content of our card.
_OPENAI = {
    "imagenet64_uncond_100M_1500K": (
        "improved_diffusion",
        dict(image_size=64, num_channels=128, num_res_blocks=3, num_heads=4,
             num_heads_upsample=-1, attention_resolutions="16,8", dropout=0.0,
             learn_sigma=True, class_cond=False, use_checkpoint=False,
             use_scale_shift_norm=True),
        dict(image_size=64, num_heads=4, diffusion_steps=4000,
             noise_schedule="cosine", rescale_timesteps=True)),
    "64x64_diffusion": (
        "guided_diffusion",
        dict(image_size=64, num_channels=192, num_res_blocks=3,
             num_head_channels=64, attention_resolutions="32,16,8", dropout=0.1,
             learn_sigma=True, class_cond=True, resblock_updown=True,
             use_new_attention_order=True, use_scale_shift_norm=True),
        dict(image_size=64, num_head_channels=64, diffusion_steps=1000,
             noise_schedule="cosine", rescale_timesteps=False,
             use_new_attention_order=True)),
}


def _dump(folder: str) -> None:
  """Builds the originals, and writes weights, inputs and outputs."""
  # Imported here, so that no environment needs the packages of both steps.
  import importlib  # pylint: disable=g-import-not-at-top
  import diffusers  # pylint: disable=g-import-not-at-top
  import safetensors.torch  # pylint: disable=g-import-not-at-top
  import torch  # pylint: disable=g-import-not-at-top

  def randomise(model):
    # Random, because some convolutions of a new original are zeros.
    torch.manual_seed(0)
    with torch.no_grad():
      for name, value in model.named_parameters():
        value.normal_()
        if value.ndim == 1:
          value.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
        elif name != "label_emb.weight":
          value.div_(value[0].numel() ** 0.5)
    return model.eval()

  def save_golden(name, size, times, scale, function, classes=None):
    torch.manual_seed(1)
    x = torch.randn(len(times), 3, size, size)
    t = torch.tensor(times)
    labels = () if classes is None else (
        torch.randint(0, classes, (len(times),)),)
    with torch.no_grad():
      output = function(x, t * scale, *labels)
    nhwc = (0, 2, 3, 1)
    np.savez(os.path.join(folder, name + ".npz"), x=x.numpy().transpose(nhwc),
             t=t.numpy(), output=output.numpy().transpose(nhwc),
             **{"labels": label.numpy() for label in labels})

  os.makedirs(folder, exist_ok=True)
  model = randomise(diffusers.UNet2DModel(
      sample_size=32, in_channels=3, out_channels=3, layers_per_block=2,
      block_out_channels=(128, 256, 256, 256),
      down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D",
                        "DownBlock2D"),
      up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
      attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False,
      freq_shift=1, norm_eps=1e-6))
  model.save_pretrained(os.path.join(folder, _CIFAR10))
  diffusers.DDPMScheduler().save_pretrained(os.path.join(folder, _CIFAR10))
  save_golden(_CIFAR10, 32, (17.0, 320.0, 740.5), 1.0,
              lambda x, t: model(x, t).sample)

  for name, (package, flags, card) in _OPENAI.items():
    module = importlib.import_module(package + ".script_util")
    model = randomise(module.create_model(**flags))
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()},
        os.path.join(folder, name + ".safetensors"))
    with open(os.path.join(folder, name + ".json"), "w") as f:
      json.dump(card, f)
    steps = card["diffusion_steps"]
    times = (17.0, 0.32 * steps, 0.74 * steps + 0.5)
    save_golden(name, card["image_size"], times,
                1000 / steps if card["rescale_timesteps"] else 1.0, model,
                _CLASSES if flags["class_cond"] else None)


def _match(folder: str) -> None:
  """Converts the networks and compares their outputs."""
  import safetensors.numpy  # pylint: disable=g-import-not-at-top
  import ddss_tf  # pylint: disable=g-import-not-at-top
  from ddss_tf.formats import openai as openai_format  # pylint: disable=g-import-not-at-top

  def compare(name, model):
    with np.load(os.path.join(folder, name + ".npz")) as golden:
      inputs = [golden[key] for key in ("x", "t", "labels") if key in golden]
      # We drop the channels of a learned variance, which come after these.
      expected = golden["output"][..., :3]
    errors = [  # One image at a time, for less memory.
        np.abs(model([value[i:i + 1] for value in inputs], training=False)
               - expected[i:i + 1]).max() for i in range(len(expected))]
    scale = expected.std()
    times = ", ".join(f"{error:.2e} at t = {t:g}"
                      for t, error in zip(inputs[1], errors))
    print(f"{name}: {model.count_params():,} parameters, largest difference "
          f"{times}; outputs of standard deviation {scale:.3g}", flush=True)
    return max(errors) <= _TOLERANCE * scale

  matches = [compare(_CIFAR10, ddss_tf.load_denoiser(
      os.path.join(folder, _CIFAR10)).model)]
  for name, (_, _, card) in _OPENAI.items():
    weights = safetensors.numpy.load_file(
        os.path.join(folder, name + ".safetensors"))
    matches.append(compare(name, openai_format.convert(name, weights, card)))
  if not all(matches):
    sys.exit(1)


if __name__ == "__main__":
  {"dump": _dump, "match": _match}[sys.argv[1]](sys.argv[2])

"""Dumps tiny random networks of EDM with their outputs.

  pip install torch
  git clone https://github.com/NVlabs/edm
  PYTHONPATH=edm python tools/dump_edm_fixture.py tests/testdata

Run once, outside CI, with the original code: the tests then need neither it nor
PyTorch. All weights are random, even those that a new network has as zeros.
"""

import json
import os
import sys

import convert_edm
import numpy as np
import small_fixture
import torch
from training import networks

# Together they have every switch in which the published networks differ, and
# some in which they do not. The first has attention at both levels, in two
# blocks a level on the way down and in the last block on the way up. In the
# third, the finer level is too narrow for a head, and the coarser has one. The
# last is NCSN++.
_MODELS = {
    "edm_song": (networks.EDMPrecond, dict(
        img_resolution=8, img_channels=3, model_type="SongUNet",
        model_channels=16, channel_mult=[1, 2], num_blocks=2, augment_dim=9,
        attn_resolutions=[8, 4], embedding_type="positional",
        encoder_type="standard", decoder_type="standard",
        channel_mult_noise=1, resample_filter=[1, 1], dropout=0.13,
        use_fp16=True)),
    "edm_song_vp": (networks.VPPrecond, dict(
        img_resolution=8, img_channels=1, model_channels=16, label_dim=3,
        channel_mult=[2, 1, 1], num_blocks=1, attn_resolutions=[4],
        channel_mult_emb=2, channel_mult_noise=2, beta_d=10.0, M=500)),
    "edm_dhariwal": (networks.EDMPrecond, dict(
        img_resolution=8, img_channels=3, model_channels=32, label_dim=4,
        channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8, 4],
        augment_dim=2, sigma_data=0.6)),
    "edm_dhariwal_ve": (networks.VEPrecond, dict(
        img_resolution=8, img_channels=1, model_type="DhariwalUNet",
        model_channels=16, channel_mult=[2, 1], num_blocks=1,
        attn_resolutions=[], channel_mult_emb=3)),
    "edm_ncsnpp": (networks.EDMPrecond, dict(
        img_resolution=8, img_channels=3, model_type="SongUNet",
        model_channels=8, channel_mult=[1, 2, 2], num_blocks=1,
        attn_resolutions=[4], embedding_type="fourier",
        encoder_type="residual", decoder_type="standard",
        channel_mult_noise=2, resample_filter=[1, 3, 3, 1])),
}
# The published networks for CIFAR-10 and 64x64 ImageNet, with less width.
_PUBLISHED = {
    "cifar10": (networks.VPPrecond, dict(
        img_resolution=32, img_channels=3, label_dim=10, augment_dim=9,
        model_type="SongUNet", model_channels=32, channel_mult=[2, 2, 2])),
    "cifar10_ve": (networks.EDMPrecond, dict(
        img_resolution=32, img_channels=3, label_dim=10, augment_dim=9,
        model_type="SongUNet", model_channels=32, channel_mult=[2, 2, 2],
        embedding_type="fourier", encoder_type="residual",
        channel_mult_noise=2, resample_filter=[1, 3, 3, 1])),
    "imagenet64": (networks.EDMPrecond, dict(
        img_resolution=64, img_channels=3, label_dim=20,
        model_type="DhariwalUNet", model_channels=64,
        channel_mult=[1, 2, 3, 4])),
}
_SIGMAS = [0.002, 0.05, 0.7, 6.0, 80.0]
_NHWC = (0, 2, 3, 1)


def _random(module, rng) -> dict:
  """Sets a module's parameters at random.

  Returns:
    By name, what `small_fixture.draw` gave.
  """
  drawn = {name: small_fixture.draw(name, tuple(value.shape), rng)
           for name, value in module.named_parameters()}
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      values, scale = drawn[name]
      parameter.copy_(torch.from_numpy(values * np.float32(scale)))
  return drawn


def main(folder: str) -> None:
  for seed, (name, (kind, words)) in enumerate(_MODELS.items()):
    rng = np.random.default_rng(seed)
    network = kind(**words).eval()
    drawn = _random(network, rng)
    for key, value in network.named_buffers():
      if key.endswith("freqs"):
        values, scale = rng.integers(-40, 40, value.shape, np.int8), 0.25
      else:  # A resampling filter: small whole numbers times a scale.
        scale = float(value.min())
        values = np.round(value.numpy() / scale).astype(np.int8)
      value.copy_(torch.from_numpy(values * np.float32(scale)))
      drawn[key] = values, scale
    size, channels = words["img_resolution"], words["img_channels"]
    sigma = np.array(_SIGMAS, np.float32)
    x = rng.standard_normal((5, channels, size, size)).astype(np.float32)
    x = x * np.sqrt(0.25 + sigma**2)[:, None, None, None]
    classes = words.get("label_dim", 0)
    # The last image has no class.
    labels = (np.arange(5) % classes if classes else np.zeros(5)).astype(
        np.int32)
    labels[-1] = -1
    one_hot = np.zeros((5, classes), np.float32)
    for i, label in enumerate(labels):
      if 0 <= label < classes:
        one_hot[i, label] = 1.0
    with torch.no_grad():
      denoised = network(
          torch.from_numpy(x), torch.from_numpy(sigma),
          torch.from_numpy(one_hot) if classes else None).numpy()
    small_fixture.save(
        os.path.join(folder, name + ".npz"), drawn,
        card=json.dumps(convert_edm.card(network)), x=x.transpose(_NHWC),
        sigma=sigma, labels=labels, denoised=denoised.transpose(_NHWC))

  # A block of two heads, which only wide networks have.
  rng = np.random.default_rng(9)
  block = networks.UNetBlock(
      in_channels=8, out_channels=16, emb_channels=12, up=True, attention=True,
      num_heads=2).eval()
  drawn = _random(block, rng)
  x = rng.standard_normal((2, 8, 4, 4)).astype(np.float32)
  embedding = rng.standard_normal((2, 12)).astype(np.float32)
  with torch.no_grad():
    output = block(torch.from_numpy(x), torch.from_numpy(embedding)).numpy()
  small_fixture.save(
      os.path.join(folder, "edm_block.npz"), drawn, x=x.transpose(_NHWC),
      embedding=embedding, output=output.transpose(_NHWC))

  published = {}
  for name, (kind, words) in _PUBLISHED.items():
    network = kind(**words)
    published[name] = {
        "card": convert_edm.card(network),
        "shapes": {key: list(value.shape)
                   for key, value in network.state_dict().items()}}
  with open(os.path.join(folder, "edm_shapes.json"), "w") as f:
    json.dump(published, f)


if __name__ == "__main__":
  main(sys.argv[1])

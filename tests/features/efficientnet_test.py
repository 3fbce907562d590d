"""Tests of EfficientNet-Lite0 against PyTorch's outputs and by hand."""

import os

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import ddss_tf
from ddss_tf.features import efficientnet
from ddss_tf.errors import UserError
from project import ROOT

FOLDER = os.path.join(ROOT, "worlds", "emoji32", "efficientnet-lite0")
here = pytest.mark.skipif(not os.path.exists(FOLDER), reason="no worlds beside us")


@pytest.fixture(scope="module")
def golden():
  with np.load(os.path.join(FOLDER, "golden.npz")) as file:
    return dict(file)


def compare(features, golden, size):
  found = features(golden["image"].astype(np.float32) / 127.5 - 1)
  for key in ("pool", "logits"):
    np.testing.assert_allclose(found[key], golden[f"{key}_{size}"], atol=1e-3)


@here
def test_outputs_are_pytorchs(golden):
  features = ddss_tf.load_features("efficientnet-lite0:worlds:emoji32/efficientnet-lite0")
  compare(features, golden, 128)
  assert features.num_features == 1280 and features.name == "efficientnet-lite0"
  assert "bilinear, half-pixel centres, no antialias, 128x128" in features.protocol
  assert len(features.sha256) == 64
  # Images of any size and of one channel are taken, and there is a gradient.
  assert features(np.zeros([1, 16, 16, 1], np.float32))["pool"].shape == (1, 1280)
  # Inside of the range, to which images are clipped.
  x = 0.9 * tf.constant(golden["image"][:1].astype(np.float32) / 127.5 - 1)
  with tf.GradientTape() as tape:
    tape.watch(x)
    value = tf.reduce_sum(features(x)["pool"])
  gradient = tape.gradient(value, x)
  direction = gradient / tf.norm(gradient)
  step = 1e-3
  ahead, behind = (tf.reduce_sum(features(x + s * direction)["pool"])
                   for s in (step, -step))
  np.testing.assert_allclose((ahead - behind) / (2 * step), tf.norm(gradient), rtol=0.02)
  other = ddss_tf.load_features(
      f"efficientnet-lite0:{FOLDER}/model.safetensors", image_size=224)
  compare(other, golden, 224)
  assert other.sha256 == features.sha256 and other.key != features.key


def small(kernel_shape, rng):
  channels = kernel_shape[0]
  norm = dict(zip(("weight", "bias", "running_mean"), rng.normal(size=(3, channels))))
  norm["running_var"] = rng.uniform(0.5, 2, channels)
  return rng.normal(size=kernel_shape).astype(np.float32), {
      key: value.astype(np.float32) for key, value in norm.items()}


@pytest.mark.parametrize("theirs,norm,ours,shape", [
    ("_conv_stem", "_bn0", "stem", (4, 3, 3, 3)),
    ("_conv_head", "_bn1", "head", (4, 2, 1, 1)),
    ("_blocks.12._depthwise_conv", "_blocks.12._bn1", "block_12_depthwise", (4, 1, 3, 3))])
def test_a_folded_normalisation_is_one(theirs, norm, ours, shape):
  kernel, values = small(shape, np.random.default_rng(0))
  weights = {f"{theirs}.weight": kernel,
             **{f"{norm}.{key}": value for key, value in values.items()}}
  found = efficientnet.folded(weights)
  assert sorted(found) == [f"{ours}/bias", f"{ours}/kernel"]
  patch = np.random.default_rng(1).normal(size=shape[1:])
  before = np.sum(kernel * patch, (1, 2, 3))
  expected = (values["weight"] * (before - values["running_mean"])
              / np.sqrt(values["running_var"] + 1e-3) + values["bias"])
  np.testing.assert_allclose(
      np.sum(found[f"{ours}/kernel"] * patch, (1, 2, 3)) + found[f"{ours}/bias"],
      expected, rtol=1e-4, atol=1e-5)
  del weights[f"{norm}.bias"]
  with pytest.raises(UserError, match=f"must have {norm}.bias with 4 numbers"):
    efficientnet.folded(weights)


def test_bad_files(tmp_path):
  for path in ("nowhere", str(tmp_path)):
    with pytest.raises(UserError, match="must name a safetensors file, or the folder"):
      ddss_tf.load_features(f"efficientnet-lite0:{path}")
  file = tmp_path / "model.safetensors"
  file.write_bytes(b"not this")
  with pytest.raises(UserError, match="not a complete safetensors"):
    ddss_tf.load_features(f"efficientnet-lite0:{tmp_path}")
  safetensors.numpy.save_file({"_fc.weight": np.zeros([2, 3], np.float32)}, str(file))
  with pytest.raises(UserError, match="must hold _fc.bias"):
    ddss_tf.load_features(f"efficientnet-lite0:{file}")
  with pytest.raises(ValueError, match="must be new. Received: 'efficientnet-lite0'"):
    ddss_tf.register_features("efficientnet-lite0")(lambda argument: None)

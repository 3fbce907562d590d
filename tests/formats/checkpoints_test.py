"""Tests of the readers of foreign checkpoints.

Golden outputs are of the original code of each, on random tiny networks.
"""

import json
import os
import sys

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.formats import ddpm as ddpm_lib
from ddss_tf.formats import diffusers
from ddss_tf.formats import openai as openai_lib
from checkpoint_files import (  # pylint: disable=unused-import
    FakeTensor, OPENAI, fake_torch, numbered, openai, read_fixture, refusal,
    save_checkpoint, state_dict, training_state, warnings, write_folder)

GUIDED = ["guided_new_order", "guided_old_order", "guided_half_width",
          "openai_class_cond"]
DIFFUSERS = ["diffusers_classes", "diffusers_timestep", "diffusers_relu",
             "diffusers_plain_middle", "diffusers_learned_variance"]


# --- The original DDPM ---


@pytest.fixture(scope="module")
def ddpm():
  return read_fixture("ddpm_tf1")


def test_ddpm_checkpoint_matches_the_original(ddpm, tmp_path, warnings):
  weights, golden = ddpm
  prefix = str(tmp_path / "cifar" / "model.ckpt-790000")
  os.makedirs(os.path.dirname(prefix))
  save_checkpoint(prefix, training_state(weights))
  denoiser = ddss_tf.load_denoiser(prefix)
  # Attention is at 16x16, one level below the images.
  assert denoiser.image_shape == (32, 32, 3)
  assert np.any(golden["t"] % 1)
  np.testing.assert_allclose(
      denoiser.network(golden["x"], golden["t"]), golden["output"], atol=1e-4)
  assert denoiser.prediction == "eps"
  assert denoiser.name == "model.ckpt-790000"
  np.testing.assert_allclose(
      denoiser.schedule.betas, np.linspace(1e-4, 0.02, 1000))
  assert not any(v.value.trainable for v in denoiser.model.weights)
  assert not warnings

  # By its folder it is the same; at another size the same weights serve.
  folder = os.path.dirname(prefix)
  smaller = ddss_tf.load_denoiser(folder, image_size=8)
  assert smaller.image_shape == (8, 8, 3)
  assert denoiser_lib.weights_sha256(smaller.model) == denoiser_lib.weights_sha256(
      denoiser.model)
  assert smaller.sha256 != denoiser.sha256
  assert "num_heads must not be given" in refusal(
      ddss_tf.load_denoiser, folder, num_heads=4)
  assert "cannot be built" in refusal(
      ddss_tf.load_denoiser, folder, image_size=9)
  save_checkpoint(prefix + "1", {"a": np.zeros(1, np.float32)})
  message = refusal(ddss_tf.load_denoiser, folder)
  assert "model.ckpt-7900001.index" in message and "one checkpoint" in message


@pytest.mark.slow
@pytest.mark.parametrize("network,size,widths,attention", [
    ("cifar10", 32, (32, 64, 64, 64), 1),
    ("lsun", 256, (32, 32, 64, 64, 128, 128), 4),
])
def test_published_ddpm_architectures(network, size, widths, attention):
  weights = numbered("ddpm_shapes.json", network)
  config = ddpm_lib.infer_config(weights)
  assert config.image_size == size
  assert config.channels == widths
  assert config.attention_levels == (attention,)
  assert config.blocks_per_level == 2
  model = ddpm_lib.convert("here", weights)
  numbers = list(weights)

  def source(place):
    return numbers[int(model.get_layer(place).weights[0].numpy().flat[0])]

  last = len(widths) - 1
  assert source(f"down_{attention}_attention_1") == (
      f"model/down_{attention}/attn_1/norm/gamma")
  assert source("up_0_block_2") == f"model/up_{last}/block_2/norm1/gamma"
  assert source(f"up_{last}_block_0") == "model/up_0/block_0/norm1/gamma"
  assert source("up_0_upsample") == f"model/up_{last}/upsample/conv/W"


def test_ddpm_weights_without_average(ddpm, tmp_path, warnings):
  weights, _ = ddpm
  prefix = str(tmp_path / "model.ckpt-1")
  save_checkpoint(prefix, weights)
  raw = ddpm_lib.read_weights(prefix)
  assert len(warnings) == 1 and "raw weights" in warnings[0]
  # One average is missing.
  state = training_state(weights)
  del state["model/conv_in/b/ExponentialMovingAverage"]
  save_checkpoint(prefix, state)
  assert "none of 1, among them model/conv_in/b" in refusal(
      ddpm_lib.read_weights, prefix)
  # Averages alone are a network.
  save_checkpoint(prefix, {f"{name}/ExponentialMovingAverage": value
                           for name, value in weights.items()})
  averaged = ddpm_lib.read_weights(prefix)
  assert len(warnings) == 1
  assert set(raw) == set(averaged) == set(weights)
  for name, value in weights.items():
    np.testing.assert_array_equal(raw[name], value)
    np.testing.assert_array_equal(averaged[name], value)


def test_ddpm_weights_that_do_not_match(ddpm):
  weights, _ = ddpm

  def message(changes, *removed):
    changed = {**weights, **changes}
    for name in removed:
      del changed[name]
    return refusal(ddpm_lib.convert, "here", changed)

  renamed = "model/up_0/block_1/conv2/W"
  text = message({"model/up_0/block_1/conv3/W": weights[renamed]}, renamed)
  assert f"Missing: {renamed}. Unused: model/up_0/block_1/conv3/W" in text
  assert "Missing: model/mid/attn_1/q/b. Unused: none" in message(
      {}, "model/mid/attn_1/q/b")
  assert "model/label/W" in message({"model/label/W": np.zeros(3)})
  assert "model/conv_in/W" in message({}, "model/conv_in/W")
  assert "model/down_0/block_0" in refusal(ddpm_lib.convert, "here", {
      name: value for name, value in weights.items() if "down" not in name})
  name = "model/down_0/block_0/conv2/W"
  text = message({name: weights[name][..., :5]})
  assert name in text and "(3, 3, 32, 32)" in text and "32, 5)" in text
  assert "4 dimensions" in message({"model/conv_in/W": np.zeros(4)})
  assert "conv_out/W must have 3" in message(
      {"model/conv_out/W": np.zeros((3, 3, 32, 6))})


def test_ddpm_image_size_that_attention_does_not_tell(ddpm):
  weights, _ = ddpm
  none = {name: value for name, value in weights.items()
          if "attn" not in name or "mid" in name}
  assert "image_size must be given" in refusal(ddpm_lib.infer_config, none)
  assert ddpm_lib.infer_config(none, 64).image_size == 64
  both = weights | {"model/down_0/attn_0/q/b": np.zeros(32)}
  assert "levels [0, 1]" in refusal(ddpm_lib.infer_config, both)


def test_damaged_ddpm_checkpoints(ddpm, tmp_path):
  weights, _ = ddpm
  prefix = str(tmp_path / "model.ckpt-1")
  name = "model/conv_in/b"
  save_checkpoint(prefix, training_state(weights) | {
      f"{name}/ExponentialMovingAverage": weights[name] * np.float32("nan")})
  message = refusal(ddss_tf.load_denoiser, prefix)
  assert name in message and "NaN" in message
  for ending in (".data-00000-of-00001", ".index"):
    with open(prefix + ending, "r+b") as f:
      f.truncate(os.path.getsize(prefix + ending) // 2)
    assert "not a complete TensorFlow checkpoint" in refusal(
        ddss_tf.load_denoiser, prefix)
  assert "checkpoint prefix" in refusal(ddss_tf.load_denoiser, prefix + "2")


# --- improved-diffusion ---


class FakeParameter(FakeTensor):
  """A tensor that requires a gradient, which has to be detached first."""

  def detach(self):
    return FakeTensor(self.value)

  def float(self):
    return FakeParameter(super().float().value)

  def numpy(self):
    raise RuntimeError("Can't call numpy() on Tensor that requires grad.\n")


@pytest.mark.parametrize("name", OPENAI)
def test_openai_network_matches_the_original(openai, name):
  weights, golden, card = openai[name]
  model = openai_lib.convert("here", weights, card)
  # Of a learned variance, only the mean's channels are left.
  expected = golden["output"][..., :3]
  assert np.any(golden["t"] % 1)
  output = model([golden["x"], golden["t"]], training=False)
  np.testing.assert_allclose(output, expected, atol=1e-4)
  np.testing.assert_allclose(openai_lib.betas(card), golden["betas"])
  assert not any(v.value.trainable for v in model.weights)


@pytest.mark.slow
@pytest.mark.parametrize("network,widths,attention,blocks", [
    ("cifar10", (32, 64, 64, 64), (1, 2), 3),
    ("lsun", (32, 32, 64, 64, 128, 128), (4,), 2),
])
def test_published_openai_architectures(network, widths, attention, blocks):
  weights = numbered("openai_shapes.json", network)
  card = dict(image_size=32, num_heads=4, diffusion_steps=4000,
              rescale_timesteps=True)
  config = openai_lib.infer_config(weights, card)
  assert config.channels == widths
  assert config.attention_levels == attention
  assert config.blocks_per_level == blocks
  assert config.scale_shift == (network == "cifar10")
  assert config.time_scale == 0.25
  model = openai_lib.convert("here", weights, card)
  numbers = list(weights)

  def source(place):
    return numbers[int(model.get_layer(place).weights[0].numpy().flat[0])]

  last = len(widths) - 1
  end = (last + 1) * (blocks + 1) - 1
  for place, name in {
      # The first convolution is number 0 of the way down.
      "down_0_block_0": "input_blocks.1.0.in_layers.0.weight",
      "down_0_downsample": f"input_blocks.{blocks + 1}.0.op.weight",
      "down_1_block_1": f"input_blocks.{blocks + 3}.0.in_layers.0.weight",
      "up_0_upsample": f"output_blocks.{blocks}.1.conv.weight",
      "up_1_attention_0": f"output_blocks.{blocks + 1}.1.norm.weight",
      "up_1_upsample": f"output_blocks.{2 * blocks + 1}.2.conv.weight",
      f"up_{last}_block_{blocks}": f"output_blocks.{end}.0.in_layers.0.weight",
  }.items():
    assert source(place) == name


@pytest.mark.slow
def test_openai_times_are_differentiable(openai):
  weights, golden, card = openai["openai_learned_sigma"]
  assert card["rescale_timesteps"]
  model = openai_lib.convert("here", weights, card)
  x = tf.constant(golden["x"][:1])

  def total(t):
    return tf.reduce_sum(model([x, t], training=False) ** 2)

  t = tf.constant([7.25])
  with tf.GradientTape() as tape:
    tape.watch(t)
    value = total(t)
  slope = tape.gradient(value, t)
  # These random networks turn sharply: a short step, in float32.
  difference = (total(t + 1e-3) - total(t - 1e-3)) / 2e-3
  np.testing.assert_allclose(slope[0], difference, rtol=0.02)


@pytest.mark.slow
def test_openai_file(state_dict, openai, tmp_path):
  weights, golden, card = openai["openai_plain"]
  denoiser = ddss_tf.load_denoiser(state_dict)
  np.testing.assert_allclose(
      denoiser.eps(golden["x"], golden["t"]), golden["output"], atol=1e-4)
  assert denoiser.name == "lsun" and denoiser.prediction == "eps"
  np.testing.assert_allclose(denoiser.schedule.betas, golden["betas"])
  # Arguments in place of the card, and before it.
  assert ddss_tf.load_denoiser(state_dict, image_size=16).image_shape == (
      16, 16, 3)
  os.remove(state_dict + ".json")
  again = ddss_tf.load_denoiser(state_dict, **card)
  assert again.sha256 == denoiser.sha256
  # What was read can be kept without PyTorch.
  again.save(str(tmp_path / "own"))
  np.testing.assert_array_equal(
      ddss_tf.load_denoiser(str(tmp_path / "own")).eps(
          golden["x"], golden["t"]),
      denoiser.eps(golden["x"], golden["t"]))
  with open(state_dict + ".json", "w") as f:
    json.dump({**card, "predict_xstart": True}, f)
  assert ddss_tf.load_denoiser(state_dict).prediction == "x0"


@pytest.mark.slow
def test_rescaled_times_survive_saving(openai, tmp_path):
  weights, golden, card = openai["openai_learned_sigma"]
  denoiser = denoiser_lib.Denoiser(
      openai_lib.convert("here", weights, card),
      ddss_tf.make_schedule("cosine", 50))
  denoiser.save(str(tmp_path / "own"))
  np.testing.assert_allclose(
      ddss_tf.load_denoiser(str(tmp_path / "own")).eps(
          golden["x"], golden["t"]),
      golden["output"][..., :3], atol=1e-4)


@pytest.mark.parametrize("changes,words", [
    (dict(class_cond=True), ["class_cond must be false", "true"]),
    (dict(class_cond=0), ["class_cond", "true or false", "0"]),
    (dict(resblock_updown=True), ["resblock_updown must be false"]),
    (dict(learn_sigma=True), ["learn_sigma must be false"]),
    (dict(use_scale_shift_norm=True), ["use_scale_shift_norm must be false"]),
    (dict(use_new_attention_order="yes"), ["use_new_attention_order", "'yes'"]),
    (dict(num_heads_upsample=5), ["5", "cannot be built"]),
    (dict(num_heads_upsample=0), ["num_heads_upsample", "0"]),
    (dict(num_head_channels=12), ["head_channels=12", "cannot be built"]),
    (dict(num_head_channels=0), ["num_head_channels", "0"]),
    (dict(noise_schedule="sigmoid"), ["linear, cosine", "'sigmoid'"]),
    (dict(noise_schedule=3), ["noise_schedule", "3"]),
    (dict(diffusion_steps="50"), ["diffusion_steps", "'50'"]),
    (dict(diffusion_steps=10**9), ["num_train_steps", "1000000000"]),
    (dict(diffusion_steps=10), ["diffusion_steps = 10", "between 0 and 1"]),
    (dict(num_heads=True), ["num_heads", "True"]),
    (dict(num_heads=0), ["num_heads", "0"]),
    (dict(num_heads=5), ["num_heads", "5", "cannot be built"]),
    (dict(rescale_timesteps=1), ["rescale_timesteps", "true or false"]),
    (dict(predict_xstart="no"), ["predict_xstart", "'no'"]),
    (dict(image_size=7), ["image_size=7"]),
    (dict(brand_new_key=1), ["brand_new_key"]),
])
def test_cards_that_are_refused(state_dict, changes, words):
  with open(state_dict + ".json") as f:
    card = json.load(f)
  with open(state_dict + ".json", "w") as f:
    json.dump(card | changes, f)
  message = refusal(ddss_tf.load_denoiser, state_dict)
  for word in words:
    assert word in message, message


def test_missing_card(state_dict):
  os.remove(state_dict + ".json")
  message = refusal(ddss_tf.load_denoiser, state_dict, num_heads=1,
                    rescale_timesteps=False)
  assert message.startswith(
      "image_size, diffusion_steps, noise_schedule must be given")
  assert state_dict + ".json" in message
  with open(state_dict + ".json", "w") as f:
    f.write("{")
  assert "not JSON" in refusal(ddss_tf.load_denoiser, state_dict)


def test_openai_files_that_cannot_be_read(state_dict, fake_torch, monkeypatch):
  whole = fake_torch.state
  fake_torch.state = RuntimeError("PytorchStreamReader failed\nfinding archive")
  assert "not a complete PyTorch state dict: PytorchStreamReader failed" in (
      refusal(ddss_tf.load_denoiser, state_dict))
  name = "middle_block.1.qkv.bias"
  fake_torch.state = whole | {
      name: FakeTensor(whole[name].value * np.float32("nan"))}
  message = refusal(ddss_tf.load_denoiser, state_dict)
  assert name in message and "NaN" in message
  for dtype in (np.int64, np.bool_):
    fake_torch.state = whole | {
        name: FakeTensor(whole[name].value.astype(dtype))}
    message = refusal(ddss_tf.load_denoiser, state_dict)
    assert f"{name} must hold floats. Received: torch." in message
  fake_torch.state = {
      key: FakeParameter(tensor.value) for key, tensor in whole.items()}
  assert ddss_tf.load_denoiser(state_dict).sha256
  for other in ([1], {"state_dict": whole}):
    fake_torch.state = other
    assert "must hold a state dict" in refusal(
        ddss_tf.load_denoiser, state_dict)
  assert "a .pt, .safetensors or .bin file" in refusal(
      ddss_tf.load_denoiser, "nowhere.pt")
  # None there makes `import torch` fail.
  monkeypatch.setitem(sys.modules, "torch", None)
  message = refusal(ddss_tf.load_denoiser, state_dict)
  assert "PyTorch must be installed" in message and state_dict in message


def test_real_torch_files(openai, tmp_path):
  # Where PyTorch is installed; the other tests need none.
  torch = pytest.importorskip("torch")
  weights, golden, card = openai["openai_learned_sigma"]
  path = str(tmp_path / "cifar10.pt")
  torch.save({name: torch.from_numpy(value)
              for name, value in weights.items()}, path)
  denoiser = ddss_tf.load_denoiser(path, **card)
  np.testing.assert_allclose(
      denoiser.eps(golden["x"], golden["t"]), golden["output"][..., :3],
      atol=1e-4)
  with open(path, "r+b") as f:
    f.truncate(os.path.getsize(path) // 2)
  assert "not a complete PyTorch state dict" in refusal(
      ddss_tf.load_denoiser, path, **card)


@pytest.mark.slow
def test_openai_weights_that_do_not_match(openai):
  weights, _, card = openai["openai_learned_sigma"]

  def message(changes, *removed):
    changed = {**weights, **changes}
    for name in removed:
      del changed[name]
    return refusal(openai_lib.convert, "here", changed, card)

  renamed = "output_blocks.1.2.conv.weight"  # The upsampling.
  text = message({"output_blocks.1.3.conv.weight": weights[renamed]}, renamed)
  assert f"Missing: {renamed}. Unused: output_blocks.1.3.conv.weight" in text
  # One tensor for three variables is named once.
  assert "Missing: input_blocks.1.1.qkv.bias. Unused: none" in message(
      {}, "input_blocks.1.1.qkv.bias")
  assert "extra.weight" in message({"extra.weight": np.zeros(3)})
  for name in ("input_blocks.0.0.weight", "out.2.weight"):
    assert name in message({}, name)
  for name in ("middle_block.1.qkv.weight", "middle_block.0.in_layers.2.weight",
               "time_embed.0.weight", "input_blocks.2.0.op.bias"):
    text = message({name: weights[name][1:]})
    assert name in text and "shape" in text
    assert name in message({name: np.zeros(())})
  assert "4 dimensions" in message({"out.2.weight": np.zeros(4)})
  assert "out.2.bias must have 6" in message({"out.2.bias": np.zeros(3)})
  assert "out.2.weight must have 3" in message(
      {"out.2.weight": np.zeros((4, 32, 3, 3))})


def test_openai_variants_that_are_refused(openai):
  weights, _, card = openai["openai_plain"]

  def message(changed):
    return refusal(openai_lib.convert, "here", changed, card)

  assert "label_emb.weight" in message(
      weights | {"label_emb.weight": np.zeros((1000, 127))})
  assert "super-resolution" in message(
      weights | {"input_blocks.0.0.weight": np.zeros((32, 6, 3, 3))})
  # Without conv_resample, nothing stands where convolutions did.
  assert "conv_resample must be true" in message({
      name: value for name, value in weights.items() if ".op." not in name})
  extra = {name.replace("input_blocks.3", "input_blocks.4"): value
           for name, value in weights.items()
           if name.startswith("input_blocks.3")}
  assert "same number of residual blocks. Received: [1, 2]" in message(
      weights | extra)


# --- guided-diffusion, and classes of improved-diffusion ---


@pytest.fixture(scope="module")
def guided():
  """(weights, golden, card) by fixture; the card as `read_card` gives it."""
  fixtures = {}
  for name in GUIDED:
    weights, golden = read_fixture(name)
    card = openai_lib.read_card(
        "nowhere.pt", json.loads(str(golden["card"])))
    fixtures[name] = weights, golden, card
  return fixtures


def run(model, golden):
  inputs = [golden[key] for key in ("x", "t", "labels") if key in golden]
  return model(inputs, training=False).numpy()


def distance(fixture, **changes):
  """Largest difference to the golden output with another card."""
  weights, golden, card = fixture
  card = {key: value for key, value in (card | changes).items()
          if value is not None}
  output = run(openai_lib.convert("here", weights, card), golden)
  return np.abs(output - golden["output"][..., :3]).max()


@pytest.mark.quick("guided_half_width", "guided_old_order")
@pytest.mark.parametrize("name", GUIDED)
def test_guided_network_matches_the_original(guided, name):
  _, golden, card = guided[name]
  assert np.any(golden["t"] % 1)
  assert distance(guided[name]) < 1e-4
  np.testing.assert_allclose(openai_lib.betas(card), golden["betas"])


@pytest.mark.slow
def test_what_no_tensor_tells_matters(guided):
  # A wrong card gives a network all the same, so the goldens must notice.
  for name in ("guided_new_order", "guided_old_order"):
    order = guided[name][2]["use_new_attention_order"]
    assert distance(guided[name], use_new_attention_order=not order) > 0.1
  assert distance(guided["guided_old_order"], num_head_channels=16) > 0.1
  half = guided["guided_half_width"]
  assert distance(half, num_heads_upsample=None) > 0.1
  assert distance(half, num_heads=4) > 0.1


def test_guided_architecture(guided):
  weights, _, card = guided["guided_half_width"]
  config = openai_lib.infer_config(weights, card)
  assert config.channels == (32, 64)
  assert (config.time_features, config.num_classes) == (64, 5)
  assert not config.residual_down_levels
  weights, _, card = guided["guided_new_order"]
  config = openai_lib.infer_config(weights, card)
  assert config.channels == (32, 64, 32)
  assert config.attention_levels == (0, 2)
  assert config.residual_down_levels == (0, 1)
  assert config.residual_up_levels == (1, 2)


@pytest.mark.slow
def test_guided_file(guided, fake_torch, tmp_path):
  weights, golden, card = guided["guided_new_order"]
  path = str(tmp_path / "64x64_diffusion.pt")
  with open(path, "w") as f:
    f.write("PyTorch reads this, not we")
  fake_torch.state = {
      name: FakeTensor(value) for name, value in weights.items()}
  card = {key: value for key, value in card.items() if key not in (
      "predict_xstart", "resblock_updown")}
  denoiser = ddss_tf.load_denoiser(path, **card)
  assert denoiser.num_classes == 5
  inputs = golden["x"], golden["t"], golden["labels"]
  np.testing.assert_allclose(
      denoiser.eps(*inputs), golden["output"][..., :3], atol=1e-4)
  denoiser.save(str(tmp_path / "own"))
  again = ddss_tf.load_denoiser(str(tmp_path / "own"))
  assert again.num_classes == 5
  assert again.sha256 == denoiser.sha256
  np.testing.assert_array_equal(again.eps(*inputs), denoiser.eps(*inputs))

  # The card may repeat what tensors tell, and must tell what they do not.
  del card["use_new_attention_order"]
  assert "use_new_attention_order must be given" in refusal(
      ddss_tf.load_denoiser, path, **card)
  told = dict(class_cond=True, resblock_updown=True, learn_sigma=True,
              use_scale_shift_norm=True, use_new_attention_order=True)
  for changes in ({}, *({key: False} for key in told if "new" not in key)):
    with open(path + ".json", "w") as f:
      json.dump({**card, **told, **changes}, f)
    if changes:
      key, = changes
      assert f"{key} must be true" in refusal(ddss_tf.load_denoiser, path)
    else:
      assert ddss_tf.load_denoiser(path).sha256 == denoiser.sha256


def test_heads_by_number_or_by_width(state_dict):
  with open(state_dict + ".json") as f:
    card = json.load(f)

  def read(changes, **given):
    with open(state_dict + ".json", "w") as f:
      json.dump(card | changes, f)
    card_read = openai_lib.read_card(state_dict, given)
    return card_read.get("num_heads"), card_read.get("num_head_channels")

  assert read(dict(num_head_channels=16)) == (None, 16)
  assert read(dict(num_head_channels=-1)) == (card["num_heads"], None)
  assert read(dict(num_head_channels=16), num_heads=4) == (4, None)
  assert read({}, num_head_channels=8) == (None, 8)


@pytest.mark.slow
def test_guided_weights_that_do_not_match(guided):
  weights, _, card = guided["guided_new_order"]

  def message(changes, *removed):
    changed = {**weights, **changes}
    for name in removed:
      del changed[name]
    return refusal(openai_lib.convert, "here", changed, card)

  name = "input_blocks.2.0.out_layers.3.bias"  # Of the first downsampling.
  assert f"Missing: {name}. Unused: none" in message({}, name)
  name = "output_blocks.1.2.in_layers.0.bias"  # Of the first upsampling.
  assert f"Missing: {name}. Unused: none" in message({}, name)
  assert "label_emb.weight" in message(
      {"label_emb.weight": weights["label_emb.weight"][:, 1:]})
  assert "Unused: label_emb.bias" in message({"label_emb.bias": np.zeros(5)})


# --- diffusers ---


def predict(denoiser, golden):
  return denoiser.network(
      golden["x"], golden["t"], golden.get("labels")).numpy()


@pytest.mark.quick("diffusers_learned_variance", "diffusers_classes")
@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_network_matches_the_original(tmp_path, name):
  folder = str(tmp_path / name)
  _, golden = write_folder(folder, name)
  denoiser = ddss_tf.load_denoiser(folder)
  assert denoiser.num_classes == (5 if "labels" in golden else None)
  # Of a learned variance, the mean.
  np.testing.assert_allclose(
      predict(denoiser, golden), golden["output"][..., :3], atol=1e-4)
  denoiser.save(str(tmp_path / "own"))
  np.testing.assert_array_equal(
      predict(ddss_tf.load_denoiser(str(tmp_path / "own")), golden),
      predict(denoiser, golden))


def test_learned_variances_that_are_not_there(tmp_path):
  write_folder(str(tmp_path), "diffusers_learned_variance", out_channels=3)
  assert "conv_out.weight" in refusal(ddss_tf.load_denoiser, str(tmp_path))
  write_folder(str(tmp_path), "diffusers_relu", out_channels=6)
  assert "conv_out.weight must have 6 outputs" in refusal(
      ddss_tf.load_denoiser, str(tmp_path))


@pytest.mark.quick(
    "diffusers_classes-changes1", "diffusers_timestep-changes4",
    "diffusers_relu-changes6")
# Of those that weights do not tell; a reader that ignored one would pass above
# if the golden output did not depend on it.
@pytest.mark.parametrize("name,changes", [
    ("diffusers_classes", dict(act_fn="silu")),
    ("diffusers_classes", dict(mid_block_scale_factor=1)),
    ("diffusers_classes", dict(attn_norm_num_groups=None)),
    ("diffusers_timestep", dict(act_fn="swish")),
    ("diffusers_timestep", dict(center_input_sample=False)),
    ("diffusers_timestep", dict(downsample_padding=1)),
    ("diffusers_relu", dict(act_fn="mish")),
    ("diffusers_relu", dict(attention_head_dim=4)),
])
def test_every_key_matters(tmp_path, name, changes):
  _, golden = write_folder(str(tmp_path), name, **changes)
  denoiser = ddss_tf.load_denoiser(str(tmp_path))
  difference = np.abs(predict(denoiser, golden) - golden["output"])
  assert difference.max() > 1e-3


@pytest.mark.slow
def test_switches_are_part_of_what_a_network_is(tmp_path):
  """Or a sampler of one would be taken for that of another."""

  def load(**changes):
    write_folder(str(tmp_path), "diffusers_relu", **changes)
    return ddss_tf.load_denoiser(str(tmp_path))

  plain = load()
  others = [load(**changes) for changes in (
      dict(act_fn="silu"), dict(downsample_padding=0), dict(freq_shift=0.5),
      dict(norm_eps=1e-4), dict(flip_sin_to_cos=False))]
  with open(tmp_path / diffusers.SCHEDULER) as f:
    scheduler = json.load(f)
  with open(tmp_path / diffusers.SCHEDULER, "w") as f:
    json.dump(scheduler | {"beta_end": 0.019}, f)
  others.append(ddss_tf.load_denoiser(str(tmp_path)))
  assert len({d.sha256 for d in [plain, *others]}) == 7
  assert {denoiser_lib.weights_sha256(d.model) for d in others} == {
      denoiser_lib.weights_sha256(plain.model)}
  # What changes no image is none of it.
  same = load(dropout=0.5, _diffusers_version="9")
  assert same.sha256 == plain.sha256
  # Our own format keeps it.
  others[1].save(str(tmp_path / "own"))
  again = ddss_tf.load_denoiser(str(tmp_path / "own"))
  assert again.identity == {**others[1].identity}


def test_dropout_is_off(tmp_path):
  _, golden = write_folder(str(tmp_path), "diffusers_relu", dropout=0.9)
  np.testing.assert_allclose(
      predict(ddss_tf.load_denoiser(str(tmp_path)), golden), golden["output"],
      atol=1e-4)


@pytest.mark.parametrize("changes,words", [
    (dict(class_embed_type="identity"), ["class_embed_type", "'identity'"]),
    (dict(class_embed_type="timestep", num_class_embeds=None),
     ["num_class_embeds must be set"]),
    (dict(num_class_embeds=0), ["num_class_embeds", "0"]),
    (dict(num_class_embeds=6), ["class_embedding.weight", "(6, 24)"]),
    (dict(num_class_embeds=None), ["Unused: class_embedding.weight"]),
    (dict(time_embedding_type="fourier"), ["time_embedding_type", "'fourier'"]),
    (dict(resnet_time_scale_shift="spatial"), ["'spatial'"]),
    (dict(act_fn="tanh"), ["act_fn", "'silu'", "'tanh'"]),
    (dict(downsample_type="fir"), ["downsample_type", "'fir'"]),
    (dict(upsample_type="conv"), ["Missing: up_blocks.1.upsamplers.0.conv"]),
    (dict(downsample_padding=2), ["downsample_padding", "2"]),
    (dict(mid_block_type=None), ["mid_block_type", "None"]),
    (dict(out_channels=4), ["out_channels must be 3", "4"]),
    (dict(attention_head_dim=3), ["head_channels=3", "cannot be built"]),
    (dict(time_embedding_dim="24"), ["cannot be built"]),
    (dict(block_out_channels=8), ["block_out_channels must be a list", "8"]),
    (dict(block_out_channels=[]), ["channels must be", "()"]),
    (dict(down_block_types=None), ["down_block_types must be a list", "None"]),
    (dict(freq_shift="far"), ["config.json", "'far'"]),
    (dict(time_embedding_dim=10**9), ["time_width", "1000000000"]),
    (dict(layers_per_block=10**9), ["blocks_per_level", "1000000000"]),
    (dict(num_class_embeds=10**9), ["num_classes", "1000000000"]),
])
def test_diffusers_values_that_are_refused(tmp_path, changes, words):
  write_folder(str(tmp_path), "diffusers_classes", **changes)
  message = refusal(ddss_tf.load_denoiser, str(tmp_path))
  for word in words:
    assert word in message, message


@pytest.mark.slow
def test_pickled_diffusers_weights(tmp_path, fake_torch):
  weights, golden = write_folder(str(tmp_path), "diffusers_classes", ".bin")
  fake_torch.state = {
      name: FakeTensor(value) for name, value in weights.items()}
  denoiser = ddss_tf.load_denoiser(str(tmp_path))
  np.testing.assert_allclose(
      predict(denoiser, golden), golden["output"], atol=1e-4)
  # By the file's name it is the same; safetensors come first.
  path = str(tmp_path / "diffusion_pytorch_model.bin")
  assert ddss_tf.load_denoiser(path).sha256 == denoiser.sha256
  fake_torch.state = RuntimeError("damaged")
  assert "not a complete PyTorch state dict" in refusal(
      ddss_tf.load_denoiser, path)
  write_folder(str(tmp_path), "diffusers_classes")
  assert ddss_tf.load_denoiser(str(tmp_path)).sha256 == denoiser.sha256


def test_real_pickled_diffusers_weights(tmp_path):
  torch = pytest.importorskip("torch")
  weights, golden = write_folder(str(tmp_path), "diffusers_timestep", ".bin")
  torch.save({name: torch.from_numpy(value) for name, value in weights.items()},
             str(tmp_path / "diffusion_pytorch_model.bin"))
  np.testing.assert_allclose(
      predict(ddss_tf.load_denoiser(str(tmp_path)), golden), golden["output"],
      atol=1e-4)


@pytest.mark.slow
def test_single_diffusers_file(tmp_path):
  _, golden = write_folder(str(tmp_path), "diffusers_relu")
  path = str(tmp_path / "averaged.safetensors")
  os.rename(tmp_path / diffusers.WEIGHTS, path)
  denoiser = ddss_tf.load_denoiser(path)
  assert denoiser.name == "averaged"
  np.testing.assert_allclose(
      predict(denoiser, golden), golden["output"], atol=1e-4)
  assert "num_heads must not be given" in refusal(
      ddss_tf.load_denoiser, path, num_heads=2)
  message = refusal(ddss_tf.load_denoiser, str(tmp_path))
  assert "diffusion_pytorch_model.safetensors or" in message
  for name in (diffusers.SCHEDULER, diffusers.CONFIG):
    os.remove(tmp_path / name)
    message = refusal(ddss_tf.load_denoiser, path)
    assert f"must hold {name} beside the weights" in message

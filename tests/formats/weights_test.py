"""Tests of weights that Keras saved, and of the architectures of presets."""

import dataclasses
import json
import os
import shutil

import checkpoint_files
from checkpoint_files import refusal
import edm_files
import h5py
import keras
import model_cache
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.formats import ddpm
from ddss_tf.formats import diffusers
from ddss_tf.formats import edm
from ddss_tf.formats import keras_weights
from ddss_tf.formats import openai
from ddss_tf.formats import presets
from ddss_tf.networks import edm_unet
from ddss_tf.networks import unet
from project import ROOT

# Fixtures are found by their names.
cache = model_cache.cache
conversions = model_cache.conversions

# Fields of `UNetConfig`, with what a layer of each kind needs.
TINY = dict(image_size=4, in_channels=1, out_channels=1, channels=[4, 8],
            blocks_per_level=1, norm_groups=2, attention_levels=[1])
SCHEDULE = {"name": "linear", "num_train_steps": 100}
TOLD = {"prediction": "v", "schedule": SCHEDULE}
KERNEL = "layers/residual_block/conv1/vars/0"


def randomise(model):
  """Other numbers in every variable."""
  rng = np.random.default_rng(0)
  for variable in model.weights:
    variable.assign(rng.normal(size=variable.shape).astype(np.float32) / 3)
  return model


def tiny(**changes):
  fields = {key: tuple(value) if isinstance(value, list) else value
            for key, value in (TINY | changes).items()}
  return randomise(unet.build_unet(unet.UNetConfig(**fields)))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """(network, folder) of weights, and a preset of them as a file."""
  folder = tmp_path_factory.mktemp("original")
  model = tiny()
  model.save_weights(str(folder / "net.weights.h5"))
  (folder / "net.json").write_text(json.dumps(TINY))
  return model, str(folder)


@pytest.fixture
def saved(original, tmp_path):
  """(path of the weights, of the preset) in a copy."""
  shutil.copytree(original[1], tmp_path / "net")
  return str(tmp_path / "net/net.weights.h5"), str(tmp_path / "net/net.json")


def inputs(model):
  x, t = model.inputs[:2]
  return (tf.random.stateless_normal([2, *x.shape[1:]], [0, 1]),
          tf.constant([3.0, 70.5]))


def same(denoiser, model, *labels):
  """Bit for bit."""
  for ours, theirs in zip(denoiser.model.weights, model.weights):
    np.testing.assert_array_equal(ours, theirs)
    assert not ours.value.trainable
  x, t = inputs(model)
  np.testing.assert_array_equal(
      denoiser.network(x, t, *labels),
      model([x, t, *map(tf.constant, labels)], training=False))


@pytest.mark.parametrize("build", [
    lambda: tiny(num_classes=3, label_embedding="sinusoidal", scale_shift=True,
                 residual_down_levels=[0], symmetric_downsample=True),
    lambda: tiny(num_classes=3, residual_up_levels=[1], num_heads=2,
                 mid_attention_norm=False, time_scale=2.0),
    lambda: edm_unet.build_edm(edm_unet.EDMConfig(
        image_size=4, image_channels=1, model_channels=8, channel_mult=(1, 2),
        num_blocks=1, attn_resolutions=(4,), label_dim=2, fourier=True,
        residual_encoder=True)),
    lambda: edm_unet.build_edm(edm_unet.EDMConfig(
        image_size=4, image_channels=1, model_channels=64, channel_mult=(1, 2),
        num_blocks=1, attn_resolutions=(4,), architecture="DhariwalUNet",
        label_dim=2)),
])
def test_names_are_those_of_keras(build, tmp_path):
  model = randomise(build())
  path = str(tmp_path / "net.weights.h5")
  model.save_weights(path)
  names = keras_weights.dataset_names(model)
  stored = []
  with h5py.File(path) as file:
    file.visititems(lambda name, place: stored.append(name) if isinstance(
        place, h5py.Dataset) else None)
    assert sorted(stored) == sorted(names.values())
    for variable in model.weights:
      np.testing.assert_array_equal(file[names[variable.path]], variable)


def test_round_trip(original, saved):
  model, _ = original
  path, preset = saved
  denoiser = ddss_tf.load_denoiser(path, preset=preset, **TOLD)
  same(denoiser, model)
  assert (denoiser.name, denoiser.prediction) == ("net", "v")
  assert denoiser.schedule.num_train_steps == 100
  # All of it in a card, whose paths start where it is.
  with open(path + ".json", "w") as f:
    json.dump({"preset": "net.json", **TOLD}, f)
  by_card = ddss_tf.load_denoiser(path)
  assert by_card.identity == denoiser.identity
  # Arguments count more.
  other = ddss_tf.load_denoiser(path, prediction="x0", time_scale=0.5)
  assert other.prediction == "x0" and other.convention.time_scale == 0.5
  assert other.sha256 not in (denoiser.sha256, None)
  # And so does another architecture of the same weights.
  with open(preset, "w") as f:
    json.dump(TINY | {"activation": "relu"}, f)
  relu = ddss_tf.load_denoiser(path)
  assert denoiser_lib.weights_sha256(relu.model) == denoiser_lib.weights_sha256(model)
  assert relu.sha256 != denoiser.sha256


@pytest.mark.slow
def test_embedded_model_by_its_preset(tmp_path):
  embedded = ddss_tf.load_denoiser("digits16-ddpm")
  path = str(tmp_path / "digits.weights.h5")
  embedded.model.save_weights(path)
  schedule = {"name": "linear", "num_train_steps": 1000}
  denoiser = ddss_tf.load_denoiser(
      path, preset="digits16-ddpm", prediction="eps", schedule=schedule)
  same(denoiser, embedded.model)
  np.testing.assert_array_equal(denoiser.schedule.betas,
                                embedded.schedule.betas)
  x, t = inputs(embedded.model)
  np.testing.assert_array_equal(denoiser.eps(x, t), embedded.eps(x, t))


@pytest.mark.slow
def test_classes_and_guidance(tmp_path):
  model = tiny(num_classes=3)
  path = str(tmp_path / "net.weights.h5")
  model.save_weights(path)
  with open(tmp_path / "net.json", "w") as f:
    json.dump(TINY | {"num_classes": 3}, f)
  with open(path + ".json", "w") as f:
    json.dump({"preset": "net.json", "null_label": 2, **TOLD}, f)
  denoiser = ddss_tf.load_denoiser(path, guidance_scale=3.0)
  assert (denoiser.num_classes, denoiser.null_label) == (3, 2)
  same(denoiser, model, [1, 0])
  # No label outside the table is ever drawn.
  with pytest.raises(ValueError, match="num_classes must be 3, as.*: 9"):
    ddss_tf.Denoiser(denoiser.model, denoiser.schedule, num_classes=9)
  with open(path + ".json", "w") as f:
    json.dump({"preset": "net.json", "null_label": 3, **TOLD}, f)
  assert "null_label must be one of" in refusal(ddss_tf.load_denoiser, path)


@pytest.mark.slow
def test_edm(tmp_path):
  npz, golden = edm_files.write(tmp_path, "edm_song")
  plain = ddss_tf.load_denoiser(npz)
  path = str(tmp_path / "net.weights.h5")
  plain.model.save_weights(path)
  again = ddss_tf.load_denoiser(path, preset=npz + ".json")
  assert again.sha256 == plain.sha256 and again.convention == plain.convention
  x, sigma = golden["x"], golden["sigma"]
  np.testing.assert_array_equal(
      again.network(x, sigma), plain.network(x, sigma))
  schedule = {"name": "geometric", "sigma_min": 0.01, "sigma_max": 40.0,
              "num_train_steps": 90}
  other = ddss_tf.load_denoiser(path, preset=npz + ".json", schedule=schedule)
  assert other.sha256 == ddss_tf.load_denoiser(npz, schedule=schedule).sha256
  assert "prediction must not be given for a network of EDM" in refusal(
      ddss_tf.load_denoiser, path, preset=npz + ".json", prediction="v")
  assert "schedule must be of sigmas" in refusal(
      ddss_tf.load_denoiser, path, preset=npz + ".json", schedule=SCHEDULE)


def test_half_precision(tmp_path):
  path = str(tmp_path / "net.weights.h5")
  before = keras.config.dtype_policy()
  keras.config.set_dtype_policy("bfloat16")
  try:
    model = tiny()
  finally:
    keras.config.set_dtype_policy(before)
  assert model.get_layer("conv_in").kernel.dtype == "bfloat16"
  model.save_weights(path)
  with open(tmp_path / "net.json", "w") as f:
    json.dump(TINY, f)
  denoiser = ddss_tf.load_denoiser(
      path, preset=str(tmp_path / "net.json"), **TOLD)
  for ours, theirs in zip(denoiser.model.weights, model.weights):
    np.testing.assert_array_equal(
        ours, np.asarray(theirs.numpy()).astype(np.float32))


# --- Presets ---


def test_presets_are_the_published_networks():
  """As the readers infer them from the originals' shapes, or words."""
  wider = lambda config, by: dataclasses.replace(
      config, channels=tuple(by * width for width in config.channels),
      time_features=config.time_features and by * config.time_features,
      time_width=config.time_width and by * config.time_width)
  for name, network in (("ddpm-cifar10-32", "cifar10"), ("ddpm-256", "lsun")):
    assert presets.PRESETS[name] == wider(ddpm.infer_config(
        checkpoint_files.numbered("ddpm_shapes.json", network)), 4), name
  card = dict(num_heads=4, diffusion_steps=4000, rescale_timesteps=True)
  for name, network, size in (("improved-cifar10", "cifar10", 32),
                              ("improved-imagenet64", "imagenet64", 64)):
    assert presets.PRESETS[name] == wider(openai.infer_config(
        checkpoint_files.numbered("openai_shapes.json", network),
        card | {"image_size": size}), 4), name
  card = dict(num_head_channels=64, diffusion_steps=1000, image_size=64,
              rescale_timesteps=False, use_new_attention_order=True)
  guided = openai.infer_config(
      checkpoint_files.numbered("guided_shapes.json", "imagenet64"), card)
  assert presets.PRESETS["guided-imagenet64"] == wider(guided, 6)


def test_diffusers_words_of_a_preset(tmp_path):
  # Of google/ddpm-cifar10-32.
  config = dict(
      _class_name="UNet2DModel", act_fn="silu", attention_head_dim=None,
      block_out_channels=[128, 256, 256, 256], center_input_sample=False,
      down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D",
                        "DownBlock2D"], downsample_padding=0,
      flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=2,
      mid_block_scale_factor=1, norm_eps=1e-6, norm_num_groups=32,
      out_channels=3, sample_size=32, time_embedding_type="positional",
      up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"])
  for name, words in ((diffusers.CONFIG, config),
                      (diffusers.SCHEDULER, {})):
    with open(tmp_path / name, "w") as f:
      json.dump(words, f)
  assert diffusers.read_config(str(tmp_path))[0] == (
      presets.PRESETS["ddpm-cifar10-32"])


def test_edm_words_of_presets(tmp_path):
  with open(os.path.join(edm_files.DATA, "edm_shapes.json")) as f:
    published = json.load(f)
  for name, network, words in (
      ("edm-cifar10", "cifar10", dict(model_channels=128, label_dim=0)),
      ("edm-imagenet64", "imagenet64",
       dict(model_channels=192, label_dim=1000))):
    card = published[network]["card"]
    card["class_name"] = "EDMPrecond"
    card["init_kwargs"] |= words
    path = str(tmp_path / "card.json")
    with open(path, "w") as f:
      json.dump(card, f)
    config, schedule = presets.read(name)
    assert (config, schedule.card()) == (
        edm.read_config(path)[0],
        edm.read_config(path)[1].card())


@pytest.mark.slow
@pytest.mark.parametrize("name,parameters", [
    # As the originals' code has them, without learned variances.
    ("ddpm-cifar10-32", 35_746_307), ("improved-cifar10", 52_542_979)])
def test_sizes_of_presets(name, parameters):
  config, _ = presets.read(name)
  assert unet.build_unet(config).count_params() == parameters


@pytest.mark.parametrize("changes,words", [
    ({"image_size": None}, ["image_size", "whole number", "None"]),
    ({"channels": 4}, ["channels", "list of whole numbers", "4"]),
    ({"channels": [4, "8"]}, ["channels", "'8'"]),
    ({"attention_levels": [-1]}, ["attention_levels", "[-1]"]),
    ({"scale_shift": 1}, ["scale_shift", "true or false", "1"]),
    ({"activation": None}, ["activation", "a word", "None"]),
    ({"activation": "tanh"}, ["activation", "cannot be built", "'tanh'"]),
    ({"norm_epsilon": 0}, ["norm_epsilon", "positive", "0"]),
    ({"num_heads": 0}, ["num_heads", "0"]),
    ({"in_channels": 10**9}, ["in_channels", "65536", "1000000000"]),
    ({"blocks_per_level": 1000}, ["blocks_per_level", "64", "1000"]),
    ({"channels": []}, ["channels", "8192", "()"]),
    ({"time_width": 65536}, ["time_width", "8192", "65536"]),
    ({"image_size": 5}, ["multiple of 2", "5"]),
    ({"brand_new": 1, "older": 2}, ["keys must be among", "brand_new, older"]),
])
def test_presets_that_are_refused(saved, changes, words):
  path, preset = saved
  with open(preset, "w") as f:
    json.dump(TINY | changes, f)
  message = refusal(ddss_tf.load_denoiser, path, preset=preset, **TOLD)
  for word in words:
    assert word in message, message


def test_presets_that_are_none(saved, tmp_path):
  path, preset = saved
  load = lambda path=path, **told: refusal(
      ddss_tf.load_denoiser, path, **(TOLD | told))
  for unknown in ("ddpm-cifar10", str(tmp_path), 3):
    message = load(preset=unknown)
    assert "ddpm-cifar10-32, ddpm-256" in message and repr(unknown) in message
  message = load()
  assert message.startswith("preset must be given, by " + path + ".json")
  assert "edm-imagenet64" in message
  with open(preset, "w") as f:
    f.write("{")
  assert "not JSON" in load(preset=preset)
  with open(preset, "w") as f:
    json.dump({"image_size": 4}, f)
  assert "in_channels, out_channels, channels, blocks_per_level must be" in (
      load(preset=preset))
  message = refusal(ddss_tf.load_denoiser, path, preset="digits16-ddpm")
  assert "prediction, schedule must be given" in message
  assert "num_classes must not be given" in load(num_classes=3)
  # Where there is an architecture already.
  for other in ("digits16-ddpm", os.path.join(ROOT, "tests/testdata/tiny_unet2d"
                                              )):
    assert "preset must not be given" in refusal(
        ddss_tf.load_denoiser, other, preset="digits16-ddpm")
  assert ".weights.h5 with a preset" in refusal(
      ddss_tf.load_denoiser, str(tmp_path / "no.weights.h5"), preset=preset)


# --- Damaged files ---


def change(path, **changes):
  """Writes, or with None removes, datasets by their names."""
  with h5py.File(path, "r+") as file:
    for name, value in changes.items():
      if name in file:
        del file[name]
      if value is not None:
        file[name] = value


@pytest.mark.parametrize("changes,words", [
    ({KERNEL: None}, [f"Missing: {KERNEL}. Unused: none"]),
    ({KERNEL: None, KERNEL + "_": np.zeros((3, 3, 4, 4))},
     [f"Missing: {KERNEL}. Unused: {KERNEL}_"]),
    ({"layers/extra/vars/0": np.zeros(3)},
     ["Missing: none. Unused: layers/extra/vars/0"]),
    ({KERNEL[:-1] + "2": np.zeros(3)}, [f"Unused: {KERNEL[:-1]}2"]),
    ({KERNEL: np.zeros((3, 3, 4, 5))}, [KERNEL, "(3, 3, 4, 4)", "4, 5)"]),
    ({KERNEL: np.full((3, 3, 4, 4), np.nan)}, [KERNEL, "NaN"]),
    ({KERNEL: np.zeros((3, 3, 4, 4), int)}, [KERNEL, "floats", "int64"]),
    ({"soft": h5py.SoftLink("/layers")}, ["soft", "a link"]),
    ({KERNEL: h5py.ExternalLink("other.h5", "a")}, [KERNEL, "a link"]),
])
def test_arrays_that_do_not_match(saved, changes, words):
  path, preset = saved
  change(path, **changes)
  message = refusal(ddss_tf.load_denoiser, path, preset=preset, **TOLD)
  for word in words:
    assert word in message, message


@pytest.mark.slow
def test_files_that_are_not_whole(saved):
  path, preset = saved
  size = os.path.getsize(path)
  for left in (size - 1, size // 2, 100, 0):
    os.truncate(path, left)
    message = refusal(ddss_tf.load_denoiser, path, preset=preset, **TOLD)
    assert message.startswith(f"{path} is not a complete file of Keras weights")


def test_arrays_that_are_elsewhere(saved, tmp_path):
  path, preset = saved
  with h5py.File(path, "r+") as file:
    shape = file[KERNEL].shape
    del file[KERNEL]
    file.create_dataset(KERNEL, shape, np.float32, external=[
        (str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])
  assert f"{KERNEL} must hold its array" in refusal(
      ddss_tf.load_denoiser, path, preset=preset, **TOLD)


def test_huge_arrays_are_not_read(saved):
  path, preset = saved
  with h5py.File(path, "r+") as file:
    del file[KERNEL]
    file.create_dataset(KERNEL, (1 << 40,), np.float32, chunks=(1 << 10,))
  assert str(1 << 40) in refusal(
      ddss_tf.load_denoiser, path, preset=preset, **TOLD)


# --- As other formats ---


@pytest.mark.slow
def test_cache(saved, cache, conversions):
  path, preset = saved
  load = lambda **told: ddss_tf.load_denoiser(
      path, cache_dir=cache, **(dict(preset=preset, **TOLD) | told))
  first, again = load(), load()
  assert conversions == [path] and again.sha256 == first.sha256
  same(again, first.model)
  # By what a preset says, not by its name.
  with open(preset, "w") as f:
    json.dump(TINY | {"activation": "relu"}, f)
  assert load().sha256 != first.sha256
  assert load(prediction="eps").sha256 != first.sha256
  assert len(conversions) == len(model_cache.entries(cache)) == 3


@pytest.mark.slow
def test_inspect(saved, main_in_process, capsys):
  path, preset = saved
  file = os.path.join(ROOT, "gin_configs", "inspect.gin")
  main_in_process([
      "--mode=inspect", f"--gin_file={file}",
      *(f"--gin_param=load_denoiser.{key} = {value!r}" for key, value in dict(
          path=path, preset=preset, **TOLD).items())])
  rows = dict(line.split(maxsplit=1) for line
              in capsys.readouterr().out.splitlines())
  denoiser = ddss_tf.load_denoiser(path, preset=preset, **TOLD)
  assert rows["sha256"] == denoiser.sha256 and rows["prediction"] == "v"
  assert rows["name"] == "net" and "T = 100" in rows["schedule"]

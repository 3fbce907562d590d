"""Tests of EDM's networks; golden outputs are of the original code."""

import json
import os

from checkpoint_files import read_fixture, refusal
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.formats import edm
from ddss_tf.networks import edm_layers
from ddss_tf.networks import edm_unet
from ddss_tf.reporting import inspection
from edm_files import DATA, write  # pylint: disable=unused-import

NETWORKS = ["edm_song", "edm_song_vp", "edm_dhariwal", "edm_dhariwal_ve",
            "edm_ncsnpp"]
UNCONDITIONAL = ["edm_song", "edm_dhariwal_ve", "edm_ncsnpp"]


def network(folder, name):
  """(model, its inputs from the golden file, the golden file)."""
  path, golden = write(folder, name)
  config, _ = edm.read_card(path)
  model = edm.convert(path, edm.read_weights(path), config)
  inputs = [golden["x"], golden["sigma"]]
  return model, inputs + [golden["labels"]] * bool(config.label_dim), golden


@pytest.mark.quick("edm_dhariwal", "edm_dhariwal_ve", "edm_ncsnpp")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_match_the_original(name, tmp_path):
  model, inputs, golden = network(tmp_path, name)
  eps = np.asarray(model(inputs, training=False), np.float64)
  x, sigma = golden["x"], golden["sigma"][:, None, None, None]
  # D = x - sigma eps. Both: D shows EDM's network where sigma is large, eps
  # where it is small, but for the rounding of the original's D. The other
  # preconditionings predict eps, and D has the rounding of that times sigma.
  reach = 1.0 if json.loads(str(golden["card"]))["class_name"] == (
      "EDMPrecond") else np.maximum(sigma, 1.0)
  difference = np.abs(x - sigma * eps - golden["denoised"]) / reach
  assert np.max(difference) < 1e-4
  rounding = np.spacing(np.abs(golden["denoised"])) / 2 / sigma
  difference = np.abs(
      eps - (x.astype(np.float64) - golden["denoised"]) / sigma)
  assert np.max(difference - rounding) < 1e-4
  assert not any(v.value.trainable for v in model.weights)


@pytest.mark.parametrize("architecture,epsilon", [
    ("SongUNet", 1e-6), ("DhariwalUNet", 1e-5)])
def test_epsilon_of_normalisations(architecture, epsilon):
  # Too small a difference for golden outputs to tell.
  model = edm_unet.build_edm(edm_unet.EDMConfig(
      image_size=4, image_channels=1, architecture=architecture,
      model_channels=8, channel_mult=(1, 1), num_blocks=1))
  blocks = [layer for layer in model.layers
            if isinstance(layer, edm_layers.EDMBlock)]
  norms = [norm for block in blocks for norm in (block.norm0, block.norm1)]
  norms += [block.norm2 for block in blocks if block.num_heads]
  norms.append(model.get_layer("out_norm"))
  assert {norm.epsilon for norm in norms} == {epsilon}
  assert {norm.groups for norm in norms} == {2, 4}  # 8 channels, or 16.


@pytest.mark.slow
def test_every_weight_counts(tmp_path):
  # What the fixtures do not feel they do not test.
  for name in NETWORKS:
    model, inputs, _ = network(tmp_path, name)
    with tf.GradientTape() as tape:
      tape.watch([v.value for v in model.weights])
      total = tf.reduce_sum(model(inputs, training=False) ** 2)
    for variable, gradient in zip(model.weights, tape.gradient(
        total, [v.value for v in model.weights])):
      assert np.max(np.abs(gradient)) > 1e-7, variable.path


def test_two_heads_match_the_original():
  weights, golden = read_fixture("edm_block")
  block = edm_layers.EDMBlock(16, "up", num_heads=2)
  block.build(golden["x"].shape, golden["embedding"].shape)
  for variable in block.weights:
    layer, leaf = variable.path.split("/")[-2:]
    value = weights[layer + "." + (
        "weight" if leaf in ("kernel", "gamma") else "bias")]
    if leaf == "kernel":
      value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
    variable.assign(value)
  np.testing.assert_allclose(
      block(golden["x"], golden["embedding"]), golden["output"], atol=1e-4)


@pytest.mark.parametrize("kind", edm_unet.PRECONDITIONINGS)
def test_preconditioning_in_float64(kind):
  # Table 1 of Karras et al., (x - c_skip x - c_out F) / sigma in float64.
  ends = dict(kind=kind, sigma_data=0.6, beta_d=19.9, beta_min=0.1,
              timesteps=1000)
  rng = np.random.default_rng(0)
  sigma = np.geomspace(0.002, 80, 30)
  x = rng.normal(size=(30, 2, 2, 1)) * np.sqrt(
      0.25 + sigma**2)[:, None, None, None]
  output = rng.normal(size=x.shape)
  if kind == "EDMPrecond":
    c_skip = 0.36 / (sigma**2 + 0.36)
    c_out = sigma * 0.6 / np.sqrt(sigma**2 + 0.36)
    c_in = 1 / np.sqrt(0.36 + sigma**2)
    c_noise = np.log(sigma) / 4
  elif kind == "VPPrecond":
    c_skip, c_out, c_in = 1, -sigma, 1 / np.sqrt(sigma**2 + 1)
    c_noise = 999 * (np.sqrt(
        0.1**2 + 2 * 19.9 * np.log(1 + sigma**2)) - 0.1) / 19.9
  else:
    c_skip, c_out, c_in = 1, sigma, np.ones_like(sigma)
    c_noise = np.log(0.5 * sigma)
  wide = lambda v: np.reshape(v * np.ones_like(sigma), (-1, 1, 1, 1))
  eps = (x - wide(c_skip) * x - wide(c_out) * output) / wide(sigma)
  f32 = lambda v: tf.constant(v, tf.float32)
  scaled, noise = edm_layers.EDMInput(**ends)(f32(x), f32(sigma))
  np.testing.assert_allclose(scaled, wide(c_in) * x, rtol=1e-6)
  np.testing.assert_allclose(noise, c_noise, rtol=2e-6, atol=1e-6)
  np.testing.assert_allclose(
      edm_layers.EDMOutput(**ends)(f32(x), f32(sigma), f32(output)), eps,
      atol=2e-6)


@pytest.mark.quick("edm_dhariwal_ve-.npz")
@pytest.mark.parametrize("suffix", [
    edm.SUFFIXES[0], *(pytest.param(suffix, marks=pytest.mark.slow)
                       for suffix in edm.SUFFIXES[1:])])
@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_denoiser_is_in_preserving_form(name, suffix, tmp_path):
  path, golden = write(tmp_path, name, suffix)
  denoiser = ddss_tf.load_denoiser(path)
  schedule = denoiser.schedule
  assert denoiser.name == name
  assert denoiser.image_shape == golden["x"].shape[1:]
  assert schedule.sigmas[0] == pytest.approx(
      0.02 if name == "edm_dhariwal_ve" else 0.002)
  assert schedule.sigmas[-1] == pytest.approx(80.0)
  # The golden sigmas, at fractional steps; x_t = x / sqrt(1 + sigma^2).
  inside = golden["sigma"] >= schedule.sigmas[0]
  sigma = golden["sigma"][inside].astype(np.float64)
  x, denoised = (golden[key][inside].astype(np.float64)
                 for key in ("x", "denoised"))
  t = schedule.time_of_log_snr(-np.log(sigma))
  sigma = sigma[:, None, None, None]
  eps = denoiser.eps(x / np.sqrt(1 + sigma**2), t)
  np.testing.assert_allclose(eps, (x - denoised) / sigma, atol=3e-4)
  # The gradient in the time reaches the network.
  t = tf.constant([400.5, 700.25])
  x = tf.random.stateless_normal([2, *denoiser.image_shape], [0, 1])
  with tf.GradientTape() as tape:
    tape.watch(t)
    value = tf.reduce_sum(denoiser.eps(x, t), axis=(1, 2, 3))
  gradient = tape.gradient(value, t)
  moved = [tf.reduce_sum(denoiser.eps(x, t + d), axis=(1, 2, 3))
           for d in (0.25, -0.25)]
  np.testing.assert_allclose(gradient, (moved[0] - moved[1]) / 0.5,
                             rtol=2e-2, atol=2e-3)


@pytest.mark.slow
def test_own_format(tmp_path):
  path, golden = write(tmp_path, "edm_song")
  denoiser = ddss_tf.load_denoiser(path, schedule={
      "name": "geometric", "sigma_min": 0.01, "sigma_max": 40.0,
      "num_train_steps": 100})
  denoiser.save(str(tmp_path / "own"))
  again = ddss_tf.load_denoiser(str(tmp_path / "own"))
  np.testing.assert_array_equal(again.schedule.sigmas, denoiser.schedule.sigmas)
  np.testing.assert_array_equal(
      again.eps(golden["x"], 31.5), denoiser.eps(golden["x"], 31.5))
  message = refusal(ddss_tf.load_denoiser, path, schedule={"name": "cosine"})
  assert "'sigmas'" in message and "cosine" in message
  assert "prediction must not be given" in refusal(
      ddss_tf.load_denoiser, path, prediction="x0")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm_song_vp", "edm_dhariwal"])
def test_classes_and_guidance(tmp_path, name):
  path, golden = write(tmp_path, name, label_dropout=0.1)
  denoiser = ddss_tf.load_denoiser(path, guidance_scale=1.5)
  x, sigma, labels = golden["x"], golden["sigma"], golden["labels"]
  assert labels[-1] == -1 and labels.max() < denoiser.null_label
  # What the original has for no class is our null label.
  labels = np.where(labels < 0, denoiser.null_label, labels)
  np.testing.assert_allclose(
      denoiser.network(x, sigma, labels),
      (x - golden["denoised"]) / sigma[:, None, None, None], atol=2e-4)
  # Guidance of the null class is none; of others it reaches past the class.
  t = 400.0
  alpha_t, sigma_t = denoiser.schedule.alpha_sigma(t)
  plain = [denoiser.network(x / alpha_t, sigma_t / alpha_t, label)
           for label in (denoiser.null_label, 1)]
  np.testing.assert_allclose(
      denoiser.eps(x, t, denoiser.null_label), plain[0], atol=1e-4)
  np.testing.assert_allclose(
      denoiser.eps(x, t, 1), 1.5 * plain[1] - 0.5 * plain[0], atol=1e-4)
  assert np.max(np.abs(plain[1] - plain[0])) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [{}, {"label_dropout": 0}])
def test_no_guidance_by_what_was_never_trained(tmp_path, dropout):
  path, golden = write(tmp_path, "edm_dhariwal", **dropout)
  denoiser = ddss_tf.load_denoiser(path)
  classes = json.loads(str(golden["card"]))["init_kwargs"]["label_dim"]
  assert denoiser.num_classes == classes and denoiser.null_label is None
  assert "needs a null_label" in refusal(
      ddss_tf.load_denoiser, path, guidance_scale=1.5)
  assert f"are {classes}" in refusal(
      ddss_tf.load_denoiser, path, guidance_scale=1.5, null_label=classes)
  dropped = ddss_tf.load_denoiser(
      write(tmp_path, "edm_dhariwal", label_dropout=0.1)[0])
  assert (dropped.num_classes, dropped.null_label) == (classes + 1, classes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar10_ve", "imagenet64"])
def test_published_networks(name, tmp_path):
  # All tensors of the published depth find their place.
  with open(os.path.join(DATA, "edm_shapes.json")) as f:
    published = json.load(f)[name]
  path = str(tmp_path / "net.npz")
  with open(path + ".json", "w") as f:
    json.dump(published["card"], f)
  config, _ = edm.read_card(path)
  taps = np.outer(config.resample_filter, config.resample_filter)
  np.savez(path, **{
      key: (taps[None, None] / taps.sum() if key.endswith("resample_filter")
            else np.full(shape, i, np.float32))
      for i, (key, shape) in enumerate(published["shapes"].items())})
  model = edm.convert(path, edm.read_weights(path), config)
  first = [float(np.ravel(v)[0]) for v in model.get_weights()]
  assert len(set(first)) == len(first)
  assert model.inputs[2].name == "labels"


@pytest.mark.slow
def test_preconditioning_is_part_of_what_a_network_is(tmp_path):
  plain, other = (ddss_tf.load_denoiser(write(tmp_path, "edm_song", **words)[0])
                  for words in ({}, {"sigma_data": 0.4}))
  assert denoiser_lib.weights_sha256(plain.model) == denoiser_lib.weights_sha256(
      other.model)
  assert plain.sha256 != other.sha256


@pytest.mark.parametrize("name,changes,words", [
    ("edm_song", dict(embedding_type="sin"), ["fourier", "'sin'"]),
    ("edm_song", dict(embedding_type="fourier"), ["map_noise.freqs"]),
    ("edm_song", dict(encoder_type="skip"), ["residual", "'skip'"]),
    ("edm_song", dict(decoder_type="skip"), ["decoder_type", "'skip'"]),
    ("edm_song", dict(resample_filter=[1, 3, 3, 1]),
     ["resample_filter", "3.0"]),
    ("edm_song", dict(resample_filter=[1, 2]), ["symmetric", "(1, 2)"]),
    ("edm_song", dict(model_type="MyUNet"), ["SongUNet", "'MyUNet'"]),
    ("edm_song", dict(brand_new=1), ["brand_new"]),
    ("edm_song", dict(beta_d=1.0), ["beta_d"]),
    ("edm_song", dict(num_blocks=1), ["Unused", "block1"]),
    ("edm_song", dict(num_blocks=True), ["num_blocks", "True"]),
    ("edm_song", dict(sigma_data="0.5"), ["sigma_data", "'0.5'"]),
    ("edm_song", dict(channel_mult=2), ["channel_mult", "list"]),
    ("edm_song", dict(img_resolution=7), ["multiple of 2", "7"]),
    ("edm_song", dict(model_channels=65536), ["widths", "8192"]),
    ("edm_song", dict(model_channels=18), ["multiple of 4", "18"]),
    ("edm_song", dict(model_channels=32), ["shape"]),
    ("edm_song", dict(attn_resolutions=[8]), ["Unused"]),
    ("edm_song", dict(sigma_min=90), ["sigma_min"]),
    ("edm_song", dict(label_dim=5), ["map_label"]),
    ("edm_song", dict(label_dropout=-1), ["label_dropout", "-1"]),
    ("edm_dhariwal_ve", dict(sigma_data=0.5), ["sigma_data"]),
    ("edm_dhariwal_ve", dict(channel_mult_noise=2), ["channel_mult_noise"]),
])
def test_cards_that_are_refused(tmp_path, name, changes, words):
  path, _ = write(tmp_path, name, **changes)
  message = refusal(ddss_tf.load_denoiser, path)
  for word in words:
    assert word in message, message


@pytest.mark.slow
def test_files_that_are_refused(tmp_path):
  path, _ = write(tmp_path, "edm_song")
  with open(path + ".json") as f:
    card = json.load(f)
  for changes, words in (({"class_name": "iDDPMPrecond"}, "iDDPMPrecond"),
                         ({"more": 1}, "'more'"),
                         ({"init_kwargs": {}}, "img_resolution")):
    with open(path + ".json", "w") as f:
      json.dump(card | changes, f)
    assert words in refusal(ddss_tf.load_denoiser, path)
  os.remove(path + ".json")
  assert "convert_edm.py" in refusal(ddss_tf.load_denoiser, path)
  for changes, words in (
      ({"model.map_layer0.bias": np.float32([np.nan] * 64)}, "NaN"),
      ({"model.other": np.zeros(1)}, "Unused: other"),
      ({"model.enc.4x4_down.conv0.resample_filter": np.ones((1, 1, 2, 2))},
       "taps")):
    path, _ = write(tmp_path, "edm_song", changes=changes)
    assert words in refusal(ddss_tf.load_denoiser, path)
  for suffix in edm.SUFFIXES:
    path, _ = write(tmp_path, "edm_song", suffix)
    with open(path, "r+b") as f:
      f.truncate(os.path.getsize(path) // 2)
    assert f"not a complete {suffix[1:]} file" in refusal(
        ddss_tf.load_denoiser, path)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNCONDITIONAL[:1])
def test_inspecting(tmp_path, name):
  path, _ = write(tmp_path, name)
  denoiser = ddss_tf.load_denoiser(path)
  text = inspection.inspect(denoiser=denoiser)
  for words in ("EDMBlock", "process = ve, time_input = sigma",
                "to 80, alpha_bar_T = 0.000156", denoiser.sha256,
                f"{denoiser.model.count_params():,} in"):
    assert words in text, text
  # One activation alone: 8x8 pixels, 16 or 32 channels, float32.
  assert inspection.activation_bytes(denoiser) > 50 * 8 * 8 * 16 * 4

"""Tests of decoders beside the outputs of diffusers 0.42.1, on PyTorch.

The folders tests/testdata/latent_* are tiny pipelines with random weights that
diffusers saved. Their golden.npz has what it computed with them. For other
architectures there is a reading in float64 here, in diffusers' own names, which
is compared with the same outputs first.
"""

import json
import os

import checkpoint_files
from checkpoint_files import FakeTensor, refusal
import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from ddss_tf.formats import autoencoder as formats
from ddss_tf.formats import diffusers
from ddss_tf.networks import autoencoder
from ddss_tf.networks import files
from ddss_tf.networks import precision
from project import TESTDATA

# A fixture is found by its name.
fake_torch = checkpoint_files.fake_torch

FOLDERS = {
    name: os.path.join(TESTDATA, f"latent_{name}",
                       "vqvae" if name == "ldm" else "vae")
    for name in ("ldm", "dit", "sd", "sd3")}
# As shares of an output's standard deviation.
TOLERANCE = 1e-4
ATTENTION = "decoder.mid_block.attentions.0."


def golden(name):
  with np.load(os.path.join(TESTDATA, f"latent_{name}", "golden.npz")) as file:
    return dict(file)


def config_of(name):
  with open(os.path.join(FOLDERS[name], diffusers.CONFIG)) as f:
    return json.load(f)


def weights_of(name):
  return safetensors.numpy.load_file(
      os.path.join(FOLDERS[name], diffusers.WEIGHTS))


def write(folder, config, weights=None):
  """Writes such a folder; gives its path. None as weights: no file of them."""
  with open(folder / diffusers.CONFIG, "w") as f:
    json.dump(config, f)
  if weights is not None:
    safetensors.numpy.save_file(weights, folder / diffusers.WEIGHTS)
  return str(folder)


@pytest.fixture(scope="module")
def read():
  """What `formats.read` gives for a folder of testdata, read once."""
  found = {}

  def get(name):
    if name not in found:
      found[name] = formats.read(FOLDERS[name])
    return found[name]

  return get


def error(values, expected):
  """The largest difference, as a share of the standard deviation."""
  assert values.shape == expected.shape and np.std(expected) > 0
  return np.max(np.abs(np.asarray(values) - expected)) / np.std(expected)


def decoded(model, z, r, jit_compile=False):
  """Images, and the gradient of their product with r."""

  def run(z):
    with tf.GradientTape() as tape:
      tape.watch(z)
      images = model(z)
      product = tf.reduce_sum(images * r)
    return images, tape.gradient(product, z)

  run = tf.function(run, jit_compile=True) if jit_compile else run
  return run(tf.constant(z))


# --- Beside diffusers ---


@pytest.mark.quick("ldm-False", "dit-False", "sd-False", "sd3-False")
@pytest.mark.parametrize("name,jit_compile", [
    *((name, False) for name in FOLDERS), ("ldm", True),
    *(pytest.param(name, True, marks=pytest.mark.slow)
      for name in ("dit", "sd", "sd3"))])
def test_images_and_gradients_of_diffusers(read, name, jit_compile):
  expected = golden(name)
  model, _, _ = read(name)
  images, gradient = decoded(
      model, expected["dec_z"], expected["dec_r"], jit_compile)
  assert error(images, expected["dec_image"]) < TOLERANCE
  assert error(gradient, expected["dec_gradient"]) < TOLERANCE


@pytest.mark.parametrize("name,scaling", [
    ("ldm", (1.0, 0.0)), ("dit", (0.18215, 0.0)), ("sd", (0.18215, 0.0)),
    ("sd3", (1.5305, 0.0609))])
def test_image_of_a_run_of_the_pipeline(read, name, scaling):
  """Its latents are scaled, those of the test above are not."""
  model, scale, shift = read(name)
  assert (scale, shift) == scaling
  expected = golden(name)
  image = model(expected["run_latents"] / scale + shift)
  assert error(image, expected["run_image"]) < TOLERANCE


def test_codes_of_diffusers(read):
  model, _, _ = read("ldm")
  expected = golden("ldm")
  z, indices = expected["dec_z"], expected["dec_indices"]
  assert len(np.unique(indices)) > 10
  codebook = model.get_layer("codebook")
  np.testing.assert_array_equal(codebook.indices(tf.constant(z)), indices)
  np.testing.assert_array_equal(
      codebook(z), weights_of("ldm")["quantize.embedding.weight"][indices])
  rest = keras.Model(codebook.output, model.output)
  plain = rest(z)
  assert error(plain, expected["dec_image_not_quantised"]) < TOLERANCE
  assert error(plain, expected["dec_image"]) > 0.1
  # The vectors of the table are their own nearest ones.
  np.testing.assert_array_equal(model(codebook(z)), model(z))


def test_model_is_frozen(read):
  model, _, _ = read("sd")
  assert not model.trainable_variables
  with tf.GradientTape() as tape:
    model(golden("sd")["dec_z"])
  assert not tape.watched_variables()


def test_bfloat16_finds_the_same_codes(read):
  model, _, _ = read("ldm")
  expected = golden("ldm")
  # Near each other, on a scale on which bfloat16 has few numbers.
  codes = 30.0 + np.random.default_rng(0).normal(size=(32, 3))
  z = codes[expected["dec_indices"]].astype(np.float32)
  rounded = precision.with_policy(model, precision.BFLOAT16)
  codebook = rounded.get_layer("codebook")
  codebook.embeddings.assign(codes)
  assert codebook(z).dtype == tf.bfloat16
  np.testing.assert_array_equal(codebook.indices(z), expected["dec_indices"])
  np.testing.assert_array_equal(
      tf.cast(codebook(z), tf.float32),
      tf.cast(tf.cast(z, tf.bfloat16), tf.float32))
  # As a whole.
  rounded = precision.with_policy(model, precision.BFLOAT16)
  images = rounded(expected["dec_z"])
  assert images.dtype == tf.float32
  assert TOLERANCE < error(images, expected["dec_image"]) < 0.2


def test_saved_and_loaded_in_safe_mode(read, tmp_path):
  model, _, _ = read("ldm")
  path = str(tmp_path / "decoder.keras")
  model.save(path)
  loaded = keras.saving.load_model(path, compile=False, safe_mode=True)
  assert loaded is not model
  assert files.graph_text(loaded) == files.graph_text(model)
  z = golden("ldm")["dec_z"]
  np.testing.assert_array_equal(loaded(z), model(z))


# --- The codebook ---


def codebook_of(codes):
  layer = autoencoder.Codebook(len(codes))
  layer.build((None, codes.shape[1]))
  layer.embeddings.assign(codes)
  return layer


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("channels,offset", [(1, 0.0), (3, 0.0), (4, 500.0)])
def test_nearest_code(channels, offset, jit_compile):
  """Far from the origin too, where |z|^2 - 2 z e + |e|^2 loses its digits."""
  rng = np.random.default_rng(0)
  codes = (offset + rng.normal(size=(50, channels))).astype(np.float32)
  z = (offset + rng.normal(size=(2, 7, 5, channels))).astype(np.float32)
  distances = np.sum((z[..., None, :].astype(np.float64) - codes) ** 2, axis=-1)
  layer = codebook_of(codes)

  @tf.function(jit_compile=jit_compile)
  def run(z):
    with tf.GradientTape() as tape:
      tape.watch(z)
      values = layer(z)
    return values, layer.indices(z), tape.gradient(values, z, r)

  r = tf.constant(rng.normal(size=z.shape), tf.float32)
  values, indices, gradient = run(tf.constant(z))
  np.testing.assert_array_equal(indices, np.argmin(distances, axis=-1))
  np.testing.assert_array_equal(values, codes[indices])
  np.testing.assert_array_equal(gradient, r)


def test_what_is_not_finite_stays_so():
  layer = codebook_of(np.ones((2, 3), np.float32))
  z = np.array([[np.nan, 1, 1], [1, np.inf, 1], [1, 1, 1]], np.float32)
  finite = np.isfinite(layer(z))
  np.testing.assert_array_equal(finite.all(axis=-1), [False, False, True])


# --- Other architectures ---


def _normalised(h, scale, bias, groups):
  shape = h.shape
  h = h.reshape(*shape[:3], groups, -1)
  mean = h.mean(axis=(1, 2, 4), keepdims=True)
  variance = h.var(axis=(1, 2, 4), keepdims=True)
  return ((h - mean) / np.sqrt(variance + 1e-6)).reshape(shape) * scale + bias


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "gelu": lambda x: x * (1 + tf.math.erf(x / np.sqrt(2)).numpy()) / 2,
}


class Reading:
  """Decodes in float64 from diffusers' names; draws the tensors it lacks."""

  def __init__(self, config, weights=None):
    self.config, self.weights = config, {} if weights is None else weights
    self._rng = np.random.default_rng(0)

  def _get(self, name, *shape):
    if name not in self.weights:
      self.weights[name] = self._rng.normal(
          size=shape, scale=0.4).astype(np.float32)
    assert self.weights[name].shape == shape, name
    return self.weights[name].astype(np.float64)

  def _conv(self, h, place, width, size=3):
    kernel = self._get(f"{place}.weight", width, h.shape[-1], size, size)
    h = tf.nn.conv2d(h, kernel.transpose(2, 3, 1, 0), 1, "SAME").numpy()
    return h + self._get(f"{place}.bias", width)

  def _norm(self, h, place):
    width = h.shape[-1]
    return _normalised(
        h, self._get(f"{place}.weight", width),
        self._get(f"{place}.bias", width), self.config["norm_num_groups"])

  def _resnet(self, x, place, width):
    act = ACTIVATIONS[self.config["act_fn"]]
    h = self._conv(act(self._norm(x, f"{place}.norm1")), f"{place}.conv1",
                   width)
    h = self._conv(act(self._norm(h, f"{place}.norm2")), f"{place}.conv2",
                   width)
    if x.shape[-1] != width:
      x = self._conv(x, f"{place}.conv_shortcut", width, 1)
    return x + h

  def _attention(self, x):
    h = self._norm(x, ATTENTION + "group_norm")
    width = h.shape[-1]
    h = h.reshape(len(h), -1, width)

    def dense(h, name):
      return h @ self._get(f"{ATTENTION}{name}.weight", width, width).T + (
          self._get(f"{ATTENTION}{name}.bias", width))

    query, key, value = (dense(h, name) for name in ("to_q", "to_k", "to_v"))
    logits = query @ key.transpose(0, 2, 1) / np.sqrt(width)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return x + dense(shares @ value, "to_out.0").reshape(x.shape)

  def __call__(self, z):
    config, h = self.config, z.astype(np.float64)
    width = config["latent_channels"]
    if config["_class_name"] == "VQModel":
      codes = self._get("quantize.embedding.weight",
                        config["num_vq_embeddings"], z.shape[-1])
      h = codes[np.argmin(
          np.sum((h[..., None, :] - codes) ** 2, axis=-1), axis=-1)]
    if config.get("use_post_quant_conv", True):
      h = self._conv(h, "post_quant_conv", width, 1)
    widths = config["block_out_channels"][::-1]
    h = self._conv(h, "decoder.conv_in", widths[0])
    h = self._resnet(h, "decoder.mid_block.resnets.0", widths[0])
    if config.get("mid_block_add_attention", True):
      h = self._attention(h)
    h = self._resnet(h, "decoder.mid_block.resnets.1", widths[0])
    for i, width in enumerate(widths):
      place = f"decoder.up_blocks.{i}"
      for j in range(config["layers_per_block"] + 1):
        h = self._resnet(h, f"{place}.resnets.{j}", width)
      if i < len(widths) - 1:
        h = np.repeat(np.repeat(h, 2, axis=1), 2, axis=2)
        h = self._conv(h, f"{place}.upsamplers.0.conv", width)
    h = ACTIVATIONS["silu"](self._norm(h, "decoder.conv_norm_out"))
    return self._conv(h, "decoder.conv_out", config["out_channels"])


@pytest.mark.parametrize("name", FOLDERS)
def test_the_reading_is_that_of_diffusers(name):
  weights, expected = weights_of(name), golden(name)
  before = set(weights)
  images = Reading(config_of(name), weights)(expected["dec_z"])
  assert set(weights) == before
  assert error(images, expected["dec_image"]) < TOLERANCE


SMALL = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1",
         "norm_num_groups": 2, "act_fn": "silu", "layers_per_block": 1,
         "latent_channels": 4, "out_channels": 3, "sample_size": 16}


@pytest.mark.parametrize("changes,shape", [
    (dict(block_out_channels=[4, 8, 6], sample_size=[8, 12]), (2, 3, 4)),
    (dict(block_out_channels=[6], sample_size=5, layers_per_block=2,
          act_fn="gelu", mid_block_add_attention=False, out_channels=1,
          use_post_quant_conv=False, use_quant_conv=False), (5, 5, 4)),
    (dict(block_out_channels=[2, 8, 4, 6], sample_size=[8, 24], act_fn="mish",
          latent_channels=1, force_upcast=True), (1, 3, 1)),
    (dict(block_out_channels=[4, 4], act_fn="relu", norm_num_groups=1,
          layers_per_block=3, mid_block_add_attention=False), (8, 8, 4)),
    (dict(_class_name="VQModel", block_out_channels=[4, 6], act_fn="swish",
          num_vq_embeddings=7, vq_embed_dim=5, latent_channels=3,
          sample_size=6, norm_type="group", lookup_from_codebook=False),
     (3, 3, 5)),
])
def test_other_architectures(tmp_path, changes, shape):
  config = {**SMALL, **changes, "up_block_types": ["UpDecoderBlock2D"] * len(
      changes["block_out_channels"])}
  reading = Reading(config)
  z = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
  expected = reading(z)
  factor = 2 ** (len(config["block_out_channels"]) - 1)
  assert expected.shape[1:] == (
      factor * shape[0], factor * shape[1], config["out_channels"])
  model, _, _ = formats.read(write(tmp_path, config, reading.weights))
  assert model.input_shape == (None, *shape)
  assert model.output_shape == (None, *expected.shape[1:])
  assert error(model(z), expected) < TOLERANCE


@pytest.mark.parametrize("told,size", [(4, (4, 4)), ([2, 7], (2, 7))])
@pytest.mark.parametrize("sample_size", [16, None, 15])
def test_another_size_of_latents(tmp_path, sample_size, told, size):
  config = config_of("sd") | {"sample_size": sample_size}
  weights = weights_of("sd")
  folder = write(tmp_path, config, weights)
  model, scale, _ = formats.read(folder, latent_size=told)
  z = np.random.default_rng(2).normal(size=(1, *size, 4)).astype(np.float32)
  assert error(model(z), Reading(config, weights)(z)) < TOLERANCE
  assert scale == 0.18215


@pytest.mark.parametrize("changes,words", [
    (dict(activation="tanh"), "activation"),
    (dict(latent_size=0), "latent_size"),
    (dict(latent_size=(4, 4, 4)), "latent_size"),
    (dict(channels=()), "channels"),
    (dict(channels=(4, 0)), "channels"),
    (dict(norm_groups=3), "norm_groups"),
    (dict(norm_groups=0), "norm_groups"),
    (dict(layers_per_block=65), "layers_per_block"),
    (dict(latent_channels=0), "latent_channels"),
    (dict(num_codes=0), "num_codes"),
    (dict(post_quant_conv=False, post_quant_channels=4), "post_quant_channels"),
])
def test_architectures_that_are_refused(changes, words):
  fields = dict(latent_size=4, latent_channels=4, out_channels=3,
                channels=(4, 8), layers_per_block=1, norm_groups=2)
  autoencoder.build_decoder(autoencoder.DecoderConfig(**fields))
  with pytest.raises(ValueError, match=words):
    autoencoder.build_decoder(autoencoder.DecoderConfig(**(fields | changes)))


# --- Configurations ---


@pytest.mark.parametrize("name,factor", [("sd", 0.18215), ("ldm", 1.0)])
def test_a_missing_scaling_factor(tmp_path, name, factor):
  config = config_of(name)
  del config["scaling_factor"]
  assert formats.read_config(write(tmp_path, config))[1:] == (factor, 0.0)
  config["scaling_factor"] = 0.5
  assert formats.read_config(write(tmp_path, config))[1:] == (0.5, 0.0)


def test_means_and_deviations_of_latents(tmp_path):
  """diffusers decodes z * std / factor + mean."""
  mean, std = [0.5, -1, 0, 2.25], [8.0, 2.0, 1, 0.25]
  _, scale, shift = formats.read_config(write(tmp_path, config_of("sd") | dict(
      scaling_factor=0.5, latents_mean=mean, latents_std=std)))
  z = np.random.default_rng(0).normal(size=(2, 3, 3, 4))
  np.testing.assert_allclose(z / np.array(scale) + shift,
                             z * std / 0.5 + mean, rtol=1e-12)


def test_defaults_of_a_configuration(tmp_path):
  config, _, _ = formats.read_config(
      write(tmp_path, {"_class_name": "AutoencoderKL"}))
  assert config == autoencoder.DecoderConfig(
      latent_size=(32, 32), latent_channels=4, out_channels=3, channels=(64,),
      layers_per_block=1, norm_groups=32)
  assert config.norm_epsilon == 1e-6
  config, _, _ = formats.read_config(
      write(tmp_path, {"_class_name": "VQModel"}))
  assert (config.num_codes, config.latent_channels) == (256, 3)


@pytest.mark.parametrize("name,changes,words", [
    ("sd", dict(_class_name="AutoencoderTiny"), ["_class_name", "Tiny"]),
    ("sd", dict(_class_name=["VQModel"]), ["_class_name"]),
    ("sd", dict(norm_type="group"), ["unknown key 'norm_type'"]),
    ("ldm", dict(norm_type="spatial"), ["norm_type", "'group'", "'spatial'"]),
    ("ldm", dict(lookup_from_codebook=True), ["lookup_from_codebook", "True"]),
    ("ldm", dict(num_vq_embeddings=0), ["num_vq_embeddings", "0"]),
    ("ldm", dict(vq_embed_dim="3"), ["vq_embed_dim", "'3'"]),
    ("ldm", dict(shift_factor=1.0), ["unknown key 'shift_factor'"]),
    ("sd", dict(up_block_types=["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]),
     ["up_block_types", "AttnUpDecoderBlock2D"]),
    ("sd", dict(up_block_types=["UpDecoderBlock2D"]),
     ["up_block_types", "2 and 1"]),
    ("sd", dict(up_block_types="UpDecoderBlock2D"), ["up_block_types", "list"]),
    ("sd", dict(block_out_channels=[], up_block_types=[]), ["0 and 0"]),
    ("sd", dict(block_out_channels=8), ["block_out_channels", "list"]),
    ("sd", dict(block_out_channels=[4, "8"]), ["block_out_channels", "'8'"]),
    ("sd", dict(block_out_channels=[4, 9]), ["norm_groups", "9"]),
    ("sd", dict(block_out_channels=[4, 10**6]), ["channels", "1000000"]),
    ("sd", dict(layers_per_block=1.5), ["layers_per_block", "1.5"]),
    ("sd", dict(latent_channels=True), ["latent_channels", "True"]),
    ("sd", dict(out_channels=None), ["out_channels", "None"]),
    ("sd", dict(norm_num_groups=0), ["norm_num_groups", "0"]),
    ("sd", dict(act_fn="tanh"), ["act_fn", "'silu'", "'tanh'"]),
    ("sd", dict(act_fn=["silu"]), ["act_fn", "['silu']"]),
    ("sd", dict(mid_block_add_attention="yes"), ["mid_block_add_attention"]),
    ("sd", dict(use_post_quant_conv=None), ["use_post_quant_conv", "None"]),
    ("sd", dict(sample_size=15), ["sample_size", "multiple of 2", "15"]),
    ("sd", dict(sample_size=None), ["latent_size must be given"]),
    ("sd", dict(sample_size="16"), ["sample_size", "'16'"]),
    ("sd", dict(scaling_factor=0), ["scaling_factor", "0"]),
    ("sd", dict(scaling_factor=None), ["scaling_factor", "None"]),
    ("sd", dict(shift_factor="0.1"), ["shift_factor", "'0.1'"]),
    ("sd", dict(latents_mean=[0.0] * 4), ["latents_std", "None"]),
    ("sd", dict(latents_std=[1.0] * 4), ["latents_mean", "None"]),
    ("sd", dict(latents_mean=[0.0] * 3, latents_std=[1.0] * 4),
     ["latents_mean", "4 numbers"]),
    ("sd", dict(latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 0.0, 1.0]),
     ["latents_std", "above 0"]),
    ("sd", dict(latents_mean=[0.0, 0.0, None, 1.0], latents_std=[1.0] * 4),
     ["latents_mean", "finite"]),
    ("sd", dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
                shift_factor=0.1), ["shift_factor", "null"]),
    ("sd", dict(temporal=True), ["unknown key 'temporal'"]),
])
def test_configurations_that_are_refused(tmp_path, name, changes, words):
  folder = write(tmp_path, config_of(name) | changes, weights_of(name))
  message = refusal(formats.read, folder)
  for word in words:
    assert word in message, message


@pytest.mark.parametrize("size", [0, -1, 2.0, "8", (4,), (4, 4, 4), True])
def test_sizes_that_are_refused(size):
  message = refusal(formats.read_config, FOLDERS["sd"], latent_size=size)
  assert "latent_size" in message and repr(size) in message


def test_what_is_not_such_a_folder(tmp_path):
  assert "config.json" in refusal(formats.read, str(tmp_path))
  assert "config.json" in refusal(formats.read, str(tmp_path / "none"))
  folder = write(tmp_path, config_of("sd"))
  assert diffusers.WEIGHTS in refusal(formats.read, folder)
  (tmp_path / diffusers.WEIGHTS).write_bytes(b"not weights")
  assert "safetensors" in refusal(formats.read, folder)
  (tmp_path / diffusers.CONFIG).write_text("{")
  assert "config.json" in refusal(formats.read, folder)


# --- Tensors ---


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_attention(read, tmp_path, convolutions):
  weights, changed = weights_of("sd"), 0
  for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                   ("to_out.0", "proj_attn")):
    for leaf in ("weight", "bias"):
      value = weights.pop(f"{ATTENTION}{new}.{leaf}")
      if leaf == "weight" and convolutions:
        value = value[:, :, None, None]
      weights[f"{ATTENTION}{old}.{leaf}"] = value
      changed += 1
  assert changed == 8
  model, _, _ = formats.read(write(tmp_path, config_of("sd"), weights))
  z = golden("sd")["dec_z"]
  np.testing.assert_array_equal(model(z), read("sd")[0](z))


def test_the_encoder_is_not_needed(read, tmp_path):
  weights = {name: value for name, value in weights_of("sd").items()
             if not name.startswith(("encoder.", "quant_conv."))}
  assert len(weights) < len(weights_of("sd"))
  model, _, _ = formats.read(write(tmp_path, config_of("sd"), weights))
  z = golden("sd")["dec_z"]
  np.testing.assert_array_equal(model(z), read("sd")[0](z))


def test_pickled_weights(read, tmp_path, fake_torch):
  fake_torch.state = {
      name: FakeTensor(value) for name, value in weights_of("sd").items()}
  folder = write(tmp_path, config_of("sd"))
  (tmp_path / diffusers.PICKLED_WEIGHTS).write_text("PyTorch reads this")
  model, _, _ = formats.read(folder)
  z = golden("sd")["dec_z"]
  np.testing.assert_array_equal(model(z), read("sd")[0](z))


@pytest.mark.parametrize("name,tensor", [
    ("ldm", "quantize.embedding.weight"), ("ldm", "post_quant_conv.bias"),
    ("sd", "post_quant_conv.weight"), ("sd", "decoder.conv_in.bias"),
    ("sd", ATTENTION + "to_out.0.weight"),
    ("sd", "decoder.up_blocks.1.resnets.0.conv_shortcut.weight")])
def test_missing_and_misshapen_tensors(tmp_path, name, tensor):
  weights = weights_of(name)
  value = weights.pop(tensor)
  folder = write(tmp_path, config_of(name), weights)
  message = refusal(formats.read, folder)
  assert f"Missing: {tensor.removeprefix('decoder.')}" in message, message
  assert folder in message
  weights[tensor] = np.concatenate([value, value])
  message = refusal(formats.read, write(tmp_path, config_of(name), weights))
  assert "shape" in message and tensor.removeprefix("decoder.") in message
  weights[tensor] = np.full_like(value, np.nan)
  message = refusal(formats.read, write(tmp_path, config_of(name), weights))
  assert "NaN" in message and tensor in message


@pytest.mark.parametrize("name,tensor", [
    ("sd", "quantize.embedding.weight"), ("sd3", "post_quant_conv.weight"),
    ("sd", "decoder.conv_in.scale"), ("sd", "logvar"),
    ("sd", ATTENTION + "query.weight"), ("sd", "conv_in.weight"),
    ("sd", "decoder.up_blocks.1.upsamplers.0.conv.weight")])
def test_tensors_left_over(tmp_path, name, tensor):
  weights = weights_of(name) | {tensor: np.ones((2, 2), np.float32)}
  message = refusal(formats.read, write(tmp_path, config_of(name), weights))
  assert f"Unused: {tensor.removeprefix('decoder.')}" in message, message


def test_a_configuration_of_other_tensors(tmp_path):
  """Attention and post_quant_conv that the configuration denies."""
  for key, word in (("mid_block_add_attention", "attentions.0"),
                    ("use_post_quant_conv", "post_quant_conv")):
    message = refusal(formats.read, write(
        tmp_path, config_of("sd") | {key: False}, weights_of("sd")))
    assert "Unused" in message and word in message
